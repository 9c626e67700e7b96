"""DSS, S5, retention and linear attention: each against its recurrence in float64, and the mixer contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fill import fill_input
from mixer_contract import assert_packed_is_separate, assert_padded_rows_are_alone, assert_pieces_are_the_whole
from torch import Tensor

from core.mixers import DSS, S5, LinearAttention, Retention
from core.mixers.linear_scan import CHUNK, linear_scan
from core.mixers.rotary import rotate, rotation

CASES = [
    pytest.param(DSS, {"d_state": 4}, id="dss"),
    pytest.param(S5, {"d_state": 8, "blocks": 2}, id="s5"),
    pytest.param(Retention, {"num_heads": 2}, id="retention"),
    pytest.param(LinearAttention, {"num_heads": 2}, id="linear_attention"),
]
WIDTH = 4


def layer(kind: Any, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return kind(WIDTH, **arguments, dtype=torch.float64)


def inputs(batch: int = 2, length: int = 13) -> Tensor:
    return fill_input("x", (batch, length, WIDTH)).double()


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_contract(kind: Any, arguments: dict[str, Any]) -> None:
    mixer = layer(kind, arguments)
    assert_pieces_are_the_whole(mixer, inputs())
    assert_padded_rows_are_alone(mixer, WIDTH, (7, 1, 0))
    assert_packed_is_separate(mixer, WIDTH)
    assert torch.autograd.gradcheck(mixer, (inputs(1, 5).requires_grad_(),), fast_mode=True)
    mixer(inputs()).sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None] == []


def test_dss_exp_is_its_recurrence() -> None:
    mixer, u = layer(DSS, {"d_state": 4}), inputs()
    k = mixer.kernel
    Lambda = torch.complex(-k.Lambda_real.exp(), k.Lambda_imag)
    dt = k.log_dt.exp()[:, None]
    x, outputs = torch.zeros(2, WIDTH, 2, dtype=torch.complex128), []
    for token in u.unbind(1):
        x = torch.exp(dt * Lambda) * x + (torch.exp(dt * Lambda) - 1) / Lambda * token[..., None]
        outputs.append(2 * (torch.view_as_complex(k.W) * x).real.sum(-1))
    y = F.gelu(torch.stack(outputs, dim=1) + u * mixer.layer.D)
    torch.testing.assert_close(mixer(u), mixer.output_linear(y))


@pytest.mark.parametrize("shift", [0.0, 3.0])  # with 3, states grow
def test_dss_softmax_is_its_sum(shift: float) -> None:
    mixer, u = layer(DSS, {"d_state": 4, "variant": "softmax", "l_max": 16}), inputs()
    k = mixer.kernel
    with torch.no_grad():
        k.Lambda_real[1] += shift
        k.log_dt += 2
    rows = torch.arange(16) * (k.log_dt.exp()[:, None] * torch.complex(k.Lambda_real, k.Lambda_imag))[..., None]
    soft = rows.exp() / rows.exp().sum(-1, keepdim=True)
    taps = 2 * (torch.view_as_complex(k.W)[..., None] * soft).real.sum(1)  # (D, 16)
    y = torch.stack([sum(taps[:, s] * u[:, t - s] for s in range(t + 1)) for t in range(13)], dim=1)
    torch.testing.assert_close(mixer(u), mixer.output_linear(F.gelu(y + u * mixer.layer.D)))
    with pytest.raises(ValueError, match="at most l_max = 16"):
        mixer(inputs(1, 17))
    with pytest.raises(ValueError, match="whole sequences only"):
        mixer.forward_state(u, mixer.init_state(2))


def test_s5_is_its_recurrence() -> None:
    mixer, u = layer(S5, {"d_state": 8, "blocks": 2}), inputs(length=CHUNK + 3)
    Lambda = torch.complex(-mixer.Lambda_real.exp(), mixer.Lambda_imag)
    a, B, C = torch.exp(mixer.log_dt.exp() * Lambda), *(torch.view_as_complex(t) for t in (mixer.B, mixer.C))
    x, outputs = torch.zeros(2, 4, dtype=torch.complex128), []
    for token in u.unbind(1):
        x = a * x + (a - 1) / Lambda * (token.to(B.dtype) @ B.T)
        outputs.append(2 * (x @ C.T).real + mixer.D * token)
    g = F.gelu(torch.stack(outputs, dim=1))
    torch.testing.assert_close(mixer(u), g * torch.sigmoid(mixer.out_proj(g)))


@pytest.mark.parametrize("length", [1, CHUNK, CHUNK + 1, CHUNK * CHUNK + 5])
def test_linear_scan(length: int) -> None:
    a = torch.complex(torch.tensor([-0.1, -1.0, 0.0]), torch.tensor([0.5, 3.0, -2.0])).to(torch.complex128)
    u = torch.complex(*(fill_input(name, (2, length, 3)).double() for name in "uv"))
    x = torch.complex(*(fill_input(name, (2, 3)).double() for name in "ab"))
    got, want = linear_scan(a, u, x), []
    for token in u.unbind(1):
        x = a.exp() * x + token
        want.append(x)
    torch.testing.assert_close(got, torch.stack(want, dim=1))


def test_retention_is_its_sum() -> None:
    """The parallel form of the paper's equation 5, with its matrix D of decays."""
    mixer, x = layer(Retention, {"num_heads": 2}), inputs()
    q, k, v, gate = mixer.in_proj(x).split([4, 4, 8, 8], dim=-1)
    cos, sin = rotation(torch.arange(13), 2, 10000.0, double=True)
    q, k = (rotate(t.unflatten(-1, (2, 2)), cos[:, None], sin[:, None], True) for t in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(2).double())
    lag = torch.arange(13)[:, None] - torch.arange(13)
    decay = torch.where(lag >= 0, gamma[:, None, None] ** lag.clamp(min=0), 0.0)
    scores = torch.einsum("bthn,bshn->bhts", q, k / 2**0.5) * decay
    y = torch.einsum("bhts,bshp->bthp", scores, v.unflatten(-1, (2, 4)))
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(mixer(x), mixer.out_proj(F.silu(gate) * y.flatten(2)))


def test_linear_attention_is_its_sum() -> None:
    mixer, x = layer(LinearAttention, {"num_heads": 2}), inputs()
    q, k, v = (t.unflatten(-1, (2, 2)) for t in mixer.in_proj(x).chunk(3, dim=-1))
    scores = torch.einsum("bthn,bshn->bhts", F.elu(q) + 1, F.elu(k) + 1).tril()
    y = torch.einsum("bhts,bshp->bthp", scores / scores.sum(-1, keepdim=True), v)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y.flatten(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DSS(4, variant="softmax"), "l_max: got None"),
        (lambda: DSS(4, variant="relu"), "variant: got 'relu'"),  # type: ignore[arg-type]
        (lambda: DSS(4, d_state=3), "d_state: got 3"),
        (lambda: S5(4, d_state=6, blocks=2), "d_state and blocks: got 6 and 2"),
        (lambda: Retention(6, num_heads=2), "num_heads and expand_v: got 2 and 2"),
        (lambda: LinearAttention(6, num_heads=4), "num_heads: got 4, wanted a divisor of d_model = 6"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
