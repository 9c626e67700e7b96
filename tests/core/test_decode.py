"""Steps in place: fused kernels, graphs and plain layers give what the whole forward gives."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from core import decode, decode_steps, prompt
from core.decode import Decoder, decoder_for
from core.generate import Sampling, generate, prefill, stream
from core.lm import MambaConfig, MambaLM
from kernels.selective_scan import exactness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 21
GREEDY = Sampling(temperature=0)
MODELS = {
    "mamba": dict(),
    "mamba with MLP": dict(d_intermediate=20, residual_in_fp32=False, ssm_cfg=dict(d_state=3, d_conv=2, bias=True)),
    "layer norm": dict(rms_norm=False),
    "mamba2": dict(ssm_cfg=dict(layer="Mamba2", d_state=8, headdim=4, ngroups=2)),
    "mamba2 norm first": dict(ssm_cfg=dict(layer="Mamba2", d_state=8, headdim=8, norm_before_gate=True, bias=True)),
    "mamba2 without norm": dict(ssm_cfg=dict(layer="Mamba2", d_state=8, headdim=4, rmsnorm=False, D_has_hdim=True)),
    "mamba2 with MLP channels": dict(ssm_cfg=dict(layer="Mamba2", d_state=8, headdim=4, d_ssm=16)),
    "mamba3": dict(ssm_cfg=dict(layer="Mamba3", d_state=8, headdim=4, a_activation="softplus")),
    "hybrid": dict(attn_layer_idx=[1], attn_cfg=dict(num_heads=4, num_heads_kv=2, rotary_emb_dim=4, d_conv=3)),
}


def lm(dtype: torch.dtype = torch.float64, device: str = DEVICE, **options: object) -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig(**{"d_model": 16, "n_layer": 3, "vocab_size": VOCAB, "ssm_cfg": {"d_state": 5}, **options})
    return MambaLM(config, initializer_range=1.0, dtype=dtype).to(device)


def run(decoder: Decoder, hidden: Tensor, state: object, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits (B, steps, ...)."""
    drawn = decoder.begin(hidden, state, None, decoder.generator)
    found = [(drawn.tokens.clone(), drawn.logits.clone())]
    for _ in range(steps - 1):
        drawn = decoder.step()
        found.append((drawn.tokens.clone(), drawn.logits.clone()))
    tokens, logits = zip(*found, strict=True)
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@pytest.mark.parametrize(("batch", "hands_on"), [(2, True), (decode.FEW_ROWS + 1, True), (decode.FEW_ROWS + 1, False)])
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_the_forward(name: str, batch: int, hands_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm(**MODELS[name])
    if not hands_on:  # as where the kernels don't fit
        monkeypatch.setattr(decode_steps, "products_fit", lambda *args: False)
    ids = torch.randint(VOCAB, (batch, 7), device=DEVICE)
    hidden, state = prefill(model, ids, room=20)
    for fused in (False, True):
        tokens, logits = run(Decoder(model, batch, GREEDY, room=20, fused=fused), hidden, state, 6)
        whole = model(torch.cat([ids, tokens], dim=1))[:, 6:-1, :VOCAB]
        torch.testing.assert_close(logits, whole.detach())


def test_few_kernels_are_taken() -> None:
    def kinds(name: str) -> list[str]:
        return [type(step).__name__ for step in Decoder(lm(**MODELS[name]), 1, GREEDY, fused=True).steps]

    assert kinds("mamba") == ["MambaStep"] * 3
    assert kinds("mamba2") == ["Mamba2Step"] * 3
    assert kinds("mamba2 with MLP channels") == ["PlainStep"] * 3
    assert kinds("layer norm") == ["PlainStep"] * 3
    assert kinds("hybrid") == ["MambaStep", "PlainStep", "MambaStep"]


def test_a_decoder_keeps_no_model_alive() -> None:
    model = lm()
    gone = weakref.ref(model)
    decoder = Decoder(model, 1, GREEDY)
    assert decoder.model is model
    del model, decoder
    gc.collect()
    assert gone() is None


def test_changed_weights_count() -> None:
    """What a step keeps of the parameters is worked out anew for every prompt."""
    model = lm(**MODELS["mamba2"])
    ids = torch.randint(VOCAB, (1, 5), device=DEVICE)
    decoder = Decoder(model, 1, GREEDY, fused=True)
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.A_log += 1
    hidden, state = prefill(model, ids)
    tokens, logits = run(decoder, hidden, state, 4)
    torch.testing.assert_close(logits, model(torch.cat([ids, tokens], dim=1))[:, 4:-1, :VOCAB].detach())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.2)])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("name", MODELS)
