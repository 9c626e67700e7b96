"""VMamba: a hierarchical backbone whose blocks scan maps row by row, column by column, and both backwards.

Paper: "VMamba: Visual State Space Model", Liu et al. 2024, https://arxiv.org/abs/2401.10166. Three flavours: vanilla
(v0: 16 states, gated), the current one (one state, no gate, an MLP in each block) and one on state space duality (m2).
Parameter names are the published ones, but for classifier and norm; ``checkpoint_filter_fn`` takes every published
layout.

Dimension letters: B batch, H W map, D model width, N state, K routes.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vision.models.loading import fit_to_model, unwrap
from vision.models.maps import Conv2d, LayerNorm, PatchConv2d, PatchMerging
from vision.models.ss2d import SS2D, SSD2D
from vision.models.staged import MixerBlock, Mlp, Stage, StagedBackbone, build, default_cfg

__all__ = ["VMamba"]

CROSS = ("raster", "columns", "raster_reversed", "columns_reversed")  # cross-scan, section 4.2


class VMamba(StagedBackbone):
    """VMamba.

    Args:
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg``, or an empty string for the map itself.
        depths: Blocks of each stage.
        dims: Width D of each stage, or that of the first, doubled from stage to stage.
        d_state: State size N.
        expand: Inner width over D.
        mlp_ratio: Hidden width of the MLPs over D; 0 leaves them out.
        mixer: ``s6``, the selective scan, or ``ssd``, state space duality.
        gated: Whether the mixers have a gate.
        conv_bias: Whether their convolutions have a bias.
        stem: ``patch``, one 4 x 4 convolution and merging of 2 x 2 pixels between the stages; ``conv``, two 3 x 3
            convolutions and one between the stages; ``small``, as ``conv``, but the stem keeps the image's size, for
            images of few pixels.
        routes: Names of the scan routes, from ``vision.routes``; each has parameters of its own.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For unknown routes, mixers or stems, another pooling, or widths that heads don't divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        expand: float = 1.0,
        mlp_ratio: float = 4.0,
        mixer: Literal["s6", "ssd"] = "s6",
        gated: bool = False,
        conv_bias: bool = False,
        stem: Literal["patch", "conv", "small"] = "conv",
        routes: Sequence[str] = CROSS,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if mixer not in ("s6", "ssd"):
            raise ValueError(f"mixer: got {mixer!r}, wanted 's6' or 'ssd'")
        if stem not in ("patch", "conv", "small"):
            raise ValueError(f"stem: got {stem!r}, wanted 'patch', 'conv' or 'small'")
        stride = 1 if stem == "small" else 2
        widths = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        op = SS2D if mixer == "s6" else SSD2D

        def block(dim: int, rate: float) -> MixerBlock:
            mlp = Mlp(dim, int(mlp_ratio * dim), **dd) if mlp_ratio else None
            return MixerBlock(dim, op(dim, routes, d_state, expand, conv_bias, gated, **dd), mlp, rate, **dd)

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        super().__init__(
            patch_stem(in_chans, widths[0], **dd) if stem == "patch" else _conv_stem(in_chans, widths[0], stride, **dd),
            [
                Stage([block(dim, rate) for rate in stage], _downsample(stem, dim, after, **dd) if after else None)
                for dim, after, stage in zip(widths, [*widths[1:], 0], rates, strict=True)
            ],
            widths, in_chans, num_classes, global_pool, drop_rate, 1 if stem == "small" else 4, **dd,
        )  # fmt: skip


def patch_stem(in_chans: int, dim: int, **dd: Any) -> nn.Module:
    """A 4 x 4 convolution and a norm: (B, height, width, in_chans) -> (B, height / 4, width / 4, dim)."""
    return nn.Sequential(OrderedDict([("0", PatchConv2d(in_chans, dim, 4, **dd)), ("2", LayerNorm(dim, **dd))]))


def _conv_stem(in_chans: int, dim: int, stride: int, **dd: Any) -> nn.Module:
    """Two 3 x 3 convolutions of that stride, each with a norm, GELU between them; sizes are rounded up."""
    half = dim // 2
    return nn.Sequential(
        OrderedDict(
            [
                ("0", Conv2d(in_chans, half, 3, stride, 1, **dd)),
                ("2", LayerNorm(half, **dd)),
                ("4", nn.GELU()),
                ("5", Conv2d(half, dim, 3, stride, 1, **dd)),
                ("7", LayerNorm(dim, **dd)),
            ]
        )
    )


def _downsample(stem: str, dim: int, out_dim: int, **dd: Any) -> nn.Module:
    """Between two stages, to half the size, rounded up."""
    if stem == "patch":
        return PatchMerging(dim, out_dim, **dd)
    return nn.Sequential(OrderedDict([("1", Conv2d(dim, out_dim, 3, 2, 1, **dd)), ("3", LayerNorm(out_dim, **dd))]))


