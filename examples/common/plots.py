"""The pictures of a comparison: predictions, errors, and the teacher's reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's colours, which colour-blind readers can tell apart; the background is black
CLASS_COLOURS = ("#000000", "#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#D55E00", "#FFFFFF")
BARE, RESEG = "#666666", "#0072B2"
ERROR = "#FF2D2D"


@dataclass(frozen=True)
class WayPicture:
    """What a network made of the slice."""

    name: str
    label: np.ndarray
    """The predicted label map (H, W)."""
    dsc: float | None
    """Of all test volumes, mean over classes."""


def ways_figure(
    image: np.ndarray,
    truth: np.ndarray,
    ways: Sequence[WayPicture],
    reconstruction: np.ndarray | None,
    class_names: Sequence[str],
) -> Figure:
    """One slice (H, W) with its truth at the left, and a column for each network: its label map, and its errors."""
    columns = 2 + len(ways)
    figure = Figure(figsize=(1.9 * columns, 4.6))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    axes = figure.subplots(2, columns)
    _show_image(axes[0, 0], image, "image\nof a test volume")
    _show_labels(axes[0, 1], truth, "truth")
    axes[1, 0].axis("off")
    if reconstruction is None:
        axes[1, 1].axis("off")
    else:
        _show_image(axes[1, 1], reconstruction, "reseg's teacher, from truth")
    for column, way in enumerate(ways, 2):
        dsc = "" if way.dsc is None else f"\nDSC {100 * way.dsc:.2f} (test set)"
        _show_labels(axes[0, column], way.label, way.name + dsc)
        _show_errors(axes[1, column], image, way.label != truth)
    handles = [*_class_patches(class_names), Patch(facecolor=ERROR, edgecolor="grey", label="wrong pixel")]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=9, frameon=False)
    return figure


@dataclass(frozen=True)
class OverlayRow:
    """One test slice (H, W) with its label maps by name: the truth, and what each run made of the slice."""

    case: str
    image: np.ndarray
    labels: Mapping[str, np.ndarray]


def overlays_figure(rows: Sequence[OverlayRow], class_names: Sequence[str]) -> Figure:
    """A row per case; columns: the image, then every label map over the image."""
    names = list(rows[0].labels)
    figure = Figure(figsize=(2.4 * (1 + len(names)), 2.4 * len(rows) + 0.4))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), 1 + len(names), squeeze=False)
    for line, (row, cells) in enumerate(zip(rows, axes)):
        _show_image(cells[0], row.image, "image" if line == 0 else "")
        cells[0].set_ylabel(row.case, fontsize=8)
        for name, cell in zip(names, cells[1:]):
            _show_overlay(cell, row.image, row.labels[name], name if line == 0 else "")
    figure.legend(handles=_class_patches(class_names), loc="outside lower left", ncols=6, fontsize=9, frameon=False)
    return figure


def ablation_figure(
    subsets: Mapping[str, Sequence[float]], weights: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """DSC in % by the terms that are on and by lambda: a dot per seed, a line at the mean."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, groups, label in ((left, subsets, "terms that are on"), (right, weights, "weight λ")):
        for place, values in enumerate(groups.values()):
            axes.scatter([place] * len(values), values, s=14, color=RESEG, alpha=0.7, zorder=2)
            axes.hlines(np.mean(values), place - 0.3, place + 0.3, color=BARE, linewidth=1.5)
        axes.set_xticks(range(len(groups)), [name.replace(" + ", "\n") for name in groups], fontsize=8)
        axes.set_xlabel(label, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("DSC in %", fontsize=9)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG that is small enough for a web page."""
    figure.savefig(path, dpi=110)


def _class_patches(class_names: Sequence[str]) -> list[Patch]:
    names = list(enumerate(class_names))[1:]
    return [Patch(facecolor=_colour(index), edgecolor="grey", label=name) for index, name in names]


def _show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=max(1.0, float(image.max())))
    _bare_frame(axes, title)


def _show_labels(axes: Axes, labels: np.ndarray, title: str) -> None:
    axes.imshow(labels, cmap=_COLOURS, vmin=0, vmax=255, interpolation="nearest")
    _bare_frame(axes, title)


def _show_overlay(axes: Axes, image: np.ndarray, labels: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=max(1.0, float(image.max())))
    shown = np.ma.masked_where(labels == 0, labels)
    axes.imshow(shown, cmap=_COLOURS, vmin=0, vmax=255, interpolation="nearest", alpha=0.55)
    _bare_frame(axes, title)


def _colour(index: int) -> str:
    """The class's colour; beyond the eighth class they start again."""
    return CLASS_COLOURS[0 if index == 0 else 1 + (index - 1) % (len(CLASS_COLOURS) - 1)]


_COLOURS = ListedColormap([_colour(index) for index in range(256)])


def _show_errors(axes: Axes, image: np.ndarray, wrong: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=2)  # darkened, so that the errors stand out
    overlay = np.ma.masked_where(~wrong, wrong)
    axes.imshow(overlay, cmap=ListedColormap([ERROR]), interpolation="nearest")
    _bare_frame(axes, f"errors here, {wrong.mean():.1%}")


def _bare_frame(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, pad=3)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
