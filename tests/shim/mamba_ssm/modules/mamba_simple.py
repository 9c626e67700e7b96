"""See ``mamba_ssm.py``."""

from core.compat import Mamba

__all__ = ["Mamba"]
