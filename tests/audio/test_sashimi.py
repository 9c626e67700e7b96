"""The U-Net: stepping equals the parallel pass at every length, and nothing looks ahead."""

import pytest
import torch
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input

from audio.net import SoundNet, waves
from audio.sashimi import DownPool, Sashimi, SashimiConfig, UpPool
from audio.sashimi_layouts import from_published

LEVELS = 16


def build(pool: tuple[int, ...] = (2, 3), **options: object) -> SoundNet:
    torch.manual_seed(0)
    options = {"d_model": 6, "n_layers": 2, "mixer_cfg": {"d_state": 3, "d_conv": 3}, **options}
    return SoundNet(SashimiConfig(pool=pool, **options), LEVELS).double().eval()  # type: ignore[arg-type]


def levels(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, LEVELS, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def in_pieces(net: SoundNet, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    state, out, at = net.init_state(len(x)), [], 0
    for size in pieces:
        y, state = net.forward_state(x[:, at : at + size], state)
        out.append(y)
        at += size
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("pool", [(2, 3), (3,), (1, 2), ()])
@pytest.mark.parametrize("mlp", [0, 2])
def test_steps_equal_the_parallel_pass_at_every_length(pool: tuple[int, ...], mlp: int) -> None:
    net = build(pool, mlp=mlp)
    period = int(torch.tensor([1, *pool]).prod())
    for length in range(1, 2 * period + 2):
        x = levels(2, length)
        with torch.no_grad():
            whole = net(x)
        torch.testing.assert_close(in_pieces(net, x, [1] * length), whole, atol=1e-12, rtol=1e-12)


def test_a_prefix_of_any_length_and_then_steps_equal_the_parallel_pass() -> None:
    net = build((2, 3))
    x = levels(2, 21)
    with torch.no_grad():
        whole = net(x)
    for prefix in range(1, 15):
        steps = [prefix] + [1] * (21 - prefix)
        torch.testing.assert_close(in_pieces(net, x, steps), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pieces", [[5, 5, 5, 6], [1, 13, 7], [6, 12, 3], [20, 1], [4, 1, 1, 15]])
def test_pieces_of_any_size_equal_the_parallel_pass(pieces: list[int]) -> None:
    net = build((2, 3), mlp=1)
    x = levels(3, 21)
    with torch.no_grad():
        whole = net(x)
    torch.testing.assert_close(in_pieces(net, x, pieces), whole, atol=1e-12, rtol=1e-12)


def test_a_state_is_left_as_it_is() -> None:
    net = build((2,))
    x = levels(1, 9)
    with torch.no_grad():
        _, state = net.forward_state(x[:, :4], net.init_state(1))
        first, _ = net.forward_state(x[:, 4:], state)
        second, _ = net.forward_state(x[:, 4:], state)
    assert torch.equal(first, second)


def test_an_output_depends_on_its_own_input_and_no_later_one() -> None:
    net = Sashimi(SashimiConfig(d_model=4, n_layers=1, pool=(2, 3), mixer_cfg={"d_state": 2})).double()
    x = torch.randn(1, 17, 4, dtype=torch.float64, requires_grad=True)
    y = net(x)
    for t in range(17):
        (gradient,) = torch.autograd.grad(y[0, t].sum() + y[0, t].square().sum(), x, retain_graph=True)
        reached = gradient[0].abs().sum(dim=1)
        assert bool((reached[t + 1 :] == 0).all())
        assert float(reached[t]) > 0
        if t >= 12:  # the far past arrives through the inner stages
            assert float(reached[0]) > 0


def test_a_longer_sequence_does_not_change_its_beginning() -> None:
    net = build((2, 3))
    x = levels(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(net(x)[:, :7], net(x[:, :7]), atol=1e-12, rtol=1e-12)


def test_poolings_pack_frames_as_published() -> None:
    down, up = DownPool(2, 5, 3).double(), UpPool(4, 2, 3).double()
    x = torch.randn(1, 6, 2, dtype=torch.float64)
    frame = torch.stack([x[0, 3 + s, d] for d in range(2) for s in range(3)])  # channel by channel
    torch.testing.assert_close(down(x)[0, 1], down.linear(frame))
    z = torch.randn(1, 2, 4, dtype=torch.float64)
    numbers = up.linear(z[0, 1])
    for s in range(3):
        torch.testing.assert_close(up(z)[0, 3 + s], torch.stack([numbers[d * 3 + s] for d in range(2)]))


def test_the_published_sizes() -> None:
    def count(**options: object) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in SoundNet(SashimiConfig(**options)).parameters())  # type: ignore[arg-type]

    assert round(count() / 1e6, 1) in (6.1, 6.2, 6.3)  # Gu & Dao 2023, table 4: 6.1M
    assert 24.2e6 < count(d_model=96, n_layers=15) < 25.0e6  # 24.3M
    assert 3.4e6 < count(n_layers=3, pool=(16, 16)) < 3.6e6  # section 4.4.1: 3.5M


def test_near_levels_start_near() -> None:
    rows = waves(256, 32)
    distance = (rows[:, None] - rows).norm(dim=-1)
    assert float(distance.diagonal(1).max()) < 0.25 * float(distance[0, 255])
    assert float(distance.fill_diagonal_(1).min()) > 0.01
    assert waves(5, 7).shape == (5, 7)


def test_every_parameter_gets_a_gradient() -> None:
    net = build((2, 2), mlp=1)
    net(levels(2, 16)).square().mean().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not float(p.grad.abs().sum())]
    assert not without


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixer": "mambo"}, "mamba"), ({"n_layers": 0}, "n_layers is 0"), ({"pool": (4, 0)}, r"pool\[1\] is 0"),
     ({"dropout": 1.0}, "dropout")],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SashimiConfig(**options)


@pytest.mark.parametrize("name", golden_cases("sashimi_a"))
def test_golden(name: str) -> None:
    case = golden_cases("sashimi_a")[name]
    c = case["config"]
    sizes = {k: c[k] for k in ("d_model", "n_layers", "expand", "unet")}
    net = Sashimi(
        SashimiConfig(**sizes, pool=tuple(c["pool"]), mixer="s4d", mixer_cfg={"d_state": 64, "n_ssm": 1}, mlp=c["ff"])
    )
    holder = Holder(net, case["params"])
    net.load_state_dict(from_published(golden_state_dict(case, holder)))  # type: ignore[arg-type]
    x = golden_inputs(case)["x"].requires_grad_()
    y = net(x)
    check(y, case["outputs"]["y"])
    (y * fill_input("loss_weight", y.shape)).sum().backward()
    assert x.grad is not None
    check(x.grad, case["grads"]["x"])
    gradients = {k: p.grad for k, p in net.named_parameters()}
    for key, want in case["grads"].items():
        if key != "x":
            check(gradients[key].reshape(want["shape"]), want)  # type: ignore[union-attr]
    with torch.no_grad():
        state, steps = net.init_state(len(x)), []
        for t in range(x.shape[1]):
            step, state = net.forward_state(x[:, t : t + 1], state)
            steps.append(step)
    check(torch.cat(steps, dim=1), case["outputs"]["y_step"])


class Holder:
    """What a recorded module was built with: our initial values, imaginary parts raised to 1e-4."""

    def __init__(self, net: Sashimi, params: dict) -> None:
        self.state = {k: v.clone().reshape(params[k]) for k, v in net.state_dict().items()}
        for key, value in self.state.items():
            if key.endswith("A_imag"):
                value.clamp_(min=1e-4)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state
