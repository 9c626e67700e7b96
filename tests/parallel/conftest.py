"""A folder for each test of a command; and these tests find what they share beside them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, in which a test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("core.training.record.curves", lambda rows: None)
    # Evaluate as on GPUs: Lightning leaves its inference mode out where it sees gloo.
    monkeypatch.setattr("lightning.pytorch.loops.utilities._distributed_is_initialized", lambda: False)
    return tmp_path
