"""Batches that every variant of a seed shares: drawn beforehand, gathered and augmented on the device."""

from __future__ import annotations

from collections.abc import Sequence
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
    """(steps, B, 2, 3), in 3D (steps, B, 3, 4), from output to input coordinates as in `F.affine_grid`."""
    tone: Tensor
    """(steps, B, 3): gamma, gain and offset of the intensities."""

    @classmethod
    def empty(cls, steps: int, batch: int, axes: int, device: torch.device) -> Tables:
        shapes = {"theta": (axes, axes + 1), "tone": (3,)}
        floats = {name: torch.zeros(steps, batch, *shape, device=device) for name, shape in shapes.items()}
        return cls(torch.zeros(steps, batch, dtype=torch.int64, device=device), **floats)

    def fill(self, other: Tables) -> None:
        """Copy in place, for a captured graph reads these very tensors."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def at(self, clock: Tensor) -> Tables:
        """The row of step `clock`, a tensor (1,)."""
        return Tables(*(getattr(self, field.name).index_select(0, clock)[0] for field in fields(self)))


def draw(
    rows: np.ndarray,
    steps: int,
    batch: int,
    seed: int,
    stream: int,
    augmentation: Augmentation,
    spatial: Sequence[int] = (1, 1),
) -> Tables:
    """Shuffled epochs over `rows`, and an augmentation per sample of the shape `spatial`, a square in 2D.

    It depends on the arguments alone, and fewer steps are the beginning of more.
    """
    total = steps * batch
    order, chance = (np.random.default_rng([seed, stream, kind]) for kind in (1, 2))
    # of 12 numbers 2D uses 9: with fewer, the batches would be others than those of the results there are
    u = torch.from_numpy(chance.random((total, 12))).float()
    tables = Tables(
        epochs(rows, total, order),
        _affine(u, augmentation, spatial),
        torch.stack([_log_uniform(u[:, 6], 0.7, 1.4), 0.8 + 0.4 * u[:, 7], 0.2 * u[:, 8] - 0.1], 1),
    )
    return Tables(
        *(getattr(tables, f.name).reshape(steps, batch, *getattr(tables, f.name).shape[1:]) for f in fields(tables))
    )


def epochs(rows: np.ndarray, total: int, order: np.random.Generator) -> Tensor:
    """(total) int64: `rows` in another order each time, one after the other."""
    shuffled = [order.permutation(rows) for _ in range(-(-total // len(rows)))]
    return torch.from_numpy(np.concatenate(shuffled)[:total].astype(np.int64))


def _affine(u: Tensor, augmentation: Augmentation, spatial: Sequence[int]) -> Tensor:
    """Turned; "strong" also zooms by 0.75 to 1.33 and shifts by up to a tenth."""
    turned = _turned(u) if len(spatial) == 2 else _turned_3d(u, spatial)
    zoom, shift = torch.ones_like(u[:, 0]), torch.zeros_like(turned[:, 0])
    if augmentation == "strong":
        zoom, shift = _log_uniform(u[:, 3], 0.75, 1.33), 0.4 * u[:, [4, 5, 9][: len(spatial)]] - 0.2
    return torch.cat([turned, shift[:, :, None]], 2) / zoom[:, None, None]


def _turned(u: Tensor) -> Tensor:
    """As published: half by a multiple of 90 degrees and flipped, half of the rest by up to 20 degrees."""
    quarter, tilted = u[:, 0] < 0.5, (u[:, 0] >= 0.5) & (u[:, 1] < 0.5)
    turns = (u[:, 2] * 4).floor().clamp(max=3)
    tilt = torch.deg2rad(40 * u[:, 2] - 20)
    angle = torch.where(quarter, turns * torch.pi / 2, torch.where(tilted, tilt, torch.zeros_like(tilt)))
    cos, sin = angle.cos(), angle.sin()
    # of a quarter turn cos and sin are whole, so that no pixel is interpolated
    cos, sin = (torch.where(quarter, x.round(), x) for x in (cos, sin))
    flip = torch.where(quarter, -torch.ones_like(cos), torch.ones_like(cos))  # with all turns one axis is enough
    return torch.stack([torch.stack([flip * cos, -sin], 1), torch.stack([flip * sin, cos], 1)], 1)


def _turned_3d(u: Tensor, spatial: Sequence[int]) -> Tensor:
    """Half by up to 20 degrees about any axis; no flips, for the crops are of one side of the brain."""
    height, around = 2 * u[:, 1] - 1, 2 * torch.pi * u[:, 10]
    flat = (1 - height**2).sqrt()
    axis = torch.stack([flat * around.cos(), flat * around.sin(), height], 1)
    angle = torch.where(u[:, 0] < 0.5, torch.deg2rad(40 * u[:, 2] - 20), 0.0)[:, None, None]
    eye = torch.eye(3)
    cross, away = torch.linalg.cross(axis[:, None], eye[None]), axis[:, :, None] * axis[:, None] - eye
    turned = eye + angle.sin() * cross + (1 - angle.cos()) * away  # Rodrigues' formula
    side = torch.tensor(spatial[::-1])  # of x, y, z, whose coordinates all go from -1 to 1
    return turned * side / side[:, None]


def _log_uniform(u: Tensor, low: float, high: float) -> Tensor:
    return low * (high / low) ** u


def augment(image: Tensor, label: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(B, *spatial) uint8 to an image (B, 1, *spatial) in 0..1 and a label (B, *spatial) int64; outside is 0."""
    grid = F.affine_grid(theta, [len(image), 1, *image.shape[1:]], align_corners=False)
    turned = F.grid_sample(image[:, None].float() / 255, grid, mode="bilinear", align_corners=False)
    nearest = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=False)
    return turned, nearest[:, 0].long()


