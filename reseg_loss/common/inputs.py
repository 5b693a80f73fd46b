"""Cheap checks of what a step passes to a loss, so that the error message names the bad input itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import ReSegError, outline
from .dryrun import version_of

OF_IMAGES = (
    "images of this step hold NaN or infinite values: check the data set and its transforms (is a constant image "
    "divided by its standard deviation?)"
)
OF_MODEL = (
    "the model returns NaN or infinite values for finite images: its weights are not finite, or it overflows "
    "(the largest float16 value is 65,504; bfloat16 reaches much further)"
)


def readable(device: torch.device, first: bool = False) -> bool:
    """Whether values may be read: always on the CPU, elsewhere only in the first call, because it waits for the device.

    Never in a compiled or captured graph, which reading would break.
    """
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    return first or device.type == "cpu"


def refuse_not_finite(
    value: Tensor, made_of: Mapping[str, Iterable[Tensor]], otherwise: str | None = None, *, first: bool = False
) -> None:
    """Raise a ReSegError if a value may be read and is not finite; the message names the first cause.

    Args:
        value: of any size.
        made_of: {message if any of these tensors is not finite: the tensors}, in the order in which they were computed.
        otherwise: the message if all of them are finite; None raises nothing then.
        first: whether this is the first call.
    """
    if not readable(value.device, first) or _finite(value):
        return
    wrong = next((what for what, tensors in made_of.items() if not all(map(_finite, tensors))), otherwise)
    if wrong is not None:
        raise ReSegError(wrong)


def value_of(
    task_loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, label: Tensor, where: str, name: str = "task_loss"
) -> Tensor:
    """The value of the user's loss for logits and a label.

    Raises:
        ReSegError: it is not a function, fails, writes into the label, or does not return a scalar. `where` says what
            the logits belong to, `name` which argument the loss is.
    """
    if not callable(task_loss):
        raise ReSegError(f"{name} must be a function of logits and label, got {type(task_loss).__name__}")
    if torch.compiler.is_compiling():  # which a break of the graph within `try` would end
        return task_loss(logits, label)
    version = version_of(label)
    try:
        value = task_loss(logits, label)
    except (torch.OutOfMemoryError, ReSegError):
        raise
    except Exception as error:
        raise ReSegError(
            f"{name} failed on {where}: logits {_outline(logits)} and a label {_outline(label)} "
            f"({type(error).__name__}: {error})"
        ) from error
    if version_of(label) != version:
        raise ReSegError(
            f"{name} writes into its label (label[...] = 0, say), but the label is used again: let it work on a copy "
            "(label = label.clone())"
        )
    if not isinstance(value, Tensor) or value.ndim:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ReSegError(f"{name} returned {what}; it must return a scalar")
    return value


def _finite(x: Tensor) -> bool:
    return bool(x.detach().isfinite().all())


def _outline(x: Any) -> str:
    return f"of shape {tuple(x.shape)}, {x.dtype}, on {x.device}"


def refuse_evaluation(model: nn.Module) -> None:
    """Raise a ReSegError if the model is in evaluation."""
    if not model.training:
        raise ReSegError(
            "the model is in evaluation mode, but this loss is for training steps: call model.train() before the "
            "forward; in code that training and validation share, add this loss only `if model.training:`"
        )


def check_weight(name: str, value: Any) -> float:
    """`value` as a float; a ReSegError unless it is a finite number >= 0."""
    return check_number(name, value, least=0)


def check_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> Any:
    """`value` as a float, or as an int if `whole`; a ReSegError unless it is a finite number in range (NumPy's too)."""
    kind: Any = Integral if whole else Real
    number = isinstance(value, kind) and not isinstance(value, bool)
    if not number or not (least <= value <= most and above < value < below):  # so, since NaN is in no range
        ends = {">": above, ">=": least, "<=": most, "<": below}
        told = " and ".join(f"{sign} {end:g}" for sign, end in ends.items() if math.isfinite(end))
        raise ReSegError(f"{name}={value!r}; it must be a {'whole' if whole else 'finite'} number {told}".rstrip())
    return int(value) if whole else float(value)


def is_dense(x: Any) -> TypeGuard[Tensor]:
    """Whether `x` is a tensor with all its values in memory: neither sparse nor on the meta device."""
    return isinstance(x, Tensor) and x.layout == torch.strided and x.device.type != "meta"


def check_feature(name: str, x: Any) -> None:
    """Raise a ReSegError unless `x` is a dense floating point tensor (B, C, ...) that has values."""
    if not is_dense(x) or not x.is_floating_point() or x.ndim < 2:
        raise ReSegError(f"{name} is {outline(x)}; it must be a dense floating point tensor (B, C, ...)")


def check_scalar(name: str, value: Any) -> None:
    """Raise a ReSegError unless a value is a tensor without axes."""
    if not isinstance(value, Tensor) or value.ndim:
        raise ReSegError(f"{name} is {outline(value)}; it must be a scalar tensor")


def unpack_batch(batch: Any) -> tuple[Tensor, Any]:
    """(image, label) of a loader's batch: a pair, or a dict with "image"/"data" and "label"/"target".

    Raises:
        ReSegError: the batch has neither form.
    """
    if isinstance(batch, Mapping):
        for image, label in (("image", "label"), ("data", "target")):
            if image in batch and label in batch:
                return batch[image], batch[label]
        raise ReSegError(f"a batch has the keys {list(batch)}; expected 'image' and 'label', or 'data' and 'target'")
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        return batch[0], batch[1]
    what = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (list, tuple)) else "")
    raise ReSegError(f"{what} is not a batch; the loader must yield (image, label) pairs, or dicts with these keys")
