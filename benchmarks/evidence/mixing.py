"""What may be other about CutMix, to be screened; what the package has as an option is passed on as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reseg_loss import CutMixConsistency
from reseg_loss.mixing import mix

CONTRAST = (0.5, 1.5)  # factors of brightness and contrast
JITTERED, BLURRED = 0.8, 0.5  # shares of the images
SIGMA = (0.1, 2.0)  # of the blur, in pixels
REACH = 6  # pixels to either side, three times the widest sigma


class SizedBoxes(CutMixConsistency):
    """CutMix with boxes of other sides, as shares of the image's side."""

    def __init__(self, model: nn.Module, *, sides: Sequence[float], **keywords: Any) -> None:
        super().__init__(model, **keywords)
        self.sides = sides

    def exchange(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """With boxes of these sides."""
        box = sized_boxes(images, self.sides)
        return mix(images, box), mix(label, box)


class Turned(CutMixConsistency):
    """CutMix of which the student sees each image turned and mirrored at random, the label along, square images only.

    The mean teacher sees them as they are.
    """

    def exchange(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """With boxes, then turned."""
        u = torch.rand(len(images), 3, device=images.device) < 0.5
        return tuple(turned(x, u) for x in super().exchange(images, label))  # pyright: ignore[reportReturnType]


def turned(x: Tensor, u: Tensor) -> Tensor:
    """(B, ..., S, S) of each sample mirrored in either axis and transposed where `u` (B, 3) says so."""
    x = torch.where(_each(u[:, 0], x), x.flip(-1), x)
    x = torch.where(_each(u[:, 1], x), x.flip(-2), x)
    return torch.where(_each(u[:, 2], x), x.transpose(-1, -2), x)


def sized_boxes(images: Tensor, sides: Sequence[float]) -> Tensor:
    """A box in each image, (B, *spatial), bool, whose sides are from the first to the second of `sides`."""
    spatial, device = images.shape[2:], images.device
    u = torch.rand(len(images), 1 + len(spatial), device=device)
    side = sides[0] + (sides[1] - sides[0]) * u[:, 0]
    inside = torch.ones(len(images), *spatial, dtype=torch.bool, device=device)
    for axis, n in enumerate(spatial):
        first = (1 - side) * u[:, 1 + axis]
        centre = (torch.arange(n, device=device) + 0.5) / n
        along = (centre >= first[:, None]) & (centre < (first + side)[:, None])
        inside = inside & along.view(-1, *[n if i == axis else 1 for i in range(len(spatial))])
    return inside


def blur_and_contrast(image: Tensor) -> Tensor:
    """Instead of noise: images (B, C, H, W) of 0..1, most with other brightness and contrast, half of them blurred.

    As UniMatch perturbs its strong view (Yang et al., CVPR 2023).
    """
    x, u = image.float(), torch.rand(len(image), 5, device=image.device)
    brightness, contrast = (CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * _each(u[:, i], x) for i in (0, 1))
    brighter = (x * brightness).clamp(0, 1)
    mean = brighter.mean((1, 2, 3), keepdim=True)
    jittered = (mean + (brighter - mean) * contrast).clamp(0, 1)
    x = torch.where(_each(u[:, 2], x) < JITTERED, jittered, x)
    sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * u[:, 3]
    return torch.where(_each(u[:, 4], x) < BLURRED, blurred(x, sigma), x).to(image.dtype)


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """(B, C, H, W) smoothed with a Gaussian of `sigma` (B) pixels, mirrored at the edges."""
    away = torch.arange(-REACH, REACH + 1, device=x.device)
    kernel = torch.exp(-0.5 * (away / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    for axis in (2, 3):
        pad = (0, 0, REACH, REACH) if axis == 2 else (REACH, REACH, 0, 0)
        padded, n = torch.nn.functional.pad(x, pad, mode="reflect"), x.shape[axis]
        x = sum((_each(kernel[:, i], x) * padded.narrow(axis, i, n) for i in range(2 * REACH + 1)), torch.zeros_like(x))
    return x


def _each(values: Tensor, x: Tensor) -> Tensor:
    """(B) to the number of axes of `x`."""
    return values.view(-1, *[1] * (x.ndim - 1))


# the place for changes to be screened that the package has no option for
PERTURBATIONS = {"blur and contrast": blur_and_contrast, "none": None}


def mixing_of(options: Mapping[str, Any] | None) -> tuple[type[CutMixConsistency], dict[str, Any]]:
    """The class and the keywords of a variant's `mixing`, but for "joint".

    "perturb" is a name of `PERTURBATIONS`, "sides" the smallest and the largest box, as shares of the image's side,
    "turned" turns and mirrors what the student sees; all else are keywords of `CutMixConsistency`.
    """
    keywords = {name: value for name, value in (options or {}).items() if name != "joint"}
    if "perturb" in keywords:
        keywords["perturb"] = PERTURBATIONS[keywords["perturb"]]
    if keywords.pop("turned", False):
        return Turned, keywords
    return SizedBoxes if "sides" in keywords else CutMixConsistency, keywords
