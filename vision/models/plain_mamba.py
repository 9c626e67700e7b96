"""PlainMamba: a plain backbone whose blocks scan the map along four snakes, with a vector for each step's direction.

Paper: "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", Yang et al. 2024,
https://arxiv.org/abs/2403.17695. Parameter names are the published ones without ``backbone.``, the last norm is
``norm_f`` here and the classifier ``head``; ``checkpoint_filter_fn`` renames them.

Two habits of the released code are kept, as its weights were trained with them: only x follows the snakes, while dt, B
and C are read in raster order, and the bias of dt enters twice.

Dimension letters: B batch, H W grid of patches, L = H W tokens, D model width, E inner width, N state, R dt rank,
K = 4 routes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from core import hippo
from core.block import AddNorm
from core.mixers.mamba import decay_rates
from vision.models.loading import fit_to_model, unwrap
from vision.models.patches import fit_positions, pad_to_patches
from vision.models.plain import PlainBackbone
from vision.routes import scan_routes

__all__ = ["PlainMamba"]

torch.fx.wrap("decay_rates")  # branches on the dtype: a leaf for the tracer in this module too

SNAKES = ("snake", "snake_reversed", "snake_columns", "snake_columns_reversed")


@functools.lru_cache(maxsize=64)
def snake_tables(height: int, width: int, device: torch.device) -> Tensor:
    """The four snakes and what step led to each of their positions.

    Returns:
        (2, K, L) int32: token, and direction of the step into it: 0 start, 1 right, 2 left, 3 up, 4 down.
    """
    with torch.device(device):
        tokens = scan_routes(SNAKES, height, width)
        rows, columns = tokens // width, tokens % width
        down, right = (F.pad(t.diff(dim=1), (1, 0)) for t in (rows, columns))
        steps = (right == 1) * 1 + (right == -1) * 2 + (down == -1) * 3 + (down == 1) * 4
        return torch.stack((tokens, steps.to(torch.int32)))


@torch.library.custom_op("triscan::snake_tables", mutates_args=())
def _snake_tables(tokens: Tensor, height: int, width: int) -> Tensor:
    """``snake_tables`` on the device of ``tokens``: an op, so that tracers keep it."""
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph's memory is not to be kept beyond it
        return snake_tables.__wrapped__(height, width, tokens.device)
    return snake_tables(height, width, tokens.device).clone()


@_snake_tables.register_fake
def _(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.new_empty((2, 4, height * width), dtype=torch.int32)


class SnakeMixer(nn.Module):
    """Mamba along four snakes that share all parameters, after a convolution on the map.

    x, z = in_proj(u); x = silu(conv2d(x)); dt, B, C = x_proj(x); for each snake, B_t += direction_Bs[step into t];
    y = out_proj(sum of the scans * silu(z))   (PlainMamba, equations 4 to 6).

    Args:
        dim: D.
        d_state: N.
        expand: E / D.
        conv_size: Width of the depthwise convolution, odd.
        device: Where the parameters live.
        dtype: Their dtype; A_log, D and direction_Bs are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: int,
        conv_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        inner = expand * dim
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv2d = nn.Conv2d(inner, inner, conv_size, padding=conv_size // 2, groups=inner, **dd)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **wide))
        self.D = nn.Parameter(torch.empty(inner, **wide))
        self.direction_Bs = nn.Parameter(torch.empty(5, d_state, **wide))
        self.out_proj = nn.Linear(inner, dim, **dd)

    @torch.no_grad()
    def init_weights(self, depth: int) -> None:
        """Mamba's dt, S4D-Real A, D = 1, small direction vectors."""
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            layer.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = hippo.log_uniform_dt(self.dt_proj.out_features, floor=1e-4, device=self.dt_proj.bias.device)
        self.dt_proj.bias.copy_(hippo.inverse_softplus(dt))
        self.A_log.copy_(torch.log(-hippo.s4d_real(self.d_state)).to(self.A_log.device))
        nn.init.ones_(self.D)
        trunc_normal_(self.direction_Bs, std=0.02)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Mixes tokens (B, H W, D) of a grid; returns (B, H W, D)."""
        tables = torch.ops.triscan.snake_tables(x, height, width)
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv2d(x.transpose(1, 2).unflatten(2, [height, width])).flatten(2).transpose(1, 2)
        x = F.silu(x).contiguous()
        dt, B, C = torch.split(self.x_proj(x), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        directions = self.direction_Bs[tables[1].t()]  # (L, K, N)
        B = (B.unsqueeze(2) + directions.to(B.dtype)).unsqueeze(3)
        y, _, _ = torch.ops.triscan.selective_scan(
            x, dt.unsqueeze(2).expand(-1, -1, 4, -1), decay_rates(self.A_log).expand(4, -1, -1), B,
            C.unsqueeze(2).unsqueeze(3).expand(-1, -1, 4, -1, -1), self.D.expand(4, -1), z,
            (2 * self.dt_proj.bias).expand(4, -1), self.dt_proj.weight.expand(4, -1, -1), tables[0],
            None, None, None, True, False, "sum", False, False, "auto",
        )  # fmt: skip
        return self.out_proj(y)


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
