"""TransUNet (Chen et al., "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation", 2021).

The published size is R50+ViT-B/16: a ResNet-50 with weight-standardised convolutions (Qiao et al., 2019) and group
normalisation (Wu and He, 2018), a ViT-B (Dosovitskiy et al., 2021) over its map at stride 16, and a cascaded decoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import Mlp, StdConv2d
from torch import Tensor, nn


class TransUNet(nn.Module):
    """ResNet-50, ViT-B/16 and a decoder with three skips; 105 M parameters. Keys are the public implementation's.

    Args:
        num_classes: output channels.
        in_channels: image channels; if 3, an image with one channel is repeated.
        image_size: side of the image; there is one position embedding per 16x16 pixels.
        width: channels of the ResNet's root, a multiple of 32; its blocks have 4, 8 and 16 times as many.
        units: bottleneck units per ResNet block.
        dim: channels of the transformer.
        depth: transformer blocks.
        heads: attention heads.
        mlp: hidden channels of the transformer's MLPs.
        decoder: channels of the four decoder blocks, coarse to fine; before them come twice as many as in the first.
        dropout: after the position embedding and in the MLPs.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        width: int = 64,
        units: Sequence[int] = (3, 4, 9),
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp: int = 3072,
        decoder: Sequence[int] = (256, 128, 64, 16),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size % 16:
            raise ValueError(f"image_size={image_size}: TransUNet takes multiples of 16")
        if width % 32:
            raise ValueError(f"width={width}: TransUNet's group normalisation takes multiples of 32")
        self.in_channels, self.image_size = in_channels, image_size
        resnet = ResNet(in_channels, width, units)
        self.transformer = Transformer(resnet, 16 * width, (image_size // 16) ** 2, dim, depth, heads, mlp, dropout)
        self.decoder = Decoder(dim, (8 * width, 4 * width, width, 0), decoder)
        self.segmentation_head = nn.Sequential(nn.Conv2d(decoder[-1], num_classes, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels or 1, image_size, image_size) to logits (B, num_classes, image_size, image_size)."""
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this TransUNet was built for {self.image_size}x{self.image_size} images, not {tuple(x.shape[2:])}; "
                "resize them, or build it with their image_size"
            )
        if x.shape[1] == 1 and self.in_channels == 3:
            x = x.expand(-1, 3, -1, -1)
        tokens, skips = self.transformer(x)
        grid = self.image_size // 16
        return self.segmentation_head(self.decoder(tokens.mT.unflatten(2, (grid, grid)), skips))


class ResNet(nn.Module):
    """ResNet-50 without its last block; returns its map at stride 16 and the skips at strides 8, 4 and 2."""

    def __init__(self, in_channels: int, width: int, units: Sequence[int]) -> None:
        super().__init__()
        self.root = _named(conv=_conv(in_channels, width, 7, 2), gn=_norm(width), relu=nn.ReLU(inplace=True))
        self.body = nn.Module()
        cin = width
        for i, count in enumerate(units):
            mid, block = width << i, {}
            for j in range(count):
                block[f"unit{j + 1}"] = Unit(cin, mid, stride=2 if i and not j else 1)
                cin = 4 * mid
            self.body.add_module(f"block{i + 1}", _named(**block))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) to (B, 16 width, H / 16, W / 16) and the maps that go to the decoder, coarse to fine."""
        size = x.shape[2:]
        skips = [self.root(x)]
        x = F.max_pool2d(skips[0], 3, 2)  # without padding: 112 gives 55, the next block makes 28 of it
        for level, block in enumerate(self.body.children(), 2):
            x = block(x)
            missing = [(side >> level) - have for side, have in zip(size, x.shape[2:])]
            skips.append(F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x)
        return x, skips[-2::-1]


class Unit(nn.Module):
    """Bottleneck of 1x1, 3x3 and 1x1 convolutions with a residual, ReLU after the sum."""

    def __init__(self, cin: int, mid: int, stride: int = 1) -> None:
        super().__init__()
        cout = 4 * mid
        self.gn1 = _norm(mid)
        self.conv1 = _conv(cin, mid, 1)
        self.gn2 = _norm(mid)
        self.conv2 = _conv(mid, mid, 3, stride)
        self.gn3 = _norm(cout)
        self.conv3 = _conv(mid, cout, 1)
        self.downsample: nn.Module | None = None
        if stride != 1 or cin != cout:
            self.downsample = _conv(cin, cout, 1, stride)
            self.gn_proj = nn.GroupNorm(cout, cout, eps=1e-5)  # as published: every channel is a group

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, H, W) to (B, 4 mid, H / stride, W / stride)."""
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.gn_proj(self.downsample(x))))


class Transformer(nn.Module):
    """The ResNet, the embedding of its map and the ViT; the nesting is that of the public keys."""

    def __init__(
        self, resnet: ResNet, channels: int, tokens: int, dim: int, depth: int, heads: int, mlp: int, dropout: float
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(resnet, channels, tokens, dim, dropout)
        self.encoder = Encoder(dim, depth, heads, mlp, dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) to tokens (B, H W / 256, dim) and the skips."""
        x, skips = self.embeddings(x)
        return self.encoder(x), skips


class Embeddings(nn.Module):
    """One token per position of the ResNet's map, plus a learned position embedding."""

    def __init__(self, resnet: ResNet, channels: int, tokens: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.zeros(1, tokens, dim))
        self.hybrid_model = resnet
        self.patch_embeddings = nn.Conv2d(channels, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, skips = self.hybrid_model(x)
        return self.dropout(self.patch_embeddings(x).flatten(2).mT + self.position_embeddings), skips


class Encoder(nn.Module):
    """Pre-norm transformer blocks and a last norm, on tokens (B, L, dim)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(dim, heads, mlp, dropout) for _ in range(depth)])
        self.encoder_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x)
        return self.encoder_norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = Mlp(dim, mlp, drop=dropout)
        self.attn = Attention(dim, heads)
        for linear in (self.ffn.fc1, self.ffn.fc2):  # as ViT begins
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.get_parameter("bias"), std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer each for query, key and value."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Four times: bilinear x2, concatenate the skip, two convolutions; the last block has no skip."""

    def __init__(self, dim: int, skips: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        if len(widths) != len(skips):
            raise ValueError(f"{len(widths)} decoder widths: TransUNet's decoder has {len(skips)} blocks")
        cins = [2 * widths[0], *widths]
        self.conv_more = _conv_bn_relu(dim, cins[0])
        self.blocks = nn.ModuleList([DecoderBlock(a + s, b) for a, s, b in zip(cins, skips, widths)])

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        x = self.conv_more(x)
        for block, skip in zip(self.blocks, (*skips, None)):
            x = block(x, skip)
        return x


class DecoderBlock(nn.Module):
    """(B, C, H, W) and a skip (B, S, 2H, 2W) to (B, cout, 2H, 2W), where C + S is cin."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv1 = _conv_bn_relu(cin, cout)
        self.conv2 = _conv_bn_relu(cout, cout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


def _conv(cin: int, cout: int, kernel: int, stride: int = 1) -> StdConv2d:
    return StdConv2d(cin, cout, kernel, stride, padding=kernel // 2, eps=1e-5)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv_bn_relu(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))
