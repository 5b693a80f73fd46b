"""Task losses that can ignore pixels: cross-entropy + Dice, for mutually exclusive or overlapping classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.inputs import check_number, check_weight, is_dense, readable
from .common.labels import FEW_OPERATORS, LabelEncoding, has_value, plain_label, unwrapped
from .errors import ReSegError, outline

SMOOTH = 1e-5  # of Dice, as published


class CrossEntropyDiceLoss(nn.Module):
    """0.5 cross-entropy + 0.5 Dice, for mutually exclusive classes.

    Both follow the code of TransUNet, and the package's measurements were made with it. Dice is a mean over all
    classes, background included, with squared denominators and a smoothing term of 1e-5. Its sums run over the batch
    and the pixels that count.

    The cross-entropy is a mean over *all* pixels, and ignored pixels contribute 0. So it is `F.cross_entropy(...,
    ignore_index=...)` times the share of pixels that count. A batch of pseudo-labels with few sure pixels therefore
    has little weight, as in FixMatch (Sohn et al., 2020). With a mean over the sure pixels alone, a handful of pixels
    would pull as hard as a whole labelled batch.

    Ignored pixels have a gradient of exactly 0. If no pixel counts, the loss is 0 with a gradient of 0.

    Args:
        ignore_index: the label value that does not count; it must not be a class.
        class_weights: one number >= 0 for each class, not all 0. Cross-entropy is then `F.cross_entropy(...,
            weight=class_weights, ignore_index=...)` times the share of pixels that count, and Dice is the weighted mean
            over classes. None gives all classes the same weight.

    Raises:
        ReSegError: `ignore_index` is not a whole number, or the weights are not such numbers.
    """

    def __init__(self, ignore_index: int = 255, class_weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self.ignore_index = check_number("ignore_index", ignore_index, whole=True)
        self.class_weights = None if class_weights is None else _checked(class_weights)
        self._weights: Tensor | None = None  # the same where the logits are, so that no step waits for a copy
        self._read = False  # whether a label's values have been looked at

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B, C, *spatial) with C >= 2, before any softmax, of any float dtype.
            label: (B, *spatial) or (B, 1, *spatial), 0 to C - 1 or `ignore_index`, of any dtype of real numbers.

        Returns:
            A scalar in at least fp32 (fp64 stays fp64). A label with other values raises if the values can be read. If
            reading would wait for the device or break a graph, the loss and its gradient are NaN instead: on devices
            other than the CPU after the first call, and in compiled and captured steps.

        Raises:
            ReSegError: `ignore_index` is a class, the number of weights is not C, shapes do not fit, or the label has
                values that are neither classes nor `ignore_index`.
        """
        logits, label = _inputs(logits, label)
        classes, spatial = logits.shape[1], logits.shape[2:]
        if classes < 2:
            raise ReSegError("logits have 1 channel, as of a binary model; use BinaryCrossEntropyDiceLoss")
        if 0 <= self.ignore_index < classes:
            raise ReSegError(
                f"ignore_index={self.ignore_index} is one of the {classes} classes of the logits; mark pixels to "
                "ignore by a value that is not a class"
            )
        if label.shape == (len(logits), *spatial):
            label = label.unsqueeze(1)
        elif label.shape != (len(logits), 1, *spatial):
            raise _misfit(logits, label, [(len(logits), *spatial), (len(logits), 1, *spatial)])

        axes, counts = _axes(logits), ~has_value(label, self.ignore_index)
        one_hot = label == torch.arange(classes, device=label.device).view(-1, *[1] * len(spatial))
        pixels, counted = one_hot.sum(axes), counts.sum()  # whole numbers: pixels of each class, and all that count
        right = pixels.sum() == counted
        self._read = _looked_at(right, logits, label, self.ignore_index, self._read)

        # masked first, so that ignored pixels get a gradient of exactly 0, whatever the logits are there
        log_p = logits.masked_fill(~counts, 0).log_softmax(1, dtype=_at_least_fp32(logits))
        p = log_p.exp()
        nll = -_sum(log_p, one_hot)
        dice = _dice(_sum(p, one_hot), _sum(p.square(), counts), pixels)
        if self.class_weights is None:
            return _checked_sum(nll.sum() / label.numel(), dice.mean(), right)
        weights = self._weights_for(logits, log_p.dtype)
        # the clamp only acts where nothing counts; then the numerator is 0
        mean = (weights * nll).sum() / (weights * pixels).sum().clamp_min(torch.finfo(log_p.dtype).tiny)
        return _checked_sum(mean * counted / label.numel(), (weights * dice).sum() / weights.sum(), right)

    def extra_repr(self) -> str:
        """The settings."""
        weights = "" if self.class_weights is None else f", class_weights={list(self.class_weights)}"
        return f"ignore_index={self.ignore_index}{weights}"

    def _weights_for(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.class_weights is not None
        if len(self.class_weights) != logits.shape[1]:
            raise ReSegError(
                f"class_weights has {len(self.class_weights)} numbers, the logits {logits.shape[1]} classes"
            )
        if self._weights is None or self._weights.device != logits.device or self._weights.dtype != dtype:
            self._weights = torch.tensor(self.class_weights, device=logits.device, dtype=dtype)
        return self._weights


class BinaryCrossEntropyDiceLoss(nn.Module):
    """0.5 binary cross-entropy + 0.5 Dice, per channel, for binary models and overlapping classes.

    Cross-entropy is a mean over *all* entries, and ignored entries contribute 0, as in `CrossEntropyDiceLoss`. Dice has
    squared denominators and a smoothing term of 1e-5. Its sums run over the batch and the entries of a channel that
    count, and it is a mean over channels.

    Ignored entries have a gradient of exactly 0. If no entry counts, the loss is 0 with a gradient of 0.

    Args:
        ignore_index: the label value that does not count, for each entry; neither 0 nor 1.

    Raises:
        ReSegError: `ignore_index` is not a whole number, or is 0 or 1.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = check_number("ignore_index", ignore_index, whole=True)
        if self.ignore_index in (0, 1):
            raise ReSegError(
                f"ignore_index={self.ignore_index} is a normal value of this label (0 or 1); mark entries to ignore by "
                "another value, for instance 255"
            )
        self._read = False  # whether a label's values have been looked at

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B, K, *spatial), before any sigmoid, of any float dtype.
            label: the same shape, or (B, *spatial) for K = 1; 0, 1 or `ignore_index`, of any dtype of real numbers.

        Returns:
            A scalar in at least fp32 (fp64 stays fp64); NaN in the cases in which `CrossEntropyDiceLoss` gives NaN.

        Raises:
            ReSegError: shapes do not fit, or the label has other values.
        """
        logits, label = _inputs(logits, label)
        if logits.shape[1] == 1 and label.shape == (len(logits), *logits.shape[2:]):
            label = label.unsqueeze(1)
        elif label.shape != logits.shape:
            binary = [(len(logits), *logits.shape[2:])] if logits.shape[1] == 1 else []
            raise _misfit(logits, label, [tuple(logits.shape), *binary])

        axes, counts, positive = _axes(logits), ~has_value(label, self.ignore_index), label == 1
        right = (~counts | positive | (label == 0)).all()
        self._read = _looked_at(right, logits, label, self.ignore_index, self._read)

        # masked first, as above
        x = logits.masked_fill(~counts, 0).to(_at_least_fp32(logits))
        p = x.sigmoid()
        nll = -_sum(F.logsigmoid(torch.where(positive, x, -x)), counts)
        dice = _dice(_sum(p, positive), _sum(p.square(), counts), positive.sum(axes))
        return _checked_sum(nll.sum() / label.numel(), dice.mean(), right)

    def extra_repr(self) -> str:
        """The settings."""
        return f"ignore_index={self.ignore_index}"


def _checked(class_weights: Sequence[float] | Tensor) -> tuple[float, ...]:
    values: Any = class_weights.tolist() if isinstance(class_weights, Tensor) else class_weights
    try:
        numbers = tuple(check_weight("class_weights", value) for value in values)
    except TypeError:
        raise ReSegError(f"class_weights={class_weights!r}; pass one number for each class") from None
    if not math.fsum(numbers) > 0:
        raise ReSegError(f"class_weights={list(numbers)}; at least one must be above 0")
    return numbers


def _inputs(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Both as plain tensors; a ReSegError if none of the losses could take them."""
    logits, label = unwrapped(logits) if isinstance(logits, Tensor) else logits, plain_label(label)
    if not is_dense(logits) or not logits.is_floating_point() or logits.ndim < 3:
        raise ReSegError(f"logits must be a dense floating point tensor (B, C, *spatial), got {outline(logits)}")
    if logits.device != label.device:
        raise ReSegError(f"logits are on {logits.device}, the label is on {label.device}; move it there")
    if logits.numel() == 0:
        raise ReSegError(f"the batch is empty: its logits have shape {tuple(logits.shape)}")
    return logits, label.long() if label.dtype in FEW_OPERATORS else label


def _misfit(logits: Tensor, label: Tensor, forms: Sequence[tuple[int, ...]]) -> ReSegError:
    told = " or ".join(map(str, forms))
    return ReSegError(
        f"label of shape {tuple(label.shape)} does not fit logits of shape {tuple(logits.shape)}; it must be {told}"
    )


def _looked_at(right: Tensor, logits: Tensor, label: Tensor, ignore_index: int, before: bool) -> bool:
    """Whether the label's values have been read by now; a ReSegError if they are, and are not `right`."""
    if not readable(label.device, first=not before):
        return before
    if not right:
        LabelEncoding("onehot", logits.shape[1], logits.ndim - 2, ignore_index).check_values(label)
    return True


def _axes(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _at_least_fp32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum(x: Tensor, where: Tensor) -> Tensor:
    """The sum per channel over the entries where `where` is True. It selects, because 0 times infinity is NaN."""
    return torch.where(where, x, 0).sum(_axes(x))


def _dice(overlap: Tensor, squares: Tensor, size: Tensor) -> Tensor:
    """1 - Dice per class, from sums; 0 for a class that is neither in the label nor predicted."""
    return 1 - (2 * overlap + SMOOTH) / (squares + size + SMOOTH)


def _checked_sum(cross_entropy: Tensor, dice: Tensor, right: Tensor) -> Tensor:
    """The loss; NaN in value and gradient unless the label is `right`."""
    return (0.5 * cross_entropy + 0.5 * dice) * torch.where(right, 1.0, math.nan)
