import csv
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from toy_training import RECIPE, Points, Toy, train

from core.errors import UserError
from core.training.callbacks import EMA
from core.training.module import OptimizerOptions, ScheduleOptions, create_optimizer
from core.training.rng import ResumableLoader, rng_state, set_rng_state
from core.training.throughput import peak_flops

STEPS = 6  # an epoch of the toy: 44 points in batches of 8


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with one recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/toy").mkdir(parents=True)
    (tmp_path / "configs/toy/points.yaml").write_text(RECIPE)
    monkeypatch.setattr("core.training.record.curves", lambda rows: None)  # half of a run's time; test_report has it
    return tmp_path


def losses(run: str) -> dict[int, float]:
    """The training loss by step."""
    with Path(run, "logs/metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def checkpoint(path: str) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_end(one: str, other: str) -> None:
    """Weights, their average, the optimizer's moments and the losses of two runs are equal to the bit."""
    assert losses(one) == losses(other)
    a, b = checkpoint(f"{one}/checkpoints/last.ckpt"), checkpoint(f"{other}/checkpoints/last.ckpt")
    for key in ("state_dict", "current_model_state"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    for index, state in a["optimizer_states"][0]["state"].items():
        torch.testing.assert_close(state, b["optimizer_states"][0]["state"][index], rtol=0, atol=0)
    groups = [c["optimizer_states"][0]["param_groups"] for c in (a, b)]
    assert groups[0] == groups[1]
    assert a["global_step"] == b["global_step"]


def test_the_same_seed_gives_the_same_run() -> None:
    train("points", "--run_dir", "a")
    train("points", "--run_dir", "b")
    train("points", "--run_dir", "c", "--seed_everything", "1")
    assert_same_end("a", "b")
    assert losses("a") != losses("c")
    assert len(losses("a")) == 4 * STEPS


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_from_an_epoch_equals_the_whole_run(workers: int) -> None:
    options = ("--checkpoint.save_top_k", "-1", "--data.workers", str(workers))
    train("points", "--run_dir", "whole", *options)
    train("points", "--run_dir", "half", *options, "--ckpt_path", f"whole/checkpoints/epoch1-step{2 * STEPS}.ckpt")
    first = {step: loss for step, loss in losses("whole").items() if step < 2 * STEPS}
    assert {**first, **losses("half")} == losses("whole")
    a, b = checkpoint("whole/checkpoints/last.ckpt"), checkpoint("half/checkpoints/last.ckpt")
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(a["current_model_state"], b["current_model_state"], rtol=0, atol=0)


@pytest.mark.parametrize(("stop_at", "workers"), [(0, 0), (7, 1), (2 * STEPS - 1, 0)])
def test_ctrl_c_in_an_epoch_then_resume_equals_the_whole_run(
    stop_at: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data.workers", str(workers))
    train("points", "--run_dir", "whole", *options)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train("points", *options, "--model.stop_at", str(stop_at))
    assert stopped.value.code == 130
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "runs/toy/points/1"
    assert out[-2].endswith("--ckpt_path runs/toy/points/1/checkpoints/last.ckpt")
    assert checkpoint("runs/toy/points/1/checkpoints/last.ckpt")["global_step"] == stop_at + 1
    assert json.loads(Path("runs/toy/points/1/run.json").read_text())["status"] == "interrupted"
    assert "interrupted" in Path("runs/toy/points/1/report.html").read_text()
    json.loads(Path("runs/toy/points/1/metrics.json").read_text())

    train("points", *options, "--ckpt_path", "last")
    assert capsys.readouterr().out.splitlines()[-1] == "runs/toy/points/1"
    assert_same_end("whole", "runs/toy/points/1")
    assert json.loads(Path("runs/toy/points/1/run.json").read_text())["status"] == "finished"


def test_on_resume_the_options_given_win() -> None:
    train("points", "--run_dir", "a", "--trainer.max_epochs", "1", "--model.schedule.name", "constant")
    options = ("--model.optimizer.lr", "5e-4", "--model.optimizer.weight_decay", "0.3")
    train("points", "--ckpt_path", "a/checkpoints/last.ckpt", "--trainer.max_epochs", "2", *options,
          "--model.schedule.name", "constant", "--model.schedule.warmup_epochs", "0")  # fmt: skip
    with Path("a/logs/metrics.csv").open(newline="") as file:
        rates = {int(r["step"]): float(r["train/lr"]) for r in csv.DictReader(file) if r["train/lr"]}
    assert rates[STEPS - 1] == pytest.approx(1e-2)
    assert [rates[step] for step in range(STEPS, 2 * STEPS)] == pytest.approx([5e-4] * STEPS)
    decays = [g["weight_decay"] for g in checkpoint("a/checkpoints/last.ckpt")["optimizer_states"][0]["param_groups"]]
    assert sorted(decays) == [0.0, 0.3]


def test_the_average_takes_in_each_optimizer_step() -> None:
    module = LightningModule()
    module.net = nn.BatchNorm1d(3)  # weights, moving averages and a counter, which is an integer
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_step=0)
    ema, wanted = EMA(0.75), None
    ema.setup(trainer, module, "fit")  # type: ignore[arg-type]
    for step in (1, 2, 2, 3):  # the second 2 is a batch whose gradients wait for others
        new = step > trainer.global_step
        trainer.global_step = step
        if new:
            state = {k: v + step for k, v in module.net.state_dict().items()}
            module.net.load_state_dict(state)
            wanted = state if wanted is None else {k: 0.75 * v + 0.25 * state[k].double() for k, v in wanted.items()}
            wanted["num_batches_tracked"] = state["num_batches_tracked"]
        ema.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    for name, value in ema._average_model.module.net.state_dict().items():
        torch.testing.assert_close(value.double(), wanted[name].double())


def test_the_test_is_of_the_averaged_weights_of_the_best_checkpoint() -> None:
    train("points", "--run_dir", "a")
    best = checkpoint("a/checkpoints/best.ckpt")
    assert any(not torch.equal(v, best["current_model_state"][k]) for k, v in best["state_dict"].items())
    model, data = Toy(), Points()
    model.load_state_dict(best["state_dict"])
    data.setup("test")
    model.eval().requires_grad_(False)
    x, labels = data.points.tensors
    accuracy = (model.net(x).argmax(-1) == labels).float().mean()
    metrics = json.loads(Path("a/metrics.json").read_text())
    assert metrics["test/accuracy"] == pytest.approx(float(accuracy))
    raw = Toy()
    raw.load_state_dict(best["current_model_state"])
    raw.eval().requires_grad_(False)
    loss = nn.functional.cross_entropy(raw.net(x), labels)
    assert metrics["test/loss"] != pytest.approx(float(loss), rel=1e-6)
    assert metrics["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(model.net(x), labels)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "at_warm", "at_half", "at_end"),
    [("cosine", 1.0, 0.5, 0.0), ("linear", 1.0, 0.5, 0.0), ("constant", 1.0, 1.0, 1.0)],
)
def test_schedule(name: str, at_warm: float, at_half: float, at_end: float) -> None:
    steps = 4 * STEPS
    train("points", "--run_dir", "a", "--model.schedule.name", name, "--model.schedule.warmup_epochs", "1")
    with Path("a/logs/metrics.csv").open(newline="") as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    assert len(rates) == steps
    assert rates[0] == pytest.approx(1e-6)
    assert rates[STEPS // 2] == pytest.approx((1e-6 + 1e-2) / 2)
    if name == "constant":
        assert rates[STEPS:] == pytest.approx([1e-2] * (steps - STEPS))
        return
    # The shape runs from step 0, the warm-up covers its first steps.
    assert rates[steps // 2] == pytest.approx(1e-2 * at_half)
    assert rates[-1] < 1e-2 * (at_end + 0.06)
    assert all(a > b for a, b in zip(rates[STEPS:], rates[STEPS + 1 :], strict=False))
    assert at_warm * 1e-2 > rates[STEPS] > rates[steps // 2]


def test_compile_keeps_names_and_losses() -> None:
    train("points", "--run_dir", "plain", "--trainer.max_epochs", "1")
    # eager is a backend of torch.compile: graph capture without a C compiler
    compiled = nn.Module.compile
    calls = []

    def capture(self: nn.Module) -> None:
        calls.append(type(self).__name__)
        compiled(self, backend="eager")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", capture)
        train("points", "--run_dir", "compiled", "--trainer.max_epochs", "1", "--model.compile", "true")
    assert calls == ["Sequential"]
    assert losses("plain") == pytest.approx(losses("compiled"), rel=1e-4)
    a, b = checkpoint("plain/checkpoints/last.ckpt"), checkpoint("compiled/checkpoints/last.ckpt")
    assert a["state_dict"].keys() == b["state_dict"].keys()


def test_throughput_counts_the_step() -> None:
    train("points", "--run_dir", "a", "--trainer.max_epochs", "2", "--model.width", "16")
    metrics = json.loads(Path("a/metrics.json").read_text())
    # Per item: two matrices forward, their weight gradients, and the input gradient of the second; 2 FLOP a product.
    assert metrics["run/flops_per_item"] == 2 * (2 * (4 * 16 + 16 * 2) + 16 * 2)
    assert metrics["train/points_per_s"] > 0
    rate = metrics["train/points_per_s"] * metrics["run/flops_per_item"] / 1e9
    assert metrics["train/gflops_per_s"] == pytest.approx(rate, rel=1e-5)


def test_peaks_of_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16-mixed") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16-true") == 756e12
    assert peak_flops("NVIDIA L40S", "16-mixed") == 362e12
    assert peak_flops("NVIDIA L4", "16-mixed") == 121e12
    assert peak_flops("Tesla T4", "bf16-mixed") is None
    assert peak_flops("a device of tomorrow", "bf16-mixed") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "32-true") == 19.5e12


class Net(nn.Module):
    """Two layers with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.A_log._no_weight_decay = True
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^first|^pos_embed", "blocks": [(r"^norm|^A_log", (0,)), (r"^head", (1,))]}


def test_weight_decay_reaches_matrices_only() -> None:
    net = Net()
    optimizer = create_optimizer(net, OptimizerOptions(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    names = {id(p): name for name, p in net.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, value in decay.items() if value == 0.1} == {"first.weight", "head.weight"}
    assert decay.keys() == set(names.values())
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_layer_decay_slows_the_lower_layers() -> None:
    net = Net()
    optimizer = create_optimizer(net, OptimizerOptions(lr=1.0, layer_decay=0.5))
    names = {id(p): name for name, p in net.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale["head.weight"] == 1.0
    assert scale["first.weight"] < scale["norm.weight"] < scale["head.weight"]


def test_an_unknown_optimizer_is_named_with_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"unknown optimizer 'adamww'; did you mean adamw"):
        create_optimizer(Net(), OptimizerOptions(name="adamww"))


class Numbers(Dataset):
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> Tensor:
        draws = random.random() + np.random.rand()  # noqa: NPY002
        return torch.tensor([index, draws], dtype=torch.float64) + torch.rand(2, dtype=torch.float64)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [0, 1, 3, 6])
def test_a_loader_goes_on_where_it_stopped(workers: int, seen: int) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(Numbers(), batch_size=4, shuffle=True, num_workers=workers)

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    whole = loader()
    batches = iter(whole)
    for _ in range(seen):
        next(batches)
        torch.rand(5)  # as dropout does between batches
    state = whole.state_dict()
    rest = list(batches)

    set_rng_state(state["now"])
    other = loader()
    other.load_state_dict(state)
    torch.testing.assert_close(list(other), rest or list(loader()), rtol=0, atol=0) if rest else None
    assert len(rest) == 6 - seen
    assert isinstance(whole, DataLoader)


def test_generators_come_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_a_module_built_in_python_keeps_its_options_in_checkpoints(tmp_path: Path) -> None:
    import lightning

    model = Toy(width=6, optimizer=OptimizerOptions(lr=3e-3), schedule=ScheduleOptions(name="linear"))
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=Points())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = Toy.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.optimizer_options == OptimizerOptions(lr=3e-3)
    assert again.hparams.width == 6
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
