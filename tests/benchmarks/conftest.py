"""Made-up data sets for the accuracy benchmark, in the form of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from native_slices import write_native

from benchmarks.evidence.data import Slices, load

SHAPE = (16, 48, 32)  # of volumes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets in the form of the real ones: discs or balls whose brightness is that of their class."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]

    def stack(count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
        centre = rng.integers(12, 20, (2, count, 1, 1))
        radius = np.hypot(y - centre[0], x - centre[1])
        labels = sum((radius < 12 - 4 * c).astype(np.uint8) for c in range(classes))
        return (60 * labels + rng.integers(0, 20, labels.shape)).astype(np.uint8), labels

    patient, phase, position = (a.ravel() for a in np.meshgrid(range(1, 101), [0, 1], [0, 1], indexing="ij"))
    images, labels = stack(len(patient), 3)
    np.savez(folder / "acdc.npz", images=images, labels=labels, patient=patient, phase=phase, slice=position)
    patient, position = (a.ravel() for a in np.meshgrid(range(45), [7, 18, 27, 38], indexing="ij"))
    images, labels = stack(len(patient), 1)
    names = np.array([f"SC-{'HYP' if p % 3 else 'N'}-{p:02}" for p in range(45)])
    part = (patient % 3) + 1
    np.savez(
        folder / "sunnybrook.npz",
        **{"images": images, "labels": labels, "patient": patient, "slice": position},
        **{"part": part, "patient_name": names},
    )
    centre = np.array(SHAPE) / 2 + rng.integers(-2, 3, (260, 3))
    away = np.moveaxis(np.indices(SHAPE), 0, -1) - centre[:, None, None, None]
    labels = sum((np.linalg.norm(away, axis=-1) < radius).astype(np.uint8) for radius in (7, 4))
    images = (60 * labels + rng.integers(0, 20, labels.shape)).astype(np.uint8)
    np.savez(folder / "hippocampus.npz", images=images, labels=labels, patient=np.arange(1, 261))
    return folder


@pytest.fixture(scope="module")
def acdc(folder: Path) -> Slices:
    return load(folder / "acdc.npz")


@pytest.fixture(scope="module")
def native(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Also writes acdc_native.npz: 100 patients, 2 slices of both phases, and a height and a width of each patient."""
    parts = {"labelled_1": [99], "labelled_3": [99, 38, 50], "labelled_7": [99, 38, 50, 100, 58, 21, 49]}
    parts |= {"validation": list(range(1, 11)), "test": list(range(11, 21)) + list(range(71, 81))}

    def size(patient: int) -> tuple[int, int]:
        return 20 + patient % 3 * 8, 40 - patient % 5 * 4

    return write_native(folder / "acdc_native.npz", range(1, 101), size, (2, 1), 8, parts)
