"""Tables that are kept: built once, dropped in order."""

import torch

from vision import tables
from vision.tables import Kept

CPU = torch.device("cpu")


def test_tables_are_built_once_and_the_oldest_are_dropped(monkeypatch):
    monkeypatch.setattr(tables, "MOST", 2)
    built = []
    kept = Kept(lambda n, device: built.append(n) or torch.arange(n, device=device))
    for n in (3, 4, 3, 5, 3, 4):  # 4 is the oldest when 5 comes
        assert kept(n, CPU).tolist() == list(range(n))
    assert built == [3, 4, 5, 4]
    kept.forget()
    kept(4, CPU)
    assert built == [3, 4, 5, 4, 4]
