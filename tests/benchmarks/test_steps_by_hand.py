"""Steps of the plans about the paper's claim and about label teachers, written out and compared with the harness's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.batches import Feed
from benchmarks.evidence.damage import damaged
from benchmarks.evidence.harness import Machine, Settings, Stage1, Stage2
from benchmarks.evidence.plan import read_plan
from benchmarks.evidence.variants import Variant

PLANS = Path(__file__).parents[2] / "benchmarks/plans"
CLASSES, SIDE, SEED, AT = 4, 32, 7, 2  # AT is the step that is written out
SURE = 0.3  # after so few steps nothing reaches 0.95


def cases() -> list[Any]:
    """Every variant of the ideas, and all that else is in the plans of figure 4 and of table 2."""
    plans = [read_plan(PLANS / f"{name}.json") for name in ("teacher_ideas_5", "figure_4_5", "table_2_unet")]
    found = {(v.name, p.settings.stage_1): (v, p.settings) for p in plans for v in p.variants}
    return [pytest.param(*pair, id=f"{name}, {stage_1}") for (name, stage_1), pair in found.items()]


def slices() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    centre = rng.integers(12, 20, (2, 40, 1, 1))
    labels = sum((np.hypot(y - centre[0], x - centre[1]) < r).astype(np.uint8) for r in (12, 9, 6))
    images = (60 * labels + rng.integers(0, 40, labels.shape)).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def features(net: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the U-Net, and its features: e1 and d1 at stride 2, ..., and the bottleneck b."""
    found = {}
    for i, encode in enumerate(net.encoder):
        found[f"e{i}"] = encode(x)
        x = F.max_pool2d(found[f"e{i}"], 2)
    x = found["b"] = net.bottleneck(x)
    for i, (up, decode) in enumerate(zip(net.up, net.decoder)):
        x = found[f"d{3 - i}"] = decode(torch.cat([found[f"e{3 - i}"], up(x)], 1))
    return net.head(x), found


def task(logits: Tensor, label: Tensor) -> Tensor:
    """Half cross-entropy, half Dice of all classes over the batch; 255 does not count, and 0 if all are that."""
    log_p, counts = logits.log_softmax(1), (label != 255).float()
    cross_entropy, dice = torch.zeros(()), torch.zeros(())
    for c in range(CLASSES):
        true, p = (label == c).float(), log_p[:, c].exp() * counts
        cross_entropy = cross_entropy - (true * log_p[:, c]).sum() / label.numel()
        dice = dice + 1 - (2 * (p * true).sum() + 1e-5) / (p.square().sum() + true.sum() + 1e-5)
    return (0.5 * cross_entropy + 0.5 * dice / CLASSES) * (counts.sum() > 0)


def heads(step: Stage2, found: Mapping[str, Tensor], label: Tensor) -> Tensor:
    """Deep supervision: 1x1 heads at strides 2, 4, 8, each with the label's first pixel of every square."""
    assert step.deep is not None
    assert step.variant.deep is not None
    layers: list[Any] = sorted(step.deep.heads.values(), key=lambda head: head.weight.shape[1])
    total = torch.zeros(())
    for level, head, weight in zip((1, 2, 3), layers, step.variant.deep["weights"], strict=True):
        logits = F.conv2d(found[f"d{level}"], head.weight, head.bias)
        total = total + weight * task(logits, label[:, :: 2**level, :: 2**level])
    return total


