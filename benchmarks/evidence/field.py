"""The field's protocol on ACDC (SSL4MIS): slices are turned at the size they come in, and then zoomed to a square.

Both with interpolation of order 0, as `scipy.ndimage` does it: of an output pixel's position in the input the nearest
pixel. Such steps are maps of positions, so one gather from the slices as they are stored does it all on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .batches import Augmentation, Feed, Tables, epochs

ANGLES = (-20, 19)  # whole degrees


def zoomed(images: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(..., H, W) to another height and width, as `scipy.ndimage.zoom` of order 0: corners lie on corners.

    (Of 256 to 174 or 216 and some others scipy leaves the last line 0, as its position is rounded to beyond the edge.)
    """
    rows, columns = (_positions(old, new) for old, new in zip(images.shape[-2:], shape))
    return images[..., rows[:, None], columns]


def _positions(old: int, new: int) -> np.ndarray:
    return np.floor(np.arange(new) * ((old - 1) / (new - 1)) + 0.5).astype(np.int64)


@dataclass(frozen=True)
class Native:
    """Slices of any sizes, one after the other in flat tensors."""

    images: Tensor
    """uint8"""
    labels: Tensor
    """uint8"""
    start: Tensor
    """(N) int64, of each slice's pixels."""
    shape: Tensor
    """(N, 2) float64, height and width."""

    @classmethod
    def of(cls, images: Sequence[np.ndarray], labels: Sequence[np.ndarray], device: torch.device) -> Native:
        flat = [torch.from_numpy(np.concatenate([a.ravel() for a in arrays])) for arrays in (images, labels)]
        start = np.cumsum([0, *(image.size for image in images)])[:-1]
        shape = torch.tensor([image.shape for image in images], dtype=torch.float64)
        return cls(*(x.to(device) for x in (*flat, torch.from_numpy(start), shape)))

    def turned(self, index: Tensor, turn: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Slices `index` (B) turned about their centres and zoomed: (B, 1, size, size) in 0..1 and labels, int64.

        Args:
            index: (B) of the slices.
            turn: (B, 2, 2) float64, from (row, column) in the turned slice to that in the stored one. A quarter turn
                exchanges height and width, any other keeps them. What comes from outside is 0.
            size: of the square.
        """
        shape = self.shape[index]
        quarter = turn[:, 0, 1].abs() == 1
        new = torch.where(quarter[:, None], shape.flip(1), shape)
        middle = (shape - 1) / 2 - (turn * ((new - 1) / 2)[:, None]).sum(2)
        steps = torch.arange(size, dtype=torch.float64, device=shape.device)
        rows, columns = (steps * ((new - 1) / (size - 1))[:, i : i + 1] + 0.5 for i in range(2))
        rows, columns = rows.floor()[:, :, None], columns.floor()[:, None]
        y, x = (
            middle[:, i].view(-1, 1, 1) + turn[:, i, 0].view(-1, 1, 1) * rows + turn[:, i, 1].view(-1, 1, 1) * columns
            for i in range(2)
        )
        height, width = shape[:, 0].view(-1, 1, 1), shape[:, 1].view(-1, 1, 1)
        inside = (y >= 0) & (y <= height - 1) & (x >= 0) & (x <= width - 1)
        nearest = (y + 0.5).floor() * width + (x + 0.5).floor()
        where = self.start[index].view(-1, 1, 1) + nearest.masked_fill(~inside, 0).long()
        image, label = (flat[where] * inside for flat in (self.images, self.labels))
        return image[:, None].float() / 255, label.long()


def draw_turns(total: int, rng: np.random.Generator) -> np.ndarray:
    """(total, 2, 2): half are quarter turns (0 to 3) and a flip of one axis, half of the rest small whole angles."""
    u = rng.random((total, 4))
    turns, axis = (4 * u[:, 2]).astype(int), (2 * u[:, 3]).astype(int)
    angle = np.deg2rad(ANGLES[0] + ((ANGLES[1] - ANGLES[0] + 1) * u[:, 2]).astype(int))
    once = np.array([[0, 1], [-1, 0]])
    quarter = np.stack([np.linalg.matrix_power(once, k) for k in range(4)])[turns]
    flip = np.stack([np.diag([-1, 1]), np.diag([1, -1])])[axis]
    tilt = np.moveaxis(np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]), 2, 0)
    other = np.where((u[:, 1] < 0.5)[:, None, None], tilt, np.eye(2))
    return np.where((u[:, 0] < 0.5)[:, None, None], quarter @ flip, other)


class FieldFeed(Feed):
    """Batches of slices that are turned at the size they come in, and zoomed then."""

    def __init__(
        self,
        native: Native,
        images: Tensor,
        labels: Tensor,
        steps: int,
        batch: int,
        augmentation: Augmentation,
        device: torch.device,
        others: int | None = None,
    ) -> None:
        if augmentation != "published":
            raise ValueError(f"at their own size slices have the published augmentation alone, not {augmentation!r}")
        super().__init__(images, labels, steps, batch, augmentation, device, others)
        self.native = native

    def _empty(self, batch: int) -> Tables:
        tables = super()._empty(batch)
        shape = (self.steps, batch, 2, 2)
        return Tables(tables.index, torch.zeros(shape, dtype=torch.float64, device=tables.index.device), tables.tone)

    def _drawn(self, rows: np.ndarray, batch: int, seed: int, stream: int) -> Tables:
        order, chance = (np.random.default_rng([seed, stream, kind]) for kind in (1, 2))
        total = self.steps * batch
        index = epochs(rows, total, order).reshape(self.steps, batch)
        turns = torch.from_numpy(draw_turns(total, chance)).view(self.steps, batch, 2, 2)
        return Tables(index, turns, torch.zeros(self.steps, batch, 3))

    def _shown(self, row: Tables) -> tuple[Tensor, Tensor]:
        return self.native.turned(row.index, row.theta, self.images.shape[-1])
