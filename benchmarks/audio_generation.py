"""Generation of raw sound, samples a second: ``python -m benchmarks.audio_generation --clips 1 256``.

The net is the 6.1 million parameter Mamba U-Net of SC09 with random weights: speed does not depend on them. A call
draws ``--samples`` samples of each clip, levels chosen on the GPU from all 256; prefill and copies are left out.
One clip goes by the relay of blocks where it can, else, and with ``--kernel blocks``, by the kernel that gives each
block of threads clips of its own. ``--profile`` prints the cycles of a block's phases instead.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from audio.net import SoundNet
from audio.relay_cuda import RelayStepper, relay_of
from audio.sampling import repeat_state
from audio.sashimi import SashimiConfig
from audio.stepping_cuda import CudaStepper
from core.generate import Sampling

CONFIGS = {
    "sc09": SashimiConfig(),
    "sc09_large": SashimiConfig(d_model=96, n_layers=15),
    "youtubemix": SashimiConfig(n_layers=3, pool=(16, 16)),
    "smoke": SashimiConfig(16, 1, (4,)),
}
FIELDS = ("net", "weights", "clips", "clips_a_block", "samples_per_second", "real_time_factor", "gpu", "torch", "date")


def measure(run: Callable[[int], object], samples: int, repeats: int) -> float:
    """Seconds a sample, the median of ``repeats`` calls after one for warming up."""
    run(samples // 4 or 1)
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(samples)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / samples)
    return sorted(times)[len(times) // 2]


PHASES = ("norm", "wait", "in", "wait", "low", "wait", "scan", "wait", "out", "wait", "between")


def print_profile(stepper: CudaStepper, uniform: torch.Tensor, config: SashimiConfig) -> None:
    """Prints the cycles of one launch, in all and by phase of a Mamba layer, for widths of 64, 128 and 256."""
    stepper.draw(uniform, Sampling())
    cycles = (stepper.cycles[:63] / uniform.shape[1]).tolist()
    print(f"{sum(cycles):.0f} cycles a sample; head {cycles[12]:.0f}, draw {cycles[13]:.0f}, around {cycles[14]:.0f}")
    layers = [2.0 * config.n_layers] * len(config.pool) + [float(config.n_layers)]
    for depth, number in enumerate(layers):
        number /= math.prod(config.pool[:depth])
        phases = [f"{name} {c / number:.0f}" for name, c in zip(PHASES, cycles[16 * depth :], strict=False)]
        print(f"  stage {depth}, a layer: {sum(cycles[16 * depth :][: len(PHASES)]) / number:.0f}: {', '.join(phases)}")


RELAY_PHASES = ("turn", "input", "norm", "meet", "in", "low", "meet", "share", "scan", "meet", "out")


def print_relay_profile(stepper: RelayStepper, uniform: torch.Tensor) -> None:
    """Prints the cycles of one launch for each block of threads, a turn of its stage, by phase."""
    stepper.draw(uniform, Sampling())
    for number, (row, cycles) in enumerate(zip(stepper.relay.table.tolist(), stepper.cycles.tolist(), strict=True)):
        if row[0] < 0 or not sum(cycles):
            continue
        turns = uniform.shape[1] / row[1]
        phases = [f"{name} {c / turns:.0f}" for name, c in zip(RELAY_PHASES, cycles, strict=False) if c]
        print(f"  block {number}, kind {row[0]}, every {row[1]}: {sum(cycles) / turns:.0f}: {', '.join(phases)}")


def make(
    net: SoundNet, logits: torch.Tensor, state: Any, block: int, options: argparse.Namespace
) -> tuple[CudaStepper | RelayStepper, str]:
    """What draws the clips of a state, and how many of them a block of threads has."""
    relay = relay_of(net, state) if options.kernel == "auto" else None
    if relay is not None:
        return RelayStepper(net, relay, logits, profile=options.profile), "relay"
    stepper = CudaStepper(net, state, logits, clips=block or None, profile=options.profile)
    return stepper, str(stepper._clips)


def case(
    net: SoundNet, start: Any, name: str, weights: str, clips: int, block: int, options: argparse.Namespace
) -> None:
    """Measures and prints one case."""
    logits, state = start[0][:, -1].repeat(clips, 1), repeat_state(start[1], clips)
    uniform = torch.rand(clips, options.samples, dtype=torch.float64, device="cuda")
    try:
        stepper, kind = make(net, logits, state, block, options)
        if options.profile:
            print(f"{name} {weights}, {clips} clips, {kind} a block", flush=True)
            if isinstance(stepper, RelayStepper):
                print_relay_profile(stepper, uniform)
            else:
                print_profile(stepper, uniform, CONFIGS[name])
            return
        seconds = measure(lambda n: stepper.draw(uniform[:, :n], Sampling()), options.samples, options.repeats)
    except (ValueError, RuntimeError) as error:
        print(f"# {name} {weights} {clips} {block}: {error}", flush=True)
        return
    row = [name, weights, clips, kind, f"{clips / seconds:.0f}", f"{seconds * 16000:.3f}"]
    csv.writer(sys.stdout).writerow([*row, torch.cuda.get_device_name(), torch.__version__, time.strftime("%Y-%m-%d")])
    sys.stdout.flush()


@torch.inference_mode()
def main() -> None:
    """Measures and prints one row of CSV for each case, as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["sc09"], choices=list(CONFIGS))
    parser.add_argument("--clips", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--clips-a-block", nargs="+", type=int, default=[0], help="0: as the stepper chooses")
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="by blocks: for nets whose widths are 64, 128 and 256")
    parser.add_argument("--kernel", default="auto", choices=["auto", "blocks"])
    options = parser.parse_args()
    csv.writer(sys.stdout).writerow(FIELDS)
    for name in options.nets:
        for weights in options.weights:
            torch.manual_seed(0)
            net = SoundNet(CONFIGS[name]).eval().cuda().to(getattr(torch, weights))
            start = net.forward_state(torch.full((1, 1), 128).cuda(), net.init_state(1))
            for clips in options.clips:
                for block in options.clips_a_block:
                    case(net, start, name, weights, clips, block, options)


if __name__ == "__main__":
    main()
