"""The Unet of segmentation_models_pytorch, on a ResNet-34, without and with reseg-loss.

    python examples/train_smp.py --small                     # the packaged template, a few minutes on 2 cores
    python examples/train_smp.py --data ACDC --amp bf16      # on a GPU

This is not one of the paper's networks; `--paper` trains it as the paper trains its U-Net.
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
from common.experiment import Backbone, main
from common.recipes import Recipe
from torch import nn


def small(classes: int, size: int) -> nn.Module:
    widths = (128, 64, 32, 16, 16)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=classes, decoder_channels=widths)


BACKBONE = Backbone(
    "smp Unet",
    build=lambda classes, size: smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=classes),
    small=small,
    recipe=Recipe("Li et al., ReSeg-UNet, MICCAI 2025, released code, for its U-Net"),
    small_recipe=Recipe("our choice: a higher learning rate for few steps", lr=0.05, batch_size=8, size=96),
)

if __name__ == "__main__":
    main(BACKBONE)
