"""Which implementation runs: the choice, its reason, its warnings; and the threads that the CPU kernels run on."""

from __future__ import annotations

import os
import threading
import warnings

import pytest
import torch

from kernels import backend, threads

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment, no memory of earlier warnings."""
    monkeypatch.delenv("TRISCAN_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.warn_once.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Makes modules look absent."""
    monkeypatch.setattr(backend, "has", lambda module: module not in modules)


def test_auto_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    assert backend.resolve("scan", "auto", CPU) == "cpu"
    assert backend.resolve("scan", "auto", CUDA) == "triton"
    assert backend.resolve("scan", "auto", torch.device("xpu")) == "triton"


@pytest.mark.parametrize(
    ("device", "missing", "hint"),
    [
        (CPU, "numba", "pip install numba"),
        (CUDA, "triton", "pip install triton"),
        (MPS, "", "no kernel exists for device mps"),
    ],
)
def test_a_slow_fallback_warns_once(
    device: torch.device, missing: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, missing)
    with pytest.warns(UserWarning, match=hint):
        assert backend.resolve("scan", "auto", device) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve("scan", "auto", device) == "torch"


def test_the_environment_decides_only_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRISCAN_BACKEND", "reference")
    assert backend.resolve("scan", "auto", CPU) == "reference"
    assert backend.resolve("scan", "torch", CPU) == "torch"
    monkeypatch.setenv("TRISCAN_BACKEND", "refrence")
    with pytest.raises(ValueError, match=r"backend \(TRISCAN_BACKEND\): got 'refrence'.*did you mean 'reference'"):
        backend.resolve("scan", "auto", CPU)


def test_names_are_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    assert backend.resolve("scan", "torch", CUDA) == "torch"
    with pytest.raises(ValueError, match="move the tensors to the CPU"):
        backend.resolve("scan", "cpu", CUDA)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        backend.resolve("scan", "triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.resolve("scan", "triton", CPU) == "triton"
    assert backend.resolve("scan", "auto", CPU) == "cpu"
    without(monkeypatch, "numba", "triton")
    with pytest.raises(ValueError, match="install numba"):
        backend.resolve("scan", "cpu", CPU)
    with pytest.raises(ValueError, match="pip install triton"):
        backend.resolve("scan", "triton", CUDA)


def test_a_cuda_kernel_runs_where_the_op_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch)
    assert backend.resolve("scan", "auto", CUDA, cuda=True) == "cuda"
    assert backend.resolve("scan", "auto", CUDA) == "triton"
    assert backend.resolve("scan", "triton", CUDA, cuda=True) == "triton"
    with pytest.raises(ValueError, match=r"no CUDA kernel.*use backend=.auto."):
        backend.resolve("scan", "cuda", CPU)
    monkeypatch.setenv("TRISCAN_BACKEND", "cuda")  # holds for all ops, also for those that have none
    assert backend.resolve("scan", "auto", CUDA, cuda=True) == "cuda"
    assert backend.resolve("norm", "auto", CUDA) == "triton"
    with pytest.raises(ValueError, match=r"got 'fast', wanted one of auto, cuda, triton, cpu, torch, reference$"):
        backend.choose("fast", CPU)


@pytest.fixture
def three_threads() -> object:
    """Three threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_each_task_runs_once_and_on_several_threads() -> None:
    done: list[int] = []
    names: set[str] = set()
    together = threading.Barrier(3, timeout=30)

    def task(i: int) -> None:
        done.append(i)
        names.add(threading.current_thread().name)
        if i < 3:
            together.wait()  # breaks unless three tasks run at the same time

    threads.run(task, [(i,) for i in range(50)])
    assert sorted(done) == list(range(50))
    assert len(names) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system moves threads by itself")
@pytest.mark.usefixtures("three_threads")
def test_helpers_leave_the_callers_processor_to_it() -> None:
    allowed = os.sched_getaffinity(0)
    found: dict[str, set[int]] = {}
    together = threading.Barrier(3, timeout=30)

    def task(_: int) -> None:
        found[threading.current_thread().name] = os.sched_getaffinity(0)
        together.wait()

    threads.run(task, [(i,) for i in range(3)])
    assert found.pop(threading.current_thread().name) == allowed
    for helper in found.values():
        assert helper < allowed if len(allowed) > 1 else helper == allowed
        assert len(helper) >= max(1, len(allowed) - 1)


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_task_is_raised_after_all_have_stopped() -> None:
    running: list[int] = []

    def task(i: int) -> None:
        running.append(i)
        if i == 1:
            raise RuntimeError("task 1")

    with pytest.raises(RuntimeError, match="task 1"):
        threads.run(task, [(i,) for i in range(6)])
    assert 1 in running


def test_one_thread_or_one_task_stays_in_the_caller() -> None:
    names: list[str] = []
    threads.run(lambda _: names.append(threading.current_thread().name), [(0,)])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads.run(lambda _: names.append(threading.current_thread().name), [(0,), (1,)])
    finally:
        torch.set_num_threads(before)
    assert set(names) == {threading.current_thread().name}
    threads.run(names.append, [])
    assert len(names) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Python 3.12 says so; it is what is tested
@pytest.mark.usefixtures("three_threads")
def test_a_forked_child_gets_a_pool_of_its_own() -> None:
    threads.run(lambda _: None, [(i,) for i in range(8)])
    child = os.fork()
    if child == 0:
        done: list[int] = []
        threads.run(done.append, [(i,) for i in range(8)])
        os._exit(0 if sorted(done) == list(range(8)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
