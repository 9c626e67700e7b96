"""See ``mamba_ssm.py``."""

from core.compat import Mamba2

__all__ = ["Mamba2"]
