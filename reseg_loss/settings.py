"""Every choice of the wrapper in one place, and the presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .errors import ReSegError, did_you_mean

Weight = float | Sequence[float]


@dataclass(frozen=True)
class Settings:
    """What `ReSegWrapper` takes as keywords; the values here are the preset `paper`.

    Attributes:
        weight: factor of the alignment loss in the total loss (lambda of eq. 8).
        encoder_to_decoder: weight of teacher encoder against student decoder (eq. 4); one, or one per level.
        decoder_to_encoder: weight of teacher decoder against student encoder (eq. 5); one, or one per level.
        bottleneck: weight of the bottleneck term (eq. 6).
        divisor: of the sum of all terms (eq. 7).
        normalize: "batch" standardizes every feature channel over batch and space before the comparison.
        projection: "linear" trains a 1x1 map of the student's features for every term.
        seed: of the fixed maps between unequal channels, and of the trainable ones' start.
        alpha: weight of the mean squared error in stage 1 (eq. 3).
        beta: weight of the L1 error in stage 1 (eq. 3).
        label_input: "index" feeds the class index as one channel, "onehot" one channel per class.
        ignore_index: label value that does not count.
        output: path to the segmentation in what the model returns, as an index, a key or a tuple of them.
        teacher_init: "random" draws the copy's weights anew, "copy" keeps the model's.
        levels: strides of the levels to align; None is the default choice of `TapPlan.select`.
        encoder: "skip" aligns what the skip connections carry, "stage" the last block of each encoder level.
    """

    weight: float = 0.035
    encoder_to_decoder: Weight = 1.0
    decoder_to_encoder: Weight = 1.0
    bottleneck: float = 1.0
    divisor: float = 3.0
    normalize: Literal["batch"] | None = None
    projection: Literal["linear"] | None = None
    seed: int = 0
    alpha: float = 0.6
    beta: float = 0.4
    label_input: Literal["index", "onehot"] = "index"
    ignore_index: int | None = None
    output: int | str | Sequence[int | str] | None = None
    teacher_init: Literal["random", "copy"] = "random"
    levels: Sequence[int | Sequence[int]] | None = None
    encoder: Literal["skip", "stage"] = "skip"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ReSegError(f"{name}={getattr(self, name)!r}; it is one of {', '.join(map(repr, allowed))}")

    @property
    def output_path(self) -> tuple[int | str, ...] | None:
        """`output` as a path."""
        if self.output is None or isinstance(self.output, (int, str)):
            return None if self.output is None else (self.output,)
        return tuple(self.output)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def override(self, values: Mapping[str, Any]) -> Settings:
        """The same with other values.

        Raises:
            ReSegError: an unknown name, with close matches, or an unknown choice.
        """
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                raise ReSegError(f"unknown setting {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")
        return replace(self, **values)


# what stage 1 depends on: a stage 1 can only go on under the same
STAGE_1 = ("alpha", "beta", "label_input", "ignore_index", "output", "teacher_init", "levels", "encoder")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "normalize": (None, "batch"),
    "projection": (None, "linear"),
    "label_input": ("index", "onehot"),
    "teacher_init": ("random", "copy"),
    "encoder": ("skip", "stage"),
}

# paper: Li et al., MICCAI 2025, eqs. 1-8. standardized: the same on standardized features; on ACDC with few patients
# it gained where the raw features did not (README, "What helps").
PRESETS: dict[str, Settings] = {"paper": Settings(), "standardized": Settings(normalize="batch")}


def settings_of(preset: str, overrides: Mapping[str, Any]) -> Settings:
    """A preset with overrides.

    Raises:
        ReSegError: an unknown preset or setting.
    """
    if preset not in PRESETS:
        raise ReSegError(f"unknown preset {preset!r}.{did_you_mean(preset, PRESETS)} Known: {', '.join(PRESETS)}")
    return PRESETS[preset].override(overrides)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
