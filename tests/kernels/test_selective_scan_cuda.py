"""The CUDA kernels of the selective scan: against the reference in float64, and against their Triton twin.

They have no interpreter: without a GPU only their compilation is tested.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_as_accurate, relative_rms
from memory import poison
from scan_options import CASES, FULL, check, inputs, run

from kernels import nvrtc, selective_scan
from kernels.selective_scan import cuda_launch
from kernels.selective_scan.problem import CHUNK

MACROS = {
    "S": 4, "CH": 2, "LN": 4, "NW": 4, "EXTRA": 4, "V": 4, "VS": 4, "VN": 4, "BLOCKS": 2, "TX": "bf16", "TDT": "f16",
    "TB": "bf16", "TC": "float", "TZ": "float", "TY": "bf16", "TDY": "bf16", "TDX": "bf16", "TDZ": "float", "HAS_D": 1,
    "HAS_Z": 1, "HAS_BIAS": 1, "HAS_INITIAL": 1, "CONST_B": 0, "CONST_C": 0, "SOFTPLUS": 1,
    "TABLE": 1, "PACKED": 1, "AT_TOKEN": 0, "PRECISE": 0, "ENDS": 0, "EXACT": 0, "T": 8, "CUT": 0, "WHOLE_N": 0,
    "TDDT": "f16", "RESTARTS": 1, "PAIRS": 0, "ADD": 1, "FORWARD": 1, "TOGETHER": 4, "ROUNDS": 2, "ADDERS": 4,
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("name", ["forward", "backward", "reduce"])
def test_compiles_without_a_gpu(name: str, pairs: int, architecture: str) -> None:
    try:
        nvrtc.version()
    except OSError:
        pytest.skip("this PyTorch came without NVRTC: it is not a CUDA build")
    wanted = MACROS | {"PAIRS": pairs, "FORWARD": int(name == "forward")}
    wanted |= {} if name == "forward" else {"EXTRA": 0, "CH": 1}
    macros = tuple(f"{n} {v}" for n, v in wanted.items())
    assert len(nvrtc.compile_cubin(cuda_launch.source(name), macros, architecture)) > 1000
    with pytest.raises(RuntimeError, match="NVRTC refused a kernel"):
        nvrtc.compile_cubin(cuda_launch.source(name) + "nonsense", macros, architecture)


gpu = pytest.mark.gpu


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN, so that an element that no kernel wrote shows."""
    poison(monkeypatch)


@gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_option_is_as_accurate_as_the_reference(case: str, dtype: torch.dtype) -> None:
    sizes, flags = CASES[case]
    wide = {"D": 16 * sizes["D"]} if "D" in sizes and sizes["D"] < 16 else {}  # enough numbers for an rms
    check(inputs(**sizes | wide), "cuda", "cuda", dtype, **flags)


@gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [1, 2, 3, 4, 5, 8, 11, 16, 20, 33, 48, 64])
def test_any_number_of_states(state: int, dtype: torch.dtype) -> None:
    check(inputs(B=2, L=CHUNK + 9, D=37, N=state, options=FULL), "cuda", "cuda", dtype, reverse=state % 2 == 0)


@gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [FULL, "constB constC"])
@pytest.mark.parametrize("state", [65, 128, 250, 256])
def test_many_states(state: int, options: str, dtype: torch.dtype) -> None:
    check(inputs(B=1, L=CHUNK + 9, D=9, N=state, options=options), "cuda", "cuda", dtype, reverse=state == 128)


@gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [1, 2, 3, 5, 8, 16, 32, 40])
def test_complex_states(state: int, dtype: torch.dtype) -> None:
    tensors = inputs(B=2, L=CHUNK + 9, D=37, N=state, options=FULL, complex_=True)
    check(tensors, "cuda", "cuda", dtype, reverse=state % 2 == 0)


@gpu
def test_one_complex_state_of_many_channels() -> None:
    check(inputs(B=8, L=20, D=600, N=1, options=FULL, complex_=True), "cuda", "cuda", torch.float32)


@gpu
def test_routes_of_many_complex_states() -> None:
    tensors = inputs(B=2, L=40, D=6, N=70, K=2, G=2, P=CHUNK + 2, options=FULL, complex_=True)
    check(tensors, "cuda", "cuda", torch.float32)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bounds", [[0, 5, 5, 20], [0, 0, CHUNK + 6, CHUNK + 9, 5 * CHUNK]])
