"""Generation: the compiled step equals the net, prompts are continued, seeds repeat."""

import pytest
import torch

from audio.net import SoundNet
from audio.sampling import Drawn, generate, generate_levels, repeat_state, stream
from audio.sashimi import SashimiConfig
from audio.steppers import Guidance, choose
from audio.stepping import CompiledStepper, has_compiled_step
from core.generate import Sampling


@pytest.fixture(scope="module")
def net() -> SoundNet:
    torch.manual_seed(0)
    return SoundNet(SashimiConfig(6, 2, (2, 3), mixer_cfg={"d_state": 3, "d_conv": 3, "bias": True}, mlp=2), 16).eval()


@torch.no_grad()
def test_the_compiled_step_equals_the_parallel_pass_after_every_prefix(net: SoundNet) -> None:
    for prefix in range(1, 9):
        x = torch.randint(0, 16, (5, prefix + 13), generator=torch.Generator().manual_seed(prefix))
        whole = net(x)
        _, state = net.forward_state(x[:, :prefix], net.init_state(5))
        stepper = CompiledStepper(net, state)
        for t in range(prefix, x.shape[1]):
            torch.testing.assert_close(stepper.step(x[:, t]), whole[:, t], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixer_cfg", [{"d_state": 2, "d_conv": 1}, {"d_state": 5, "conv_bias": False, "expand": 1}])
def test_the_compiled_step_knows_the_mixer_s_options(mixer_cfg: dict) -> None:
    torch.manual_seed(1)
    net = SoundNet(SashimiConfig(8, 1, (2,), mixer_cfg=mixer_cfg), 16).eval()
    x = torch.randint(0, 16, (1, 11))
    assert has_compiled_step(net)
    stepper = CompiledStepper(net, net.init_state(1))
    got = torch.stack([stepper.step(x[:, t]) for t in range(11)], dim=1)
    torch.testing.assert_close(got, net(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        SashimiConfig(6, 1, (2, 2), mixer="s4d", mixer_cfg={"d_state": 6, "disc": "bilinear"}, mlp=2, unet=False),
        SashimiConfig(6, 1, (3,), mixer="s4d", mixer_cfg={"d_state": 4, "glu": False}, centre="mamba"),
    ],
)
def test_the_compiled_step_knows_other_layers(config: SashimiConfig) -> None:
    torch.manual_seed(1)
    net = SoundNet(config, 16).eval()
    x = torch.randint(0, 16, (2, 19))
    whole = net(x)
    _, state = net.forward_state(x[:, :5], net.init_state(2))
    stepper = CompiledStepper(net, state)
    got = torch.stack([stepper.step(x[:, t]) for t in range(5, 19)], dim=1)
    torch.testing.assert_close(got, whole[:, 5:], atol=1e-5, rtol=1e-5)


def test_there_is_no_compiled_step_for_other_dtypes(net: SoundNet) -> None:
    assert has_compiled_step(net)
    assert not has_compiled_step(SoundNet(net.config, 16).double())


def test_greedy_generation_is_the_argmax_of_the_parallel_pass(net: SoundNet) -> None:
    clip = generate_levels(net, 8, 2, 20, Sampling(temperature=0))
    inputs = torch.cat([torch.full((2, 1), 8), clip[:, :-1]], dim=1)
    with torch.no_grad():
        assert torch.equal(net(inputs).argmax(-1), clip)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_prompt_is_continued(net: SoundNet, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setenv("TRISCAN_BACKEND", backend)
    prompt = torch.randint(0, 16, (7,))
    clip = generate_levels(net, 8, 2, 6, Sampling(temperature=0), prompt=prompt)
    assert clip.shape == (2, 13)
    assert torch.equal(clip[:, :7], prompt.expand(2, -1))
    inputs = torch.cat([torch.full((2, 1), 8), clip[:, :-1]], dim=1)
    with torch.no_grad():
        assert torch.equal(net(inputs).argmax(-1)[:, 7:], clip[:, 7:])


def test_seeds(net: SoundNet) -> None:
    def draw(seed: int) -> torch.Tensor:
        return generate_levels(net, 8, 3, 30, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])


@pytest.mark.parametrize(
    "sampling", [Sampling(0.8), Sampling(top_k=3), Sampling(top_k=1), Sampling(top_p=0.6), Sampling(1.2, 9, 0.8, 0.1)]
)
def test_compiled_and_other_drawing_are_the_same(
    net: SoundNet, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return generate_levels(net, 8, 3, 25, sampling, generator=generator)

    compiled = draw()
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    assert torch.equal(draw(), compiled)


def test_clips_of_classes_are_the_parallel_pass_of_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = SashimiConfig(d_model=8, n_layers=1, pool=(2,), mixer_cfg={"d_state": 2})
    net = SoundNet(sizes, levels=16, classes=3).eval()
    with torch.no_grad():
        assert net.class_embedding is not None
        net.class_embedding.weight.mul_(20)  # so that the classes differ
    starts, prompt = [8 + 16 * 2, 8, 8 + 16], torch.randint(0, 16, (3,))

    def draw(sampling: Sampling) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return generate_levels(net, starts, 3, 12, sampling, prompt=prompt, generator=generator)

    greedy, drawn = draw(Sampling(0)), draw(Sampling())
    classes = torch.tensor([[2], [0], [1]])
    with torch.no_grad():
        best = net(torch.cat([torch.full((3, 1), 8), greedy[:, :-1]], dim=1) + 16 * classes).argmax(-1)
    assert torch.equal(best[:, 3:], greedy[:, 3:])
    assert not torch.equal(greedy[0], greedy[1])
    assert torch.equal(greedy[:, :3], prompt.expand(3, -1))
    torch.testing.assert_close(net.table()[40], net.embed(torch.tensor([40]))[0])
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    assert torch.equal(draw(Sampling()), drawn)
    with pytest.raises(ValueError, match="2 starts for 3 clips"):
        generate_levels(net, [8, 24], 3, 5)


def test_guidance_takes_what_a_class_adds_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = SoundNet(SashimiConfig(d_model=8, n_layers=1, pool=(2,), mixer_cfg={"d_state": 2}), 16, classes=3).eval()
    with torch.no_grad():
        assert net.class_embedding is not None
        net.class_embedding.weight.mul_(20)
    starts, prompt = [8, 8 + 16], torch.randint(0, 16, (3,))

    def draw(strength: float, sampling: Sampling = Sampling()) -> Drawn:
        guidance = Guidance(strength, 8 + 16 * 2) if strength else None
        generator = torch.Generator().manual_seed(5)
        return generate(net, starts, 2, 14, sampling, prompt=prompt, guidance=guidance, generator=generator)

    greedy, drawn = draw(8.0, Sampling(0)), draw(8.0)
    for levels in (greedy.levels, drawn.levels):
        beginning = torch.cat([torch.full((2, 1), 8), prompt.expand(2, -1), levels[:, :-1]], dim=1)
        with torch.no_grad():
            told = net(beginning + torch.tensor([[0], [16]]))[:, 3:].log_softmax(-1)
            untold = net(beginning + 32)[:, 3:].log_softmax(-1)
        if levels is greedy.levels:
            assert torch.equal((told + 8 * (told - untold)).argmax(-1), levels)
            assert not torch.equal(told.argmax(-1), levels)
        else:
            own = told.gather(2, levels[..., None]).double().sum((1, 2))
            torch.testing.assert_close(drawn.log_likelihood, own, atol=1e-4, rtol=1e-5)
    assert not torch.equal(draw(0).levels, drawn.levels)
    assert torch.equal(draw(1e-9).levels, draw(0).levels)
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    assert torch.equal(draw(8.0).levels, drawn.levels)


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.5), Sampling(temperature=0.5)])
def test_filters(sampling: Sampling) -> None:
    p = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    count = 20000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.bincount(choose(p.log().expand(count, -1), sampling, uniform), minlength=4) / count
    kept = p.square() if sampling.temperature == 0.5 else p * torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(drawn.double(), kept / kept.sum(), atol=1e-4, rtol=0)


