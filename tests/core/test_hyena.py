"""The Hyena layer: its equations, the mixer contract, gradients, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from fill import fill_input

from core.mixers import BiMamba, Hyena, Mamba
from core.mixers.hyena_filter import fft_length, long_convolution

CASES = [
    pytest.param({"d_model": 3, "l_max": 20, "lr_pos_emb": 0.0}, id="plain"),
    pytest.param({"d_model": 4, "l_max": 33, "order": 3, "short_filter_order": 1, "bias": False}, id="order3"),
    pytest.param({"d_model": 2, "l_max": 17, "emb_dim": 5, "activation": "gelu", "normalized": True}, id="normalized"),
]


def layer(**arguments) -> Hyena:
    torch.manual_seed(0)
    return Hyena(filter_order=8, w=3.0, **arguments).double()


def inputs(mixer: Hyena, batch: int = 2, length: int = 17) -> torch.Tensor:
    return fill_input("x", (batch, length, mixer.d_model)).double()


@pytest.mark.parametrize("arguments", CASES)
def test_matches_the_equations(arguments: dict) -> None:
    mixer = layer(**arguments)
    x = inputs(mixer)
    width, length = arguments.get("short_filter_order", 3), x.shape[1]
    weight, bias = mixer.short_filter.weight, mixer.short_filter.bias
    u = F.conv1d(F.pad(mixer.in_proj(x).mT, (width - 1, 0)), weight, bias, groups=weight.shape[0]).mT
    *gates, v = u.split(mixer.d_model, dim=-1)
    taps = mixer.filter_fn.filter(length)
    for o, gate in enumerate(reversed(gates[1:])):
        channels = slice(o * mixer.d_model, (o + 1) * mixer.d_model)
        v = v * gate
        y = torch.stack([sum(taps[s, channels] * v[:, t - s] for s in range(t + 1)) for t in range(length)], dim=1)
        v = y + v * mixer.filter_fn.bias[channels] if arguments.get("bias", True) else y
    torch.testing.assert_close(mixer(x), mixer.out_proj(mixer.activation(v * gates[0])))


@pytest.mark.parametrize("arguments", CASES)
def test_whole_pieces_tokens_and_lengths(arguments: dict) -> None:
    mixer = layer(**arguments)
    x = inputs(mixer)
    whole = mixer(x)
    for size in (17, 1, 5):
        state, outputs = mixer.init_state(2), []
        for piece in x.split(size, dim=1):
            y, state = mixer.forward_state(piece, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    _, state = mixer.forward_state(x[:, :9], mixer.init_state(2), torch.tensor([9, 4]))
    rest = torch.stack([x[0, 9:15], x[1, 4:10]])
    y, state = mixer.forward_state(rest, state)
    torch.testing.assert_close(y[0], whole[0, 9:15])
    torch.testing.assert_close(y[1], whole[1, 4:10])
    assert state.seen.tolist() == [15, 10]
    with pytest.raises(ValueError, match="decode: a Hyena's state grows"):
        mixer.decode(x[:, :1], mixer.init_state(2, max_length=20))
    with pytest.raises(ValueError, match=f"at most l_max = {arguments['l_max']}"):
        mixer.forward_state(x.repeat(1, 2, 1)[:, : arguments["l_max"] - 14], state)


def test_packed_sequences_do_not_see_each_other() -> None:
    mixer = layer(d_model=3, l_max=10)
    x = inputs(mixer, 1, 16)
    y = mixer(x, cu_seqlens=torch.tensor([0, 7, 7, 16]))
    torch.testing.assert_close(y, torch.cat([mixer(x[:, :7]), mixer(x[:, 7:])], dim=1))
    other = mixer(x, seq_idx=torch.tensor([[0] * 7 + [1] * 6 + [-1] * 3]))
    torch.testing.assert_close(other[:, :13], torch.cat([mixer(x[:, :7]), mixer(x[:, 7:13])], dim=1))
    assert not other[:, 13:].any()


def test_gradients() -> None:
    mixer = layer(d_model=2, l_max=9, order=3)
    x = inputs(mixer, 2, 9).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))
    state = mixer.init_state(2)
    assert torch.autograd.gradcheck(
        lambda u: mixer.forward_state(u[:, 3:], mixer.forward_state(u[:, :3], state)[1])[0], x
    )
    mixer(x).sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (2, 5), (13, 13), (64, 64), (100, 101)])
def test_long_convolution(length: int, taps: int) -> None:
    u, k = fill_input("u", (2, length, 3)).double(), fill_input("k", (taps, 3)).double()
    full = F.conv1d(F.pad(u.mT, (taps - 1, 0)), k.T.flip(1)[:, None], groups=3).mT
    torch.testing.assert_close(long_convolution(u, k, length), full)
    assert length + taps <= fft_length(length + taps) <= 1.34 * (length + taps) + 1


def test_published_two_sided_convolution() -> None:
    """Circular, of twice the length: position t sees t - s - L/2, counted around."""
    mixer = layer(d_model=2, l_max=8, bidirectional=True, bias=False)
    x = inputs(mixer, 1, 8)
    u = F.conv1d(F.pad(mixer.in_proj(x).mT, (2, 0)), mixer.short_filter.weight, mixer.short_filter.bias, groups=6).mT
    first, second, v = u.split(2, dim=-1)
    v, taps = v * second, mixer.filter_fn.filter(8)
    ring = F.pad(v, (0, 0, 4, 4))
    y = torch.stack([sum(taps[s] * ring[:, (t - s) % 16] for s in range(8)) for t in range(8)], dim=1)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y * first))
    with pytest.raises(ValueError, match="bidirectional Hyena"):
        mixer.forward_state(x, mixer.init_state(1))


def test_low_precision_keeps_a_float32_filter() -> None:
    mixer, exact = (layer(d_model=4, l_max=64, lr_pos_emb=0.0) for _ in range(2))
    mixer.to(torch.bfloat16)
    exact.load_state_dict({**exact.state_dict(), **{name: p.double() for name, p in mixer.named_parameters()}})
    x = inputs(exact, 1, 64).bfloat16()
    want = exact(x.double())
    got = mixer(x)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() / want.norm() < 0.02
    assert mixer.filter_fn.filter(8).dtype == torch.float32
    torch.testing.assert_close(mixer.filter_fn.filter(64).double(), exact.filter_fn.filter(64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "value"), [("num_blocks", 2), ("outer_mixing", True), ("filter_cls", "x"), ("order", 1)]
)
def test_refuses_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        Hyena(4, 8, **{name: value})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("strategy", ["add", "ew_multiply"])
def test_bidirectional_mamba_is_two_layers(tied: bool, strategy: str) -> None:
    torch.manual_seed(0)
    both = BiMamba(6, True, strategy, tied, d_state=3, bias=True).double()
    there, back = (Mamba(6, d_state=3, bias=True).double() for _ in range(2))
    there.load_state_dict(both.mamba_fwd.state_dict())
    back.load_state_dict(both.mamba_rev.state_dict())
    assert torch.equal(there.in_proj.weight, back.in_proj.weight) == tied
    x = fill_input("x", (2, 9, 6)).double()
    one, other = there(x), back(x.flip(1)).flip(1)
    torch.testing.assert_close(both(x), one + other if strategy == "add" else one * other)
    with pytest.raises(ValueError, match="no state"):
        both.init_state(1)
    assert math.isfinite(both(x).sum().item())
