"""Lightning's messages that tell a user nothing, each with the reason why it is left out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)

MESSAGES = (
    "💡 Tip",  # advertises another product
    "GPU available",  # the report and the progress line say what is used
    "TPU available",
    "HPU available",
    "`Trainer.fit` stopped",  # the normal end
    "Restoring states from",  # the user asked for it
    "Restored all states from",
    "Loaded model weights from",
    "Loading `train_dataloader` to estimate",  # how the schedule gets its length
    "Found current_model_state in the checkpoint",  # how an average is resumed
    "Detected KeyboardInterrupt",  # said by ourselves, with how to go on
    "Seed set to",  # in config.yaml and the report
)

WARNINGS = (
    r".*does not have many workers.*",  # the recipe decides; small data is faster without
    r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run goes on in its folder
    r".*Experiment logs directory .* exists and is not empty.*",  # its history is kept and written again
    r".*is smaller than the logging interval.*",  # the epochs' figures are logged all the same
    r".*It is recommended to use `self.log\(.*sync_dist=True.*",  # joined already, or rank 0's alone
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",  # Lightning's own use of torch
)


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith(MESSAGES)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the listed messages out while a command runs; all others are shown."""
    silencer = _Filter()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(silencer)
    try:
        with warnings.catch_warnings():
            for pattern in WARNINGS:
                warnings.filterwarnings("ignore", pattern)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(silencer)