def test_drawn_levels_follow_the_model(net: SoundNet) -> None:
    count = 4000
    first = generate_levels(net, 8, count, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    with torch.no_grad():
        p = net(torch.tensor([[8]]))[0, 0].softmax(-1)
    frequency = torch.bincount(first, minlength=16) / count
    assert float((frequency - p).abs().max()) < 4 * 0.5 / count**0.5


def test_repeated_states_are_equal_and_apart(net: SoundNet) -> None:
    _, state = net.forward_state(torch.randint(0, 16, (1, 5)), net.init_state(1))
    repeated = repeat_state(state, 3)
    assert type(repeated) is type(state)
    assert torch.equal(repeated.current[2], state.current[0])  # type: ignore[attr-defined]


def test_nothing_to_draw_is_refused(net: SoundNet) -> None:
    with pytest.raises(ValueError, match="0 clips"):
        generate_levels(net, 8, 0, 5)
    with pytest.raises(ValueError, match="repetition_penalty"):
        generate_levels(net, 8, 1, 5, Sampling(repetition_penalty=1.2))
    with pytest.raises(ValueError, match="0 samples"):
        generate_levels(net, 8, 1, 0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_stream_is_the_whole_and_knows_its_likelihood(
    net: SoundNet, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("TRISCAN_BACKEND", backend)

    def seed() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    prompt = torch.randint(0, 16, (5,), generator=seed())
    whole = generate(net, 8, 2, 23, Sampling(0.7), prompt=prompt, generator=seed())
    parts = list(stream(net, 8, 2, Sampling(0.7), length=23, chunk=7, prompt=prompt, generator=seed()))
    assert [part.levels.shape[1] for part in parts] == [7, 7, 7, 2]
    assert torch.equal(torch.cat([part.levels for part in parts], dim=1), whole.levels)
    torch.testing.assert_close(parts[-1].log_likelihood, whole.log_likelihood)
    inputs = torch.cat([torch.tensor([8]), prompt])[None].expand(2, -1)
    with torch.no_grad():
        logits = net(torch.cat([inputs, whole.levels[:, :-1]], dim=1))[:, len(prompt) :]
    want = logits.double().log_softmax(-1).gather(2, whole.levels[:, :, None]).sum(dim=(1, 2))
    torch.testing.assert_close(whole.log_likelihood, want, rtol=1e-5, atol=1e-5)
    endless = stream(net, 8, 2, Sampling(0.7), chunk=10, prompt=prompt, generator=seed())
    assert torch.equal(torch.cat([next(endless).levels, next(endless).levels], dim=1), whole.levels[:, :20])