def alignment(reseg: Mapping[str, Any], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Tensor:
    """Eqs. 4 to 8, as published or of standardized features."""

    def error(a: Tensor, b: Tensor) -> Tensor:
        if reseg["preset"] == "standardized":
            a, b = (
                (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
                for x in (a, b)
            )
        return (a - b).square().mean()

    total = reseg.get("bottleneck", 1.0) * error(ours["b"], theirs["b"])
    for level in (1, 2, 3):
        total = total + reseg.get("encoder_to_decoder", 1.0) * error(ours[f"d{level}"], theirs[f"e{level}"])
        total = total + reseg.get("decoder_to_encoder", 1.0) * error(ours[f"e{level}"], theirs[f"d{level}"])
    return reseg.get("weight", 0.035) * total / 3


def one_hot(label: Tensor) -> Tensor:
    return torch.stack([(label == c).float() for c in range(CLASSES)], 1)


def mixed(images: Tensor, *labels: Tensor) -> list[Tensor]:
    """CutMix: a box of every sample from the one before it, then other intensities and noise for the images."""
    count = len(images)
    u, centre = torch.rand(count, 3), (torch.arange(SIDE) + 0.5) / SIDE
    results = [images.clone(), *(label.clone() for label in labels)]
    for b in range(count):
        side = 0.25 + 0.25 * u[b, 0]
        row, column = ((1 - side) * u[b, i] for i in (1, 2))
        inside = ((centre >= row) & (centre < row + side))[:, None] & (centre >= column) & (centre < column + side)
        for result, original in zip(results, (images, *labels)):
            result[b] = torch.where(inside, original[b - 1], original[b])
    u, noise, image = torch.rand(count, 3), torch.randn_like(images), results[0]
    for b in range(count):
        low, high = image[b].min(), image[b].max()
        scaled = ((image[b] - low) / (high - low)).clamp_min(1e-4) ** (0.7 * 2 ** u[b, 0])
        scaled = scaled * (0.8 + 0.4 * u[b, 1]) + 0.2 * u[b, 2] - 0.1 + 0.1 * noise[b]
        image[b] = low + (high - low) * scaled
    return results


def without_hooks(module: nn.Module) -> Any:
    copied = copy.deepcopy(module)
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied.train()


def by_hand(step: Stage2, net: Any, average: Any, image: Tensor, label: Tensor, other: Tensor) -> Tensor:
    """The whole loss of a step, with torch's random numbers in the order of the harness."""
    variant = step.variant
    idea, reseg = dict(variant.label_teacher or {}), variant.reseg

    def restored(seen: Tensor, image: Tensor) -> Tensor:
        assert step.label_teacher is not None
        both = torch.cat([one_hot(seen), image], 1) if step.label_teacher.sees_image else one_hot(seen)
        return features(step.label_teacher.body, both)[0].detach()

    def taught(seen: Tensor) -> dict[str, Tensor]:
        assert step.reseg is not None
        found = features(step.reseg.teacher.body, seen[:, None].float())[1]
        return {name: value.detach() for name, value in found.items()}

    logits, found = features(net, image)
    loss = task(logits, label) + (heads(step, found, label) if variant.deep else 0.0)
    if idea.get("does") == "distils":
        t = idea["temperature"]
        theirs = (restored(damaged(label, CLASSES), image) / t).softmax(1)
        loss = loss + t**2 * (theirs * (theirs / (logits / t).softmax(1)).log()).sum(1).mean()
    if reseg and idea.get("labelled", idea.get("does") != "aligns"):
        loss = loss + alignment(reseg, found, taught(label))
    if variant.unlabelled is None:
        return loss
    p = features(average, other)[0].detach().softmax(1)
    raw = p.argmax(1)
    if idea.get("does") == "cleans":
        cleaned = restored(raw, other).softmax(1)
        p = (p + cleaned) / 2 if idea.get("taken") == "mean" else cleaned
    sure = torch.where(p.max(1).values >= SURE, p.argmax(1), 255)
    assert (sure != 255).any()
    images, pseudo, whole = mixed(other, sure, raw)
    logits, found = features(net, images)
    further = task(logits, pseudo) + heads(step, found, pseudo)
    if idea.get("does") == "aligns":
        assert reseg is not None
        further = further + alignment(reseg, found, taught(whole))
    return loss + step.ramp[AT] * further


@pytest.mark.parametrize(("variant", "settings"), cases())
def test_a_step_is_the_one_written_out(variant: Variant, settings: Settings, monkeypatch):
    """Loss and gradients; and the teacher stays as it is."""
    monkeypatch.setattr("benchmarks.evidence.harness.SURE", SURE)
    settings = replace(settings, steps=10, stage1_steps=3, batch=3, size=SIDE, width=2)
    feed = Feed(*slices(), 18, 3, settings.augmentation, torch.device("cpu"))
    feed.load(np.arange(10), np.arange(10, 30), SEED)
    kind, machine = variant.stage_1, Machine.make()
    weights = None if kind is None else Stage1(kind, settings, CLASSES, feed, machine).fit(SEED)[0]
    step = Stage2(variant.step, settings, CLASSES, feed, machine)
    step.train(variant, SEED, weights)
    net, average = without_hooks(step.model), None if step.mixed is None else without_hooks(step.mixed.average)
    step.loop.clock.fill_(AT)
    batches = [feed.batch_of(tables, step.loop.clock)[:2] for tables in (feed.labelled, feed.others)]
    step.loop.optimizer.zero_grad()
    torch.manual_seed(SEED)
    loss, _ = step.losses()
    loss.backward()
    torch.manual_seed(SEED)
    expected = by_hand(step, net, average, *batches[0], batches[1][0])
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    largest = max(float(parameter.grad.norm()) for parameter in net.parameters())
    for (name, ours), theirs in zip(step.model.named_parameters(), net.parameters()):
        assert ours.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6 * largest, name
    teacher = step.label_teacher or (step.reseg.teacher if step.reseg else None)
    assert (teacher is None) == (weights is None)
    if teacher is not None and weights is not None:
        assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
    if step.mixed is not None:
        assert not any(p.requires_grad for p in step.mixed.average.parameters())
