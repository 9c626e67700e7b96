"""SaShiMi, a U-Net of state-space layers over raw audio (Goel et al. 2022, "It's Raw!"), with any mixer as its layer.

With layers on the way down, too, and Mamba as the layer it is the U-Net of Mamba's audio experiments (Gu & Dao 2023,
section 4.4, appendix E.4).

Legend: B batch, L length, D width of a stage, S samples pooled into one.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.mixers import S4, S4D, Attention, Mamba, MambaComplex, MambaS4
from core.parallel.group import active

# Name in the configuration -> constructor. A new kind of layer is an import and an entry.
MIXERS: dict[str, Any] = {
    "mamba": Mamba,
    "mamba_complex": MambaComplex,
    "mamba_s4": MambaS4,
    "s4": S4,
    "s4d": S4D,
    "attention": partial(Attention, causal=True),
}


@dataclass(frozen=True)
class SashimiConfig:
    """Sizes of a SaShiMi; the defaults are Mamba's on SC09, 6.1 million parameters.

    Args:
        d_model: Width D of the outermost stage.
        n_layers: Mixers in each stage, on each way.
        pool: Samples pooled into one between a stage and the next one inwards.
        expand: Factor of the width from a stage to the next one inwards.
        mixer: Kind of layer: mamba, mamba_complex, mamba_s4, s4, s4d or attention.
        mixer_cfg: Further arguments of its constructor, such as ``d_state``; attention needs ``num_heads``.
        mlp: Hidden width of the MLP that follows each mixer, in units of the stage's width; 0 for no MLPs.
        dropout: Probability, on every branch.
        unet: Whether there are layers on the way down, and a skip connection after each layer of the way up, as in
            Mamba's experiments and SaShiMi's later ones; else as in SaShiMi's paper.
        centre: Kind of layer of the innermost stage; the same as the others by default.
        centre_cfg: Further arguments of its constructor; those of the others where ``centre`` is None.
        centre_mlp: As ``mlp``, for the innermost stage.

    Raises:
        ValueError: For an unknown mixer, or sizes that are not positive.
    """

    d_model: int = 64
    n_layers: int = 8
    pool: tuple[int, ...] = (4, 4)
    expand: int = 2
    mixer: str = "mamba"
    mixer_cfg: dict[str, Any] = field(default_factory=dict)
    mlp: int = 0
    dropout: float = 0.0
    unet: bool = True
    centre: str | None = None
    centre_cfg: dict[str, Any] = field(default_factory=dict)
    centre_mlp: int | None = None

    def __post_init__(self) -> None:
        for name, mixer in (("mixer", self.mixer), ("centre", self.centre or self.mixer)):
            if mixer not in MIXERS:
                raise ValueError(f"{name} is {mixer!r}, wanted one of {', '.join(MIXERS)}")
        sizes = {"d_model": self.d_model, "n_layers": self.n_layers, "expand": self.expand}
        sizes |= {f"pool[{i}]": factor for i, factor in enumerate(self.pool)}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, wanted at least 1")
        if self.mlp < 0 or (self.centre_mlp or 0) < 0 or not 0 <= self.dropout < 1:
            got = f"mlp is {self.mlp}, centre_mlp {self.centre_mlp} and dropout {self.dropout}"
            raise ValueError(f"{got}, wanted mlp >= 0, centre_mlp >= 0 and 0 <= dropout < 1")


class MLP(nn.Module):
    """Linear, GELU, linear, (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU()), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear layers."""
        return self.ff[0][0], self.ff[2]  # type: ignore[index, return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, L, D) to (B, L, D)."""
        return self.ff(x)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over (..., D). On a GPU by ``kernels.norm``: PyTorch's is slow where rows are many and narrow."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D), in x's dtype on a GPU."""
        if not x.is_cuda:
            return super().forward(x)
        arguments = ("layer", self.eps, 0, True, True, "auto")
        return torch.ops.triscan.norm(x, self.weight, self.bias, None, None, *arguments)[0]


class ResidualBlock(nn.Module):
    """x + layer(norm(x)), with LayerNorm.

    Args:
        dim: D.
        layer: A mixer, or a module without memory such as ``MLP``.
        mixes: Whether it is a mixer.
        dropout: Probability, on the branch.
    """

    def __init__(self, dim: int, layer: nn.Module, mixes: bool, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.layer = layer
        self.mixes = mixes
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Runs the block over (B, L, D).

        Args:
            x: (B, L, D).
            state: The mixer's, to go on from; None begins a sequence and keeps no state.

        Returns:
            (B, L, D), and the state afterwards where one was given.
        """
        h = self.norm(x)
        if not self.mixes or state is None:
            h = self.layer(h)
        else:
            h, state = self.layer.forward_state(h, state)  # type: ignore[operator]
        return x + self.dropout(h), state


