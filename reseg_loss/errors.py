"""What the library raises. One root class, a ValueError, so that users can catch all our errors at once."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class ReSegError(ValueError):
    """Something was used in a way that cannot work; the message says what is wrong and what to do."""

    __module__ = "reseg_loss"


class TapError(ReSegError):
    """A tap is unknown, did not fire, or the model's levels could not be found."""

    __module__ = "reseg_loss"


def outline(value: Any) -> str:
    """A value in short, for messages: shape, dtype and device of a tensor, keys or types in a container."""
    if isinstance(value, Tensor):
        dense = "" if value.layout == torch.strided else f"{value.layout}, "
        return f"a tensor of shape {tuple(value.shape)}, {dense}{value.dtype}, on {value.device}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: " + ", ".join(type(v).__name__ for v in value)
    return f"a {type(value).__name__}"


def did_you_mean(name: str, known: Iterable[str], n: int = 4) -> str:
    """A sentence with the names nearest to `name`; empty if nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""


def warn(message: str) -> None:
    """A UserWarning that points at the line of the caller's code that called into this package."""
    package, depth, frame = Path(__file__).parent, 1, inspect.currentframe()
    while frame is not None and package in Path(frame.f_code.co_filename).parents:
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=max(depth, 2))
