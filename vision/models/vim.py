"""Vision Mamba (Vim): a plain backbone whose blocks scan the patches forwards and backwards.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", Zhu et al. 2024,
https://arxiv.org/abs/2401.09417. Parameter names are the published ones, so official checkpoints load.

Each block runs its convolutions and scans along routes (``vision.routes``), or backwards: no flipped copies.

Dimension letters: B batch, H W grid of patches, M = H W patches, L = M + 1 tokens (the class token is row M // 2),
D model width, E inner width, N state, K routes, P route positions.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, lecun_normal_, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from core.block import AddNorm
from vision.models.loading import fit_to_model, unwrap
from vision.models.mixer import RouteMixer
from vision.models.patches import ConvStem, PatchEmbed, fit_positions
from vision.models.plain import PlainBackbone
from vision.models.ready import Ready, make_ready
from vision.routes import check_routes

__all__ = ["Vim"]


class VimBlock(nn.Module):
    """Add -> Norm -> Mixer; branch and residual stream travel apart, so that addition and norm are one kernel."""

    def __init__(self, norm: AddNorm, mixer: RouteMixer, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Returns this block's branch and the residual stream without it, both (B, L, D), and the grid."""
        hidden, residual = self.norm(hidden, residual)
        return self.drop_path(self.mixer(hidden, grid)), residual, grid

    @torch.jit.ignore
    def infer(self, hidden: Tensor, residual: Tensor, ready: Ready) -> tuple[Tensor, Tensor]:
        """The same without gradients, with weights that were made ready."""
        hidden, residual = self.norm(hidden, residual)
        return self.mixer.infer(hidden, ready), residual


class Vim(PlainBackbone):
    """Vision Mamba.

    ``forward_features`` returns all tokens after the last norm, (B, M + 1, D), the class token at row M // 2.

    Args:
        img_size: Height and width of the images that the position embeddings are laid out for, in pixels.
        patch_size: Side of a patch in pixels.
        stride: From one patch to the next, in pixels; None is ``patch_size``.
        stem: ``patch``, one convolution; ``conv``, two of 3 x 3, the second with the stride, for small images.
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``token`` takes the class token, ``avg`` the mean of the patches, an empty string all tokens.
        embed_dim: Model width D.
        depth: Number of blocks.
        d_state: State size N.
        d_conv: Width of the convolutions.
        expand: E / D.
        routes: Names of the scan routes, from ``vision.routes``; each has parameters of its own in each block.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        dynamic_img_size: Whether other image sizes are taken too, with resampled position embeddings.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For sizes that patches do not tile, unknown routes or stems, or another pooling.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        stem: Literal["patch", "conv"] = "patch",
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["token", "avg", ""] = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        routes: Sequence[str] = ("raster", "raster_reversed"),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        stride, size = stride or patch_size, to_2tuple(img_size)
        if stem not in ("patch", "conv"):
            raise ValueError(f"stem: got {stem!r}, wanted 'patch' or 'conv'")
        patches: PatchEmbed | ConvStem = (
            PatchEmbed(size, patch_size, stride, in_chans, embed_dim, not dynamic_img_size, **dd)
            if stem == "patch"
            else ConvStem(size, stride, in_chans, embed_dim, **dd)
        )
        check_routes(routes, *patches.grid_size)
        layers = [
            VimBlock(AddNorm(embed_dim, **dd), RouteMixer(embed_dim, routes, d_state, d_conv, expand, **dd), rate)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        ]
        super().__init__(
            patches, layers, AddNorm(embed_dim, **dd), embed_dim, in_chans, num_classes, global_pool, drop_rate,
            [stride] * depth, class_token=True, **dd,
        )  # fmt: skip
        self.init_weights()

    @torch.jit.ignore
    def infers(self, hidden: Tensor) -> bool:
        """On a GPU without gradients, unless somebody looks into the blocks or has changed them."""
        if type(hidden) is not Tensor or torch.is_grad_enabled() or self.training:  # the first in a tracer
            return False
        if not hidden.is_cuda or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return False
        plain = all(
            type(b) is VimBlock and type(b.mixer.in_proj) is nn.Linear and b.mixer.in_order for b in self.layers
        )
        return plain and not any(m._forward_hooks or m._forward_pre_hooks for m in self.layers.modules())

    @torch.jit.ignore
    def infer(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Weights are made ready for all blocks at once."""
        blocks: list[Any] = list(self.layers)
        mixer = blocks[0].mixer
        cast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if cast else mixer.in_proj.weight.dtype
        ready = make_ready([block.mixer for block in blocks], dtype)
        for block, weights in zip(blocks, ready, strict=True):
            hidden, residual = block.infer(hidden, residual, weights)
        return self.norm_f(hidden, residual)[0]

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``."""
        super().init_weights()
        lecun_normal_(self.patch_embed.proj.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[union-attr, arg-type]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """An official or own checkpoint as ``model`` takes it: unwrapped, position embeddings resampled to its grid.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``model``, ``model_ema`` or ``state_dict``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    state = unwrap(state_dict)
    if "pos_embed" in state:
        state["pos_embed"] = fit_positions(state["pos_embed"], model.grid_size, class_token=True)
    return fit_to_model(state, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2401.09417",
        "license": "apache-2.0",
        **kwargs,
    }


def _hub(repository: str, filename: str) -> dict[str, Any]:
    origin = f"https://huggingface.co/hustvl/{repository}"
    return _cfg(hf_hub_id=f"hustvl/{repository}", hf_hub_filename=filename, origin_url=origin)


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.hustvl_in1k": _hub("Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_patch16_stride8_224.hustvl_ft_in1k": _hub("Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_224.hustvl_in1k": _hub("Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_patch16_stride8_224.hustvl_ft_in1k": _hub("Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base_patch16_224.hustvl_in1k": _hub("Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
        "test_vim.untrained": _cfg(input_size=(3, 160, 160)),
    }
)


def _create_vim(variant: str, pretrained: bool, **kwargs: Any) -> Vim:
    return build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7.1 M parameters, 76.1 % on ImageNet-1k as published."""
    return _create_vim("vim_tiny_patch16_224", pretrained, **{"embed_dim": 192, "depth": 24, **kwargs})


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+, overlapping patches (27 x 27 tokens), 78.3 % as published."""
    args = {"embed_dim": 192, "depth": 24, "stride": 8, **kwargs}
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **args)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 25.8 M parameters, 80.5 % as published."""
    return _create_vim("vim_small_patch16_224", pretrained, **{"embed_dim": 384, "depth": 24, **kwargs})


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+, overlapping patches, 81.6 % as published."""
    args = {"embed_dim": 384, "depth": 24, "stride": 8, **kwargs}
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **args)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 97.6 M parameters, 81.9 % as published."""
    return _create_vim("vim_base_patch16_224", pretrained, **{"embed_dim": 768, "depth": 24, **kwargs})


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028  a model, named as timm names micro ones
    """A micro Vim for tests, 0.2 M parameters."""
    return _create_vim("test_vim", pretrained, **{"img_size": 160, "embed_dim": 64, "depth": 4, **kwargs})
