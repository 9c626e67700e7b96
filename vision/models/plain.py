"""What plain backbones share: one width from the first block to the last, features as maps, timm's methods.

A family brings a patch embedding, blocks and ``embed``; its maps are channel-last, (B, H, W, D), for videos
(B, T, H, W, D). Between blocks the branch and the residual stream travel apart, so that addition and norm are one
kernel.

Dimension letters: B batch, C channels of an image, T H W grid of patches, L tokens, D model width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision.models.patches import resample_grid, resample_positions

__all__ = ["JustAdd", "PlainBackbone"]

for _leaf in ("resample_grid", "resample_positions"):  # leaves for plain tracers in this module too
    torch.fx.wrap(_leaf)


class JustAdd(nn.Module):
    """In the place of a last norm that a model doesn't have, or that was pruned: the sum."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x
        return residual.to(x.dtype), residual


def without_middle(tokens: Tensor) -> Tensor:
    """Tokens (B, M + 1, D) without the class token, row M // 2: (B, M, D)."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat((tokens[:, :middle], tokens[:, middle + 1 :]), dim=1)


class PlainBackbone(nn.Module):
    """A trunk of blocks on one grid of tokens, with the methods that timm expects.

    A block is called as ``block(hidden, residual, grid)``, with the branch of the block before and the residual stream
    (B, L, D) and the grid as a list; it returns the three for the next.

    ``forward_features`` returns maps, with a class token all tokens (B, M + 1, D), the class token at row M // 2.

    Args:
        patch_embed: Maps images to (B, *grid, D); has ``grid_size``.
        layers: The blocks.
        norm_f: The last norm: (branch, stream) -> (normalised sum, sum).
        embed_dim: D.
        in_chans: Channels of an image.
        num_classes: Outputs of the classifier; 0 leaves it out.
        global_pool: How tokens are pooled, one of ``pools``.
        drop_rate: Dropout before the classifier.
        class_token: Whether there is a class token, in the middle of the patches.
        fc_norm: A norm of the pooled features.
        reductions: Pixels from one token to the next after each block.
        device: Where the parameters live.
        dtype: Their dtype.
    """

    __constants__ = ("class_token",)  # of TorchScript, which then leaves the other branch out

    def __init__(
        self,
        patch_embed: nn.Module,
        layers: Sequence[nn.Module],
        norm_f: nn.Module,
        embed_dim: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        reductions: Sequence[int],
        class_token: bool = False,
        fc_norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.class_token = num_classes, in_chans, class_token
        self.pools: tuple[str, ...] = ("token", "avg", "") if class_token else ("avg", "")
        self.output_fmt = None if class_token else "NHWC"
        self.global_pool = self.check_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.feature_dim = -1
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.grid_size: list[int] = [int(size) for size in patch_embed.grid_size]  # type: ignore[union-attr, arg-type]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size) + int(class_token), embed_dim, **dd))
        self.layers = nn.ModuleList(layers)
        self.norm_f = norm_f
        self.fc_norm = nn.Identity() if fc_norm is None else fc_norm
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": r} for i, r in enumerate(reductions)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    # What a family writes.

    def embed(self, image: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens (B, L, D) with positions, and their grid."""
        x = self.patch_embed(image)
        grid = [x.shape[1], x.shape[2]]
        x = x.flatten(1, 2)
        if not self.class_token:
            return x + resample_grid(self.pos_embed, self.grid_size, grid), grid
        middle = x.shape[1] // 2
        x = torch.cat((x[:, :middle], self.cls_token.expand(x.shape[0], -1, -1), x[:, middle:]), dim=1)
        own = (self.grid_size[0], self.grid_size[1])
        return x + resample_positions(self.pos_embed, own, grid[0], grid[1]), grid

    def prepare(self, hidden: Tensor, residual: Tensor, grid: list[int]) -> tuple[Tensor, Tensor]:
        """What is done to both streams before each block."""
        return hidden, residual

    def as_map(self, tokens: Tensor, grid: list[int], image: Tensor) -> Tensor:
        """Tokens (B, L, D) as what ``forward_features`` returns for ``image``."""
        return tokens if self.class_token else tokens.unflatten(1, grid)

    def patch_map(self, tokens: Tensor, grid: list[int], image: Tensor) -> Tensor:
        """The patches among the tokens (B, L, D) as a channel-last map."""
        if self.class_token:
            return without_middle(tokens).unflatten(1, grid)
        return self.as_map(tokens, grid, image)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialises all parameters as published; also after ``to_empty``."""
        for value in (self.pos_embed, self.cls_token) if self.class_token else (self.pos_embed,):
            trunc_normal_(value, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.BatchNorm2d)):
                module.reset_parameters()
            elif isinstance(module, nn.LayerNorm) or type(module).__name__ == "AddNorm":
                for name, value in module.named_parameters(recurse=False):
                    nn.init.constant_(value, float(name == "weight"))
        for layer in self.layers:
            layer.mixer.init_weights(len(self.layers))  # type: ignore[union-attr, operator]
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def infers(self, hidden: Tensor) -> bool:
        """Whether tokens (B, L, D) go through blocks and last norm by ``infer``."""
        return False

    @torch.jit.ignore
    def infer(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """What blocks and last norm make of tokens (B, L, D), by a shorter way that gives no gradients."""
        raise NotImplementedError

    # timm's contract.

    @torch.jit.ignore
    def check_pool(self, global_pool: str) -> str:
        """Returns the name of a pooling, or refuses it."""
        if global_pool not in self.pools:
            wanted = ", ".join(repr(name) for name in self.pools if name)
            raise ValueError(f"global_pool: got {global_pool!r}, wanted {wanted} or '' (no pooling)")
        return global_pool

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names without weight decay beside all 1-D ones: tokens, positions, directions and A_log."""
        names = {name for name, _ in self.named_parameters()}
        free = {name for name in names if "A_log" in name or name.endswith(("_log", "direction_Bs"))}
        return free | {"pos_embed", "cls_token"} & names

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": r"^layers\.(\d+)" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f|^fc_norm", (99999,))],
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
            self.global_pool = self.check_pool(global_pool)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

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
            x: Images (B, C, height, width), or what else the model takes.
            indices: The last n blocks if a number, all if None, else the blocks themselves.
            norm: Whether the last norm is applied to each of them.
            stop_early: Whether to stop after the last block asked for.
            output_fmt: ``NCHW`` for maps (B, D, H, W), ``NHWC`` for maps (B, H, W, D), ``NLC`` for patches (B, L, D).
            intermediates_only: Whether to leave out the final features.

        Returns:
            The intermediates, preceded by what ``forward_features`` returns unless ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, wanted 'NCHW', 'NHWC' or 'NLC'")
        take, last = feature_take_indices(len(self.layers), indices)
        image = x
        hidden, grid = self.embed(image)
        residual = torch.zeros_like(hidden, dtype=torch.float32)
        intermediates = []
        for i, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            hidden, residual = self.prepare(hidden, residual, grid)
            if self.grad_checkpointing:
                hidden, residual, grid = checkpoint(layer, hidden, residual, grid)
            else:
                hidden, residual, grid = layer(hidden, residual, grid)
            if i in take:
                tokens = self.norm_f(hidden, residual)[0] if norm else (hidden + residual).to(hidden.dtype)
                features = self.patch_map(tokens, grid, image)
                if output_fmt == "NCHW":
                    features = features.movedim(-1, 1).contiguous()
                elif output_fmt == "NLC":
                    features = features.flatten(1, -2)
                intermediates.append(features)
        if intermediates_only:
            return intermediates
        return self.as_map(self.norm_f(hidden, residual)[0], grid, image), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of ``indices`` and, if told so, the last norm and the head."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = JustAdd()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """The map after the last norm, (B, H, W, D); with a class token all tokens, (B, M + 1, D)."""
        hidden, grid = self.embed(x)
        residual = torch.zeros_like(hidden, dtype=torch.float32)
        if not torch.jit.is_scripting() and self.infers(hidden):
            return self.as_map(self.infer(hidden, residual), grid, x)
        for layer in self.layers:
            hidden, residual = self.prepare(hidden, residual, grid)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                hidden, residual, grid = checkpoint(layer, hidden, residual, grid)
            else:
                hidden, residual, grid = layer(hidden, residual, grid)
        hidden, residual = self.norm_f(hidden, residual)
        return self.as_map(hidden, grid, x)

    def pool(self, x: Tensor) -> Tensor:
        """Pools what ``forward_features`` returns to (B, D), or returns it if the model has no pooling."""
        if self.global_pool == "":
            return x
        if not self.class_token:
            return x.flatten(1, -2).mean(1)
        return x[:, (x.shape[1] - 1) // 2] if self.global_pool == "token" else without_middle(x).mean(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools a map and classifies it; ``pre_logits`` stops before the classifier."""
        x = self.pool(x)
        if self.global_pool != "":
            x = self.fc_norm(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
