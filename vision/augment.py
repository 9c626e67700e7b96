"""Augmentation of whole batches where the model runs, each image by numbers of its own.

Dimension letters: B batch, C channels, H W height and width in pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OPERATIONS", "distort", "erase", "random_distortions", "shift_and_flip"]

OPERATIONS = (
    "identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y", "brightness", "colour", "contrast",
    "sharpness", "solarize", "posterize", "autocontrast", "equalize",
)  # fmt: skip
TURN, SHEAR, SHIFT, BLEND, BITS = 30.0, 0.3, 10 / 32, 0.9, 4  # at full strength: degrees, shares, bits taken away


def shift_and_flip(images: Tensor, padding: int, flip: float) -> Tensor:
    """Shifts each image by up to ``padding`` pixels each way, mirrored at the border, and flips some.

    Args:
        images: (B, C, H, W), any dtype.
        padding: In pixels.
        flip: Probability of a horizontal flip.
    """
    count, _, height, width = images.shape
    device = images.device
    offsets = torch.randint(-padding, padding + 1, (2, count, 1), device=device)
    rows = _mirrored(torch.arange(height, device=device) + offsets[0], height)
    columns = _mirrored(torch.arange(width, device=device) + offsets[1], width)
    flipped = torch.rand(count, 1, device=device) < flip
    columns = torch.where(flipped, columns.flip(1), columns)
    batch = torch.arange(count, device=device).view(-1, 1, 1)
    return images.permute(0, 2, 3, 1)[batch, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _mirrored(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def random_distortions(images: Tensor, count: int) -> Tensor:
    """Puts each image through ``count`` operations, each drawn from ``OPERATIONS`` with a strength of its own.

    With one it is TrivialAugment (Mueller & Hutter 2021, algorithm 1) over the ranges of RandAugment.

    Args:
        images: (B, 3, H, W), floating point between 0 and 1.
        count: Operations, one after another.
    """
    for _ in range(count):
        chosen = torch.randint(len(OPERATIONS), (len(images),), device=images.device)
        images = distort(images, chosen, images.new_empty(len(images)).uniform_(-1, 1))
    return images


def distort(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Puts each image through one operation.

    All run on the whole batch, with numbers that change nothing for images of another operation, so that the host
    need not know which are which.

    Args:
        images: (B, 3, H, W), floating point between 0 and 1.
        chosen: (B,) int64, places in ``OPERATIONS``.
        strength: (B,) between -1 and 1; operations that go one way take its size.
    """

    def only(name: str, value: Tensor, otherwise: float) -> Tensor:
        return torch.where(chosen == OPERATIONS.index(name), value, otherwise)

    x = _map_places(
        images,
        only("rotate", math.radians(TURN) * strength, 0.0),
        only("shear_x", SHEAR * strength, 0.0),
        only("shear_y", SHEAR * strength, 0.0),
        only("translate_x", SHIFT * strength, 0.0),
        only("translate_y", SHIFT * strength, 0.0),
    )
    x = _blend(x, chosen, 1 + BLEND * strength)
    size, column = strength.abs(), (-1, 1, 1, 1)
    x = torch.where(x >= only("solarize", 1 - size, 2.0).view(column), 1 - x, x)
    posterized = chosen == OPERATIONS.index("posterize")
    step = 2 ** (BITS * size).round().view(column)
    x = torch.where(posterized.view(column), ((x * 255).round() / step).floor() * step / 255, x)
    stretched, equalized = (chosen == OPERATIONS.index(n) for n in ("autocontrast", "equalize"))
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = torch.where(stretched.view(column) & (high > low), (x - low) / (high - low).clamp_min(1e-6), x)
    return torch.where(equalized.view(column), equalize(x), x)


def _map_places(images: Tensor, angle: Tensor, shear_x: Tensor, shear_y: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Turns, shears and shifts, (B,) each; bilinear, mirrored at the border. Shifts are shares of the sides."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    ratio = images.shape[2] / images.shape[3]  # places run from -1 to 1 along both sides, whatever their lengths
    first = torch.stack((cos, (shear_x - sin) * ratio, 2 * dx), 1)
    second = torch.stack(((shear_y + sin) / ratio, cos, 2 * dy), 1)
    places = F.affine_grid(torch.stack((first, second), 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, padding_mode="reflection", align_corners=False)


def _blend(images: Tensor, chosen: Tensor, factor: Tensor) -> Tensor:
    """Goes from a plainer image towards the image, or beyond: black, its grey, the mean grey, or a smoothed one."""
    red, green, blue = images.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    weights = images.new_ones(3, 1, 3, 3)
    weights[:, :, 1, 1] = 5
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, weights / 13, groups=3)
    black, mean = torch.zeros_like(images), grey.mean((2, 3), keepdim=True)
    base = images  # that of other operations: going away from it leads nowhere
    for name, plain in {"brightness": black, "colour": grey, "contrast": mean, "sharpness": smooth}.items():
        base = torch.where((chosen == OPERATIONS.index(name)).view(-1, 1, 1, 1), plain, base)
    return (base + factor.view(-1, 1, 1, 1) * (images - base)).clamp(0, 1)


def equalize(images: Tensor) -> Tensor:
    """Spreads each channel's 256 levels evenly: of a level, the share of the pixels at or below it.

    Args:
        images: (B, C, H, W) between 0 and 1; channels of one level stay as they are.
    """
    levels = (images * 255).round().long().flatten(2)
    counts = images.new_zeros(*levels.shape[:2], 256).scatter_add_(2, levels, images.new_ones(()).expand(levels.shape))
    below = counts.cumsum(2)
    least = below.gather(2, levels.amin(2, keepdim=True))
    rest = levels.shape[2] - least
    spread = ((below.gather(2, levels) - least) / rest.clamp_min(1)).view_as(images)
    return torch.where((rest > 0).unsqueeze(3), spread, images)


def erase(images: Tensor, side: int) -> Tensor:
    """Sets a square of each image to zero, centred anywhere (cutout; DeVries & Taylor 2017)."""
    count, _, height, width = images.shape
    inside = torch.ones(count, 1, height, width, dtype=torch.bool, device=images.device)
    for axis, size in ((2, height), (3, width)):
        start = torch.randint(0, size, (count, 1), device=images.device) - side // 2
        places = torch.arange(size, device=images.device)
        cut = (places >= start) & (places < start + side)
        inside &= cut.view(count, 1, *((size, 1) if axis == 2 else (1, size)))
    return images.masked_fill(inside, 0)
