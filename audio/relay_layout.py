"""A Mamba U-Net laid out for the relay of blocks of threads that generates one clip: ``relay.cu``.

Legend: D width, E inner width of a mixer, N state, R dt rank, W convolution width, S parts of a layer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from audio.net import SoundNet
from audio.relay_weights import norm_vectors, part_of_layer
from audio.sashimi import StageState
from audio.tiles import TILE, half_tiles, operand, padded, up_to
from core.mixers import Mamba, MambaState

WARPS = 8  # of a block of threads
SHARED_LIMIT = 227 << 10  # bytes of shared memory that a block of threads may have on sm_90
MOST_LOW = 64  # numbers that make a layer's dt, B and C
MOST_WIDTH = 256  # of a stage: its layers' weights fit into shared memory and registers
MOST_TILES = 32  # of a pooling's weights that a warp holds in registers
CLUSTER = 8  # blocks that reach each other's shared memory: the most that every GPU of this kind takes
FIELDS = (
    "job", "period", "weights", "state", "out", "out_slot", "part", "shared", "said", "said_slot",
    "pool", "fars", "nears", "pushes",
)  # fmt: skip
WAYS = ("fars", "nears", "pushes")


class Source(NamedTuple):
    """Mail: where number 0 of slot 0 is, how many numbers a slot has, and which block it comes from, if a layer's."""

    at: int
    slot: int
    owner: int = -1
    width: int = 0  # of the owner's share


