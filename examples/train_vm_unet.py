"""VM-UNet (Ruan, Li and Xiang, 2024) without and with reseg-loss.

    python examples/train_vm_unet.py --small                                       # a few minutes on 2 cores
    python examples/train_vm_unet.py --data Synapse --paper --weights vmamba_small_e238_ema.pth

On a GPU, install mamba-ssm's selective scan, which is several times faster than the one in torch: see the README.
"""

from __future__ import annotations

import logging

from backbones.pretrained import load_vm_unet
from backbones.vm_unet import VMUNet
from common.experiment import Backbone, main
from common.recipes import Recipe
from torch import nn


def small(classes: int, size: int) -> nn.Module:
    return VMUNet(classes, width=16, depths=(1, 1, 1, 1), depths_up=(1, 1, 1, 1), state=4)


BACKBONE = Backbone(
    "VM-UNet",
    build=lambda classes, size: VMUNet(classes, drop_path=0.3),  # the public code's value for Synapse
    small=small,
    recipe=Recipe(
        "Ruan et al., VM-UNet, 2024, public code for Synapse",
        optimizer="AdamW",
        lr=1e-3,
        weight_decay=1e-2,
        batch_size=32,
        epochs=300,
        cross_entropy=1.0,
        dice=1.0,
        cosine_epochs=100,
    ),
    small_recipe=Recipe(
        "our choice: a higher learning rate for few steps",
        optimizer="AdamW",
        lr=3e-3,
        weight_decay=1e-2,
        batch_size=4,
        size=96,
        cosine_epochs=1,
    ),
    load=load_vm_unet,
    weights="vmamba_small_e238_ema.pth",
    small_steps=300,  # after 150 it has not learnt the second class yet
)

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # says which selective scan is used
    main(BACKBONE)
