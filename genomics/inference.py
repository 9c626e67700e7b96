"""Trained models at work: loading of any kind, and passes over sequences of any length.

Legend: B batch, L length, D model width, V padded vocabulary, T bases of a piece.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from core.checkpoints import CONFIG, PUBLISHED_WEIGHTS, download, load_into, read_weights
from core.errors import UserError
from core.lm import MambaLM
from core.published import load_lm
from genomics import caduceus, hyenadna_published
from genomics.caduceus import Caduceus
from genomics.fasta import Fasta
from genomics.generative import build_classifier
from genomics.hyenadna import HyenaDNA
from genomics.intervals import Interval
from genomics.kmers import init_state
from genomics.models import GenomeClassifier, build_lm, checkpoint_of, read_checkpoint
from genomics.vocabulary import BOS, MASK, A, T
from kernels.selective_scan.exactness import between_pieces

LIGHTNING_WEIGHTS = "weights.ckpt"  # how HyenaDNA's first releases come
PIECE = 65536  # bases that go through a model at a time
CPU_PIECE = 16384  # the same where a state is carried on: what each piece costs once is little beside it
GPU_PIECE = 262144  # the same on a GPU, whose kernels outlast the host's work for them from there on


@dataclass
class Loaded:
    """A language model, or a classifier's backbone, ready to run.

    Args:
        net: The model.
        start: Token that stands before the first base, as in training; None is none.
        classifier: The classifier, where the checkpoint is one.
        class_names: Its classes.
    """

    net: nn.Module
    start: int | None = BOS
    classifier: GenomeClassifier | None = None
    class_names: tuple[str, ...] = ()

    @property
    def causal(self) -> bool:
        """Whether a position sees only what comes before it."""
        return not isinstance(self.net, Caduceus)

    @property
    def carries(self) -> bool:
        """Whether the state has one size however long the sequence is."""
        return self.classifier is not None or (isinstance(self.net, MambaLM) and not self.net.has_attention)

    @property
    def longest(self) -> int | None:
        """The most tokens at a time; None is any."""
        return self.net.l_max if isinstance(self.net, HyenaDNA) else None

    @property
    def piece(self) -> int:
        """How many bases to read at a time if nobody says otherwise."""
        carried = CPU_PIECE if self.device.type == "cpu" else GPU_PIECE
        return carried if self.carries else PIECE

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.net.parameters()).device

    def backbone(self) -> Any:
        """What turns ids into hidden states."""
        return self.net.backbone if self.classifier is None else self.classifier.backbone

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states (B, L, D) of ids (B, L); of Caduceus-PS (B, L, 2 D)."""
        return self.net.hidden(ids) if isinstance(self.net, Caduceus) else self.backbone()(ids)

    def carry_on(self, ids: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Hidden states (B, L, D) of the next piece of a sequence, and the state after it."""
        with between_pieces():
            return self.backbone().forward_state(ids, state)

    def init_state(self) -> tuple[Any, ...]:
        """The state before the first token, of one sequence."""
        return init_state(self.backbone(), 1)


def load_model(model: str, device: str = "auto", dtype: str = "float32") -> Loaded:
    """Load a model from wherever it is.

    Args:
        model: A checkpoint (``.ckpt``) or run folder of ``genomics.pretrain`` or ``genomics.classify``; a folder with
            ``config.json`` and weights of HyenaDNA (either layout), Caduceus or a Mamba language model; or the name of
            such a model on the Hugging Face hub.
        device: ``auto`` is the GPU where there is one.
        dtype: float32 or bfloat16, of the weights; tf32 is float32, and matrix products of this process on NVIDIA GPUs
            round their factors to 11 bits.

    Raises:
        UserError: If there is none, or its files do not fit.
    """
    path = Path(model).expanduser()
    if not (path / CONFIG).is_file():
        path = checkpoint_of(path)
    loaded = _from_checkpoint(path) if path.is_file() else _from_folder(path if path.is_dir() else download(model))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in ("float32", "bfloat16", "tf32"):
        raise UserError(f"--dtype is {dtype!r}; wanted float32, bfloat16 or tf32")
    if dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        loaded.net.to(device, torch.bfloat16 if dtype == "bfloat16" else torch.float32).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None
    return loaded


def _from_checkpoint(path: Path) -> Loaded:
    state, options = read_checkpoint(path)
    options = {key.removeprefix("model."): value for key, value in options.items()}
    if "num_classes" in options:
        known = ("d_model", "n_layer", "d_state", "d_conv", "expand", "language", "kmer", "kmer_width")
        sizes = {key: options[key] for key in known if key in options}
        goal = options.get("goal", "discriminative")
        model = build_classifier(goal, options["num_classes"], options["pooling"], options["average_strands"], **sizes)
        load_into(model, _only(state, model), str(path))
        return Loaded(model, None, model, tuple(options.get("class_names") or ()))
    accepted = inspect.signature(build_lm).parameters
    sizes = {key: value for key, value in options.items() if key in accepted and value is not None}
    try:
        net = build_lm(**sizes, l_max=options.get("context", 1024) + 2)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    load_into(net, _only(state, net), str(path))
    return Loaded(net)


def _only(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out what the training module keeps beside the net, such as metrics."""
    tops = {name.split(".")[0] for name in model.state_dict()}
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] in tops}