class Job:
    """What a block of threads does: its row of the table, and where its input comes from."""

    def __init__(self, kind: str, row: dict[str, int], sources: list[Source], parts: int, lows: int) -> None:
        self.kind, self.row, self.sources = kind, row, sources
        self.parts, self.lows = parts, lows  # of the layer, and numbers that its parts share; 0 parts if it is none
        self.place = 0  # in the grid
        self.fars: list[int] = []
        self.nears: list[int] = []
        self.pushes: list[int] = []
        self.letters = 0  # of its shared memory

    def ways(self) -> dict[str, int]:
        """How many there are of each way."""
        return {name: len(getattr(self, name)) // 2 for name in WAYS}


class Relay:
    """A net and the state of one clip, as the kernel wants them.

    Attributes:
        state: (numbers,) float32.
        weights: uint8, those of each block of threads together.
        table: (blocks, fields) int32.
        letters: How many numbers can be on their way.
        macros: What the kernel is compiled with.
        shared: Bytes of shared memory of a block of threads.
        period: Samples of a period of the poolings.
        seen: Samples so far, as far as they matter: within a period.

    Args:
        net: The net, in bfloat16.
        state: State of one clip.
        warps: Warps of a block of threads, a multiple of 4.

    Raises:
        ValueError: If a layer is not a ``Mamba`` or too large, or the net has no layers on the way down.
    """

    def __init__(self, net: SoundNet, state: StageState, warps: int = WARPS) -> None:
        self._warps, self._channels = warps, TILE * warps
        self._jobs: list[Job] = []
        self._weights: list[np.ndarray] = []
        self._states: list[Tensor] = []
        self._sizes = {"weights": 0, "state": 0}
        self.letters = self.shared = 0
        config, model = net.config, net.model
        if not config.unet:
            raise ValueError("net: has no layers on the way down (unet is False), wanted a U-Net")
        self._depth = _power_of_two_above(2 * max(config.pool, default=1))
        layers, stages = [model._layers(d) for d in range(len(config.pool))], []
        at: Any = state
        for _ in config.pool:
            stages.append(at)
            at = at.inner
        embedding = self._mail(up_to(config.d_model, TILE))
        x, ends, period = [embedding], [], 1
        for (down, pool_down, _, _), its, pool in zip(layers, stages, config.pool, strict=True):
            inputs = []
            for block, layer_state in zip(down, its.down, strict=True):
                inputs.append(x)
                x = self._add_layer(block, layer_state, x, period)
            ends.append((inputs, x, period))
            x = [self._add_pool_down(pool_down.linear, its.waiting, pool, x, period)]
            period *= pool
        first = x
        for block, layer_state in zip(model.c_layers, at, strict=True):
            x = self._add_layer(block, layer_state, x, period)
        x = x + first
        for d in reversed(range(len(config.pool))):
            inputs, end, outer = ends[d]
            frame = self._add_pool_up(layers[d][2].linear, config.pool[d], x, outer * config.pool[d])
            x = end
            for block, layer_state in zip(layers[d][3], stages[d].up, strict=True):
                kept = (frame, stages[d].current) if x is end else None
                x = self._add_layer(block, layer_state, x, outer, kept) + inputs.pop()
        self._add_mouth(net, x, embedding)
        self.seen, self.period = 0, 1
        for its, pool in zip(stages, config.pool, strict=True):
            self.seen, self.period = self.seen + self.period * its.waiting.shape[1], self.period * pool
        self._finish(net)

    def _finish(self, net: SoundNet) -> None:
        """Gives each block its place in the grid, and its mail its way; works out the table and the macros."""
        grid = self._places()
        for job in self._jobs:
            self._choose_ways(job)
        most = {name: max(1, *(job.ways()[name] for job in self._jobs)) for name in WAYS}
        cases: dict[str, int] = {}  # code for a kind of block -> its number
        rows = []
        for place in range(up_to(len(grid), CLUSTER)):
            job = grid[place] if place < len(grid) else None
            rows.append([-1] + [0] * (len(FIELDS) - 1 + 2 * sum(most.values())))
            if job is None:
                continue
            alike = [other.ways() for other in self._jobs if other.kind == job.kind]
            code = ", ".join([job.kind, *(str(max(ways[name] for ways in alike)) for name in WAYS)])
            job.row |= {"job": cases.setdefault(code, len(cases)), **job.ways()}
            rows[-1] = [job.row.get(name, 0) for name in FIELDS]
            for name, size in most.items():
                rows[-1] += getattr(job, name) + [0] * (2 * size - len(getattr(job, name)))
        self.table = np.array(rows, np.int32)
        self.weights = np.concatenate(self._weights)
        self.state = torch.cat(self._states)
        near = up_to(max(job.letters for job in self._jobs), 2)
        self.shared += 8 * near + up_to(4 * len(rows[0]), 16)
        if self.shared > SHARED_LIMIT:
            raise ValueError(f"net: a block needs {self.shared:,} bytes of shared memory, wanted <= {SHARED_LIMIT:,}")
        code = " ".join(f"case {number}: {code}>(a); break;" for code, number in cases.items())
        values = {
            "WARPS": self._warps, "CLUSTER": CLUSTER, "LEVELS": net.levels, "DEPTH": self._depth, "NEAR_LETTERS": near,
            "FARS": most["fars"], "NEARS": most["nears"], "PUSHES": most["pushes"], "JOB_CASES": code,
        }  # fmt: skip
        self.macros = tuple(f"{name} {value}" for name, value in values.items())

    def _places(self) -> list[Job | None]:
        """The grid: layers first, those that follow each other in a cluster; no layer's parts lie in two clusters."""
        grid: list[Job | None] = []
        for job in sorted(self._jobs, key=lambda job: not job.parts):
            if job.row.get("part", 0) == 0 and len(grid) % CLUSTER + job.parts > CLUSTER:
                grid += [None] * (-len(grid) % CLUSTER)
            job.place = len(grid)
            grid.append(job)
        return grid

    def _choose_ways(self, job: Job) -> None:
        """Mail between layers in a cluster goes through shared memory, other mail through global memory.

        Two slots would not do for a pooling, which a stage may be almost two frames ahead of.
        """
        for source in job.sources:
            owner = self._jobs[source.owner] if source.owner >= 0 else None
            if owner is None or not job.parts or owner.place // CLUSTER != job.place // CLUSTER:
                job.fars += [source.at, source.slot]
                continue
            job.nears += [job.letters, source.width]
            owner.pushes += [job.place % CLUSTER, job.letters]
            job.letters += 2 * source.width
        job.row["shared"] = job.letters
        job.letters += 2 * job.parts * job.lows if job.parts > 1 else 0

    def _mail(self, width: int) -> Source:
        source = Source(self.letters, width)
        self.letters += self._depth * width
        return source

    def _add(
        self, kind: str, pieces: list[Tensor], state: list[Tensor], sources: list[Source], row: dict[str, int],
        parts: int = 0, lows: int = 0,
    ) -> int:  # fmt: skip
        """Adds a block of threads; returns its number."""
        raw = [piece.contiguous().reshape(-1).view(torch.uint8).cpu().numpy() for piece in pieces]
        row |= {"weights": self._sizes["weights"] // 16, "state": self._sizes["state"]}
        self._sizes["weights"] += sum(map(len, raw))
        self._sizes["state"] += sum(map(len, state))
        self._weights += raw
        self._states += state
        self._jobs.append(Job(kind, row, sources, parts, lows))
        return len(self._jobs) - 1

    def _needs(self, numbers: int) -> None:
        self.shared = max(self.shared, 4 * numbers)

    def _add_layer(
        self, block: Any, state: MambaState, sources: list[Source], period: int,
        said: tuple[Source, Tensor] | None = None,
    ) -> list[Source]:  # fmt: skip
        """A layer in as many parts as its channels need; returns where its output comes from."""
        layer, channels = block.layer, self._channels
        if type(layer) is not Mamba:
            raise ValueError(f"net: has a layer {type(layer).__name__}, wanted Mamba only")
        D, N, W, R = layer.d_model, layer.d_state, layer.d_conv, layer.dt_rank
        D16, R4, N8 = up_to(D, TILE), up_to(R, 4), up_to(N, 8)
        lows = up_to(R4 + 2 * N8, TILE)
        if lows > MOST_LOW or D > MOST_WIDTH:
            raise ValueError(f"net: dt_rank is {R}, d_state {N} and a width {D}: too large for a part of a layer")
        parts = math.ceil(layer.d_inner / channels)
        if parts > CLUSTER:
            raise ValueError(f"net: a layer has {layer.d_inner} channels, wanted <= {CLUSTER * channels}")
        out = self._mail(parts * D16)
        pool = 0 if said is None else said[1].shape[1]
        row = {"period": period, "out": out.at, "out_slot": out.slot, "pool": pool}
        frames = [] if said is None else [padded(said[1].detach().float().flatten().cpu(), up_to(pool * D, 4))]
        if said is not None:
            row |= {"said": said[0].at, "said_slot": said[0].slot}
        ssm = padded(state.ssm[0].detach().float().cpu(), parts * channels, N8)
        conv = padded(state.conv[0].detach().float().cpu(), parts * channels)
        said_by = []
        for part in range(parts):
            here = slice(part * channels, (part + 1) * channels)
            states = [conv[:, here].flatten(), ssm[here].flatten(), *frames]
            kind = f"layer<{D}, {N}, {W}, {R}, {parts}"
            pieces = part_of_layer(block, parts * channels, here)
            owner = self._add(kind, pieces, states, sources, row | {"part": part}, parts, lows)
            said_by.append(Source(out.at + part * D16, out.slot, owner, D16))
        held = D16 <= 128
        self._needs(
            2 * D16 + (0 if held else channels * D16) + D16 + 2 * lows * self._warps + D16 + channels + pool * D
        )
        return said_by

    def _columns(self, weight: Tensor, bias: Tensor) -> list[tuple[int, int, list[Tensor]]]:
        """A pooling's weights, cut into columns that the warps of a block can hold: first, tiles, pieces."""
        rows = up_to(weight.shape[1], TILE) // TILE
        if rows > MOST_TILES:
            raise ValueError(f"net: a pooling has {weight.shape[1]} inputs, wanted <= {MOST_TILES * TILE}")
        columns = up_to(len(weight), TILE)
        weight, bias = (
            padded(weight.detach().float().cpu(), columns, rows * TILE),
            padded(bias.detach().float().cpu(), columns),
        )
        most = self._channels * (MOST_TILES // rows)
        return [
            (first, len(weight[first : first + most]) // TILE,
             [half_tiles(weight[first : first + most]), bias[first : first + most]])
            for first in range(0, columns, most)
        ]  # fmt: skip

    def _add_pool_down(self, linear: Any, waiting: Tensor, pool: int, sources: list[Source], period: int) -> Source:
        D = linear.in_features // pool
        weight = linear.weight.unflatten(1, (-1, pool)).transpose(1, 2).flatten(1)  # inputs sample by sample
        rows = up_to(pool * D, TILE)
        frame = padded(padded(waiting[0].detach().float().cpu(), pool, D).flatten(), rows)
        out = self._mail(up_to(linear.out_features, TILE))
        for first, tiles, pieces in self._columns(weight, linear.bias):
            row = {"period": period, "out": out.at + first, "out_slot": out.slot}
            self._add(f"pool_down<{D}, {pool}, {tiles}", pieces, [operand(frame, True)], sources, row)
        self._needs(rows)
        return out

    def _add_pool_up(self, linear: Any, pool: int, sources: list[Source], period: int) -> Source:
        weight = linear.weight.unflatten(0, (-1, pool)).transpose(0, 1).flatten(0, 1)  # outputs sample by sample
        bias = linear.bias.unflatten(0, (-1, pool)).t().flatten()
        out = self._mail(up_to(linear.out_features, TILE))
        for first, tiles, pieces in self._columns(weight, bias):
            row = {"period": period, "out": out.at + first, "out_slot": out.slot}
            self._add(f"pool_up<{linear.in_features}, {tiles}", pieces, [], sources, row)
        self._needs(up_to(linear.in_features, TILE))
        return out

    def _add_mouth(self, net: SoundNet, sources: list[Source], embedding: Source) -> None:
        D, rows = net.config.d_model, up_to(net.levels, TILE)
        D16 = up_to(D, TILE)
        weight = padded(net.head.weight.detach().float().cpu(), rows, D16)
        pieces = [*norm_vectors(net.model.norm), half_tiles(weight), padded(net.head.bias.detach().float().cpu(), rows)]
        row = {"period": 1, "out": embedding.at, "out_slot": embedding.slot}
        self._add(f"mouth<{D}", pieces, [], sources, row)
        held = D16 // TILE * rows // TILE <= 32 * self._warps
        self._needs(
            4 * D16 + (0 if held else D16 * rows // 2) + 2 * rows + up_to(net.levels, 4) + up_to(net.levels * D, 4)
        )


def _power_of_two_above(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
