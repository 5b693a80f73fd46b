"""CutMix between labelled and unlabelled images, an idea to be measured against that between unlabelled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from reseg_loss import CutMixConsistency
from reseg_loss.unlabelled import boxes


class CopyPaste(CutMixConsistency):
    """Boxes of labelled images in unlabelled ones and the other way round (Bai et al., CVPR 2023), half of each.

    Set `labelled`, as many images and labels as there are unlabelled images, before each `loss`.
    """

    labelled: tuple[Tensor, Tensor]

    def _mixed(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        other, truth = self.labelled
        box = boxes(torch.rand(len(images), images.ndim - 1, device=images.device), images.shape[2:])
        turned = torch.arange(len(images), device=images.device) % 2 == 1
        labelled = box ^ turned.view(-1, *[1] * (box.ndim - 1))
        images, label = torch.where(labelled.unsqueeze(1), other, images), torch.where(labelled, truth, label)
        return images if self.perturb is None else self.perturb(images), label
