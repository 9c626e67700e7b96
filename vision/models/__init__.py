"""Backbones, one family a file; importing the file registers its models in timm."""

from vision.models.efficient_vmamba import EfficientVMamba
from vision.models.local_vim import LocalVim
from vision.models.local_vmamba import LocalVMamba
from vision.models.mamba_nd import MambaND, MambaNDVideo
from vision.models.plain_mamba import PlainMamba
from vision.models.vim import Vim
from vision.models.vmamba import VMamba

__all__ = ["EfficientVMamba", "LocalVMamba", "LocalVim", "MambaND", "MambaNDVideo", "PlainMamba", "VMamba", "Vim"]
