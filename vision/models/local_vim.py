"""LocalVim: Vim's frame, where each block scans along four directions of its own, some of them inside windows.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al. 2024,
https://arxiv.org/abs/2403.09338. Parameter names are the published ones, so official checkpoints load. The directions
of each block are those that the paper's search found.

Dimension letters: B batch, H W grid of patches, L tokens, D model width, E inner width, N state, R dt rank, K = 4
routes, P route positions, W convolution width.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn

from core import hippo
from core.block import AddNorm
from core.mixers.mamba import decay_rates
from vision.models.loading import fit_to_model, unwrap
from vision.models.patches import resample_positions
from vision.models.plain import Patches, PlainBackbone, fit_positions, resample_grid
from vision.routes import check_routes

__all__ = ["LocalVim"]

for _leaf in ("decay_rates", "resample_grid", "resample_positions"):  # leaves for the tracer in this module too
    torch.fx.wrap(_leaf)

LETTERS = {"h": "raster", "v": "columns", "2": "windows2", "7": "windows7"}
FLIPPED = {"H": "raster", "V": "columns", "@": "windows2", "&": "windows7"}
SEARCHED = "hV7& H@7& hHv7 hHvV hHvV hHvV HvV7 HvV@ hHvV hHvV hvV2 hvV@ hHV7 HvV2 hHvV hv2@ vV27 hHv2 hH@7 vV2@"


def directions(code: str) -> list[str]:
    """Names of routes for letters: h v 2 7 are rows, columns and windows of 2 and 7, H V @ & the same reversed."""
    return [LETTERS[c] if c in LETTERS else FLIPPED[c] + "_reversed" for c in code]


def rotation_angles(height: int, width: int, dim: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """Angles (H W, dim) of a rotary embedding: the first half of the channels turns with the row, the second with the
    column. Channels 2i and 2i + 1 of a half turn by position * 10000^(-2i / half), positions run from 0 to ``length``.
    """
    half = dim // 2
    with torch.device(device):
        rates = (10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)).repeat_interleave(2)
        rows, columns = ((torch.arange(n, dtype=torch.float64) / n * length)[:, None] * rates for n in (height, width))
        size = (height, width, half)
        return torch.cat((rows[:, None].expand(size), columns[None].expand(size)), dim=-1).flatten(0, 1)


@functools.lru_cache(maxsize=64)
def _rotation(height: int, width: int, dim: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    angles = rotation_angles(height, width, dim, length, device)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


@torch.library.custom_op("triscan::rotation", mutates_args=())
def _rotation_op(like: Tensor, height: int, width: int, dim: int, length: int) -> Tensor:
    """Cosines and sines (2, H W, dim) of ``rotation_angles``, in dtype and place of ``like``: tracers keep an op."""
    sizes = (height, width, dim, length, like.dtype, like.device)
    if like.is_cuda and torch.cuda.is_current_stream_capturing():  # a graph's memory is not to be kept beyond it
        return _rotation.__wrapped__(*sizes)
    return _rotation(*sizes).clone()


@_rotation_op.register_fake
def _(like: Tensor, height: int, width: int, dim: int, length: int) -> Tensor:
    return like.new_empty((2, height * width, dim))


@torch.fx.wrap
@register_notrace_function
def rotation(freqs_cos: Tensor, freqs_sin: Tensor, own: list[int], grid: list[int], length: int) -> Tensor:
    """Cosines and sines (2, H W, D) on a grid: the tables given on their own, computed on any other."""
    if own == grid:
        return torch.stack((freqs_cos, freqs_sin))
    return torch.ops.triscan.rotation(freqs_cos, grid[0], grid[1], freqs_cos.shape[1], length)


class Rotary(nn.Module):
    """Turns pairs of channels by angles that grow with row and column (Su et al. 2021; EVA-02, Fang et al. 2023)."""

    def __init__(
        self,
        dim: int,
        grid: list[int],
        length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.length = grid, length
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(grid[0] * grid[1], dim, device=device, dtype=dtype))

    def init_weights(self) -> None:
        """Fills the tables; also after ``to_empty``."""
        angles = rotation_angles(self.grid[0], self.grid[1], self.freqs_cos.shape[1], self.length)
        self.freqs_cos.copy_(angles.cos())
        self.freqs_sin.copy_(angles.sin())

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Turns (B, L, D) by a table (2, L, D)."""
        pairs = x.unflatten(-1, [-1, 2])
        crossed = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return (x * table[0] + crossed * table[1]).to(x.dtype)


