"""How a network is trained: the published settings, and what the scripts make of them for other lengths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from monai.losses import DiceCELoss
from torch import nn
from torch.optim import SGD, AdamW, Optimizer


@dataclass(frozen=True)
class Recipe:
    """Settings of optimizer, schedule, batch and loss."""

    source: str
    """Where they are published."""
    lr: float = 0.01
    weight_decay: float = 1e-4
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    """SGD has momentum 0.9."""
    batch_size: int = 24
    epochs: int = 150
    size: int = 224
    """Side of the square that the network sees."""
    cross_entropy: float = 0.5
    dice: float = 0.5
    cosine_epochs: int | None = None
    """Half a period of a cosine between `lr` and 1e-5; None: polynomial decay with the power 0.9."""

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        if self.optimizer == "SGD":
            return sgd(parameters, self.lr, self.weight_decay)
        return AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def factor(self, step: int, steps: int, steps_per_epoch: int) -> float:
        """What the learning rate of step number `step` is multiplied with; it depends on nothing else."""
        if self.cosine_epochs is None:
            return poly(step, steps)
        floor = 1e-5 / self.lr
        epoch = step // steps_per_epoch
        return floor + (1 - floor) * (1 + math.cos(math.pi * epoch / self.cosine_epochs)) / 2

    def shortened(self, steps: int, steps_per_epoch: int) -> Recipe:
        """The same for another number of steps: a cosine falls once."""
        if self.cosine_epochs is None:
            return self
        return replace(self, cosine_epochs=max(1, math.ceil(steps / steps_per_epoch)))

    def loss(self) -> nn.Module:
        return segmentation_loss(self.cross_entropy, self.dice)


def poly(step: int, steps: int) -> float:
    """Polynomial decay with the power 0.9, as published for TransUNet and Swin-UNet."""
    return (1 - step / steps) ** 0.9


def sgd(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 1e-4) -> SGD:
    """SGD with momentum 0.9, the published optimizer of U-Net, TransUNet and Swin-UNet."""
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)


def segmentation_loss(cross_entropy: float = 0.5, dice: float = 0.5) -> nn.Module:
    """Cross-entropy and Dice as published: all classes, squared denominator, sums over the batch."""
    return DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        lambda_dice=dice,
        lambda_ce=cross_entropy,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )
