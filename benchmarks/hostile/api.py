"""The library's names that the trial uses, in one place."""

from __future__ import annotations

from typing import Any

from torch import nn

from reseg_loss import (
    PRESETS,
    CrossAlignmentLoss,
    CutMixConsistency,
    DeepSupervision,
    FeatureExtractor,
    Features,
    Level,
    ReconLoss,
    ReSegError,
    ReSegWrapper,
    SemiSupervised,
    Settings,
    Tap,
    TapError,
    TapPlan,
    Teacher,
    find_taps,
    functional,
)
from reseg_loss.task_losses import BinaryCrossEntropyDiceLoss, CrossEntropyDiceLoss

PACKAGE = "reseg_loss"

__all__ = [
    "PACKAGE", "PRESETS", "BinaryCrossEntropyDiceLoss", "CrossAlignmentLoss", "CrossEntropyDiceLoss",
    "CutMixConsistency", "DeepSupervision", "FeatureExtractor", "Features", "Level", "ReSegError", "ReSegWrapper",
    "ReconLoss", "SemiSupervised", "Settings", "Tap", "TapError", "TapPlan", "Teacher", "find_taps", "functional",
    "teacher_parts",
]  # fmt: skip


def teacher_parts(teacher: Teacher, like: type[nn.Module]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(what runs before the teacher's copy of a model, the copy, what runs after it)."""
    body: Any = next(module for module in teacher.modules() if type(module) is like)
    return teacher.before, body, teacher.after
