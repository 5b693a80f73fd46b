"""TransUNet (Chen et al., 2021) without and with reseg-loss.

    python examples/train_transunet.py --small                                       # a few minutes on 2 cores
    python examples/train_transunet.py --data Synapse --paper --weights R50+ViT-B_16.npz    # as published

`--help` lists all options.
"""

from __future__ import annotations

from backbones.pretrained import load_transunet
from backbones.transunet import TransUNet
from common.experiment import Backbone, main
from common.recipes import Recipe
from torch import nn


def small(classes: int, size: int) -> nn.Module:
    resnet = {"width": 32, "units": (1, 1, 1), "decoder": (64, 32, 16, 16)}
    return TransUNet(classes, image_size=size, dim=96, depth=2, heads=4, mlp=192, **resnet)


BACKBONE = Backbone(
    "TransUNet",
    build=lambda classes, size: TransUNet(classes, image_size=size),
    small=small,
    recipe=Recipe("Chen et al., TransUNet, 2021, public code"),
    small_recipe=Recipe("our choice: a higher learning rate for few steps", lr=0.05, batch_size=8, size=96),
    load=load_transunet,
    weights="R50+ViT-B_16.npz",
)

if __name__ == "__main__":
    main(BACKBONE)
