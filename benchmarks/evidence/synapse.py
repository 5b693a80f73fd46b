"""Synapse's abdominal CT: TransUNet's preprocessed files, or an `.npz` of slices, with its 18 / 12 patients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .data import Slices, resized_labels

ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
TEST = frozenset([1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38])  # TransUNet's lists/lists_Synapse/test_vol.txt

Spacing = tuple[float, float, float]
Volumes = Iterator[tuple[int, Callable[[], tuple[np.ndarray, np.ndarray]], Spacing | None]]


def load_synapse(path: Path, size: int) -> Slices:
    """The slices resized to `size`; of the test patients the labels also as they are, at which they are scored.

    Args:
        path: TransUNet's folder (`train_npz`, `test_vol_h5`), beside which `spacing.json` may be: {"case0001": [mm
            between slices, rows, columns], ...}. Or an `.npz` with `images` (N, H, W), `labels` (0 to 8, the organs in
            TransUNet's order), `patient` (the number of the case), `slice`, and perhaps `spacing`, (3) or (N, 3).
        size: of the square.

    Raises:
        ValueError: it lacks test patients or has none to train on, labels are no organs, images are neither uint8 nor
            scaled to 0..1, or only some test patients have a spacing.
    """
    images, labels, native, patient, spacing = [], [], [], [], {}
    volumes = sorted(_of_folder(path) if path.is_dir() else _of_file(path), key=lambda volume: volume[0])
    everyone = [who for who, _, _ in volumes]
    if TEST - set(everyone) or len(everyone) == len(TEST):
        raise ValueError(f"{path} has patients {everyone}; it needs the test patients {sorted(TEST)} and others")
    for number, (who, read, mm) in enumerate(volumes):
        image, label = read()
        if image.shape != label.shape or label.max() > len(ORGANS):
            raise ValueError(f"{path}, patient {who}: images {image.shape}, labels {label.shape} up to {label.max()}")
        images.append(_resized(_as_bytes(image, f"{path}, patient {who}"), size))
        labels.append(resized_labels(label, (size, size)))
        native += [*(label if who in TEST else labels[-1])]
        patient += [who] * len(image)
        if mm is not None:
            spacing[number] = mm
    known = {who for number, who in enumerate(everyone) if number in spacing}
    if known & TEST and TEST - known:
        raise ValueError(f"{path} has no spacing of the test patients {sorted(TEST - known)}")
    numbers = np.asarray(patient)
    return Slices(
        "synapse",
        np.concatenate(images),
        np.concatenate(labels),
        numbers,
        np.cumsum(np.r_[True, np.diff(numbers) != 0]) - 1,
        dict.fromkeys(everyone, ""),
        TEST,
        ORGANS,
        native=native,
        spacing=spacing if known & TEST else None,
    )


def _of_folder(root: Path) -> Volumes:
    from examples.common import data

    file = root / "spacing.json"
    spacing = json.loads(file.read_text()) if file.exists() else {}
    found = data.load_synapse(root)
    for case in (*found.train, *found.test):
        mm = spacing.get(case.name)
        yield int(case.group.removeprefix("case")), case.read, None if mm is None else _three(mm)


def _of_file(path: Path) -> Volumes:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    for who in np.unique(arrays["patient"]).tolist():
        rows = np.flatnonzero(arrays["patient"] == who)
        rows = rows[np.argsort(arrays["slice"][rows], kind="stable")]
        pair = arrays["images"][rows], arrays["labels"][rows].astype(np.uint8)
        mm = np.broadcast_to(arrays["spacing"], (len(arrays["patient"]), 3))[rows] if "spacing" in arrays else None
        if mm is not None and not np.allclose(mm, mm[0]):
            raise ValueError(f"{path}: the spacing differs between the slices of patient {who}; it is one per volume")
        yield who, lambda pair=pair: pair, None if mm is None else _three(mm[0].tolist())


def _three(mm: list[float]) -> Spacing:
    across, down, along = mm
    return across, down, along


def _as_bytes(image: np.ndarray, where: str) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    low, high = float(image.min()), float(image.max())
    if low < -0.01 or high > 1.01:
        raise ValueError(f"{where}: images from {low:g} to {high:g}; they are uint8, or of a window scaled to 0..1")
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W) uint8 to (N, size, size), bilinearly, antialiased where they shrink."""
    parts = torch.from_numpy(images)[:, None].split(64)
    resized = [F.interpolate(p.float(), (size, size), mode="bilinear", antialias=True) for p in parts]
    return torch.cat(resized)[:, 0].round().clamp(0, 255).byte().numpy()
