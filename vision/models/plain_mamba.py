"""PlainMamba: a plain backbone whose blocks scan the map along four snakes, with a vector for each step's direction.

Paper: "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", Yang et al. 2024,
https://arxiv.org/abs/2403.17695. Parameter names are the published ones without ``backbone.``, the last norm is
``norm_f`` here and the classifier ``head``; ``checkpoint_filter_fn`` renames them.

Two habits of the released code are kept, as its weights were trained with them: only x follows the snakes, while dt, B
and C are read in raster order, and the bias of dt enters twice.

Dimension letters: B batch, H W grid of patches, L = H W tokens, D model width, E inner width, N state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from core.block import AddNorm
from vision.models.loading import fit_to_model, unwrap
from vision.models.patches import fit_positions, pad_to_patches
from vision.models.plain import PlainBackbone
from vision.models.snake_mixer import SNAKES, SnakeMixer

__all__ = ["PlainMamba"]


class PlainMambaBlock(nn.Module):
    """Add -> Norm -> Mixer; L1's first block ends in a depthwise convolution, whose output replaces the sum."""

    def __init__(self, norm: AddNorm, mixer: SnakeMixer, drop_path: float, dw: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.has_dw = dw is not None
        self.dw = nn.Identity() if dw is None else dw

    def forward(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Returns this block's branch and the residual stream, both (B, L, D), and the grid."""
        hidden, residual = self.norm(hidden, residual)
        hidden = self.drop_path(self.mixer(hidden, grid[0], grid[1]))
        if self.has_dw:
            x = (hidden + residual).to(hidden.dtype)
            hidden = self.dw(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2).contiguous()
            residual = torch.zeros_like(residual)
        return hidden, residual, grid


class ConvStem(nn.Module):
    """Convolutions down to half size, then patches: (B, C, height, width) -> (B, H, W, D); any size, filled up."""

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        stem_convs: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.img_size, self.patch_size = img_size, patch_size
        self.grid_size = tuple(-(-size // patch_size) for size in img_size)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False, **dd), nn.BatchNorm2d(64, **dd), nn.ReLU()
        )
        convs: list[nn.Module] = []
        for _ in range(stem_convs):
            convs += [nn.Conv2d(64, 64, 3, 1, 1, bias=False, **dd), nn.BatchNorm2d(64, **dd), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.projection = nn.Conv2d(64, embed_dim, patch_size // 2, patch_size // 2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # which GPUs convolve and normalise fast
        x = pad_to_patches(self.convs(self.stem(x)), self.patch_size // 2)
        return self.projection(x).permute(0, 2, 3, 1)


class PlainMamba(PlainBackbone):
    """PlainMamba; ``forward_features`` returns the map (B, H, W, D) after the last norm.

    Args:
        img_size: Height and width of the images that the position embeddings are laid out for; others are taken too.
        patch_size: Side of a patch in pixels, even.
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg`` takes the mean of the patches, an empty string the map.
        embed_dim: Model width D.
        depth: Number of blocks.
        stem_convs: Convolutions in the stem at half size, after the first.
        dw_blocks: Blocks that end in a depthwise convolution, norm and GELU.
        d_state: State size N.
        expand: E / D.
        conv_size: Width of the depthwise convolutions in the mixers.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For an odd patch size or another pooling.
    """

    routes = ",".join(SNAKES)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        stem_convs: int = 1,
        dw_blocks: Sequence[int] = (0,),
        d_state: int = 16,
        expand: int = 2,
        conv_size: int = 7,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if patch_size % 2:
            raise ValueError(f"patch_size: got {patch_size}, wanted an even number, as the stem halves images first")

        def block(i: int, rate: float) -> PlainMambaBlock:
            dw = nn.Sequential(
                nn.Conv2d(embed_dim, embed_dim, 3, 1, 1, groups=embed_dim, bias=False, **dd),
                nn.BatchNorm2d(embed_dim, **dd),
                nn.GELU(),
            ) if i in dw_blocks else None  # fmt: skip
            mixer = SnakeMixer(embed_dim, d_state, expand, conv_size, **dd)
            return PlainMambaBlock(AddNorm(embed_dim, "layer", 1e-5, **dd), mixer, rate, dw)

        super().__init__(
            ConvStem(to_2tuple(img_size), patch_size, in_chans, embed_dim, stem_convs, **dd),
            [block(i, rate) for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))],
            AddNorm(embed_dim, "layer", 1e-6, **dd),
            embed_dim, in_chans, num_classes, global_pool, drop_rate, [patch_size] * depth, **dd,
        )  # fmt: skip
        self.init_weights()


def checkpoint_filter_fn(state_dict: dict[str, Any], model: PlainMamba) -> dict[str, Tensor]:
    """An official or own checkpoint as ``model`` takes it: unwrapped, renamed, positions resampled to its grid.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``state_dict`` or ``model``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    state = {}
    for name, value in unwrap(state_dict).items():
        name = name.removeprefix("backbone.").replace("head.fc.", "head.")
        name = name.replace(".mamba.", ".mixer.")
        state["norm_f." + name.removeprefix("ln1.") if name.startswith("ln1.") else name] = value
    if "pos_embed" in state:
        state["pos_embed"] = fit_positions(state["pos_embed"], model.grid_size)
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
        "first_conv": "patch_embed.stem.0",
        "classifier": "head",
        "paper_ids": "arXiv:2403.17695",
        "license": "apache-2.0",
        **kwargs,
    }


def _hub(filename: str) -> dict[str, Any]:
    repository = "ChenhongyiYang/PlainMamba"
    origin = f"https://huggingface.co/{repository}"
    return _cfg(hf_hub_id=repository, hf_hub_filename=filename, origin_url=origin)


default_cfgs = generate_default_cfgs(
    {
        "plain_mamba_l1.official_in1k": _hub("l1.pth"),
        "plain_mamba_l2.official_in1k": _hub("l2.pth"),
        "plain_mamba_l3.official_in1k": _hub("l3.pth"),
        "test_plain_mamba.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
    }
)


def _create_plain_mamba(variant: str, pretrained: bool, **kwargs: Any) -> PlainMamba:
    return build_model_with_cfg(
        PlainMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def plain_mamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1, 7.6 M parameters, 77.9 % on ImageNet-1k as published."""
    return _create_plain_mamba("plain_mamba_l1", pretrained, **{"embed_dim": 192, "depth": 24, **kwargs})


@register_model
def plain_mamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2, 26.1 M parameters, 81.6 % as published."""
    args = {"embed_dim": 384, "depth": 24, "stem_convs": 2, "dw_blocks": (), **kwargs}
    return _create_plain_mamba("plain_mamba_l2", pretrained, **args)


@register_model
def plain_mamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3, 51.0 M parameters, 82.3 % as published."""
    args = {"embed_dim": 448, "depth": 36, "stem_convs": 2, "dw_blocks": (), **kwargs}
    return _create_plain_mamba("plain_mamba_l3", pretrained, **args)


@register_model
def test_plain_mamba(pretrained: bool = False, **kwargs: Any) -> PlainMamba:  # noqa: PT028  named as timm names them
    """A micro PlainMamba for tests, 0.1 M parameters."""
    args = {"img_size": 96, "embed_dim": 32, "depth": 3, "d_state": 4, "conv_size": 3, **kwargs}
    return _create_plain_mamba("test_plain_mamba", pretrained, **args)