class DownPool(nn.Module):
    """S neighbours become one: linear on the S D numbers of each frame; in the weight, S runs fastest."""

    def __init__(self, dim: int, out: int, pool: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim * pool, out)
        self.pool = pool

    def forward(self, frames: Tensor) -> Tensor:
        """Maps whole frames (B, n S, D) to (B, n, out)."""
        return self.linear(frames.unflatten(1, (-1, self.pool)).transpose(2, 3).flatten(2))


class UpPool(nn.Module):
    """One becomes S neighbours: linear to S out numbers; in the weight, S runs fastest."""

    def __init__(self, dim: int, out: int, pool: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out * pool)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n, D) to (B, n S, out)."""
        return self.linear(x).unflatten(2, (-1, self.pool)).transpose(2, 3).flatten(1, 2)


class StageState(NamedTuple):
    """What a stage remembers. A batch shares the position within the pooling period, which ``waiting`` shows."""

    down: tuple[Any, ...]  # one entry a layer of the way down
    waiting: Tensor  # (B, w, D) with w < S: samples of the frame that is not full yet
    current: Tensor  # (B, S, D): what the inner stages said about the frame before, for the samples of this one
    up: tuple[Any, ...]  # one entry a layer of the way up
    inner: Any  # StageState of the next stage inwards, or in the end one entry a layer of the centre


class Sashimi(nn.Module):
    """Causal U-Net over time, (B, L, D) -> (B, L, D), for any L.

    A stage hands whole frames of S samples inwards; what comes back from a frame is added to the samples of the next
    frame, never to its own. So an output depends on its own input and earlier ones only, and generation sample by
    sample runs the inner stages once a frame. Names of parameters are the published ones: ``d_layers`` (layers and
    pooling of all stages, flat), ``c_layers``, ``u_layers`` (per stage, from the innermost: pooling, then layers),
    ``norm``; a layer's own are under ``layer``, its norm's under ``norm``.

    Args:
        config: Sizes.
    """

    def __init__(self, config: SashimiConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.d_model
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for pool in config.pool:
            inner = dim * config.expand
            down += [*(_blocks(config, dim) if config.unet else []), DownPool(dim, inner, pool)]
            up.insert(0, nn.ModuleList([UpPool(inner, dim, pool), *_blocks(config, dim)]))
            dim = inner
        self.d_layers = nn.ModuleList(down)
        self.c_layers = nn.ModuleList(_blocks(config, dim, centre=True))
        self.u_layers = nn.ModuleList(up)
        self.norm = LayerNorm(config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Runs whole sequences (B, L, D) from their beginning."""
        return self.norm(self._stage(0, x, None)[0])

    def forward_state(self, x: Tensor, state: StageState) -> tuple[Tensor, StageState]:
        """Continues from ``state`` for any L; with L = 1 this is a step of generation.

        Args:
            x: (B, L, D).
            state: From ``init_state`` or an earlier call; left as it is.

        Returns:
            (B, L, D) and the state afterwards.
        """
        y, after = self._stage(0, x, state)
        return self.norm(y), after

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StageState:
        """The state before the first sample.

        Args:
            batch_size: B.
            device: Where; the parameters' device by default.
            dtype: Of the activations; the parameters' by default.
        """
        weight = self.norm.weight
        device, dtype = device or weight.device, dtype or weight.dtype

        def begin(blocks: list[Any]) -> tuple[Any, ...]:
            return tuple(block.layer.init_state(batch_size, device, dtype) if block.mixes else None for block in blocks)

        state: Any = begin(list(self.c_layers))
        for depth in reversed(range(len(self.config.pool))):
            down, _, _, up = self._layers(depth)
            dim = self.config.d_model * self.config.expand**depth
            waiting = torch.zeros(batch_size, 0, dim, device=device, dtype=dtype)
            current = torch.zeros(batch_size, self.config.pool[depth], dim, device=device, dtype=dtype)
            state = StageState(begin(down), waiting, current, begin(up), state)
        return state

    def _layers(self, depth: int) -> tuple[list[Any], DownPool, UpPool, list[Any]]:
        """The layers of a stage on the way down, the two poolings at its inner end, the layers on the way up."""
        up = list(self.u_layers[len(self.u_layers) - 1 - depth])  # type: ignore[arg-type]
        count = len(up) if self.config.unet else 1  # on the way down: as many layers, or none, and one pooling
        down: list[Any] = list(self.d_layers)[depth * count : (depth + 1) * count]
        return down[:-1], down[-1], up[0], up[1:]

    def _stage(self, depth: int, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Runs a stage and all within it over (B, L, D), L >= 1; state None begins and keeps no state."""
        if depth == len(self.config.pool):
            y, _, after = _through(list(self.c_layers), x, state)
            return x + y, after
        down, pool, unpool, up = self._layers(depth)
        before = state or StageState(None, None, None, None, None)  # type: ignore[arg-type]
        y, skips, down_state = _through(down, x, before.down)
        waiting = y[:, :0] if state is None else before.waiting
        joined = y if state is None else torch.cat([waiting, y], dim=1)
        current = y.new_zeros(len(y), pool.pool, y.shape[2]) if state is None else before.current
        whole = joined.shape[1] // pool.pool * pool.pool
        said, inner = current, before.inner
        if whole:
            z, inner = self._stage(depth + 1, pool(joined[:, :whole]), before.inner)
            heard = unpool(z).to(current.dtype)
            if (group := active()) is not None:  # this part goes on from the last frame of the part before
                current = group.neighbour(heard[:, -pool.pool :], following=False)
            said = torch.cat([current, heard], dim=1)
        first = waiting.shape[1]
        x = said[:, first : first + y.shape[1]] + y
        before_up = x
        x, _, up_state = _through(up, x, before.up, skips if self.config.unet else None)
        if not self.config.unet:
            x = x + before_up
        if state is None:
            return x, None
        return x, StageState(down_state, joined[:, whole:], said[:, whole:], up_state, inner)


def _blocks(config: SashimiConfig, dim: int, centre: bool = False) -> list[nn.Module]:
    """The layers of one stage on one way: n_layers mixers, each with its MLP if there are any."""
    kind, options, mlp = config.mixer, config.mixer_cfg, config.mlp
    if centre:
        kind, options = (config.centre, config.centre_cfg) if config.centre else (kind, options | config.centre_cfg)
        mlp = mlp if config.centre_mlp is None else config.centre_mlp
    blocks: list[nn.Module] = []
    for _ in range(config.n_layers):
        blocks.append(ResidualBlock(dim, MIXERS[kind](dim, **options), True, config.dropout))
        if mlp:
            blocks.append(ResidualBlock(dim, MLP(dim, mlp * dim, config.dropout), False, config.dropout))
    return blocks


def _through(
    blocks: list[Any], x: Tensor, state: tuple[Any, ...] | None, skips: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor], Any]:
    """Runs blocks one after the other.

    Args:
        blocks: The blocks.
        x: (B, L, D).
        state: One entry a block, or None.
        skips: What is added after each block: the inputs of the blocks that mirror them, in those blocks' order.

    Returns:
        (B, L, D), the inputs of the blocks, and the states afterwards, or None.
    """
    inputs, after = [], []
    for i, block in enumerate(blocks):
        inputs.append(x)
        x, new = block(x, None if state is None else state[i])
        after.append(new)
        if skips is not None:
            x = x + skips[len(blocks) - 1 - i]
    return x, inputs, None if state is None else tuple(after)
