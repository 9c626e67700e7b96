"""EfficientVMamba: atrous scans beside a convolution in the first two stages, inverted residuals in the others.

Paper: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", Pei et al. 2024,
https://arxiv.org/abs/2403.09977. Each of four routes visits every second pixel of every second row, so that together
they visit each once: a quarter of VMamba's work. Widths are those of the released weights.

Dimension letters: B batch, H W map, L = H W tokens, C channels, E inner width, K routes, R dt rank.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from core.block import AddNorm
from vision.models.loading import fit_to_model, unwrap
from vision.models.maps import ChannelAttention, PatchMerging
from vision.models.ss2d import SS2D
from vision.models.staged import Stage, StagedBackbone, build, default_cfg
from vision.models.vmamba import patch_stem

__all__ = ["EfficientVMamba"]

ATROUS = ("atrous0", "atrous1", "atrous2", "atrous3")
SCANNED = 2  # stages of scans; the others are of inverted residuals


class AtrousSS2D(SS2D):
    """``SS2D`` for routes that share the tokens among them: a token needs the time steps of its own route alone."""

    def time_steps(self, dt: Tensor, route: Tensor) -> Tensor:
        """Time steps of low-rank ones (B, L, K, R), the same for every route: (B, L, K, E), not copied."""
        length = dt.shape[1]
        visited = dt.new_zeros(self.K, length + 1).scatter(1, (route % (length + 1)).long(), 1.0)  # padding counts last
        own = dt * visited[:, :length].t().unsqueeze(-1)
        steps = F.linear(own.flatten(2), self.dt_projs_weight.transpose(0, 1).flatten(1))
        return steps.unsqueeze(2).expand(-1, -1, self.K, -1)


class ScanBlock(nn.Module):
    """Add -> Norm -> scan and convolution side by side, each weighted by channel attention; maps (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: float,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = AddNorm(dim, "layer", **dd)
        self.op = AtrousSS2D(dim, ATROUS, d_state, expand, True, True, **dd)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.se = ChannelAttention(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """This block's branch and the residual stream, which does not hold it yet; None where the stream begins."""
        x, stream = self.norm(x, residual)
        scanned = self.op(x).flatten(1, 2)
        convolved = self.conv_branch(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        branch = scanned * self.se(scanned) + convolved * self.se(convolved)
        return self.drop_path(branch).view_as(x), stream


class ConvStage(nn.Module):
    """Inverted residuals (MobileNetV2, Sandler et al. 2018) with squeeze and excitation, over maps (B, H, W, C)."""

    def __init__(self, dim: int, rates: Sequence[float], downsample: nn.Module | None, **dd: Any) -> None:
        super().__init__()
        se = partial(SqueezeExcite, rd_ratio=0.125, rd_round_fn=int)
        self.blocks = nn.ModuleList(
            InvertedResidual(dim, dim, exp_ratio=4.0, se_layer=se, drop_path_rate=rate, **dd) for rate in rates
        )
        self.downsample = nn.Identity() if downsample is None else downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  scripting wants a statement
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x.permute(0, 2, 3, 1)


class EfficientVMamba(StagedBackbone):
    """EfficientVMamba.

    Args:
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg``, or an empty string for the map itself.
        depths: Blocks of each stage.
        dims: Width of each stage, or that of the first, doubled from stage to stage.
        d_state: State size.
        expand: Inner width of the scans over the stage's.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For another pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 48,
        d_state: int = 16,
        expand: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        layers: list[nn.Module] = []
        for i, (dim, after, stage) in enumerate(zip(widths, [*widths[1:], 0], rates, strict=True)):
            merging = PatchMerging(dim, after, **dd) if after else None
            if i < SCANNED:
                layers.append(Stage([ScanBlock(dim, d_state, expand, rate, **dd) for rate in stage], merging))
            else:
                layers.append(ConvStage(dim, stage, merging, **dd))
        stem = patch_stem(in_chans, widths[0], **dd)
        super().__init__(stem, layers, widths, in_chans, num_classes, global_pool, drop_rate, **dd)


INVERTED = {  # names of an inverted residual, published and timm's
    "conv_pw.0.": "conv_pw.", "conv_pw.1.": "bn1.", "conv_dw.0.": "conv_dw.", "conv_dw.1.": "bn2.",
    "conv_pw2.0.": "conv_pwl.", "conv_pw2.1.": "bn3.",
}  # fmt: skip


def rename(name: str) -> str:
    """Our name of a published one. In the last stages blocks are numbered from 1; the merging has a number too."""
    name = name.removeprefix("classifier.")
    name = re.sub(r"^(layers\.\d+)\.\d+\.(reduction|norm)\.", r"\1.downsample.\2.", name)
    name = re.sub(r"^(layers\.\d+)\.(\d+)\.", lambda found: f"{found[1]}.blocks.{int(found[2]) - 1}.", name)
    for theirs, ours in INVERTED.items():
        name = re.sub(rf"^(layers\.\d+\.blocks\.\d+\.){re.escape(theirs)}", rf"\1{ours}", name)
    return name


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published or own checkpoint as ``model`` takes it.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``state_dict``, ``model`` or ``model_ema``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    return fit_to_model({rename(name): value for name, value in unwrap(state_dict).items()}, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return default_cfg(paper_ids="arXiv:2403.09977", license="apache-2.0", **kwargs)


def _hub(size: str) -> dict[str, Any]:
    repository = f"TerryPei/EfficientVMamba-{size.title()}"
    origin = "https://github.com/TerryPei/EfficientVMamba"
    return _cfg(hf_hub_id=repository, hf_hub_filename=f"efficient_vmamba_{size}.ckpt", origin_url=origin)


default_cfgs = generate_default_cfgs(
    {
        "efficient_vmamba_tiny.in1k": _hub("tiny"),
        "efficient_vmamba_small.in1k": _hub("small"),
        "efficient_vmamba_base.in1k": _hub("base"),
        "test_efficient_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


def _create_efficient_vmamba(variant: str, pretrained: bool, **kwargs: Any) -> StagedBackbone:
    return build(EfficientVMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def efficient_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """EfficientVMamba-T, 6.5 M parameters, 76.5 % on ImageNet-1k as published."""
    return _create_efficient_vmamba("efficient_vmamba_tiny", pretrained, **kwargs)


@register_model
def efficient_vmamba_small(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """EfficientVMamba-S, 11.3 M parameters, 78.7 % as published; the released recipe's width of 96 is not its."""
    return _create_efficient_vmamba("efficient_vmamba_small", pretrained, **{"dims": 64, **kwargs})


@register_model
def efficient_vmamba_base(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """EfficientVMamba-B, 33.7 M parameters, 81.8 % as published."""
    args = {"depths": (2, 2, 9, 2), "dims": 96, **kwargs}
    return _create_efficient_vmamba("efficient_vmamba_base", pretrained, **args)


@register_model
def test_efficient_vmamba(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:  # noqa: PT028  named as timm does
    """A micro EfficientVMamba for tests."""
    args = {"depths": (1, 1, 2, 1), "dims": 16, "d_state": 4, **kwargs}
    return _create_efficient_vmamba("test_efficient_vmamba", pretrained, **args)
