"""Fine-tunes a model on labelled sequences: ``python -m genomics.finetune DATA`` with cross-validation.

Legend: B sequences, L bases, D model width, K classes.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from core.cli import run
from core.errors import UserError
from core.training.report import Report
from genomics.baselines import kmer_accuracies
from genomics.generative import Goal, build_classifier
from genomics.inference import load_model
from genomics.kmers import MOST_BASES
from genomics.labelled import Labelled, families, folds, read_labelled
from genomics.models import GenomeClassifier, Pooling, load_backbone
from genomics.output import Results, progress
from genomics.pretrained import PretrainedClassifier, check_fits
from genomics.vocabulary import PAD

Classifier = GenomeClassifier | PretrainedClassifier


def finetune(
    data: str,
    pretrained: str | None = None,
    d_model: int = 64,
    n_layer: int = 2,
    d_state: int = 4,
    d_conv: int = 12,
    goal: Goal = "discriminative",
    pooling: Pooling = "max",
    kmer: int = 0,
    cross_validation: int = 5,
    homology: bool = True,
    epochs: int = 10,
    lr: float = 2e-3,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
    out: str | None = None,
) -> None:
    """Trains a classifier once a fold, each tested on its fold, or on the data set's own test part where there is one.

    The epoch is chosen on a tenth of the training part. folds.tsv has accuracy, macro F1 and Matthews correlation of
    each fold, predictions.tsv every answer; beside them stands a k-mer logistic regression of the same folds.
    The folds' models are not kept.

    Args:
        data: Folder of Genomic Benchmarks' or the Nucleotide Transformer's layout, or a CSV or FASTA file; see
            genomics.labelled.
        pretrained: Any model to start from, which has its own sizes: checkpoint or run folder of genomics.pretrain,
            folder of HyenaDNA, Caduceus or a Mamba language model, or its name on the Hugging Face hub. With kmer or
            the generative goal, a checkpoint of a causal Mamba of the sizes given.
        d_model: Width of the model.
        n_layer: Number of blocks.
        d_state: State size of each channel.
        d_conv: Width of the causal convolution.
        goal: discriminative learns the class, generative the sequences of each class, of which the likeliest is the
            answer.
        pooling: Of discriminative models, what stands for a sequence: max, mean or last.
        kmer: Bases of the k-mers that the model reads beside single bases; 0 is none.
        cross_validation: Folds; with a test part the folds are left out of training one by one, and the test stays.
        homology: Keep sequences that share 31 bases, on either strand, in one fold.
        epochs: Passes over the training part.
        lr: Peak learning rate; a tenth of the steps warm up, then it falls like half a cosine.
        batch_size: Sequences a step.
        seed: Of folds, weights and order.
        device: cpu, cuda, or auto.
        out: Folder for the results; null is the next one under runs/genomics/finetune.
    """
    if cross_validation < 2 or epochs < 1 or batch_size < 1:
        raise UserError("--cross_validation must be at least 2, --epochs and --batch_size at least 1")
    if not 0 <= kmer <= MOST_BASES:
        raise UserError(f"--kmer is {kmer}; wanted 0 to {MOST_BASES}")
    train, test = read_labelled(data)
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise UserError(f"{data} has one class, {names[0]!r}; wanted two or more")
    if test is not None and (new := set(test.labels) - set(names)):
        raise UserError(f"{data}: the test part has a class {min(new)!r} that the training part lacks")
    groups = families(train.sequences) if homology else np.arange(len(train.labels))
    fold_of = folds(groups, train.labels, cross_validation, seed)
    place = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"d_model": d_model, "n_layer": n_layer, "d_state": d_state, "d_conv": d_conv}
    longest = max(len(ids) for part in (train, test) if part is not None for ids in part.sequences)
    with Results("finetune", out) as results:
        rows, answers = [], ["fold\tlabel\tpredicted"]
        for fold in progress(range(cross_validation), "folds"):
            torch.manual_seed(seed + fold)
            kept, held = (train.take(np.flatnonzero(side).tolist()) for side in (fold_of != fold, fold_of == fold))
            model = _model(pretrained, goal, len(names), pooling, kmer, sizes, longest, data)
            _train(model.to(place), kept, names, epochs, lr, batch_size, seed + fold)
            scored = held if test is None else test
            guesses = _answers(model, scored, batch_size)
            truth = np.array([names.index(label) for label in scored.labels])
            rows.append({"fold": fold, **metrics(truth, guesses), "kmer_accuracy": _kmers(kept, scored, names)})
            answers += [f"{fold}\t{names[t]}\t{names[g]}" for t, g in zip(truth, guesses, strict=True)]
        lines = ["\t".join(rows[0]), *("\t".join(f"{v:.5g}" for v in row.values()) for row in rows)]
        (results.path / "folds.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (results.path / "predictions.tsv").write_text("\n".join(answers) + "\n", encoding="utf-8")
        keys = [key for key in rows[0] if key != "fold"]
        means = {key: float(np.mean([row[key] for row in rows])) for key in keys}
        spread = float(np.std([row["accuracy"] for row in rows]))
        report = Report(
            "Fine-tuning", f"{100 * means['accuracy']:.1f} %", f"accuracy, +- {100 * spread:.1f} over folds"
        )
        report.table("Folds", rows)
        facts = {"data": data, "sequences": len(train.labels), "classes": ", ".join(names)}
        report.facts("Data", {**facts, "families": len(np.unique(groups)), "test part": test is not None})
        results.finish({**means, "accuracy_sd": spread}, report)


def _model(
    pretrained: str | None, goal: Goal, classes: int, pooling: Pooling, kmer: int, sizes: dict[str, int], longest: int,
    data: str,
) -> Classifier:  # fmt: skip
    if pretrained is not None and not kmer and goal == "discriminative":
        loaded = load_model(pretrained, "cpu")
        check_fits(loaded, longest, data)
        return PretrainedClassifier(loaded, classes, pooling)
    model = build_classifier(goal, classes, pooling, True, kmer=kmer, **sizes)
    if pretrained is not None:
        load_backbone(model, pretrained)
    return model


def _pad(sequences: list[np.ndarray], device: torch.device) -> Tensor:
    width = max(map(len, sequences))
    rows = np.full((len(sequences), width), PAD, np.uint8)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(rows).to(device).long()


def _train(model: Classifier, data: Labelled, names: list[str], epochs: int, lr: float, size: int, seed: int) -> None:
    """Train in place; the weights of the epoch that was best on a tenth of the data stay."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.labels))
    val, train = order[: max(len(order) // 10, 1)], order[max(len(order) // 10, 1) :]
    device = next(model.parameters()).device
    targets = np.array([names.index(label) for label in data.labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    total = epochs * -(-len(train) // size)
    warm = max(total // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * np.cos(np.pi * max(s - warm, 0) / max(total - warm, 1)))
    )
    best, weights = -1.0, copy.deepcopy(model.state_dict())
    for _ in range(epochs):
        model.train()
        shuffled = rng.permutation(train)
        for i in range(0, len(shuffled), size):
            places = shuffled[i : i + size]
            rows = _pad([data.sequences[j] for j in places], device)
            flip = torch.from_numpy(rng.random(len(rows)) < 0.5).to(device)
            rows = torch.where(flip[:, None], model.other_strand(rows), rows)
            loss = model.loss(rows, torch.from_numpy(targets[places]).to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        accuracy = float((_answers(model, data.take(val.tolist()), size) == targets[val]).mean())
        if accuracy > best:
            best, weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)


@torch.inference_mode()
def _answers(model: Classifier, data: Labelled, size: int) -> np.ndarray:
    model.eval()
    device = next(model.parameters()).device
    parts = [
        model(_pad(data.sequences[i : i + size], device)).argmax(1).cpu().numpy()
        for i in range(0, len(data.labels), size)
    ]
    return np.concatenate(parts)


def metrics(truth: np.ndarray, guesses: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation coefficient of answers (B,)."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    return {
        "accuracy": float((truth == guesses).mean()),
        "macro_f1": float(f1_score(truth, guesses, average="macro")),
        "mcc": float(matthews_corrcoef(truth, guesses)),
    }


def _kmers(train: Labelled, test: Labelled, names: list[str]) -> float:
    """Accuracy of a k-mer logistic regression; padding is no k-mer."""

    def arrays(data: Labelled) -> tuple[np.ndarray, np.ndarray]:
        return _pad(data.sequences, torch.device("cpu")).numpy().astype(np.uint8), np.array(
            [names.index(label) for label in data.labels]
        )

    both = arrays(train)
    cut = max(len(both[1]) // 10, 1)
    _, found = kmer_accuracies((both[0][cut:], both[1][cut:]), (both[0][:cut], both[1][:cut]), [arrays(test)])
    return found[0]


if __name__ == "__main__":
    run(finetune)
