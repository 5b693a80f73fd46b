"""Published U-Nets with tokens, rebuilt small from their descriptions, at sizes where channels are as many as cells.

U-KAN (Li et al., AAAI 2025; multilayer perceptrons stand for its splines), UNeXt-S (Valanarasu and Patel, MICCAI 2022),
H2Former (He et al., TMI 2023) and MedFormer (Gao et al., 2022).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double(cin: int, middle: int, cout: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(cin, middle, 3, padding=1), nn.BatchNorm2d(middle), nn.ReLU(inplace=True)),
        *(nn.Conv2d(middle, cout, 3, padding=1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)),
    )


class PatchEmbed(nn.Module):
    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(cin, width, 3, 2, 1), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[2:]  # pyright: ignore


def as_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2).contiguous()


# ------------------------------------------------------------------ U-KAN and UNeXt


class KANBlock(nn.Module):
    """Three layers over rows of tokens, each with a depthwise convolution behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.depthwise = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width), nn.ReLU())
                for _ in range(3)
            ]
        )

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        b, n, c = x.shape
        y = self.norm(x)
        for linear, depthwise in zip(self.linear, self.depthwise):
            y = linear(y.reshape(b * n, c)).reshape(b, n, c).contiguous()
            y = depthwise(y.transpose(1, 2).view(b, c, height, width)).flatten(2).transpose(1, 2)
        return x + y


