"""Generation of sound: one parallel pass over the prompt, then sample by sample.

Dimension letters: B clips, T generated samples, P samples of the prompt, Q levels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from audio.net import SoundNet
from audio.steppers import Guidance, GuidedStepper, PlainStepper, Stepper
from core.generate import Sampling
from kernels.backend import resolve

CHUNK = 1000  # samples between two calls of ``progress``


class Drawn(NamedTuple):
    """Levels that were drawn, and how likely they are."""

    levels: Tensor  # (B, T) int64, on the CPU
    # (B,) float64, on the CPU: log of the probability of all levels drawn so far, prompt left out, under the net itself
    # whatever the sampling, in nats
    log_likelihood: Tensor


def generate_levels(
    net: SoundNet,
    start: int | Sequence[int],
    count: int,
    length: int,
    sampling: Sampling = Sampling(),
    *,
    prompt: Tensor | None = None,
    guidance: Guidance | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draws clips of levels; see ``generate``.

    Returns:
        (B, P + T) int64 levels, on the CPU.
    """
    drawn = generate(
        net, start, count, length, sampling, prompt=prompt, guidance=guidance, generator=generator, progress=progress
    )
    given = torch.zeros(0, dtype=torch.int64) if prompt is None else prompt.long().cpu()
    return torch.cat([given.expand(count, -1), drawn.levels], dim=1)


def generate(
    net: SoundNet,
    start: int | Sequence[int],
    count: int,
    length: int,
    sampling: Sampling = Sampling(),
    *,
    prompt: Tensor | None = None,
    guidance: Guidance | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], None] | None = None,
) -> Drawn:
    """Draws clips of levels, whole.

    Args:
        net: The net, in evaluation mode.
        start: The codec's start level, plus c Q for a clip of class c; or one for each clip.
        count: Number of clips B.
        length: Samples T to draw for each.
        sampling: How each is drawn; a repetition penalty means nothing for sound and is refused.
        prompt: (P,) levels that every clip begins with, of any length: they are read in parallel.
        guidance: Say the classes more clearly, at twice the work; for nets that know a class that stands for any.
        generator: Source of randomness, on the CPU; the global one by default. The same seed gives the same clips on
            every device, up to rounding.
        progress: Called now and then with the number of samples drawn so far.

    Returns:
        The T levels of each clip, without the prompt, and their likelihood.

    Raises:
        ValueError: If there is nothing to draw, for starts that are neither one nor one for each clip, and for a
            repetition penalty.
    """
    if length < 1:
        raise ValueError(f"got {count} clips of {length} samples, wanted at least one of each")
    parts, done = [], 0
    chunks = stream(net, start, count, sampling, length=length, prompt=prompt, guidance=guidance, generator=generator)
    for part in chunks:
        parts.append(part)
        done += part.levels.shape[1]
        if progress is not None:
            progress(done)
    return Drawn(torch.cat([part.levels for part in parts], dim=1), parts[-1].log_likelihood)


def stream(
    net: SoundNet,
    start: int | Sequence[int],
    count: int = 1,
    sampling: Sampling = Sampling(),
    *,
    length: int | None = None,
    chunk: int = CHUNK,
    prompt: Tensor | None = None,
    guidance: Guidance | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Drawn]:
    """Draws clips chunk by chunk, for ever if need be: memory does not grow, and a chunk can be heard at once.

    The levels are those of ``generate``, whatever the size of the chunks.

    Args:
        net: See ``generate``; the same goes for ``start``, ``count``, ``sampling``, ``prompt`` and ``generator``.
        start: The codec's start level.
        count: Number of clips B.
        sampling: How each level is drawn.
        length: Samples to draw for each clip; None never ends.
        chunk: Samples of a chunk; the last one may be shorter.
        prompt: (P,) levels before the first ones.
        guidance: See ``generate``.
        generator: Source of randomness.

    Yields:
        The next levels (B, n) of each clip and the likelihood of all so far.

    Raises:
        ValueError: See ``generate``.
    """
    if count < 1 or chunk < 1:
        raise ValueError(f"got {count} clips in chunks of {chunk} samples, wanted at least one of each")
    if sampling.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty is {sampling.repetition_penalty}, wanted 1: sound repeats its levels")
    return _stream(prefill(net, start, count, prompt, guidance), count, sampling, length, chunk, generator)


