"""The Lightning module that every domain's training derives from: optimizer, schedule, steps, compilation.

Dimension letters: B batch.
"""

import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from timm.optim import (
    create_optimizer_v2,  # pyright: ignore[reportPrivateImportUsage]
    list_optimizers,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_layer_decay,  # pyright: ignore[reportPrivateImportUsage]
    param_groups_weight_decay,  # pyright: ignore[reportPrivateImportUsage]
)
from timm.scheduler import create_scheduler_v2  # pyright: ignore[reportPrivateImportUsage]
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from core.errors import UserError
from core.parallel.cuts import gradient_norm
from core.parallel.shards import empty_copy
from core.parallel.tensor import group_of
from core.training.graphs import release
from core.training.muon import Muon
from core.training.report import Report


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer and its parameter groups.

    Args:
        name: Any name of ``timm.optim.list_optimizers()``.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay; not applied to biases, to 1-D parameters, to parameters that carry
            ``_no_weight_decay = True`` and to those that the net's ``no_weight_decay()`` names.
        betas: Decay rates of the two moments; None keeps the optimizer's own.
        eps: Added to the denominator; None keeps the optimizer's own.
        layer_decay: Factor on the learning rate per layer, from the head down; None is the same rate everywhere.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate over the run, counted in optimizer steps.

    Args:
        name: Shape after the warm-up: half a cosine or a line down to ``min_lr``, or constant.
        warmup_epochs: Length of the linear warm-up in epochs; fractions are fine.
        warmup_steps: Length of the warm-up in optimizer steps, instead of ``warmup_epochs``.
        warmup_lr: Rate at the first step of the warm-up.
        min_lr: Rate at the end of the run.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    warmup_lr: float = 1e-6
    min_lr: float = 0.0


# Modules built in Python, not by a command, keep these in their checkpoints; checkpoints are read with weights_only.
torch.serialization.add_safe_globals([OptimizerOptions, ScheduleOptions])


