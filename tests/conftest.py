"""What tests share: one thread, one seed, and a small data set of slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

# small models run slower on several threads than on one, and side by side they would fight for cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that fails, fails again: none depends on which others ran, or on luck."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cudnn_as_it_was() -> Iterator[None]:
    """Benchmarks that a test runs in this process set it."""
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.fixture
def slices(tmp_path: Path) -> Path:
    """Five patients with four noisy slices each, in which a bright square is to be found."""
    rng = np.random.default_rng(0)
    labels = np.zeros((20, 32, 32), np.uint8)
    for label in labels:
        row, column = rng.integers(0, 16, 2)
        label[row : row + 16, column : column + 16] = 1
    images = (labels * 120 + rng.integers(0, 100, labels.shape)).astype(np.uint8)
    path = tmp_path / "squares.npz"
    np.savez(path, images=images, labels=labels, patient=np.repeat(np.arange(5), 4))
    return path
