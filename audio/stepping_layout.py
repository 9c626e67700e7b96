"""A U-Net laid out for the generating kernel on a GPU: the stream of its weights, its state, and the sizes of both.

Legend: B clips, D width, E inner width of a mixer, N or M state, R dt rank, W convolution width, P threads a channel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audio.net import SoundNet
from audio.sashimi import MLP, StageState
from audio.tiles import TILE, Stream, operand, padded, up_to
from core.mixers import S4D, MambaState, S4State
from core.mixers.mamba import decay_rates

NARROW = 64  # widest x that every warp normalises for itself
PAIR = 2  # lanes that share a channel's states


class Layout:
    """A net and the state of some clips, as the kernel wants them.

    Attributes:
        state: (B, numbers) float32 of each clip: frames of the poolings, then the layers' states.
        stream: The weights, uint8: for each stage what runs on the way down, then for each what runs on the way up.
        macros: What the kernel is compiled with, but for the clips and the size of its ring.
        words: Words of shared memory that a clip takes.
        largest: Bytes of the stream that have to be in shared memory at once.
        seen: Samples so far, as far as they matter: within a period of the poolings.

    Args:
        net: The net; see ``audio.packing.can_pack``.
        state: State of B clips.
        clips: Clips of a block of threads.
        half: Whether weights of products are bfloat16.
        warps: Warps of a block of threads that compute, a power of two.
    """

    def __init__(self, net: SoundNet, state: StageState, clips: int, half: bool, warps: int) -> None:
        self._clips, self._half, self._warps = clips, half, warps
        self._cases: dict[str, int] = {}  # code for a shape of layer -> its number
        self._shapes: list[int] = []  # of each block
        self._places: list[int] = []  # of each block's state
        self._states: list[Tensor] = []
        self._size = 0
        self._room = {"GATES": 4, "LOWS": 4, "INNER": 0}
        self.largest = 0
        config, model = net.config, net.model
        self._wides = [config.d_model * config.expand**d for d in range(len(config.pool) + 1)]
        stages: list[StageState] = []
        at: Any = state
        for _ in config.pool:
            stages.append(at)
            at = at.inner
        frames = self._add_frames(config.pool, stages)
        layers = [model._layers(d) for d in range(len(config.pool))]
        downs = [(layer[0], stage.down) for layer, stage in zip(layers, stages, strict=True)]
        downs.append((list(model.c_layers), at))
        ups = [(layer[3], stage.up) for layer, stage in zip(layers, stages, strict=True)]
        segments, firsts = [], []
        for d, (blocks, states) in enumerate([*downs, *ups]):
            stage, segment = d % len(downs) if d < len(downs) else d - len(downs), Stream(half, warps)
            if 0 < d < len(downs):
                segment.product(*_frames_in(layers[d - 1][1].linear, config.pool[d - 1]))
            firsts.append(len(self._shapes))
            for block, its in zip(blocks, states, strict=True):
                self._add_block(segment, block, its)
            if d >= len(downs) - 1:  # on the way up
                if stage:
                    segment.product(*_frames_out(layers[stage - 1][2].linear, config.pool[stage - 1]))
                else:
                    segment.vectors(model.norm.weight, model.norm.bias)
                    segment.product(net.head.weight, net.head.bias)
            segments.append(segment.bytes())
        self.seen, period = 0, 1
        for stage_state, pool in zip(stages, config.pool, strict=True):
            self.seen, period = self.seen + period * stage_state.waiting.shape[1], period * pool
        self.stream = np.concatenate(segments)
        self.state = torch.cat(self._states, dim=1).contiguous()
        counts = [len(blocks) for blocks, _ in [*downs, *ups]]
        self._finish(net, segments, firsts, counts, frames)

    def _finish(
        self, net: SoundNet, segments: list[np.ndarray], firsts: list[int], counts: list[int], frames: dict[str, Any]
    ) -> None:
        """Works out the macros."""
        wides, pool, stages = self._wides, net.config.pool, len(self._wides)
        kept = [n + 1 for n in counts[: stages - 1]] + [1]  # x before each layer on the way down, and at its end
        skips = np.cumsum([0, *(n * up_to(wide, 4) for n, wide in zip(kept, wides, strict=True))]).tolist()
        begin = np.cumsum([0, *map(len, segments)])[:-1].tolist()
        inner = max(self._room["INNER"], *wides)
        rooms = {
            "WIDEST": up_to(max(wides), 4),
            "NORMED": _operand_width(max(wides)),
            "INNER": _operand_width(inner),
            "GATES": self._room["GATES"],
            "LOWS": self._room["LOWS"],
            "PARTS": max(up_to(wide, TILE) * self._sums_of(wide) for wide in wides),
            "SKIPPED": up_to(skips[-1], 4),
            "RESIDENT": frames["width"],
        }
        self.words = sum(rooms.values()) + NARROW + self._warps * rooms["LOWS"] + 2 * net.levels
        number = range(stages - 1)
        downs = [
            f"case {d}: pool_down<{pool[d] * wides[d]}, {wides[d + 1]}>(w, waiting_at[{d}]); break;" for d in number
        ]
        ups = [f"case {d}: pool_up<{wides[d + 1]}, {pool[d] * wides[d]}>(w, current_at[{d}]); break;" for d in number]
        lists = {
            "WIDES": wides, "POOLS": [*pool, 1], "DOWNS": counts[:stages], "UPS": [*counts[stages:], 0],
            "FIRST_DOWN": firsts[:stages], "FIRST_UP": [*firsts[stages:], 0], "SKIP_AT": skips,
            "WAITING_AT": [*frames["waiting"], 0], "CURRENT_AT": [*frames["current"], 0], "SHAPES": [*self._shapes, 0],
            "STATE_AT": [*self._places, 0], "SEGMENT_AT": begin, "SEGMENT_BYTES": [len(s) for s in segments],
        }  # fmt: skip
        values = {
            **rooms, "WARPS": self._warps, "HALF": int(self._half), "LEVELS": net.levels,
            "WIDTH": wides[0], "STAGES": stages, "UNET": int(net.config.unet), "STATE_SIZE": self.state.shape[1],
            "NARROW": NARROW, **{name: f"{{{', '.join(map(str, values))}}}" for name, values in lists.items()},
            "BLOCK_CASES": " ".join(f"case {i}: {code}; break;" for code, i in self._cases.items()),
            "DOWN_CASES": " ".join(downs), "UP_CASES": " ".join(ups), "HEAD": f"score<{wides[0]}>",
        }  # fmt: skip
        self.macros = tuple(f"{name} {value}" for name, value in values.items())

    def _add_frames(self, pools: tuple[int, ...], stages: list[StageState]) -> dict[str, Any]:
        """Adds the poolings' frames, which the kernel keeps in shared memory; returns their places."""
        waiting_at, current_at = [], []
        for stage, pool, wide in zip(stages, pools, self._wides, strict=False):
            frame = padded(stage.waiting.detach().float(), pool, wide).flatten(1)
            waiting_at.append(self._add_state(operand(padded(frame, up_to(pool * wide, TILE)), self._half)))
            current = stage.current.detach().float().flatten(1)
            current_at.append(self._add_state(padded(current, up_to(pool * wide, TILE))))
        width = _operand_width(self._size) if self._size else 0
        if width > self._size:
            self._add_state(self._states[0].new_zeros(len(self._states[0]), width - self._size))
        return {"waiting": waiting_at, "current": current_at, "width": width}

    def _add_state(self, tensor: Tensor) -> int:
        place = self._size
        self._states.append(padded(tensor, up_to(tensor.shape[1], 4)))
        self._size += self._states[-1].shape[1]
        return place

    def _add_block(self, segment: Stream, block: Any, state: Any) -> None:
        segment.vectors(block.norm.weight, block.norm.bias)
        self._places.append(self._size)
        if isinstance(block.layer, MLP):
            code = self._add_mlp(segment, block.layer)
        elif isinstance(block.layer, S4D):
            code = self._add_s4d(segment, block.layer, state)
        else:
            code = self._add_mamba(segment, block.layer, state)
        self._shapes.append(self._cases.setdefault(code, len(self._cases)))

    def _add_mlp(self, segment: Stream, layer: MLP) -> str:
        inwards, outwards = layer.linears
        segment.product(inwards.weight, inwards.bias)
        segment.product(outwards.weight, outwards.bias)
        self._wants(INNER=up_to(outwards.in_features, TILE))
        return f"feed_forward<{outwards.out_features}, {outwards.in_features}>(w, at)"

    def _add_mamba(self, segment: Stream, layer: Any, state: MambaState) -> str:
        N, W, R, channels = layer.d_state, layer.d_conv, layer.dt_rank, TILE * self._warps  # a lane has half a channel
        R4, N4, E = up_to(R, 4), up_to(N, 4 * PAIR), up_to(layer.d_inner, channels)
        parts = [layer.d_inner] * 2
        both, bias = _in_parts(layer.in_proj.weight, parts, [E, E]).unflatten(0, (2, E)), layer.in_proj.bias
        biases = None if bias is None else _in_parts(bias, parts, [E, E]).unflatten(0, (2, E))
        taps = layer.conv1d.weight.detach().squeeze(1).t()
        first = taps.new_zeros(layer.d_inner) if layer.conv1d.bias is None else layer.conv1d.bias.detach()
        taps = padded(torch.cat([first[None], taps]).float().cpu(), E)
        rounds = [slice(e, e + channels) for e in range(0, E, channels)]
        for here in rounds:  # values and gates of as many channels as the warps have at a time
            its = None if biases is None else biases[:, here].flatten()
            segment.product(both[:, here].flatten(0, 1), its, taps[:, here])
        low = padded(_in_parts(layer.x_proj.weight, [R, N, N], [R4, N4, N4]), R4 + 2 * N4, E)
        self._share(segment, low, None)
        rates = layer.dt_proj.weight.detach().float()
        decays = (decay_rates(layer.A_log.detach()).double() / math.log(2)).float()
        step, skip = (padded(t.detach().float(), E) for t in (layer.dt_proj.bias, layer.D))
        rates, decays = padded(rates, E, R4), padded(decays, E, N4)
        for here in rounds:
            before = segment.size
            rate, decay = rates[here].unflatten(1, (-1, 4)).transpose(0, 1), _by_threads(decays[here], PAIR)
            segment.vectors(step[here], skip[here], rate, decay)
            self.largest = max(self.largest, segment.size - before)
        out = padded(layer.out_proj.weight.detach(), layer.d_model, E)
        if len(out) <= NARROW:
            self._share(segment, out, layer.out_proj.bias)
        else:
            segment.product(out, layer.out_proj.bias)
        self._add_state(padded(state.conv.detach().float(), E).flatten(1))
        self._add_state(_by_threads(padded(state.ssm.detach().float(), E, N4), PAIR).flatten(1))
        self._wants(GATES=E, LOWS=up_to(R4 + 2 * N4, TILE), INNER=E)
        biased = str(bias is not None).lower()
        return f"mamba<{layer.d_model}, {E}, {N}, {W}, {R}, {biased}>(w, state, at)"

    def _share(self, segment: Stream, weight: Tensor, bias: Tensor | None) -> None:
        """A product of whose rows each warp takes those that it has."""
        segment.product(weight, bias)
        tiles, unit = up_to(len(weight), TILE) // TILE, 512 if self._half else 1024
        self.largest = max(self.largest, up_to(64 * tiles, unit) + tiles * self._warps * unit)

    def _add_s4d(self, segment: Stream, layer: Any, state: S4State) -> str:
        """A diagonal state space: real and imaginary parts of its decay, input and output weights."""
        linear: Any = layer.output_linear[0]
        D, M, out = linear.in_features, layer.kernel.d_state // 2, linear.out_features
        P = self._threads(D, M)
        J = math.ceil(M / P)
        log_a, B, C = layer.layer.kernel.discrete()
        planes = torch.stack([part for t in (torch.exp(log_a), B, 2 * C) for part in (t.real, t.imag)])
        planes = padded(planes.detach().float().cpu(), J * P).unflatten(2, (J, P)).permute(2, 0, 1, 3).flatten(1)
        segment.vectors(layer.layer.D)
        segment.vectors(padded(planes, up_to(planes.shape[1], 4)))
        if out > D:  # a value and its gate, 8 of each to a tile
            weight, bias = ((_in_parts(t, [D, D], [up_to(D, 8)] * 2)) for t in (linear.weight, linear.bias))
            weight, bias = (t.unflatten(0, (2, -1, 8)).transpose(0, 1).flatten(0, 2) for t in (weight, bias))
        else:
            weight, bias = linear.weight, linear.bias
        segment.product(weight, bias)
        ssm = padded(state.ssm.detach().float().transpose(2, 3), J * P).unflatten(3, (J, P))  # (B, D, 2, J, P)
        self._add_state(ssm.permute(0, 3, 2, 1, 4).flatten(1))
        self._wants(INNER=up_to(D, TILE))
        return f"s4d<{D}, {M}, {out}, {P}>(w, state, at)"

    def _threads(self, channels: int, states: int) -> int:
        """Threads that share a channel's states: as many as there are, a power of two."""
        return min(_power_of_two((32 * self._warps) // (channels * self._clips)), _power_of_two(2 * states - 1), 32)

    def _sums_of(self, wide: int) -> int:
        """How many sums a layer may leave of each number of an x so wide."""
        return self._warps if wide <= NARROW else max(1, self._warps // (up_to(wide, TILE) // TILE))

    def _wants(self, **sizes: int) -> None:
        for name, size in sizes.items():
            self._room[name] = max(self._room[name], size)


def _power_of_two(most: int) -> int:
    """The largest power of two that is no larger, at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def _operand_width(size: int) -> int:
    """Words from a clip's input of a product to the next clip's, so that eight clips do not share banks."""
    return up_to(size, 32) + 16


def _in_parts(tensor: Tensor, sizes: list[int], padded_sizes: list[int]) -> Tensor:
    """Splits the first dimension, and puts zeros after each part."""
    parts = tensor.detach().float().cpu().split(sizes)
    rest = tensor.shape[1:]
    return torch.cat([padded(part, size, *rest) for part, size in zip(parts, padded_sizes, strict=True)])


def _by_threads(tensor: Tensor, threads: int) -> Tensor:
    """(..., E, N) as (..., J, E, P, 4), where N = 4 P J: what the threads of a channel read at once lies together."""
    return tensor.unflatten(-1, (-1, threads, 4)).movedim(-3, -4)


def _frames_in(linear: torch.nn.Linear, pool: int) -> tuple[Tensor, Tensor | None]:
    """A pooling's weight and bias, its inputs sample by sample."""
    return linear.weight.unflatten(1, (-1, pool)).transpose(1, 2).flatten(1), linear.bias


def _frames_out(linear: torch.nn.Linear, pool: int) -> tuple[Tensor, Tensor | None]:
    """An unpooling's weight and bias, its outputs sample by sample."""
    weight = linear.weight.unflatten(0, (-1, pool)).transpose(0, 1).flatten(0, 1)
    return weight, linear.bias.unflatten(0, (-1, pool)).t().flatten()
