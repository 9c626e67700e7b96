"""Models and commands of DNA on an NVIDIA GPU: against float64, against the CPU, and a million bases' memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.cli import main
from core.sampling import Sampling
from genomics.embed import embed
from genomics.fasta import Fasta
from genomics.generate import continuations, generate
from genomics.inference import Loaded, log_probability_pieces, surprisal
from genomics.intervals import Interval
from genomics.memory import estimate
from genomics.models import GenomeClassifier, build_lm
from genomics.perplexity import perplexity
from genomics.predict import predict
from genomics.pretrained import PretrainedClassifier
from genomics.score import score
from genomics.vocabulary import BOS, COMPLEMENT, PAD

pytestmark = pytest.mark.gpu
MODELS = {
    "mamba": {},
    "mamba2": {"mixer": "mamba2"},
    "mamba3": {"mixer": "mamba3"},
    "hyena": {"mixer": "hyena"},
    "attention": {"mixer": "attention"},
    "caduceus_ph": {"objective": "masked"},
    "caduceus_ps": {"objective": "masked", "rcps": True},
}


def model(name: str, width: int = 64, layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return build_lm(d_model=width, n_layer=layers, l_max=1 << 20, **MODELS[name]).eval()  # type: ignore[arg-type]


def bases(batch: int, length: int) -> Tensor:
    return torch.randint(7, 11, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, ids: Tensor, autocast: bool) -> list[Tensor]:
    """Of the mean cross-entropy of the next bases, by parameter."""
    net.zero_grad(set_to_none=True)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = net(ids[:, :-1])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [p.grad.detach().double().cpu() for p in net.parameters() if p.grad is not None]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative, of all gradients together."""
    differences = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    return (differences / sum(float(b.square().sum()) for b in exact)) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str) -> None:
    """No further from float64 than twice what the CPU is, in float32 and under autocast."""
    net, ids = model(name), bases(2, 201)
    exact = gradients(copy.deepcopy(net).double(), ids, False)
    for autocast in (False, True):
        here = error(gradients(net, ids, autocast), exact)
        there = error(gradients(copy.deepcopy(net).cuda(), ids.cuda(), autocast), exact)
        print(f"{name}, autocast {autocast}: CPU {here:.1e}, GPU {there:.1e}")
        assert 0 < there <= 2 * here


def test_the_other_strand_has_the_same_answer() -> None:
    net, ids = model("caduceus_ps").cuda(), bases(3, 500).cuda()
    complement = torch.from_numpy(COMPLEMENT).long().cuda()
    with torch.inference_mode():
        there, back = net(ids), net(complement[ids].flip(1))
    torch.testing.assert_close(back[..., :12], there.flip(1)[..., complement], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "piece"), [("mamba", 1000), ("mamba", 333), ("mamba2", 1000), ("hyena", 4096)])
def test_surprisal_of_a_streamed_contig(genome: str, name: str, piece: int) -> None:
    """What pieces on the GPU say of each base is what float64 says of the whole contig."""
    net, fasta = model(name), Fasta(genome)
    ids = torch.from_numpy(fasta.read("a")).long()[None]
    exact = copy.deepcopy(net).double()(torch.cat([torch.full((1, 1), BOS), ids], dim=1)[:, :-1]).log_softmax(-1)
    wanted = -exact.detach()[0].gather(1, ids[0, :, None])[:, 0].numpy()
    pieces = log_probability_pieces(Loaded(net.cuda()), fasta, Interval("a", 0, 4096), piece)
    found = np.concatenate([surprisal(*each) for each in pieces])
    print(f"{name}, pieces of {piece}: worst {np.abs(found - wanted).max():.1e} nats")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "attention", "hyena"])
def test_generated_bases_are_the_likeliest(name: str) -> None:
    """Token by token from the state, by graphs where there are any, and from whole sequences: the same."""
    net = model(name).cuda()
    with torch.inference_mode():
        for parameter in net.parameters():  # opinions that rounding does not turn
            parameter.mul_(1.5)
        prompt = torch.cat([torch.full((1, 1), BOS), bases(1, 50)], dim=1).cuda()
        made = continuations(net, prompt, 40, Sampling(temperature=0.0), 0)
        whole = torch.cat([prompt, made], dim=1)
        scores = net(whole)[0, 50:-1, 7:11].float()
    chosen = scores.gather(1, made[0, :, None] - 7)[:, 0]
    assert made.shape == (1, 40)
    assert (scores.amax(1) - chosen).max() <= 1e-4  # a tie may go either way


