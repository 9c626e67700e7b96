"""From videos to tokens: clips, tubelets, and maps of them; from an image model's weights to a video model's.

Dimension letters: B batch, C channels of a frame, T H W grid of tubelets, L = T H W tokens, D model width.
"""

import re

import torch
from timm.models import register_notrace_function
from torch import Tensor, nn

from vision.models.patches import fit_positions, pad_to_patches
from vision.models.plain import PlainBackbone

__all__ = ["Tubelets", "as_clip", "clip_map", "frames_of", "inflate"]


@torch.fx.wrap
@register_notrace_function
def as_clip(video: Tensor, tubelet: int) -> Tensor:
    """A video (B, C, T, height, width), or an image (B, C, height, width) as one frame, in whole tubelets.

    The last frame is repeated until T is a multiple of ``tubelet``. A leaf for tracers, as it looks at the axes.

    Raises:
        ValueError: If it is neither.
    """
    if video.ndim not in (4, 5):
        raise ValueError(
            f"video: got {video.ndim} axes, wanted (B, C, T, height, width), or (B, C, height, width) for one frame"
        )
    clip = video if video.ndim == 5 else video.unsqueeze(2)
    missing = (tubelet - clip.shape[2] % tubelet) % tubelet
    return clip if missing == 0 else torch.cat((clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)


@torch.fx.wrap
@register_notrace_function
def clip_map(tokens: Tensor, grid: list[int], video: Tensor) -> Tensor:
    """Tokens (B, L, D) as (B, T, H, W, D), or (B, H, W, D) where the model was given an image."""
    return tokens.unflatten(1, grid if video.ndim == 5 else grid[1:])


class Tubelets(nn.Module):
    """Cuts videos of any size into tubelets, filled up: (B, C, T, height, width) -> (B, T', H, W, D)."""

    def __init__(
        self,
        img_size: tuple[int, int],
        num_frames: int,
        patch_size: int,
        tubelet: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.tubelet = img_size, patch_size, tubelet
        self.grid_size = (-(-num_frames // tubelet), *(-(-size // patch_size) for size in img_size))
        size = (tubelet, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, size, size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(pad_to_patches(as_clip(x, self.tubelet), self.patch_size)).permute(0, 2, 3, 4, 1)


def frames_of(rows: int, grid: list[int]) -> int:
    """Frames of a checkpoint's grid: of the same frame size as the model's if that divides, else as many frames."""
    area = grid[1] * grid[2]
    return rows // area if rows % area == 0 else grid[0]


def inflate(state: dict[str, Tensor], model: PlainBackbone) -> dict[str, Tensor]:
    """An image model's weights as the start of a video model, as published.

    Layers 4m to 4m + 3 become 6m to 6m + 3; the two layers along time keep the model's own values. A patch's weight is
    shared out over the frames of a tubelet, and every frame gets the same position embeddings.
    """
    tubelet, frames = model.patch_embed.tubelet, model.grid_size[0]  # type: ignore[union-attr]
    video = dict(model.state_dict())
    for name, value in state.items():
        if found := re.match(r"layers\.(\d+)\.(.*)", name):
            i = int(found[1])
            name = f"layers.{i // 4 * 6 + i % 4}.{found[2]}"
        elif name == "patch_embed.proj.weight":
            value = value.unsqueeze(2).repeat(1, 1, int(tubelet), 1, 1) / tubelet
        elif name == "pos_embed":
            value = fit_positions(value, model.grid_size[1:]).repeat(1, frames, 1)
        elif name.startswith(("head.", "norm_f.", "fc_norm.")):
            continue  # of another task
        video[name] = value
    return video
