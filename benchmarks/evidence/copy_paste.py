"""CutMix between labelled and unlabelled images, an idea to be measured against that between unlabelled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from reseg_loss import CutMixConsistency


class CopyPaste(CutMixConsistency):
    """Boxes of labelled images in unlabelled ones and the other way round (Bai et al., CVPR 2023), half of each.

    Set `labelled`, as many images and labels as there are unlabelled images, before each `loss`.
    """

    labelled: tuple[Tensor, Tensor]

    def _exchanged(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        (other, truth), box = self.labelled, self._boxes(images)
        turned = torch.arange(len(images), device=images.device) % 2 == 1
        labelled = box ^ turned.view(-1, *[1] * (box.ndim - 1))
        return torch.where(labelled.unsqueeze(1), other, images), torch.where(labelled, truth, label)