def test_commands(tmp_path: Path, genome: str) -> None:
    """Train in bfloat16, and use the checkpoint: the GPU writes what the CPU writes."""
    argv = ["pretrain", "--data.fasta", genome, "--data.window", "128", "--data.batch_size", "4", "--model.d_model",
            "16", "--model.n_layer", "2", "--trainer.max_steps", "6", "--trainer.precision", "bf16-mixed", "--run_dir",
            str(tmp_path / "run"), "--data.test_windows", "8", "--trainer.enable_progress_bar", "false"]  # fmt: skip
    main(
        "genomics", "genomics.language.LanguageModel", "genomics.datasets.GenomeData", default_recipe="pretrain",
        links={"data.window": "model.context"}, argv=argv,
    )  # fmt: skip
    assert 3 < json.loads((tmp_path / "run" / "metrics.json").read_text())["test/perplexity"] < 16
    run, found = str(tmp_path / "run"), {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        perplexity(run, genome, device=device, out=str(out / "p"))
        predict(run, genome, bin=64, device=device, out=str(out / "t"))
        score(run, genome, ism="a:101-103", window=64, device=device, out=str(out / "s"))
        embed(run, genome, device=device, out=str(out / "e"))
        generate(run, "ACGT", length=50, device=device, out=str(out / "g"))
        track = [line.split() for line in (out / "t" / "surprisal.bedgraph").read_text().splitlines()[1:]]
        heat = [line.split("\t") for line in (out / "s" / "ism.tsv").read_text().splitlines()[1:]]
        found[device] = [float(row[-1]) for row in track + heat]
        assert len(Fasta(out / "g" / "generated.fa").read("generated_1")) == 54
    assert len(found["cpu"]) == 64 + 9
    np.testing.assert_allclose(found["cuda"], found["cpu"], rtol=0, atol=1e-3)


def test_classifier_of_reads() -> None:
    """Both strands of reads of several lengths, from 8-mers, padded: as on the CPU."""
    torch.manual_seed(0)
    net = GenomeClassifier(4, "max", True, kmer=8, kmer_width=16, d_model=64, n_layer=2).eval()
    ids = bases(6, 300)
    ids[3:, 200:] = PAD
    exact = copy.deepcopy(net).double()(ids)
    with torch.inference_mode():
        found = net.cuda()(ids.cuda()).cpu().double()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba2", "hyena", "caduceus_ph", "caduceus_ps"])
def test_fine_tuned_models(name: str) -> None:
    """Scores of padded reads, and the gradients of their loss, as in float64 on the CPU."""
    ids, classes = bases(4, 150), torch.tensor([0, 2, 1, 0])
    ids[2:, 90:] = PAD
    found = {}
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "cuda")):
        torch.manual_seed(0)
        net = PretrainedClassifier(Loaded(model(name), BOS if name in ("mamba2", "hyena") else None), 3, "mean")
        net = net.to(device, dtype).train()
        net.loss(ids.to(device), classes.to(device)).backward()
        grads = [p.grad.double().cpu() for p in net.parameters() if p.grad is not None]
        found[device] = net(ids.to(device)).detach().double().cpu(), grads
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-4, atol=1e-5)
    assert error(found["cuda"][1], found["cpu"][1]) <= 1e-4


def peak(net: nn.Module, ids: Tensor) -> float:
    """GiB at the peak of a training step, weights left out; the second step, after all compiling."""
    gradients(net, ids, True)
    net.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(net, ids, True)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


@pytest.mark.parametrize("name", ["mamba", "mamba2", "hyena", "caduceus_ps"])
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_estimate(name: str, recompute: bool) -> None:
    """What is printed before a run is within a third of what a step of 2^17 bases takes."""
    net, ids = model(name, 128, 4).cuda().train(), bases(1, (1 << 17) + 1).cuda()
    net.set_gradient_checkpointing(recompute)  # type: ignore[operator]
    found, expected = peak(net, ids), estimate(net, 1 << 17, recompute, True)["activations"] / 2**30
    print(f"{name}, recompute {recompute}: {found:.2f} GiB, estimated {expected:.2f}")
    assert 0.67 <= expected / found <= 1.5


def test_a_million_bases_fit_in_8_gib() -> None:
    """Six blocks of 128 channels, computed again 2^19 tokens at a time: 6.2 GiB."""
    net = model("mamba", 128, 6).cuda().train()
    net.set_gradient_checkpointing()  # type: ignore[operator]
    found = peak(net, bases(1, (1 << 20) + 1).cuda())
    print(f"{torch.cuda.get_device_name()}: {found:.2f} GiB")
    assert found <= 6.6
