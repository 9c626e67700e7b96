"""The Mamba layer: recorded values, the mixer contract, and the properties that make it a causal recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_rms
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input, fill_param

from core.mixers import Mamba, MambaState

ODD = [  # batch, length, arguments
    pytest.param(1, 1, {"d_model": 3, "d_state": 1, "d_conv": 1}, id="smallest"),
    pytest.param(2, 13, {"d_model": 10, "d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 3}, id="odd"),
    pytest.param(3, 9, {"d_model": 6, "d_state": 8, "d_conv": 6, "conv_bias": False, "bias": True}, id="wide_conv"),
    pytest.param(2, 7, {"d_model": 5, "d_state": 3, "reverse": True}, id="reverse"),
]
CASES = golden_cases("mamba1_a")


def layer(dtype: torch.dtype = torch.float64, **arguments) -> Mamba:
    """A layer whose scan matters: dt near 1, parameters from the fill rules."""
    mixer = Mamba(**arguments).to(dtype)
    state = {name: fill_param(name, tensor.shape) for name, tensor in mixer.state_dict().items()}
    state["dt_proj.bias"] += 3
    mixer.load_state_dict(state)
    return mixer


def inputs(batch: int, length: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return fill_input("x", (batch, length, width)).to(dtype)


def assert_states_close(got: MambaState, want: MambaState, **tolerance: float) -> None:
    torch.testing.assert_close(got.conv, want.conv, **tolerance)
    torch.testing.assert_close(got.ssm, want.ssm, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str):
    case = CASES[name]
    mixer = Mamba(**case["config"])
    assert {k: list(v.shape) for k, v in mixer.state_dict().items()} == case["params"]
    mixer.load_state_dict(golden_state_dict(case, mixer))
    x = golden_inputs(case)["x"].requires_grad_()
    y = mixer(x)
    check(y, case["outputs"]["y"])
    loss = (y * fill_input("loss_weight", y.shape)).sum()
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-4)
    loss.backward()
    gradients = {"x": x.grad, **{k: p.grad for k, p in mixer.named_parameters()}}
    for key, want in case["grads"].items():
        check(gradients[key], want)


@pytest.mark.parametrize("name", CASES)
def test_golden_steps(name: str):
    case = CASES[name]
    mixer = Mamba(**case["config"])
    mixer.load_state_dict(golden_state_dict(case, mixer))
    x = golden_inputs(case)["x"]
    state, outputs = mixer.init_state(x.shape[0]), []
    for t in range(x.shape[1]):
        y, state = mixer.forward_state(x[:, t : t + 1], state)
        outputs.append(y)
    check(torch.cat(outputs, dim=1), case["outputs"]["y_step"])
    check(state.ssm, case["outputs"]["ssm_state"])


@pytest.mark.parametrize(("batch", "length", "arguments"), ODD)
def test_whole_pieces_tokens(batch: int, length: int, arguments: dict):
    mixer = layer(**arguments)
    x = inputs(batch, length, arguments["d_model"])
    whole = mixer(x)
    start = mixer.init_state(batch)
    with_state, end = mixer.forward_state(x, start)
    torch.testing.assert_close(with_state, whole)
    for size in (length, 1, length // 2 + 1):
        pieces = x.split(size, dim=1)
        state, outputs = start, []
        for piece in pieces[::-1] if mixer.reverse else pieces:
            y, state = mixer.forward_state(piece, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs[::-1] if mixer.reverse else outputs, dim=1), whole)
        assert_states_close(state, end)
    assert end.conv.shape == (batch, mixer.d_conv - 1, mixer.d_inner)
    assert end.ssm.shape == (batch, mixer.d_inner, mixer.d_state)
    assert not start.ssm.any()  # the state handed in is left alone


@pytest.mark.parametrize("reverse", [False, True])
def test_causal(reverse: bool):
    mixer = layer(torch.float32, d_model=6, d_state=4, reverse=reverse)
    x = inputs(2, 21, 6, torch.float32)
    y, cut = mixer(x), 10
    changed = x.clone()
    changed[:, cut] += 1
    after = mixer(changed)
    unseen, seen = (slice(cut + 1, None), slice(None, cut + 1)) if reverse else (slice(None, cut), slice(cut, None))
    assert torch.equal(after[:, unseen], y[:, unseen])
    assert ((after - y)[:, seen].abs().amax(dim=(0, 2)) > 0).all()


def test_reverse_is_flip():
    causal, reverse = layer(d_model=6, d_state=4), layer(d_model=6, d_state=4, reverse=True)
    x = inputs(2, 11, 6)
    torch.testing.assert_close(reverse(x), causal(x.flip(1)).flip(1))


def test_matches_the_equations():
    """The layer written out with plain operators and a loop over time."""
    mixer = layer(d_model=8, d_state=3, bias=True)
    u = inputs(2, 12, 8)
    x, z = F.linear(u, mixer.in_proj.weight, mixer.in_proj.bias).chunk(2, dim=-1)
    x = F.conv1d(F.pad(x.mT, (3, 0)), mixer.conv1d.weight, mixer.conv1d.bias, groups=16).mT
    x = F.silu(x)
    dt, B, C = F.linear(x, mixer.x_proj.weight).split([mixer.dt_rank, 3, 3], dim=-1)
    dt = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
    h, outputs = torch.zeros(2, 16, 3, dtype=torch.float64), []
    for t in range(12):
        h = torch.exp(dt[:, t, :, None] * -mixer.A_log.exp()) * h + (dt * x)[:, t, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + mixer.D * x[:, t])
    want = F.linear(torch.stack(outputs, 1) * F.silu(z), mixer.out_proj.weight, mixer.out_proj.bias)
    torch.testing.assert_close(mixer(u), want)


@pytest.mark.parametrize("lengths", [(7, 1, 4), (3, 7, 0)])
@pytest.mark.parametrize("d_conv", [1, 4])
def test_padded_rows_equal_alone(lengths: tuple[int, ...], d_conv: int):
    mixer = layer(d_model=6, d_state=4, d_conv=d_conv)
    x = inputs(3, 7, 6)
    prefix = fill_input("prefix", (3, 5, 6)).double()
    _, before = mixer.forward_state(prefix, mixer.init_state(3))
    y, after = mixer.forward_state(x, before, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = MambaState(before.conv[row : row + 1], before.ssm[row : row + 1])
        if length:
            y_alone, alone = mixer.forward_state(x[row : row + 1, :length], alone)
            torch.testing.assert_close(y[row : row + 1, :length], y_alone)
        assert_states_close(MambaState(after.conv[row : row + 1], after.ssm[row : row + 1]), alone)


def test_padding_gets_no_gradient():
    mixer = layer(d_model=6, d_state=4)
    x = inputs(2, 7, 6).requires_grad_()
    y, state = mixer.forward_state(x, mixer.init_state(2), torch.tensor([7, 3]))
    (y[0].sum() + y[1, :3].sum() + state.ssm.sum() + state.conv.sum()).backward()
    assert not x.grad[1, 3:].any()
    assert x.grad[1, :3].any(dim=-1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_equals_separate(reverse: bool):
    mixer = layer(d_model=6, d_state=4, reverse=reverse)
    sizes = [5, 1, 9, 2]
    x = inputs(1, sum(sizes), 6)
    want = torch.cat([mixer(piece) for piece in x.split(sizes, dim=1)], dim=1)
    offsets = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None].int()
    torch.testing.assert_close(mixer(x, cu_seqlens=offsets), want)
    torch.testing.assert_close(mixer(x, seq_idx=index), want)


def test_lengths_refused_in_reverse():
    mixer = layer(d_model=6, reverse=True)
    with pytest.raises(ValueError, match="lengths"):
        mixer.forward_state(inputs(2, 4, 6), mixer.init_state(2), torch.tensor([4, 2]))


def test_gradients_with_bias():
    """In particular those of the output bias, which a well-known implementation gets wrong."""
    mixer = layer(d_model=4, d_state=2, d_conv=2, bias=True)
    names = [name for name, _ in mixer.named_parameters()]
    x = inputs(2, 5, 4).requires_grad_()
    start = mixer.init_state(2)
    ssm, conv = torch.full_like(start.ssm, 0.5).requires_grad_(), torch.full_like(start.conv, 0.5).requires_grad_()

    def run(x, conv, ssm, *parameters):
        arguments = (x, MambaState(conv, ssm))
        state = dict(zip(names, parameters, strict=True))
        y, after = torch.func.functional_call(mixer, state, arguments)
        return y, after.conv, after.ssm

    mixer.forward = mixer.forward_state  # functional_call calls the module
    values = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    assert torch.autograd.gradcheck(run, (x, conv, ssm, *values), fast_mode=True)


def test_bfloat16():
    arguments = {"d_model": 32, "d_state": 16}
    truth, low = layer(**arguments), layer(torch.bfloat16, **arguments)
    x = inputs(2, 64, 32, torch.bfloat16)
    truth.load_state_dict(low.state_dict())
    y = low(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, truth(x.double())) < 0.02
    state = low.init_state(2)
    _, after = low.forward_state(x, state)
    assert (after.conv.dtype, after.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_autocast():
    mixer = layer(torch.float32, d_model=16, d_state=4)
    x = inputs(2, 16, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
        stepped, after = mixer.forward_state(x, mixer.init_state(2))
    assert relative_rms(y.float(), mixer(x)) < 0.03
    torch.testing.assert_close(stepped, y, rtol=2e-2, atol=2e-2)
    assert after.conv.dtype == torch.float32


def test_initialisation():
    mixer = Mamba(d_model=64, d_state=8, dt_min=1e-3, dt_max=1e-1, dtype=torch.bfloat16)
    assert mixer.A_log.dtype == mixer.D.dtype == torch.float32
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    torch.testing.assert_close(mixer.A_log[3].exp(), torch.arange(1.0, 9))
    assert (mixer.D == 1).all()
    dt = F.softplus(Mamba(d_model=64).dt_proj.bias.double())
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 1.001e-1
    bound = mixer.dt_rank**-0.5
    assert mixer.dt_proj.weight.abs().max() <= bound
    assert mixer.dt_proj.weight.abs().max() > 0.8 * bound
    constant = Mamba(d_model=64, dt_init="constant", dt_scale=0.5)
    assert (constant.dt_proj.weight == 0.5 * constant.dt_rank**-0.5).all()
    marked = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # timm's models must script all the same
def test_traceable():
    mixer = layer(torch.float32, d_model=6, d_state=4)
    x = inputs(2, 9, 6, torch.float32)
    want = mixer(x)
    torch.testing.assert_close(torch.jit.script(mixer)(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(mixer)(x), want)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model: got 0"),
        ({"d_model": 4, "d_conv": 0}, "d_conv: got 0"),
        ({"d_model": 5, "expand": 1.5}, "expand: got 1.5"),
        ({"d_model": 4, "dt_rank": "Auto"}, "dt_rank: got 'Auto'"),
        ({"d_model": 4, "dt_init": "zeros"}, "dt_init: got 'zeros'"),
        ({"d_model": 4, "dt_min": 0.0}, "dt_min and dt_max"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Mamba(**arguments)
