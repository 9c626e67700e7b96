"""Generation: agreement with the full forward, the filters' exact sets, stopping, unequal prompts, refusals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from fill import fill_input
from hypothesis import given, settings
from hypothesis import strategies as st

from core.generate import (
    Sampling,
    Step,
    filter_logits,
    generate,
    log_likelihood,
    pad_prompts,
    penalize_repetition,
    prefill,
    sample,
    stream,
)
from core.lm import MambaConfig, MambaLM

VOCAB = 21
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig(d_model=12, n_layer=2, vocab_size=VOCAB, ssm_cfg={"d_state": 3}, tie_embeddings=False)
    lm = MambaLM(config, initializer_range=1.0).double()
    with torch.no_grad():
        lm.lm_head.weight.mul_(8)  # peaked enough that greedy text varies
        lm.lm_head.weight[VOCAB:] = 50  # padding rows: a model that would love to emit them
    return lm


def prompts(batch: int = 2, length: int = 6) -> torch.Tensor:
    return fill_input("prompt", (batch, length), VOCAB)


def test_greedy_is_argmax_of_the_full_forward(model: MambaLM):
    ids = prompts()
    new = generate(model, ids, 12, GREEDY).tokens
    assert new.shape == (2, 12)
    assert len(new.unique()) > 3
    full = model(torch.cat([ids, new], dim=1))[:, ids.shape[1] - 1 : -1, :VOCAB]
    assert torch.equal(new, full.argmax(dim=-1))


def test_stream_yields_what_the_model_says(model: MambaLM):
    ids = prompts()
    steps = list(stream(model, ids, 5, Sampling(repetition_penalty=1.5, top_k=4), seed=0))
    new = torch.stack([step.tokens for step in steps], dim=1)
    full = model(torch.cat([ids, new], dim=1))[:, ids.shape[1] - 1 : -1, :VOCAB]
    torch.testing.assert_close(torch.stack([step.logits for step in steps], dim=1), full)


def test_stream_is_lazy(model: MambaLM):
    steps = stream(model, prompts(), 10**9)
    assert inspect.isgenerator(steps)
    assert next(steps).tokens.shape == (2,)
    steps.close()


def test_padding_rows_are_never_drawn(model: MambaLM):
    assert generate(model, prompts(8), 20, seed=0).tokens.max() < VOCAB


def test_allowed_tokens_are_drawn_by_the_models_odds_among_them(model: MambaLM):
    ids, allowed = torch.tensor([[1, 2, 3]]), [9, 4, 6]
    greedy = next(stream(model, ids, 1, GREEDY, allowed_tokens=allowed))
    assert int(greedy.tokens) == allowed[int(greedy.logits[0, allowed].argmax())]
    drawn = generate(model, ids.expand(400, -1), 1, allowed_tokens=allowed, seed=0).tokens[:, 0]
    shares = torch.tensor([(drawn == token).double().mean() for token in allowed])
    torch.testing.assert_close(shares, greedy.logits[0, allowed].double().softmax(0), rtol=0, atol=0.1)


def test_unequal_prompts_equal_each_alone(model: MambaLM):
    rows = [prompts(1, length)[0] for length in (9, 1, 5)]
    ids, lengths = pad_prompts([row.tolist() for row in rows])
    assert ids.shape == (3, 9)
    sampling = Sampling(temperature=0, repetition_penalty=1.3)  # whose memory must not see the padding
    together = generate(model, ids, 8, sampling, lengths=lengths).tokens
    for row, prompt in zip(together, rows, strict=True):
        assert torch.equal(row, generate(model, prompt[None], 8, sampling).tokens[0])


def test_left_padding_equals_right_padding(model: MambaLM):
    rows = [prompts(1, length)[0] for length in (9, 1, 5)]
    right, lengths = pad_prompts(rows)
    left = torch.stack([torch.nn.functional.pad(row, (9 - len(row), 0), value=7) for row in rows])
    sampling = Sampling(temperature=0, repetition_penalty=1.3)
    want = generate(model, right, 8, sampling, lengths=lengths).tokens
    assert torch.equal(generate(model, left, 8, sampling, lengths=lengths, padding_side="left").tokens, want)


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(1, 12), lengths=st.none() | st.lists(st.integers(1, 11), min_size=2, max_size=2))
def test_prefill_in_chunks_is_whole_is_stepwise(model: MambaLM, chunk: int, lengths: list[int] | None):
    ids = prompts(2, 11)
    real = None if lengths is None else torch.tensor(lengths)
    hidden, state = prefill(model, ids, real, chunk=chunk)
    for row in range(2):
        alone = ids[row : row + 1, : None if lengths is None else lengths[row]]
        torch.testing.assert_close(hidden[row], model.backbone(alone)[0, -1].detach())
        steps = model.init_state(1)
        for token in alone.split(1, dim=1):
            _, steps = model.backbone.forward_state(token, steps)
        for got, want in zip(state, steps, strict=True):
            torch.testing.assert_close(got.ssm[row], want.ssm[0].detach())
            torch.testing.assert_close(got.conv[row], want.conv[0].detach())


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_log_likelihood(model: MambaLM, chunk: int | None):
    ids, lengths = prompts(3, 8), [8, 2, 5]
    scores = log_likelihood(model, ids, torch.tensor(lengths), chunk=chunk)
    want = model(ids)[:, :-1, :VOCAB].detach().log_softmax(-1)
    for row, length in enumerate(lengths):
        expected = want[row].gather(1, ids[row, 1:, None])[: length - 1, 0]
        torch.testing.assert_close(scores.log_probs[row, : length - 1].double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(scores.greedy[row, : length - 1], (want[row].argmax(-1) == ids[row, 1:])[: length - 1])
        assert not scores.log_probs[row, length - 1 :].any()
        assert scores.greedy[row, length - 1 :].all()


def test_on_step_sees_every_step(model: MambaLM):
    seen: list[Step] = []
    result = generate(model, prompts(), 5, seed=0, on_step=seen.append)
    assert torch.equal(torch.stack([step.tokens for step in seen], dim=1), result.tokens)


def test_rows_stop_on_their_own(model: MambaLM):
    ids = prompts(4)
    free = generate(model, ids, 16, GREEDY).tokens
    ends = [int(free[0, 3]), int(free[1, 9])]
    stopped = generate(model, ids, 16, GREEDY, eos_token_id=ends, pad_token_id=0)
    for row, length, unstopped in zip(stopped.tokens, stopped.lengths.tolist(), free, strict=True):
        hits = torch.isin(unstopped, torch.tensor(ends)).nonzero()
        assert length == (int(hits[0]) + 1 if len(hits) else 16)
        assert torch.equal(row[:length], unstopped[:length])
        assert not row[length:].any()
    assert stopped.lengths[0] <= 4


def test_all_rows_finished_ends_early(model: MambaLM):
    ids = prompts(1)
    end = int(generate(model, ids, 1, GREEDY).tokens[0, 0])
    result = generate(model, ids, 50, GREEDY, eos_token_id=end)
    assert result.tokens.tolist() == [[end]]
    assert result.lengths.tolist() == [1]


def test_reproducible(model: MambaLM):
    ids = prompts(4)
    first = generate(model, ids, 10, seed=3).tokens
    assert torch.equal(first, generate(model, ids, 10, seed=3).tokens)
    assert not torch.equal(first, generate(model, ids, 10, seed=4).tokens)
    by_generator = generate(model, ids, 10, generator=torch.Generator().manual_seed(3)).tokens
    assert torch.equal(first, by_generator)


def test_global_state_is_left_alone(model: MambaLM):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    generate(model, prompts(), 3, seed=5)
    assert torch.equal(torch.rand(3), want)


def kept(logits: torch.Tensor, **options) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in filter_logits(logits, Sampling(**options))]


def test_top_k_keeps_exactly_k_even_of_equal_tokens():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert kept(logits, top_k=2) == [[1, 2], [0, 1]]
    assert kept(logits, top_k=9) == [[0, 1, 2, 3, 4]] * 2


def test_top_p_keeps_the_smallest_set():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25] * 4]).log()
    assert kept(logits, top_p=0.4) == [[1], [0, 1]]
    assert kept(logits, top_p=0.5) == [[1, 3], [0, 1]]
    assert kept(logits, top_p=0.7) == [[1, 3], [0, 1, 2]]
    assert kept(logits, top_p=0.71) == [[1, 2, 3], [0, 1, 2]]
    assert kept(logits, top_p=1e-6) == [[1], [0]]
    assert kept(torch.zeros(1, 10), top_p=0.3) == [[0, 1, 2]]  # 0.1 + 0.1 + 0.1 > 0.3 in floating point


def test_min_p_is_relative_to_the_most_likely():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert kept(logits, min_p=0.25) == [[0, 1, 2]]
    assert kept(logits, min_p=1.0) == [[0]]


def test_filters_chain():
    """top-p works on what top-k left, renormalised; the temperature comes first."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(logits, top_k=2, top_p=0.57) == [[0]]  # 0.4 / 0.7 = 0.571
    assert kept(logits, top_p=0.6, temperature=0.5) == [[0, 1]]
    assert kept(logits, top_p=0.5, temperature=0.5) == [[0]]  # 0.16 / 0.3 = 0.53


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12),
    top_k=st.integers(0, 13),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
