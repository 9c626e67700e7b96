"""What happens around the steps of a run: averaged weights, exact resume, Ctrl-C."""

import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from core.parallel.watch import Peers
from core.training.rng import ResumableLoader, rng_state, set_rng_state

LOOKS = 8  # steps after which processes with shared weights tell each other of Ctrl-C


class EMA(WeightAveraging):
    """Exponential moving average of the weights: validated, saved in ``state_dict``, and left in the net at the end.

    Args:
        decay: Weight of the old average at each step, such as 0.9999.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(use_buffers=True)
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the average where the weights will be: they move there only after this hook."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step's weights in, all at once: the host neither waits for a GPU nor goes from tensor to tensor."""
        if trainer.global_step <= self._latest_update_step:  # gradients are still being accumulated
            return
        average = self._average_model
        assert average is not None
        old, new = ([*itertools.chain(m.parameters(), m.buffers())] for m in (average.module, pl_module))
        mixed = [t.is_floating_point() and self._latest_update_step > 0 for t in old]
        if any(mixed):
            pairs = [(a, b) for a, b, mix in zip(old, new, mixed, strict=True) if mix]
            torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - self.decay)  # pyright: ignore
        for a, b, mix in zip(old, new, mixed, strict=True):
            if not mix:
                a.copy_(b)
        average.n_averaged += 1
        self._latest_update_step = trainer.global_step

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the averaged weights in."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back where validation was broken off, so that a checkpoint is not mixed up."""
        if self._swapped:
            self.on_validation_epoch_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average when training goes on.

        For a test the checkpoint stays as it is: its ``state_dict`` is the average. The base class would put the raw
        weights in their place whenever the same trainer has trained before.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class Checkpoints(ModelCheckpoint):
    """Lightning's checkpoints, but ``last.ckpt`` is that of the last validation, not of the last of the best ones."""

    __qualname__ = "ModelCheckpoint"  # under which a checkpoint keeps this callback's state

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due, and the last one in any case."""
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due, and the last one in any case."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)

    def _keep_last(self, trainer: Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):  # true where it was saved just now
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class ExactResume(Callback):
    """Keeps the random generators and the position in the data in each checkpoint, and restores them.

    A resumed run then takes the same steps as one that never stopped. In the middle of an epoch that needs a
    ``ResumableLoader``; with several processes each takes over the generators of rank 0.
    """

    def __init__(self) -> None:
        self._loader_state: dict[str, Any] | None = None
        self._built = rng_state()  # once data and model are there

    def state_dict(self) -> dict[str, Any]:
        """Return generators and position."""
        loader = self._loader
        return {"rng": rng_state(), "loader": loader.state_dict() if loader is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the generators now: the next draw is the loader's."""
        set_rng_state(state_dict["rng"])
        self._loader_state = state_dict["loader"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer, which ``state_dict`` is not given; begin with the generators of a single process."""
        self._trainer = trainer
        if stage == "fit" and trainer.world_size > 1:  # strategies seed anew when the processes join
            set_rng_state(self._built)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the loader where it was; its iterator starts with the first batch."""
        loader = self._loader
        if self._loader_state is not None and loader is not None:
            loader.load_state_dict(self._loader_state)
            if loader.resumed is not None:  # another number of processes counts other batches
                progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
                progress.ready = progress.started = progress.processed = progress.completed = loader.resumed
        self._loader_state = None

    @property
    def _loader(self) -> ResumableLoader | None:
        loader = self._trainer.train_dataloader
        return loader if isinstance(loader, ResumableLoader) else None


class Interrupt(Checkpoint):
    """Ctrl-C ends a run after the step in hand, with ``last.ckpt`` saved; a second Ctrl-C ends it at once.

    A checkpoint written in the middle of a step could not be resumed exactly. It is a ``Checkpoint`` so that it comes
    last among the callbacks: the average and the rates of the step are then up to date. With several processes SIGTERM
    is answered likewise.

    Args:
        folder: Folder for ``last.ckpt``; None on processes other than rank 0.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.saved: Path | None = None
        self._asked = False
        self._old: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the signal over; processes other than rank 0 leave the decision to rank 0."""
        if threading.current_thread() is not threading.main_thread() or self._old is not None:
            return
        handler = self._ask if trainer.is_global_zero else signal.SIG_IGN
        self._old = signal.signal(signal.SIGINT, handler)
        if trainer.world_size > 1:
            self._take_sigterm(trainer)

    def _take_sigterm(self, trainer: Trainer) -> None:
        """Treat SIGTERM as Ctrl-C where there are several processes.

        Lightning's handler would broadcast, in the middle of whatever collective the signal meets: the job then hangs.
        So that others hear of it, each of its steps waits for the GPU.
        """
        ask: Any = self._ask if trainer.is_global_zero else lambda signum, frame: None
        trainer._signal_connector._sigterm_notifier_fn = ask  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signal back."""
        self._restore()

    def _restore(self) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
            self._old = None

    def _ask(self, signum: int, frame: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping after this step (Ctrl-C again: at once)", flush=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if asked to."""
        stop = self._asked
        if _shared(trainer):  # all processes save together, so that all must know; to ask makes the host wait
            due = trainer.global_step % LOOKS == 0
            stop = due and trainer.strategy.reduce_boolean_decision(self._asked, all=False)
        if stop:
            trainer._logger_connector.update_train_step_metrics()  # comes after this hook otherwise: the step's figures
            self._save(trainer)
            raise KeyboardInterrupt

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop, if asked to; ``on_exception`` saves. Processes with shared weights stop in training alone."""
        if self._asked and not _shared(trainer):
            raise KeyboardInterrupt

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop, if asked to."""
        if self._asked:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained if the run was stopped from outside."""
        stopped = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        trained = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        # With shared weights a process cannot save alone, and the others know nothing of what stopped this one.
        if stopped and trained and self.saved is None and not _shared(trainer):
            self._save(trainer)
        self._restore()

    def _save(self, trainer: Trainer) -> None:
        shared = _shared(trainer)
        if not shared and (self.folder is None or not trainer.is_global_zero):
            return
        # Not trainer.save_checkpoint: it waits for the other processes, which know nothing of the signal.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        path = self.folder / "last.ckpt" if self.folder is not None else Path("last.ckpt")  # of rank 0, which writes
        trainer.strategy.save_checkpoint(checkpoint, path)
        self.saved = path


class LostPeers(Callback):
    """Ends a process that waits for one which has died. NCCL waits for minutes, and no exception reaches the wait.

    Args:
        say: Called before the end, with the trainer and what has happened.
    """

    def __init__(self, say: Callable[[Trainer, str], None]) -> None:
        self._say = say
        self._peers: Peers | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch."""
        if trainer.world_size > 1:
            self._peers = Peers(functools.partial(self._end, trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the others go once all have come this far."""
        if self._peers is not None:
            trainer.strategy.barrier()
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the end to the exception."""
        self._stop()

    def _stop(self) -> None:
        if self._peers is not None:
            self._peers.stop()
            self._peers = None

    def _end(self, trainer: Trainer, rank: int) -> None:
        self._say(trainer, f"process {rank} is gone")
        os._exit(1)


def _shared(trainer: Trainer) -> bool:
    """Whether no process has all weights."""
    return bool(getattr(trainer.strategy, "shares_weights", False))
