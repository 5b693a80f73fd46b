"""A volume's slices as one image in 3D. They lie far apart, so they are turned, zoomed and shifted in their planes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Feed, Tables, draw, toned
from .data import Slices


@dataclass(frozen=True)
class Stacks:
    """Volumes in the order of their numbers; behind a volume's slices it is black, and background."""

    images: Tensor
    """(V, depth, S, S) uint8"""
    labels: Tensor
    """The same."""
    inside: Tensor
    """(V, depth) bool, where slices are."""
    patient: np.ndarray
    """(V)"""

    @classmethod
    def of(cls, data: Slices, images: Tensor, labels: Tensor, depth: int) -> Stacks:
        """Stack the slices of `data`, of which images and labels are (N, S, S).

        Raises:
            ValueError: a volume has more slices than `depth`.
        """
        volume = torch.from_numpy(data.volume)
        counts = volume.bincount()
        if counts.max() > depth:
            raise ValueError(f"{data.name} has a volume of {int(counts.max())} slices, more than depth={depth}")
        inside = torch.arange(depth) < counts[:, None]
        first = counts.cumsum(0) - counts
        where = volume.to(images.device), (torch.arange(len(volume)) - first[volume]).to(images.device)
        stacked = [images.new_zeros(len(counts), depth, *images.shape[1:]) for _ in range(2)]
        for stack, slices in zip(stacked, (images, labels)):
            stack[where] = slices
        return cls(stacked[0], stacked[1], inside, data.patient[first.numpy()])


class StackedFeed(Feed):
    """Batches of stacks, augmented as slices are, all of a stack alike."""

    def _empty(self, batch: int) -> Tables:
        return Tables.empty(self.steps, batch, 2, self.images.device)

    def _drawn(self, rows: np.ndarray, batch: int, seed: int, stream: int) -> Tables:
        return draw(rows, self.steps, batch, seed, stream, self.augmentation)

    def _shown(self, row: Tables) -> tuple[Tensor, Tensor]:
        image, label = self.images[row.index], self.labels[row.index]  # in the planes slices are as channels
        grid = F.affine_grid(row.theta, list(image.shape), align_corners=False)
        turned = F.grid_sample(image.float() / 255, grid, mode="bilinear", align_corners=False)[:, None]
        nearest = F.grid_sample(label.float(), grid, mode="nearest", align_corners=False).long()
        return (toned(turned, row.tone) if self.augmentation == "strong" else turned), nearest