class ChannelGate(nn.Module):
    """Weighs the channels of each route by what they hold on the whole: y * sigmoid(W2 gelu(W1 mean(norm(y)))).

    (LocalMamba, section 4.3, without the spatial branch, which the released models do without.)
    """

    def __init__(
        self, dim: int, ratio: float = 0.125, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **dd)
        self.global_reduce = nn.Linear(dim, int(dim * ratio), **dd)
        self.channel_select = nn.Linear(int(dim * ratio), dim, **dd)

    def forward(self, y: Tensor) -> Tensor:
        """Outputs of the routes (B, L, K, E) to their weighed sum (B, L, E)."""
        whole = self.norm(y).mean(1)
        gate = self.channel_select(F.gelu(self.global_reduce(whole))).sigmoid()
        return torch.einsum("blke,bke->ble", y, gate.to(y.dtype))


class LocalMixer(nn.Module):
    """Mamba along four routes with parameters of their own, whose outputs a channel gate weighs and sums.

    Args:
        dim: D.
        routes: Names of the four routes.
        d_state: N.
        expand: E / D.
        class_token: Whether a class token stands in the middle of the tokens.
        device: Where the parameters live.
        dtype: Their dtype; A_log and D are float32 at least.
    """

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int,
        expand: int,
        class_token: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(routes) != 4:
            raise ValueError(f"routes: got {len(routes)} in a block ({', '.join(routes)}), wanted 4, as LocalVim has")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        inner = expand * dim
        self.routes, self.class_token = ",".join(routes), class_token
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        for k in range(4):
            self.register_parameter(f"A_log_{k}", nn.Parameter(torch.empty(inner, d_state, **wide)))
            self.register_parameter(f"D_{k}", nn.Parameter(torch.empty(inner, **wide)))
            # Holds weight (E, 1, W) and bias (E,); the convolution itself is kernels.causal_conv1d.
            self.add_module(f"conv1d_{k}", nn.Conv1d(inner, inner, 4, groups=inner, **dd))
            self.add_module(f"x_proj_{k}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, **dd))
            self.add_module(f"dt_proj_{k}", nn.Linear(self.dt_rank, inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.attn = ChannelGate(inner, **dd)

    @torch.no_grad()
    def init_weights(self, depth: int) -> None:
        """Mamba's dt, S4D-Real A, D = 1, out_proj divided by sqrt(depth).

        The released code sets the biases of dt to zero by mistake; here they are Mamba's.
        """
        for k in range(4):
            dt_proj = getattr(self, f"dt_proj_{k}")
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            dt = hippo.log_uniform_dt(dt_proj.out_features, floor=1e-4, device=dt_proj.bias.device)
            dt_proj.bias.copy_(hippo.inverse_softplus(dt))
            A_log = getattr(self, f"A_log_{k}")
            A_log.copy_(torch.log(-hippo.s4d_real(self.d_state)).to(A_log.device))
            nn.init.ones_(getattr(self, f"D_{k}"))
            getattr(self, f"conv1d_{k}").reset_parameters()
            getattr(self, f"x_proj_{k}").reset_parameters()
        for layer in (self.in_proj, self.out_proj, self.attn.global_reduce, self.attn.channel_select):
            layer.reset_parameters()
        self.out_proj.weight /= math.sqrt(depth)

    def forward(self, x: Tensor, grid: list[int]) -> Tensor:
        """Mixes tokens (B, L, D) of a grid; returns (B, L, D)."""
        route = torch.ops.triscan.scan_routes(x, self.routes, grid[0], grid[1], self.class_token)
        # Spelt out, as TorchScript looks no attribute up by a computed name.
        A_log = torch.stack([self.A_log_0, self.A_log_1, self.A_log_2, self.A_log_3])
        D = torch.stack([self.D_0, self.D_1, self.D_2, self.D_3])
        convs = [self.conv1d_0.weight, self.conv1d_1.weight, self.conv1d_2.weight, self.conv1d_3.weight]
        bias_0, bias_1, bias_2, bias_3 = self.conv1d_0.bias, self.conv1d_1.bias, self.conv1d_2.bias, self.conv1d_3.bias
        assert bias_0 is not None  # nn.Conv1d declares it optional
        assert bias_1 is not None
        assert bias_2 is not None
        assert bias_3 is not None
        x_weight = torch.stack([self.x_proj_0.weight, self.x_proj_1.weight, self.x_proj_2.weight, self.x_proj_3.weight])
        dt_weight = torch.stack(
            [self.dt_proj_0.weight, self.dt_proj_1.weight, self.dt_proj_2.weight, self.dt_proj_3.weight]
        )
        dt_bias = torch.stack([self.dt_proj_0.bias, self.dt_proj_1.bias, self.dt_proj_2.bias, self.dt_proj_3.bias])

        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, _ = torch.ops.triscan.causal_conv1d(
            x, torch.stack(convs).squeeze(2), torch.stack([bias_0, bias_1, bias_2, bias_3]), route,
            None, None, None, "silu", False, False, "auto",
        )  # fmt: skip
        dt, B, C = torch.einsum("blke,kce->blkc", x, x_weight).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, _, _ = torch.ops.triscan.selective_scan(
            x, dt, decay_rates(A_log), B.unsqueeze(3), C.unsqueeze(3), D, z, dt_bias, dt_weight, route,
            None, None, None, True, True, "keep", False, False, "auto",
        )  # fmt: skip
        return self.out_proj(self.attn(y))


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

    class_token: torch.jit.Final[bool]
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
        self.pools = ("token", "avg", "") if class_token else ("avg", "")
        pool = ("token" if class_token else "avg") if global_pool is None else global_pool
        super().__init__(
            patches, layers, AddNorm(embed_dim, **dd), embed_dim, in_chans, num_classes, pool, drop_rate,
            [patch_size] * depth, prefix_rows=int(class_token), **dd,
        )  # fmt: skip
        self.output_fmt = None if class_token else "NHWC"
        self.class_token, self.rotary = class_token, rotary
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        if rotary:
            self.rope = Rotary(embed_dim, self.grid_size, 14, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``."""
        super().init_weights()
        if self.class_token:
            trunc_normal_(self.cls_token, std=0.02)
        if self.rotary:
            self.rope.init_weights()

    def embed(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens (B, L, D) with positions, and their grid."""
        x = self.patch_embed(image)
        grid = [x.shape[1], x.shape[2]]
        x = x.flatten(1, 2)
        if not self.class_token:
            return x + resample_grid(self.pos_embed, self.grid_size, grid), grid
        middle = grid[0] * grid[1] // 2
        x = torch.cat((x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]), dim=1)
        own = (self.grid_size[0], self.grid_size[1])
        return x + resample_positions(self.pos_embed, own, grid[0], grid[1]), grid

    def prepare(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
        """Turns both streams before a block."""
        if not self.rotary:
            return hidden, residual
        table = rotation(self.rope.freqs_cos, self.rope.freqs_sin, self.grid_size, grid, self.rope.length)
        return self.rope(hidden, table), self.rope(residual, table)

    def as_map(self, tokens: Tensor, grid: list[int], image: Tensor) -> Tensor:
        """Tokens as a map (B, H, W, D); with a class token as they are."""
        return tokens if self.class_token else tokens.unflatten(1, grid)

    def patch_map(self, tokens: Tensor, grid: list[int], image: Tensor) -> Tensor:
        """The patches among the tokens as a map (B, H, W, D)."""
        if self.class_token:
            middle = grid[0] * grid[1] // 2
            tokens = torch.cat((tokens[:, :middle], tokens[:, middle + 1 :]), dim=1)
        return tokens.unflatten(1, grid)

    def pool(self, x: Tensor) -> Tensor:
        """Pools what ``forward_features`` returns to (B, D), or returns it if the model has no pooling."""
        if self.global_pool == "":
            return x
        if not self.class_token:
            return x.flatten(1, -2).mean(1)
        middle = (x.shape[1] - 1) // 2
        if self.global_pool == "token":
            return x[:, middle]
        return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1).mean(1)


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
        if model.class_token:
            side = math.isqrt(positions.shape[1] - 1)
            height, width = model.grid_size
            state["pos_embed"] = resample_positions(positions, (side, side), height, width)
        else:
            state["pos_embed"] = fit_positions(positions, model.grid_size)
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
