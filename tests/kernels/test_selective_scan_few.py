"""The CUDA scan over one state: its rule, and its kernels against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scan_options import CASES, FULL, check, inputs, run

from kernels import nvrtc
from kernels.selective_scan import cuda_few
from kernels.selective_scan.problem import CHUNK

MACROS = {
    "V": 4, "R": 4, "NW": 4, "BLOCKS": 4, "TX": "bf16", "TDT": "f16", "TB": "bf16", "TZ": "float", "TY": "bf16",
    "TDY": "bf16", "TDX": "bf16", "TDZ": "float", "HAS_D": 1, "HAS_Z": 1, "HAS_BIAS": 1, "CONST_B": 0, "CONST_C": 1,
    "SOFTPLUS": 1, "TABLE": 1, "RESTARTS": 1, "PACKED": 1, "AT_TOKEN": 0, "PRECISE": 0, "EXACT": 0,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", ["forward", "backward", "merge"])
def test_compiles_without_a_gpu(name: str, architecture: str) -> None:
    try:
        nvrtc.version()
    except OSError:
        pytest.skip("this PyTorch came without NVRTC: it is not a CUDA build")
    macros = tuple(f"{n} {v}" for n, v in MACROS.items())
    assert len(nvrtc.compile_cubin(cuda_few.source(name), macros, architecture)) > 1000


def test_only_one_state_in_enough_blocks() -> None:
    assert cuda_few.enough(state=1, width=96, scans=256, cores=132)
    assert cuda_few.enough(state=1, width=96, scans=22, cores=132)  # three blocks each
    assert not cuda_few.enough(state=1, width=96, scans=21, cores=132)
    assert not cuda_few.enough(state=2, width=96, scans=256, cores=132)


@pytest.mark.parametrize(("kernel", "little"), cuda_few.SHAPES)
def test_runs_fit_chunks_and_tiles_start_from_saved_states(kernel: str, little: bool) -> None:
    shape = cuda_few.SHAPES[kernel, little]
    assert shape.run % 4 == 0  # entries are read by fours
    assert CHUNK % shape.run == 0
    tile = shape.run * shape.warps * 32 // cuda_few.LANES
    assert kernel == "forward" or tile % CHUNK == 0
    assert 32 * shape.warps * shape.resident <= 65536 // 128  # 128 registers a thread: fewer spill


gpu = pytest.mark.gpu
REAL = {name: case for name, case in CASES.items() if not case[0].get("complex_")}
Check = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture
def check_few(monkeypatch: pytest.MonkeyPatch) -> Check:
    """``check`` of problems of any size; fresh memory is NaN, so that an element that no kernel wrote shows."""
    calls: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(cuda_few, name)
        monkeypatch.setattr(cuda_few, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args))
    monkeypatch.setattr(cuda_few, "enough", lambda state, width, scans, cores: state == 1)
    empty = torch.empty

    def poison(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", poison)

    def checked(tensors: dict[str, torch.Tensor], dtype: torch.dtype, **flags: object) -> dict[str, torch.Tensor]:
        found = check(tensors, "cuda", "cuda", dtype, **flags)
        assert calls == ["forward", "backward"]
        return found

    return checked


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", REAL)
def test_option_is_as_accurate_as_the_reference(case: str, dtype: torch.dtype, check_few: Check) -> None:
    sizes, flags = REAL[case]
    wide = {"D": 16 * sizes["D"]} if "D" in sizes and sizes["D"] < 16 else {}  # enough numbers for an rms
    check_few(inputs(**sizes | wide | {"N": 1}), dtype, **flags)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 6, 36, 96])
@pytest.mark.parametrize("length", [CHUNK, 5 * CHUNK + 9])
def test_any_size(length: int, channels: int, dtype: torch.dtype, check_few: Check) -> None:
    check_few(inputs(B=2, L=length, D=channels, options=FULL), dtype, reverse=channels == 36)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["D bias", FULL])
def test_many_chunks_along_routes(options: str, dtype: torch.dtype, check_few: Check) -> None:
    check_few(inputs(B=2, L=400, P=450, D=32, K=4, options=options), dtype)


@gpu
def test_routes_that_leave_out_tokens(check_few: Check) -> None:
    found = check_few(inputs(B=2, L=400, P=150, D=32, K=4, options=FULL), torch.bfloat16)
    assert (found["dt"] == 0).all(-1).float().mean() > 0.6


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [[0, 5, 5, 20], [0, 0, CHUNK + 6, CHUNK + 9, 5 * CHUNK]])
def test_packed_sequences(bounds: list[int], reverse: bool, dtype: torch.dtype, check_few: Check) -> None:
    tensors = inputs(B=1, L=bounds[-1], D=36, options=FULL, S=len(bounds) - 1)
    tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    check_few(tensors, dtype, reverse=reverse)


@gpu
@pytest.mark.parametrize("routes", [0, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_restarts_and_skipped_tokens(reverse: bool, routes: int, check_few: Check) -> None:
    length = 3 * CHUNK + 3
    tensors = inputs(B=2, L=length, D=36, K=routes, P=length + 30 if routes else 0, options=FULL)
    tensors["seq_idx"] = (torch.arange(length) // 33)[None].repeat(2, 1)
    tensors["seq_idx"][1, 20:50] = -1
    check_few(tensors, torch.bfloat16, reverse=reverse)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_memory(dtype: torch.dtype, check_few: Check) -> None:
    tensors = inputs(B=1, L=3000, D=36, options=FULL)
    tensors["A"] = tensors["A"] * 1e-3
    check_few(tensors, dtype)


@gpu
def test_bits_repeat(check_few: Check) -> None:
    tensors = inputs(B=2, L=CHUNK + 3, D=36, K=2, options=FULL)
    first = check_few(tensors, torch.bfloat16)
    second = run(tensors, "cuda", torch.bfloat16, "cuda")
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@gpu
def test_nan_goes_on(check_few: Check) -> None:
    tensors = inputs(B=1, L=100, D=32)
    check_few(tensors, torch.float32)
    tensors["x"][0, 40, 3] = float("nan")
    y = run(tensors, "cuda", torch.float32, "cuda")["y"]
    assert y[0, 40:, 3].isnan().all()
    assert y[0, :40].isfinite().all()
    assert y[..., :3].isfinite().all()
