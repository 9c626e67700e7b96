"""How a level is drawn from a net's logits on a CPU, compiled by numba. Legend: Q levels."""

import math

import numpy as np
from numba import njit

from audio.stepping_layers import OPTIONS


@njit(**OPTIONS)
def choose(logits, uniform, temperature, top_k, top_p, min_p):
    """The level at which the distribution function passes ``uniform``, filtered as ``core.generate.filter_logits``."""
    best = 0
    for q in range(len(logits)):
        if logits[q] > logits[best]:
            best = q
    if temperature == 0:
        return best
    weights = np.empty(len(logits))  # relative to the most likely level
    for q in range(len(logits)):
        weights[q] = math.exp((np.float64(logits[q]) - logits[best]) / temperature)
    if top_k > 0 or top_p < 1:
        order = np.argsort(-logits, kind="mergesort")  # stable: equal levels by number
        kept = min(top_k, len(logits)) if top_k > 0 else len(logits)
        total, before = weights[order[:kept]].sum(), 0.0
        for i in range(len(logits)):
            weight = weights[order[i]]
            if i > 0 and (i >= kept or (before >= (top_p - 1e-7) * total and top_p < 1)):
                weights[order[i]] = 0.0
            before += weight
    for q in range(len(logits)):
        if weights[q] < min_p:
            weights[q] = 0.0
    total, reached = weights.sum(), 0.0
    for q in range(len(logits)):
        reached += weights[q]
        if reached > uniform * total:
            return q
    return best  # rounding left the sum short of the total


@njit(**OPTIONS)
def log_probability(logits, level):
    """The log of a level's probability under the net, in nats."""
    best = logits.max()
    total = 0.0
    for q in range(len(logits)):
        total += math.exp(np.float64(logits[q] - best))
    return np.float64(logits[level] - best) - math.log(total)
