"""One forward of a model that leaves no trace on it, nor on the process."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReSegError


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random states of torch (every CUDA device), random and, where loaded, numpy."""
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own train flag (a deliberately frozen submodule stays so)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def dry_run(model: nn.Module) -> Iterator[None]:
    """Evaluation, no gradients; afterwards buffers, train flags, random states and autocast are as before."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} | {"cpu"}
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in devices}
    try:
        with preserved_rng(), preserved_modes(model), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)
        for kind, (enabled, dtype) in autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


def call(model: nn.Module, example_input: Any) -> Any:
    """`model` on an example input: a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, (tuple, list)) else model(example_input)


def tensors(x: Any, keys: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """Every tensor in nested tuples, lists, dicts and dataclasses, each with its path."""
    if isinstance(x, Tensor):
        yield keys, x
    elif isinstance(x, Mapping):
        for key, value in x.items():
            yield from tensors(value, (*keys, key))
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from tensors(value, (*keys, i))
    elif hasattr(x, "__dataclass_fields__") and not isinstance(x, type):
        for name in x.__dataclass_fields__:
            yield from tensors(getattr(x, name), (*keys, name))


def image_of(inputs: Any) -> Tensor:
    """The image among a forward's arguments: the first float tensor of shape (B, C, H, W) or (B, C, D, H, W).

    Raises:
        ReSegError: there is none.
    """
    for _, tensor in tensors(inputs):
        if tensor.is_floating_point() and tensor.ndim in (4, 5):
            return tensor
    shapes = ", ".join(str(tuple(t.shape)) for _, t in tensors(inputs)) or "no tensor at all"
    raise ReSegError(f"no float image (B, C, H, W) or (B, C, D, H, W) among the model's inputs; got {shapes}")
