"""The language model: recorded values, names, initialisation, state, packing and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input

from core.config import MambaConfig, config_from_dict
from core.lm import MambaLM
from core.mixers import Mamba

CASES = golden_cases("mamba_lm_a")


def tiny(dtype: torch.dtype = torch.float64, **options) -> MambaLM:
    torch.manual_seed(0)
    values = {"d_model": 12, "n_layer": 2, "vocab_size": 21, "ssm_cfg": {"d_state": 3, "d_conv": 3}, **options}
    model = MambaLM(MambaConfig(**values), initializer_range=0.5)
    for layer in model.backbone.layers:
        if isinstance(layer.mixer, Mamba):
            torch.nn.init.uniform_(layer.mixer.dt_proj.bias, -1, 1)  # a state that matters
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 11, vocab: int = 21) -> torch.Tensor:
    return fill_input("ids", (batch, length), vocab)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str):
    golden = CASES[name]
    model = MambaLM(MambaConfig(**golden["config"]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == golden["params"]
    model.load_state_dict(golden_state_dict(golden, model))
    input_ids = golden_inputs(golden)["input_ids"]
    logits = model(input_ids)
    check(logits, golden["outputs"]["y"])
    check(model.backbone(input_ids), golden["outputs"]["hidden"])
    loss = (logits * fill_input("loss_weight", logits.shape)).sum()
    assert loss.item() == pytest.approx(golden["loss_value"], rel=1e-4)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, want in golden["grads"].items():
        check(gradients[name], want)


HYBRID = {"attn_layer_idx": [1], "attn_cfg": {"num_heads": 3, "rotary_emb_dim": 4, "d_conv": 3}}
MAMBA2 = {"ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "chunk_size": 16}}

MAMBA3 = {"ssm_cfg": {"layer": "Mamba3", "d_state": 4, "headdim": 8, "a_activation": "softplus"}}


@pytest.mark.parametrize(
    "options", [{}, {"rms_norm": False, "d_intermediate": 20, "residual_in_fp32": False}, HYBRID, MAMBA2, MAMBA3]
)
def test_state_equals_whole(options: dict):
    model = tiny(**options)
    ids = tokens()
    whole = model(ids)
    state, outputs = model.init_state(2), []
    for piece in ids.split([6, 1, 4], dim=1):
        logits, state = model.forward_state(piece, state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)


def test_padded_rows_equal_alone():
    model = tiny()
    ids, lengths = tokens(3, 8), torch.tensor([8, 3, 5])
    logits, state = model.forward_state(ids, model.init_state(3), lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, end = model.forward_state(ids[row : row + 1, :length], model.init_state(1))
        torch.testing.assert_close(logits[row : row + 1, :length], alone)
        for layer, want in zip(state, end, strict=True):
            torch.testing.assert_close(layer.ssm[row : row + 1], want.ssm)
            torch.testing.assert_close(layer.conv[row : row + 1], want.conv)


def test_packed_equals_separate():
    model = tiny()
    ids = tokens(1, 12)
    want = torch.cat([model(piece) for piece in ids.split([4, 7, 1], dim=1)], dim=1)
    offsets = torch.tensor([0, 4, 11, 12], dtype=torch.int32)
    index = torch.tensor([[0] * 4 + [1] * 7 + [2]], dtype=torch.int32)
    torch.testing.assert_close(model(ids, cu_seqlens=offsets), want)
    torch.testing.assert_close(model(ids, seq_idx=index), want)


def test_gradient_checkpointing():
    plain, thrifty = tiny(), tiny()
    thrifty.set_gradient_checkpointing()
    assert list(plain.state_dict()) == list(thrifty.state_dict())
    for model in (plain, thrifty):
        model(tokens()).square().sum().backward()
    for ours, theirs in zip(thrifty.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_tying_and_padding():
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    assert tied(tokens()).shape == (2, 11, 24)  # 21 rounded up to a multiple of 8
    assert list(tied.state_dict()) == list(untied.state_dict())


@pytest.mark.parametrize(("d_intermediate", "branches"), [(0, 8), (64, 16)])
def test_initialisation(d_intermediate: int, branches: int):
    """The last weight of each of the model's residual branches is scaled by 1/sqrt(branches)."""
    torch.manual_seed(0)
    config = MambaConfig(d_model=64, d_intermediate=d_intermediate, n_layer=8, vocab_size=1000)
    model = MambaLM(config)
    assert model.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    finals = [p for name, p in model.named_parameters() if name.endswith(("out_proj.weight", "fc2.weight"))]
    assert len(finals) == branches
    for weight in finals:
        bound = 1 / math.sqrt(weight.shape[1]) / math.sqrt(branches)  # kaiming uniform, a = sqrt 5
        assert 0.95 * bound < weight.abs().max() <= bound
    bias = model.backbone.layers[0].mixer.dt_proj.bias
    assert bias.max() < 0  # kept: inverse softplus of at most 0.1


def test_loss_at_initialisation_is_uniform():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=32, n_layer=2, vocab_size=64, ssm_cfg={"d_state": 4}))
    ids = torch.randint(64, (4, 33))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(64), abs=0.05)


def test_bfloat16_stream():
    model = tiny(torch.bfloat16)
    assert model(tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba9"}}, r"ssm_cfg.layer: got 'Mamba9', wanted one of \['Mamba1'"),
        ({"ssm_cfg": {"d_sate": 8}}, "no argument 'd_sate'; did you mean 'd_state'"),
        ({"ssm_cfg": {"reverse": True}}, "no argument 'reverse'"),
        ({"attn_layer_idx": [1]}, "attn_cfg: attention needs num_heads"),
        (
            {"attn_layer_idx": [2], "attn_cfg": {"num_heads": 2}},
            r"attn_layer_idx: got \[2\], wanted blocks from 0 to 1",
        ),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_haeds": 2}}, "attn_cfg: attention needs num_heads"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg: Mamba3 needs a_activation"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 2, "rotary": 2}}, "attention has no argument 'rotary'"),
    ],
)
def test_refusals(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_config_from_dict():
    assert config_from_dict({"d_model": 8, "n_layer": 1}) == MambaConfig(d_model=8, n_layer=1)
    with pytest.raises(ValueError, match="no field 'd_modle'; did you mean 'd_model'"):
        config_from_dict({"d_modle": 8})
