"""The modules with mamba_ssm's signatures: recorded values, caches in place, decoding, hub names."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from cases import golden_cases, golden_inputs, golden_state_dict, load_golden
from fill import check, fill_input

from core import compat
from core.compat import Mamba, MambaConfig, MambaLMHeadModel
from core.errors import UserError
from core.mixers.mamba import Mamba as PlainMamba

CASES = golden_cases("mamba1_a")
GOLDEN_LM = load_golden("mamba_lm_a")


@dataclass
class InferenceParams:
    """The fields of mamba_ssm's class of this name that a layer reads."""

    seqlen_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)


def golden_layer(name: str) -> tuple[Mamba, torch.Tensor, dict]:
    case = CASES[name]
    layer = Mamba(**case["config"], layer_idx=0)
    layer.load_state_dict(golden_state_dict(case, layer))
    return layer, golden_inputs(case)["x"], case["outputs"]


def language_model(**options) -> MambaLMHeadModel:
    torch.manual_seed(0)
    config = MambaConfig(**{"d_model": 12, "n_layer": 2, "vocab_size": 21, "ssm_cfg": {"d_state": 3}, **options})
    return MambaLMHeadModel(config, initializer_cfg={"initializer_range": 1.0}, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_golden_step(name: str):
    layer, x, want = golden_layer(name)
    conv_state, ssm_state = layer.allocate_inference_cache(x.shape[0], max_seqlen=x.shape[1])
    kept = conv_state, ssm_state
    outputs = []
    for t in range(x.shape[1]):
        y, conv_state, ssm_state = layer.step(x[:, t : t + 1], conv_state, ssm_state)
        outputs.append(y)
    check(torch.cat(outputs, dim=1), want["y_step"])
    check(kept[0], want["conv_state"])  # in place: the tensors handed in hold the states
    check(kept[1], want["ssm_state"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sizes", [[32], [30, 2], [1, 3, 28]])
def test_golden_inference_params(name: str, sizes: list[int]):
    layer, x, want = golden_layer(name)
    params, outputs = InferenceParams(), []
    for piece in x.split(sizes, dim=1):
        outputs.append(layer(piece, inference_params=params))
        params.seqlen_offset += piece.shape[1]
    check(torch.cat(outputs, dim=1), want["y"])
    conv_state, ssm_state = params.key_value_memory_dict[0]
    check(conv_state, want["conv_state"])
    check(ssm_state, want["ssm_state"])


def test_a_new_prompt_clears_the_cache():
    layer, x, _ = golden_layer("main")
    params = InferenceParams()
    first = layer(x, inference_params=params)
    again = layer(x, inference_params=params)  # seqlen_offset is still 0
    assert torch.equal(first, again)


def test_same_layer_as_the_plain_one():
    torch.manual_seed(0)
    ours = Mamba(6, 4, 3, use_fast_path=False, layer_idx=2)
    torch.manual_seed(0)
    plain = PlainMamba(6, 4, 3)
    assert list(ours.state_dict()) == list(plain.state_dict())
    x = fill_input("x", (2, 5, 6))
    assert torch.equal(ours(x), plain(x))
    assert {"d_state", "dt_init", "use_fast_path", "layer_idx"} < set(inspect.signature(Mamba).parameters)
    with pytest.raises(TypeError, match="d_stat"):
        Mamba(6, d_stat=4)


def test_step_has_gradients():
    layer, x, _ = golden_layer("main")
    x = x[:, :1].clone().requires_grad_()
    y, _, _ = layer.step(x, *layer.allocate_inference_cache(2, 1))
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.A_log.grad is not None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_cache_dtype(dtype: torch.dtype | None):
    layer, x, _ = golden_layer("main")
    conv_state, ssm_state = layer.allocate_inference_cache(2, 1, dtype)
    assert conv_state.shape == (2, 32, 4)
    assert ssm_state.shape == (2, 32, 8)
    assert conv_state.dtype == ssm_state.dtype == (dtype or torch.float32)
    y, *_ = layer.step(x[:, :1], conv_state, ssm_state)
    torch.testing.assert_close(y, layer(x[:, :1]), rtol=2e-2, atol=2e-2)


def test_bfloat16_layer_keeps_its_state_in_float32():
    conv_state, ssm_state = Mamba(8, dtype=torch.bfloat16).allocate_inference_cache(1, 1)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)


def test_step_refuses_more_tokens():
    layer, x, _ = golden_layer("main")
    with pytest.raises(ValueError, match="step: got 32 tokens"):
        layer.step(x, *layer.allocate_inference_cache(2, 1))


def test_layer_without_index_refuses_a_cache():
    with pytest.raises(ValueError, match="layer_idx: got None"):
        Mamba(8)(torch.zeros(1, 2, 8), inference_params=InferenceParams())


def test_golden_lm():
    model = MambaLMHeadModel(MambaConfig(**GOLDEN_LM["config"]))
    model.load_state_dict(golden_state_dict(GOLDEN_LM, model))
    ids = golden_inputs(GOLDEN_LM)["input_ids"]
    check(model(ids).logits, GOLDEN_LM["outputs"]["y"])
    params, logits = InferenceParams(), []
    for piece in ids.split([10, 1, 1, 12], dim=1):
        logits.append(model(piece, inference_params=params).logits)
        params.seqlen_offset += piece.shape[1]
    check(torch.cat(logits, dim=1), GOLDEN_LM["outputs"]["y"])


def test_lm_cache_and_last_tokens():
    model = language_model(d_intermediate=16)
    ids = fill_input("ids", (2, 9), 21)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, num_last_tokens=2).logits, whole[:, -2:])
    caches = model.allocate_inference_cache(2, 9)
    assert sorted(caches) == [0, 1]
    params = InferenceParams(key_value_memory_dict=caches)
    model(ids[:, :-1], inference_params=params)
    params.seqlen_offset = 8
    last = model(ids[:, -1:], position_ids=torch.tensor([[8]]), inference_params=params, num_last_tokens=1).logits
    torch.testing.assert_close(last, whole[:, -1:])


