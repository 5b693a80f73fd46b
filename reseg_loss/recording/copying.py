"""The user's own module inside its wrappers, and copies of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.dryrun import check_module, tensors
from ..errors import ReSegError
from .hooks import NO_REPLICAS, drop_recorders


def copy_model(model: nn.Module, purpose: str, otherwise: str) -> nn.Module:
    """A copy that runs what the model runs, without its gradients and our hooks.

    `purpose` and `otherwise` (what else can be done) are for the messages.

    Raises:
        ReSegError: the model cannot be copied, or a copy would run another forward.
    """
    patched = [
        name or "the model"
        for name, module in model.named_modules()
        if "forward" in vars(module) and not hasattr(module, "_orig_mod")  # compiled modules copy well
    ]
    if patched:
        raise ReSegError(
            f"the forward of {', '.join(patched)} was replaced on the object (model.forward = ...), and a copy would "
            f"run the original's; use torch.compile(model) or model.compile(), patch afterwards, or {otherwise}"
        )
    # results of a past forward that modules hold (old weight_norm, deep supervision heads), which only a graph needs
    held = (t for module in model.modules() for value in vars(module).values() for _, t in tensors(value))
    detached = {id(tensor): tensor.detach().clone() for tensor in held if tensor.grad_fn is not None}
    try:
        copied = copy.deepcopy(model, detached)
    except Exception as error:
        raise ReSegError(
            f"{type(model).__name__} cannot be copied for {purpose}, for {_uncopyable(model)} cannot "
            f"({type(error).__name__}: {error}). If a forward in training left its results there, run one without "
            "gradients, `with torch.no_grad(): model(image)`, or build this before the first forward; otherwise "
            f"remove it, or {otherwise}"
        ) from error
    drop_recorders(copied)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _uncopyable(model: nn.Module) -> str:
    """The attributes of modules that cannot be copied."""
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
    """What compiles another function as a model or its wrapper is compiled; None where it is not.

    Of `model.compile(...)` torch does not tell the options, and takes its default ones.
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
        ReSegError: not a module, or wrapped in something whose forward hooks cannot serve a loss.
    """
    while True:
        check_module(model)
        if isinstance(model, nn.DataParallel):
            raise ReSegError(NO_REPLICAS)
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ReSegError("FullyShardedDataParallel flattens the model; use fully_shard (FSDP2)")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model
