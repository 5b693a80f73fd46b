"""DSC and HD95 per volume, by MONAI, with the cases it leaves open decided and counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

from .data import Spacing


@dataclass(frozen=True)
class VolumeScores:
    """The scores of one volume, one entry per foreground class; None where truth and prediction lack the class."""

    name: str
    dsc: tuple[float | None, ...]
    hd95: tuple[float | None, ...]
    unit: str
    """The unit of HD95: "mm", or "px" where the spacing is unknown (a slice then counts as one pixel)."""


@dataclass(frozen=True)
class Summary:
    """Means over volumes, one entry per foreground class; None for a class that no volume has."""

    dsc: tuple[float | None, ...]
    hd95: tuple[float | None, ...]
    mean_dsc: float | None
    """Mean over the classes."""
    mean_hd95: float | None
    skipped: tuple[int, ...]
    """Volumes in which neither truth nor prediction has the class."""
    unit: str


def score_volume(
    name: str, prediction: np.ndarray, truth: np.ndarray, classes: int, spacing: Spacing | None
) -> VolumeScores:
    """Compare two label maps (D, H, W).

    A class that both lack says nothing and is skipped. A class that only one of them has is a plain failure: DSC 0,
    and for HD95, which has no surface to measure to, the diagonal of the volume.
    """
    if prediction.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"Both label maps have to be (D, H, W), but they are {prediction.shape} and {truth.shape}.")
    if truth.max() >= classes:  # the loop below would take it for background
        raise ValueError(
            f"The truth of {name} has the label {truth.max():g}, but the classes are 0 to {classes - 1}; "
            "relabel the others."
        )
    voxel = spacing or (1.0, 1.0, 1.0)
    diagonal = math.hypot(*(length * step for length, step in zip(truth.shape, voxel)))
    dsc: list[float | None] = []
    hd95: list[float | None] = []
    for index in range(1, classes):
        ours, theirs = prediction == index, truth == index
        if ours.any() and theirs.any():
            values = _overlap_and_distance(ours, theirs, voxel)
            dsc.append(values[0])
            hd95.append(values[1])
        elif ours.any() or theirs.any():
            dsc.append(0.0)
            hd95.append(diagonal)
        else:
            dsc.append(None)
            hd95.append(None)
    return VolumeScores(name, tuple(dsc), tuple(hd95), "px" if spacing is None else "mm")


def _overlap_and_distance(ours: np.ndarray, theirs: np.ndarray, voxel: Spacing) -> tuple[float, float]:
    a, b = (torch.from_numpy(mask)[None, None] for mask in (ours, theirs))
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own helper with an argument that it has deprecated
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=voxel)
    return compute_dice(a, b).item(), distance.item()


def summarize(scores: Sequence[VolumeScores]) -> Summary:
    """Average over volumes per class, then over classes."""
    units = {score.unit for score in scores}
    if len(units) != 1:
        raise ValueError("Some volumes have a spacing and some have none, so their HD95 have no common unit.")
    dsc = tuple(_mean(values) for values in zip(*(score.dsc for score in scores)))
    hd95 = tuple(_mean(values) for values in zip(*(score.hd95 for score in scores)))
    skipped = tuple(sum(value is None for value in values) for values in zip(*(score.dsc for score in scores)))
    return Summary(dsc, hd95, _mean(dsc), _mean(hd95), skipped, units.pop())


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
