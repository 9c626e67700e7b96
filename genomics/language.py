"""Training of language models of DNA by next-token prediction.

Legend: B batch, L bases of a window.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric

from core.errors import UserError
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report
from genomics.datasets import IGNORED, GenomeData, targets
from genomics.models import GenomeLM


class LanguageModel(TrainingModule):
    """Next-token prediction of DNA (Nguyen et al. 2023; Gu & Dao 2023, section 4.3).

    Perplexity is per base: exp of the mean loss over every A, C, G and T; the softmax is over all tokens.

    Args:
        d_model: Width of the model.
        n_layer: Number of blocks.
        d_state: State size of each channel.
        d_conv: Width of the causal convolution.
        expand: Inner width over ``d_model``.
        gradient_checkpointing: Compute blocks again in the backward pass instead of keeping their activations.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the model.
    """

    headline = "test/perplexity"
    item_name = "windows"

    def __init__(
        self,
        d_model: int = 128,
        n_layer: int = 8,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        try:
            self.net = GenomeLM(d_model, n_layer, d_state, d_conv, expand)
        except ValueError as error:
            raise UserError(f"--model.{error}") from error
        self.net.set_gradient_checkpointing(gradient_checkpointing)
        self.losses = nn.ModuleDict({"val_": MeanMetric(), "test_": MeanMetric()})

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the bases in windows (B, L + 1); 0 where a batch holds none."""
        total, count = self._summed(batch)
        return total / count.clamp(min=1)

    def _summed(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        wanted = targets(batch)
        logits = self.net(batch[:, :-1]).float()
        total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, (wanted != IGNORED).sum()

    @torch.no_grad()
    def evaluate(self, batch: Tensor, stage: str) -> None:
        """Add the losses of a batch's bases; every base weighs the same."""
        total, count = self._summed(batch)
        self.losses[f"{stage}_"].update(total / count.clamp(min=1), weight=count)  # pyright: ignore

    def batch_tokens(self, batch: Tensor) -> int:
        """Return the number of tokens that are read."""
        return batch[:, 1:].numel()

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity."""
        self._log_losses("val")

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and what Markov chains reach on the same bases."""
        self._log_losses("test")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, GenomeData):
            for name, perplexity in data.baselines().items():
                self.log(f"baseline/{name}", perplexity, rank_zero_only=True)

    def _log_losses(self, stage: str) -> None:
        metric = self.losses[f"{stage}_"]
        loss = metric.compute()  # pyright: ignore
        metric.reset()  # pyright: ignore
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True)

    def add_to_report(self, report: Report) -> None:
        """Add the perplexities beside those of Markov chains, and the data."""
        found = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        rows = [
            {"model": label, "perplexity per base": found[name], "bits per base": float(np.log2(found[name]))}
            for name, label in (
                ("test/perplexity", "this model"),
                ("baseline/markov_0_perplexity", "Markov chain of order 0: the frequency of each base"),
                ("baseline/markov_3_perplexity", "Markov chain of order 3"),
                ("baseline/markov_6_perplexity", "Markov chain of order 6"),
                ("baseline/markov_best_perplexity", "Markov chain of the order up to 10 that is best on the test"),
            )
            if name in found
        ]
        if rows:
            note = "Held-out sequence; the chains are trained on the same bases. A uniform guess has 4."
            report.table("Perplexity on held-out loci", rows, note)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, GenomeData):
            facts = {
                part: f"{sum(map(len, intervals)):,} bases in {len(data.windows[part]):,} windows"
                for part, intervals in data.parts.items()
            }
            report.facts("Data", {"file": data.fasta.path.name, **facts})
