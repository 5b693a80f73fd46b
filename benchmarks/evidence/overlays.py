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
    found = dict(zip(*_read(file)[2:])) if file.exists() else {}
    found[name] = prediction[torch.tensor(at)].numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        file,
        image=data.images[chosen],
        truth=data.labels[chosen],
        names=np.array(list(found)),
        predictions=np.stack(list(found.values())),
    )


def _read(file: Path) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    with np.load(file) as arrays:
        return arrays["image"], arrays["truth"], arrays["names"].tolist(), arrays["predictions"]


def draw(file: Path) -> Path:
    """The picture beside the file: a row per slice, with the image, the truth and each network's classes over it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    image, truth, names, predictions = _read(file)
    columns = [("image", np.zeros_like(truth)), ("truth", truth), *zip(names, predictions)]
    drawn = Figure(figsize=(1.6 * len(columns), 1.6 * len(image) + 0.6), layout="constrained")
    panels = drawn.subplots(len(image), len(columns), squeeze=False)
    for column, (name, classes) in enumerate(columns):
        panels[0, column].set_title("\n".join(textwrap.wrap(name, 20)), fontsize=6)
        for row, axes in enumerate(panels[:, column]):
            axes.imshow(image[row], cmap="gray", vmin=0, vmax=255)
            over = np.ma.masked_equal(classes[row], 0)  # the background is not coloured
            axes.imshow(over, cmap=colormaps["tab10"], vmin=0, vmax=9, alpha=0.55, interpolation="nearest")
            axes.set_axis_off()
    picture = file.with_suffix(".png")
    drawn.savefig(picture, dpi=130)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for file in parser.parse_args().files:
        print(draw(file))


if __name__ == "__main__":
    main()