def test_packed_sequences(bounds: list[int], reverse: bool, dtype: torch.dtype) -> None:
    tensors = inputs(B=1, L=bounds[-1], D=33, N=16, options=FULL, S=len(bounds) - 1)
    tensors["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    check(tensors, "cuda", "cuda", dtype, reverse=reverse)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "channels"), [(2, 1500, 96), (1, 5000, 34)])
def test_realistic_sizes(batch: int, length: int, channels: int, dtype: torch.dtype) -> None:
    check(inputs(B=batch, L=length, D=channels, N=16, options=FULL), "cuda", "cuda", dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length"), [(2, 2048), (1, 8000)])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_final_state_of_a_long_memory(spread: float, batch: int, length: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = inputs(B=batch, L=length, D=96, N=16, options="D z bias")
    tensors["dt"] = torch.randn(batch, length, 96, generator=g).double() * spread
    tensors["dt_bias"] = torch.linspace(-6.9, -2.2, 96).double()  # steps of 0.001 to 0.1, with no spread all alike
    tensors["A"] = -torch.arange(1.0, 17).expand(96, 16).double() * (1 + 0.1 * torch.rand(96, 16, generator=g).double())
    low = {n: t.cuda().to(dtype if n in ("x", "dt", "B", "C", "z") else torch.float32) for n, t in tensors.items()}

    def final(backend: str, **given: torch.Tensor) -> torch.Tensor:
        return selective_scan(**given, return_final_state=True, backend=backend)[1]

    truth = final("reference", **{n: t.double() for n, t in low.items()})
    assert_as_accurate("state", final("cuda", **low), final("reference", **low), truth)


@gpu
def test_equals_the_triton_twin() -> None:
    tensors = inputs(B=2, L=3 * CHUNK + 5, D=48, N=16, K=2, options=FULL)
    ours, twin = (run(tensors, backend, torch.float32, "cuda") for backend in ("cuda", "triton"))
    for name, t in ours.items():
        assert relative_rms(t, twin[name]) < 4e-6, name


@gpu
def test_strided_and_shifted_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 100, 97, generator=g).to("cuda", torch.bfloat16)
    x, z, dt = wide[..., 1:33], wide[..., 33:65], wide[..., 65:97]  # no start or row is a multiple of four
    A = -torch.rand(32, 16, generator=g).cuda()
    B, C = (torch.randn(2, 100, 1, 16, generator=g).to("cuda", torch.bfloat16) for _ in range(2))
    arguments = dict(x=x, dt=dt, A=A, B=B, C=C, z=z)
    y = selective_scan(**arguments, backend="cuda")
    assert torch.equal(y, selective_scan(**{n: t.contiguous() for n, t in arguments.items()}, backend="cuda"))
    transposed = arguments | {"x": x.mT.contiguous().mT}
    assert torch.equal(y, selective_scan(**transposed, backend="cuda"))
    truth = selective_scan(**{n: t.double() for n, t in arguments.items()}, backend="reference")
    assert_as_accurate("y", y, selective_scan(**arguments, backend="reference"), truth)


@gpu
def test_bits_repeat() -> None:
    tensors = inputs(B=1, L=CHUNK + 3, D=33, N=16, K=2, options=FULL)
    first, second = (run(tensors, "cuda", torch.bfloat16, "cuda") for _ in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@gpu
def test_nan_goes_on() -> None:
    tensors = inputs(B=1, L=100, D=32, N=16)
    tensors["x"][0, 40, 3] = float("nan")
    y = run(tensors, "cuda", torch.float32, "cuda")["y"]
    assert y[0, 40:, 3].isnan().all()
    assert y[0, :40].isfinite().all()
    assert y[..., :3].isfinite().all()


@gpu
def test_offsets_beyond_int32() -> None:
    length, wide = 70_000, 40_000  # 2.8e9 elements, 5.6 GB
    x = torch.zeros(1, length, wide, device="cuda", dtype=torch.bfloat16)
    x[..., -8:] = torch.randn(length, 8, device="cuda")
    narrow = x[..., -8:]
    dt = torch.randn(1, length, 8, device="cuda", dtype=torch.bfloat16) - 3
    A = -torch.rand(8, 2, device="cuda")
    B, C = (torch.randn(1, length, 1, 2, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(selective_scan(narrow, dt, A, B, C), selective_scan(narrow.clone(), dt, A, B, C))


@gpu
def test_other_problems_go_to_triton() -> None:
    tensors = {n: t.cuda() for n, t in inputs(B=1, L=9, D=3, N=2).items()}
    with pytest.raises(ValueError, match="no CUDA kernel"):
        selective_scan(**tensors, backend="cuda")  # float64
    assert selective_scan(**tensors).dtype == torch.float64
