"""Vision Mamba (Vim): a plain backbone whose blocks scan the patches forwards and backwards.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", Zhu et al. 2024,
https://arxiv.org/abs/2401.09417. Parameter names are the published ones, so official checkpoints load.

Each block runs its convolutions and scans along routes (``vision.routes``), or backwards: no flipped copies.

Dimension letters: B batch, H W grid of patches, M = H W patches, L = M + 1 tokens (the class token is row M // 2),
D model width, E inner width, N state, K routes, P route positions.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, get_device_dtype, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from core.block import AddNorm
from vision.models.loading import fit_to_model, unwrap
from vision.models.mixer import RouteMixer
from vision.models.patches import PatchEmbed, resample_positions
from vision.routes import check_routes

__all__ = ["Vim"]

torch.fx.wrap("resample_positions")  # a leaf for plain tracers in this module too


class VimBlock(nn.Module):
    """Add -> Norm -> Mixer; branch and residual stream travel apart, so that addition and norm are one kernel."""

    def __init__(self, norm: AddNorm, mixer: RouteMixer, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor, route: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this block's branch and the residual stream, which does not hold it yet; both (B, L, D)."""
        hidden, residual = self.norm(hidden, residual)
        return self.drop_path(self.mixer(hidden, route)), residual


class JustAdd(nn.Module):
    """What is left of the last norm when it is pruned: the sum."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return residual.to(x.dtype), residual


class Vim(nn.Module):
    """Vision Mamba.

    ``forward_features`` returns all tokens after the last norm, (B, M + 1, D), the class token at row M // 2.

    Args:
        img_size: Height and width of the images that the position embeddings are laid out for, in pixels.
        patch_size: Side of a patch in pixels.
        stride: From one patch to the next, in pixels; None is ``patch_size``.
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
        ValueError: For sizes that patches do not tile, unknown routes or another pooling.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
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
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.global_pool = _check_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.feature_dim = -1
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            to_2tuple(img_size), patch_size, stride or patch_size, in_chans, embed_dim, not dynamic_img_size, **dd
        )
        check_routes(routes, *self.patch_embed.grid_size)
        self.routes = ",".join(routes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches + 1, embed_dim, **dd))
        self.layers = nn.ModuleList(
            VimBlock(AddNorm(embed_dim, **dd), RouteMixer(embed_dim, routes, d_state, d_conv, expand, **dd), rate)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm_f: nn.Module = AddNorm(embed_dim, **dd)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.stride} for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, RouteMixer):
                module.init_weights(len(self.layers))
            elif isinstance(module, AddNorm):
                nn.init.ones_(module.weight)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names without weight decay beside all 1-D ones: tokens, positions and, as in Mamba's paper, A_log."""
        return {"cls_token", "pos_embed"} | {name for name, _ in self.named_parameters() if name.endswith("_log")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, an ``nn.Identity`` if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one, and the pooling if given."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def embed(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens with positions, the empty residual stream (both B, M + 1, D) and the routes over them (K, P)."""
        x = self.patch_embed(image)
        height, width = x.shape[1], x.shape[2]
        x = x.flatten(1, 2)
        middle = height * width // 2
        x = torch.cat((x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]), dim=1)
        x = x + resample_positions(self.pos_embed, self.patch_embed.grid_size, height, width)
        route = torch.ops.triscan.scan_routes(x, self.routes, height, width, True)
        return x, torch.zeros_like(x, dtype=torch.float32), route

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks.

        Args:
            x: Images (B, C, height, width).
            indices: The last n blocks if a number, all if None, else the blocks themselves.
            norm: Whether the last norm is applied to each of them.
            stop_early: Whether to stop after the last block asked for.
            output_fmt: ``NCHW`` for maps (B, D, H, W) without the class token, ``NLC`` for patches (B, M, D).
            intermediates_only: Whether to leave out the final features.

        Returns:
            The intermediates, preceded by what ``forward_features`` returns unless ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, wanted 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.layers), indices)
        height, width = (
            (size - self.patch_embed.patch_size) // self.patch_embed.stride + 1 for size in (x.shape[-2], x.shape[-1])
        )
        middle = height * width // 2
        hidden, residual, route = self.embed(x)
        intermediates = []
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            if self.grad_checkpointing:
                hidden, residual = checkpoint(layer, hidden, residual, route)
            else:
                hidden, residual = layer(hidden, residual, route)
            if i in take:
                tokens = self.norm_f(hidden, residual)[0] if norm else (hidden + residual).to(hidden.dtype)
                tokens = torch.cat((tokens[:, :middle], tokens[:, middle + 1 :]), dim=1)
                if output_fmt == "NCHW":
                    tokens = tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                intermediates.append(tokens)
        if intermediates_only:
            return intermediates
        return self.norm_f(hidden, residual)[0], intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of ``indices`` and, if told so, the last norm and the head."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = JustAdd()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last norm, (B, M + 1, D)."""
        x, residual, route = self.embed(x)
        for layer in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(layer, x, residual, route)
            else:
                x, residual = layer(x, residual, route)
        x, _ = self.norm_f(x, residual)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Pools tokens (B, M + 1, D) to (B, D), or returns them if the model has no pooling."""
        middle = (x.shape[1] - 1) // 2
        if self.global_pool == "token":
            return x[:, middle]
        if self.global_pool == "avg":
            return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1).mean(1)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools tokens and classifies them; ``pre_logits`` stops before the classifier."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool: got {global_pool!r}, wanted 'token', 'avg' or '' (no pooling)")
    return global_pool


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """An official or own checkpoint as ``model`` takes it: unwrapped, position embeddings resampled to its grid.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``model``, ``model_ema`` or ``state_dict``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    state = unwrap(state_dict)
    pos_embed, grid = state.get("pos_embed"), model.patch_embed.grid_size
    if pos_embed is not None and pos_embed.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(pos_embed.shape[1] - 1)
        if side * side + 1 != pos_embed.shape[1]:
            raise ValueError(
                f"pos_embed: got {pos_embed.shape[1]} rows, which are no square grid and a class token; wanted "
                f"{model.pos_embed.shape[1]} rows; build the model with the img_size it was trained at, then resample"
            )
        state["pos_embed"] = resample_positions(pos_embed, (side, side), *grid)
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
