"""The scaling study's table: one row a run, and no run twice."""

from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from genomics.scaling import COLUMNS, scaling


def test_rows_are_added_once_and_long_contexts_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genome, table = tmp_path / "g.fa", tmp_path / "t.csv"
    genome.write_text(">a\n" + "".join(np.random.default_rng(0).choice(list("ACGT"), 4000)) + "\n")
    options = {"contexts": (32, 64, 4096), "tokens": 256, "tokens_per_step": 32, "d_model": 8, "n_layer": 1,
               "mixers": ("mamba", "hyena")}  # fmt: skip
    scaling(str(genome), table=str(table), device="cpu", most_runs=1, **options)
    first = table.read_text().splitlines()
    assert first[0] == ",".join(COLUMNS)
    assert len(first) == 3
    assert first[1].startswith("g.fa,markov,0,")
    for _ in range(2):
        scaling(str(genome), table=str(table), device="cpu", **options)
        lines = table.read_text().splitlines()
        assert lines[:3] == first
        assert [line.split(",")[1:3] for line in lines[2:]] == [
            [m, c] for m in ("mamba", "hyena") for c in ("32", "64")
        ]
    assert all(3 < float(line.split(",")[9]) < 20 for line in lines[1:])
    assert (tmp_path / "t.png").is_file()
    scaling(str(genome), table=str(table), device="cpu", **{**options, "contexts": (32,), "rates": {"hyena": 2e-3}})
    assert [line.split(",")[1:8] for line in table.read_text().splitlines()[6:]] == [
        ["hyena", "32", "0", "256", "32", "0.8", "0.002"]
    ]
    assert "at 4,096: left out" in capsys.readouterr().out
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="is no table of this command"):
        scaling(str(genome), table=str(tmp_path / "other.csv"))
    with pytest.raises(UserError, match="--lead is 1; wanted"):
        scaling(str(genome), table=str(table), lead=1)