class TrainingModule(LightningModule):
    """A net with a loss, trained by recipe; domains derive from it.

    A domain writes a constructor that ends up with ``self.net`` (everything that is trained lives in it), and ``loss``.
    The rest has defaults::

        class Classifier(TrainingModule):
            headline = "test/accuracy"
            item_name = "images"

            def __init__(
                self,
                name: str = "vim_tiny_patch16_224",
                num_classes: int = 10,
                optimizer: OptimizerOptions = OptimizerOptions(),
                schedule: ScheduleOptions = ScheduleOptions(),
                compile: bool = False,
            ) -> None:
                super().__init__(optimizer, schedule, compile)
                self.net = timm.create_model(name, num_classes=num_classes)
                self.accuracy = MulticlassAccuracy(num_classes, average="micro")

            def loss(self, batch):
                images, labels = batch
                return F.cross_entropy(self.net(images), labels)

            def evaluate(self, batch, stage):
                images, labels = batch
                logits = self.net(images)
                self.accuracy(logits, labels)
                self.log_mean(f"{stage}/loss", F.cross_entropy(logits, labels), batch)
                self.log(f"{stage}/accuracy", self.accuracy, prog_bar=True)

            def add_to_report(self, report):
                report.figure("Confusion matrix", draw(...), "Rows are the true classes.")

    Metrics are named ``stage/name`` (``val/loss``, ``test/accuracy``); what is logged in validation and test lands in
    the run's ``metrics.json``. All constructor arguments become hyper-parameters in the checkpoint (here: do not call
    ``save_hyperparameters`` again).

    Args:
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile ``self.net`` with torch.compile after the first step. Parameter names stay as they are.
    """

    headline: str | None = None
    """Name of the metric that stands at the top of the report, such as ``test/accuracy``."""

    item_name: str = "items"
    """What one item of a batch is called in throughput figures: images, sequences, clips."""

    cuts_sequences: bool = False
    """Whether ``loss`` and ``evaluate`` take their part of a batch's sequences where processes share them."""

    shares_layers: bool = False
    """Whether ``loss`` and ``evaluate`` do with a net whose layers processes share out (``core.parallel.tensor``)."""

    net: nn.Module

    def __init__(
        self,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer_options = optimizer
        self.schedule_options = schedule
        self.compile_requested = compile
        self._steps_seen = 0
        self._whole_net: list[nn.Module] = []  # in a list, so that it is no part of this module
        self._group_options: list[dict[str, Any]] = []

    # What a domain writes.

    def loss(self, batch: Any) -> Tensor:
        """Return the training loss of one batch, a scalar; further figures may be logged as ``train/...``."""
        raise TypeError(f"{type(self).__name__} must define loss(batch)")

    @torch.no_grad()
    def evaluate(self, batch: Any, stage: str) -> None:
        """Log the figures of one validation or test batch; ``stage`` is ``val`` or ``test``."""
        self.log_mean(f"{stage}/loss", self.loss(batch), batch)

    def batch_items(self, batch: Any) -> int:
        """Return the number of items in a batch: the first dimension of its first tensor."""
        return len(_first_tensor(batch))

    def batch_tokens(self, batch: Any) -> int | None:
        """Return the number of tokens in a batch, or None where tokens/s says nothing."""
        return None

    def compiled_part(self) -> nn.Module:
        """Return what ``compile`` compiles: the net, or the part of it that ``loss`` calls."""
        return self.net

    def predict(self, batch: Any) -> list[dict[str, Any]]:
        """Return one row per item of a batch, for ``predictions.csv``."""
        raise UserError(f"{type(self).__name__} has no predict stage; use fit, validate or test")

    def add_to_report(self, report: Report) -> None:
        """Add the domain's sections to the run's page; called once, on rank 0, after the last stage.

        ``self.trainer.datamodule`` is at hand, and the weights are those that were tested.
        """

    # What the trainer calls.

    def log_mean(self, name: str, value: Tensor, batch: Any, weight: int | None = None) -> None:
        """Log a batch's mean so that the epoch's value is the mean over items, over all processes.

        Args:
            name: Of the metric.
            value: The mean.
            batch: The batch.
            weight: Number of its terms; None: the batch's items.
        """
        count: Any = float(self.batch_items(batch) if weight is None else weight)
        # Of whole numbers Lightning would cut off the mean over the processes, by which it divides.
        self.log(name, value, on_epoch=True, on_step=False, prog_bar=True, sync_dist=True, batch_size=count)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute, log and return the loss of one batch."""
        loss = self.loss(batch)
        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        size = self.batch_items(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size, sync_dist=True)
        self.log("train/lr", torch.tensor(rate), prog_bar=True, batch_size=size)  # a number would wait for the GPU
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook. On the calling thread: in PyTorch's own each Python object would come from another core."""
        with torch.autograd.set_multithreading_enabled(False):
            super().backward(loss, *args, **kwargs)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log one validation batch under ``val/``."""
        self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log one test batch under ``test/``."""
        self.evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """Return the rows of one batch."""
        return self.predict(batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Compile before the second step: the first runs as it is written, so that its FLOPs can be counted."""
        if self.compile_requested and self._steps_seen == 1:
            self.compiled_part().compile()
        self._steps_seen += 1

    @property
    def shares_weights(self) -> bool:
        """Whether no process has all of the net, so that one alone cannot run or save it."""
        return bool(self._whole_net)

    def remember_net(self) -> None:
        """Note what the net looks like, before its weights are shared out."""
        self._whole_net[:] = [empty_copy(self.net)]

    @property
    def remembered_net(self) -> nn.Module:
        """The net as it was, without weights."""
        return self._whole_net[0]

    def gather_net(self) -> nn.Module:
        """Return the net with all its weights, or on rank 0 a copy of it on the CPU; every process must ask."""
        if not self.shares_weights:
            return self.net
        net, strategy = self.remembered_net, self.trainer.strategy
        weights = strategy.whole_weights(self.net)  # type: ignore[attr-defined]
        if self.trainer.is_global_zero:
            net.load_state_dict(weights)
        return net.train(self.net.training)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients; by the norm of whole ones, where processes have pieces of them."""
        group = group_of(self.net)
        if group is None or gradient_clip_val is None or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, gradient_norm(parameters, group.mesh))

    def configure_optimizers(self) -> Any:
        """Build optimizer and schedule from the options; the schedule is a function of the optimizer step alone."""
        outside = [name for name, p in self.named_parameters() if p.requires_grad and not name.startswith("net.")]
        assert not outside, f"parameters outside self.net would not be trained: {outside}"
        optimizer = create_optimizer(self.net, self.optimizer_options)
        scheduler = self._create_schedule(optimizer)
        self._group_options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": _Stateless(scheduler), "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the rate of the next step."""
        scheduler.step(self.trainer.global_step)

    def on_train_start(self) -> None:
        """Let the options given win over those in a resumed checkpoint: rate, weight decay, betas."""
        for group, options in zip(self.trainer.optimizers[0].param_groups, self._group_options, strict=True):
            group.update(options)
        self.trainer.lr_scheduler_configs[0].scheduler.step(self.trainer.global_step)

    def on_train_end(self) -> None:
        """Free what graphs keep: evaluation does without, and processes cannot part before."""
        release(self)

    def _create_schedule(self, optimizer: torch.optim.Optimizer) -> Scheduler:
        options = self.schedule_options
        if options.warmup_steps is not None and options.warmup_epochs:
            raise UserError(
                f"the warm-up is given twice: warmup_steps={options.warmup_steps} and "
                f"warmup_epochs={options.warmup_epochs}; set one of them"
            )
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total) and options.name != "constant":
            raise UserError(
                f"a {options.name} schedule needs to know where the run ends, but trainer.max_epochs and "
                "trainer.max_steps are both unlimited; set one of them or schedule.name=constant"
            )
        warmup = options.warmup_steps or 0
        if options.warmup_epochs:
            self.trainer.fit_loop.setup_data()  # no-op where the line above had to load the data
            per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
            warmup = round(options.warmup_epochs * per_epoch)
        total = warmup + 1 if math.isinf(total) else int(total)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched={"linear": "poly"}.get(options.name, options.name),
            decay_rate=1.0,  # the power of poly: a straight line
            num_epochs=total,  # counted in updates: one update an "epoch"
            warmup_epochs=min(warmup, total),
            warmup_lr=options.warmup_lr,
            min_lr=options.min_lr,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        assert scheduler is not None
        return scheduler


class _Stateless:
    """A timm schedule for Lightning, with nothing to save: on resume the rate follows from the step and the options."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.step(0)

    def step(self, num_updates: int) -> None:
        """Set the learning rate of the update that comes after ``num_updates`` updates."""
        self.scheduler.step_update(num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the schedule is a function of the step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing from a checkpoint."""


def create_optimizer(net: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Build an optimizer with parameter groups for weight decay and, if asked for, layer-wise rates.

    Args:
        net: The net; may define ``no_weight_decay()`` (names) and timm's ``group_matcher`` (layers).
        options: Optimizer and group options.

    Raises:
        UserError: If timm knows no optimizer of that name.
    """
    known = [str(name) for name in list_optimizers()]
    if options.name.lower() not in known:
        near = difflib.get_close_matches(options.name.lower(), known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
        raise UserError(f"unknown optimizer {options.name!r}{hint}")
    names = getattr(net, "no_weight_decay", None)
    without = set(names()) if names is not None else set()
    without |= {name for name, p in net.named_parameters() if getattr(p, "_no_weight_decay", False)}
    if options.layer_decay is None:
        groups = param_groups_weight_decay(net, options.weight_decay, no_weight_decay_list=without)
    else:
        groups = param_groups_layer_decay(
            net, options.weight_decay, no_weight_decay_list=without, layer_decay=options.layer_decay
        )
    given: dict[str, Any] = {"betas": options.betas, "eps": options.eps}
    given = {key: value for key, value in given.items() if value is not None}
    given |= {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.name.lower() in ("muon", "nmuon"):
        return Muon(groups, nesterov=options.name.lower() == "nmuon", **given)
    return create_optimizer_v2(groups, options.name, **given)


def _first_tensor(batch: Any) -> Tensor:
    """Return the first tensor in a nested batch."""
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, dict) else batch
    return _first_tensor(next(iter(values)))
