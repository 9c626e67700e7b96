"""Training of classifiers that tell from a read which species it is of.

Legend: B batch, L bases of a read, K classes.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from core.errors import UserError
from core.training.module import OptimizerOptions, ScheduleOptions, TrainingModule
from core.training.report import Report
from genomics.generative import Goal, build_classifier
from genomics.models import GenomeClassifier, Pooling, load_backbone
from genomics.species import SpeciesData

KNOWN_AND_UNSEEN = {
    "panel": ("reads of known loci from unseen individuals", "reads of loci never seen"),
    "genomes": ("segments of the chromosomes that trained", "segments of chromosomes never seen"),
}
NEAR_CHANCE = 0.1  # accuracy above chance that is still called near
WHY_NEAR_CHANCE = """\
Close relatives such as the great apes differ in 1 to 3 of 100 bases, and a difference at one locus says nothing about
another. What a model learns on a panel are the alleles of that panel. What marks a species everywhere in its genome,
its composition, is so faint among such relatives that it takes whole genomes to learn and very long reads to see; the
k-mer regression beside it finds as little. A high accuracy here would point to a leak, such as N or lower case, of
which every assembly has its own share: the reads hold neither.
"""


class SpeciesClassifier(TrainingModule):
    """Which species is a read from? Trained on simulated reads (see ``genomics.reads``).

    Args:
        num_classes: Number of species.
        d_model: Width of the model.
        n_layer: Number of blocks.
        d_state: State size of each channel.
        d_conv: Width of the causal convolution.
        expand: Inner width over ``d_model``.
        goal: What is learnt: the species, from pooled positions (discriminative), or each species' reads, base by base,
            the answer being the species under which a read is likeliest (generative, see ``genomics.generative``).
        pooling: Of discriminative models, what stands for a read: the maximum or mean over its positions, or the last
            one.
        kmer: Bases of the k-mers that the model reads beside single bases, each with a vector of its own; 0 is none.
        kmer_width: Width of these vectors, of which there are 4^kmer.
        language: Of discriminative models, weight of a second loss, nats of the next base. It is in ``train/loss``.
        average_strands: Score both strands when evaluating, and average.
        pretrained: Checkpoint or run folder of ``genomics.pretrain``, a causal Mamba of the same sizes, whose backbone
            to start from. ``genomics.finetune`` starts from any model.
        gradient_checkpointing: Compute blocks again in the backward pass instead of keeping their activations.
        optimizer: The optimizer and its parameter groups.
        schedule: The learning rate over the run.
        compile: Compile the model.

    Raises:
        UserError: For sizes that do not fit, and a checkpoint of another model.
    """

    headline = "test/accuracy"
    item_name = "reads"

    def __init__(
        self,
        num_classes: int = 4,
        d_model: int = 64,
        n_layer: int = 2,
        d_state: int = 4,
        d_conv: int = 12,
        expand: int = 2,
        goal: Goal = "discriminative",
        pooling: Pooling = "max",
        kmer: int = 0,
        kmer_width: int = 64,
        language: float = 0.0,
        average_strands: bool = True,
        pretrained: str | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerOptions = OptimizerOptions(),
        schedule: ScheduleOptions = ScheduleOptions(),
        compile: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, compile)
        sizes = {"d_model": d_model, "n_layer": n_layer, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        try:
            self.net: GenomeClassifier = build_classifier(
                goal, num_classes, pooling, average_strands, language, kmer, kmer_width, **sizes
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"--model.{error}") from error
        for layer in self.net.backbone.layers:
            layer.gradient_checkpointing = gradient_checkpointing
        if pretrained is not None:
            load_backbone(self.net, pretrained)
        stages = ("val", "known", "unseen")
        self.confusion = nn.ModuleDict({stage: MulticlassConfusionMatrix(num_classes) for stage in stages})

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The net's loss of reads (B, L) and their species (B,): of the species, or of a base."""
        ids, species, _ = batch
        return self.net.loss(ids, species)

    def compiled_part(self) -> nn.Module:
        """Return the backbone: the loss does without the net's own forward."""
        return self.net.backbone

    @torch.no_grad()
    def evaluate(self, batch: tuple[Tensor, Tensor, Tensor], stage: str) -> None:
        """Count right and wrong answers, the two protocols of the test apart."""
        ids, species, known = batch
        logits = self.net(ids)
        if stage == "val":
            self.log_mean("val/loss", F.cross_entropy(logits, species), batch)
            self.confusion["val"].update(logits, species)  # pyright: ignore
            return
        for name, chosen in (("known", known), ("unseen", ~known)):
            if chosen.any():
                self.confusion[name].update(logits[chosen], species[chosen])  # pyright: ignore

    def batch_tokens(self, batch: tuple[Tensor, Tensor, Tensor]) -> int:
        """Return the number of bases."""
        return batch[0].numel()

    def predict(self, batch: tuple[Tensor, Tensor, Tensor]) -> list[dict[str, Any]]:
        """Return protocol, species, prediction and its probability of each read."""
        ids, species, known = batch
        shares, guesses = self.net(ids).softmax(1).max(1)
        names = self._data.class_names
        rows = zip(known.tolist(), species.tolist(), guesses.tolist(), shares.tolist(), strict=True)
        return [
            {"loci": "known" if k else "unseen", "species": names[s], "predicted": names[g], "probability": round(p, 4)}
            for k, s, g, p in rows
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the names of the classes: ``genomics.predict`` writes them."""
        checkpoint["hyper_parameters"]["class_names"] = list(self._data.class_names)

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.confusion["val"].reset()  # pyright: ignore

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy."""
        self.log("val/accuracy", self._accuracy("val"), prog_bar=True)

    def on_test_epoch_start(self) -> None:
        """Start counting afresh."""
        for name in ("known", "unseen"):
            self.confusion[name].reset()  # pyright: ignore

    def on_test_epoch_end(self) -> None:
        """Log and print the accuracies of both protocols, beside those of simple methods on the same reads."""
        self.log("test/accuracy", self._accuracy("known"))
        self.log("test/unseen_loci_accuracy", self._accuracy("unseen"))
        if self.trainer.is_global_zero:  # the baselines of a large panel take minutes
            known, unseen = (_percent(self._accuracy(name)) for name in ("known", "unseen"))
            print(f"accuracy: known loci {known}, loci never seen {unseen}; now the baselines", flush=True)
        for name, accuracy in self._data.baselines().items():
            self.log(f"baseline/{name}", accuracy, rank_zero_only=True)
        if self.trainer.is_global_zero:
            print(_text_table(self._rows()), flush=True)

    def add_to_report(self, report: Report) -> None:
        """Add accuracies beside the baselines, confusion matrices, and where the loci lie."""
        data = self._data
        if "test/accuracy" not in self.trainer.callback_metrics:
            return
        note = f"The regression counts {data.kmer_length}-mers of both strands, the length that was best in validation."
        report.table("Accuracy", self._rows(), note)
        if float(self._accuracy("unseen")) < 1 / data.num_classes + NEAR_CHANCE:
            report.text("Why loci never seen are near chance", WHY_NEAR_CHANCE)
        short = ("known loci, unseen individuals", "loci never seen")
        for name, title in zip(("known", "unseen"), short if data.loci else KNOWN_AND_UNSEEN["genomes"], strict=True):
            counts = self.confusion[name].compute().cpu().numpy()  # pyright: ignore
            report.figure(
                f"Confusion matrix: {title}", draw_confusion(counts, data.class_names), "Rows are the true species."
            )
        report.facts("Reads", _facts(data))
        if data.loci is None:
            return
        names = ["all species"] if data.homologous else data.class_names
        rows = [dict(zip(names, map(str, place), strict=False)) for place in data.loci[0].places]
        report.table("The panel", rows, "Loci that training and test reads of the first protocol come from.")

    def _accuracy(self, name: str) -> Tensor:
        counts = self.confusion[name].compute().float()  # pyright: ignore
        return counts.diagonal().sum() / counts.sum().clamp(min=1)

    def _interval(self, name: str) -> tuple[float, float]:
        counts = self.confusion[name].compute()  # pyright: ignore
        return wilson_interval(int(counts.diagonal().sum()), int(counts.sum()))

    def _rows(self) -> list[dict[str, Any]]:
        found = self.trainer.callback_metrics
        titles = KNOWN_AND_UNSEEN["genomes" if self._data.loci is None else "panel"]
        lines = zip(titles, ("accuracy", "unseen_loci_accuracy"), ("known", "unseen"), strict=True)
        return [
            {
                "protocol": title,
                "model": _percent(found[f"test/{name}"]),
                "95 % interval": "{:.1f} to {:.1f} %".format(*(100 * bound for bound in self._interval(stage))),
                "k-mer logistic regression": _percent(found[f"baseline/kmer_{name}"]),
                **({"exact 31-mer vote": _percent(found[vote])} if (vote := f"baseline/vote_{name}") in found else {}),
                "chance": _percent(found[f"baseline/chance_{name}"]),
            }
            for title, name, stage in lines
        ]

    @property
    def _data(self) -> SpeciesData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SpeciesData)
        return data


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Interval that holds the true share of right answers with 95 % confidence (Wilson 1927), for any share.

    Args:
        right: Right answers.
        total: All answers, at least 1.
        z: Quantile of the normal distribution: another confidence.
    """
    share = right / total
    middle, spread = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    scale = 1 + z * z / total
    return (middle - spread) / scale, (middle + spread) / scale


def _percent(value: Tensor) -> str:
    return f"{100 * float(value):.1f} %"


def _text_table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _facts(data: SpeciesData) -> dict[str, Any]:
    if data.loci is None:
        sizes = {p: sum(len(i) for region in regions for i in region) for p, regions in data.parts.items()}
        return {
            "species": ", ".join(data.class_names),
            "bases": ", ".join(f"{size:,} in {part}" for part, size in sizes.items()),
            "segment": f"{data.read_length:,} bases without N, any start, either strand; case is not read",
        }
    panel, rest = data.loci
    kind = (
        "homologous: records with one name in all species"
        if data.homologous
        else "random windows of each species by itself, so that reads are told apart by place as well as by species"
    )
    return {
        "species": ", ".join(data.class_names),
        "loci": f"{len(panel)} in the panel, {len(rest)} never seen; {kind}",
        "locus": f"{panel.bases.shape[2]:,} bases without N; case is not read",
        "read": f"{data.read_length:,} bases, any start, either strand, {100 * data.error_rate:g} % errors",
        "individuals": f"{data.individuals['train']} a species in training, {data.individuals['test']} others in the "
        f"test, each with {100 * data.mutation_rate:g} % of its reference's bases mutated",
    }


def draw_confusion(counts: np.ndarray, names: list[str]) -> Figure:
    """Draw a confusion matrix with the counts written in.

    Args:
        counts: (K, K), rows are the true classes.
        names: The classes.
    """
    side = float(np.clip(0.8 * len(names), 3, 9))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for i, j in np.ndindex(counts.shape):
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color="w" if shares[i, j] > 0.5 else "k", size=8)
    return figure
