"""Generation of sound: one parallel pass over the prompt, then sample by sample.

Dimension letters: B clips, T generated samples, P samples of the prompt, Q levels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from audio.net import SoundNet
from core.generate import Sampling, filter_logits
from kernels.backend import resolve

CHUNK = 1000  # samples between two calls of ``progress``


@torch.inference_mode()
def generate_levels(
    net: SoundNet,
    start: int | Sequence[int],
    count: int,
    length: int,
    sampling: Sampling = Sampling(),
    *,
    prompt: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draws clips of levels.

    Args:
        net: The net, in evaluation mode.
        start: The codec's start level, plus c Q for a clip of class c; or one for each clip.
        count: Number of clips B.
        length: Samples T to draw for each.
        sampling: How each is drawn; a repetition penalty means nothing for sound and is refused.
        prompt: (P,) levels that every clip begins with.
        generator: Source of randomness, on the CPU; the global one by default. The same seed gives the same clips on
            every device, up to rounding.
        progress: Called now and then with the number of samples drawn so far.

    Returns:
        (B, P + T) int64 levels, on the CPU.

    Raises:
        ValueError: If there is nothing to draw, for starts that are neither one nor one for each clip, and for a
            repetition penalty.
    """
    if count < 1 or length < 1:
        raise ValueError(f"got {count} clips of {length} samples, wanted at least one of each")
    if sampling.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty is {sampling.repetition_penalty}, wanted 1: sound repeats its levels")
    device = net.embedding.weight.device
    starts = torch.tensor([start] if isinstance(start, int) else list(start))[:, None]
    if len(starts) not in (1, count):
        raise ValueError(f"got {len(starts)} starts for {count} clips, wanted one, or one for each")
    classes = starts // net.levels
    given = torch.zeros(0, dtype=torch.int64) if prompt is None else prompt.long().cpu()
    given = given.expand(len(starts), -1)
    beginning = torch.cat([starts, given + net.levels * classes], dim=1)
    logits, state = net.forward_state(beginning.to(device), net.init_state(len(starts)))
    logits = logits[:, -1]
    if len(starts) < count:  # the clips share all there is so far: it is read once, and its state repeated
        logits, state = logits.repeat(count, 1), repeat_state(state, count)
    uniform = torch.rand(count, length, dtype=torch.float64, generator=generator)
    advance = _stepper(net, logits, state, sampling, classes[:, 0].expand(count))
    drawn = []
    for done in range(0, length, CHUNK):
        drawn.append(advance(uniform[:, done : done + CHUNK]))
        if progress is not None:
            progress(min(done + CHUNK, length))
    return torch.cat([given.expand(count, -1), *drawn], dim=1)


def choose(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Draws one level a row, where the distribution function passes a random number.

    Args:
        logits: (B, Q).
        sampling: Filters and temperature.
        uniform: (B,) float64 random numbers in [0, 1), on the CPU.

    Returns:
        (B,) int64, on the CPU.
    """
    if sampling.temperature == 0 or sampling.top_k == 1:
        return logits.argmax(dim=-1).cpu()
    reached = filter_logits(logits, sampling).cpu().double().softmax(dim=-1).cumsum(dim=-1)
    passed = reached <= (uniform * reached[:, -1])[:, None]
    return passed.sum(dim=-1)


def _stepper(
    net: SoundNet, logits: Tensor, state: Any, sampling: Sampling, classes: Tensor
) -> Callable[[Tensor], Tensor]:
    """A function of random numbers (B, T) to the next levels (B, T), compiled where possible; classes are (B,)."""
    device = net.embedding.weight.device
    backend = resolve("selective_scan", "auto", device)
    if device.type == "cuda" and backend in ("cuda", "triton"):
        from audio.stepping_cuda import CudaStepper, has_cuda_step

        if has_cuda_step(net):
            kernel = CudaStepper(net, state, logits, classes)
            return lambda uniform: kernel.draw(uniform, sampling).cpu()
    if backend == "cpu":
        from audio.stepping import CompiledStepper, has_compiled_step  # needs numba, which other backends do without

        if has_compiled_step(net):
            stepper = CompiledStepper(net, state, logits, classes)
            return lambda uniform: stepper.draw(uniform, sampling)

    offset = net.levels * classes

    def advance(uniform: Tensor) -> Tensor:
        nonlocal logits, state
        drawn = []
        for t in range(uniform.shape[1]):
            drawn.append(choose(logits, sampling, uniform[:, t]))
            scores, state = net.forward_state((drawn[-1] + offset).to(device)[:, None], state)
            logits = scores[:, -1]
        return torch.stack(drawn, dim=1)

    return advance


def repeat_state(state: Any, count: int) -> Any:
    """Repeats a nested state of one clip (1, ...) for several."""
    if isinstance(state, Tensor):
        return state.repeat(count, *[1] * (state.ndim - 1))
    if isinstance(state, tuple):
        parts = [repeat_state(part, count) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
