"""CutMix between labelled and unlabelled images, an idea to be measured against that between unlabelled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from reseg_loss import CutMixConsistency
from reseg_loss.mixing import random_boxes


class CopyPaste(CutMixConsistency):
    """Boxes of labelled images in unlabelled ones and the other way round (Bai et al., CVPR 2023), half of each.

    Set `labelled`, as many images and labels as there are unlabelled images, before each `loss`.
    """

    labelled: tuple[Tensor, Tensor]

    def exchange(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """With what is labelled instead of among themselves."""
        box = random_boxes(images)
        return pasted(images, label, self.labelled, box)


def pasted(images: Tensor, label: Tensor, labelled: tuple[Tensor, Tensor], box: Tensor) -> tuple[Tensor, Tensor]:
    """Images and label with those of `labelled` in every first box, and around every second."""
    turned = torch.arange(len(images), device=images.device) % 2 == 1
    theirs = box ^ turned.view(-1, *[1] * (box.ndim - 1))
    return torch.where(theirs.unsqueeze(1), labelled[0], images), torch.where(theirs, labelled[1], label)
