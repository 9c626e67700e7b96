"""From pixels to tokens: patches, and position embeddings for grids of any size.

Dimension letters: B batch, C channels of an image, H W grid of patches, M = H W patches, D model width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import register_notrace_function
from torch import Tensor, nn

__all__ = [
    "ConvStem",
    "PatchEmbed",
    "Patches",
    "check_image",
    "fit_positions",
    "pad_to_patches",
    "resample_grid",
    "resample_positions",
]


@torch.fx.wrap
@register_notrace_function
def check_image(image: Tensor, patch_size: int, stride: int, img_size: tuple[int, int], strict: bool) -> Tensor:
    """The image (B, C, height, width) itself, if patches tile it; a leaf for tracers, as it looks at sizes.

    Raises:
        ValueError: If they don't, or if ``strict`` and it isn't of the size ``img_size`` (height, width).
    """
    height, width = image.shape[-2], image.shape[-1]
    if strict and (height != img_size[0] or width != img_size[1]):
        raise ValueError(
            f"image: got {height} x {width} pixels, wanted {img_size[0]} x {img_size[1]}, the size of this model; "
            "resize the image or build the model with dynamic_img_size=True"
        )
    for size in (height, width):
        if size < patch_size or (size - patch_size) % stride != 0:
            low = max(size - (size - patch_size) % stride, patch_size)
            raise ValueError(
                f"image: got {height} x {width} pixels, which patches of {patch_size} every {stride} don't tile; "
                f"wanted {patch_size} + a multiple of {stride} each way: resize {size} to {low} or {low + stride}"
            )
    return image


@torch.fx.wrap
@register_notrace_function
def resample_positions(pos_embed: Tensor, old: tuple[int, int], height: int, width: int) -> Tensor:
    """Resamples position embeddings (1, M + 1, D) to another grid, bicubic; the middle row, the class token's, stays.

    Args:
        pos_embed: Of a grid ``old`` (height, width).
        old: The grid it was learnt on.
        height: Patches from top to bottom of the new grid.
        width: Patches from left to right.

    Returns:
        (1, height * width + 1, D), the class token's embedding at row height * width // 2.
    """
    if height == old[0] and width == old[1]:
        return pos_embed
    row = old[0] * old[1] // 2
    patches = torch.cat((pos_embed[:, :row], pos_embed[:, row + 1 :]), dim=1)
    patches = resample_abs_pos_embed(patches, [height, width], [old[0], old[1]], num_prefix_tokens=0)
    middle = height * width // 2
    return torch.cat((patches[:, :middle], pos_embed[:, row : row + 1], patches[:, middle:]), dim=1)


@torch.fx.wrap
@register_notrace_function
def resample_grid(pos_embed: Tensor, old: list[int], new: list[int]) -> Tensor:
    """Resamples position embeddings (1, M, D) of a grid ``old`` to a grid ``new``, (1, M', D).

    Bicubic for images; for videos (T, H, W) trilinear, as published.
    """
    if old == new:
        return pos_embed
    if len(old) == 2:
        return resample_abs_pos_embed(pos_embed, new, old, num_prefix_tokens=0)
    volume = pos_embed.float().transpose(1, 2).reshape(1, -1, old[0], old[1], old[2])
    volume = F.interpolate(volume, size=new, mode="trilinear", align_corners=False)
    return volume.flatten(2).transpose(1, 2).to(pos_embed.dtype)


def fit_positions(
    pos_embed: Tensor, grid: Sequence[int], frames: int | None = None, class_token: bool = False
) -> Tensor:
    """Position embeddings of a checkpoint, learnt on a square grid, on the grid of a model.

    Args:
        pos_embed: (1, M, D), with a class token (1, M + 1, D).
        grid: Of the model: height and width, for videos after the number of frames.
        frames: Frames of the checkpoint's grid, for videos.
        class_token: Whether the middle row is a class token's, which stays.

    Raises:
        ValueError: If the grid that they were learnt on was not square.
    """
    extra = int(class_token)
    if pos_embed.shape[1] == math.prod(grid) + extra:
        return pos_embed
    rows = (pos_embed.shape[1] - extra) // (frames or 1)
    side = math.isqrt(rows)
    if side * side * (frames or 1) + extra != pos_embed.shape[1]:
        raise ValueError(
            f"pos_embed: got {pos_embed.shape[1]} rows, which are no square grid{' and a class token' * extra}; wanted "
            f"{math.prod(grid) + extra} rows; build the model with the img_size it was trained at, then resample"
        )
    if class_token:
        return resample_positions(pos_embed, (side, side), grid[0], grid[1])
    return resample_grid(pos_embed, [side, side] if frames is None else [frames, side, side], list(grid))


def project_patches(x: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Tensor:
    """The convolution of patches that don't overlap, as a matrix product: GPUs take a slow way for the former.

    Args:
        x: Images (B, C, height, width) that patches tile.
        weight: (D, C, size, size).
        bias: (D,).
        size: Side of a patch.

    Returns:
        (B, H, W, D).
    """
    x = x.unflatten(3, [-1, size]).unflatten(2, [-1, size]).permute(0, 2, 4, 1, 3, 5)  # (B, H, W, C, size, size)
    return F.linear(x.flatten(3), weight.flatten(1), bias)


class PatchEmbed(nn.Module):
    """Cuts images into patches, overlapping if stride < patch_size: (B, C, height, width) -> (B, H, W, D)."""

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        stride: int,
        in_chans: int,
        embed_dim: int,
        strict_img_size: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.stride = img_size, patch_size, stride
        self.strict_img_size = strict_img_size  # timm looks it up by this name
        check_image(torch.empty(1, in_chans, *img_size, device="meta"), patch_size, stride, img_size, True)
        self.grid_size = ((img_size[0] - patch_size) // stride + 1, (img_size[1] - patch_size) // stride + 1)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = check_image(x, self.patch_size, self.stride, self.img_size, self.strict_img_size)
        if self.stride == self.patch_size:
            return project_patches(x, self.proj.weight, self.proj.bias, self.patch_size)
        return self.proj(x).permute(0, 2, 3, 1)


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions instead of patches (Xiao et al. 2021): (B, C, height, width) -> (B, H, W, D).

    The first keeps the size, the second has the stride; a norm and GELU lie between them. Images of any size go.

    Args:
        img_size: Height and width of the images that ``grid_size`` is of.
        stride: From one token to the next, in pixels.
        in_chans: C.
        embed_dim: D; the first convolution has half as many channels.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        stride: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.stride = img_size, stride
        self.grid_size = tuple(-(-size // stride) for size in img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim // 2, 3, 1, 1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embed_dim // 2, device=device, dtype=dtype)
        self.proj2 = nn.Conv2d(embed_dim // 2, embed_dim, 3, stride, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        x = F.gelu(self.norm(x)).permute(0, 3, 1, 2)
        return self.proj2(x).permute(0, 2, 3, 1)


def pad_to_patches(x: Tensor, patch: int) -> Tensor:
    """Fills images (..., height, width) with zeros at the right and at the bottom until patches tile them."""
    height, width = x.shape[-2], x.shape[-1]
    return F.pad(x, (0, (patch - width % patch) % patch, 0, (patch - height % patch) % patch))


class Patches(nn.Module):
    """Cuts images of any size into patches, filled up with zeros: (B, C, height, width) -> (B, H, W, D)."""

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = tuple(-(-size // patch_size) for size in img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_patches(x, self.patch_size)
        return project_patches(x, self.proj.weight, self.proj.bias, self.patch_size)
