"""See ``mamba_ssm.py``."""

from core.compat import MambaConfig

__all__ = ["MambaConfig"]
