"""LocalVim: Vim's frame, where each block scans along four directions of its own, some of them inside windows.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al. 2024,
https://arxiv.org/abs/2403.09338. Parameter names are the published ones, so official checkpoints load. The directions
of each block are those that the paper's search found.

Dimension letters: B batch, H W grid of patches, L tokens, D model width, E inner width, N state, R dt rank, K = 4
routes, P route positions, W convolution width.
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
from vision.models.local_mixer import LocalMixer, Rotary, rotation
from vision.models.patches import Patches, fit_positions
from vision.models.plain import PlainBackbone
from vision.routes import check_routes

__all__ = ["LocalVim"]

torch.fx.wrap("rotation")  # a leaf for plain tracers in this module too

LETTERS = {"h": "raster", "v": "columns", "2": "windows2", "7": "windows7"}
FLIPPED = {"H": "raster", "V": "columns", "@": "windows2", "&": "windows7"}
SEARCHED = "hV7& H@7& hHv7 hHvV hHvV hHvV HvV7 HvV@ hHvV hHvV hvV2 hvV@ hHV7 HvV2 hHvV hv2@ vV27 hHv2 hH@7 vV2@"


def directions(code: str) -> list[str]:
    """Names of routes for letters: h v 2 7 are rows, columns and windows of 2 and 7, H V @ & the same reversed."""
    return [LETTERS[c] if c in LETTERS else FLIPPED[c] + "_reversed" for c in code]


class LocalVimBlock(nn.Module):
    """Rotate -> Add -> Norm -> Mixer; without rotary embeddings, as Vim's."""

    def __init__(self, norm: AddNorm, mixer: LocalMixer, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Returns this block's branch and the residual stream, both (B, L, D), and the grid."""
        hidden, residual = self.norm(hidden, residual)
        return self.drop_path(self.mixer(hidden, grid)), residual, grid


class LocalVim(PlainBackbone):
    """LocalVim; ``forward_features`` returns the map (B, H, W, D) after the last norm.

    With a class token it returns tokens (B, H W + 1, D), the class token at row H W // 2.

    Args:
        img_size: Height and width of the images that the position embeddings are laid out for; others are taken too.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg`` takes the mean of the patches, ``token`` the class token, an empty string all; None takes
            the class token if there is one.
        embed_dim: Model width D.
        depth: Number of blocks.
        routes: Four names of routes, from ``vision.routes``, for each block.
        class_token: Whether there is a class token, in the middle.
        rotary: Whether rotary embeddings turn the tokens before each block; not with a class token.
        d_state: State size N.
        expand: E / D.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For unknown routes or another number of them, another pooling, or rotary with a class token.
    """

    rotary: torch.jit.Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 20,
        routes: Sequence[Sequence[str]] = tuple(tuple(directions(code)) for code in SEARCHED.split()),
        class_token: bool = False,
        rotary: bool = True,
        d_state: int = 16,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(routes) != depth:
            raise ValueError(f"routes: got those of {len(routes)} blocks, wanted four names for each of {depth} blocks")
        if class_token and rotary:
            raise ValueError("rotary: got True with class_token=True, wanted one of them: a class token has no place")
        if embed_dim % 4 and rotary:
            raise ValueError(f"embed_dim: got {embed_dim}, wanted a multiple of 4, so that rows and columns have pairs")
        patches = Patches(to_2tuple(img_size), patch_size, in_chans, embed_dim, **dd)
        for names in {tuple(names) for names in routes}:
            check_routes(names, *patches.grid_size)
        layers = [
            LocalVimBlock(
                AddNorm(embed_dim, **dd), LocalMixer(embed_dim, names, d_state, expand, class_token, **dd), rate
            )
            for names, rate in zip(routes, calculate_drop_path_rates(drop_path_rate, depth), strict=True)
        ]
        pool = ("token" if class_token else "avg") if global_pool is None else global_pool
        super().__init__(
            patches, layers, AddNorm(embed_dim, **dd), embed_dim, in_chans, num_classes, pool, drop_rate,
            [patch_size] * depth, class_token, **dd,
        )  # fmt: skip
        self.rotary = rotary
        if rotary:
            self.rope = Rotary(embed_dim, self.grid_size, 14, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``."""
        super().init_weights()
        if self.rotary:
            self.rope.init_weights()

    def prepare(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
        """Turns both streams before a block."""
        if not self.rotary:
            return hidden, residual
        table = rotation(self.rope.freqs_cos, self.rope.freqs_sin, self.grid_size, grid, self.rope.length)
        return self.rope(hidden, table), self.rope(residual, table)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: LocalVim) -> dict[str, Tensor]:
    """An official or own checkpoint as ``model`` takes it: unwrapped, positions resampled to its grid.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``state_dict`` or ``model``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    state = unwrap(state_dict)
    positions = state.get("pos_embed")
    if positions is not None and positions.shape[1] != model.pos_embed.shape[1]:
        state["pos_embed"] = fit_positions(positions, model.grid_size, class_token=model.class_token)
        for name in ("rope.freqs_cos", "rope.freqs_sin"):  # of another grid: the model's own follow from its size
            if name in state:
                state[name] = model.state_dict()[name]
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
        "paper_ids": "arXiv:2403.09338",
        "license": "apache-2.0",
        **kwargs,
    }


def _release(filename: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(url=f"https://github.com/hunto/LocalMamba/releases/download/v1.0.0/{filename}", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "local_vim_tiny.official_in1k": _release("local_vim_tiny.ckpt"),
        "local_vim_tiny_middle_cls_token.official_in1k": _release(
            "local_vim_tiny_middle_cls_token.ckpt", pool_size=None
        ),
        "local_vim_small.untrained": _cfg(),
        "test_local_vim.untrained": _cfg(input_size=(3, 96, 96), pool_size=(6, 6)),
        "test_local_vim_cls.untrained": _cfg(input_size=(3, 96, 96), pool_size=None),
    }
)


def _create_local_vim(variant: str, pretrained: bool, **kwargs: Any) -> LocalVim:
    return build_model_with_cfg(
        LocalVim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def local_vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T, 8.0 M parameters, 76.2 % on ImageNet-1k as published."""
    return _create_local_vim("local_vim_tiny", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def local_vim_tiny_middle_cls_token(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token instead of rotary embeddings, 8.0 M parameters, 77.8 % as published."""
    args = {"embed_dim": 192, "class_token": True, "rotary": False, **kwargs}
    return _create_local_vim("local_vim_tiny_middle_cls_token", pretrained, **args)


@register_model
def local_vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S, 27.8 M parameters, 81.1 % as published."""
    return _create_local_vim("local_vim_small", pretrained, **{"embed_dim": 384, **kwargs})


MICRO = tuple(tuple(directions(code)) for code in ("hV7&", "H@v2", "hHv7"))


@register_model
def test_local_vim(pretrained: bool = False, **kwargs: Any) -> LocalVim:  # noqa: PT028  named as timm names micro ones
    """A micro LocalVim for tests."""
    args = {"img_size": 96, "embed_dim": 32, "depth": 3, "routes": MICRO, "d_state": 4, **kwargs}
    return _create_local_vim("test_local_vim", pretrained, **args)


@register_model
def test_local_vim_cls(pretrained: bool = False, **kwargs: Any) -> LocalVim:  # noqa: PT028  as above
    """A micro LocalVim with a class token, for tests."""
    args = {"img_size": 96, "embed_dim": 32, "depth": 3, "routes": MICRO, "d_state": 4, "class_token": True,
            "rotary": False, **kwargs}  # fmt: skip
    return _create_local_vim("test_local_vim_cls", pretrained, **args)
