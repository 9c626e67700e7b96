"""The adapter for the evaluation harness, with requests that stand in for the harness's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from core.errors import UserError
from core.generate import Sampling, generate, log_likelihood
from core.harness import HarnessLM
from core.lm import MambaConfig, MambaLM
from core.tokens import ByteTokenizer, save_byte_tokenizer


@dataclass
class Request:
    """What the harness hands over, as far as the adapter looks at it."""

    args: tuple


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig(d_model=12, n_layer=2, vocab_size=257, ssm_cfg={"d_state": 3})
    return MambaLM(config, initializer_range=1.0, dtype=torch.float64)


@pytest.fixture(scope="module")
def adapter(model: MambaLM) -> HarnessLM:
    return HarnessLM(model, ByteTokenizer(), batch_size=2)


def total(model: MambaLM, ids: list[int], first: int) -> float:
    """Log-probability of ids[first:] by the whole forward."""
    logits = model(torch.tensor([ids]))[0, :-1, :257].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_loglikelihood(model: MambaLM, adapter: HarnessLM) -> None:
    pairs = [("The cat", " sat"), ("", "Hello"), ("A much longer context, ", "end"), ("x", "y")]
    found = adapter.loglikelihood([Request(pair) for pair in pairs])
    want = [
        total(model, [*b"The cat sat"], 7),
        total(model, [256, *b"Hello"], 1),
        total(model, [*b"A much longer context, end"], 22),  # the space belongs to the continuation
        total(model, [*b"xy"], 1),
    ]
    assert [value for value, _ in found] == pytest.approx(want, rel=1e-6)
    assert not any(greedy for _, greedy in found)


def test_greedy_continuation_is_recognised(model: MambaLM, adapter: HarnessLM) -> None:
    ids = torch.tensor([[*b"ab"]])
    new = generate(model, ids, 3, Sampling(temperature=0)).tokens[0]
    scores = log_likelihood(model, torch.cat([ids[0], new])[None])
    assert scores.greedy[0, 1:].all()
    ((value, greedy),) = adapter._score([([*b"ab"], new.tolist())])
    assert greedy
    assert value == pytest.approx(scores.log_probs[0, 1:].sum().item(), rel=1e-6)


@pytest.mark.parametrize("max_length", [None, 4])
def test_rolling(model: MambaLM, max_length: int | None) -> None:
    adapter = HarnessLM(model, ByteTokenizer(), max_length=max_length)
    ids = [256, *b"0123456789"]
    starts, size = ([0], len(ids)) if max_length is None else ([0, 4, 8], 5)
    want = sum(total(model, ids[at : at + size], 1) for at in starts)
    assert adapter.loglikelihood_rolling([Request(("0123456789",)), Request(("",))]) == pytest.approx([want, 0])


def test_generate_until(model: MambaLM, adapter: HarnessLM) -> None:
    free = generate(model, torch.tensor([[*b"ab"]]), 12, Sampling(temperature=0), eos_token_id=256).tokens[0].tolist()
    text = ByteTokenizer().decode(free)
    options = {"max_gen_toks": 12, "until": []}
    assert adapter.generate_until([Request(("ab", options))]) == [text]
    stop = text[4]
    (cut,) = adapter.generate_until([Request(("ab", {**options, "until": [stop]}))])
    assert cut == text[: text.find(stop)]


def test_from_a_folder(model: MambaLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer: no file .*tokenizer\.json; give one"):
        HarnessLM(tmp_path, device="cpu")
    save_byte_tokenizer(tmp_path)
    assert HarnessLM(tmp_path, device="cpu").loglikelihood([Request(("x", "y"))])[0][0] < 0
    with pytest.raises(UserError, match="tokenizer: got none"):
        HarnessLM(model)
