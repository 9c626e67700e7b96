"""The mixers on a GPU: in bfloat16 and float32 against float64 on the CPU, and decoding as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import relative_rms
from fill import fill_input
from mixer_contract import filled
from torch import nn

from core.mixers import (
    DSS,
    H3,
    S5,
    Attention,
    GatedBlock,
    LinearAttention,
    Mamba,
    Mamba2,
    Mamba3,
    Retention,
    UngatedBlock,
)

pytestmark = pytest.mark.gpu

D = 64
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: filled(Mamba(D, 16), **{"dt_proj.bias": 3.0}),
    "mamba2": lambda: filled(Mamba2(D, 32, headdim=16, ngroups=2), dt_bias=3.0),
    "mamba2_flags": lambda: filled(
        Mamba2(D, 16, headdim=16, d_ssm=96, D_has_hdim=True, rmsnorm=False, dt_limit=(0.0, 2.0), bias=True), dt_bias=3.0
    ),
    "mamba3": lambda: filled(Mamba3(D, 32, headdim=32, a_activation="heavy_tail"), dt_bias=2.0, B_bias=1.0, C_bias=1.0),
    "mamba3_mimo": lambda: filled(
        Mamba3(D, 16, headdim=16, is_mimo=True, is_outproj_norm=True, a_activation="softplus"),
        dt_bias=2.0, B_bias=1.0, C_bias=1.0, mimo_x=0.5, mimo_z=0.5, mimo_o=0.5,
    ),
    "attention": lambda: filled(
        Attention(D, 4, 2, causal=True, d_conv=4, rotary_emb_dim=8, mlp_dim=256)
    ),
    "retention": lambda: filled(Retention(D, 2)),
    "linear_attention": lambda: filled(LinearAttention(D, 2)),
    "dss": lambda: filled(DSS(D, 16), **{"layer.kernel.log_dt": -2.0}),
    "s5": lambda: filled(S5(D, 16), log_dt=-2.0),
    "h3_s6": lambda: filled(H3(D, inner="s6"), **{"inner.dt_bias": 2.0}),
    "gated_s4d": lambda: filled(GatedBlock(D, inner="s4d", inner_cfg={"d_state": 16}), **{"inner.kernel.inv_dt": -2.0}),
    "ungated_s6": lambda: filled(
        UngatedBlock(D, inner="s6", inner_cfg={"selective": ["dt"]}), **{"inner.dt_bias": 2.0}
    ),
}  # fmt: skip


def on_gpu(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The mixer on the GPU, and one of the same rounded weights in float64 on the CPU."""
    low, truth = MIXERS[name]().to("cuda", dtype), MIXERS[name]()
    truth.load_state_dict({n: t.cpu() for n, t in low.state_dict().items()})
    return low, truth


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", MIXERS)
def test_forward_and_gradients(name: str, dtype: torch.dtype, tolerance: float):
    low, truth = on_gpu(name, dtype)
    x = fill_input("x", (2, 150, D)).to(dtype)
    leaf, wide = x.cuda().requires_grad_(), x.double().requires_grad_()
    y, wanted = low(leaf), truth(wide)
    assert y.dtype == dtype
    assert relative_rms(y, wanted) < tolerance
    weight = fill_input("loss_weight", y.shape)
    (y * weight.cuda().to(dtype)).sum().backward()
    (wanted * weight.to(dtype).double()).sum().backward()
    assert relative_rms(leaf.grad, wide.grad) < 2 * tolerance
    for (key, p), q in zip(low.named_parameters(), truth.parameters(), strict=True):
        assert relative_rms(p.grad, q.grad) < 4 * tolerance, key  # sums over all tokens, whose terms cancel


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", MIXERS)
def test_prefill_and_decoding_in_a_graph(name: str, dtype: torch.dtype, tolerance: float):
    low, truth = on_gpu(name, dtype)
    x = fill_input("x", (3, 40, D)).to(dtype)
    wanted = truth(x.double())
    with torch.no_grad():
        y, state = low.forward_state(x[:, :20].cuda(), low.init_state(3, max_length=40))
        assert relative_rms(y, wanted[:, :20]) < tolerance
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        token = x[:, :1].cuda()
        with torch.cuda.stream(stream):
            low.decode(token, type(state)(*(t.clone() for t in state)))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = low.decode(token, state)
        outputs = []
        for t in range(20, 40):
            token.copy_(x[:, t : t + 1])
            graph.replay()
            outputs.append(out.clone())
    assert relative_rms(torch.cat(outputs, 1), wanted[:, 20:]) < tolerance


@pytest.mark.parametrize("name", MIXERS)
def test_packed_and_padded(name: str):
    low, _ = on_gpu(name, torch.float32)
    sizes = [50, 1, 70, 9]
    x = fill_input("x", (1, sum(sizes), D)).cuda()
    wanted = torch.cat([low(piece) for piece in x.split(sizes, dim=1)], dim=1)
    bounds = torch.tensor([0, *sizes], device="cuda").cumsum(0).int()
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None].int().cuda()
    assert relative_rms(low(x, cu_seqlens=bounds), wanted) < 1e-4
    assert relative_rms(low(x, seq_idx=index), wanted) < 1e-4
    rows = x[:, :64].expand(2, -1, -1)
    y, state = low.forward_state(rows, low.init_state(2, max_length=64), torch.tensor([64, 33], device="cuda"))
    alone, end = low.forward_state(rows[1:, :33], low.init_state(1, max_length=64))
    assert relative_rms(y[1:, :33], alone) < 1e-4
    for key, a, b in zip(state._fields, state, end, strict=True):
        if key not in ("keys", "values") and b.numel():  # beyond the row's length these hold anything
            assert relative_rms(a[1:].float(), b.float()) < 1e-4, key
