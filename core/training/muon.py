"""timm's Muon with fewer launches: matrices of one shape are orthogonalised as one batch.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) takes some thirty small kernels a matrix, one
matrix after another: for small nets longer than forward and backward together.
"""

# pyright: reportPrivateImportUsage=false
# (of _foreach functions)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import muon as timm_muon
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["Muon"]


class Muon(timm_muon.Muon):
    """``timm.optim.muon.Muon``, step by step: its arguments, its state, its choice of what is a matrix.

    Convolutions are flattened, (out, in * height * width). What is no matrix goes to timm's own step, and so do tensors
    that processes share out and groups with another algorithm or ``conv_mode``.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        done: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            if group["algo"] != "muon" or group["conv_mode"] != "flatten" or group["capturable"]:
                continue
            given = [p for p in group["params"] if p.grad is not None and not isinstance(p, DTensor)]
            matrices = [p for p in given if self._is_matrix(p, group)]
            self._step_matrices(matrices, group)
            done += [(p, p.grad) for p in matrices]
        for p, _ in done:  # timm's own step leaves out what has no gradient
            p.grad = None
        super().step()
        for p, grad in done:
            p.grad = grad
        return loss

    def _is_matrix(self, p: Tensor, group: dict[str, Any]) -> bool:
        state = self.state[p]
        if "use_muon" not in state:
            suitable = timm_muon._is_suitable_for_muon(p)
            state["use_muon"] = not group.get("use_fallback", False) and group.get("use_muon", suitable)
        return state["use_muon"]

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Weight decay, momentum and the orthogonalised step of a group's matrices."""
        if not params:
            return
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        grads: list[Any] = [p.grad for p in params]
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        alike = defaultdict(list)
        for p, update in zip(params, updates, strict=True):
            alike[p.shape, p.dtype, p.device].append((p, update.flatten(1)))
        coefficients = timm_muon.resolve_ns_coefficients(group["ns_coefficients"], timm_muon._COEFFICIENTS)
        for found in alike.values():
            step = timm_muon.zeropower_via_newtonschulz(
                torch.stack([update for _, update in found]), group["ns_steps"], coefficients,
                eps=group["eps"], safety_factor=group["safety_factor"], scale_eps=group["scale_eps"],
            )  # fmt: skip
            adjust = group["adjust_lr_fn"]
            scale = timm_muon.get_lr_scale(step.shape, adjust) if adjust else 1.0
            parts = [s.view_as(p) for s, (p, _) in zip(step.to(found[0][0].dtype).contiguous(), found, strict=True)]
            torch._foreach_add_([p for p, _ in found], parts, alpha=-group["lr"] * scale)