def test_generate():
    model = language_model()
    ids = fill_input("ids", (2, 4), 21)
    sequences = model.generate(ids, max_length=10)
    assert sequences.shape == (2, 10)
    assert torch.equal(sequences[:, :4], ids)
    assert torch.equal(sequences[:, 4:], model(sequences).logits[:, 3:-1, :21].argmax(-1))
    torch.manual_seed(1)
    result = model.generate(
        ids, max_length=8, top_k=5, top_p=0.9, temperature=0.8, return_dict_in_generate=True, output_scores=True
    )
    assert result.sequences.shape == (2, 8)
    assert [score.shape for score in result.scores] == [(2, 21)] * 4
    assert model.generate(ids, 6, return_dict_in_generate=True).scores is None


def test_generate_from_the_first_tokens_only():
    model = language_model()
    ids = fill_input("ids", (2, 4), 21)
    found = model.generate(ids, 9, vocab_size=5, return_dict_in_generate=True, output_scores=True)
    assert found.sequences[:, 4:].max() < 5
    assert torch.equal(found.sequences[:, 4:], model(found.sequences).logits[:, 3:-1, :5].argmax(-1))
    assert {score.shape for score in found.scores} == {(2, 5)}
    with pytest.raises(ValueError, match="vocab_size: got 22, wanted 1 to 21"):
        model.generate(ids, 9, vocab_size=22)


def test_generate_streams():
    class Streamer:
        def __init__(self) -> None:
            self.pieces: list[torch.Tensor] = []
            self.ended = False

        def put(self, tokens: torch.Tensor) -> None:
            self.pieces.append(tokens)

        def end(self) -> None:
            self.ended = True

    model, streamer = language_model(), Streamer()
    ids = fill_input("ids", (1, 4), 21)
    sequences = model.generate(ids, 7, streamer=streamer)
    assert streamer.ended
    assert torch.equal(torch.cat([piece.flatten() for piece in streamer.pieces]), sequences[0])


