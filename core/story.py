"""Draws the pictures of docs/story.md: ``python -m core.story``.

Each function computes one step of the chain from continuous state spaces to duality with the layers and initialisers of
this package, and draws what it computed.

Legend: L length, N state.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from core import hippo
from core.cli import run

INK, SOFT, WARM = "#2f4fb0", "#9aa7d6", "#c2571a"


def draw(folder: str = "docs/story", steps: int = 1500) -> None:
    """Draws every picture; the last one trains two small models, seconds on a GPU and minutes without.

    Args:
        folder: Where the pictures go.
        steps: Training steps of each model.
    """
    matplotlib.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    pictures = {
        "memory": memory, "discretisation": discretisation, "kernels": kernels, "decay": decay, "matrix": matrix,
    }  # fmt: skip
    for name, picture in pictures.items():
        picture().savefig(root / f"{name}.png", dpi=110)
    selection(steps).savefig(root / "selection.png", dpi=110)
    print(root)


def signal(length: int) -> Tensor:
    """A smooth signal with some slow and some fast waves, (L,) float64 on [0, 1]."""
    t = torch.linspace(0, 1, length, dtype=torch.float64)
    return torch.sin(7 * t) + 0.5 * torch.sin(23 * t + 1) + 0.25 * torch.cos(61 * t)


def legs_memory(u: Tensor, d_state: int) -> Tensor:
    """HiPPO-LegS' state after each sample: the Legendre coefficients of the whole past (Gu et al. 2020, theorem 2).

    x' = A x / t + B u / t, by the bilinear rule.

    Args:
        u: (L,) float64.
        d_state: N.

    Returns:
        (L, N).
    """
    A, B = hippo.hippo_legs(d_state)
    eye, x, states = torch.eye(d_state, dtype=u.dtype), torch.zeros(d_state, dtype=u.dtype), []
    for t, sample in enumerate(u, start=1):
        x = torch.linalg.solve(eye - A / (2 * t), (eye + A / (2 * t)) @ x + B * sample / t)
        states.append(x)
    return torch.stack(states)


def reconstruct(x: Tensor, length: int) -> Tensor:
    """The past that a state of ``legs_memory`` stands for: sum_n x_n sqrt(2n + 1) P_n on [-1, 1], (L,)."""
    s = torch.linspace(-1, 1, length, dtype=x.dtype)
    polynomials = [torch.ones_like(s), s]
    for n in range(1, len(x) - 1):
        polynomials.append(((2 * n + 1) * s * polynomials[-1] - n * polynomials[-2]) / (n + 1))
    scale = torch.sqrt(2 * torch.arange(len(x), dtype=x.dtype) + 1)
    return (x * scale) @ torch.stack(polynomials[: len(x)])


def memory() -> Figure:
    """HiPPO: a signal and what states of three sizes remember of it."""
    u = signal(1000)
    figure, axes = _panels(3, "samples")
    for axis, d_state in zip(axes, (8, 16, 32), strict=True):
        back = reconstruct(legs_memory(u, d_state)[-1], len(u))
        error = ((back - u).square().mean() / u.square().mean()).sqrt().item()
        axis.plot(u.numpy(), color=SOFT, linewidth=2.5, label="signal")
        axis.plot(back.numpy(), color=WARM, linewidth=1, label="from the state")
        axis.set_title(f"N = {d_state}, error {100 * error:.1f} %", loc="left", fontsize=8)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def discretisation() -> Figure:
    """One pole: the exact solution, and the sampled systems of three rules at a coarse step."""
    lam, dt = complex(-0.5, 3.0), 0.35
    fine = torch.linspace(0, 6, 600, dtype=torch.float64)
    steps = torch.arange(int(6 / dt) + 1, dtype=torch.float64)
    rules = {
        "zero-order hold": torch.exp(torch.tensor(lam * dt)),
        "bilinear": torch.tensor((1 + lam * dt / 2) / (1 - lam * dt / 2)),
        "Euler": torch.tensor(1 + lam * dt),
    }
    figure, (axis,) = _panels(1, "time")
    axis.plot(fine.numpy(), torch.exp(lam * fine).real.numpy(), color=SOFT, linewidth=2.5, label="exp(t lambda)")
    for (name, a), colour in zip(rules.items(), (INK, "#2b7a4b", WARM), strict=True):
        axis.plot((steps * dt).numpy(), (a**steps).real.numpy(), ".--", color=colour, linewidth=0.8, label=name)
    axis.legend(frameon=False, fontsize=7)
    axis.set_ylim(-1.6, 1.6)
    return figure


def kernels() -> Figure:
    """Convolution kernels of S4, of S4D's initialisations and of DSS before training."""
    from core.mixers.dss import DSSKernel
    from core.mixers.s4 import S4Kernel
    from core.mixers.s4d import S4DKernel

    spaces = {
        "S4 (HiPPO-LegS)": lambda: S4Kernel(3, 32),
        "S4D-Lin": lambda: S4DKernel(3, 32, init="lin"),
        "S4D-Inv": lambda: S4DKernel(3, 32, init="inv"),
        "DSS": lambda: DSSKernel(3, 32),
    }
    figure, axes = _panels(4, "lag")
    for axis, (name, make) in zip(axes, spaces.items(), strict=True):
        torch.manual_seed(0)
        with torch.no_grad():
            axis.plot(make().taps(300).T.numpy(), linewidth=0.9)
        axis.set_title(name, loc="left", fontsize=8)
    return figure


