"""The U-Net of the field's semi-supervised benchmark (SSL4MIS), 1.8 M parameters, from its description."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128, 256)
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)  # of the encoder's levels; the decoder has none


class FieldUNet(nn.Module):
    """Five resolutions; each level is two 3x3 conv-BN-LeakyReLU with dropout between them.

    On the way up a 1x1 convolution and bilinear interpolation, corners on corners.
    """

    def __init__(self, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        pairs = list(zip([in_channels, *WIDTHS[:-1]], WIDTHS, DROPOUT))
        self.encoder = nn.ModuleList([_block(*pair) for pair in pairs[:-1]])
        self.bottleneck = _block(*pairs[-1])
        down = list(zip(WIDTHS[::-1], WIDTHS[-2::-1]))
        self.narrow = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in down])
        self.decoder = nn.ModuleList([_block(2 * b, b, 0.0) for _, b in down])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.head = nn.Conv2d(WIDTHS[0], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to logits (B, num_classes, H, W); H and W are multiples of 16."""
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for narrow, decode, skip in zip(self.narrow, self.decoder, reversed(skips)):
            x = decode(torch.cat([skip, self.up(narrow(x))], 1))
        return self.head(x)


def _block(cin: int, cout: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1),
        nn.BatchNorm2d(cout),
        nn.LeakyReLU(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Conv2d(cout, cout, 3, padding=1),
        nn.BatchNorm2d(cout),
        nn.LeakyReLU(),
    )
