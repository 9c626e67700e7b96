"""Layers of maps (B, H, W, C): convolutions, norms and merging without a change of layout.

Dimension letters: B batch, H W map, L tokens, C or D channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from vision.models.patches import project_patches

__all__ = ["ChannelAttention", "Conv2d", "DepthwiseConv2d", "LayerNorm", "PatchConv2d", "PatchMerging"]


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` of maps (B, H, W, C): the memory format is channels-last, and maps are not copied, images are."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous().permute(0, 3, 1, 2)
        return self._conv_forward(x, self.weight, self.bias).permute(0, 2, 3, 1)


class PatchConv2d(nn.Conv2d):
    """Patches of maps (B, H, W, C), one beside the other, by a matrix product; what is left of a patch is left out."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_chans, dim, size, size, device=device, dtype=dtype)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : x.shape[1] // self.size * self.size, : x.shape[2] // self.size * self.size]
        return project_patches(x.permute(0, 3, 1, 2), self.weight, self.bias, self.size)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of maps (B, H, W, C) with its activation, ``silu`` or ``gelu``, in one kernel."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        activation: str,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias, device=device, dtype=dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.triscan.depthwise_conv2d(x, self.weight, self.bias, self.activation, "auto")


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the last axis, in the input's dtype; with a gate ``norm(x) * silu(gate)``, in one kernel."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y, _, _, _ = torch.ops.triscan.norm(
            x, self.weight, self.bias, None, gate, "layer", self.eps, 0, True, False, "auto"
        )
        return y


@torch.fx.wrap
@register_notrace_function
def pad_to_even(x: Tensor) -> Tensor:
    """Maps (B, H, W, C) with a row or column of zeros behind odd sides; a leaf for tracers, as it looks at sizes."""
    height, width = x.shape[1], x.shape[2]
    return F.pad(x, (0, 0, 0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x


class PatchMerging(nn.Module):
    """Four neighbours become one pixel of another width: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), out_dim).

    Swin's merging (Liu et al. 2021, section 3.1): concatenated column by column, normalised, projected.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_even(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class ChannelAttention(nn.Module):
    """Weights in (0, 1) for channels, from the mean over tokens (LocalMamba, Huang et al. 2024, section 3.3).

    g = sigmoid(channel_select(gelu(global_reduce(mean_L(norm(x))))))
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 0.125,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, **dd)
        self.global_reduce = nn.Linear(dim, int(dim * ratio), **dd)
        self.channel_select = nn.Linear(int(dim * ratio), dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens (B, L, ..., D): (B, 1, ..., D), to be multiplied by."""
        mean = self.norm(x).mean(1, keepdim=True)
        return self.channel_select(F.gelu(self.global_reduce(mean))).sigmoid()
