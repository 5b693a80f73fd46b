"""Values of an epoch in nnU-Net's logger, and a plot of them."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

PLOT = "progress_unlabelled.png"  # nnU-Net's own plot has no place for more


def log(logger: Any, values: Mapping[str, float], epoch: int) -> None:
    """Log values beside nnU-Net's: in its checkpoints, and in Weights & Biases where that is on.

    Its local logger refuses names that it does not know, and wants one value an epoch; epochs without one are NaN.
    Where a newer nnU-Net keeps its values elsewhere, this does nothing: they are in the log file, too.
    """
    known = _entries(logger)
    if known is None:
        return
    for name, value in values.items():
        series = known.setdefault(name, [])
        series += [math.nan] * (epoch - len(series))
        logger.log(name, value, epoch)


def plot(logger: Any, names: Sequence[str], folder: str) -> None:
    """Draw what was logged, each in a panel of its own, beside nnU-Net's progress.png."""
    known = _entries(logger)
    if known is None:
        return
    figure, panels = plt.subplots(len(names), 1, figsize=(10, 4 * len(names)), squeeze=False)
    for panel, name in zip(panels[:, 0], names):
        panel.plot(known[name])
        panel.set(xlabel="epoch", ylabel=name.replace("_", " "))
    figure.tight_layout()
    figure.savefig(Path(folder) / PLOT)
    plt.close(figure)


def _entries(logger: Any) -> dict[str, list[float]] | None:
    return getattr(getattr(logger, "local_logger", None), "my_fantastic_logging", None)
