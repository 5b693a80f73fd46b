"""U-Net (Ronneberger et al., MICCAI 2015) with padded convolutions and batch normalisation; 31 M parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """Five resolutions; each level is two 3x3 conv-BN-ReLU, transposed convolutions go up.

    Args:
        num_classes: output channels.
        in_channels: image channels.
        width: channels at full resolution; they double at every level (64 as published).
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        widths = [width << level for level in range(5)]
        self.encoder = nn.ModuleList([_block(a, b) for a, b in zip([in_channels, *widths], widths[:-1])])
        self.bottleneck = _block(widths[-2], widths[-1])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2 * c, c, 2, 2) for c in reversed(widths[:-1])])
        self.decoder = nn.ModuleList([_block(2 * c, c) for c in reversed(widths[:-1])])
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes, H, W); H and W are multiples of 16."""
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips)):
            x = decode(torch.cat([skip, up(x)], 1))
        return self.head(x)


def _block(cin: int, cout: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a in (cin, cout):
        layers += [nn.Conv2d(a, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
