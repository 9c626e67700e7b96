"""The language model, the classifier and what they share."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from core.checkpoints import save_weights
from core.cli import CONFIGS
from core.errors import UserError
from core.lm import MambaLM
from genomics.generative import GenerativeClassifier, build_classifier
from genomics.kmers import KmerBackbone
from genomics.models import GenomeClassifier, GenomeLM, build_lm, load_backbone, pool
from genomics.vocabulary import PAD

SIZES = {"d_model": 8, "n_layer": 2, "d_state": 3, "d_conv": 5}


def classifier(pooling: str = "max", average_strands: bool = True, seed: int = 0) -> GenomeClassifier:
    torch.manual_seed(seed)
    return GenomeClassifier(3, pooling, average_strands, **SIZES).eval()  # type: ignore[arg-type]


def sequences(*lengths: int) -> torch.Tensor:
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(7, 11, (length,), generator=torch.Generator().manual_seed(length))
    return ids


def test_language_model_is_the_core_one_with_16_tokens() -> None:
    model = GenomeLM(**SIZES)
    assert isinstance(model, MambaLM)
    assert model(sequences(6, 9)).shape == (2, 9, 16)
    assert "backbone.layers.1.mixer.A_log" in model.state_dict()


def test_the_published_1k_size_has_the_published_parameters() -> None:
    parameters = sum(p.numel() for p in GenomeLM(d_model=128, n_layer=12).parameters())
    assert abs(parameters - 1.4e6) < 0.05e6  # Gu & Dao 2023, table 11


def test_the_sizes_of_the_papers_table_are_recipes() -> None:
    """Gu & Dao 2023, figure 4 left: so many million parameters, 12 tokens padded to 16."""
    published = {"250k": 0.25, "700k": 0.7, "3m": 3.5, "7m": 7.0, "19m": 19.3, "40m": 40.7}
    for name, millions in published.items():
        values = yaml.safe_load((CONFIGS / "genomics" / f"hg38_{name}.yaml").read_text())["model"]
        net = GenomeLM(**{key: values[key] for key in ("d_model", "n_layer", "d_state", "d_conv")})
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(1e6 * millions, rel=0.06)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3"])
def test_every_mixer_at_any_width(mixer: str) -> None:
    """From one position to the next, with a gradient for each parameter; heads divide the channels."""
    torch.manual_seed(0)
    net, ids = build_lm(mixer, d_model=12, n_layer=2), sequences(20, 20)  # type: ignore[arg-type]
    later = ids.clone()
    later[:, 12:] = 7
    torch.testing.assert_close(net(ids)[:, :12], net(later)[:, :12])
    net(ids).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_attention_everywhere_and_in_hybrids() -> None:
    sizes = {"d_model": 128, "n_layer": 3}
    net = build_lm("attention", **sizes)  # type: ignore[arg-type]
    mixer = net.backbone.layers[0].mixer
    assert [type(layer.mixer).__name__ for layer in net.backbone.layers] == ["Attention"] * 3
    assert (mixer.num_heads, mixer.rotary_emb_dim, mixer.causal) == (2, 64, True)
    assert mixer.in_proj.bias is None
    assert net.backbone.layers[0].mlp is not None
    hybrid = build_lm("mamba2", attention_layers=[1], **sizes)  # type: ignore[arg-type]
    assert [type(layer.mixer).__name__ for layer in hybrid.backbone.layers] == ["Mamba2", "Attention", "Mamba2"]
    assert hybrid.backbone.layers[1].mlp is None
    ids = sequences(12, 12)
    later = ids.clone()
    later[:, 8:] = 7
    for model in (net, hybrid):
        assert torch.equal(model(ids)[:, :8], model(later)[:, :8])
        assert not torch.equal(model(ids)[:, 9:], model(later)[:, 9:])
    with pytest.raises(ValueError, match="n_layer: got 0, wanted at least 1"):
        build_lm("mamba2", n_layer=0)
    with pytest.raises(ValueError, match=r"attention_layers: got \[3\], wanted blocks from 0 to 2"):
        build_lm("mamba", attention_layers=[3], **sizes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"attention_layers: got .* for hyena, causal; wanted none"):
        build_lm("hyena", attention_layers=[0], **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
def test_padding_does_not_change_the_scores(pooling: str) -> None:
    model = classifier(pooling)
    together = model(sequences(17, 11, 1))
    alone = torch.cat([model(sequences(length)) for length in (17, 11, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "mean", "last"])
def test_both_strands_get_the_same_scores_in_evaluation_only(pooling: str) -> None:
    model, ids = classifier(pooling), sequences(13, 9)
    other = model.other_strand(ids)
    torch.testing.assert_close(model(ids), model(other), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.other_strand(other), ids)
    assert not torch.allclose(model.train()(ids), model(other), atol=1e-4)
    single = classifier(pooling, average_strands=False)
    assert torch.equal(single(ids), single.train()(ids))


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, -4.0], [3.0, -6.0], [9.0, 9.0]]])
    real = torch.tensor([[True, True, False]])
    assert pool(hidden, real, "max").tolist() == [[3.0, -4.0]]
    assert pool(hidden, real, "mean").tolist() == [[2.0, -5.0]]
    assert pool(hidden, real, "last").tolist() == [[3.0, -6.0]]


def test_every_parameter_gets_a_gradient() -> None:
    model = classifier().train()
    model(sequences(20, 20, 20)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_backbone_of_a_language_model(tmp_path: Path) -> None:
    torch.manual_seed(5)
    language, model = GenomeLM(**SIZES), classifier()
    before = model.head.weight.clone()
    save_weights(language.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": {f"net.{k}": v for k, v in language.state_dict().items()}}, tmp_path / "best.ckpt")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "best.ckpt", tmp_path / "run" / "checkpoints" / "last.ckpt")
    for name in ("model.safetensors", "best.ckpt", "run"):
        model = classifier()
        load_backbone(model, tmp_path / name)
        ids = sequences(7)
        torch.testing.assert_close(model.backbone(ids), language.backbone(ids))
        assert torch.equal(model.head.weight, before)


def test_files_that_hold_no_fitting_backbone(tmp_path: Path) -> None:
    model = classifier()
    with pytest.raises(UserError, match="no checkpoint at"):
        load_backbone(model, tmp_path / "none.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(UserError, match="is no checkpoint of a training run"):
        load_backbone(model, tmp_path / "text.ckpt")
    torch.save({"state_dict": {"net.head.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="holds no backbone"):
        load_backbone(model, tmp_path / "other.ckpt")
    wide = {f"net.{k}": v for k, v in GenomeLM(**{**SIZES, "d_model": 16}).state_dict().items()}
    torch.save({"state_dict": wide}, tmp_path / "wide.ckpt")
    with pytest.raises(UserError, match=r"wrong shape.*\(16, 16\) instead of \(16, 8\)"):
        load_backbone(model, tmp_path / "wide.ckpt")


def test_generative_scores_are_log_likelihoods() -> None:
    """Against the sum written out, for rows of several lengths; N counts for nothing, and pieces add up."""
    torch.manual_seed(0)
    net = GenerativeClassifier(3, False, **SIZES).double().eval()
    torch.nn.init.normal_(net.own)
    ids = sequences(9, 6)
    ids[0, 4] = 11  # N
    hidden = net.backbone(ids)
    wanted = torch.zeros(2, 3, dtype=torch.float64)
    for b, t in ((b, t) for b in range(2) for t in range(1, 9) if 7 <= ids[b, t] <= 10):
        for k in range(3):
            logits = (net.head.weight + net.own[k]) @ hidden[b, t - 1] + net.head.bias
            wanted[b, k] += logits.log_softmax(0)[ids[b, t] - 7]
    torch.testing.assert_close(net(ids), wanted.float())
    parts = net.score_states(hidden[:, :4], ids[:, :4]) + net.score_states(hidden[:, 4:], ids[:, 4:], hidden[:, 3:4])
    torch.testing.assert_close(parts, wanted.float())
    classes = torch.tensor([2, 0])
    bases = (ids[:, 1:] >= 7).logical_and(ids[:, 1:] <= 10).sum()
    nats = -(wanted[0, 2] + wanted[1, 0]) / bases
    torch.testing.assert_close(net.loss(ids, classes).double(), nats, rtol=1e-6, atol=0)


def test_generative_classifier_learns_from_few_sequences() -> None:
    """Two classes that differ at one base of sixteen; and both strands have the same scores."""
    torch.manual_seed(0)
    net = build_classifier("generative", 2, d_model=16, n_layer=1, d_state=2, d_conv=4)
    ids = torch.randint(7, 11, (1, 16), generator=torch.Generator().manual_seed(3)).repeat(2, 1)
    ids[1, 9] = 7 + (ids[0, 9] - 6) % 4
    both = torch.cat([ids, net.other_strand(ids)])
    classes = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        net.loss(both, classes).backward()
        optimizer.step()
    net.eval()
    scores = net(both)
    assert scores.argmax(1).tolist() == classes.tolist()
    torch.testing.assert_close(scores[:2], scores[2:])
    with pytest.raises(ValueError, match="goal: got 'both', wanted 'discriminative' or 'generative'"):
        build_classifier("both", 2, **SIZES)  # type: ignore[arg-type]


def test_kmers_are_looked_up_where_they_end() -> None:
    """A position's vector has that of its k bases added, but not where one of them is none; wrong sizes are refused."""
    torch.manual_seed(0)
    net = GenomeClassifier(2, kmer=3, kmer_width=5, **SIZES).double()  # type: ignore[arg-type]
    backbone = net.backbone
    assert isinstance(backbone, KmerBackbone)
    ids = torch.tensor([[7, 9, 10, 8, 11, 7, 7, 8]])  # A G T C N A A C
    added = backbone._embed(ids.new_full((1, 2), PAD), ids) - backbone.embedding(ids)
    words = {2: (0, 2, 3), 3: (2, 3, 1), 7: (0, 0, 1)}
    for t in range(8):
        wanted = torch.zeros(8, dtype=torch.float64)
        if t in words:
            a, b, c = words[t]
            wanted = backbone.from_kmers(backbone.kmers.weight[16 * a + 4 * b + c])
        torch.testing.assert_close(added[0, t], wanted)
    with pytest.raises(ValueError, match="kmer: got 13 of width 64, wanted 0 to 12"):
        GenomeClassifier(2, kmer=13, **SIZES)  # type: ignore[arg-type]
