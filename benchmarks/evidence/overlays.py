"""A few fixed slices, their truth and what every network made of them, side by side as in the paper's figures 2 and 3.

    python -m benchmarks.evidence.overlays folder/*.npz   # draws each of them beside it

`accuracy.py --overlays folder` writes the files, one per plan, seed and part; a run adds what it predicts.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .data import Slices

SHOWN = 4  # slices


def places(volume: np.ndarray) -> list[int]:
    """Of the numbers of volumes, (N), the middle slices of a few volumes that lie evenly."""
    numbers = np.unique(volume)
    few = numbers[np.linspace(0, len(numbers) - 1, min(SHOWN, len(numbers))).round().astype(int)]
    return [int(np.flatnonzero(volume == number)[(volume == number).sum() // 2]) for number in few]


def keep_slices(file: Path, data: Slices, rows: np.ndarray, name: str, prediction: Tensor) -> None:
    """Put the predicted classes (N, S, S) of a network's slices `rows` into the file, or in place of its last ones."""
    at = places(data.volume[rows])
    chosen = rows[at]
    found: dict[str, np.ndarray] = {}
    if file.exists():
        with np.load(file) as arrays:
            found = dict(zip(arrays["names"].tolist(), arrays["predictions"]))
    found[name] = prediction[torch.tensor(at)].numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")  # a file that a kill cut short would fail every later run
    np.savez_compressed(
        partial,
        image=data.images[chosen],
        truth=data.labels[chosen],
        patient=data.patient[chosen],
        classes=np.array(data.class_names),
        names=np.array(list(found)),
        predictions=np.stack(list(found.values())),
    )
    partial.replace(file)


def draw(file: Path) -> Path:
    """The picture beside the file: a row per slice, with the image, the truth and each network's classes over it."""
    from examples.common.plots import OverlayRow, overlays_figure, save_figure

    with np.load(file) as arrays:
        names = ["\n".join(textwrap.wrap(name, 24)) for name in ("truth", *arrays["names"].tolist())]
        maps = [arrays["truth"], *arrays["predictions"]]
        rows = [
            OverlayRow(f"patient {patient}", image, dict(zip(names, each)))
            for patient, image, *each in zip(arrays["patient"], arrays["image"], *maps)
        ]
        classes = ["background", *arrays["classes"].tolist()]
    picture = file.with_suffix(".png")
    save_figure(overlays_figure(rows, classes), picture)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        print(draw(file))


if __name__ == "__main__":
    main()
