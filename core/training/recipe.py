"""A recipe's run: LightningCLI with a run folder, checks before anything starts, and a test after the training."""

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from core.cli import parse
from core.errors import UserError
from core.parallel.strategies import choose_strategy  # registers fsdp2
from core.parallel.watch import announce_launcher, follow_launcher
from core.training.callbacks import EMA, Checkpoints, ExactResume, Interrupt, LostPeers
from core.training.ending import CODES, Ending
from core.training.folder import RunFolder, find_checkpoint, named, numbered, run_of
from core.training.module import TrainingModule
from core.training.progress import progress_bar
from core.training.record import Record
from core.training.resume import History, WholeFiles, check_checkpoint
from core.training.throughput import Throughput
from core.wording import first_reason

RUNS = Path("runs")


class RecipeCLI(LightningCLI):
    """LightningCLI for one recipe and stage.

    On ``fit --ckpt_path`` the options given win over those stored in the checkpoint, the optimizer's rates and decays
    included; weights, moments, averages, generators and the position in the data come from the checkpoint.

    Args:
        title: Domain and recipe, such as ``vision digits``.
        recipe: The recipe's file.
        root: Folder of the recipe's numbered runs.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
        options: What follows on the command line.
        command: The whole command line, for the record.
        usage: The line that the help starts with.
        module: The training module.
        data: The data module, or the base class of those that recipes may name.
        choose_data: Recipes name a subclass of ``data``.
        links: Attributes of the data module that go into the model's constructor.
    """

    def __init__(
        self,
        title: str,
        recipe: Path,
        root: Path,
        stage: str,
        options: Sequence[str],
        command: str,
        usage: str,
        module: type[TrainingModule],
        data: type[LightningDataModule],
        choose_data: bool,
        links: Mapping[str, str],
    ) -> None:
        self.stage = stage
        self.title = title
        self.root = root
        self.command = command
        self.links = links
        self.folder: RunFolder | None = None
        self.checkpoint: Path | None = None
        stage_parser = {"default_config_files": [str(recipe)], "usage": usage, "exit_on_error": False}
        super().__init__(
            module,
            data,
            args=[stage, *options],
            subclass_mode_data=choose_data,
            save_config_callback=None,  # Record writes it
            trainer_defaults={"enable_model_summary": False},
            auto_configure_optimizers=False,
            parser_kwargs={"allow_abbrev": False, "exit_on_error": False, stage: stage_parser},
        )

    # Options.

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Build the parser of this stage only: each takes a fraction of a second."""
        return {self.stage: LightningCLI.subcommands()[self.stage]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run has beyond model, data and trainer."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of the run instead of the next one."
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="Replace the run that stands in --run_dir once this one trains.",
        )
        parser.add_argument(
            "--ema_decay", type=float | None, default=None, help="Average the weights: test and save the average."
        )
        parser.add_argument(
            "--threads", type=int | None, default=None, help="CPU threads; small nets are fastest with 1. None: all."
        )
        parser.add_argument(
            "--sequence_parallel",
            type=int,
            default=1,
            help="Processes that share each sequence, every one a part of it: for sequences too long for one device.",
        )
        parser.add_argument(
            "--tensor_parallel",
            type=int,
            default=1,
            help="Processes that share the layers of Mamba-2 models by heads: for models too large for one device.",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="After fit, test the best checkpoint (the last, without one).",
        )
        for source, target in self.links.items():
            parser.link_arguments(source, target, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Say what ``--ckpt_path`` means here: Lightning's text is about its own search."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:
            if action.dest == "ckpt_path":
                action.help = (
                    "A checkpoint file, or last or best: of the recipe's newest run that has one (of --run_dir, if "
                    "given). fit goes on in that run's folder, unless --run_dir names another, and the options given "
                    "now win over those it began with."
                )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; the base class warns whenever args are given, and DDP needs sys.argv as it is."""
        self.config = parse(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: the base class puts the checkpoint's hyper-parameters over the options."""

    def _option(self, name: str) -> Any:
        return self._get(self.config, name)

    # Building.

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what they refuse, and packages they lack, come of the options given."""
        if (threads := self._option("threads")) is not None:
            if threads < 1:
                raise UserError(f"--threads is {threads}; it must be at least 1, or null for all")
            torch.set_num_threads(threads)
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except (ValueError, ModuleNotFoundError) as error:
            raise UserError(first_reason(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with what belongs to every run; the folder goes again if that fails."""
        try:
            return self._build_trainer(**kwargs)
        except BaseException:
            if self.folder is not None:
                self.folder.discard()
            raise

    def _build_trainer(self, **kwargs: Any) -> Trainer:
        stage = str(self.subcommand)
        self._choose_strategy()
        fast = bool(self._option("trainer").get("fast_dev_run"))
        run_dir = Path(self._option("run_dir")) if self._option("run_dir") else None
        if wanted := self._option("ckpt_path"):
            self.checkpoint = find_checkpoint(wanted, self.root, run_dir if wanted in ("best", "last") else None)
            check_checkpoint(self.checkpoint, self.model, resume=stage == "fit")
            self.config_init[stage]["ckpt_path"] = str(self.checkpoint)
        elif stage != "fit" and is_rank_zero():
            print(f"no --ckpt_path: {stage} takes the weights that the model is built with")
        if is_rank_zero() and not fast:
            self.folder = self._claim_folder(run_dir)
            self.folder.mark({"status": "running", "command": self.command})
        callbacks = self._callbacks(fast)
        loggers = [] if fast else self._loggers(self._get(self.config_init, "trainer")["logger"])
        checkpoint = self._get(self.config_init, "checkpoint")
        if fast:
            checkpoint.save_last = False  # Lightning would write it to the working directory
        if checkpoint.dirpath is None and self.folder is not None:
            checkpoint.dirpath = str(self.folder.checkpoints)
        if checkpoint.filename == "best" and checkpoint.save_top_k not in (0, 1):
            checkpoint.filename = "epoch{epoch}-step{step}"
        given = self._get(self.config_init, "trainer")["callbacks"] or []
        own = [*(given if isinstance(given, list) else [given]), *callbacks]
        if self._get(self.config_init, "trainer")["plugins"] is None:
            kwargs["plugins"] = [WholeFiles()]
        place = str(self.folder.path) if self.folder is not None else None
        try:
            return super().instantiate_trainer(callbacks=own, logger=loggers, default_root_dir=place, **kwargs)
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise UserError(f"the trainer's options do not go together: {error}") from error

    def _choose_strategy(self) -> None:
        """Put our strategy in the place of its name."""
        trainer, ema = self._get(self.config_init, "trainer"), self._option("ema_decay")
        sequence, tensor = self._option("sequence_parallel"), self._option("tensor_parallel")
        trainer["strategy"] = choose_strategy(trainer["strategy"], sequence, tensor, self.model, ema is not None)

    def _claim_folder(self, run_dir: Path | None) -> RunFolder:
        run = run_of(self.checkpoint) if self.checkpoint is not None and self.subcommand == "fit" else None
        if run is not None and (run_dir is None or run_dir.resolve() == run):
            return RunFolder(_shorter(run), resumed=True)
        if run_dir is not None:
            if (
                self.checkpoint is not None
                and self._option("overwrite")
                and run_of(self.checkpoint) == run_dir.resolve()
            ):
                raise UserError(f"--overwrite would remove {self.checkpoint}; name another --run_dir")
            return named(run_dir, self._option("overwrite"))
        return numbered(self.root)

    def _callbacks(self, fast: bool) -> list[Any]:
        """Callbacks that belong to every run; Lightning moves checkpoints behind the others."""
        config = self._get(self.config_init, "trainer")
        callbacks: list[Any] = [Throughput(), ExactResume()]
        if config["enable_progress_bar"] is not False:
            callbacks.append(progress_bar())
        if (decay := self._option("ema_decay")) is not None:
            if not 0 < decay < 1:
                raise UserError(f"--ema_decay is {decay}; it must lie between 0 and 1, such as 0.9999, or be null")
            callbacks.append(EMA(decay))
        history = self.folder.path / "logs" if self.folder is not None else None
        record = Record(self.folder, self.title, self.command, self._write_config, history)
        interrupt = Interrupt(self.folder.checkpoints if self.folder is not None else None)
        self.ending = Ending(self.command, self.folder, record, interrupt)
        return [*callbacks, record, interrupt, LostPeers(self.ending.end_lost)]

    def _loggers(self, given: Any) -> list[Logger]:
        """CSV and TensorBoard unless the recipe names others; the CSV is what the report draws."""
        if given is False:
            return []
        place = self.folder.path if self.folder is not None else self.root
        history = History(place / "logs", self.checkpoint if self.folder is not None and self.folder.resumed else None)
        if given is None or given is True:
            return [history, TensorBoardLogger(place, name="logs", version="", default_hp_metric=False)]
        return [history, *(given if isinstance(given, list) else [given])]

    def _write_config(self, path: Path) -> None:
        """Write the resolved options; ``--config`` with this file runs the same again, in a folder of its own."""
        parser, config = self._parser(self.subcommand), self.config[str(self.subcommand)].clone()
        config.run_dir, config.overwrite = None, False
        parser.save(config, path, skip_unset=False, overwrite=True, multifile=False)

    # Running.

    def _run_subcommand(self, subcommand: str) -> None:
        """Wait: the base class would run from its constructor."""

    def execute(self) -> None:
        """Run the stage, write what the run leaves, and print it; on Ctrl-C as far as it came.

        Raises:
            SystemExit: With code 130, if the run was stopped from outside.
        """
        try:
            announce_launcher()
            follow_launcher(self.ending.go_on)
            with warnings.catch_warnings():
                if self.subcommand != "fit":  # nothing is saved, so it does not matter where the best one stands
                    warnings.filterwarnings("ignore", ".*The dirpath has changed.*")
                super()._run_subcommand(str(self.subcommand))
        except BaseException as error:
            end = Ending.of(error, self.trainer)
            if end == "lost":  # at once: a launcher that notices ends this process too
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
                self.ending.say_lost(self.trainer, reason)
            self._finish("interrupted" if end == "interrupted" else "failed")
            if isinstance(error, MisconfigurationException):
                raise UserError(str(error)) from error
            if end in CODES:
                raise SystemExit(CODES[end]) from None
            raise
        self._finish("finished")

    def _finish(self, status: str) -> None:
        figures = "val/" if self.subcommand == "validate" else "test/"
        self.ending.finish(status, self.trainer, self.model, self._option("seed_everything"), figures)

    def after_fit(self) -> None:
        """Test the best weights, so that the run has a figure on data it never chose by."""
        wanted = self._option("test_after_fit") and not self._option("trainer").get("fast_dev_run")
        if not wanted or not is_overridden("test_dataloader", self.datamodule, LightningDataModule):
            return
        best = self._get(self.config_init, "checkpoint").best_model_path
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)

    def validate(self, **kwargs: Any) -> None:
        """Validate without Lightning's table: the figures are printed at the end."""
        self.trainer.validate(**{**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """Test without Lightning's table: the figures are printed at the end."""
        self.trainer.test(**{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write the rows to ``predictions.csv``."""
        if self.trainer.world_size > 1:
            raise UserError(f"predict runs on one device, got {self.trainer.world_size}; give --trainer.devices 1")
        batches = self.trainer.predict(**{**kwargs, "return_predictions": True})
        rows = [row for batch in batches or [] for row in batch]
        if self.folder is not None and rows:
            with (self.folder.path / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)


def is_rank_zero() -> bool:
    """Tell whether this is the process that writes, before there is a trainer to ask."""
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", 0)))
    return getattr(rank_zero_only, "rank", 0) == 0 and node == 0


def _shorter(path: Path) -> Path:
    """Return a path relative to the working directory where it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
