"""Both stages on real images; skipped unless RESEG_DATA names a folder with the .npz files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import UNet, task_loss
from torch.utils.data import DataLoader, TensorDataset

from reseg_loss import ReSegWrapper

FOLDER = Path(os.environ.get("RESEG_DATA", ""))


@pytest.mark.skipif("RESEG_DATA" not in os.environ, reason="RESEG_DATA is not set")
@pytest.mark.parametrize(
    ("file", "classes", "count", "step"), [("sunnybrook_128.npz", 2, 64, 2), ("hippocampus.npz", 3, 8, 1)]
)
def test_both_stages_learn(file, classes, count, step):
    torch.manual_seed(0)
    with np.load(FOLDER / file) as data:
        keep = (slice(0, 8 * count, 8), *[slice(None, None, step)] * (data["images"].ndim - 1))
        image = torch.from_numpy(data["images"][keep]).float().unsqueeze(1) / 255
        label = torch.from_numpy(data["labels"][keep]).long()
    loader = DataLoader(TensorDataset(image, label), batch_size=4, shuffle=True)
    model = UNet(classes=classes, width=8, dims=image.ndim - 2)
    reseg = ReSegWrapper(model, preset="standardized", weight=0.1)
    # warnings are errors: this fails if the teacher is no better than a constant image
    history = reseg.fit_recon(loader, steps=48, optimizer=lambda p: torch.optim.Adam(p, 1e-2), progress=False)
    assert history[-1] < history[0]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    task, aligned = [], []
    for _ in range(3):
        for x, y in loader:
            value = task_loss(model(x), y)
            loss = value + reseg.alignment_loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.append(value.item())
            aligned.append(reseg.stats()["alignment"])
    for values in (task, aligned):
        n = len(values) // 3
        assert sum(values[-n:]) < sum(values[:n])
