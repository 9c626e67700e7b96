"""Generation of raw sound, samples a second: ``python -m benchmarks.audio_generation --clips 1 256``.

The net is the 6.1 million parameter Mamba U-Net of SC09 with random weights: speed does not depend on them. A call
draws ``--samples`` samples of each clip, levels chosen on the GPU from all 256; prefill and copies are left out.
``--profile`` prints the cycles of a block's phases instead, a sample and a layer of each width.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable

import torch

from audio.net import SoundNet
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
    parser.add_argument("--profile", action="store_true", help="for nets whose widths are 64, 128 and 256")
    arguments = parser.parse_args()
    writer = csv.writer(sys.stdout)
    writer.writerow(FIELDS)
    for name in arguments.nets:
        for weights in arguments.weights:
            torch.manual_seed(0)
            net = SoundNet(CONFIGS[name]).eval().cuda().to(getattr(torch, weights))
            start = net.forward_state(torch.full((1, 1), 128).cuda(), net.init_state(1))
            for clips in arguments.clips:
                logits, state = start[0][:, -1].repeat(clips, 1), repeat_state(start[1], clips)
                uniform = torch.rand(clips, arguments.samples, dtype=torch.float64, device="cuda")
                for block in arguments.clips_a_block:
                    try:
                        stepper = CudaStepper(net, state, logits, clips=block or None, profile=arguments.profile)
                        if arguments.profile:
                            print(f"{name} {weights}, {clips} clips, {stepper._clips} a block", flush=True)
                            print_profile(stepper, uniform, CONFIGS[name])
                            continue
                        seconds = measure(
                            lambda n, s=stepper, u=uniform: s.draw(u[:, :n], Sampling()),
                            arguments.samples,
                            arguments.repeats,
                        )
                    except (ValueError, RuntimeError) as error:
                        print(f"# {name} {weights} {clips} {block}: {error}", flush=True)
                        continue
                    row = [name, weights, clips, stepper._clips, f"{clips / seconds:.0f}", f"{seconds * 16000:.3f}"]
                    row += [torch.cuda.get_device_name(), torch.__version__, time.strftime("%Y-%m-%d")]
                    writer.writerow(row)
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
