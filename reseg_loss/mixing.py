"""Pure functions on unlabelled images: boxes from other images, changed intensities, pseudo-labels, and the ramp."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ReSegError, outline

BOX = (0.25, 0.5)  # side of a box, as a share of the image's
GAMMA = (0.7, 1.4)
GAIN = (0.8, 1.2)
OFFSET = (-0.1, 0.1)
NOISE = 0.1  # standard deviation


def boxes(u: Tensor, spatial: Sequence[int]) -> Tensor:
    """One box per sample. Its side is a quarter to a half of the image's side, the same fraction in every axis.

    Args:
        u: (B, 1 + axes) numbers from 0 to 1: how large the box is, and where it lies in each axis.
        spatial: the image's size, (H, W) or (D, H, W).

    Returns:
        (B, *spatial) bool, True inside the box. A pixel is inside if its centre is.
    """
    low, high = BOX
    side = low + (high - low) * u[:, :1]
    start = (1 - side) * u[:, 1:]
    inside = torch.ones(1, *[1] * len(spatial), dtype=torch.bool, device=u.device)
    for axis, n in enumerate(spatial):
        centre = (torch.arange(n, device=u.device) + 0.5) / n
        first = start[:, axis : axis + 1]
        along = (centre >= first) & (centre < first + side)
        inside = inside & along.view(-1, *[n if i == axis else 1 for i in range(len(spatial))])
    return inside


def random_boxes(images: Tensor) -> Tensor:
    """`boxes` for images (B, C, *spatial), with random numbers from torch's default generator."""
    return boxes(torch.rand(len(images), images.ndim - 1, device=images.device), images.shape[2:])


def mix(x: Tensor, box: Tensor) -> Tensor:
    """`x` with the content of each box taken from the previous sample of the batch (for the first: the last sample).

    Args:
        x: (B, C, *spatial) images or (B, *spatial) labels.
        box: (B, *spatial) bool.
    """
    return torch.where(box if x.ndim == box.ndim else box.unsqueeze(1), x.roll(1, 0), x)


def perturb_intensities(image: Tensor, u: Tensor, noise: Tensor) -> Tensor:
    """Change gamma, gain and offset of every sample and add noise, on intensities scaled to 0..1 and back.

    Every channel of every sample is scaled by its own minimum and maximum. If they are equal, the channel stays as it
    is.

    Args:
        image: (B, C, *spatial), any range.
        u: (B, 3) numbers from 0 to 1: gamma (0.7 to 1.4, log-uniform), gain (0.8 to 1.2), offset (-0.1 to 0.1).
        noise: of the image's shape, with standard deviation 1; it is multiplied by 0.1 and added.
    """
    axes = tuple(range(2, image.ndim))
    x = image.float() if image.dtype.itemsize < 4 else image
    low = x.amin(axes, keepdim=True)
    span = x.amax(axes, keepdim=True) - low
    x = (x - low) / torch.where(span > 0, span, torch.ones_like(span))
    u = u.view(-1, 3, *[1] * (image.ndim - 1))
    gamma = GAMMA[0] * (GAMMA[1] / GAMMA[0]) ** u[:, 0]
    gain, offset = (a + (b - a) * u[:, i] for i, (a, b) in ((1, GAIN), (2, OFFSET)))
    x = x.clamp_min(1e-4) ** gamma * gain + offset + NOISE * noise
    return (low + span * x).to(image.dtype)


def random_intensities(image: Tensor) -> Tensor:
    """`perturb_intensities` with random numbers from torch's default generator."""
    return perturb_intensities(image, torch.rand(len(image), 3, device=image.device), torch.randn_like(image))


def perturbed(images: Tensor, perturb: Callable[[Tensor], Tensor]) -> Tensor:
    """What a user's `perturb` makes of images.

    Raises:
        ReSegError: it is not of the same shape, dtype and device.
    """
    changed: Any = perturb(images)
    if not isinstance(changed, Tensor) or changed.shape != images.shape:
        raise ReSegError(f"perturb must return images of the same shape {tuple(images.shape)}, got {outline(changed)}")
    if (changed.dtype, changed.device) != (images.dtype, images.device):
        raise ReSegError(
            f"perturb returned {changed.dtype} on {changed.device} for images of {images.dtype} on {images.device}; "
            "let it return images.to(the given images)"
        )
    return changed


@torch.no_grad()
def predicted(logits: Tensor, *, overlapping: bool = False) -> tuple[Tensor, Tensor]:
    """The predicted class, int64, and its probability.

    Args:
        logits: (B, C, *spatial), of mutually exclusive classes; one channel means a binary model (sigmoid).
        overlapping: each channel is a class of its own (sigmoid), 0 or 1.

    Returns:
        Both of shape (B, *spatial); (B, 1, *spatial) for a binary model, (B, C, *spatial) for overlapping classes,
        because their losses want the label in the shape of the logits.
    """
    logits = logits.float()
    if overlapping or logits.shape[1] == 1:
        p = logits.sigmoid()
        return (p >= 0.5).long(), torch.maximum(p, 1 - p)
    confidence, label = logits.softmax(1).max(1)
    return label, confidence


@torch.no_grad()
def pseudo_label(logits: Tensor, threshold: float, ignore_index: int, *, overlapping: bool = False) -> Tensor:
    """The predicted class where its probability is at least `threshold`, else `ignore_index`; int64, as `predicted`.

    Args:
        logits: as in `predicted`.
        threshold: a probability.
        ignore_index: a value that is not a class.
        overlapping: as in `predicted`.
    """
    return sure_label(*predicted(logits, overlapping=overlapping), threshold, ignore_index)


def sure_label(label: Tensor, confidence: Tensor, threshold: float, ignore_index: int) -> Tensor:
    """The label where its confidence is at least `threshold`, else `ignore_index`."""
    return label.masked_fill(~(confidence >= threshold), ignore_index)  # so, since NaN is not sure


def pixels_per_class(label: Tensor, classes: int, *, overlapping: bool = False) -> Tensor:
    """The number of pixels of each class in a label, (classes,) int64; for overlapping classes, the 1s per channel."""
    if overlapping:
        return (label == 1).transpose(0, 1).flatten(1).sum(1)
    numbers = torch.arange(classes, device=label.device)
    # a few classes at a time, for each takes a byte per pixel
    return torch.cat([(label.flatten() == part[:, None]).sum(1) for part in numbers.split(16)])


def ramp_up(call: int, calls: int | None) -> float:
    """exp(-5 (1 - call / calls)^2) up to `calls`, then 1; always 1 for None."""
    return 1.0 if calls is None else math.exp(-5 * (1 - min(call / calls, 1)) ** 2)
