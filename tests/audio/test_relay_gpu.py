"""The relay that generates one clip on a GPU: its steps are the parallel pass, its draws those of the other kernel."""

import pytest
import torch

from audio.net import SoundNet
from audio.relay_cuda import RelayStepper, relay_of
from audio.sashimi import SashimiConfig
from audio.stepping_cuda import CudaStepper
from core.generate import Sampling

pytestmark = pytest.mark.gpu

NETS = {
    "small": SashimiConfig(6, 2, (2, 3), mixer_cfg={"d_state": 3, "d_conv": 3, "bias": True}),
    "parts": SashimiConfig(40, 1, (2, 2), mixer_cfg={"d_state": 5}),
    "flat": SashimiConfig(16, 2, (), mixer_cfg={"d_state": 16}),
    "paper": SashimiConfig(64, 2, (4, 4)),
    "sc09": SashimiConfig(),
}


def build(name: str, classes: int = 0) -> SoundNet:
    torch.manual_seed(0)
    return SoundNet(NETS[name], 32, classes).eval().cuda().bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_steps_equal_the_parallel_pass(name: str) -> None:
    net = build(name)
    exact = SoundNet(NETS[name], 32).eval().cuda().double()
    exact.load_state_dict(net.state_dict())
    x = torch.randint(0, 32, (1, 60), generator=torch.Generator().manual_seed(1)).cuda()
    want = exact(x)
    relay = relay_of(net, net.init_state(1))
    assert relay is not None
    stepper = RelayStepper(net, relay)
    got = torch.stack([stepper.step(x[:, t]) for t in range(60)], dim=1)
    assert (got.double() - want).norm() / want.norm() < 1e-4  # weights are exact, products take inputs of 16 bits


@torch.no_grad()
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8), Sampling(top_k=3), Sampling(1.2, 9, 0.8, 0.1)]
)  # fmt: skip
def test_draws_are_those_of_the_other_kernel(sampling: Sampling) -> None:
    net = build("paper", classes=3)
    levels = torch.full((1, 7), 8 + 32, device="cuda")
    logits, state = net.forward_state(levels, net.init_state(1))
    relay = relay_of(net, state)
    assert relay is not None
    classes = torch.tensor([1], device="cuda")
    other = CudaStepper(net, state, logits[:, -1], classes)
    stepper = RelayStepper(net, relay, logits[:, -1], classes)
    uniform = torch.rand(1, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = other.draw(uniform, sampling)
    parts = [stepper.draw(part, sampling) for part in uniform.split(123, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), want)
    torch.testing.assert_close(stepper.log_likelihood, other.log_likelihood, atol=1e-3, rtol=1e-5)
