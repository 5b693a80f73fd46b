"""VM-UNet (Ruan, Li and Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from .patches import PatchExpand
from .selective_scan import Backend, selective_scan
from .swin_unet import init_linear, stochastic_depth


class VMUNet(nn.Module):
    """VMamba stages down and up, skips added; 27 M parameters. Keys are those of the public implementation.

    Args:
        num_classes: output channels.
        in_channels: image channels; if 3, an image with one channel is repeated.
        width: channels after the patch embedding; they double at every stage.
        depths: blocks per encoder stage, fine to coarse.
        depths_up: blocks per decoder stage, coarse to fine.
        state: states per channel of the selective scan.
        drop_path: stochastic depth of the coarsest blocks; it falls to 0 towards the finest on both sides.
        scan: the selective scan's `backend`; default: the environment's RESEG_SCAN, or "auto".
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_up: Sequence[int] = (2, 2, 2, 1),
        state: int = 16,
        drop_path: float = 0.2,
        scan: Backend | None = None,
    ) -> None:
        super().__init__()
        if len(depths) != len(depths_up):
            raise ValueError(f"{len(depths)} depths and {len(depths_up)} depths_up: give one of each per stage")
        self.in_channels = in_channels
        self.vmunet = _VMUNet(num_classes, in_channels, width, depths, depths_up, state, drop_path, scan)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels or 1, H, W) to logits (B, num_classes, H, W); H and W are multiples of 32 (four stages)."""
        unit = 2 << len(self.vmunet.layers)
        if any(size % unit for size in x.shape[2:]):
            raise ValueError(f"VMUNet takes heights and widths that are multiples of {unit}, not {tuple(x.shape[2:])}")
        if x.shape[1] == 1 and self.in_channels == 3:
            x = x.expand(-1, 3, -1, -1)
        return self.vmunet(x)


class _VMUNet(nn.Module):
    """The network itself: the public implementation's keys all begin with `vmunet`."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int,
        depths: Sequence[int],
        depths_up: Sequence[int],
        state: int,
        drop_path: float,
        scan: Backend | None,
    ) -> None:
        super().__init__()
        stages = len(depths)
        dims = [width << i for i in range(stages)]
        down = stochastic_depth(drop_path, depths)
        up = [rates[::-1] for rates in stochastic_depth(drop_path, depths_up[::-1])][::-1]
        self.patch_embed = PatchEmbed(
            None, 4, in_channels, width, norm_layer=nn.LayerNorm, output_fmt="NHWC", strict_img_size=False
        )
        self.layers = nn.ModuleList(
            [VSSStage(dims[i], state, down[i], scan, downsample=i < stages - 1) for i in range(stages)]
        )
        self.layers_up = nn.ModuleList(
            [VSSStage(dims[-1 - i], state, up[i], scan, upsample=i > 0) for i in range(stages)]
        )
        self.final_up = PatchExpand(width, width // 4, 4)
        self.final_conv = nn.Conv2d(width // 4, num_classes, 1)
        self.apply(init_linear)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.patch_embed(x), []
        for stage in self.layers:
            skips.append(x)
            x = stage(x)
        x = self.layers_up[0](x)
        # each decoder stage upsamples first, so the skips are those one level coarser; the finest one is not used
        for stage, skip in zip(self.layers_up[1:], skips[::-1]):
            x = stage(x + skip)
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


class VSSStage(nn.Module):
    """[patch expansion,] VSS blocks [, patch merging], on maps (B, H, W, C)."""

    def __init__(
        self,
        dim: int,
        state: int,
        rates: Sequence[float],
        scan: Backend | None,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([VSSBlock(dim, state, rate, scan) for rate in rates])
        self.downsample = PatchMerging(dim) if downsample else nn.Identity()
        self.upsample = PatchExpand(2 * dim, dim) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, H / 2, W / 2, 2 dim), or (B, H, W, 2 dim) to (B, 2H, 2W, dim), or as it was."""
        x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class VSSBlock(nn.Module):
    """x + drop_path(SS2D(LayerNorm(x))) (Liu et al., "VMamba", 2024)."""

    def __init__(self, dim: int, state: int = 16, drop_path: float = 0.0, scan: Backend | None = None) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = SS2D(dim, state, scan)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, H, W, dim)."""
        return x + self.drop_path(self.self_attention(self.ln_1(x)))


class SS2D(nn.Module):
    """2D selective scan: a gated state space model over four directions (Liu et al., "VMamba", 2024).

    Args:
        dim: channels; inside there are twice as many.
        state: states per inner channel and direction.
        scan: the `backend` of the scan.
    """

    def __init__(self, dim: int, state: int = 16, scan: Backend | None = None) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.sizes = [rank, state, state]
        self.scan: Backend | None = scan
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, state))
        self.Ds = nn.Parameter(torch.empty(4 * inner))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the scan's own parameters; the submodules draw theirs."""
        inner, rank = self.dt_projs_weight.shape[1:]
        self.x_proj_weight.uniform_(-(inner**-0.5), inner**-0.5)  # as nn.Linear begins
        self.dt_projs_weight.uniform_(-(rank**-0.5), rank**-0.5)
        self.dt_projs_bias.copy_(initial_dt_bias(4, inner))
        self.A_logs.copy_(torch.arange(1.0, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs))
        self.Ds.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, H, W, dim)."""
        height, width = x.shape[1:3]
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        xs = cross_scan(x)
        dt, b, c = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight).split(self.sizes, 2)
        dt = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_projs_weight)
        rates, dt_bias = -self.A_logs.float().exp(), self.dt_projs_bias.flatten()
        y = selective_scan(xs.flatten(1, 2), dt.flatten(1, 2), rates, b, c, self.Ds, dt_bias, self.scan)  # pyright: ignore[reportCallIssue]
        y = cross_merge(y.unflatten(1, (4, -1)), height, width)
        return self.out_proj(self.out_norm(y.permute(0, 2, 3, 1)) * F.silu(gate))


def cross_scan(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4, C, H W): by rows, by columns, and both from the end."""
    forward = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([forward, forward.flip(-1)], 1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, C, H W) to (B, C, H, W): the scans back in the places they came from, summed."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rows.unflatten(-1, (height, width)) + columns.unflatten(-1, (width, height)).transpose(2, 3)


def initial_dt_bias(*shape: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Inverse softplus of step sizes drawn log-uniformly from [low, high] (Gu and Dao, "Mamba", 2023)."""
    dt = torch.empty(shape).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
