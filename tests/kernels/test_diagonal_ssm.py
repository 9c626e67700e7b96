"""The diagonal state space as an op: against its definition, its gradients, and what an op must survive."""

from __future__ import annotations

import pytest
import torch
from contract import triton_device
from torch import Tensor

from kernels import diagonal_ssm
from kernels.diagonal_ssm import aten, vandermonde


def arguments(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.complex128, generator=generator)

    decay = -torch.rand(channels, states, dtype=torch.float64, generator=generator)
    log_a = torch.complex(decay, 3 * normal(channels, states).real)
    u = normal(batch, length, channels).real
    return [u, log_a, normal(channels, states), normal(channels, states), normal(batch, channels, states)]


@pytest.mark.parametrize("length", [0, 1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("with_state", [True, False])
def test_the_definition(length: int, with_state: bool) -> None:
    *system, state = arguments(2, length, 3, 4)
    initial = state if with_state else None
    want = diagonal_ssm(*system, initial, backend="reference")
    got = diagonal_ssm(*system, initial)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("block", [1, 1 << 26])
def test_gradients(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(aten, "CHUNK", 3)
    monkeypatch.setattr(aten, "BLOCK_BYTES", block)
    given = [t.requires_grad_() for t in arguments(2, 11, 2, 2)]
    assert torch.autograd.gradcheck(diagonal_ssm, given)
    assert torch.autograd.gradcheck(lambda *t: diagonal_ssm(*t)[1], given)
    assert torch.autograd.gradcheck(lambda *t: diagonal_ssm(*t)[0], given[:4])


@pytest.mark.parametrize("length", [1, 2, 37, 64])
def test_vandermonde(length: int) -> None:
    _, log_a, B, C, _ = arguments(1, 1, 3, 4)
    want = 2 * ((B * C)[..., None] * torch.exp(log_a[..., None] * torch.arange(length))).sum(1).real
    torch.testing.assert_close(vandermonde(log_a, B * C, length), want)
    given = (log_a.requires_grad_(), B.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: vandermonde(a, b, length), given)
    with pytest.raises(ValueError, match="length: got 0"):
        vandermonde(log_a, B, 0)


def test_the_phases_of_a_million_steps() -> None:
    """A slow mode far away: float32 exponents would have lost their phase."""
    log_a = torch.tensor([[complex(-1e-6, 2.9)]], dtype=torch.complex64)
    one = torch.ones(1, 1, dtype=torch.complex64)
    got = vandermonde(log_a, one, 1 << 20)[0, -1000:]
    time = torch.arange((1 << 20) - 1000, 1 << 20, dtype=torch.float64)
    want = 2 * torch.exp(log_a[0, 0].to(torch.complex128) * time).real
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)


def test_the_op_is_well_behaved() -> None:
    given = [t.detach() for t in arguments(1, 5, 2, 2)]
    torch.library.opcheck(torch.ops.triscan.diagonal_ssm.default, (*given, "auto"))
    single = [t.to(torch.complex64 if t.is_complex() else torch.float32) for t in given]

    def run(u: Tensor) -> Tensor:
        return diagonal_ssm(u, *single[1:])[0]

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(single[0]), run(single[0]))


def test_refusals() -> None:
    u, log_a, B, C, state = arguments(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"u: got shape \(5, 3\)"):
        diagonal_ssm(u[0], log_a, B, C)
    with pytest.raises(ValueError, match="C: got shape"):
        diagonal_ssm(u, log_a, B, C[:2])
    with pytest.raises(ValueError, match="initial_state: got shape"):
        diagonal_ssm(u, log_a, B, C, state[:1])
    with pytest.raises(ValueError, match=r"B: got dtype .*128, wanted .*64"):
        diagonal_ssm(u.float(), log_a.to(torch.complex64), B, C)
    with pytest.raises(ValueError, match="u: got dtype"):
        diagonal_ssm(log_a[None], log_a, B, C)


@pytest.mark.parametrize(("batch", "length", "states"), [(2, 40, 3), (1, 23, 9)])
def test_kernels_for_the_states_between_chunks(
    monkeypatch: pytest.MonkeyPatch, batch: int, length: int, states: int
) -> None:
    pytest.importorskip("triton")
    from kernels.diagonal_ssm import triton

    device = triton_device()
    monkeypatch.setattr(aten, "CHUNK", 3)
    monkeypatch.setattr(triton, "TILE", 4)
    exact = [t.requires_grad_() for t in arguments(batch, length, 2, states)]
    rounded = [t.detach().to(torch.complex64 if t.is_complex() else torch.float32) for t in exact]
    given = [t.to(device).requires_grad_() for t in rounded]
    grads = [torch.randn_like(t.detach()) for t in diagonal_ssm(*exact, backend="reference")]
    want = run(exact, grads, "reference")
    got = run(
        given, [g.to(given[0].device).to(t.dtype) for g, t in zip(grads, (given[0], given[4]), strict=True)], "triton"
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu(), w.to(g.dtype), atol=2e-5 * float(w.abs().max()), rtol=2e-5)


def run(given: list[Tensor], grads: list[Tensor], backend: str) -> list[Tensor]:
    out = diagonal_ssm(*given, backend=backend)
    return [*(t.detach() for t in out), *torch.autograd.grad(out, given, grads)]