def toned(image: Tensor, tone: Tensor) -> Tensor:
    """The image (B, 1, *spatial) with other intensities."""
    gamma, gain, offset = (tone[:, i].view(-1, *[1] * (image.ndim - 1)) for i in range(3))
    return image.clamp_min(1e-4) ** gamma * gain + offset


class Feed:
    """The slices on the device, and the tables of the seed that is running.

    `others` is the size of the batch from other patients, as a rule the same.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        steps: int,
        batch: int,
        augmentation: Augmentation,
        device: torch.device,
        others: int | None = None,
    ) -> None:
        self.images, self.labels = images.to(device), labels.to(device)
        self.steps, self.batch = steps, batch
        self.augmentation: Augmentation = augmentation
        # the supervised batch; the second batch, from other patients or from the same
        self.labelled, self.others, self.again = (self._empty(size) for size in (batch, others or batch, batch))

    def load(self, labelled: np.ndarray, unlabelled: np.ndarray, seed: int) -> None:
        """Draw the batches of a seed from the slices of each kind; without unlabelled ones `others` stays as it is."""
        for stream, (tables, rows) in enumerate(
            [(self.labelled, labelled), (self.others, unlabelled), (self.again, labelled)]
        ):
            if len(rows):
                tables.fill(self._drawn(rows, tables.index.shape[1], seed, stream))

    def batch_of(self, tables: Tables, clock: Tensor) -> tuple[Tensor, Tensor, Tables]:
        """Image, label and the row of the tables."""
        row = tables.at(clock)
        return *self._shown(row), row

    def _empty(self, batch: int) -> Tables:
        return Tables.empty(self.steps, batch, self.images.ndim - 1, self.images.device)

    def _drawn(self, rows: np.ndarray, batch: int, seed: int, stream: int) -> Tables:
        return draw(rows, self.steps, batch, seed, stream, self.augmentation, self.images.shape[1:])

    def _shown(self, row: Tables) -> tuple[Tensor, Tensor]:
        image, label = augment(self.images[row.index], self.labels[row.index], row.theta)
        return (toned(image, row.tone) if self.augmentation == "strong" else image), label
