"""U-Net (Ronneberger et al., 2015) without and with reseg-loss.

    python examples/train_unet.py --small                      # the packaged template, a few minutes on 2 cores
    python examples/train_unet.py --data ACDC --amp bf16       # published size on a GPU
    torchrun --nproc_per_node 2 examples/train_unet.py ...     # several GPUs share each batch

The loop is in `common/training.py`, and the code around it in `common/experiment.py`.
"""

from __future__ import annotations

from backbones.unet import UNet
from common.experiment import Backbone, main
from common.recipes import Recipe

BACKBONE = Backbone(
    "U-Net",
    build=lambda classes, size: UNet(classes, in_channels=1),
    small=lambda classes, size: UNet(classes, in_channels=1, width=8),
    recipe=Recipe("Li et al., ReSeg-UNet, MICCAI 2025, released code"),
    small_recipe=Recipe("our choice: a higher learning rate for few steps", lr=0.05, batch_size=8, size=96),
)

if __name__ == "__main__":
    main(BACKBONE)
