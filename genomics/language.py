"""Training of language models of DNA by next-token prediction.

Legend: B batch, L bases of a window.
"""

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torchmetrics.aggregation import MeanMetric

from core.errors import UserError
from core.parallel.group import active, mean_share
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report
from genomics.datasets import IGNORED, GenomeData, targets
from genomics.memory import describe_memory
from genomics.models import MixerName, Objective, build_lm
from genomics.vocabulary import MASK, A, T

MASKED_SHARE = 0.15
POSITIONS = 32  # powers of two that positions are counted by


class LanguageModel(TrainingModule):
    """Language models of DNA: next tokens (Nguyen et al. 2023; Gu & Dao 2023, section 4.3) or masked ones (Schiff et
    al. 2024, section 4.1).

    Perplexity is per base: exp of the mean loss over every A, C, G and T (of the masked ones, for masked models); the
    softmax is over all tokens.

    Args:
        d_model: Width of the model.
        n_layer: Number of blocks.
        d_state: State size of each channel; of Mamba.
        d_conv: Width of the causal convolution; of Mamba and Mamba-2.
        expand: Inner width over ``d_model``; of Mamba.
        mixer: Which layer mixes the sequence: mamba, mamba2, mamba3, hyena (HyenaDNA) or attention.
        attention_layers: Blocks of a causal Mamba that hold attention instead, counted from 0.
        objective: Predict the next token (causal) or masked ones, from both sides (masked: Caduceus).
        rcps: Masked models only: reverse-complement equivariant (Caduceus-PS).
        context: Longest sequence of a Hyena model; follows the data's window.
        gradient_checkpointing: Compute blocks again in the backward pass instead of keeping their activations.
        offload: Keep activations in the computer's memory instead of the GPU's.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the model.
    """

    headline = "test/perplexity"
    item_name = "windows"
    cuts_sequences = True

    def __init__(
        self,
        d_model: int = 128,
        n_layer: int = 8,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        mixer: MixerName = "mamba",
        objective: Objective = "causal",
        rcps: bool = False,
        attention_layers: list[int] | None = None,
        context: int = 1024,
        gradient_checkpointing: bool = False,
        offload: bool = False,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        try:
            self.net = build_lm(
                mixer, objective, d_model, n_layer, d_state, d_conv, expand, rcps, attention_layers or (), context + 2
            )
        except ValueError as error:
            raise UserError(f"--model.{error}") from error
        self.net.set_gradient_checkpointing(gradient_checkpointing)
        self.masked, self.recompute, self.offload = objective == "masked", gradient_checkpointing, offload
        self.losses = nn.ModuleDict({"val_": MeanMetric(), "test_": MeanMetric()})
        self.by_position = torch.zeros(2, POSITIONS, dtype=torch.float64)  # nats and bases, by power of two

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the bases in windows (B, L + 1); 0 where a batch holds none."""
        keep = save_on_cpu(pin_memory=self.device.type == "cuda") if self.offload else nullcontext()
        with keep:
            nats, wanted = self._nats(batch, None)
        return mean_share(nats.sum(), (wanted != IGNORED).sum(), everywhere=self.training)

    def _nats(self, batch: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """Loss of each position (B, L) of this process's part, 0 where none is wanted, and what is wanted."""
        if self.masked:
            generator = None if seed is None else torch.Generator(batch.device).manual_seed(seed)
            ids, wanted = mask_bases(batch[:, 1:], generator)
        else:
            ids, wanted = batch[:, :-1], targets(batch)
        if (group := active()) is not None:
            ids, wanted = group.shard(ids), group.shard(wanted)
        logits = self.net(ids).float()
        nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
        return nats.view(wanted.shape), wanted

    @torch.no_grad()
    def evaluate(self, batch: Tensor, stage: str) -> None:
        """Add the losses of a batch's bases; every base weighs the same. Masks follow from the batch alone."""
        nats, wanted = self._nats(batch, int(batch.sum()))
        count = (wanted != IGNORED).sum()
        self.losses[f"{stage}_"].update(nats.sum() / count.clamp(min=1), weight=count)  # pyright: ignore
        if stage == "test":
            group = active()
            before = 0 if group is None else group.bounds(batch.shape[1] - 1)[0]  # of this part in the windows
            bins = (before + torch.arange(1, nats.shape[1] + 1, device=nats.device)).log2().floor().long()
            found = torch.stack([nats.sum(0), (wanted != IGNORED).sum(0)]).double()
            self.by_position += (
                torch.zeros(2, POSITIONS, dtype=torch.float64, device=nats.device)
                .index_add_(1, bins, found)
                .to(self.by_position.device)
            )

    def on_fit_start(self) -> None:
        """Print how much memory a step will need."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, GenomeData) and self.trainer.is_global_zero and not self.shares_weights:
            tokens = data.batch_size * data.window // getattr(self.trainer.strategy, "sequence", 1)
            print(describe_memory(self.net, tokens, self.recompute, self.offload, str(self.trainer.precision)))

    def batch_tokens(self, batch: Tensor) -> int:
        """Return the number of tokens that are read."""
        return batch[:, 1:].numel()

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity."""
        self._log_losses("val")

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and what Markov chains reach on the same bases."""
        self._log_losses("test")
        self.by_position = self.trainer.strategy.reduce(self.by_position.to(self.device), reduce_op="sum").cpu()
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
        nats, bases = self.by_position
        places = [
            {
                "position in the window": f"{2**i:,} to {2 ** (i + 1) - 1:,}",
                "perplexity": float((nats[i] / bases[i]).exp()),
            }
            for i in range(POSITIONS)
            if bases[i]
        ]
        if places:
            report.table("Perplexity by position", places, "What more context is worth: all windows of the test.")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, GenomeData):
            facts = {
                part: f"{sum(map(len, intervals)):,} bases in {len(data.windows[part]):,} windows"
                for part, intervals in data.parts.items()
            }
            if lost := sum(data.left_out.values()):
                facts["left out"] = f"{lost:,} windows that reach into another part"
            report.facts("Data", {"file": data.fasta.path.name, **facts})


def mask_bases(ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Choose 15 % of the bases to predict: of these 80 % become [MASK], 10 % a random base, 10 % stay (BERT's rule).

    N and padding are never chosen; unlike in published code, replacements are bases, not any token.

    Args:
        ids: (B, L) int64.
        generator: Source of randomness; the global one by default.

    Returns:
        What the model reads, and the chosen tokens, ``IGNORED`` elsewhere; both (B, L).
    """
    draw, kind = (torch.rand(ids.shape, generator=generator, device=ids.device) for _ in range(2))
    other = torch.randint(A, T + 1, ids.shape, generator=generator, device=ids.device)
    chosen = (draw < MASKED_SHARE) & (ids >= A) & (ids <= T)
    read = torch.where(chosen & (kind < 0.8), MASK, torch.where(chosen & (kind >= 0.9), other, ids))
    return read, ids.masked_fill(~chosen, IGNORED)