RENAMED = (  # old names, of other layouts or of early files, and ours; in this order
    (r"^classifier\.", ""),
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.op\.conv2d\.1\.", ".op.conv2d."),
    (r"\.op\.(x_proj|dt_projs)\.(weight|bias)$", r".op.\1_\2"),
)
MERGING = ((r"\.downsample\.1\.", ".downsample.norm."), (r"\.downsample\.2\.", ".downsample.reduction."))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published or own checkpoint as ``model`` takes it.

    Taken are the layouts of VMamba's training code (channels first or last), of its single file, and of the first
    release; weights of linear maps may be those of 1 x 1 convolutions.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``model``, ``model_ema`` or ``state_dict``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    wanted = model.state_dict()
    merges = any(name.endswith("downsample.reduction.weight") for name in wanted)
    state = {}
    for name, value in unwrap(state_dict).items():
        for old, new in (*RENAMED, *(MERGING if merges else ())):
            name = re.sub(old, new, name)
        target = wanted.get(name)
        linear = value.ndim == 4 and value.shape[2:] == (1, 1)
        routed = name.endswith(("x_proj_weight", "dt_projs_weight", "dt_projs_bias"))
        if target is not None and (linear or routed) and value.numel() == target.numel():
            value = value.reshape(target.shape)
        state[name] = value
    return fit_to_model(state, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return default_cfg(paper_ids="arXiv:2401.10166", license="mit", **kwargs)


def _release(tag: str, filename: str) -> dict[str, Any]:
    origin = "https://github.com/MzeroMiko/VMamba"
    return _cfg(url=f"{origin}/releases/download/%23{tag}/{filename}", origin_url=origin)


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_v0.in1k": _release("v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vmamba_small_v0.in1k": _release("v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vmamba_base_v0.in1k": _release("v0cls", "vssmbase_dp06_ckpt_epoch_241.pth"),
        "vmamba_tiny_s2l5.in1k": _release("v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s2l15.in1k": _release("v2cls", "vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base_s2l15.in1k": _release("v2cls", "vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_tiny_s1l8.in1k": _release("v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small_s1l20.in1k": _release("v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20.in1k": _release("v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_m2.untrained": _cfg(),
        "vmamba_small_m2.untrained": _cfg(),
        "vmamba_base_m2.untrained": _cfg(),
        "test_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
        "test_vmamba_v0.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
        "test_vmamba_m2.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)

VANILLA = {"d_state": 16, "expand": 2.0, "mlp_ratio": 0.0, "gated": True, "conv_bias": True, "stem": "patch"}
DUALITY = {"d_state": 64, "mixer": "ssd"}
MICRO = {"depths": (1, 1, 2, 1), "dims": 16}


def _create_vmamba(variant: str, pretrained: bool, **kwargs: Any) -> StagedBackbone:
    return build(VMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """Vanilla VMamba-T, 22.9 M parameters, 82.2 % on ImageNet-1k as published."""
    return _create_vmamba("vmamba_tiny_v0", pretrained, **{**VANILLA, "depths": (2, 2, 9, 2), **kwargs})


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """Vanilla VMamba-S, 44.4 M parameters, 83.5 % as published."""
    return _create_vmamba("vmamba_small_v0", pretrained, **{**VANILLA, "depths": (2, 2, 27, 2), **kwargs})


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """Vanilla VMamba-B, 76.3 M parameters, 83.7 % as published."""
    return _create_vmamba("vmamba_base_v0", pretrained, **{**VANILLA, "depths": (2, 2, 27, 2), "dims": 128, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-T[s2l5], 30.7 M parameters, 82.5 % as published."""
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **{"depths": (2, 2, 5, 2), "expand": 2.0, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-S[s2l15], 50.1 M parameters, 83.6 % as published."""
    return _create_vmamba("vmamba_small_s2l15", pretrained, **{"depths": (2, 2, 15, 2), "expand": 2.0, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-B[s2l15], 88.6 M parameters, 83.9 % as published."""
    args = {"depths": (2, 2, 15, 2), "dims": 128, "expand": 2.0, **kwargs}
    return _create_vmamba("vmamba_base_s2l15", pretrained, **args)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-T[s1l8], 30.2 M parameters, 82.6 % as published."""
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **{"depths": (2, 2, 8, 2), **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-S[s1l20], 49.0 M parameters, 83.3 % as published."""
    return _create_vmamba("vmamba_small_s1l20", pretrained, **{"depths": (2, 2, 20, 2), **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-B[s1l20], 86.6 M parameters, 83.8 % as published."""
    return _create_vmamba("vmamba_base_s1l20", pretrained, **{"depths": (2, 2, 20, 2), "dims": 128, **kwargs})


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-T on state space duality, 64 states; no published weights."""
    return _create_vmamba("vmamba_tiny_m2", pretrained, **{**DUALITY, "depths": (2, 2, 4, 2), **kwargs})


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-S on state space duality."""
    return _create_vmamba("vmamba_small_m2", pretrained, **{**DUALITY, "depths": (2, 2, 12, 2), **kwargs})


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """VMamba-B on state space duality."""
    return _create_vmamba("vmamba_base_m2", pretrained, **{**DUALITY, "depths": (2, 2, 12, 2), "dims": 128, **kwargs})


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:  # noqa: PT028  named as timm names such
    """A micro VMamba for tests."""
    return _create_vmamba("test_vmamba", pretrained, **{**MICRO, **kwargs})


@register_model
def test_vmamba_v0(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:  # noqa: PT028  as above
    """A micro vanilla VMamba for tests."""
    return _create_vmamba("test_vmamba_v0", pretrained, **{**VANILLA, **MICRO, "d_state": 4, **kwargs})


@register_model
def test_vmamba_m2(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:  # noqa: PT028  as above
    """A micro VMamba on state space duality for tests."""
    return _create_vmamba("test_vmamba_m2", pretrained, **{**DUALITY, **MICRO, "d_state": 16, **kwargs})
