"""The relay's source, run on a CPU with all of its blocks at once: its steps equal the parallel pass."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from array import array
from pathlib import Path

import pytest
import torch
from torch import Tensor

from audio import relay_cuda
from audio.net import SoundNet
from audio.relay_cuda import INTEGERS, PARTS, POINTERS, source
from audio.relay_layout import Relay
from audio.sashimi import SashimiConfig
from audio.steppers import PlainStepper
from core.sampling import Sampling

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
WARPS = 4
# Widths of 16, 48 and 144, layers of 1, 2 and 5 parts.
NET = SashimiConfig(16, 2, (2, 3), expand=3, mixer_cfg={"d_state": 5, "d_conv": 3, "bias": True})
START = """
static Args* given;
static void start() { relay(*given); fibers[current].done = true; others(); }
extern "C" void run(long long blocks, int threads, int bytes, Args* arguments) {
    given = arguments;
    run_blocks<Args>(start, blocks, threads, bytes, blocks);
}
"""


@pytest.fixture(scope="module")
def nets() -> tuple[SoundNet, SoundNet]:
    """A net in bfloat16, and the same in float64."""
    torch.manual_seed(0)
    net, exact = SoundNet(NET, 32).eval().bfloat16(), SoundNet(NET, 32).eval().double()
    exact.load_state_dict(net.state_dict())
    return net, exact


@pytest.fixture(scope="module")
def library(nets: tuple[SoundNet, SoundNet], tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernel compiled for the net."""
    folder, here, kernels = (
        tmp_path_factory.mktemp("relay"),
        Path(__file__).parent,
        Path(__file__).parents[1] / "kernels",
    )
    text = "".join(f"#define {macro}\n" for macro in Relay(nets[0], nets[0].init_state(1), WARPS).macros)
    text = f'#include "{kernels / "emulated.h"}"\n{text}#include "{here / "stepping_emulated.h"}"\n'
    machine = (Path(relay_cuda.__file__).parent / PARTS[0]).read_text()
    (folder / "kernel.cpp").write_text(text + source().replace(machine, "") + START)
    flags = ("-O1", "-std=c++17", "-fno-strict-aliasing", "-w", "-shared", "-fPIC")
    subprocess.run(["g++", *flags, "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")], check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


class EmulatedStepper:
    """What ``RelayStepper`` does, with the emulation behind it."""

    def __init__(self, library: ctypes.CDLL, net: SoundNet, logits: Tensor) -> None:
        self._library, self._relay = library, Relay(net, net.init_state(1), WARPS)
        self._tensors: dict[str, Tensor] = {
            "weights": torch.from_numpy(self._relay.weights), "table": torch.from_numpy(self._relay.table),
            "state": self._relay.state, "mail": torch.zeros(self._relay.letters, dtype=torch.int64),
            "embedding": net.table().detach().float().contiguous(), "offset": torch.zeros(1, dtype=torch.int64),
            "likelihood": torch.zeros(1, dtype=torch.float64), "logits": logits.float().clone(),
        }  # fmt: skip
        self._seen = 0

    def run(self, levels: Tensor, uniform: Tensor | None, sampling: Sampling) -> Tensor:
        """Draws levels (1, T), or reads them; returns the last logits."""
        self._tensors["mail"].zero_()
        how = torch.tensor([sampling.temperature, sampling.top_p, sampling.min_p], dtype=torch.float64)
        tensors = {**self._tensors, "levels": levels, "uniform": uniform, "how": how}
        pointers = [0 if (t := tensors.get(n)) is None else t.data_ptr() for n in POINTERS]
        length = levels.shape[1]
        given = {"length": length, "seen": self._seen, "draw": int(uniform is not None), "top_k": sampling.top_k}
        fields = array("q", [*pointers, *(given[n] for n in INTEGERS)])
        self._library.run(
            ctypes.c_longlong(len(self._relay.table)), 32 * WARPS, self._relay.shared,
            ctypes.c_void_p(fields.buffer_info()[0]),
        )  # fmt: skip
        self._seen = (self._seen + length) % self._relay.period
        return self._tensors["logits"].clone()


@torch.no_grad()
def test_steps_equal_the_parallel_pass(library: ctypes.CDLL, nets: tuple[SoundNet, SoundNet]) -> None:
    net, exact = nets
    x = torch.randint(0, 32, (1, 18), generator=torch.Generator().manual_seed(1))
    stepper, want, end = EmulatedStepper(library, net, torch.zeros(1, 32)), exact(x), 0
    for length in (1, 2, 5, 1, 9):  # launches begin and end anywhere in a frame
        got = stepper.run(x[:, end : end + length].clone(), None, Sampling())
        end += length
        torch.testing.assert_close(got.double(), want[:, end - 1], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_draws_are_those_of_the_plain_loop(library: ctypes.CDLL, nets: tuple[SoundNet, SoundNet]) -> None:
    net, exact = nets
    uniform = torch.rand(1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    logits = torch.zeros(1, 32)
    stepper = EmulatedStepper(library, net, logits)
    plain = PlainStepper(exact, exact.init_state(1), logits.double(), torch.zeros(1).long())
    for sampling in (Sampling(), Sampling(1.2, 9, 0.8, 0.1)):
        levels = torch.empty(1, 7, dtype=torch.int64)
        stepper.run(levels, uniform, sampling)
        assert torch.equal(levels, plain.draw(uniform, sampling))
    torch.testing.assert_close(stepper._tensors["likelihood"], plain.log_likelihood, atol=1e-4, rtol=1e-5)
