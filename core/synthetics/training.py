"""Training and testing of one run, written so that several share a GPU.

These models are so small that a step is hundreds of launches of a few microseconds. On a GPU a whole step, with its
batch, is one CUDA graph, and runs are generators that yield where they would wait for the device: one process replays
the graphs of many runs, each on a stream of its own.

Legend: B batch, L length, A answers of a sequence.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from core.errors import UserError
from core.synthetics import models
from core.synthetics.recipe import Recipe, Settings
from core.synthetics.tasks import Task

TRAINING, CHECKS, TESTS = range(3)  # splits of the data
CHECK_SEQUENCES = 512
TOKENS_AT_ONCE = 1 << 18  # that go through a model in an evaluation: enough for a GPU, little of its memory
PIECE = 1 << 14  # tokens of a row that go through it at once where the state is carried on
TOKENS_DRAWN = 1 << 26  # that wait for it meanwhile
BURST = 25  # steps that are launched without looking at the device
WARM_UP = 3  # steps before a graph is captured: kernels are compiled, the optimizer makes its state


@dataclass
class Result:
    """What a run gave.

    Args:
        accuracy: Share of right answers by length of the test; a length that the model cannot take is missing.
        history: Records of the checks: step, loss of training and accuracy.
        steps: Optimizer steps made.
        loss: Of training, the mean since the last check before the end; NaN after no step.
        stopped: ``steps``, ``solved``, ``time``, ``diverged`` or ``failed``: what ended the training.
        seconds: From the start of the training to the end of the tests; with other runs beside it, theirs count too.
        parameters: Of the model.
    """

    accuracy: dict[int, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    loss: float = math.nan
    stopped: str = "steps"
    seconds: float = 0.0
    parameters: int = 0
    error: str = ""  # of a run that failed


class Run:
    """One run of a recipe.

    Args:
        recipe: The study.
        settings: The run.
        device: Where.

    Raises:
        UserError: For settings that do not fit the task or the model.
    """

    def __init__(self, recipe: Recipe, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.task = recipe.make_task(settings)
        self.stages = [recipe.make_task(settings, stage) for stage in settings.curriculum] or [self.task]
        self.lengths = self._lengths(recipe.models[settings.model].get("longest"))
        torch.manual_seed(settings.seed)
        try:
            vocab = self.task.vocab_size
            shape = (settings.d_model, settings.n_layer, vocab, settings.d_intermediate)
            self.model = models.build(recipe.entry(settings), *shape).to(device)
        except (TypeError, ValueError) as error:
            raise UserError(f"--model {settings.model}: {error}") from error
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.losses = torch.zeros(settings.steps, device=device)
        self.over = settings.anneal or settings.steps  # how many steps the rate takes to fall
        self.fall = torch.tensor(settings.steps - self.over, device=device)  # the step at which it begins
        groups = list(models.parameter_groups(self.model, settings.lr, settings.weight_decay))
        self.peaks = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        betas = (0.9, settings.beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=settings.eps, fused=True, capturable=cuda)
        self.stream = torch.cuda.Stream(device) if cuda else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out_of_time = False  # set from outside, to go on to the tests
        self.result = Result(parameters=sum(p.numel() for p in self.model.parameters()))

    def process(self) -> Generator[bool, None, Result]:
        """Trains and tests; yields True after some work, False where it would wait."""
        begin = time.monotonic()
        for number, stage in enumerate(self.stages):
            left = self.settings.steps - self.result.steps
            share = math.ceil(left / (len(self.stages) - number))
            yield from self._train(stage, self.result.steps + share, number == len(self.stages) - 1)
            if self.result.stopped != "steps":
                break
        self.graph = None  # and its memory
        self.result.loss = self._mean_loss()
        if self.result.stopped != "diverged":
            for length in self.lengths:
                sequences = max(1, min(self.settings.test_sequences, self.settings.test_tokens // length))
                accuracy = yield from self._evaluate(TESTS, length, sequences)
                if not math.isnan(accuracy):
                    self.result.accuracy[length] = accuracy
        self.result.seconds = time.monotonic() - begin
        return self.result

    def _lengths(self, longest: int | None) -> list[int]:
        """The lengths of the tests that the recipe wants of this model."""
        lengths = self.settings.test_lengths or [self.task.length]
        try:
            for length in lengths:
                self.task.check(length)
        except ValueError as error:
            raise UserError(f"--test_lengths: {error}") from error
        return [length for length in lengths if longest is None or length <= longest]

    def _train(self, stage: Task, end: int, last: bool) -> Generator[bool, None, None]:
        """Trains on a stage up to step ``end``, or until it is learnt and, at last, the rate has fallen."""
        self.graph, begin, every, learnt = None, self.result.steps, self.settings.check_every, False
        wanted = self.settings.stop_at if last else self.settings.advance_at
        while self.result.steps < end:
            check = (self.result.steps // every + 1) * every
            burst = min(BURST, end - self.result.steps, check - self.result.steps)
            with self._stream():
                for _ in range(burst):
                    self._one_step(stage, self.result.steps - begin)
                    self.result.steps += 1
            yield from self._wait()
            accuracy = 0.0
            if self.result.steps in (check, self.settings.steps):
                accuracy = yield from self._check(stage)
            if self.result.stopped == "steps" and self.out_of_time:
                self.result.stopped = "time"
            if wanted is not None and accuracy >= wanted and not learnt:
                learnt = True
                if not last or self.settings.anneal is None:
                    end = self.result.steps
                else:
                    end = min(end, self.result.steps + self.settings.anneal)
                    with self._stream():
                        self.fall.clamp_(max=self.result.steps)
            elif self.result.stopped != "steps":
                return
        if learnt and last:
            self.result.stopped = "solved"

    def _check(self, stage: Task) -> Generator[bool, None, float]:
        """Adds a record to the history, and returns its accuracy."""
        accuracy = yield from self._evaluate(CHECKS, stage.length, CHECK_SEQUENCES, stage)
        loss = self._mean_loss()
        self.result.history.append({"step": self.result.steps, "train/loss": loss, "val/accuracy": accuracy})
        if not math.isfinite(loss):
            self.result.stopped = "diverged"
        return accuracy

    def _mean_loss(self) -> float:
        """Of the steps since the last check."""
        done, every = self.result.steps, self.settings.check_every
        with self._stream():
            return self.losses[(done - 1) // every * every : done].mean().item() if done else math.nan

    def _one_step(self, stage: Task, number: int) -> None:
        """Makes a step of a stage: plainly on a CPU and at first, then by its graph."""
        if self.stream is None or number < WARM_UP:
            self._update(stage)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Other runs work on their streams meanwhile; what this thread may not do is all that is held against it.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self._update(stage)
        self.graph.replay()

    def _update(self, stage: Task) -> None:
        settings = self.settings
        batch = stage.batch(settings.seed, TRAINING, self.step, settings.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            loss = self.model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        share = self._rate()
        for peak, group in zip(self.peaks, self.optimizer.param_groups, strict=True):
            group["lr"].copy_(peak * share)
        self.optimizer.step()
        self.losses.index_copy_(0, self.step[None], loss.detach()[None])
        self.step += 1

    def _rate(self) -> Tensor:
        """Share of the peak learning rate at this step, a tensor: a graph holds no numbers that change."""
        step = self.step.double()
        share = ((step + 1) / max(1, self.settings.warmup)).clamp(max=1)
        if self.settings.cosine:
            share = share * 0.5 * (1 + torch.cos(math.pi * ((step - self.fall) / self.over).clamp(0, 1)))
        return share

    def _evaluate(
        self, split: int, length: int, sequences: int, task: Task | None = None
    ) -> Generator[bool, None, float]:
        """Share of right answers in sequences of a split; NaN for sequences that are too long for the model."""
        task = self.task if task is None else task
        total, bound = task.total(length), models.longest(self.model)
        if bound is not None and total > bound:
            return math.nan
        in_pieces = total > PIECE and models.carries_state(self.model)
        rows = TOKENS_AT_ONCE // (PIECE if in_pieces else total)
        rows = max(1, min(sequences, rows, TOKENS_DRAWN // total))
        with self._stream():
            right = torch.zeros((), dtype=torch.int64, device=self.device)
        for number in range(math.ceil(sequences / rows)):
            size = min(rows, sequences - number * rows)
            with self._stream(), self._precision(), torch.no_grad():
                step = torch.full((), number, dtype=torch.int64, device=self.device)
                batch = task.batch(self.settings.seed, split, step, size, length)
                right += self.model.count_right(batch, PIECE if in_pieces else None)
            yield from self._wait()
        with self._stream():
            return right.item() / (sequences * batch.answers.shape[1])

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        """Autocast if it is wanted; without its cache of cast weights, which a graph would not renew."""
        wanted = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _wait(self) -> Generator[bool, None, None]:
        """Yields until the device has done what was launched."""
        if self.stream is None:
            yield True
            return
        done = self.stream.record_event()
        yield True
        while not done.query():
            yield False


def queue(
    recipe: Recipe, waiting: Sequence[Settings], device: torch.device, parallel: int = 1, minutes: float | None = None
) -> Generator[tuple[Run, Result | None], None, None]:
    """Processes runs, some of them side by side.

    Args:
        recipe: The study.
        waiting: The runs, in the order in which they start.
        device: Where.
        parallel: How many at once.
        minutes: After so long none starts, and those that still train go on to their tests. None: no bound.

    Yields:
        Each run with its result, as they end; and with None those that work on, as a sign of life. A run that fails,
        mostly for want of memory, leaves the others alone and says so in its result.

    Raises:
        UserError: For settings that do not fit.
    """
    begin, left = time.monotonic(), list(waiting)
    active: list[tuple[Run, Generator[bool, None, Result]]] = []
    while True:
        late = minutes is not None and time.monotonic() - begin > 60 * minutes
        while left and len(active) < parallel and not late:
            run = Run(recipe, left.pop(0), device)
            active.append((run, run.process()))
        if not active:
            return
        worked, still = False, []
        for run, work in active:
            run.out_of_time, result = late, None
            try:
                worked |= next(work)
                still.append((run, work))
            except StopIteration as stop:
                result = stop.value
            except RuntimeError as error:  # torch's, also that of a device without memory
                result = replace(run.result, stopped="failed", error=str(error).partition("\n")[0])
            if result is not None and device.type == "cuda":
                torch.cuda.empty_cache()  # what a run's stream holds is of no use to those of others
            yield run, result
        active = still
        if not worked:
            time.sleep(1e-3)
