"""Fixtures that several files share."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test reads its genomes into a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def genome(tmp_path: Path) -> str:
    """A FASTA file of one record of 4,096 bases drawn at random."""
    path = tmp_path / "g.fa"
    path.write_text(">a\n" + "".join(np.random.default_rng(0).choice(list("ACGT"), 4096)) + "\n")
    return str(path)
