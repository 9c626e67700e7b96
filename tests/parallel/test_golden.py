"""Golden numbers computed by two processes: parts of the sequences, and some of the heads."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import golden_cases, golden_inputs, golden_state_dict
from fill import check, fill_input
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from core.lm import MambaConfig, MambaLM
from core.mixers import Mamba, Mamba2
from core.parallel.cuts import cut_of
from core.parallel.group import SequenceGroup, sequence_parallel
from core.parallel.tensor import tensor_parallel

CASES = {
    f"{family}/{name}": case
    for family in ("mamba1_a", "mamba2_a", "mamba_lm_a")
    for name, case in golden_cases(family).items()
    if len(case["inputs"]) == 1 and not case["config"].get("attn_layer_idx")  # neither packed nor attention
}
HEADS = [name for name in CASES if name.startswith("mamba2_a")]


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The module of a case, and its input."""
    case = CASES[name]
    config = {key: value for key, value in case["config"].items() if key != "chunk_size"}
    kinds = {"mamba1_a": Mamba, "mamba2_a": Mamba2}
    kind = kinds.get(name.partition("/")[0])
    model = MambaLM(MambaConfig(**config)) if kind is None else kind(**config)
    model.load_state_dict(golden_state_dict(case, model))
    (given,) = golden_inputs(case).values()
    return model, given


def in_parts(rank: int, size: int) -> dict[str, Any]:
    """Of each case this rank's part of the output, and the gradients of all parts."""
    group, found = SequenceGroup(dist.group.WORLD), {}
    for name in CASES:
        model, given = build(name)
        begin, end = group.bounds(given.shape[1])
        with sequence_parallel(group):
            y = model(given[:, begin:end])
            (y * fill_input("loss_weight", (*given.shape[:2], y.shape[-1]))[:, begin:end]).sum().backward()
        grads = {key: group.sum(p.grad).numpy() for key, p in model.named_parameters() if p.grad is not None}
        found[name] = (y.detach().numpy(), grads)
    return found


def some_heads(rank: int, size: int) -> dict[str, Any]:
    """Of each case with as many heads the output, and the gradients of whole parameters."""
    mesh, found = init_device_mesh("cpu", (size,)), {}
    for name in HEADS:
        model, given = build(name)
        assert isinstance(model, Mamba2)
        if model.nheads % size or (model.ngroups % size and size % model.ngroups):
            continue
        tensor_parallel(model, mesh)
        y = model(given)
        (y * fill_input("loss_weight", y.shape)).sum().backward()
        grads = {key: cut.whole(p.grad).numpy() if (cut := cut_of(p)) is not None else p.grad.numpy()
                 for key, p in model.named_parameters() if p.grad is not None}  # fmt: skip
        found[name] = (y.detach().numpy(), grads)
    return found


@pytest.mark.parametrize("function", [in_parts, some_heads])
def test_two_processes_compute_the_golden_numbers(function: Any) -> None:
    first, second = run_ranks(2, function)
    assert len(first) >= 3
    for name, (y, grads) in first.items():
        whole = torch.from_numpy(y)
        if function is in_parts:
            whole = torch.cat([whole, torch.from_numpy(second[name][0])], dim=1)
        check(whole, CASES[name]["outputs"]["y"])
        for key, wanted in CASES[name]["grads"].items():
            if key in grads:  # else of the input
                check(torch.from_numpy(grads[key]), wanted)
