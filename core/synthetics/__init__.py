"""Synthetic tasks and short studies on them; ``python -m core.synthetics TASK --model NAME`` runs one."""

from core.synthetics.tasks import AssociativeRecall, Batch, Copying, InductionHeads, SelectiveCopying, Task

__all__ = ["AssociativeRecall", "Batch", "Copying", "InductionHeads", "SelectiveCopying", "Task"]
