"""The task loss, and the losses on images without labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255  # in pseudo-labels, where the prediction is not sure
SURE = 0.95


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """0.5 cross-entropy + 0.5 Dice, as published: all classes, squared denominator, sums over the batch.

    Args:
        logits: (B, C, *spatial), any float dtype.
        target: classes (B, *spatial), where 255 does not count, or class probabilities (B, C, *spatial).
    """
    logits = logits.float()
    if target.ndim == logits.ndim:
        one_hot = target
    else:
        classes = torch.arange(logits.shape[1], device=target.device).view(-1, *[1] * (logits.ndim - 2))
        one_hot = (target[:, None] == classes).float()
    counts = one_hot.sum(1, keepdim=True)  # 0 where the pixel is ignored
    cross_entropy = -(one_hot * logits.log_softmax(1)).sum(1).mean()
    p, axes = logits.softmax(1) * counts, (0, *range(2, logits.ndim))
    overlap, sizes = (p * one_hot).sum(axes), p.square().sum(axes) + one_hot.square().sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (sizes + 1e-5)
    return 0.5 * cross_entropy + 0.5 * dice.mean()


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predicted distributions (B, C, *spatial), in nats."""
    log_p = logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def consistency(logits: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two predicted distributions (B, C, *spatial)."""
    return F.mse_loss(logits.float().softmax(1), other.float().softmax(1))
