"""The generating kernel's source, run on a CPU (``tests/kernels/emulated.py``): its steps equal the parallel pass."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from array import array
from pathlib import Path

import pytest
import torch
from torch import Tensor

from audio import stepping_cuda
from audio.net import SoundNet
from audio.sashimi import SashimiConfig, StageState
from audio.steppers import PlainStepper
from audio.stepping_cuda import INTEGERS, PARTS, POINTERS, fit, macros, source
from audio.stepping_layout import Layout
from core.sampling import Sampling

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
WARPS, CLIPS = 2, 2
NETS = {
    "mamba": SashimiConfig(20, 2, (2, 3), mixer_cfg={"d_state": 5, "d_conv": 3, "bias": True}, mlp=2),
    "s4d": SashimiConfig(8, 1, (2, 2), mixer="s4d", mixer_cfg={"d_state": 8}, unet=False),
}
START = """
static Args* given;
static void start() { advance_(*given); fibers[current].done = true; others(); }
extern "C" void run(long long blocks, int threads, int bytes, Args* arguments) {
    given = arguments;
    run_blocks<Args>(start, blocks, threads, bytes);
}
"""


class EmulatedStepper:
    """What ``CudaStepper`` does, with the emulation behind it."""

    def __init__(self, net: SoundNet, state: StageState, logits: Tensor, folder: Path) -> None:
        half = net.embedding.weight.dtype == torch.bfloat16
        layout = Layout(net, state, CLIPS, half, WARPS)
        ring, self._shared = fit(layout, CLIPS)
        count = len(layout.state)
        self._tensors: dict[str, Tensor] = {
            "stream": torch.from_numpy(layout.stream), "embedding": net.table().detach().float().contiguous(),
            "state": torch.cat([layout.state, layout.state[: -count % CLIPS]]), "logits": logits.float().clone(),
            "offset": torch.zeros(count, dtype=torch.int64), "likelihood": torch.zeros(count, dtype=torch.float64),
        }  # fmt: skip
        self._seen = layout.seen
        here, kernels = Path(__file__).parent, Path(__file__).parents[1] / "kernels"
        text = f'#include "{kernels / "emulated.h"}"\n#define advance advance_\n'  # libc has another
        text += "".join(f"#define {macro}\n" for macro in macros(layout, CLIPS, ring))
        text += f'#include "{here / "stepping_emulated.h"}"\n'
        machine = (Path(stepping_cuda.__file__).parent / PARTS[0]).read_text()
        (folder / "kernel.cpp").write_text(text + source().replace(machine, "") + START)
        flags = ("-O1", "-std=c++17", "-fno-strict-aliasing", "-w", "-shared", "-fPIC")
        subprocess.run(["g++", *flags, "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")], check=True)
        self._library = ctypes.CDLL(str(folder / "kernel.so"))

    def run(self, levels: Tensor, uniform: Tensor | None, sampling: Sampling) -> Tensor:
        """Draws levels (B, T), or reads them; returns the last logits."""
        how = torch.tensor([sampling.temperature, sampling.top_p, sampling.min_p], dtype=torch.float64)
        tensors = {**self._tensors, "levels": levels, "uniform": uniform, "how": how}
        pointers = [0 if (t := tensors.get(n)) is None else t.data_ptr() for n in POINTERS]
        count, length = levels.shape
        given = {"count": count, "length": length, "seen": self._seen, "draw": int(uniform is not None)}
        fields = array("q", [*pointers, *({**given, "top_k": sampling.top_k}[n] for n in INTEGERS)])
        self._library.run(
            ctypes.c_longlong(-(-count // CLIPS)), 32 * (WARPS + 2), self._shared,
            ctypes.c_void_p(fields.buffer_info()[0]),
        )  # fmt: skip
        self._seen += length
        return self._tensors["logits"].clone()


def build(name: str, seen: int, half: bool) -> tuple[SoundNet, Tensor, StageState, Tensor]:
    """A net, levels of three clips, the state after some of them, and what it says then."""
    torch.manual_seed(0)
    net = SoundNet(NETS[name], 32).eval()
    if half:
        net.bfloat16()
    x = torch.randint(0, 32, (3, 16), generator=torch.Generator().manual_seed(1))
    logits, state = net.forward_state(x[:, :seen], net.init_state(3))
    return net, x, state, logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize(("name", "half"), [("mamba", False), ("s4d", True)])
def test_steps_equal_the_parallel_pass(name: str, half: bool, tmp_path: Path) -> None:
    seen = 0 if half else 5  # a state in bfloat16 would differ from the exact one
    net, x, state, logits = build(name, seen or 1, half)
    stepper = EmulatedStepper(net, state if seen else net.init_state(3), logits, tmp_path)
    got = [stepper.run(x[:, t : t + 1].clone(), None, Sampling()) for t in range(seen, 16)]
    exact = SoundNet(NETS[name], 32).eval().double()
    exact.load_state_dict(net.state_dict())
    torch.testing.assert_close(torch.stack(got, 1).double(), exact(x)[:, seen:], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_draws_are_those_of_the_plain_loop(tmp_path: Path) -> None:
    net, _, state, logits = build("mamba", 3, False)
    uniform = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    stepper, plain = (
        EmulatedStepper(net, state, logits, tmp_path),
        PlainStepper(net, state, logits, torch.zeros(3).long()),
    )
    for sampling in (Sampling(), Sampling(1.2, 9, 0.8, 0.1)):
        levels = torch.empty(3, 7, dtype=torch.int64)
        stepper.run(levels, uniform, sampling)
        assert torch.equal(levels, plain.draw(uniform, sampling))
    torch.testing.assert_close(stepper._tensors["likelihood"], plain.log_likelihood, atol=1e-4, rtol=1e-5)
