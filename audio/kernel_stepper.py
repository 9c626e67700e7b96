"""What the kernels that generate on an NVIDIA GPU have in common: arguments, and what is kept between launches.

Legend: B clips, T samples, Q levels.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from audio.net import SoundNet
from core.generate import Sampling

LONGEST = 1 << 20  # samples of a launch


class KernelStepper:
    """A net and the state of B clips that a kernel advances, on the GPU: a ``Stepper``.

    A subclass has the names of the kernel's arguments, ``pointers`` and ``integers``, and launches it.

    Args:
        net: The net, in evaluation mode.
        tensors: What the kernel takes beside what all of them do, by name; on the GPU.
        count: Clips B.
        seen: Samples that the clips' state has seen, and after how many the poolings begin again.
        marks: Shape of ``cycles``.
        logits: (B, Q) what the net said last; needed to ``draw``.
        classes: (B,) int64 classes of the clips; 0 by default.
    """

    pointers: ClassVar[tuple[str, ...]]
    integers: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        net: SoundNet,
        tensors: Mapping[str, Tensor],
        count: int,
        seen: tuple[int, int],
        marks: tuple[int, ...],
        logits: Tensor | None,
        classes: Tensor | None,
    ) -> None:
        device = net.embedding.weight.device
        self.log_likelihood = torch.zeros(count, dtype=torch.float64, device=device)
        # int64 cycles of the last launch between the marks in the source
        self.cycles = torch.zeros(marks, dtype=torch.int64, device=device)
        self._tensors = {
            **tensors,
            "embedding": net.table().detach().float().contiguous(),
            "logits": torch.zeros(count, net.levels, device=device),
            "offset": torch.zeros(count, dtype=torch.int64, device=device),
            "likelihood": self.log_likelihood,
            "profile": self.cycles,
        }
        if logits is not None:
            self._tensors["logits"].copy_(logits)
        if classes is not None:
            self._tensors["offset"].copy_(classes * net.levels)
        self._seen, self._period = seen
        self._how: dict[Sampling, Tensor] = {}  # (3,) float64 on the GPU: a copy there waits for all that was launched

    def step(self, levels: Tensor) -> Tensor:
        """Advances every clip by one level (B,) int64; returns logits (B, Q) float32."""
        self._run(levels[:, None].clone(), None, Sampling())
        return self._tensors["logits"].clone()

    def draw(self, uniform: Tensor, sampling: Sampling) -> Tensor:
        """Draws the next T levels of every clip.

        Args:
            uniform: (B, T) float64 random numbers in [0, 1).
            sampling: How; without a repetition penalty.

        Returns:
            (B, T) int64 on the GPU. ``log_likelihood`` (B,) grows by the log of their probability under the net, in
            nats, whatever the sampling.
        """
        device, drawn = self._tensors["logits"].device, []
        for part in uniform.split(LONGEST, dim=1):
            drawn.append(torch.empty(part.shape, dtype=torch.int64, device=device))
            self._run(drawn[-1], part.to(device).contiguous(), sampling)
        return torch.cat(drawn, dim=1)

    def _run(self, levels: Tensor, uniform: Tensor | None, sampling: Sampling) -> None:
        """Launches the kernel: it reads levels (B, T), or with random numbers draws and writes them."""
        count, length = levels.shape
        if not length:
            return
        if sampling not in self._how:
            how = torch.tensor([sampling.temperature, sampling.top_p, sampling.min_p], dtype=torch.float64)
            self._how[sampling] = how.to(levels.device)
        tensors = {**self._tensors, "levels": levels, "uniform": uniform, "how": self._how[sampling]}
        numbers = {
            "count": count, "length": length, "seen": self._seen, "draw": int(uniform is not None),
            "top_k": sampling.top_k,
        }  # fmt: skip
        addresses = [0 if (tensor := tensors[name]) is None else tensor.data_ptr() for name in self.pointers]
        self._launch(count, array("q", [*addresses, *(numbers[name] for name in self.integers)]))
        self._seen = (self._seen + length) % self._period
        self._last = tensors  # until the launch is over

    def _launch(self, count: int, arguments: array[int]) -> None:
        raise NotImplementedError
