"""What hierarchical backbones share: stages of blocks over ever smaller maps, and timm's contract for them.

Maps are (B, H, W, C). Dimension letters: B batch, H W map, C channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from core.block import AddNorm
from vision.models.loading import configurations
from vision.models.maps import LayerNorm
from vision.models.ss2d import MapMixer

__all__ = ["MixerBlock", "Mlp", "Stage", "StagedBackbone", "build", "default_cfg"]


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) of maps (B, H, W, C); the hidden layer is not kept for the backward."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.triscan.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


class MixerBlock(nn.Module):
    """Add -> Norm -> mixer and, with an MLP, Add -> Norm -> MLP; maps (B, H, W, C) of any size.

    Branch and residual stream travel apart, so that addition and norm are one kernel.

    Args:
        dim: C.
        op: The mixer.
        mlp: The second branch; None leaves it out.
        drop_path: Probability with which a branch is dropped.
        device: Where the norms' parameters live.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        op: nn.Module,
        mlp: nn.Module | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.op = AddNorm(dim, "layer", device=device, dtype=dtype), op
        self.norm2 = None if mlp is None else AddNorm(dim, "layer", device=device, dtype=dtype)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """This block's branch and the residual stream, which does not hold it yet; None where the stream begins."""
        x, stream = self.norm(x, residual)
        x = self.drop_path(self.op(x))
        if self.norm2 is not None and self.mlp is not None:
            x, stream = self.norm2(x, stream)
            x = self.drop_path(self.mlp(x))
        return x, stream


class Stage(nn.Module):
    """Blocks over maps of one size; the model calls ``downsample`` after it.

    Args:
        blocks: Modules that take and return a branch and the residual stream.
        downsample: To the next stage's maps; None for the last.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = nn.Identity() if downsample is None else downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor | None = None
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(block, x, residual)
            else:
                x, residual = block(x, residual)
        return x if residual is None else (x + residual).to(x.dtype)


class StagedBackbone(nn.Module):
    """A hierarchical backbone: stem, stages, norm, mean, classifier, with the methods that timm expects.

    ``forward_features`` returns the last stage's map after the norm, (B, H, W, C).

    Args:
        patch_embed: Stem, from maps (B, height, width, channels of an image) to those of the first stage.
        layers: The stages: modules with ``downsample`` and ``grad_checkpointing``.
        dims: Width of each stage.
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: ``avg``, or an empty string for the map itself.
        drop_rate: Dropout before the classifier.
        reduction: Pixels of the image to one of the first stage, each way.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: For another pooling.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        layers: Sequence[nn.Module],
        dims: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        reduction: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, _check_pool(global_pool)
        self.num_features = self.head_hidden_size = dims[-1]
        self.output_fmt, self.feature_dim = "NHWC", -1
        self.patch_embed, self.layers = patch_embed, nn.ModuleList(layers)
        self.norm: nn.Module = LayerNorm(dims[-1], device=device, dtype=dtype)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": dim, "reduction": reduction * 2**i} for i, dim in enumerate(dims)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``.

        As in Swin: linear maps from N(0, 0.02^2), norms at one; the mixers' own parameters by their ``init_weights``.
        """
        for module in self.modules():
            if isinstance(module, MapMixer):
                module.init_weights()
            elif isinstance(module, AddNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names without weight decay beside all 1-D ones: decays, skips and biases of the scans."""
        return {n for n, _ in self.named_parameters() if n.endswith(("A_logs", "Ds", "dt_projs_bias"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        fine = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of keeping its activations."""
        for layer in self.layers:
            layer.grad_checkpointing = enable

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
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def embed(self, image: Tensor) -> Tensor:
        """The first stage's map of images (B, channels, height, width)."""
        return self.patch_embed(image.permute(0, 2, 3, 1))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of chosen stages.

        Args:
            x: Images (B, channels, height, width).
            indices: The last n stages if a number, all if None, else the stages themselves.
            norm: Whether the last norm is applied to the last stage's.
            stop_early: Whether to stop after the last stage asked for.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: Whether to leave out the final features.

        Returns:
            The intermediates, preceded by what ``forward_features`` returns unless ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, wanted 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.layers), indices)
        x = self.embed(x)
        final, intermediates = len(self.layers) - 1, []
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = layer(x)
            if i in take:
                tap = self.norm(x) if norm and i == final else x
                intermediates.append(tap.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else tap)
            if i < (last if stop_early else final):
                x = layer.downsample(x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if not stop_early or last == final else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what comes after the last stage of ``indices`` and, if told so, the last norm and the head."""
        take, last = feature_take_indices(len(self.layers), indices)
        if last < len(self.layers) - 1:  # the norm and the head are those of another width
            prune_norm = True
        self.layers = self.layers[: last + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map after the norm, (B, H, W, C)."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer.downsample(layer(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools a map (B, H, W, C) and classifies it; ``pre_logits`` stops before the classifier."""
        x = self.head_drop(x.mean((1, 2)) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, height, width) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool: got {global_pool!r}, wanted 'avg' or '' (no pooling)")
    return global_pool


def default_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's default configuration of a staged backbone, with these entries changed."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "head",
        **kwargs,
    }


def build(model: type[StagedBackbone], variant: str, pretrained: bool, filter_fn: Any, **kwargs: Any) -> StagedBackbone:
    """timm's ``build_model_with_cfg`` for a staged backbone.

    Args:
        model: Its class.
        variant: Registered name.
        pretrained: Whether to load weights.
        filter_fn: Brings the names of published files to ours.
        kwargs: Arguments of the class and of timm.
    """
    with configurations():
        return build_model_with_cfg(
            model,
            variant,
            pretrained,
            pretrained_filter_fn=filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **kwargs,
        )
