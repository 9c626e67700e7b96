"""Stands in for the package ``mamba_ssm``, so that its own tests run on our ops.

    PYTHONPATH=tests/shim python -m pytest TEST_FILES

See ``causal_conv1d.py`` beside this file. What we have no counterpart of is missing here too, and fails at the import.
"""

from pathlib import Path

from core.compat import Mamba, Mamba2, Mamba3, MambaLMHeadModel
from kernels.compat import mamba_inner_fn, selective_scan_fn

__all__ = ["Mamba", "Mamba2", "Mamba3", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]
__path__ = [str(Path(__file__).with_suffix(""))]