class ShiftedBlock(nn.Module):
    """Groups of channels are shifted along rows, then along columns, each before a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.depthwise = nn.Conv2d(width, width, 3, 1, 1, groups=width)

    def shifted(self, x: Tensor, axis: int, height: int, width: int) -> Tensor:
        b, _, c = x.shape
        x = F.pad(x.transpose(1, 2).view(b, c, height, width).contiguous(), (2, 2, 2, 2))
        x = torch.cat([torch.roll(part, by, axis) for part, by in zip(torch.chunk(x, 5, 1), range(-2, 3))], 1)
        x = torch.narrow(torch.narrow(x, 2, 2, height), 3, 2, width)
        return x.reshape(b, c, height * width).contiguous().transpose(1, 2)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = self.fc1(self.shifted(self.norm(x), 2, height, width))
        y = self.depthwise(y.transpose(1, 2).view(len(x), -1, height, width)).flatten(2).transpose(1, 2)
        return x + self.fc2(self.shifted(F.gelu(y), 3, height, width))


class TokenUNet(nn.Module):
    """What U-KAN and UNeXt share: three levels of convolutions, two of tokens, skips that are added."""

    def __init__(self, widths: tuple[int, int, int, int, int], block: type[nn.Module], convolve: Any) -> None:
        super().__init__()
        w1, w2, w3, w4, w5 = widths
        self.encoder1, self.encoder2, self.encoder3 = convolve(3, w1, w1), convolve(w1, w2, w2), convolve(w2, w3, w3)
        self.patch_embed3, self.patch_embed4 = PatchEmbed(w3, w4), PatchEmbed(w4, w5)
        self.block1, self.block2, self.dblock1, self.dblock2 = block(w4), block(w5), block(w4), block(w3)
        self.norm3, self.norm4, self.dnorm3, self.dnorm4 = map(nn.LayerNorm, (w4, w5, w4, w3))
        self.decoder1, self.decoder2 = convolve(w5, w5, w4), convolve(w4, w4, w3)
        self.decoder3, self.decoder4 = convolve(w3, w3, w2), convolve(w2, w2, w1)
        self.decoder5, self.final = convolve(w1, w1, w1), nn.Conv2d(w1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        t1 = F.relu(F.max_pool2d(self.encoder1(x), 2, 2))
        t2 = F.relu(F.max_pool2d(self.encoder2(t1), 2, 2))
        t3 = F.relu(F.max_pool2d(self.encoder3(t2), 2, 2))
        x, *size = self.patch_embed3(t3)
        t4 = as_map(self.norm3(self.block1(x, *size)), *size)
        x, *size = self.patch_embed4(t4)
        x = as_map(self.norm4(self.block2(x, *size)), *size)
        for decode, skip, block, norm in (
            (self.decoder1, t4, self.dblock1, self.dnorm3),
            (self.decoder2, t3, self.dblock2, self.dnorm4),
        ):
            x = F.relu(F.interpolate(decode(x), scale_factor=(2, 2), mode="bilinear")) + skip
            size = x.shape[2:]
            x = as_map(norm(block(x.flatten(2).transpose(1, 2), *size)), *size)
        x = F.relu(F.interpolate(self.decoder3(x), scale_factor=(2, 2), mode="bilinear")) + t2
        x = F.relu(F.interpolate(self.decoder4(x), scale_factor=(2, 2), mode="bilinear")) + t1
        return self.final(F.relu(F.interpolate(self.decoder5(x), scale_factor=(2, 2), mode="bilinear")))


def ukan(width: int) -> nn.Module:
    """Of widths 1/8, 1/4, 1, 5/4 and 2; `width` is 256 in the paper."""
    return TokenUNet((width // 8, width // 4, width, width * 5 // 4, width * 2), KANBlock, double)


def unext_s() -> nn.Module:
    single = lambda cin, _, cout: nn.Sequential(nn.Conv2d(cin, cout, 3, 1, 1), nn.BatchNorm2d(cout))  # noqa: E731
    return TokenUNet((8, 16, 32, 64, 128), ShiftedBlock, single)


# ------------------------------------------------------------------ H2Former


class MultiScaleEmbed(nn.Module):
    """Convolutions of several sizes at stride 2, concatenated."""

    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.projs = nn.ModuleList([nn.Conv2d(cin, width // 4, k, 2, (k - 2) // 2) for k in (2, 4, 8, 16)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([proj(x).flatten(2).transpose(1, 2) for proj in self.projs], 2))


class Merging(nn.Module):
    """Patch merging of tokens, to a map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = int(math.sqrt(n))
        x = x.view(b, side, side, c)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).view(b, -1, 4 * c)
        return self.reduction(self.norm(x)).view(b, side // 2, side // 2, 2 * c).permute(0, 3, 1, 2)


class SwinBlock(nn.Module):
    def __init__(self, width: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side, w = int(math.sqrt(n)), self.window
        y = self.norm1(x).view(b, side, side, c)
        y = torch.roll(y, (-self.shift, -self.shift), (1, 2)) if self.shift else y
        y = y.view(b, side // w, w, side // w, w, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, c)
        q, k, v = self.qkv(y).reshape(len(y), w * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(len(y), w * w, c))
        y = y.view(b, side // w, side // w, w, w, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, side, side, c)
        y = torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y
        x = x + y.view(b, n, c)
        return x + self.mlp(self.norm2(x))


class Decode(nn.Module):
    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(cin, width, 1))
        self.fuse = double(2 * width, width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.up(x), skip], 1))


class H2Former(nn.Module):
    """A residual network whose every level goes through windows of tokens, with the level above merged in."""

    def __init__(self, width: int = 4, window: int = 4) -> None:
        super().__init__()
        widths = [width << i for i in range(4)]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 1, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.maxpool, self.patch_embed = nn.MaxPool2d(3, 2, 1), MultiScaleEmbed(3, width)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(max(w // 2, width), w, 3, 1 + (w > width), 1), nn.ReLU()) for w in widths]
        )
        self.merging = nn.ModuleList([Merging(w) for w in widths[:-1]])
        self.swin_layers = nn.ModuleList(
            [nn.Sequential(SwinBlock(w, window, 0), SwinBlock(w, window, window // 2)) for w in widths]
        )
        self.decode = nn.ModuleList([Decode(2 * w, w) for w in widths[:-1]])
        self.head = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens, encoder = self.patch_embed(x), []
        x = self.maxpool(self.stem(x))
        for i, (layer, swin) in enumerate(zip(self.layers, self.swin_layers)):
            x = layer(x)
            y = swin(x.flatten(2).transpose(1, 2) + tokens if i == 0 else (x + tokens).flatten(2).transpose(1, 2))
            tokens = self.merging[i](y) if i < 3 else tokens
            x = y.view(len(y), *x.shape[2:], -1).permute(0, 3, 1, 2)
            encoder.append(x)
        for decode, skip in zip(reversed(self.decode), encoder[-2::-1]):
            x = decode(x, skip)
        return self.head(x)


# ------------------------------------------------------------------ MedFormer


class BidirectionBlock(nn.Module):
    """Attention between a feature map and a semantic map of a few slots."""

    def __init__(self, width: int, side: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.feat_qv, self.map_qv = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, 2 * width, 1)
        self.feat_out, self.map_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.heads, x.shape[2] * x.shape[3]).permute(0, 2, 3, 1)

    def forward(self, x: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        feat_q, feat_v = map(self.split, self.feat_qv(self.norm1(x)).chunk(2, 1))
        map_q, map_v = map(self.split, self.map_qv(self.norm2(slots)).chunk(2, 1))
        attention = torch.einsum("bhid,bhjd->bhij", feat_q, map_q)
        feat = torch.einsum("bhij,bhjd->bhid", attention.softmax(-1), map_v).permute(0, 3, 1, 2).reshape(x.shape)
        pooled = torch.einsum("bhji,bhjd->bhid", attention.softmax(-2), feat_v)
        return x + self.feat_out(feat), slots + self.map_out(pooled.permute(0, 3, 1, 2).reshape(slots.shape))


class Blocks(nn.Module):
    def __init__(self, width: int, side: int, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([BidirectionBlock(width, side) for _ in range(count)])

    def forward(self, x: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in self.blocks:
            x, slots = block(x, slots)
        return x, slots


class SemanticMap(nn.Module):
    """Pools a feature map to slots that lie like a map of `side` by `side`, whatever the size of the image."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side, self.base = side, nn.Conv2d(width, width, 3, padding=1)
        self.semantic = nn.Conv2d(width, side * side, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.semantic(x).flatten(2).softmax(2)
        slots = torch.einsum("bij,bkj->bik", self.base(x).flatten(2), weights)
        return slots.view(len(x), -1, self.side, self.side)


class DownBlock(nn.Module):
    def __init__(self, cin: int, width: int, side: int, convs: int, blocks: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.BatchNorm2d(4 * cin), nn.Conv2d(4 * cin, width, 1)
        self.conv_blocks = nn.Sequential(*[nn.Conv2d(width, width, 3, padding=1) for _ in range(convs)])
        self.map_gen = SemanticMap(width, side) if blocks else None
        self.trans_blocks = Blocks(width, side, blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)
        x = self.conv_blocks(self.reduction(self.norm(x)))
        return self.trans_blocks(x, self.map_gen(x) if self.map_gen else None)


class Fusion(nn.Module):
    """A transformer over the slots of all levels."""

    def __init__(self, widths: list[int], width: int) -> None:
        super().__init__()
        self.into = nn.ModuleList([nn.Conv2d(w, width, 1) for w in widths])
        self.fusion = nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        self.out = nn.ModuleList([nn.Conv2d(width, w, 1) for w in widths])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        size = maps[0].shape[2:]
        tokens = torch.cat([into(x).flatten(2).permute(0, 2, 1) for into, x in zip(self.into, maps)], 1)
        parts = self.fusion(tokens).chunk(len(maps), 1)
        return [out(x.permute(0, 2, 1).reshape(len(x), -1, *size)) for out, x in zip(self.out, parts)]


class UpBlock(nn.Module):
    def __init__(self, cin: int, width: int, side: int, convs: int, blocks: int, shortcut: bool) -> None:
        super().__init__()
        self.norm, self.reduction = nn.BatchNorm2d(cin + width), nn.Conv2d(cin + width, width, 1)
        self.map_reduction = nn.Conv2d(cin + width if shortcut else cin, width, 1)
        self.trans_blocks = Blocks(width, side, blocks)
        self.conv_blocks = nn.Sequential(*[nn.Conv2d(width, width, 3, padding=1) for _ in range(convs)])

    def forward(self, x: Tensor, skip: Tensor, slots: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor]:
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=True)
        x = self.reduction(self.norm(torch.cat([x, skip], 1)))
        x, slots = self.trans_blocks(x, self.map_reduction(slots if others is None else torch.cat([slots, others], 1)))
        return self.conv_blocks(x), slots


class MedFormer(nn.Module):
    """Beside its features go semantic maps of a fixed size; blocks return both."""

    def __init__(self, base: int = 4, side: int = 4) -> None:
        super().__init__()
        w = [base << i for i in range(5)]
        self.inc = double(3, base, base)
        self.down1, self.down2 = DownBlock(w[0], w[1], side, 2, 0), DownBlock(w[1], w[2], side, 1, 1)
        self.down3, self.down4 = DownBlock(w[2], w[3], side, 0, 2), DownBlock(w[3], w[4], side, 0, 2)
        self.map_fusion = Fusion(w[2:], 16)
        self.up1, self.up2 = UpBlock(w[4], w[3], side, 0, 2, True), UpBlock(w[3], w[2], side, 0, 1, True)
        self.up3, self.up4 = UpBlock(w[2], w[1], side, 1, 0, False), UpBlock(w[1], w[0], side, 2, 0, False)
        self.outc = nn.Conv2d(base, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x0 = self.inc(x)
        x1, _ = self.down1(x0)
        x2, map2 = self.down2(x1)
        x3, map3 = self.down3(x2)
        x4, map4 = self.down4(x3)
        maps = self.map_fusion([map2, map3, map4])
        out, slots = self.up1(x4, x3, maps[2], maps[1])
        out, slots = self.up2(out, x2, slots, maps[0])
        out, slots = self.up3(out, x1, slots, None)
        out, slots = self.up4(out, x0, slots, None)
        return self.outc(out)
