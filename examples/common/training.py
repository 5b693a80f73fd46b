"""The training loop that every example script uses, with and without reseg-loss."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from tqdm import tqdm

from reseg_loss import DeepSupervision, ReSegWrapper

from .data import Case, SegmentationData, resize_image
from .metrics import VolumeScores, score_volume


def segmentation_loss() -> nn.Module:
    """0.5 cross-entropy + 0.5 Dice, as published: all classes, squared denominator, sums over the batch."""
    return DiceCELoss(
        to_onehot_y=True,
        softmax=True,
        squared_pred=True,
        batch=True,
        lambda_dice=0.5,
        lambda_ce=0.5,
        smooth_nr=1e-5,
        smooth_dr=1e-5,
    )


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> SGD:
    """The published optimizer; its learning rate there is 0.01."""
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    *,
    steps: int,
    start: int = 0,
    reseg: ReSegWrapper | None = None,
    deep: DeepSupervision | None = None,
    title: str = "training",
) -> list[float]:
    """Train from step ``start`` to ``steps`` and return the task loss of each step.

    The learning rate decays with the power 0.9 from the optimizer's own. It depends on the step alone, so that an
    interrupted run can go on where it stopped.
    """
    device = next(model.parameters()).device
    task_loss = segmentation_loss()
    rates = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
    history = []
    model.train()
    progress = tqdm(batches, desc=title, total=steps - start)
    for step, (image, label) in enumerate(progress, start):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 - step / steps) ** 0.9
        image, label = image.to(device), label.to(device)
        task = loss = task_loss(model(image), label[:, None])
        if reseg is not None:
            loss = loss + reseg.alignment_loss(label)
        if deep is not None:
            loss = loss + deep.loss(label[:, None], task_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(task.item())
        progress.set_postfix(loss=f"{history[-1]:.3f}")
    return history


@torch.no_grad()
def predict(model: nn.Module, image: np.ndarray, size: int, batch_size: int = 16) -> np.ndarray:
    """Label a volume (D, H, W) slice by slice, at its own resolution."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    labels = []
    for part in torch.from_numpy(image)[:, None].split(batch_size):
        logits = model(resize_image(part, (size, size)).to(device))
        labels.append(resize_image(logits, (image.shape[1], image.shape[2])).argmax(1).byte().cpu())
    model.train(was_training)
    return torch.cat(labels).numpy()


def evaluate(model: nn.Module, data: SegmentationData, title: str = "testing") -> list[VolumeScores]:
    """Score every test volume."""

    def score(case: Case) -> VolumeScores:
        image, truth = case.read()
        prediction = predict(model, image, data.size)
        return score_volume(case.name, prediction, truth, len(data.class_names), case.spacing)

    return [score(case) for case in tqdm(data.test, desc=title)]
