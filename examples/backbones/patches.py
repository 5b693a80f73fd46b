"""The upsampling that Swin-UNet and VM-UNet share."""

from __future__ import annotations

from torch import Tensor, nn


class PatchExpand(nn.Module):
    """Patch expansion (Cao et al., "Swin-Unet", 2021): a linear layer, channels to space, LayerNorm.

    Args:
        dim: input channels.
        out: output channels.
        factor: of the height and of the width.
    """

    def __init__(self, dim: int, out: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor * factor * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to (B, factor H, factor W, out)."""
        # the channels are ordered (row, column, channel); nn.PixelShuffle wants (channel, row, column)
        x = self.expand(x).unflatten(-1, (self.factor, self.factor, -1))
        return self.norm(x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2))