def test_graph_equals_eager(name: str, batch: int, sampling: Sampling) -> None:
    model = lm(torch.float32, **MODELS[name])
    ids = torch.randint(VOCAB, (batch, 7), device=DEVICE)
    for seed in (0, 1, 2):  # the second time the graph is an old one, the third time those of the prompt are
        kept, plain = (list(stream(model, ids, 12, sampling, seed=seed, graph=graph)) for graph in (True, False))
        for ours, theirs in zip(kept, plain, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            torch.testing.assert_close(ours.logits, theirs.logits)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
def test_graphs_are_kept_and_shared_by_nobody() -> None:
    model = lm(torch.float32)
    ids = torch.randint(VOCAB, (2, 4), device=DEVICE)
    alone = generate(model, ids, 9, seed=0).tokens
    first, second = stream(model, ids, 9, seed=0), stream(model, ids, 9, seed=0)
    both = [[step.tokens for step in pair] for pair in zip(first, second, strict=True)]
    for at in (0, 1):
        assert torch.equal(torch.stack([pair[at] for pair in both], 1), alone)
    assert len(decode._decoders[model]) == 1
    a = decoder_for(model, 2, Sampling(), frozenset(), 0, 0, graph=True)
    model.double()  # moves the weights: the graph would read the old ones
    assert decoder_for(model, 2, Sampling(), frozenset(), 0, 0, graph=True) is not a
    for k in range(1, 2 * decode.KEPT_GRAPHS):
        decoder_for(model, 2, Sampling(top_k=k), frozenset(), 0, 0, graph=True)
    assert len(decode._decoders[model]) == decode.KEPT_GRAPHS


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_bfloat16_steps_stay_close(name: str) -> None:
    """Rounding alone parts them: no farther from the float64 model than the whole bfloat16 forward is, twice over."""
    exact, model = lm(**MODELS[name]), lm(**MODELS[name]).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(VOCAB, (2, 7), device=DEVICE)
    hidden, state = prefill(model, ids)
    tokens, logits = run(Decoder(model, 2, GREEDY, graph=True), hidden, state, 12)
    ids = torch.cat([ids, tokens], dim=1)
    truth, whole = (m(ids)[:, 6:-1, :VOCAB].detach().double() for m in (exact, model))
    assert (logits - truth).norm() < 2 * (whole - truth).norm()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are CUDA's")
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("ssm_cfg", "residual_in_fp32"),
    [
        (dict(d_state=16), True),
        (dict(layer="Mamba2", d_state=32, headdim=32), True),
        (dict(layer="Mamba2", d_state=32, headdim=32, norm_before_gate=True, bias=True), False),
    ],
)
def test_many_rows_stay_close(
    ssm_cfg: dict[str, object], residual_in_fp32: bool, state_dtype: torch.dtype | None
) -> None:
    """Where blocks hand on rows that wait for a norm; the same rule, in a graph and without."""
    options: dict[str, Any] = dict(d_model=384, ssm_cfg=ssm_cfg, residual_in_fp32=residual_in_fp32)
    exact, model = lm(**options), lm(**options).bfloat16()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(VOCAB, (60, 7), device=DEVICE)
    hidden, state = prefill(model, ids)
    decoders = [Decoder(model, 60, GREEDY, state_dtype=state_dtype, graph=graph) for graph in (True, False)]
    if torch.cuda.get_device_capability() >= (9, 0):
        assert [getattr(step, "following", None) is not None for step in decoders[0].steps] == [True, True, False]
    (tokens, logits), (_, eager) = (run(decoder, hidden, state, 12) for decoder in decoders)
    assert torch.equal(logits, eager)
    ids = torch.cat([ids, tokens], dim=1)
    truth, whole = (m(ids)[:, 6:-1, :VOCAB].detach().double() for m in (exact, model))
    assert (logits - truth).norm() < 2 * (whole - truth).norm()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_prompts_in_pieces(name: str) -> None:
    """On GPUs the first reading is eager, the second captures, the third replays."""
    assert prompt.pieces(300) == [256, 32, 8, 4]
    model = lm(**MODELS[name])
    reader = prompt.reader_for(model, 2, 13)
    assert reader is not None
    for length in (13, 13, 13, 5) if DEVICE == "cuda" else (13,):
        ids = torch.randint(VOCAB, (2, length), device=DEVICE)
        torch.testing.assert_close(reader(ids), prefill(model, ids))


def test_which_prompts_go_in_pieces() -> None:
    model = lm()
    assert prompt.reader_for(model, 2, 13) is prompt.reader_for(model, 2, 40)
    assert prompt.reader_for(model, 64, 2048) is None
    assert prompt.reader_for(lm(**MODELS["hybrid"]), 2, 13) is None


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("batch", [2, decode.FEW_ROWS + 1])
def test_narrow_states(name: str, batch: int) -> None:
    """Each step rounds them once: far more than float64 does, no more than bfloat16 does."""
    model = lm(**MODELS[name])
    ids = torch.randint(VOCAB, (batch, 7), device=DEVICE)
    hidden, state = prefill(model, ids)
    (_, truth), (_, same), (_, narrow) = (
        run(Decoder(model, batch, GREEDY, state_dtype=dtype), hidden, state, 3)
        for dtype in (None, torch.float64, torch.bfloat16)
    )
    assert torch.equal(same, truth)
    assert 1e-9 < (narrow[:, 1] - truth[:, 1]).norm() / truth[:, 1].norm() < 0.02
    with pytest.raises(ValueError, match=r"state_dtype: got torch\.int32"):
        generate(model, ids, 2, state_dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "exact"), [(None, True), (torch.float32, True), (torch.bfloat16, False)])
def test_states_of_prompts_are_as_exact_as_they_are_kept(
    dtype: torch.dtype | None, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def reading(*args, **options):
        found.append(exactness.exact(True))
        return prefill(*args, **options)

    monkeypatch.setattr(sys.modules["core.generate"], "prefill", reading)
    generate(lm(), torch.randint(VOCAB, (2, 7), device=DEVICE), 1, state_dtype=dtype, graph=False)
    assert found == [exact]
    assert exactness.exact(True)


def test_states_of_prompts_come_in_the_dtype_asked_for() -> None:
    """But between pieces of a prompt they keep all their digits."""
    model = lm(**MODELS["mamba2"])
    ids = torch.randint(VOCAB, (3, 13), device=DEVICE)
    _, want = prefill(model, ids)
    _, found = prefill(model, ids, chunk=5, state_dtype=torch.bfloat16)
    for got, exact in zip(found[:-1], want[:-1], strict=True):  # the last layer's are left as they are
        assert got.conv.dtype == exact.conv.dtype
        torch.testing.assert_close(got.ssm, exact.ssm.bfloat16())