def decay() -> Figure:
    """Selection: how much of the state is left after 64 tokens, over dt, for the N decays of Mamba."""
    dt = torch.logspace(-4, 1, 200, dtype=torch.float64)
    A = hippo.s4d_real(16)
    figure, (left, right) = _panels(2, "time step dt")
    for n in (0, 1, 3, 7, 15):
        left.semilogx(dt.numpy(), torch.exp(64 * dt * A[n]).numpy(), linewidth=1.1, label=f"A = {A[n]:.0f}")
    left.set_title("share of the state left after 64 tokens", loc="left", fontsize=8)
    left.legend(frameon=False, fontsize=7)
    right.semilogx(dt.numpy(), -torch.expm1(-dt).numpy(), color=INK, label="token: 1 - exp(-dt)")
    right.semilogx(dt.numpy(), torch.exp(-dt).numpy(), color=WARM, label="state: exp(-dt)")
    right.set_title("N = 1, A = -1: dt is a gate", loc="left", fontsize=8)
    right.legend(frameon=False, fontsize=7)
    return figure


def matrix() -> Figure:
    """Duality: the matrix that a selective state space multiplies a sequence by, and two of its relatives."""
    from kernels.ssd import semiseparable_matrix

    generator = torch.Generator().manual_seed(0)
    dt, B, C = (torch.randn(1, 48, *s, generator=generator, dtype=torch.float64) for s in ((1,), (1, 8), (1, 8)))
    ones = torch.ones_like(dt)
    zero, one = torch.zeros(1, dtype=dt.dtype), torch.ones(1, dtype=dt.dtype)
    cases = {
        "linear attention: A = 0": semiseparable_matrix(ones, zero, B, C, dt_softplus=False),
        "retention: one decay": semiseparable_matrix(ones, -0.1 * one, B, C, dt_softplus=False),
        "SSD: decay by token": semiseparable_matrix(2 * dt - 2, -one, B, C),
    }
    figure, axes = _panels(3, "from token")
    for axis, (name, values) in zip(axes, cases.items(), strict=True):
        shown = values[0, 0] / values.abs().max()
        axis.imshow((shown.sign() * shown.abs().sqrt()).numpy(), cmap="RdBu", vmin=-1, vmax=1)
        axis.set_title(name, loc="left", fontsize=8)
    axes[0].set_ylabel("to token")
    return figure


def selection(steps: int) -> Figure:
    """Selective copying by a time-invariant and by a selective model: training, and the selective one's time steps."""
    from core.synthetics import recipe, training

    study = recipe.read("selective_copying")
    small = {
        "task": {"length": 48, "vocab_size": 8, "data": 4}, "d_model": 32, "steps": steps, "batch_size": 32,
        "lr": 3e-3, "warmup": 100, "check_every": 50, "stop_at": None, "curriculum": [], "test_sequences": 1,
    }  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figure, (left, right) = _panels(2, "training step")
    for name, colour in (("s4_ungated", SOFT), ("mamba", INK)):
        work = training.Run(study, study.run({**small, "model": name}), device)
        for _ in work.process():
            pass
        history = work.result.history
        left.plot([h["step"] for h in history], [h["val/accuracy"] for h in history], color=colour, label=name)
    left.set_title("accuracy", loc="left", fontsize=8)
    left.legend(frameon=False, fontsize=7)
    tokens = work.task.batch(0, training.TESTS, torch.tensor(0, device=device), 1).tokens
    dt, data = (t.cpu().numpy() for t in (time_steps(work.model, tokens)[0], (tokens[0] > 0).nonzero()[:, 0]))
    right.semilogy(dt, color=WARM, linewidth=0.9)
    right.plot(data, dt[data], "o", color=INK, markersize=3.5, label="data and markers")
    right.set_title("mean dt of the first layer", loc="left", fontsize=8)
    right.set_xlabel("token")
    right.legend(frameon=False, fontsize=7)
    return figure


@torch.no_grad()
def time_steps(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """The mean over channels of softplus(dt) in the first Mamba layer of a model, (B, L), for tokens (B, L)."""
    from core.mixers import Mamba

    layer = next(module for module in model.modules() if isinstance(module, Mamba))
    found: list[Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        found.append(out)

    hook = layer.x_proj.register_forward_hook(keep)
    model(tokens)
    hook.remove()
    return F.softplus(layer.dt_proj(found[0][..., : layer.dt_rank])).mean(dim=-1)


def _panels(count: int, label: str) -> tuple[Figure, list]:
    figure = Figure(figsize=(8.0 if count > 1 else 5.0, 2.3), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.set_xlabel(label)
    return figure, axes


if __name__ == "__main__":
    run(draw)
