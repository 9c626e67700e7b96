"""See ``mamba_ssm.py``."""

from core.compat import InferenceParams

__all__ = ["InferenceParams"]
