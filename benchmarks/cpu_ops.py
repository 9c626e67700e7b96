"""Times the convolution and the norms on the CPU beside PyTorch's operators in eager mode, in float32.

    python -m benchmarks.cpu_ops [--write] [--threads N]

Floors and checks are those of ``benchmarks.causal_conv1d`` and ``benchmarks.norm``; ``forward_backward``, a training
step's part, takes the place of the backward alone.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from benchmarks import causal_conv1d, norm
from benchmarks.common import write

MODES = ("forward", "forward_backward")
SIZES = {"B8_L197_D384": (8, 197, 384), "B2_L1024_D384": (2, 1024, 384), "B1_L131072_D64": (1, 131072, 64)}  # B, L, D
NORMS = ("rms", "layer", "rms_gate", "rms_add")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/cpu_ops.csv")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch and of the kernels (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for size, (B, L, D) in SIZES.items():
        found += causal_conv1d.measurements(size, (B, L, D, 4), torch.float32, device="cpu", modes=MODES)
        for kind in NORMS:
            case = dataclasses.replace(norm.CASES[kind], B=B, L=L, D=D)
            found += norm.measurements(f"{kind}/{size}", case, torch.float32, "cpu", MODES)
    if options.write:
        print(write("cpu_ops", found))


if __name__ == "__main__":
    main()
