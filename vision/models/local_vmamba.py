"""LocalVMamba: vanilla VMamba whose blocks scan along routes that were searched for, windows among them.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", Huang et al. 2024,
https://arxiv.org/abs/2403.09338. The outputs of a block's four scans are weighted by channel attention and added.
Parameter names are the published ones, but for classifier, norm and attention (``checkpoint_filter_fn``).

Dimension letters: B batch, L tokens, E inner width, K routes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vision.models.loading import fit_to_model, unwrap
from vision.models.local_vim import directions
from vision.models.maps import ChannelAttention, PatchMerging
from vision.models.ss2d import SS2D
from vision.models.staged import MixerBlock, Stage, StagedBackbone, build, default_cfg
from vision.models.vmamba import patch_stem

__all__ = ["LocalVMamba"]

TINY = "hH7& HV2@ HV@7 HvV2 hHV@ HV2@ h@7& hHvV hV7& Hv2& vV2& hHV@ V@7& HV@& Hv7&"
SMALL = (
    "hvV& hHv7 HvV7 Hv@7 Hv@7 HV2& HvV7 hvV7 hvV7 hvV& hHvV hvV2 vV@7 hHv2 HvV& hHvV hvV& hvV& hHV7 HV@7 HvV& "
    "vV7& hvV& HvV2 hvV@ hHv7 hH7& hV2@ hV27 hvV& Hv@7 HV7& hv7&"
)


def searched(table: str) -> list[tuple[str, ...]]:
    """Names of the routes of each block, from a table with a group of letters (see ``directions``) a block."""
    return [tuple(directions(group)) for group in table.split()]


class LocalSS2D(SS2D):
    """``SS2D`` whose routes' outputs are weighted, channel by channel, before they are added."""

    def __init__(
        self,
        dim: int,
        routes: Sequence[str],
        d_state: int,
        expand: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, routes, d_state, expand, True, True, device, dtype)
        self.attn = ChannelAttention(int(expand * dim), device=device, dtype=dtype)

    def scan(self, x: Tensor, route: Tensor) -> Tensor:
        y = self.scan_routes(x, route, "keep")
        return (y * self.attn(y)).sum(2)


class LocalVMamba(StagedBackbone):
    """LocalVMamba.

    Args:
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg``, or an empty string for the map itself.
        depths: Blocks of each stage.
        dims: Width of each stage, or that of the first, doubled from stage to stage.
        d_state: State size.
        expand: Inner width over the stage's.
        routes: Names of the scan routes of each block, from ``vision.routes``.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; earlier ones have less, linearly.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For unknown routes, routes of more or fewer blocks than there are, or another pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 16,
        expand: float = 2.0,
        routes: Sequence[Sequence[str]] = tuple(searched(TINY)),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(routes) != sum(depths):
            raise ValueError(
                f"routes: got those of {len(routes)} blocks, wanted {sum(depths)}, a list of names for each block"
            )
        widths = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        remaining = iter(routes)

        def block(dim: int, rate: float) -> MixerBlock:
            return MixerBlock(dim, LocalSS2D(dim, next(remaining), d_state, expand, **dd), None, rate, **dd)

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        super().__init__(
            patch_stem(in_chans, widths[0], **dd),
            [
                Stage([block(dim, rate) for rate in stage], PatchMerging(dim, after, **dd) if after else None)
                for dim, after, stage in zip(widths, [*widths[1:], 0], rates, strict=True)
            ],
            widths, in_chans, num_classes, global_pool, drop_rate, **dd,
        )  # fmt: skip


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A published or own checkpoint as ``model`` takes it.

    Args:
        state_dict: Weights, or a dictionary that holds them under ``state_dict``, ``model`` or ``model_ema``.
        model: The model that is to load them.

    Raises:
        ValueError: If they are those of another model; the message lists what doesn't fit.
    """
    state = unwrap(state_dict)
    renamed = {n.removeprefix("classifier.").replace(".multi_scan.attn.", ".attn."): t for n, t in state.items()}
    return fit_to_model(renamed, model)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    origin = "https://github.com/hunto/LocalMamba"
    return default_cfg(paper_ids="arXiv:2403.09338", license="apache-2.0", origin_url=origin, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "local_vmamba_tiny.untrained": _cfg(),
        "local_vmamba_small.in1k": _cfg(
            url="https://github.com/hunto/LocalMamba/releases/download/v1.0.0/local_vssm_small.ckpt"
        ),
        "test_local_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


def _create_local_vmamba(variant: str, pretrained: bool, **kwargs: Any) -> StagedBackbone:
    return build(LocalVMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


@register_model
def local_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """LocalVMamba-T with searched routes, 25.5 M parameters, 82.7 % on ImageNet-1k as published; no weights are."""
    return _create_local_vmamba("local_vmamba_tiny", pretrained, **kwargs)


@register_model
def local_vmamba_small(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:
    """LocalVMamba-S with searched routes, 49.7 M parameters, 83.7 % as published."""
    args = {"depths": (2, 2, 27, 2), "routes": searched(SMALL), **kwargs}
    return _create_local_vmamba("local_vmamba_small", pretrained, **args)


@register_model
def test_local_vmamba(pretrained: bool = False, **kwargs: Any) -> StagedBackbone:  # noqa: PT028  named as timm does
    """A micro LocalVMamba for tests."""
    args = {"depths": (1, 1, 2, 1), "dims": 16, "d_state": 4, "routes": searched("hH7& hV2@ v27& HV@& hHvV"), **kwargs}
    return _create_local_vmamba("test_local_vmamba", pretrained, **args)