def test_generate_warns_of_what_it_does_not_do():
    compat.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="enable_timing has no effect"):
        language_model().generate(fill_input("ids", (1, 4), 21), 6, cg=True, enable_timing=True)


MAMBA2 = dict(ssm_cfg={"layer": "Mamba2", "d_state": 8, "headdim": 8, "chunk_size": 16, "use_mem_eff_path": True})
HYBRID = dict(attn_layer_idx=[1], attn_cfg={"num_heads": 3, "rotary_emb_dim": 4, "causal": True, "d_conv": 3})
MAMBA3 = dict(ssm_cfg={"layer": "Mamba3", "d_state": 4, "headdim": 8, "a_activation": "heavy_tail"})


@pytest.mark.parametrize("options", [{}, MAMBA2, HYBRID, MAMBA3])
def test_caches_and_teacher(options: dict):
    """As in mamba_ssm's own test: the logits of a teacher's tokens are those of the whole forward."""
    model = language_model(**options)
    x = fill_input("ids", (3, 12), 21)
    whole = model(x).logits
    out = model.generate(
        x[:, :5], max_length=12, output_scores=True, return_dict_in_generate=True, cg=True, teacher_outputs=x
    )
    assert torch.equal(out.sequences, x)
    torch.testing.assert_close(torch.stack(out.scores, dim=1), whole[:, 4:-1])
    params = compat.InferenceParams(max_seqlen=12, max_batch_size=3)
    params.key_value_memory_dict = model.allocate_inference_cache(3, 12)
    found = []
    for piece in x.split([5, 1, 6], dim=1):
        found.append(model(piece, inference_params=params).logits)
        params.seqlen_offset += piece.shape[1]
    torch.testing.assert_close(torch.cat(found, dim=1), whole)


@pytest.mark.parametrize("options", [{}, MAMBA2])
def test_packed_prompts_become_rows(options: dict):
    model, lengths = language_model(**options), [6, 1, 4]
    rows = [fill_input(f"ids{i}", (1, length + 2), 21) for i, length in enumerate(lengths)]
    params = compat.InferenceParams(max_seqlen=16, max_batch_size=3)
    bounds = torch.tensor([0, 6, 7, 11], dtype=torch.int32)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = torch.cat([row[:, :-2] for row in rows], dim=1)
    logits = model(packed, inference_params=params, seq_idx=index, cu_seqlens=bounds).logits
    want = [model(row).logits for row in rows]
    torch.testing.assert_close(logits, torch.cat([row[:, :-2] for row in want], dim=1))
    for step in (-2, -1):
        params.seqlen_offset += 1
        last = model(torch.cat([row[:, step, None] for row in rows]), inference_params=params).logits
        torch.testing.assert_close(last[:, 0], torch.cat([row[:, step] for row in want]))


def test_packed_prompts_are_refused_where_they_have_no_cache():
    model = language_model(**HYBRID)
    params, bounds = compat.InferenceParams(max_seqlen=8, max_batch_size=2), torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: got packed prompts for the cache of MHA"):
        model(fill_input("ids", (1, 5), 21), inference_params=params, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="wanted cu_seqlens too"):
        model(fill_input("ids", (1, 5), 21), inference_params=params, seq_idx=torch.zeros(1, 5, dtype=torch.int32))


def test_save_and_load(tmp_path: Path):
    model = language_model()
    model.save_pretrained(tmp_path)
    again = MambaLMHeadModel.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert isinstance(again, MambaLMHeadModel)
    ids = fill_input("ids", (1, 5), 21)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_hub_name_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        MambaLMHeadModel.from_pretrained("state-spaces/mamba-130m")


def test_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub = pytest.importorskip("huggingface_hub")
    model = language_model()
    model.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name != "some/model":
            raise OSError("404: no such model")
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    again = MambaLMHeadModel.from_pretrained("some/model", dtype=torch.float64)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    with pytest.raises(UserError, match="no folder other/model, and the hub does not give it: 404"):
        MambaLMHeadModel.from_pretrained("other/model")
    assert asked == ["some/model", "other/model"]
