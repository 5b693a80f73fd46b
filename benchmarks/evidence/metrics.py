"""DSC and HD95 per volume, to the conventions of `examples/common/metrics.py`.

A class that truth and prediction both lack in a volume is skipped. One that only one of them has is a plain failure:
DSC 0, and for HD95 the diagonal of the volume. Distances are in pixels, and a slice counts as one, or in mm where the
spacing is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import KDTree
from torch import Tensor

from .field import zoomed

Spacing = tuple[float, float, float]


def score(
    prediction: Tensor,
    truth: Tensor | Sequence[Tensor],
    volume: Tensor,
    classes: Sequence[tuple[int, int]],
    order_0: bool = False,
    spacing: Sequence[Spacing] | None = None,
) -> dict[str, Any]:
    """Means over volumes per class, and over classes; `each_dsc` and `each_hd95` are per class and volume.

    Args:
        prediction: (N, H, W) class indices; the slices of a volume are neighbours, in order. Or
            (N, D, H, W), whole volumes.
        truth: the same shape; or a map (H', W') per slice, to whose size predictions are brought (by nearest
            neighbour), the slices of a volume of one size.
        volume: (N), a number per volume.
        classes: pairs of (class in the prediction, class in the truth).
        order_0: bring predictions to another size as the field does it, corners on corners.
        spacing: of each volume, between slices, rows and columns of the truth, in mm; HD95 is in pixels without.
    """
    dsc: list[list[float | None]] = [[] for _ in classes]
    hd95: list[list[float | None]] = [[] for _ in classes]
    skipped, missed = [0] * len(classes), [0] * len(classes)
    for place, number in enumerate(volume.unique_consecutive().tolist()):
        mm = (1.0, 1.0, 1.0) if spacing is None else spacing[place]
        slices = volume == number
        predicted, true = prediction[slices], _of_volume(truth, slices)
        if predicted.shape != true.shape and order_0:
            predicted = torch.from_numpy(zoomed(predicted.numpy(), (true.shape[1], true.shape[2])))
        elif predicted.shape != true.shape:
            predicted = F.interpolate(predicted[:, None], true.shape[1:], mode="nearest-exact")[:, 0]
        for i, (ours, theirs) in enumerate(classes):
            # slices of one volume, or that volume alone, to (D, H, W)
            a, b = ((x == c).flatten(0, -3) for x, c in ((predicted, ours), (true, theirs)))
            common, size_a, size_b = torch.stack([(a & b).sum(), a.sum(), b.sum()]).tolist()
            if not size_a and not size_b:
                skipped[i] += 1
                dsc[i].append(None)
                hd95[i].append(None)
            elif not size_a or not size_b:
                missed[i] += 1
                dsc[i].append(0.0)
                hd95[i].append(math.hypot(*(n * step for n, step in zip(a.shape, mm))))
            else:
                dsc[i].append(2 * common / (size_a + size_b))
                hd95[i].append(hausdorff95(a, b, mm))
    means = {"dsc": [_mean(_known(values)) for values in dsc], "hd95": [_mean(_known(values)) for values in hd95]}
    return {
        **means,
        "mean_dsc": _mean(_known(means["dsc"])),
        "mean_hd95": _mean(_known(means["hd95"])),
        "volumes": len(volume.unique_consecutive()),
        "skipped": skipped,
        "missed": missed,
        "each_dsc": dsc,
        "each_hd95": hd95,
    }


def _of_volume(truth: Tensor | Sequence[Tensor], slices: Tensor) -> Tensor:
    if isinstance(truth, Tensor):
        return truth[slices]
    return torch.stack([truth[i] for i in slices.nonzero()[:, 0].tolist()])


def hausdorff95(a: Tensor, b: Tensor, spacing: Spacing = (1.0, 1.0, 1.0)) -> float:
    """The larger of the two 95th percentiles of the distances between surfaces of masks (D, H, W)."""
    surfaces = [surface(mask).nonzero().numpy() * np.asarray(spacing) for mask in (a, b)]
    there, back = (KDTree(other).query(points)[0] for points, other in (surfaces, surfaces[::-1]))
    return float(max(np.quantile(there, 0.95), np.quantile(back, 0.95)))


def surface(mask: Tensor) -> Tensor:
    """The voxels of a mask (D, H, W) with a face that touches the outside; beyond the edge is outside."""
    padded = F.pad(mask, (1,) * 6)
    inner = mask
    for axis in range(3):
        for step in (-1, 1):
            inner = inner & padded.roll(step, axis)[1:-1, 1:-1, 1:-1]
    return mask & ~inner


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
