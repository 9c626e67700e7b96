"""The commands on trained models: they write what the model says, whole or in pieces, from any kind of folder."""

import gzip
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from core.checkpoints import save_weights
from core.errors import UserError
from core.published import save_lm
from genomics import caduceus, hyenadna_published
from genomics.caduceus import Caduceus, CaduceusConfig
from genomics.embed import embed
from genomics.fasta import Fasta
from genomics.generate import generate
from genomics.hyenadna import HyenaDNA, HyenaDNAConfig
from genomics.inference import load_model
from genomics.models import GenomeClassifier, GenomeLM, build_lm
from genomics.perplexity import perplexity
from genomics.predict import predict
from genomics.score import score
from genomics.vocabulary import BOS, COMPLEMENT, MASK, decode, encode

SIZES = {"d_model": 8, "n_layer": 2, "d_state": 4}


@pytest.fixture
def genome(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    path = tmp_path / "genome.fa"
    text = "".join(f">{name}\n{''.join(rng.choice(list('ACGT'), size))}\n" for name, size in (("a", 211), ("b", 64)))
    path.write_text(text)
    return str(path)


def checkpoint(folder: Path, **options) -> str:
    torch.manual_seed(1)
    net = build_lm(
        **SIZES, **{k: v for k, v in options.items() if k != "context"}, l_max=options.get("context", 1024) + 2
    )
    with torch.no_grad():
        for parameter in net.parameters():  # a model that has opinions
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    path = folder / "model.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {**SIZES, **options}}, path)
    return str(path)


def logits(model: str, text: str, start: bool = True) -> torch.Tensor:
    ids = torch.tensor([[*([BOS] if start else []), *encode(text).tolist()]])
    return load_model(model, "cpu").net(ids).log_softmax(-1)[0].detach()


def table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("piece", "options"), [(1000, {}), (32, {}), (7, {}), (1000, {"mixer": "attention"})], ids=str)
def test_streaming_is_the_whole(tmp_path: Path, genome: str, piece: int, options: dict[str, str]) -> None:
    model, fasta = checkpoint(tmp_path, **options), Fasta(genome)
    perplexity(model, genome, piece=piece, device="cpu", out=str(tmp_path / "p"))
    embed(model, genome, pooling="none", piece=piece, device="cpu", out=str(tmp_path / "e"))
    predict(model, genome, bin=16, piece=piece, device="cpu", out=str(tmp_path / "t"))
    rows = table(tmp_path / "p" / "perplexity.tsv")
    tensors = load_file(tmp_path / "e" / "embeddings.safetensors")
    track = [row for row in table(tmp_path / "t" / "surprisal.bedgraph") if len(row) == 4]
    for row, name in zip(rows[1:], "ab", strict=True):
        ids = fasta.read(name)
        scores = logits(model, decode(ids))
        nats = -scores[:-1].gather(1, torch.from_numpy(ids.astype(np.int64))[:, None])[:, 0].numpy()
        assert float(row[6]) == pytest.approx(np.exp(nats.mean()), rel=1e-4)
        assert int(row[4]) == len(ids)
        net = load_model(model, "cpu").net
        hidden = net.backbone(torch.tensor([[BOS, *ids.tolist()]]))[0, 1:].detach().numpy()
        np.testing.assert_allclose(tensors[name], hidden, rtol=1e-3, atol=1e-4)
        own = [r for r in track if r[0] == name]
        assert [int(r[1]) for r in own] == list(range(0, len(ids), 16))
        assert int(own[-1][2]) == len(ids)
        means = [nats[i : i + 16].mean() for i in range(0, len(ids), 16)]
        np.testing.assert_allclose([float(r[3]) for r in own], means, rtol=1e-3)


@pytest.mark.parametrize("kind", ["mean", "max", "last"])
def test_pooled_embeddings_of_intervals(tmp_path: Path, genome: str, kind: str) -> None:
    model = checkpoint(tmp_path)
    bed = tmp_path / "a.bed"
    bed.write_text("a\t10\t60\tfirst\nb\t0\t9\tsecond\n")
    embed(model, genome, bed=str(bed), pooling=kind, piece=8, device="cpu", out=str(tmp_path / "e"))
    found = load_file(tmp_path / "e" / "embeddings.safetensors")["embeddings"]
    ids = [BOS, *Fasta(genome).read("a", 10, 60).tolist()]
    hidden = load_model(model, "cpu").net.backbone(torch.tensor([ids]))[0, 1:].detach()
    want = {"mean": hidden.mean(0), "max": hidden.amax(0), "last": hidden[-1]}[kind]
    np.testing.assert_allclose(found[0], want, rtol=1e-3, atol=1e-4)
    assert table(tmp_path / "e" / "names.tsv")[1] == ["b", "0", "9", "second"]


