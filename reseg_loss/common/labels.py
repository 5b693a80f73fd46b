"""From any form of label map to the teacher's input, and to a mask of the pixels that count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ReSegError, outline
from .inputs import is_dense

FEW_OPERATORS = (torch.uint16, torch.uint32, torch.uint64)  # torch compares and adds hardly anything in them


def unwrapped(value: Any) -> Any:
    """Element 0 of a list or tuple, and a tensor of a subclass (MetaTensor) as a plain one; else the value itself."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value.as_subclass(Tensor) if isinstance(value, Tensor) and type(value) is not Tensor else value


def plain_label(label: Any, what: str = "a label") -> Tensor:
    """The label as a plain tensor: element 0 of a list (deep supervision, full resolution), MetaTensor unwrapped.

    `what` names it in the message, because images are unwrapped in the same way.

    Raises:
        ReSegError: it is not a tensor, or one that is complex, sparse or on the meta device.
    """
    label = unwrapped(label)
    if not is_dense(label) or label.is_complex():
        raise ReSegError(
            f"{what} must be a dense tensor of real numbers, or a list whose element 0 is one, got {outline(label)}"
        )
    return label


def has_value(label: Tensor, value: int) -> Tensor:
    """Where a label has a value, bool; nowhere if its dtype cannot hold the value (torch would wrap or round it)."""
    if label.dtype in FEW_OPERATORS:
        label = label.long()
    if label.dtype is torch.bool:
        holds = value in (0, 1)
    elif label.is_floating_point():
        holds = float(torch.tensor(value, dtype=torch.float64).to(label.dtype)) == value
    else:
        holds = torch.iinfo(label.dtype).min <= value <= torch.iinfo(label.dtype).max
    return label == value if holds else torch.zeros_like(label, dtype=torch.bool)


@dataclass(frozen=True)
class LabelEncoding:
    """How label maps become the teacher's input.

    Attributes:
        mode: "index" feeds the class index as one float channel (the paper's), "onehot" one channel per class.
        num_classes: channels of the model's output; 1 is a binary model with labels 0 and 1.
        dims: number of spatial axes.
        ignore_index: label value that does not count; it enters the teacher as 0 (index) or all-zero (onehot).
    """

    mode: Literal["index", "onehot"]
    num_classes: int
    dims: int
    ignore_index: int | None = None

    @property
    def channels(self) -> int:
        """Channels of the encoded label."""
        return 1 if self.mode == "index" else self.num_classes

    def check_shape(self, label: Tensor, image_shape: torch.Size | tuple[int, ...]) -> None:
        """Raise a ReSegError unless `label` is (B, *spatial), (B, 1, *spatial) or (B, classes, *spatial)."""
        batch, spatial = image_shape[0], tuple(image_shape[2:])
        if batch == 0:
            raise ReSegError(f"the batch is empty: its images have shape {tuple(image_shape)}")
        forms = [(batch, *spatial), (batch, 1, *spatial), (batch, self.num_classes, *spatial)]
        if tuple(label.shape) not in forms:
            raise ReSegError(
                f"label of shape {tuple(label.shape)} does not fit an image of shape {tuple(image_shape)} and a model "
                f"with {self.num_classes} output channels; it must be " + " or ".join(map(str, dict.fromkeys(forms)))
            )

    def check_values(self, label: Tensor) -> None:
        """Raise a ReSegError for values that are not classes. It waits for the device, so it is not for every step."""
        numbers = torch.unique(label.detach()).double()
        if self.ignore_index is not None:
            numbers = numbers[numbers != self.ignore_index]
        per_class = self._per_class(label)
        if per_class and self.ignore_index in (0, 1):
            raise ReSegError(
                f"ignore_index={self.ignore_index} in one-hot or multi-label channels would ignore classes; mark "
                "ignored pixels by another value there, for instance 255"
            )
        classes = 2 if per_class or self.num_classes == 1 else self.num_classes
        wrong = numbers[(numbers != numbers.round()) | ~((numbers >= 0) & (numbers < classes))]
        if wrong.numel():
            kind = (
                "one-hot or multi-label channels" if per_class else f"a model with {self.num_classes} output channels"
            )
            raise ReSegError(
                f"label has values {[round(v, 4) for v in wrong[:5].tolist()]}, but for {kind} they must be whole "
                f"numbers from 0 to {classes - 1}; if a value marks pixels to ignore, pass it as ignore_index= "
                "(with SemiSupervised: to its task_loss)"
            )
        if self.mode == "index" and per_class:
            ignored = self._ignored(label)
            counts = label.masked_fill(ignored, 0).float().sum(1)
            if not bool(((counts == 1) | ignored.squeeze(1)).all()):
                raise ReSegError(
                    "label has several classes or none at some pixels; a multi-label model needs label_input='onehot'"
                )

    def encode(self, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's input (B, channels, *spatial) and the valid mask (B, 1, *spatial), both fp32.

        The mask is None without `ignore_index`. Nothing here reads values back from the device.
        """
        if label.dtype in FEW_OPERATORS:
            label = label.long()
        if self._per_class(label):
            classes = label.to(torch.float32, copy=True)
            encoded = classes if self.mode == "onehot" else classes.argmax(1, keepdim=True).float()
        else:
            index = label if label.ndim == self.dims + 2 else label.unsqueeze(1)
            if self.mode == "index" or self.num_classes == 1:
                encoded = index.to(torch.float32, copy=True)  # a model may write into its input
            else:
                classes = torch.arange(self.num_classes, device=label.device).view(-1, *[1] * self.dims)
                encoded = (index == classes).float()
        if self.ignore_index is None:
            return encoded, None
        valid = ~self._ignored(label)
        return torch.where(valid, encoded, 0.0), valid.float()

    def _per_class(self, label: Tensor) -> bool:
        return self.num_classes > 1 and label.ndim == self.dims + 2 and label.shape[1] == self.num_classes

    def _ignored(self, label: Tensor) -> Tensor:
        """(B, 1, *spatial), True where any channel says ignore."""
        if self.ignore_index is None:
            ignored = torch.zeros_like(label, dtype=torch.bool)
        else:
            ignored = has_value(label, self.ignore_index)
        return ignored.unsqueeze(1) if label.ndim == self.dims + 1 else ignored.any(1, keepdim=True)
