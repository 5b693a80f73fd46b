"""The user's own module inside its wrappers, and copies of that module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from ..common.dryrun import check_module, tensors
from ..errors import ReSegError
from .hooks import NO_REPLICAS, drop_recorders


def copy_model(model: nn.Module, purpose: str, otherwise: str) -> nn.Module:
    """A copy that computes what the model computes, without its gradients and our hooks.

    `purpose` and `otherwise` (an alternative for the user) are for the messages.

    Raises:
        ReSegError: the model cannot be copied, or a copy would run another forward.
    """
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise ReSegError(
            f"{scripted[0]} is a scripted module, which cannot be copied; use the Python module that it was made from, "
            f"or {otherwise}"
        )
    patched = [
        name or "the model"
        for name, module in model.named_modules()
        if "forward" in vars(module) and not hasattr(module, "_orig_mod")  # compiled modules copy well
    ]
    if patched:
        raise ReSegError(
            f"the forward of {', '.join(patched)} was replaced on the object (model.forward = ...), and a copy would "
            f"call the original object's; use torch.compile(model) or model.compile(), patch afterwards, or {otherwise}"
        )
    # results of a past forward that modules hold (old weight_norm, deep supervision heads), which only a graph needs
    held = (t for module in model.modules() for value in vars(module).values() for _, t in tensors(value))
    detached = {id(tensor): tensor.detach().clone() for tensor in held if tensor.grad_fn is not None}
    try:
        copied = copy.deepcopy(model, detached)
    except Exception as error:
        raise ReSegError(
            f"{type(model).__name__} cannot be copied for {purpose}, because {_uncopyable(model)} cannot be copied "
            f"({type(error).__name__}: {error}). If a training forward left its results there, run one without "
            "gradients, `with torch.no_grad(): model(image)`, or build this before the first forward. Otherwise "
            f"remove it, or {otherwise}"
        ) from error
    drop_recorders(copied)
    _disconnect(model, copied)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


class _OfOriginal:
    """In the place of a function that a copy has kept from the original, and that would run the original's layers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ReSegError(
            f"the model has a function that runs its own layers as an attribute, {self._name!r} (a lambda, or "
            "torch.compile of a method), and in a copy of the model this function would still run the original's "
            "layers: write it as a method, and compile modules or the whole model"
        )


def _disconnect(model: nn.Module, copied: nn.Module) -> None:
    """Replace each function in a copy's attributes that refers to the original: copy.deepcopy keeps functions."""
    own = {*map(id, model.modules()), *map(id, model.parameters()), *map(id, model.buffers())}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and _refers(value, own, set()):
                vars(module)[name] = _OfOriginal(f"{path}.{name}".lstrip("."))


def _refers(value: Any, own: set[int], seen: set[int]) -> bool:
    """Whether a function holds one of these objects: in its closure, in its defaults, or bound to it."""
    if id(value) in own:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, FunctionType):
        inner = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty one
                inner.append(cell.cell_contents)
    elif isinstance(value, MethodType):
        inner = [value.__self__, value.__func__]
    elif isinstance(value, partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple)):
        inner = [*value]
    elif isinstance(value, dict):
        inner = [*value.values()]
    return any(_refers(each, own, seen) for each in inner)


def _uncopyable(model: nn.Module) -> str:
    """The names of the modules' attributes that cannot be copied."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name != "_modules":
                try:
                    copy.deepcopy(value)
                except Exception:
                    found.append(f"{path}.{name}".lstrip("."))
    return ", ".join(found) or "a part of it"


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model or a part of it."""
    return any(type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor" for p in model.parameters())


def compiler_of(model: Any) -> Callable[[Any], Any] | None:
    """A function that compiles others in the way that a model or its wrapper is compiled; None if it is not compiled.

    For `model.compile(...)` torch does not expose the options, so the default ones are used.
    """
    while isinstance(model, nn.Module):
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            return getattr(model, "dynamo_ctx", torch.compile)
        if model._compiled_call_impl is not None:
            return torch.compile
        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return None
        model = model.module
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile.

    Raises:
        ReSegError: this is not a module, or it is wrapped in something whose forward hooks cannot be used for a loss.
    """
    while True:
        check_module(model)
        if isinstance(model, nn.DataParallel):
            raise ReSegError(NO_REPLICAS)
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ReSegError(
                "FullyShardedDataParallel flattens the model's parameters and is not supported; use fully_shard (FSDP2)"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model
