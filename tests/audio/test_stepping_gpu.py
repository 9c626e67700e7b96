"""The kernel that generates on a GPU: its steps equal the parallel pass, its draws those of the plain loop."""

import pytest
import torch

from audio.net import SoundNet
from audio.sampling import generate_levels
from audio.sashimi import SashimiConfig
from audio.steppers import Guidance
from audio.stepping_cuda import CudaStepper, has_cuda_step
from core.generate import Sampling

pytestmark = pytest.mark.gpu

NETS = {
    "small": SashimiConfig(6, 2, (2, 3), mixer_cfg={"d_state": 3, "d_conv": 3, "bias": True}, mlp=2),
    "narrow": SashimiConfig(8, 1, (2,), mixer_cfg={"d_state": 5, "d_conv": 1, "expand": 1}),
    "flat": SashimiConfig(16, 2, (), mixer_cfg={"d_state": 16}),
    "down": SashimiConfig(16, 1, (2, 2), mixer_cfg={"d_state": 4}, unet=False),
    "s4d": SashimiConfig(16, 2, (2, 3), mixer="s4d", mixer_cfg={"d_state": 8}, mlp=2),
    "s4d_down": SashimiConfig(8, 1, (2, 2), mixer="s4d", mixer_cfg={"d_state": 4, "glu": False}, unet=False),
    "paper": SashimiConfig(64, 2, (4, 4)),
}


def build(name: str, levels: int = 32) -> SoundNet:
    torch.manual_seed(0)
    return SoundNet(NETS[name], levels).eval().cuda()


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("clips", [1, 2, 4, 8])
def test_steps_equal_the_parallel_pass_after_every_prefix(name: str, clips: int) -> None:
    net = build(name)
    assert has_cuda_step(net)
    for prefix in (1, 2, 5, 9):
        x = torch.randint(0, 32, (5, prefix + 20), generator=torch.Generator().manual_seed(prefix)).cuda()
        whole = net(x)
        _, state = net.forward_state(x[:, :prefix], net.init_state(5))
        stepper = CudaStepper(net, state, clips=clips)
        got = torch.stack([stepper.step(x[:, t]) for t in range(prefix, x.shape[1])], dim=1)
        torch.testing.assert_close(got, whole[:, prefix:], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [None, Guidance(1.5, 8 + 32)])
def test_clips_of_classes_are_those_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch, guidance: Guidance | None
) -> None:
    torch.manual_seed(0)
    net = SoundNet(NETS["small"], 32, classes=3).eval().cuda()
    starts = [8 + 32 * 2, 8, 8 + 32, 8, 8 + 32 * 2]

    def draw() -> torch.Tensor:
        return generate_levels(net, starts, 5, 60, guidance=guidance, generator=torch.Generator().manual_seed(5))

    got = draw()
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    assert torch.equal(got, draw())


@torch.no_grad()
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0), Sampling(0.8), Sampling(top_k=3), Sampling(top_p=0.6), Sampling(1.2, 9, 0.8, 0.1)],
)  # fmt: skip
def test_draws_are_those_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch, sampling: Sampling) -> None:
    net = build("small")

    def draw() -> torch.Tensor:
        return generate_levels(net, 8, 5, 60, sampling, generator=torch.Generator().manual_seed(5))

    got = draw()
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    want = draw()
    assert torch.equal(got, want)


@torch.no_grad()
def test_log_likelihood_and_streams() -> None:
    net = build("paper")
    logits, state = net.forward_state(torch.full((3, 1), 8).cuda(), net.init_state(3))
    uniform = torch.rand(3, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, pieces = (CudaStepper(net, state, logits[:, -1]) for _ in range(2))
    levels = whole.draw(uniform, Sampling(0.9))
    parts = [pieces.draw(part, Sampling(0.9)) for part in uniform.split(17, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), levels)
    inputs = torch.cat([torch.full((3, 1), 8).cuda(), levels[:, :-1]], dim=1)
    want = net(inputs).double().log_softmax(-1).gather(2, levels[:, :, None]).sum(dim=(1, 2))
    torch.testing.assert_close(whole.log_likelihood, want, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(pieces.log_likelihood, whole.log_likelihood)


@torch.no_grad()
def test_bfloat16_weights() -> None:
    net = build("paper").bfloat16()
    x = torch.randint(0, 32, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    exact = build("paper").double()
    exact.load_state_dict(net.state_dict())
    want = exact(x)
    stepper = CudaStepper(net, net.init_state(2))
    got = torch.stack([stepper.step(x[:, t]) for t in range(40)], dim=1)
    error = (got.double() - want).norm() / want.norm()
    assert error < 1e-4  # the weights are exact, and products take inputs of 16 bits
