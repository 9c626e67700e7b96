"""Mamba-ND: stock Mamba layers that walk an image or a video along one axis order each, the orders taking turns.

Paper: "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data", Li et al. 2024,
https://arxiv.org/abs/2402.05892. Parameter names are the published ones without ``backbone.``; ``ln1``, ``ln2`` and
``head.fc`` are ``norm_f``, ``fc_norm`` and ``head`` here, and ``checkpoint_filter_fn`` renames them. As in the released
code the residual branches off after the norm: x = norm(x) + mixer(norm(x)).

Dimension letters: B batch, C channels, T H W grid of patches, L tokens, D model width, E inner width, N state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from core.block import AddNorm
from vision.models.clips import Tubelets, clip_map, frames_of, inflate
from vision.models.loading import fit_to_model, unwrap
from vision.models.nd_block import NDBlock, OrderedMamba, PatchMerging
from vision.models.patches import Patches, fit_positions, resample_grid
from vision.models.plain import JustAdd, PlainBackbone

__all__ = ["MambaND", "MambaNDVideo"]

for _leaf in ("clip_map", "resample_grid"):  # leaves for plain tracers in this module too
    torch.fx.wrap(_leaf)

IMAGE_ORDERS = ((0, 1), (1, 0))  # the last axis runs fastest: rows, columns
VIDEO_ORDERS = ((0, 1, 2), (0, 2, 1), (2, 1, 0))  # rows of each frame, its columns, along time


class MambaND(PlainBackbone):
    """Mamba-ND for images; ``forward_features`` returns the map (B, H, W, D) after the last norm.

    Args:
        img_size: Height and width of the images that the position embeddings are laid out for; others are taken too.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg`` takes the mean of the patches, an empty string the map.
        embed_dim: Model width D.
        depth: Number of blocks.
        merge_after: Blocks that are followed by a merging of four patches to one.
        d_state: State size N.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embeddings.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For another pooling.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 8,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 24,
        merge_after: Sequence[int] = (9,),
        d_state: int = 16,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers, reductions, reduction = [], [], patch_size
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            mixer = OrderedMamba(embed_dim, IMAGE_ORDERS[i // 2 % 2], i % 2 == 1, d_state, **dd)
            merging = PatchMerging(embed_dim, **dd) if i in merge_after else None
            layers.append(NDBlock(AddNorm(embed_dim, "layer", 1e-5, **dd), mixer, rate, 0.0, merging))
            reduction *= 2 if i in merge_after else 1
            reductions.append(reduction)
        super().__init__(
            Patches(to_2tuple(img_size), patch_size, in_chans, embed_dim, **dd),
            layers, AddNorm(embed_dim, "layer", 1e-6, **dd),
            embed_dim, in_chans, num_classes, global_pool, drop_rate, reductions,
            fc_norm=nn.LayerNorm(embed_dim, 1e-6, **dd), **dd,
        )  # fmt: skip
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``."""
        super().init_weights()
        for layer in self.layers:
            if (merging := layer.down_sample_layer) is not None:
                merging.reduction.reset_parameters()  # type: ignore[union-attr, operator]

    def embed(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens (B, L, D) with positions, and their grid."""
        x = self.patch_embed(image)
        grid = [x.shape[1], x.shape[2]]
        return self.pos_drop(x.flatten(1, 2) + resample_grid(self.pos_embed, self.grid_size, grid)), grid


class MambaNDVideo(PlainBackbone):
    """Mamba-ND for videos (B, C, T, height, width); an image (B, C, height, width) is taken as one frame.

    ``forward_features`` returns (B, T, H, W, D), for an image (B, H, W, D).

    Args:
        img_size: Height and width of the frames that the position embeddings are laid out for; others are taken too.
        num_frames: Frames that they are laid out for; other numbers are taken too.
        patch_size: Side of a patch in pixels.
        tubelet: Frames of a patch.
        in_chans: Channels of a frame.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg`` takes the mean of the patches, an empty string the map.
        embed_dim: Model width D.
        depth: Number of blocks.
        d_state: State size N.
        fc_norm: Whether a norm stands before the classifier.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embeddings.
        proj_drop_rate: Dropout after each mixer.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For another pooling.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        patch_size: int = 16,
        tubelet: int = 1,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 36,
        d_state: int = 16,
        fc_norm: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        layers = []
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            mixer = OrderedMamba(embed_dim, VIDEO_ORDERS[i // 2 % 3], i % 2 == 1, d_state, **dd)
            layers.append(NDBlock(AddNorm(embed_dim, "layer", 1e-5, **dd), mixer, rate, proj_drop_rate, None))
        super().__init__(
            Tubelets(to_2tuple(img_size), num_frames, patch_size, tubelet, in_chans, embed_dim, **dd),
            layers, JustAdd(), embed_dim, in_chans, num_classes, global_pool, drop_rate, [patch_size] * depth,
            fc_norm=nn.LayerNorm(embed_dim, **dd) if fc_norm else None, **dd,
        )  # fmt: skip
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.init_weights()

    def embed(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens (B, L, D) with positions, and their grid of frames, rows and columns."""
        x = self.patch_embed(image)
        grid = [x.shape[1], x.shape[2], x.shape[3]]
        return self.pos_drop(x.flatten(1, 3) + resample_grid(self.pos_embed, self.grid_size, grid)), grid

    def as_map(self, tokens: Tensor, grid: list[int], image: Tensor) -> Tensor:
        """Tokens (B, L, D) as (B, T, H, W, D), or (B, H, W, D) for an image."""
        return clip_map(tokens, grid, image)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: MambaND | MambaNDVideo) -> dict[str, Tensor]:
    """An official or own checkpoint as ``model`` takes it: unwrapped, renamed, positions resampled to its grid.

    A video model also takes an image model without merging, which becomes its start (``inflate``).

    Args:
        state_dict: Weights, or a dictionary that holds them under ``state_dict`` or ``model``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    names = {"patch_embed.projection": "patch_embed.proj", "ln1": "norm_f", "ln2": "fc_norm", "head.0": "fc_norm",
             "head.1": "head", "head.fc": "head", "cls_head.fc_cls": "head"}  # fmt: skip
    state = {}
    for name, value in unwrap(state_dict).items():
        name = name.removeprefix("backbone.")
        stem, _, leaf = name.rpartition(".")
        state[f"{names.get(stem, stem)}.{leaf}" if stem else name] = value
    video, patches = isinstance(model, MambaNDVideo), state.get("patch_embed.proj.weight")
    frames = None
    if isinstance(model, MambaNDVideo) and patches is not None and patches.ndim == 4:
        return fit_to_model(inflate(state, model), model)
    if "pos_embed" in state:
        if video:
            frames = frames_of(state["pos_embed"].shape[1], model.grid_size)
        state["pos_embed"] = fit_positions(state["pos_embed"], model.grid_size, frames)
    return fit_to_model(state, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2402.05892",
        **kwargs,
    }


def _hub(filename: str, **kwargs: Any) -> dict[str, Any]:
    repository = "jacklishufan/Mamba-ND"
    origin = f"https://huggingface.co/{repository}"
    return _cfg(hf_hub_id=repository, hf_hub_filename=filename, origin_url=origin, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "mamba_nd_2d_small.official_in1k": _hub("in1k/mamba2d_s.pth"),
        "mamba_nd_2d_base.official_in1k": _hub("in1k/mamba2d_b.pth"),
        "mamba_nd_3d_small.untrained": _cfg(num_classes=400),
        "mamba_nd_3d_small_tubelet2.official_ucf101": _hub("video/ucf101/ucf101.pth", num_classes=101),
        "mamba_nd_3d_small_tubelet2.official_hmdb51": _hub("video/hmdb51/hmdb51.pth", num_classes=51),
        "test_mamba_nd_2d.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
        "test_mamba_nd_3d.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


def _create_mamba_nd(cls: type[PlainBackbone], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def mamba_nd_2d_small(pretrained: bool = False, **kwargs: Any) -> MambaND:
    """Mamba-2D-S/8, 24.5 M parameters, 81.7 % on ImageNet-1k as published."""
    return _create_mamba_nd(MambaND, "mamba_nd_2d_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def mamba_nd_2d_base(pretrained: bool = False, **kwargs: Any) -> MambaND:
    """Mamba-2D-B/8, 94 M parameters, 83.0 % as published."""
    return _create_mamba_nd(MambaND, "mamba_nd_2d_base", pretrained, **{"embed_dim": 768, **kwargs})


@register_model
def mamba_nd_3d_small(pretrained: bool = False, **kwargs: Any) -> MambaNDVideo:
    """Mamba-3D-S for 16 frames with patches of one frame, as for Kinetics-400 (81.9 % as published)."""
    return _create_mamba_nd(MambaNDVideo, "mamba_nd_3d_small", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def mamba_nd_3d_small_tubelet2(pretrained: bool = False, **kwargs: Any) -> MambaNDVideo:
    """Mamba-3D-S for 32 frames with patches of two frames, as for UCF101 and HMDB51 (89.6 %, 60.9 % as published)."""
    args = {"num_frames": 32, "tubelet": 2, "fc_norm": False, **kwargs}
    return _create_mamba_nd(MambaNDVideo, "mamba_nd_3d_small_tubelet2", pretrained, **args)


@register_model
def test_mamba_nd_2d(pretrained: bool = False, **kwargs: Any) -> MambaND:  # noqa: PT028  named as timm names them
    """A micro Mamba-ND for images, for tests."""
    args = {"img_size": 96, "embed_dim": 32, "depth": 4, "merge_after": (1,), "d_state": 4, **kwargs}
    return _create_mamba_nd(MambaND, "test_mamba_nd_2d", pretrained, **args)


@register_model
def test_mamba_nd_3d(pretrained: bool = False, **kwargs: Any) -> MambaNDVideo:  # noqa: PT028  named as timm names them
    """A micro Mamba-ND for videos, for tests."""
    args = {"img_size": 96, "num_frames": 4, "tubelet": 2, "embed_dim": 32, "depth": 6, "d_state": 4, **kwargs}
    return _create_mamba_nd(MambaNDVideo, "test_mamba_nd_3d", pretrained, **args)
