"""See ``mamba_ssm.py``."""

from core.compat import MambaLMHeadModel

__all__ = ["MambaLMHeadModel"]
