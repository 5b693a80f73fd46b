"""All settings of the wrapper in one place, and the presets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ..common.inputs import check_number, check_weight
from ..common.outputs import as_path
from ..common.state import plain
from ..errors import ReSegError, did_you_mean
from ..taps.tap import check_strides
from .losses import CrossAlignmentLoss, ReconLoss


@dataclass(frozen=True)
class Settings:
    """The settings that `ReSegWrapper` takes as keywords. The defaults here are the preset `paper`.

    Attributes:
        weight: factor of the alignment loss in the total loss (lambda of eq. 8).
        encoder_to_decoder: weight of teacher encoder against student decoder (eq. 4).
        decoder_to_encoder: weight of teacher decoder against student encoder (eq. 5).
        bottleneck: weight of the bottleneck term (eq. 6).
        divisor: the sum of all terms is divided by this (eq. 7).
        normalize: "batch" standardizes every feature channel over batch and space before the comparison.
        seed: of the fixed maps between features with different numbers of channels.
        alpha: weight of the mean squared error in stage 1 (eq. 3).
        beta: weight of the L1 error in stage 1 (eq. 3).
        label_input: "index" feeds the class index as one channel, "onehot" one channel per class.
        ignore_index: label value that does not count.
        output: path to the segmentation in what the model returns: an index, a key, or a tuple of them. None takes the
            first float tensor of the image's size. Stage 1 raises if that tensor does not depend on every tap.
        teacher_init: "random" draws new weights for the copy, "copy" keeps the model's.
        levels: strides of the levels to align; None is the default choice of `TapPlan.select`.
        encoder: "skip" aligns what the skip connections carry, "block" the last block of each encoder level.
        every: align only at every k-th call, with k times the weight; the calls in between cost nothing.
        teacher_dtype: torch.bfloat16 or torch.float16 runs the teacher in autocast to it; None: like the student.
        compile_teacher: run the teacher through torch.compile.
        capture_teacher: on CUDA, replay its forward as a CUDA graph, one for each of at most four batch sizes. Call
            backward before the next alignment_loss, because its features use the same memory.
    """

    weight: float = 0.035
    encoder_to_decoder: float = 1.0
    decoder_to_encoder: float = 1.0
    bottleneck: float = 1.0
    divisor: float = 3.0
    normalize: Literal["batch"] | None = None
    seed: int = 0
    alpha: float = 0.6
    beta: float = 0.4
    label_input: Literal["index", "onehot"] = "index"
    ignore_index: int | None = None
    output: int | str | Sequence[int | str] | None = None
    teacher_init: Literal["random", "copy"] = "random"
    levels: Sequence[int | Sequence[int]] | None = None
    encoder: Literal["skip", "block"] = "skip"
    every: int = 1
    teacher_dtype: torch.dtype | str | None = None
    compile_teacher: bool = False
    capture_teacher: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ReSegError(f"{name}={getattr(self, name)!r}; it must be one of {', '.join(map(repr, allowed))}")
        check_weight("weight", self.weight)
        check_number("every", self.every, least=1, whole=True)
        if self.ignore_index is not None:
            check_number("ignore_index", self.ignore_index, whole=True)
        if self.levels is not None:
            check_strides(self.levels)
        # these refuse what they cannot take
        as_path(self.output)
        ReconLoss(self.alpha, self.beta)
        criterion_of(self)

    @property
    def lower(self) -> torch.dtype | None:
        """`teacher_dtype` as a dtype."""
        return _DTYPES[self.teacher_dtype]

    @property
    def output_path(self) -> tuple[int | str, ...] | None:
        """`output` as a path."""
        return as_path(self.output)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return plain(asdict(self))


# what stage 1 depends on: a stage 1 can only go on under the same
STAGE_1 = ("alpha", "beta", "label_input", "ignore_index", "output", "teacher_init", "levels", "encoder")

# what may change in a wrapper that is built: nothing in it depends on them
AT_RUN_TIME = ("weight", "every", "teacher_dtype", "compile_teacher", "capture_teacher")

# dtypes by name, too, as checkpoints have them
_DTYPES: dict[torch.dtype | str | None, torch.dtype | None] = {
    None: None,
    **{key: dtype for dtype in (torch.bfloat16, torch.float16) for key in (dtype, str(dtype).removeprefix("torch."))},
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "label_input": ("index", "onehot"),
    "teacher_init": ("random", "copy"),
    "encoder": ("skip", "block"),
    "teacher_dtype": tuple(_DTYPES),
    "compile_teacher": (False, True),
    "capture_teacher": (False, True),
}


def criterion_of(settings: Settings) -> CrossAlignmentLoss:
    """L_align with these settings."""
    names = ("encoder_to_decoder", "decoder_to_encoder", "bottleneck", "divisor", "normalize", "seed")
    return CrossAlignmentLoss(**{name: getattr(settings, name) for name in names})


# paper: Li et al., MICCAI 2025, eqs. 1-8, the default. standardized: the same on standardized features.
PRESETS: dict[str, Settings] = {"paper": Settings(), "standardized": Settings(normalize="batch")}


def settings_of(preset: str, **given: Any) -> Settings:
    """A preset, with its values replaced by those that are given and not None.

    Raises:
        ReSegError: the preset is unknown, or a value is invalid.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ReSegError(f"unknown preset {preset!r}.{did_you_mean(str(preset), PRESETS)} Known: {', '.join(PRESETS)}")
    return replace(PRESETS[preset], **{name: value for name, value in given.items() if value is not None})
