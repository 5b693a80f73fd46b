"""Batches that every variant of a seed shares: drawn beforehand, gathered and augmented on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["published", "strong"]


@dataclass
class Tables:
    """What is random about the batches of a run, a row per step and an entry per sample."""

    index: Tensor
    """(steps, B) int64, into all slices."""
    theta: Tensor
    """(steps, B, 2, 3), from output to input coordinates as in `F.affine_grid`."""
    tone: Tensor
    """(steps, B, 3): gamma, gain and offset of the intensities."""

    @classmethod
    def empty(cls, steps: int, batch: int, device: torch.device) -> Tables:
        shapes = {"theta": (2, 3), "tone": (3,)}
        floats = {name: torch.zeros(steps, batch, *shape, device=device) for name, shape in shapes.items()}
        return cls(torch.zeros(steps, batch, dtype=torch.int64, device=device), **floats)

    def fill(self, other: Tables) -> None:
        """Copy in place, for a captured graph reads these very tensors."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def at(self, clock: Tensor) -> Tables:
        """The row of step `clock`, a tensor (1,)."""
        return Tables(*(getattr(self, field.name).index_select(0, clock)[0] for field in fields(self)))


def draw(rows: np.ndarray, steps: int, batch: int, seed: int, stream: int, augmentation: Augmentation) -> Tables:
    """Shuffled epochs over `rows`, and an augmentation per sample.

    It depends on the arguments alone, and fewer steps are the beginning of more.
    """
    total = steps * batch
    order, chance = (np.random.default_rng([seed, stream, kind]) for kind in (1, 2))
    epochs = [order.permutation(rows) for _ in range(-(-total // len(rows)))]
    # of 12 numbers 9 are used: with fewer, the batches would be others than those of the results there are
    u = torch.from_numpy(chance.random((total, 12))).float()
    tables = Tables(
        torch.from_numpy(np.concatenate(epochs)[:total].astype(np.int64)),
        _affine(u[:, :6], augmentation),
        torch.stack([_log_uniform(u[:, 6], 0.7, 1.4), 0.8 + 0.4 * u[:, 7], 0.2 * u[:, 8] - 0.1], 1),
    )
    return Tables(
        *(getattr(tables, f.name).reshape(steps, batch, *getattr(tables, f.name).shape[1:]) for f in fields(tables))
    )


def _affine(u: Tensor, augmentation: Augmentation) -> Tensor:
    """As published: half turned by a multiple of 90 degrees and flipped, half of the rest turned by up to 20 degrees.

    "strong" also zooms by 0.75 to 1.33 and shifts by up to a tenth.
    """
    quarter, tilted = u[:, 0] < 0.5, (u[:, 0] >= 0.5) & (u[:, 1] < 0.5)
    turns = (u[:, 2] * 4).floor().clamp(max=3)
    tilt = torch.deg2rad(40 * u[:, 2] - 20)
    angle = torch.where(quarter, turns * torch.pi / 2, torch.where(tilted, tilt, torch.zeros_like(tilt)))
    cos, sin = angle.cos(), angle.sin()
    # of a quarter turn cos and sin are whole, so that no pixel is interpolated
    cos, sin = (torch.where(quarter, x.round(), x) for x in (cos, sin))
    flip = torch.where(quarter, -torch.ones_like(cos), torch.ones_like(cos))  # with all turns one axis is enough
    zoom, shift = torch.ones_like(cos), torch.zeros_like(u[:, :2])
    if augmentation == "strong":
        zoom, shift = _log_uniform(u[:, 3], 0.75, 1.33), 0.4 * u[:, 4:6] - 0.2
    x = torch.stack([flip * cos, -sin, shift[:, 0] / zoom], 1)
    y = torch.stack([flip * sin, cos, shift[:, 1] / zoom], 1)
    theta = torch.stack([x, y], 1)
    theta[:, :, :2] /= zoom[:, None, None]
    return theta


def _log_uniform(u: Tensor, low: float, high: float) -> Tensor:
    return low * (high / low) ** u


def augment(image: Tensor, label: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, S) uint8 to an image (B, 1, S, S) in 0..1 and a label (B, S, S) int64; outside is 0."""
    grid = F.affine_grid(theta, [len(image), 1, *image.shape[1:]], align_corners=False)
    turned = F.grid_sample(image[:, None].float() / 255, grid, mode="bilinear", align_corners=False)
    nearest = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=False)
    return turned, nearest[:, 0].long()


def toned(image: Tensor, tone: Tensor) -> Tensor:
    """The image (B, 1, S, S) with other intensities."""
    gamma, gain, offset = (tone[:, i].view(-1, 1, 1, 1) for i in range(3))
    return image.clamp_min(1e-4) ** gamma * gain + offset


class Feed:
    """The slices on the device, and the tables of the seed that is running."""

    def __init__(
        self, images: Tensor, labels: Tensor, steps: int, batch: int, augmentation: Augmentation, device: torch.device
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.steps, self.batch, self.augmentation = steps, batch, augmentation
        # the supervised batch; the second batch, from other patients or from the same
        self.labelled, self.others, self.again = (Tables.empty(steps, batch, device) for _ in range(3))

    def load(self, labelled: np.ndarray, unlabelled: np.ndarray, seed: int) -> None:
        """Draw the batches of a seed from the slices of each kind; without unlabelled ones `others` stays as it is."""
        for stream, (tables, rows) in enumerate(
            [(self.labelled, labelled), (self.others, unlabelled), (self.again, labelled)]
        ):
            if len(rows):
                tables.fill(draw(rows, self.steps, self.batch, seed, stream, self.augmentation))

    def batch_of(self, tables: Tables, clock: Tensor) -> tuple[Tensor, Tensor, Tables]:
        """Image, label and the row of the tables."""
        row = tables.at(clock)
        image, label = augment(self.images[row.index], self.labels[row.index], row.theta)
        if self.augmentation == "strong":
            image = toned(image, row.tone)
        return image, label, row
