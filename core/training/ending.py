"""How a run ends: what it leaves and prints when it is done, stopped, or has lost another process."""

import re
import sys

from lightning import Trainer

from core.parallel.watch import lost_peer
from core.training.callbacks import Interrupt
from core.training.folder import RunFolder
from core.training.module import TrainingModule
from core.training.record import Record

CODES = {"interrupted": 130, "lost": 1}  # exit codes of ends that need no traceback


class Ending:
    """Writes what a run leaves, and says how to go on.

    Args:
        command: The whole command line.
        folder: The run's folder; None on processes other than rank 0, and where nothing is kept.
        record: The run's figures.
        interrupt: What saves on Ctrl-C.
    """

    def __init__(self, command: str, folder: RunFolder | None, record: Record, interrupt: Interrupt) -> None:
        # Without where this run went on from, and without what it replaced.
        self._resume = re.sub(r" --(ckpt_path|overwrite)[ =]('[^']*'|\S+)", "", command) + " --ckpt_path"
        self.go_on = f"go on from the last checkpoint, if there is one: {self._resume} last"
        self._command, self._folder = command, folder
        self._record, self._interrupt = record, interrupt

    @staticmethod
    def of(error: BaseException, trainer: Trainer) -> str:
        """``interrupted`` from outside, ``lost`` another process, or ``failed``: what an error means."""
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and trainer.interrupted):
            return "interrupted"
        return "lost" if trainer.world_size > 1 and lost_peer(error) else "failed"

    def say_lost(self, trainer: Trainer, reason: str) -> None:
        """Print that another process is gone, and how to go on."""
        print(
            f"error: process {trainer.global_rank} of {trainer.world_size} lost another one, which has died or failed "
            f"({reason}); {self.go_on}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def end_lost(self, trainer: Trainer, reason: str) -> None:
        """Say it from a thread, as the process ends at once; the run has failed."""
        self.say_lost(trainer, reason)
        if self._folder is not None:
            self._folder.mark({"status": "failed", "command": self._command})

    def finish(self, status: str, trainer: Trainer, model: TrainingModule, seed: object, figures: str) -> None:
        """Write what the run leaves, and print it; where nothing ran, nothing is left.

        Args:
            status: ``finished``, ``interrupted`` or ``failed``.
            trainer: The trainer that ran.
            model: Its module.
            seed: The run's seed.
            figures: What the names of those figures begin with that are printed, beside tests and baselines.
        """
        if status == "finished" and model.shares_weights:
            model.net = model.gather_net()  # the report may run it, on rank 0 alone
        if self._folder is None:
            return
        if not self._folder.started:
            self._folder.discard()
            print("stopped before the first step; nothing is kept" if status == "interrupted" else "", end="")
            return
        for logger in trainer.loggers:
            logger.save()
        self._record.finish(status, trainer, model, seed)
        for name, value in sorted(self._record.metrics.items()):
            if name.startswith(("test/", "baseline/", figures)):
                print(f"{name} {'-' if value is None else format(value, '.4f')}")
        if status == "interrupted" and self._interrupt.saved is not None:
            print(f"stopped; go on with: {self._resume} {self._interrupt.saved}")
        if status != "failed":
            print(self._folder.path, flush=True)
