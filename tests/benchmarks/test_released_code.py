"""The released code's variant against a loop written out by hand, to 1e-6."""

from __future__ import annotations

import copy

import pytest
import torch
from models import UNet, batch
from torch import Tensor

from benchmarks.released_code import ReleasedCode, task_loss


def features_of(model: UNet, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    skips, f = [], {}
    for level, encode in enumerate(model.encoder):
        x = f[f"e{2**level}"] = encode(x)
        skips.append(x)
        x = model.pool(x)
    x = model.bottleneck(x)
    for level in reversed(range(len(skips))):
        i = len(skips) - 1 - level
        x = f[f"d{2**level}"] = model.decoder[i](torch.cat([model.up[i](x), skips[level]], 1))
    return model.head(x), f


def dice_loss(logits: Tensor, label: Tensor) -> float:
    total, p = 0.0, logits.detach().softmax(1)
    for c in range(logits.shape[1]):
        t = (label == c).double()
        total += 1 - float((2 * (p[:, c] * t).sum() + 1e-5) / ((p[:, c] ** 2).sum() + (t * t).sum() + 1e-5))
    return total / logits.shape[1]


def test_both_stages_agree_with_the_hand_written_loop():
    torch.manual_seed(0)
    model = UNet(in_channels=3, classes=4, depth=4).double()
    batches = [(i.double().expand(-1, 3, -1, -1), y) for i, y in (batch(size=32, classes=4, seed=s) for s in range(3))]
    ours = ReleasedCode(model, batches[0][0])
    student, teacher = copy.deepcopy(model), copy.deepcopy(ours.teacher)
    ours.encode = lambda label: label.unsqueeze(1).double().repeat(1, 3, 1, 1)  # fp64, to compare to 1e-6

    history = ours.fit_recon(batches, torch.optim.SGD(ours.teacher.parameters(), 0.1))
    optimizer = torch.optim.SGD(teacher.parameters(), 0.1)
    for (image, label), value in zip(batches, history):
        x = torch.stack([label.double()] * 3, 1)
        d = features_of(teacher.train(), x)[0] - image[:, :1]
        loss = 0.6 * (d**2).mean() + 0.4 * d.abs().mean()
        assert value == pytest.approx(loss.item(), rel=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for image, label in batches:
        logits = model(image)
        aligned = ours.alignment_loss(label)
        expected, s = features_of(student, image)
        with torch.no_grad():
            t = features_of(teacher.train(), torch.stack([label.double()] * 3, 1))[1]
        pairs = [(t[f"e{r}"], s[f"d{r}"]) for r in (2, 4, 8)] + [(t[f"d{r}"], s[f"e{r}"]) for r in (2, 4, 8)]
        pairs.append((t["d8"], s["d8"]))
        total = sum(((a - b) ** 2).mean() for a, b in pairs)
        assert aligned.item() == pytest.approx(0.035 * total.item() / 3, rel=1e-6)
        ce = -expected.log_softmax(1).gather(1, label.unsqueeze(1)).mean().item()
        assert task_loss(logits, label).item() == pytest.approx(0.5 * ce + 0.5 * dice_loss(expected, label), rel=1e-6)
    drifted = teacher.bottleneck[1].running_mean
    assert torch.allclose(ours.teacher.bottleneck[1].running_mean, drifted, rtol=1e-6)
    assert not torch.equal(drifted, torch.zeros_like(drifted))
