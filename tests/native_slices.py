"""acdc_native.npz with made-up slices."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np


def write_native(
    path: Path,
    patients: Iterable[int],
    size: Callable[[int], tuple[int, int]],
    positions: Sequence[int],
    margin: int,
    parts: Mapping[str, Sequence[int]],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Write slices of both phases of patients, of a patient's own height and width; image and label of each."""
    from PIL import Image

    rng = np.random.default_rng(1)
    slices, blobs, about = [], [], []
    for patient in patients:
        height, width = size(patient)
        for phase in (1, 0):  # not in order
            for position in positions:
                y, x = np.mgrid[:height, :width]
                radius = np.hypot((y - height / 2) / height, (x - rng.integers(margin, width - margin)) / width)
                label = sum((radius < 0.4 - 0.12 * c).astype(np.uint8) for c in range(3))
                image = (30 * label + rng.integers(0, 10, label.shape)).astype(np.uint8)
                blob = io.BytesIO()
                Image.fromarray(image).convert("RGB").save(blob, "webp", lossless=True, exact=True)
                blobs.append(np.frombuffer(blob.getvalue(), np.uint8))
                slices.append((image, label))
                about.append((patient, phase, position, height, width))
    columns = dict(zip(("patient", "phase", "slice", "height", "width"), np.array(about).T))
    ends, labels = np.cumsum([len(blob) for blob in blobs]), np.concatenate([label.ravel() for _, label in slices])
    everything = {**columns, **{name: np.array(who) for name, who in parts.items()}}
    np.savez(path, webp=np.concatenate(blobs), ends=ends, labels=labels, **everything)
    return slices
