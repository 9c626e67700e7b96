"""Backbones, one family a file; importing the file registers its models in timm."""

from vision.models.plain_mamba import PlainMamba
from vision.models.vim import Vim

__all__ = ["PlainMamba", "Vim"]
