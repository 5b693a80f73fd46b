"""The authors' released code as a regularizer, for comparison with the paper's text and with this library.

It is no part of the package because it breaks a rule of ours: its teacher stays in train mode while it teaches, so it
uses batch statistics and its running statistics drift. What else differs from the paper:

- the bottleneck term compares the output of the first decoder block (stride 8); the levels are strides 2, 4, 8
- the label enters as class index, repeated to the model's input channels
- the teacher's output channels are the classes, each compared with the one image channel
- the task loss is 0.5 cross entropy + 0.5 Dice (all classes, squared denominator, sums over the batch)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reseg_loss import CrossAlignmentLoss, FeatureExtractor
from reseg_loss.alignment.teacher import redraw

WEIGHT = 0.035
STRIDES = (2, 4, 8)


class ReleasedCode:
    """Stage 1 and 2 as released, around a model whose forward returns logits (B, classes, H, W)."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        found = FeatureExtractor(model, example_input=example_input, levels=STRIDES)
        self.taps = {
            "encoder": [level.encoder for level in found.plan.selected],
            "decoder": [level.decoder for level in found.plan.selected],
            "bottleneck": found.plan.selected[-1].decoder,
        }
        self.in_channels = example_input.shape[1]
        self.teacher = copy.deepcopy(model)
        redraw(self.teacher)
        self.loss = CrossAlignmentLoss()
        self.student_features = FeatureExtractor(model, example_input, taps=self.taps).attach()
        self.teacher_features = FeatureExtractor(self.teacher, example_input, taps=self.taps, when="always").attach()

    def encode(self, label: Tensor) -> Tensor:
        """(B, H, W) class indices as (B, input channels, H, W) floats."""
        return label.unsqueeze(1).float().repeat(1, self.in_channels, 1, 1)

    def recon_loss(self, image: Tensor, label: Tensor) -> Tensor:
        """Stage 1: 0.6 MSE + 0.4 L1 of every output channel with the first image channel."""
        output = self.teacher(self.encode(label))
        self.teacher_features.forget()
        target = image[:, :1].expand_as(output)
        return 0.6 * F.mse_loss(output, target) + 0.4 * F.l1_loss(output, target)

    def fit_recon(self, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> list[float]:
        """Stage 1 on (image, label) batches, with an optimizer of the teacher's parameters."""
        self.teacher.train()
        history = []
        for image, label in batches:
            loss = self.recon_loss(image, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        self.teacher.requires_grad_(False)
        return history

    def alignment_loss(self, label: Tensor) -> Tensor:
        """Stage 2: 0.035 times the seven terms over 3, the teacher in train mode."""
        self.teacher.train()
        student = self.student_features.pop()
        with torch.no_grad():
            self.teacher(self.encode(label))
        return WEIGHT * self.loss(student, self.teacher_features.pop())

    def remove(self) -> None:
        """Take the hooks off."""
        self.student_features.remove()
        self.teacher_features.remove()


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    """0.5 cross entropy + 0.5 Dice over all classes, with squared denominator, smooth 1e-5, sums over the batch."""
    one_hot = F.one_hot(label.long(), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    p = logits.softmax(1)
    axes = (0, 2, 3)
    dice = (2 * (p * one_hot).sum(axes) + 1e-5) / (p.square().sum(axes) + one_hot.square().sum(axes) + 1e-5)
    return 0.5 * F.cross_entropy(logits, label.long()) + 0.5 * (1 - dice).mean()
