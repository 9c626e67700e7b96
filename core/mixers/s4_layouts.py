"""Converts published layouts of S4 layers to that of ``core.mixers.S4`` and ``S4D``: pure functions on state_dicts.

Three are known: that of the authors' repository since its version 4, which is ours but for C; that of version 3; and
that of their standalone S4D.

Legend: D model width, M = N/2 complex states, S copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from core.mixers.s4 import complex_row, real_row, transition

# Names of version 3 and ours; a layer's skip connection and kernel moved below ``layer``.
VERSION_3 = {"log_dt": "inv_dt", "inv_w_real": "A_real", "log_w_real": "A_real", "w_imag": "A_imag"}


def from_standalone_s4d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer of the standalone S4D: D, kernel.{C, log_dt, log_A_real, A_imag}, output_linear.0.{weight, bias}.

    Its A is -exp(log_A_real) + i A_imag, its B is 1, and its output is a convolution of width 1.

    Args:
        state: The state_dict.

    Returns:
        The state_dict of ``S4D(D, 2 M, init="lin")``.

    Raises:
        ValueError: If a tensor is missing or unknown.
    """
    names = ("D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag")
    names = (*names, "output_linear.0.weight", "output_linear.0.bias")
    if set(state) != set(names):
        raise ValueError(f"state: got {', '.join(sorted(state))}, wanted those of a standalone S4D: {', '.join(names)}")
    decay = state["kernel.log_A_real"]
    ones = torch.stack([torch.ones_like(decay), torch.zeros_like(decay)], dim=-1)
    return {
        "layer.D": state["D"][None],
        "layer.kernel.inv_dt": state["kernel.log_dt"][:, None],
        "layer.kernel.C": state["kernel.C"][None],
        "layer.kernel.B": ones[None],
        "layer.kernel.A_real": decay,
        "layer.kernel.A_imag": -state["kernel.A_imag"],
        "output_linear.0.weight": state["output_linear.0.weight"].squeeze(-1),
        "output_linear.0.bias": state["output_linear.0.bias"],
    }


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All S4 layers within a state_dict of the authors' repository, versions 3 and 4; other entries stay.

    Version 3 has other names and the conjugate A. Where a kernel has a length (``l_kernel``, ``L``) its C was stored as
    C (I - Ā^length), which is undone in float64; weights without one, of S4D, stay as they are.

    Args:
        state: The state_dict, whole.

    Returns:
        The state_dict for modules of ours.
    """
    renamed = _to_version_4(state)
    lengths = {k.removesuffix("l_kernel"): int(v) for k, v in renamed.items() if k.endswith("kernel.l_kernel")}
    result = {k: v for k, v in renamed.items() if not k.endswith("kernel.l_kernel")}
    for prefix, length in lengths.items():
        if length and f"{prefix}P" in result:
            result[f"{prefix}C"] = _plain_output(result, prefix, length)
    return result


def _to_version_4(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the kernels of version 3; those of version 4 stay."""
    old = {k.removesuffix("kernel.kernel.log_dt") for k in state if k.endswith("kernel.kernel.log_dt")}
    result = {}
    for key, value in state.items():
        prefix = next((p for p in old if key.startswith(p)), None)
        rest = key.removeprefix(prefix or "")
        if prefix is not None and rest.startswith("kernel."):
            leaf = rest.removeprefix("kernel.").removeprefix("kernel.")
            value = -value if leaf == "w_imag" else value[:, None] if leaf == "log_dt" else value
            key = f"{prefix}layer.kernel." + ("l_kernel" if leaf == "L" else VERSION_3.get(leaf, leaf))
        elif prefix is not None and rest == "D":
            key = f"{prefix}layer.D"
        result[key] = value
    return result


def _plain_output(state: Mapping[str, Tensor], prefix: str, length: int) -> Tensor:
    """C of a kernel whose weights hold C (I - Ā^length)."""
    stored = state[f"{prefix}C"]
    dt = torch.exp(state[f"{prefix}inv_dt"].double())
    copies = dt.shape[0] // state[f"{prefix}A_real"].shape[0]
    A = torch.complex(-torch.exp(state[f"{prefix}A_real"].double()), -state[f"{prefix}A_imag"].double())
    P = torch.view_as_complex(state[f"{prefix}P"].double())[0]
    matrix = transition(A.repeat(copies, 1), P.repeat(copies, 1), dt)
    power = torch.linalg.matrix_power(matrix, length)
    column = real_row(torch.view_as_complex(stored.double())[0])
    plain = torch.linalg.solve(torch.eye(power.shape[1], dtype=torch.float64) - power, column)
    return torch.view_as_real(complex_row(plain).resolve_conj())[None].to(stored.dtype)
