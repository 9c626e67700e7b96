"""Backbones, one family a file; importing the file registers its models in timm."""

from vision.models.vim import Vim
from vision.models.vmamba import VMamba

__all__ = ["VMamba", "Vim"]
