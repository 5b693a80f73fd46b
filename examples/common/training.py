"""The training loop that every example script uses, with and without reseg-loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from reseg_loss import DeepSupervision, ReSegWrapper, SemiSupervised

from .data import Case, SegmentationData, resize_image
from .metrics import VolumeScores, score_volume
from .processes import gather, rank, share, world_size
from .recipes import poly, segmentation_loss

IGNORED = 255  # in labels of unlabelled images


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, ...]],
    optimizer: Optimizer,
    *,
    steps: int,
    start: int = 0,
    task_loss: nn.Module | None = None,
    factor: Callable[[int], float] | None = None,
    amp: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    seed: int = 0,
    reseg: ReSegWrapper | None = None,
    deep: DeepSupervision | None = None,
    semi: SemiSupervised | None = None,
    after_step: Callable[[float, float], None] | None = None,
    title: str = "training",
) -> list[float]:
    """Train from step ``start`` to ``steps`` and return the task loss of each step.

    Learning rate, dropout and stochastic depth depend on the step and ``seed`` alone, so that an interrupted run goes
    on exactly where it stopped.

    Args:
        model: the network, or its DistributedDataParallel.
        batches: those of the steps ``start`` to ``steps - 1``: image and label, with `semi` unlabelled images, too.
        task_loss: of logits and label (B, 1, H, W); default: 0.5 cross-entropy + 0.5 Dice.
        factor: of the optimizer's own learning rate at a step; default: polynomial decay.
        amp: autocast dtype; float16 wants a ``scaler``.
        after_step: told the task loss and the seconds of every step.
    """
    device = next(model.parameters()).device
    task_loss = task_loss or segmentation_loss()
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    history = []
    model.train()
    progress = tqdm(batches, desc=title, initial=start, total=steps, disable=rank() > 0)
    for step, batch in enumerate(progress, start):
        begin = time.perf_counter()
        torch.manual_seed((seed * 1_000_003 + step) * world_size() + rank())
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (poly(step, steps) if factor is None else factor(step))
        image, label, *unlabelled = (part.to(device, non_blocking=True) for part in batch)
        sizes: list[int] = []

        def forward(x: Tensor, sizes: list[int] = sizes) -> Any:
            sizes.append(len(x))
            with reseg.record() if reseg is not None and len(sizes) == 1 else nullcontext():
                return model(x)

        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            result = forward(image) if semi is None else semi.loss(image, label[:, None], *unlabelled, forward=forward)
        task = loss = task_loss(result.float(), label[:, None]) if semi is None else result
        if reseg is not None:
            # of the unlabelled images in the first forward, if there are any, its teacher is told nothing
            known = F.pad(label, [0, 0] * (label.ndim - 1) + [0, sizes[0] - len(label)], value=IGNORED)
            loss = loss + reseg.alignment_loss(known)
        if deep is not None:
            loss = loss + deep.loss(label[:, None], lambda logits, label: task_loss(logits.float(), label))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if semi is not None:
            semi.update()
        history.append(task.item() if semi is None else semi.stats()["labelled"])  # waits for the device
        refuse_diverged(f"the loss of step {step + 1}", loss)
        progress.set_postfix(loss=f"{history[-1]:.3f}")
        if after_step is not None:
            after_step(history[-1], time.perf_counter() - begin)
    return history


def refuse_diverged(what: str, value: Tensor) -> None:
    """Stop where a loss, or what a network makes of an image, is not finite: its scores would look like any others."""
    if not bool(value.detach().isfinite().all()):
        raise SystemExit(f"The training has diverged: {what} is not finite. Lower --lr, in another --out.")


@torch.no_grad()
def predict(model: nn.Module, image: np.ndarray, size: int, batch_size: int = 16) -> np.ndarray:
    """Label a volume (D, H, W) slice by slice, at its own resolution."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    labels = []
    for part in torch.from_numpy(image)[:, None].split(batch_size):
        logits = model(resize_image(part, (size, size)).to(device))
        refuse_diverged("the network's output", logits)
        labels.append(resize_image(logits, (image.shape[1], image.shape[2])).argmax(1).byte().cpu())
    model.train(was_training)
    return torch.cat(labels).numpy()


def evaluate(model: nn.Module, data: SegmentationData, title: str = "testing") -> list[VolumeScores]:
    """Score every test volume; several processes share the work."""

    def score(case: Case) -> VolumeScores:
        image, truth = case.read()
        prediction = predict(model, image, data.size)
        return score_volume(case.name, prediction, truth, len(data.class_names), case.spacing)

    part = [score(case) for case in tqdm(share(data.test), desc=title, disable=rank() > 0)]
    return gather(part, len(data.test))
