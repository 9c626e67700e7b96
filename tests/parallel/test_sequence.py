"""Sequence-parallel layers and models against one process with the whole sequence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

import kernels  # noqa: F401  registers torch.ops.triscan
from audio.net import SoundNet
from audio.sashimi import SashimiConfig
from core.lm import MambaConfig, MambaLM
from core.mixers import BiMamba, Mamba, Mamba2, Mamba3
from core.parallel import sequence
from core.parallel.group import SequenceGroup, refuse, sequence_parallel
from genomics.models import build_lm

LENGTH, WIDTH = 100, 16
CUTS = {"two": [0, 37, 100], "three": [0, 20, 26, 100]}
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: Mamba(WIDTH, d_state=4),
    "mamba_reverse": lambda: Mamba(WIDTH, d_state=4, reverse=True),
    "mamba2": lambda: Mamba2(WIDTH, d_state=8, headdim=8, ngroups=2, dt_limit=(0.02, 5.0)),
    "mamba2_reverse": lambda: Mamba2(WIDTH, d_state=8, headdim=8, reverse=True, learnable_init_states=True),
    "bimamba": lambda: BiMamba(WIDTH, d_state=4),
}


def build(name: str, forgetful: bool) -> nn.Module:
    """The mixer with states that reach across several parts, or ones that fade within a part."""
    torch.manual_seed(0)
    mixer = MIXERS[name]()
    for key, parameter in mixer.named_parameters():
        if key.endswith("init_states"):
            nn.init.normal_(parameter)
        if key.endswith(("dt_bias", "dt_proj.bias")):
            parameter.data += 6.0 if forgetful else 0.0
    return mixer


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def mix_part(
    rank: int, size: int, name: str, x: Tensor, dy: Tensor, cuts: list[int], window: int, forgetful: bool
) -> Any:
    mixer, part = build(name, forgetful), slice(cuts[rank], cuts[rank + 1])
    group = SequenceGroup(dist.group.WORLD, window)
    own = x[:, part].clone().requires_grad_()
    with sequence_parallel(group):
        y = mixer(own)
        y.backward(dy[:, part])
    return y.detach().numpy(), own.grad.numpy(), {n: group.sum(g).numpy() for n, g in gradients(mixer).items()}


def joined(found: list[Any], index: int) -> Tensor:
    return torch.cat([torch.from_numpy(part[index]) for part in found], dim=1)


@pytest.mark.parametrize("forgetful", [False, True])
@pytest.mark.parametrize("cuts", [pytest.param("two", marks=pytest.mark.slow), "three"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_in_parts_equal_the_whole(name: str, cuts: str, forgetful: bool) -> None:
    x, dy = torch.randn(2, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    whole = build(name, forgetful)
    x.requires_grad_()
    y = whole(x)
    y.backward(dy)
    bounds = CUTS[cuts]
    found = run_ranks(len(bounds) - 1, mix_part, name, x.detach(), dy, bounds, 4 if forgetful else 4096, forgetful)
    torch.testing.assert_close(joined(found, 0), y.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined(found, 1), x.grad, rtol=1e-5, atol=2e-6)
    for key, grad in gradients(whole).items():
        scale = grad.abs().max()
        torch.testing.assert_close(torch.from_numpy(found[0][2][key]) / scale, grad / scale, rtol=0, atol=3e-6)


def remember_longer(rank: int, size: int, name: str, x: Tensor, dy: Tensor) -> Any:
    """A step of a mixer that forgets within a few tokens, then one of the same mixer once it remembers."""
    mixer, part = build(name, True), slice(CUTS["two"][rank], CUTS["two"][rank + 1])
    group, taken = SequenceGroup(dist.group.WORLD, 4), []
    for forgetful in (True, False):
        values = build(name, forgetful).state_dict()
        for key, parameter in mixer.named_parameters():  # they stay where they are, by which a scan is known again
            parameter.data.copy_(values[key] + (3.0 if forgetful and key.endswith("bias") else 0.0))
        mixer.zero_grad()
        with sequence_parallel(group):
            y = mixer(x[:, part])
            y.backward(dy[:, part])
        taken.append(max(group.sizes.values()))
    return y.detach().numpy(), {n: group.sum(g).numpy() for n, g in gradients(mixer).items()}, taken


@pytest.mark.parametrize("name", ["mamba", "mamba2_reverse"])
def test_more_is_taken_where_states_remember_more_than_before(name: str) -> None:
    x, dy = torch.randn(2, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    whole = build(name, False)
    y = whole(x)
    y.backward(dy)
    found = run_ranks(2, remember_longer, name, x, dy)
    torch.testing.assert_close(joined(found, 0), y.detach(), rtol=1e-5, atol=1e-6)
    for key, grad in gradients(whole).items():
        scale = grad.abs().max()
        torch.testing.assert_close(torch.from_numpy(found[0][1][key]) / scale, grad / scale, rtol=0, atol=3e-6)
    for _, _, (before, after) in found:
        assert before < after


def scan_part(rank: int, size: int, tensors: list[Tensor], dy: Tensor, reverse: bool) -> Any:
    """The op itself in complex128, with an initial state, by plain operators."""
    group, cuts = SequenceGroup(dist.group.WORLD, 4), CUTS["three"]
    part = slice(cuts[rank], cuts[rank + 1])
    x, dt, A, B, C, z, initial = (t.clone() for t in tensors)
    leaves = [t[:, part].clone() for t in (x, dt, B, C, z)] + [A, initial]
    for t in leaves:
        t.requires_grad_()
    x, dt, B, C, z = leaves[:5]
    with sequence_parallel(group):
        y, _ = sequence.selective_scan(
            x, dt, A, B, C, None, z, None, None, None, initial, None, None, True, True, "sum", reverse, False, "torch"
        )
    y.backward(dy[:, part])
    return [t.detach().numpy() for t in (y, *(t.grad for t in leaves[:5]))] + [
        group.sum(torch.view_as_real(t.grad)).numpy() for t in leaves[5:]
    ]


@pytest.mark.parametrize("reverse", [False, True])
def test_complex_scan_in_float64_equals_the_whole(reverse: bool) -> None:
    g = torch.Generator().manual_seed(2)
    real = {"dtype": torch.float64, "generator": g}
    A = torch.complex(-torch.rand(6, 3, **real) - 0.05, torch.randn(6, 3, **real))
    B, C = torch.randn(2, 2, LENGTH, 1, 3, dtype=torch.complex128, generator=g)
    initial = torch.randn(2, 6, 3, dtype=torch.complex128, generator=g)
    x, dt, z, dy = torch.randn(4, 2, LENGTH, 6, **real)
    tensors = [x, dt - 1, A, B, C, z, initial]
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, dt, A, B, C, z, initial = leaves
    y, _, _ = torch.ops.triscan.selective_scan(
        x, dt, A, B, C, None, z, None, None, None, initial, None, None, True, True, "sum", reverse, False, "torch"
    )
    y.backward(dy)
    found = run_ranks(3, scan_part, tensors, dy, reverse)
    wanted = [y.detach(), *(t.grad for t in (x, dt, B, C, z))]
    for index, tensor in enumerate(wanted):
        torch.testing.assert_close(joined(found, index), tensor, rtol=1e-11, atol=1e-11)
    for index, tensor in ((6, A.grad), (7, initial.grad)):
        torch.testing.assert_close(
            torch.from_numpy(found[0][index]), torch.view_as_real(tensor), rtol=1e-10, atol=1e-10
        )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mamba_lm": lambda: MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=12, ssm_cfg={"layer": "Mamba2",
                                            "headdim": 8, "d_state": 8})),
    "genome_lm": lambda: build_lm(d_model=16, n_layer=2),
    "caduceus": lambda: build_lm(objective="masked", d_model=16, n_layer=2),
    "caduceus_strands": lambda: build_lm(objective="masked", d_model=16, n_layer=2, rcps=True),
    "sound_net": lambda: SoundNet(SashimiConfig(d_model=8, n_layers=1, pool=(4, 2)), 12),
}  # fmt: skip


def model_loss(model: nn.Module, ids: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1)[:, :12], wanted.flatten(), ignore_index=-100, reduction="sum")


def model_part(rank: int, size: int, name: str, ids: Tensor, wanted: Tensor, recompute: bool) -> Any:
    torch.manual_seed(0)
    model, group = MODELS[name](), SequenceGroup(dist.group.WORLD)
    if recompute:
        model.set_gradient_checkpointing()  # type: ignore[operator]
    with sequence_parallel(group):
        loss = model_loss(model, group.shard(ids, 8), group.shard(wanted, 8))
        loss.backward()
    return group.sum(loss).item(), {n: group.sum(g).numpy() for n, g in gradients(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_models_in_parts_equal_the_whole(name: str) -> None:
    ids, wanted = torch.randint(0, 12, (2, 2, 69), generator=torch.Generator().manual_seed(3))
    wanted[:, 60:] = -100  # parts count different numbers of tokens
    torch.manual_seed(0)
    model = MODELS[name]()
    loss = model_loss(model, ids, wanted)
    loss.backward()
    found = run_ranks(2, model_part, name, ids, wanted, name in ("genome_lm", "caduceus_strands"))
    assert found[0][0] == pytest.approx(loss.item(), rel=1e-6)
    for key, grad in gradients(model).items():
        scale = grad.abs().max()
        torch.testing.assert_close(torch.from_numpy(found[0][1][key]) / scale, grad / scale, rtol=0, atol=1e-5)


def refuse_part(rank: int, size: int) -> None:
    group = SequenceGroup(dist.group.WORLD)
    x = torch.zeros(1, 8, WIDTH)
    with sequence_parallel(group):
        for wrong, message in (
            (lambda: Mamba(WIDTH)(x, seq_idx=torch.zeros(1, 8, dtype=torch.int32)), "seq_idx: got it for a part"),
            (lambda: Mamba(WIDTH)(x[:, :2]), "wanted at least 3 for a convolution of width 4"),
            (lambda: Mamba(WIDTH).forward_state(x, Mamba(WIDTH).init_state(1)), "state: got a part of a sequence"),
            (
                lambda: Mamba3(WIDTH, headdim=8, d_state=8, a_activation="softplus")(x),
                "Mamba3: got a part of a sequence",
            ),
            (lambda: group.shard(torch.zeros(1, 1)), "got sequences of 1 tokens for 2 processes"),
        ):
            with pytest.raises(ValueError, match=message):
                wrong()
    refuse("outside it is allowed")


def test_what_cannot_be_cut_is_refused() -> None:
    run_ranks(2, refuse_part)
