"""Swin-UNet (Cao et al., "Swin-Unet: Unet-like Pure Transformer for Medical Image Segmentation", 2021), tiny."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torch import Tensor, nn

from .patches import PatchExpand


class SwinUNet(nn.Module):
    """Four Swin stages down, their mirror up, patch expansion in place of upsampling; 27 M parameters.

    Keys and buffers are those of the public implementation. Its tokens are (B, L, C) throughout.

    Args:
        num_classes: output channels.
        in_channels: image channels; if 3, an image with one channel is repeated.
        image_size: side of the image; the shift masks are made for it.
        width: channels after the patch embedding; they double at every stage.
        depths: blocks per stage, fine to coarse, the same on both sides.
        heads: attention heads per stage.
        window: side of the attention windows.
        drop_path: stochastic depth of the deepest block; the others grow linearly towards it.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        drop_path: float = 0.2,
    ) -> None:
        super().__init__()
        stages = len(depths)
        if len(heads) != stages:
            raise ValueError(f"{stages} depths and {len(heads)} heads: give one of each per stage")
        if image_size % (4 << stages - 1):
            raise ValueError(f"image_size={image_size}: it must be a multiple of {4 << stages - 1} for {stages} stages")
        self.in_channels = in_channels
        self.grids = [image_size // (4 << i) for i in range(stages)]
        dims = [width << i for i in range(stages)]
        rates = stochastic_depth(drop_path, depths)

        def stage(i: int, **scale: bool) -> SwinStage:
            return SwinStage(dims[i], self.grids[i], heads[i], window, rates[i], **scale)

        coarse_to_fine = range(stages - 2, -1, -1)
        self.patch_embed = PatchEmbed(image_size, 4, in_channels, width, norm_layer=nn.LayerNorm)
        self.layers = nn.ModuleList([stage(i, downsample=i < stages - 1) for i in range(stages)])
        self.layers_up = nn.ModuleList([PatchExpand(dims[-1], dims[-1] // 2)])
        self.layers_up.extend(stage(i, upsample=i > 0) for i in coarse_to_fine)
        self.concat_back_dim = nn.ModuleList([nn.Identity()])  # the first expansion has no skip
        self.concat_back_dim.extend(nn.Linear(2 * dims[i], dims[i]) for i in coarse_to_fine)
        self.norm = nn.LayerNorm(dims[-1])
        self.norm_up = nn.LayerNorm(width)
        self.up = PatchExpand(width, width, 4)
        self.output = nn.Conv2d(width, num_classes, 1, bias=False)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels or 1, image_size, image_size) to logits (B, num_classes, image_size, image_size)."""
        if x.shape[1] == 1 and self.in_channels == 3:
            x = x.expand(-1, 3, -1, -1)
        x, skips = self.patch_embed(x), []
        for stage in self.layers:
            skips.append(x)
            x = stage(x)
        x = _on_grid(self.layers_up[0], self.norm(x), self.grids[-1])
        for stage, merge, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], skips[-2::-1]):
            x = stage(merge(torch.cat([x, skip], -1)))
        x = self.up(self.norm_up(x).unflatten(1, (self.grids[0], self.grids[0])))
        return self.output(x.permute(0, 3, 1, 2))


class SwinStage(nn.Module):
    """Swin blocks, every other one shifted, then patch merging or patch expansion, or neither."""

    def __init__(
        self,
        dim: int,
        grid: int,
        heads: int,
        window: int,
        rates: Sequence[float],
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList(
            [SwinBlock(dim, grid, heads, window, window // 2 if i % 2 else 0, rate) for i, rate in enumerate(rates)]
        )
        self.downsample = PatchMerging(dim) if downsample else None
        self.upsample = PatchExpand(dim, dim // 2) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L / 4, 2C), (B, 4L, C / 2) or (B, L, C)."""
        for block in self.blocks:
            x = block(x)
        resize = self.downsample or self.upsample
        return x if resize is None else _on_grid(resize, x, self.grid)


class SwinBlock(SwinTransformerBlock):
    """timm's Swin block on tokens, with the buffers in the state_dict, where the public checkpoints have them."""

    def __init__(self, dim: int, grid: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__(dim, (grid, grid), num_heads=heads, window_size=window, shift_size=shift, drop_path=drop_path)
        self.grid = grid
        index = self.attn.relative_position_index
        self.register_buffer("attn_mask", self.attn_mask)  # pyright: ignore[reportArgumentType]
        self.attn.register_buffer("relative_position_index", index)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        return super().forward(x.unflatten(1, (self.grid, self.grid))).flatten(1, 2)


def _on_grid(module: nn.Module, tokens: Tensor, grid: int) -> Tensor:
    """A module of maps (B, H, W, C) applied to tokens (B, L, C)."""
    return module(tokens.unflatten(1, (grid, grid))).flatten(1, 2)


def stochastic_depth(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop rates per stage and block, growing linearly from 0 to `last` over all blocks."""
    blocks = sum(depths)
    rates = iter([last * i / max(1, blocks - 1) for i in range(blocks)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear(module: nn.Module) -> None:
    """Linear weights from a truncated normal of 0.02, biases zero; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