def _stream(
    stepper: Stepper,
    count: int,
    sampling: Sampling,
    length: int | None,
    chunk: int,
    generator: torch.Generator | None,
) -> Iterator[Drawn]:
    done = 0
    while length is None or done < length:
        size = chunk if length is None else min(chunk, length - done)
        # Time outermost, so that the numbers of a sample do not depend on where a chunk ends.
        uniform = torch.rand(size, count, dtype=torch.float64, generator=generator).t()
        with torch.no_grad():
            levels = stepper.draw(uniform, sampling).cpu()
        yield Drawn(levels, stepper.log_likelihood.cpu())
        done += size


@torch.no_grad()
def prefill(
    net: SoundNet,
    start: int | Sequence[int],
    count: int,
    prompt: Tensor | None = None,
    guidance: Guidance | None = None,
) -> Stepper:
    """Reads the start and a prompt in one parallel pass; returns what draws on from there: see ``generate``."""
    starts = torch.tensor([start] if isinstance(start, int) else list(start))[:, None]
    if len(starts) not in (1, count):
        raise ValueError(f"got {len(starts)} starts for {count} clips, wanted one, or one for each")
    if guidance is not None:
        starts, count = torch.cat([starts.expand(count, 1), torch.full((count, 1), guidance.start)]), 2 * count
    classes = starts // net.levels
    given = torch.zeros(0, dtype=torch.int64) if prompt is None else prompt.long().cpu()
    beginning = torch.cat([starts, given.expand(len(starts), -1) + net.levels * classes], dim=1)
    logits, state = net.forward_state(beginning.to(net.embedding.weight.device), net.init_state(len(starts)))
    logits = logits[:, -1]
    if len(starts) < count:  # the clips share all there is so far: it is read once, and its state repeated
        logits, state = logits.repeat(count, 1), repeat_state(state, count)
    return _stepper(net, logits, state, classes[:, 0].expand(count), guidance.strength if guidance else 0.0)


def _stepper(net: SoundNet, logits: Tensor, state: Any, classes: Tensor, strength: float) -> Stepper:
    """What draws levels after ``state``: compiled where possible; classes are (B,), with guidance (2 B,)."""
    device = net.embedding.weight.device
    backend = resolve("selective_scan", "auto", device)
    if device.type == "cuda" and backend in ("cuda", "triton"):
        from audio.relay_cuda import RelayStepper, relay_of
        from audio.stepping_cuda import CudaStepper, has_cuda_step

        if has_cuda_step(net):
            if (relay := relay_of(net, state)) is not None:
                return RelayStepper(net, relay, logits, classes)
            return _guided(CudaStepper(net, state, logits, classes), logits, strength)
    if backend == "cpu":
        from audio.stepping import CompiledStepper, has_compiled_step  # needs numba, which other backends do without

        if has_compiled_step(net):
            return CompiledStepper(net, state, logits, classes, strength)
    return _guided(PlainStepper(net, state, logits, classes), logits, strength)


def _guided(stepper: Stepper, logits: Tensor, strength: float) -> Stepper:
    return GuidedStepper(stepper, logits, strength) if strength else stepper


def repeat_state(state: Any, count: int) -> Any:
    """Repeats a nested state of one clip (1, ...) for several."""
    if isinstance(state, Tensor):
        return state.repeat(count, *[1] * (state.ndim - 1))
    if isinstance(state, tuple):
        parts = [repeat_state(part, count) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
