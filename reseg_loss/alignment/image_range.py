"""The range of the images that a teacher learns: whether it is far from unit range, and the map that fixes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ReSegError

# Root mean square above which images are far from unit range. Of z-scores it is 1, of images in [0, 1] at most 1, of
# 0..255 about 100, of Hounsfield units several hundred. Dark first batches say nothing, so there is no lower bound.
FAR = 10.0


@dataclass(frozen=True)
class ImageMap:
    """One affine map per channel, (image - mean) / std, as plain numbers.

    Attributes:
        mean: mean of the first batch's valid pixels, in the images' own units; one per channel.
        std: their standard deviation (biased), one per channel; 1 if a channel was constant.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image: Tensor, valid: Tensor | None) -> ImageMap:
        """The map of a batch (B, C, *spatial) in which the pixels of `valid` (B, 1, *spatial) count.

        Raises:
            ReSegError: no pixel counts, or a pixel that counts is not finite.
        """
        pixels = valid_pixels(image, valid).cpu().double()
        if pixels.shape[1] == 0:
            raise ReSegError(
                "every pixel of the first batch is ignored (ignore_index), but standardize_image=True takes the mean "
                "and the standard deviation of the images from it: make another batch the first one"
            )
        if not bool(pixels.isfinite().all()):
            raise ReSegError("the first batch has NaN or infinite pixels, so standardize_image=True cannot use it")
        mean, std = pixels.mean(1), pixels.std(1, correction=0)
        return cls(tuple(mean.tolist()), tuple(torch.where(std > 0, std, 1.0).tolist()))

    def tensors(self, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and std as fp32 tensors (C, 1, ...) that broadcast over `dims` spatial axes."""
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (self.mean, self.std))
        return mean.view(-1, *[1] * dims), std.view(-1, *[1] * dims)

    def undo(self, image: Tensor) -> Tensor:
        """A standardized image (B, C, *spatial) in the images' own units, in at least fp32."""
        mean, std = self.tensors(image.ndim - 2, image.device)
        return image * std + mean


def valid_pixels(image: Tensor, valid: Tensor | None) -> Tensor:
    """The pixels of an image (B, C, *spatial) that count, (C, N), on the image's device."""
    flat = image.detach().movedim(1, 0).flatten(1)
    return flat if valid is None else flat[:, (valid > 0).flatten().to(flat.device)]


def far_from_unit(image: Tensor, valid: Tensor | None) -> float | None:
    """The largest root mean square of any channel, if it is above `FAR`, else None. Waits for the device."""
    pixels = valid_pixels(image, valid).cpu().double()
    level = float(pixels.square().mean(1).max().sqrt()) if pixels.numel() else 0.0
    return level if level > FAR else None
