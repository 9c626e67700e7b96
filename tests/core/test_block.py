"""The residual block: its equations, the residual stream's dtype, gradient checkpointing."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fill import fill_input
from torch.autograd.graph import saved_tensors_hooks

from core.block import AddNorm, Block, GatedMLP
from core.forget import Forgotten, forget
from core.mixers import Mamba


def block(mlp: bool = True, norm: str = "rms", dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(0)
    branch = GatedMLP(6, 10, multiple_of=4) if mlp else None
    module = Block(6, Mamba(6, d_state=3), branch, norm).to(dtype)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return module


def plain_norm(module: AddNorm, x: torch.Tensor) -> torch.Tensor:
    if module.kind == "rms":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps) * module.weight
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mlp", [True, False])
def test_equations(norm: str, mlp: bool):
    module = block(mlp, norm)
    x, residual = fill_input("x", (2, 5, 6)).double(), fill_input("r", (2, 5, 6)).double()
    out, stream = module(x, residual)
    want = x + residual
    branch = module.mixer(plain_norm(module.norm, want))
    if mlp:
        want = want + branch
        y, gate = module.mlp.fc1(plain_norm(module.norm2, want)).chunk(2, -1)
        branch = module.mlp.fc2(y * F.silu(gate))
    torch.testing.assert_close(out, branch)
    torch.testing.assert_close(stream, want)


def test_names():
    names = {name.split(".", 1)[0] for name in block().state_dict()}
    assert names == {"norm", "mixer", "norm2", "mlp"}
    assert set(block(mlp=False).state_dict()) >= {"norm.weight", "mixer.A_log"}
    assert not any(name.startswith(("norm2", "mlp")) for name in block(mlp=False).state_dict())


@pytest.mark.parametrize(("in_fp32", "wanted"), [(True, torch.float32), (False, torch.bfloat16)])
def test_residual_dtype(in_fp32: bool, wanted: torch.dtype):
    norm = AddNorm(6, residual_in_fp32=in_fp32, dtype=torch.bfloat16)
    x = fill_input("x", (2, 5, 6)).bfloat16()
    y, residual = norm(x)
    assert (y.dtype, residual.dtype) == (torch.bfloat16, wanted)
    y, residual = norm(x, residual)
    assert (y.dtype, residual.dtype) == (torch.bfloat16, wanted)
    torch.testing.assert_close(residual.float(), 2 * x.float(), rtol=1e-2, atol=0)


def test_fp32_stream_keeps_small_updates():
    """What residual_in_fp32 is for: a branch below bfloat16's resolution of the stream still counts."""
    norm = AddNorm(4, dtype=torch.bfloat16)
    _, residual = norm(torch.ones(1, 1, 4, dtype=torch.bfloat16))
    for _ in range(16):
        _, residual = norm(torch.full((1, 1, 4), 1e-3, dtype=torch.bfloat16), residual)
    torch.testing.assert_close(residual, torch.full((1, 1, 4), 1.016), rtol=1e-3, atol=0)


