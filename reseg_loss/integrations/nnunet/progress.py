"""Log an epoch's values with nnU-Net's logger, and plot them."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

PLOT = "progress_unlabelled.png"  # nnU-Net's own plot has no place for more


def log(logger: Any, values: Mapping[str, float], epoch: int) -> None:
    """Log values along with nnU-Net's own: in its checkpoints, and in Weights & Biases if that is on.

    Its local logger refuses unknown names, and needs one value per epoch; epochs without a value get NaN. If a newer
    nnU-Net keeps its values elsewhere, this does nothing; they are in the log file, too.
    """
    known = _entries(logger)
    if known is None:
        return
    for name, value in values.items():
        series = known.setdefault(name, [])
        series += [math.nan] * (epoch - len(series))
        logger.log(name, value, epoch)


def plot(logger: Any, names: Sequence[str], folder: str) -> None:
    """Plot the logged values, each in its own panel, next to nnU-Net's progress.png."""
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
