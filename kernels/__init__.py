"""Ops on tensors: scans, convolutions and norms with one contract on every device.

Importing this package registers ``torch.ops.triscan.*``. It needs torch; Triton and numba are used where they exist.
"""

from kernels.causal_conv1d import causal_conv1d
from kernels.conv_update import conv_update
from kernels.depthwise_conv2d import depthwise_conv2d
from kernels.diagonal_ssm import diagonal_ssm
from kernels.gelu_mlp import gelu_mlp
from kernels.norm import norm
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from kernels.state_update import state_update

__all__ = [
    "causal_conv1d",
    "conv_update",
    "depthwise_conv2d",
    "diagonal_ssm",
    "gelu_mlp",
    "norm",
    "selective_scan",
    "ssd",
    "state_update",
]