def _from_folder(folder: Path) -> Loaded:
    config = folder / CONFIG
    if not config.is_file():
        raise UserError(
            f"no model at {folder}; wanted a .ckpt file, a run folder with checkpoints, or a folder with {CONFIG}"
        )
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is no JSON file: {error}") from None
    is_hyena = values.get("model_type") == "hyenadna" or "max_seq_len" in values or "layer" in values
    is_caduceus = values.get("model_type") == "caduceus" or "bidirectional" in values
    if not is_hyena and not is_caduceus:
        return Loaded(load_lm(folder), None)
    try:
        if is_hyena:
            net: nn.Module = HyenaDNA(hyenadna_published.config_from_published(values))
        else:
            net = Caduceus(caduceus.config_from_published(values))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{config}: {error}") from error
    rename = hyenadna_published.rename_published if is_hyena else caduceus.rename_published
    state = rename(_weights(folder))
    if is_hyena:  # tables that follow from the configuration; some releases leave them out
        state = {**{k: v for k, v in net.state_dict().items() if ".pos_emb." in k or ".modulation." in k}, **state}
    load_into(net, state, str(folder))
    return Loaded(net, None)


def _weights(folder: Path) -> dict[str, Tensor]:
    for name in PUBLISHED_WEIGHTS:
        if (folder / name).is_file():
            return read_weights(folder / name)
    if (folder / LIGHTNING_WEIGHTS).is_file():
        return read_checkpoint(folder / LIGHTNING_WEIGHTS)[0]
    raise UserError(f"no weights in {folder}; wanted {', '.join(PUBLISHED_WEIGHTS)} or {LIGHTNING_WEIGHTS}")


def to_tensor(ids: np.ndarray, device: torch.device) -> Tensor:
    """Ids (..., L) uint8 as int64 on the device: one byte a base crosses the bus."""
    return torch.from_numpy(np.ascontiguousarray(ids)).to(device).long()


@torch.inference_mode()
def hidden_pieces(model: Loaded, fasta: Fasta, place: Interval, piece: int | None = None) -> Iterator[Tensor]:
    """Yield the hidden states of an interval piece by piece, (T, D) each, in memory that its length does not change.

    A model that carries its state sees everything from the start of the interval; others see their piece.

    Args:
        model: The model.
        fasta: The file.
        place: The interval.
        piece: Bases of a piece; None is ``model.piece``.
    """
    state = model.init_state() if model.carries else None
    for start, end in _bounds(place, _fitting(model, piece)):
        ids = to_tensor(fasta.read(place.record, start, end), model.device)[None]
        first = model.start is not None and (state is None or start == place.start)
        if first:
            ids = torch.cat([ids.new_full((1, 1), cast(int, model.start)), ids], dim=1)
        if state is None:
            hidden = model.hidden(ids)
        else:
            hidden, state = model.carry_on(ids, state)
        yield hidden[0, int(first) :]


@torch.inference_mode()
def log_probability_pieces(
    model: Loaded, fasta: Fasta, place: Interval, piece: int | None = None, passes: int = 8
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield ids and log-probabilities of all tokens at each base of an interval, (T,) uint8 and (T, V), piece by piece.

    A causal model predicts each base from those before it; a masked one from both sides, in ``passes`` passes, each of
    which masks every so manieth base. A causal model without start token says nothing of the first base of a sequence:
    NaN.

    Args:
        model: A language model.
        fasta: The file.
        place: The interval.
        piece: Bases of a piece; None is ``model.piece``.
        passes: Of a masked model.

    Raises:
        UserError: If the model is a classifier.
    """
    head = _head(model)
    state = model.init_state() if model.carries else None
    last: Tensor | None = None  # hidden state of the base before the piece
    for start, end in _bounds(place, _fitting(model, piece)):
        bases = fasta.read(place.record, start, end)
        ids = to_tensor(bases, model.device)[None]
        if not model.causal:
            yield bases, masked_log_probabilities(model.net, ids, passes)[0]
            continue
        if state is None:
            last = None
        if last is None and model.start is not None:
            ids = torch.cat([ids.new_full((1, 1), model.start), ids], dim=1)
        if state is None:
            hidden = model.hidden(ids)
        else:
            hidden, state = model.carry_on(ids, state)
        before = hidden if last is None else torch.cat([last, hidden], dim=1)
        last = hidden[:, -1:]
        scores = head(before[:, :-1]).float().log_softmax(-1)[0]
        if len(scores) < len(bases):  # no start token: nothing was said of the first base
            scores = torch.cat([scores.new_full((1, scores.shape[1]), torch.nan), scores])
        yield bases, scores


def masked_log_probabilities(net: nn.Module, ids: Tensor, passes: int) -> Tensor:
    """Log-probabilities (B, L, V) of a masked model, every position masked in one of so many passes."""
    position = torch.arange(ids.shape[1], device=ids.device) % passes
    found: Tensor | None = None
    for turn in range(min(passes, ids.shape[1])):
        hidden = position == turn
        scores = net(ids.masked_fill(hidden, MASK)).float().log_softmax(-1)
        found = scores if found is None else torch.where(hidden[:, None], scores, found)
    assert found is not None
    return found


def surprisal(bases: np.ndarray, scores: Tensor) -> np.ndarray:
    """-log p of each base in nats, (T,) float32; NaN where the base is not A, C, G or T."""
    ids = torch.from_numpy(bases.astype(np.int64)).to(scores.device)
    nats = -scores.gather(1, ids[:, None])[:, 0]
    return np.where((bases >= A) & (bases <= T), nats.cpu().numpy(), np.float32(np.nan))


def _head(model: Loaded) -> Any:
    if model.classifier is not None:
        raise UserError("this checkpoint is a classifier, which predicts no bases; give one of genomics.pretrain")
    return model.net.lm_head


def _fitting(model: Loaded, piece: int | None) -> int:
    piece = model.piece if piece is None else piece
    if piece < 1:
        raise UserError(f"--piece is {piece}; wanted at least 1 base")
    longest = model.longest
    return piece if longest is None else min(piece, longest - int(model.start is not None))


def _bounds(place: Interval, piece: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + piece, place.end)) for start in range(place.start, place.end, piece))