def test_filters_keep_the_most_likely(logits: list[float], top_k: int, top_p: float, min_p: float):
    """Whatever is asked for, something stays, it holds the best token, and nothing kept is below anything dropped."""
    row = torch.tensor([logits])
    filtered = filter_logits(row, Sampling(top_k=top_k, top_p=top_p, min_p=min_p))[0]
    stays = filtered.isfinite()
    assert stays[row[0].argmax()] or row[0][stays].max() == row[0].max()
    assert 1 <= stays.sum() <= (top_k or len(logits))
    if not stays.all():
        assert row[0][stays].min() >= row[0][~stays].max()


def test_samples_follow_the_distribution():
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = probability.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(sample(logits, Sampling(), generator), minlength=4) / 20_000
    torch.testing.assert_close(counts, probability, rtol=0, atol=0.015)
    counts = torch.bincount(sample(logits, Sampling(temperature=0.5, top_k=2), generator), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.8, 0.2, 0, 0]), rtol=0, atol=0.015)


def test_repetition_penalty():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_strong_penalty_never_repeats(model: MambaLM):
    ids = prompts(2, 4)
    new = generate(model, ids, 8, Sampling(temperature=0, repetition_penalty=1e6)).tokens
    for row, prompt in zip(new, ids, strict=True):
        fresh = model(torch.cat([prompt, row])[None])[0, 3:-1, :VOCAB]
        for step, token in enumerate(row.tolist()):
            used = set(prompt.tolist()) | set(row[:step].tolist())
            unused_positive = any(fresh[step, v] > 0 for v in range(VOCAB) if v not in used)
            assert token not in used or not unused_positive


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 0.0}, "top_p: got 0"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"min_p": 2.0}, "min_p: got 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0"),
    ],
)
def test_bad_sampling(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (prompts()[:, :0], {}, "input_ids"),
        (prompts()[0], {}, "input_ids"),
        (prompts().float(), {}, "input_ids"),
        (prompts().to("meta"), {}, "got device meta, wanted cpu"),
        (prompts() + VOCAB, {}, "wanted 0 to 20"),
        (prompts(), {"max_new_tokens": 0}, "max_new_tokens: got 0"),
        (prompts(), {"lengths": torch.tensor([3, 9])}, r"lengths: got \[3, 9\]"),
        (prompts(), {"lengths": torch.tensor([0, 2])}, "lengths"),
        (prompts(), {"eos_token_id": 21}, "eos_token_id: got 21"),
        (prompts(), {"pad_token_id": -1}, "pad_token_id: got -1"),
        (prompts(), {"seed": 0, "generator": torch.Generator()}, "seed and generator"),
        (prompts(), {"padding_side": "top"}, "padding_side: got 'top'"),
        (prompts(), {"allowed_tokens": []}, r"allowed_tokens: got \[\], wanted one or more"),
        (prompts(), {"allowed_tokens": [3, 21]}, r"allowed_tokens: got \[3, 21\]"),
        (prompts(), {"graph": True}, "graph: got True, wanted a model on an NVIDIA GPU"),
    ],
)
def test_bad_requests(model: MambaLM, ids: torch.Tensor, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        generate(model, ids, **{"max_new_tokens": 2, **options})
