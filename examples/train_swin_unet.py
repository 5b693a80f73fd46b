"""Swin-UNet (Cao et al., 2021) without and with reseg-loss.

    python examples/train_swin_unet.py --small                                       # a few minutes on 2 cores
    python examples/train_swin_unet.py --data Synapse --paper --weights swin_tiny_patch4_window7_224.pth

`--help` lists all options.
"""

from __future__ import annotations

from backbones.pretrained import load_swin_unet
from backbones.swin_unet import SwinUNet
from common.experiment import Backbone, main
from common.recipes import Recipe

BACKBONE = Backbone(
    "Swin-UNet",
    build=lambda classes, size: SwinUNet(classes, image_size=size),
    small=lambda classes, size: SwinUNet(classes, image_size=size, width=32, heads=(1, 2, 4, 8), window=3),
    recipe=Recipe("Cao et al., Swin-Unet, 2021, public code and its README", lr=0.05, cross_entropy=0.4, dice=0.6),
    small_recipe=Recipe("our choice: as published, for few steps", lr=0.05, batch_size=8, size=96),
    load=load_swin_unet,
    weights="swin_tiny_patch4_window7_224.pth",
)

if __name__ == "__main__":
    main(BACKBONE)