def test_variants_of_a_causal_model(tmp_path: Path, genome: str) -> None:
    model, bases = checkpoint(tmp_path), decode(Fasta(genome).read("a"))
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    vcf = tmp_path / "v.vcf"
    lines = ["##fileformat=VCFv4.2", f"a\t101\trs1\t{bases[100]}\t{other[bases[100]]},{bases[100]}GG\t.\tPASS\tX=1",
             f"a\t1\t.\t{bases[:3]}\t{bases[0]}", f"a\t5\t.\t{bases[4]}\t<DEL>"]  # fmt: skip
    vcf.write_text("\n".join(lines) + "\n")
    score(model, genome, vcf=str(vcf), window=40, batch_size=5, device="cpu", out=str(tmp_path / "s"))
    rows = [row for row in table(tmp_path / "s" / "scores.vcf") if not row[0].startswith("#")]
    assert rows[0][7].startswith("X=1;LLR=")
    assert rows[2][7] == "LLR=."
    found = [float(value) for value in rows[0][7].split("LLR=")[1].split(",")]

    def likelihood(text: str) -> float:
        both = (text, decode(COMPLEMENT[encode(text)][::-1]))
        sums = [
            logits(model, one)[:-1].gather(1, torch.from_numpy(encode(one).astype(np.int64))[:, None]).sum()
            for one in both
        ]
        return float(sum(sums)) / 2

    left, right = bases[100 - 19 : 100], bases[101 : 101 + 19]
    want = likelihood(left + other[bases[100]] + right) - likelihood(left + bases[100] + right)
    assert found[0] == pytest.approx(want, abs=2e-4)
    left, right = bases[100 - 18 : 100], bases[101 : 101 + 18]
    want = likelihood(left + bases[100] + "GG" + right) - likelihood(left + bases[100] + right)
    assert found[1] == pytest.approx(want, abs=2e-4)
    vcf.write_text(f"a\t101\t.\t{other[bases[100]]}\tA\n")
    with pytest.raises(UserError, match=r"line 1: REF is .*same assembly"):
        score(model, genome, vcf=str(vcf), device="cpu", out=str(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()
    (tmp_path / "cut.vcf.gz").write_bytes(gzip.compress(b"a\t1\t.\tA\tC\n")[:20])
    with pytest.raises(UserError, match=r"cut.vcf.gz cannot be read as a VCF file \(damaged gzip file"):
        score(model, genome, vcf=str(tmp_path / "cut.vcf.gz"), device="cpu", out=str(tmp_path / "bad"))


@pytest.mark.parametrize("rcps", [False, True])
def test_mutagenesis_of_a_masked_model(tmp_path: Path, genome: str, rcps: bool) -> None:
    model = checkpoint(tmp_path, objective="masked", rcps=rcps)
    score(model, genome, ism="a:101-103", window=30, both_strands=False, device="cpu", out=str(tmp_path / "s"))
    rows = table(tmp_path / "s" / "ism.tsv")[1:]
    assert len(rows) == 9
    assert (tmp_path / "s" / "ism.png").stat().st_size > 1000
    place = int(rows[4][1]) - 1
    ids = Fasta(genome).read("a", place - 14, place + 15).astype(np.int64)
    ids[14] = MASK
    scores = load_model(model, "cpu").net(torch.from_numpy(ids)[None]).log_softmax(-1)[0, 14]
    old, new = (int(encode(base)[0]) for base in rows[4][2:4])
    assert float(rows[4][4]) == pytest.approx(float((scores[new] - scores[old]).detach()), abs=1e-4)
    with pytest.raises(UserError, match="only a causal"):
        generate(model, "ACGT", device="cpu", out=str(tmp_path / "g"))


@pytest.mark.parametrize("mixer", ["mamba", "hyena", "attention"])
def test_generation(tmp_path: Path, genome: str, mixer: str) -> None:
    model = checkpoint(tmp_path, mixer=mixer)
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        generate(model, "ACGT", length=90, count=2, seed=seed, device="cpu", out=str(tmp_path / name))
    one, two, three = (Fasta(tmp_path / name / "generated.fa") for name in ("one", "two", "three"))
    texts = [[decode(f.read(name)) for name in f.lengths] for f in (one, two, three)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text) == 94 and text.startswith("ACGT") and set(text) <= set("ACGT") for text in texts[0])
    generate(model, "ACGT", length=5, temperature=0, device="cpu", out=str(tmp_path / "greedy"))
    text = decode(Fasta(tmp_path / "greedy" / "generated.fa").read("generated_1"))
    for i in range(4, 9):
        scores = logits(model, text[:i])[-1, 7:11]
        assert text[i] == "ACGT"[int(scores.argmax())]
    with pytest.raises(UserError, match="wanted both at least 1"):
        generate(model, length=0)


def test_classes_along_a_contig(tmp_path: Path, genome: str) -> None:
    torch.manual_seed(0)
    net = GenomeClassifier(3, "mean", False, **SIZES)
    options = {**SIZES, "num_classes": 3, "pooling": "mean", "average_strands": False, "class_names": ["x", "y", "z"]}
    state = {f"net.{name}": t for name, t in net.state_dict().items()} | {"confusion.val.confmat": torch.zeros(1)}
    torch.save({"state_dict": state, "hyper_parameters": options}, tmp_path / "c.ckpt")
    files = []
    for piece in (1000, 64):
        out = tmp_path / str(piece)
        predict(str(tmp_path / "c.ckpt"), genome, bin=32, piece=piece, device="cpu", out=str(out))
        files.append((out / "predictions.bed").read_text())
    assert files[0] == files[1]
    ids = Fasta(genome).read("a").astype(np.int64)
    hidden = net.backbone(torch.from_numpy(ids)[None])[0, 32:64].mean(0)
    chances = net.head(hidden).softmax(0)
    row = files[0].splitlines()[1].split("\t")
    assert row[:4] == ["a", "32", "64", "xyz"[int(chances.argmax())]]
    assert int(row[4]) == pytest.approx(1000 * float(chances.max()), abs=1)
    with pytest.raises(UserError, match="classifier, which predicts no bases"):
        perplexity(str(tmp_path / "c.ckpt"), genome, device="cpu", out=str(tmp_path / "p"))
    with pytest.raises(UserError, match="--track is surprisal"):
        predict(str(tmp_path / "c.ckpt"), genome, track="surprisal", device="cpu", out=str(tmp_path / "p"))


def test_bigwig_of_intervals(tmp_path: Path, genome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries come in the genome's order whatever the BED file's is; overlaps are refused."""
    entries: list[tuple[str, int, int]] = []

    class File:
        def __enter__(self) -> "File":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def addHeader(self, chroms: list[tuple[str, int]]) -> None:
            assert chroms == [("a", 211), ("b", 64)]

        def addEntries(self, records: list[str], starts: list[int], ends: list[int], values: list[float]) -> None:
            assert all(value > 0 for value in values)
            entries.extend(zip(records, starts, ends, strict=True))

    monkeypatch.setitem(sys.modules, "pyBigWig", types.SimpleNamespace(open=lambda path, mode: File()))
    model, bed = checkpoint(tmp_path), tmp_path / "a.bed"
    bed.write_text("b\t10\t50\na\t100\t140\na\t0\t60\n")
    predict(model, genome, bed=str(bed), bin=30, format="bigwig", device="cpu", out=str(tmp_path / "w"))
    assert entries == [("a", 0, 30), ("a", 30, 60), ("a", 100, 130), ("a", 130, 140), ("b", 10, 40), ("b", 40, 50)]
    bed.write_text("a\t100\t140\na\t0\t101\n")
    with pytest.raises(UserError, match="a:0-101 and a:100-140 overlap"):
        predict(model, genome, bed=str(bed), format="bigwig", device="cpu", out=str(tmp_path / "bad"))


def test_files_with_nothing_to_say(tmp_path: Path) -> None:
    model, fasta = checkpoint(tmp_path), tmp_path / "n.fa"
    fasta.write_text(">a\nNNNNNNNN\n")
    perplexity(model, str(fasta), device="cpu", out=str(tmp_path / "p"))
    assert json.loads((tmp_path / "p" / "metrics.json").read_text()) == {"perplexity": None, "bases": 0, "records": 1}
    (tmp_path / "none.vcf").write_text("##fileformat=VCFv4.2\n")
    with pytest.raises(UserError, match=r"none.vcf holds no variants"):
        score(model, str(fasta), vcf=str(tmp_path / "none.vcf"), device="cpu", out=str(tmp_path / "s"))


def test_released_folders(tmp_path: Path, genome: str) -> None:
    torch.manual_seed(0)
    hf = {"model_type": "hyenadna", "d_model": 8, "n_layer": 1, "d_inner": 32, "emb_dim": 5, "max_seq_len": 66,
          "activation_freq": 10, "filter_order": 8, "vocab_size": 12, "pad_vocab_size_multiple": 8}  # fmt: skip
    net = HyenaDNA(hyenadna_published.config_from_published(hf)).eval()
    folders = {name: tmp_path / name for name in ("hf", "original", "ps", "mamba")}
    for folder in folders.values():
        folder.mkdir()
    (folders["hf"] / "config.json").write_text(json.dumps(hf))
    save_weights({f"hyena.{k}" if k != "lm_head.weight" else k: t for k, t in net.state_dict().items()},
                 folders["hf"] / "model.safetensors")  # fmt: skip
    layer = {"_name_": "hyena", "l_max": 66, "emb_dim": 5, "filter_order": 8, "w": 10, "lr_pos_emb": 0.0}
    (folders["original"] / "config.json").write_text(
        json.dumps({"d_model": 8, "n_layer": 1, "d_inner": 32, "vocab_size": 12, "layer": layer, "fused_mlp": False})
    )
    state = {
        f"model.{k.replace('.mixer.', '.mixer.layer.')}": t for k, t in net.state_dict().items() if "lm_head" not in k
    }
    torch.save({"state_dict": state}, folders["original"] / "weights.ckpt")
    config = CaduceusConfig(d_model=8, n_layer=2, rcps=True, ssm_cfg={"d_state": 4})
    ps = Caduceus(config).eval()
    values = {"model_type": "caduceus", "d_model": 8, "n_layer": 2, "rcps": True, "ssm_cfg": {"d_state": 4},
              "vocab_size": 12, "bidirectional": True, "architectures": ["x"],
              "complement_map": {str(k): v for k, v in (config.complement_map or {}).items()}}  # fmt: skip
    (folders["ps"] / "config.json").write_text(json.dumps(values))
    save_weights(caduceus.published_names(ps.state_dict(), config), folders["ps"] / "model.safetensors")
    lm = GenomeLM(**SIZES)
    save_lm(lm, folders["mamba"])
    ids = torch.randint(7, 11, (1, 20))
    for name, want in (("hf", net), ("original", net), ("ps", ps), ("mamba", lm)):
        torch.testing.assert_close(load_model(str(folders[name]), "cpu").net(ids), want(ids))
        perplexity(str(folders[name]), genome, piece=40, device="cpu", out=str(tmp_path / f"p{name}"))
        assert math.isfinite(json.loads((tmp_path / f"p{name}" / "metrics.json").read_text())["perplexity"])
    with pytest.raises(UserError, match="no model at"):
        load_model(str(tmp_path))


def test_hyena_refuses_what_it_cannot_reach(tmp_path: Path, genome: str) -> None:
    model = checkpoint(tmp_path, mixer="hyena", context=64)
    perplexity(model, genome, device="cpu", out=str(tmp_path / "p"))
    with pytest.raises(UserError, match="exceed the model's 66 positions"):
        generate(model, "ACGT", length=64, device="cpu", out=str(tmp_path / "g"))
    with pytest.raises(UserError, match="reads at most 65"):
        score(model, genome, ism="a:1-5", window=100, device="cpu", out=str(tmp_path / "s"))
    assert not HyenaDNAConfig(d_model=4, n_layer=1, layer={"l_max": 4}).fused_mlp
