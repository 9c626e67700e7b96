"""Training commands on two GPUs: the losses of one, and what happens when a process dies."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import TWO, assert_same_run, kill_and_resume, launch, pretrain, pretrain_text, write_text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.usefixtures("place"),
]
GPU = ("--trainer.accelerator", "gpu", "--run_dir")
SHARED = {
    **{name: (pretrain_text, (), options) for name, options in TWO.items()},
    "tensor_graph": (pretrain_text, ("--trainer.max_steps", "8"), (*TWO["tensor"], "--model.graph", "true")),
    "sequence": (pretrain_text, (), ("--sequence_parallel", "2")),
    "strands_sequence": (
        pretrain,
        ("--model.objective", "masked", "--model.rcps", "true", "--data.batch_size", "4"),
        ("--sequence_parallel", "2"),
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_two_gpus_make_the_steps_of_one(place: Path, name: str) -> None:
    command: Callable[..., None]
    command, common, shared = SHARED[name]
    write_text(place, 80)
    alone = (*GPU, "one", "--trainer.devices", "1", *common)
    assert launch(1, command, *alone, method="spawn") == [0]
    assert launch(2, command, *GPU, "two", "--trainer.devices", "2", *common, *shared, method="spawn") == [0, 0]
    assert_same_run("one", "two")


GRAPH_HANGS = pytest.mark.xfail(reason="a process left with collectives in graphs waits until the launcher ends it")


@pytest.mark.parametrize("name", ["tensor", pytest.param("tensor_graph", marks=GRAPH_HANGS)])
def test_a_process_that_dies_with_its_layers_ends_the_job(
    place: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_text(place, 800)
    options = (*GPU, "long", "--trainer.devices", "2", "--test_after_fit", "false", *SHARED[name][2])
    kill_and_resume(pretrain_text, options, random.randrange(2), place, capfd, "spawn")
