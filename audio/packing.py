"""A U-Net's weights and state in flat arrays, with tables that say where everything is: what ``stepping`` runs on.

Legend: B clips, D width, E inner width of a mixer, N state, R dt rank, W convolution width, S samples pooled.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio.net import SoundNet
from audio.sashimi import MLP, ResidualBlock, StageState
from core.mixers import S4D, Mamba, MambaState, S4State

# Columns of the table of blocks: sizes, then where weights (W_) and states (S_) begin.
KIND, DIM, INNER, STATE, WIDTH, RANK = range(6)
W_NORM, W_IN, W_CONV, W_X, W_DT, W_A, W_SKIP, W_OUT, S_CONV, S_SSM, COLUMNS = range(6, 17)
MIXER, FEED_FORWARD, DIAGONAL = 0, 1, 2
# Columns of the table of stages; the last row is the centre, which only has blocks on the way "down".
POOL, WIDE, FIRST_DOWN, FIRST_UP, BLOCKS, UP_BLOCKS, W_DOWN, W_UP, S_WAITING, S_CURRENT, STAGE_COLUMNS = range(11)


def can_pack(net: SoundNet) -> bool:
    """Tells whether ``Packed`` knows all layers of a net: Mamba, S4D and MLPs."""
    layers = [module.layer for module in net.modules() if isinstance(module, ResidualBlock)]
    return all(type(layer) in (Mamba, S4D, MLP) for layer in layers)


class Packed:
    """Copies of a net's weights and of a state.

    Attributes:
        weights: All weights, end to end; a linear layer's bias comes before its transposed weight.
        state: (B, numbers) everything that a clip remembers.
        phase: (B, stages) samples that wait in each stage's frame; the centre's is 0.
        blocks: A row of sizes and places for each residual block.
        stages: A row for each stage, from the outermost, and one for the centre.
        ends: Where embedding (of all classes), last norm and head begin.

    Args:
        net: The net; see ``can_pack``.
        state: State of B clips.
    """

    def __init__(self, net: SoundNet, state: StageState) -> None:
        self._weights: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self._sizes = {"weights": 0, "states": 0}
        self._rows: list[np.ndarray] = []
        stages, phases = [], []
        model, at = net.model, state
        for depth, pool in enumerate(net.config.pool):
            down, down_pool, up_pool, up = model._layers(depth)
            row = np.zeros(STAGE_COLUMNS, np.int64)
            row[[POOL, WIDE, BLOCKS, UP_BLOCKS]] = pool, at.current.shape[2], len(down), len(up)
            row[FIRST_DOWN] = self._add_blocks(down, at.down)
            row[FIRST_UP] = self._add_blocks(up, at.up)
            row[W_DOWN] = self._add_linear(down_pool.linear)
            row[W_UP] = self._add_linear(up_pool.linear)
            phases.append(at.waiting.shape[1])
            room = torch.zeros_like(at.current)
            room[:, : at.waiting.shape[1]] = at.waiting
            row[S_WAITING], row[S_CURRENT] = self._add_state(room), self._add_state(at.current)
            stages.append(row)
            at = at.inner
        centre = np.zeros(STAGE_COLUMNS, np.int64)
        layers: list[Any] = list(model.c_layers)
        centre[[WIDE, FIRST_DOWN, BLOCKS]] = len(layers[0].norm.weight), self._add_blocks(layers, at), len(layers)
        stages.append(centre)
        ends = [self._add(net.table()), self._add_norm(model.norm), self._add_linear(net.head)]
        self.ends = np.array(ends, np.int64)
        self.blocks, self.stages = np.stack(self._rows), np.stack(stages)
        self.weights = np.concatenate(self._weights)
        self.state = np.ascontiguousarray(np.concatenate(self._states, axis=1))
        self.phase = np.tile(np.array([*phases, 0], np.int64), (len(self.state), 1))

    def _add(self, tensor: Tensor) -> int:
        """Adds numbers at the next multiple of 4, so that a GPU can load four at a time."""
        begin = self._sizes["weights"]
        values = tensor.detach().float().cpu().contiguous().numpy().ravel()
        self._weights.append(np.pad(values, (0, -len(values) % 4)))
        self._sizes["weights"] += len(self._weights[-1])
        return begin

    def _add_linear(self, linear: torch.nn.Linear) -> int:
        """Bias, then the weight transposed: a step then runs along contiguous rows."""
        weight = linear.weight.t()
        bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        return self._add(torch.cat([bias[None], weight]))

    def _add_norm(self, norm: torch.nn.LayerNorm) -> int:
        return self._add(torch.stack([norm.weight, norm.bias]))

    def _add_state(self, tensor: Tensor) -> int:
        begin = self._sizes["states"]
        self._states.append(tensor.detach().float().cpu().contiguous().numpy().reshape(len(tensor), -1))
        self._sizes["states"] += self._states[-1].shape[1]
        return begin

    def _add_blocks(self, blocks: list[Any], states: tuple[Any, ...]) -> int:
        first = len(self._rows)
        for block, state in zip(blocks, states, strict=True):
            row = np.zeros(COLUMNS, np.int64)
            row[DIM], row[W_NORM] = len(block.norm.weight), self._add_norm(block.norm)
            layer: Any = block.layer
            if isinstance(layer, MLP):
                inwards, outwards = layer.linears
                row[KIND], row[INNER] = FEED_FORWARD, outwards.in_features
                row[W_IN], row[W_OUT] = self._add_linear(inwards), self._add_linear(outwards)
            elif isinstance(layer, S4D):
                self._add_diagonal(row, layer, state)
            else:
                self._add_mamba(row, layer, state)
            self._rows.append(row)
        return first

    def _add_mamba(self, row: np.ndarray, layer: Any, state: MambaState) -> None:
        sizes = MIXER, layer.d_inner, layer.d_state, layer.d_conv, layer.dt_rank
        row[[KIND, INNER, STATE, WIDTH, RANK]] = sizes
        taps = layer.conv1d.weight.squeeze(1).t()
        bias = taps.new_zeros(layer.d_inner) if layer.conv1d.bias is None else layer.conv1d.bias
        row[W_CONV] = self._add(torch.cat([bias[None], taps]))
        row[W_IN], row[W_OUT] = self._add_linear(layer.in_proj), self._add_linear(layer.out_proj)
        row[W_X], row[W_DT] = self._add_linear(layer.x_proj), self._add_linear(layer.dt_proj)
        row[W_A], row[W_SKIP] = self._add(-torch.exp(layer.A_log.float()).t()), self._add(layer.D)
        row[S_CONV], row[S_SSM] = self._add_state(state.conv), self._add_state(state.ssm.transpose(1, 2))

    def _add_diagonal(self, row: np.ndarray, layer: Any, state: S4State) -> None:
        """A diagonal state space: real and imaginary parts of its decay, input and output weights, each (M, D)."""
        linear: Any = layer.output_linear[0]
        row[[KIND, INNER, STATE]] = DIAGONAL, linear.out_features, layer.kernel.d_state // 2
        log_a, B, C = layer.layer.kernel.discrete()
        planes = torch.stack([part for t in (torch.exp(log_a), B, 2 * C) for part in (t.real, t.imag)])
        row[W_A], row[W_SKIP] = self._add(planes.transpose(1, 2)), self._add(layer.layer.D)
        row[W_OUT] = self._add_linear(linear)
        row[S_SSM] = self._add_state(state.ssm.permute(0, 3, 2, 1))
