"""Fresh memory that shows what no kernel wrote."""

from __future__ import annotations

import pytest
import torch


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the floating-point tensors that PyTorch's functions for uninitialised memory return with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        empty = getattr(owner, name)

        def filled(*args, empty=empty, **kwargs):
            t = empty(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        monkeypatch.setattr(owner, name, filled)
