"""What a training step adds for unlabelled images: pseudo-labels as nnU-Net's targets, and the loss of both parts."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import Tensor, nn

from ...errors import ReSegError
from ...mixing import mix, pseudo_label, random_boxes

NOT_SURE = 255  # of a region, before it becomes the channel of what is ignored


def shares(batch_size: int) -> tuple[int, int]:
    """How many of a step's images have labels, and how many have none: half each; small batches are doubled instead."""
    if batch_size >= 4:
        return batch_size - batch_size // 2, batch_size // 2
    return batch_size, max(batch_size, 2)  # one image has no other to be mixed with


def pseudo_target(logits: Tensor, threshold: float, ignored: int, regions: bool) -> Tensor:
    """A prediction as a target in nnU-Net's form, at full resolution.

    Args:
        logits: (B, C, *spatial) of classes, or of regions.
        threshold: a probability.
        ignored: the value of voxels that do not count.
        regions: the channels are regions, which may overlap.

    Returns:
        (B, 1, *spatial) int16, classes or `ignored`. For regions (B, C + 1, *spatial) bool, where the last channel is
        True if not all regions are sure.
    """
    if not regions:
        return pseudo_label(logits, threshold, ignored).unsqueeze(1).to(torch.int16)
    each = pseudo_label(logits, threshold, NOT_SURE, overlapping=True)
    return torch.cat([each == 1, (each == NOT_SURE).any(1, keepdim=True)], 1)


def counted(target: Tensor, ignored: int) -> Tensor:
    """The share of voxels that count in a pseudo-label's target."""
    left_out = target[:, -1] if target.dtype == torch.bool else target == ignored
    return 1 - left_out.float().mean()


def mixed(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Images and their target, with boxes from other images."""
    box = random_boxes(images)
    return mix(images, box), mix(target, box)


def downsampled(target: Tensor, scales: Sequence[Sequence[float]] | None) -> Tensor | list[Tensor]:
    """The target of each output of deep supervision, by nnU-Net's own transform; unchanged without scales."""
    if scales is None:
        return target
    levels = DownsampleSegForDSTransform(scales)(segmentation=target.flatten(0, 1))["segmentation"]
    return [level.unflatten(0, target.shape[:2]) for level in levels]


class LossOfBoth(nn.Module):
    """nnU-Net's loss; after `expect`, its value on the first part of a joint output plus the weighted second part's.

    Args:
        loss: of the labelled images, and in validation.
        unlabelled_loss: of the mixed images; it ignores voxels whose pseudo-label is not sure.
    """

    def __init__(self, loss: nn.Module, unlabelled_loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.unlabelled_loss = loss, unlabelled_loss
        for module in self.modules():
            if type(module) is DC_and_CE_loss:
                module.__class__ = _WithoutWaiting
        self._expected: tuple[Any, float] | None = None
        self.unlabelled = torch.zeros(())
        """The last unlabelled loss, without its weight."""

    def expect(self, target: Any, weight: float) -> None:
        """Announce that the next output has a second part, with this target."""
        self._expected = target, weight

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss of the network's outputs and nnU-Net's targets; these are lists with deep supervision."""
        if self._expected is None:
            return self.loss(output, target)
        (pseudo, weight), self._expected = self._expected, None
        labelled = len(_first(target))
        value = self.loss(_part(output, slice(labelled)), target)
        extra = self.unlabelled_loss(_part(output, slice(labelled, None)), pseudo)
        self.unlabelled = extra.detach()
        return value + weight * extra


class _WithoutWaiting(DC_and_CE_loss):
    """nnU-Net's loss with the same value, but Python need not wait for the GPU to know whether any voxel counts."""

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        if self.ignore_label is None or self.weight_ce == 0:  # nothing to wait for
            return super().forward(net_output, target)
        counts = target != self.ignore_label
        dice = self.dc(net_output, torch.where(counts, target, 0), loss_mask=counts) if self.weight_dice != 0 else 0
        entropy = torch.where(counts.any(), self.ce(net_output, target[:, 0]), 0)  # of no voxel it is NaN
        return self.weight_ce * entropy + self.weight_dice * dice


def _first(outputs: Any) -> Tensor:
    """The output at full resolution."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def _part(outputs: Any, which: slice) -> Any:
    return outputs[which] if isinstance(outputs, Tensor) else [output[which] for output in outputs]


def check_ignoring(
    loss: nn.Module, heads: int, levels: int | None, ignored: int, regions: bool, axes: int, device: torch.device
) -> None:
    """Raise a ReSegError unless a loss ignores the ignored voxels, if they are a part or all of a target.

    Args:
        loss: of the mixed images.
        heads: channels of the network's output.
        levels: number of outputs of deep supervision; None without it.
        ignored: the value of voxels that do not count.
        regions: the channels are regions.
        axes: number of spatial axes, 2 or 3.
        device: where the loss works. In DDP all processes call this, since the loss may reduce values over them.
    """
    shape = (2, heads, *[4] * axes)
    for part in (2, 4):
        left_out = torch.zeros(2, 1, *shape[2:], dtype=torch.bool, device=device)
        left_out[:, :, :part] = True
        if regions:
            target = torch.cat([torch.zeros(shape, dtype=torch.bool, device=device), left_out], 1)
        else:
            target = left_out.to(torch.int16) * ignored
        outputs = [torch.zeros(shape, device=device, requires_grad=True) for _ in range(levels or 1)]
        try:
            with torch.compiler.set_stance("force_eager"):
                value = loss(outputs, [target] * len(outputs)) if levels else loss(outputs[0], target)
            gradients = torch.autograd.grad(value, outputs, allow_unused=True)
            fine = all(g is None or bool((g.isfinite() & ((g == 0) | ~left_out)).all()) for g in gradients)
        except Exception as error:
            raise ReSegError(f"{_MUST} ({type(error).__name__}: {error})") from error
        if not fine or not value.isfinite():
            raise ReSegError(_MUST)


_MUST = (
    "this trainer's loss cannot ignore voxels without a sure pseudo-label: the loss from _build_loss must respect "
    "self.label_manager.ignore_label, and be finite if a whole batch is ignored, as nnU-Net's default losses are"
)
