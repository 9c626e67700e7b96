"""Markov models over levels: what a neural model of sound has to beat.

Dimension letters: L samples of a window, Q levels, K order.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TABLE = 2**25  # entries of the largest table of counts
FITTED_SAMPLES = 20_000_000  # of the training part; a table of three levels is well filled by then
WEIGHTS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
CHUNK = 2_000_000  # samples looked at together


class MarkovModel:
    """A level given the K levels before it, smoothed by the model of the next lower order.

    p_K(x | c) = (count(c, x) + a_K p_{K-1}(x | c')) / (count(c) + a_K), where c' is c without its oldest level and
    p_{-1} is uniform (Dirichlet prior; MacKay & Peto 1995). Order 0 is the histogram of levels.

    Args:
        order: K.
        levels: Q.
        start: Level that stands before the first of each window.
    """

    def __init__(self, order: int, levels: int, start: int) -> None:
        self.order, self.levels, self.start = order, levels, start
        self.counts: list[Tensor] = []  # of order 0 ... K: (Q^k, Q)
        self.totals: list[Tensor] = []  # their sums, of each context: (Q^k,) float64
        self.weights: list[float] = []  # a_0 ... a_K

    @staticmethod
    def fits(order: int, levels: int) -> bool:
        """Tells whether the tables of an order are small enough."""
        return levels ** (order + 1) <= LARGEST_TABLE

    def fit(self, train: Sequence[Tensor], val: Sequence[Tensor]) -> None:
        """Counts on the training windows, and chooses the weights a_k one after the other on the validation windows.

        Args:
            train: Windows (L,) of levels; beyond 20 million samples they are left out.
            val: Windows (L,) of levels.
        """
        self.counts, self.totals, self.weights = [], [], []
        for order in range(self.order + 1):
            size = self.levels ** (order + 1)
            table = torch.zeros(size, dtype=torch.float32)
            seen = 0
            for codes in self._codes(train, order):
                table.index_add_(0, codes, torch.ones(len(codes)))
                seen += len(codes)
                if seen >= FITTED_SAMPLES:
                    break
            self.counts.append(table.view(-1, self.levels))
            self.totals.append(self.counts[-1].sum(dim=1).double())
            bits = {}
            for weight in WEIGHTS:
                self.weights = [*self.weights[:order], weight]
                bits[weight] = self.bits_per_sample(val)
            self.weights[order] = min(bits, key=lambda weight: bits[weight])

    def bits_per_sample(self, windows: Sequence[Tensor]) -> float:
        """Mean of -log2 p over all samples of the windows."""
        bits, count = 0.0, 0
        order = len(self.weights) - 1
        for codes in self._codes(windows, order):
            p = torch.full((len(codes),), 1 / self.levels, dtype=torch.float64)
            for k, (table, sums, weight) in enumerate(zip(self.counts, self.totals, self.weights, strict=False)):
                code = codes % self.levels ** (k + 1)
                total = sums[code // self.levels]
                p = (table.view(-1)[code].double() + weight * p) / (total + weight)
            bits -= float(torch.log2(p).sum())
            count += len(codes)
        return bits / count if count else math.nan

    def _codes(self, windows: Sequence[Tensor], order: int) -> Iterator[Tensor]:
        """Yields, in chunks, the number whose digits in base Q are a sample's context, oldest first, and the sample."""
        chunk, size = [], 0
        for i in range(len(windows)):
            window = windows[i].long()
            padded = F.pad(window, (order, 0), value=self.start)
            code = torch.zeros_like(window)
            for k in range(order + 1):
                code = code * self.levels + padded[k : k + len(window)]
            chunk.append(code)
            size += len(window)
            if size >= CHUNK or i + 1 == len(windows):
                yield torch.cat(chunk)
                chunk, size = [], 0