def test_gradient_checkpointing():
    """The same numbers and names, and fewer tensors kept for the backward pass."""
    plain, thrifty = block(), block()
    thrifty.gradient_checkpointing = True
    assert list(plain.state_dict()) == list(thrifty.state_dict())
    kept: dict[Block, int] = {}
    gradients = []
    for module in (plain, thrifty):
        x = fill_input("x", (2, 5, 6)).double().requires_grad_()
        count = [0]

        def pack(t: torch.Tensor, count: list[int] = count) -> torch.Tensor:
            count[0] += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, stream = module(x)
        kept[module] = count[0]
        (out.square().sum() + stream.square().sum()).backward()
        gradients.append([x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)
    assert kept[thrifty] < kept[plain] / 4


@pytest.mark.parametrize("piece", [64, 4])
def test_a_checkpointed_block_keeps_its_stream_alone(piece: int, monkeypatch: pytest.MonkeyPatch):
    """Of a branch and the stream before it their sum, not both, whole or in pieces."""
    module = block(mlp=False)
    module.gradient_checkpointing = True
    monkeypatch.setattr("core.block.PIECE", piece)
    x, residual = (fill_input(n, (2, 9, 6)).double().requires_grad_() for n in "xr")
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(x, residual)
    assert sum(kept) == x.numel()


def test_checkpointing_of_a_narrow_stream():
    """A sum that is rounded would be normalised as rounded: branch and stream are kept, and nothing changes."""
    found = []
    for recompute in (False, True):
        module = block(dtype=torch.bfloat16)
        module.norm.residual_in_fp32 = False
        module.gradient_checkpointing = recompute
        x, residual = (fill_input(n, (2, 9, 6)).bfloat16().requires_grad_() for n in "xr")
        out, stream = module(x, residual)
        (out.float().square().sum() + stream.float().square().sum()).backward()
        found.append([out, stream, x.grad, residual.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def gradients_of(module: Block, hooks: bool = False) -> list[torch.Tensor]:
    """Gradients of a step, perhaps with hooks that see all that is saved."""
    x, residual = fill_input("x", (2, 9, 6)).double().requires_grad_(), fill_input("r", (2, 9, 6)).double()
    with saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else nullcontext():
        out, stream = module(x, residual)
    (out.square().sum() + stream.square().sum()).backward()
    return [x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


def test_checkpointing_piece_by_piece(monkeypatch: pytest.MonkeyPatch):
    """The state carries gradients over the pieces' edges; the last piece is shorter."""
    plain, thrifty = block(), block()
    thrifty.gradient_checkpointing = True
    monkeypatch.setattr("core.block.PIECE", 4)
    monkeypatch.setattr("core.block.FORGET_FROM", 1)
    calls = []
    monkeypatch.setattr(Mamba, "forward_state", lambda *a, run=Mamba.forward_state: calls.append(1) or run(*a))
    for ours, theirs in zip(gradients_of(thrifty), gradients_of(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert len(calls) == 6  # three pieces, twice


def test_large_activations_are_computed_again(monkeypatch: pytest.MonkeyPatch):
    """What costs one pass over memory is not kept, to the same bits; not where other hooks want to see all."""
    module, asked = block(mlp=False), []
    wanted = gradients_of(module)
    module.zero_grad()
    monkeypatch.setattr("core.block.FORGET_FROM", 1)
    monkeypatch.setattr(Forgotten, "value", lambda f, run=Forgotten.value: asked.append(f) or run(f))
    for ours, theirs in zip(gradients_of(module), wanted, strict=True):
        assert torch.equal(ours, theirs)
    # The convolution's output for the scan and for x_proj, the normalised input for in_proj; nothing stays computed.
    assert len(asked) == 3
    assert len(set(asked)) == 2
    assert all(f._value is None for f in asked)
    gradients_of(module, hooks=True)
    assert len(asked) == 3
    # Nothing else keeps them alive while the graph lives.
    outputs: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(
        "core.mixers.mamba.forget", lambda t, compute: outputs.append(weakref.ref(t)) or forget(t, compute)
    )
    x = fill_input("x", (2, 9, 6)).double().requires_grad_()
    out = module(x, x)
    assert len(outputs) == 1
    assert outputs[0]() is None
    del out


def test_forward_state_equals_forward():
    module = block()
    x = fill_input("x", (2, 7, 6)).double()
    out, stream = module(x)
    state, outputs = module.mixer.init_state(2), []
    for piece in x.split(3, dim=1):
        y, residual, state = module.forward_state(piece, None, state)
        outputs.append(torch.cat([y, residual], dim=-1))
    torch.testing.assert_close(torch.cat(outputs, dim=1), torch.cat([out, stream], dim=-1))


def test_mlp_width():
    assert GatedMLP(48).fc1.weight.shape == (256, 48)  # 8/3 * 48 = 128
    assert GatedMLP(48, 129).fc2.weight.shape == (48, 256)
    assert set(GatedMLP(4, bias=True).state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def test_unknown_norm():
    with pytest.raises(ValueError, match="kind: got 'batch'"):
        AddNorm(4, "batch")
