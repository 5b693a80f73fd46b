"""A forward of a model that leaves no trace, neither on the model nor on the process."""

from __future__ import annotations

import random
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ReSegError, outline


def rng_state() -> dict[str, Any]:
    """The random states of torch, CUDA, random and (where loaded) numpy, as tensors and plain values."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state(legacy=False) if numpy else None  # a dict, of any generator
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "random": random.getstate(),
        "numpy": tree_map(lambda value: value.tolist() if hasattr(value, "tolist") else value, state),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"])
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value, device)
    version, internal, gauss = state["random"]
    random.setstate((version, tuple(internal), gauss))
    numpy = sys.modules.get("numpy")
    if state["numpy"] and numpy:
        numpy.random.set_state(state["numpy"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the random states of torch (every CUDA device), random and, where loaded, numpy."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng(state)


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own train flag (a deliberately frozen submodule stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Restore what a forward can change on a model: parameter and buffer values, and attributes.

    Attributes are restored, and so is the content of those that are dicts, lists or sets, one level deep. This covers
    registered buffers, hooks, counters and caches, but nothing deeper.
    """
    values = [(t, t.detach(), t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    versions = [version_of(alias) for _, alias, _ in values]
    attributes = [(module.__dict__, module.__dict__.copy()) for module in model.modules()]
    containers = [
        (value, value.copy()) for _, old in attributes for value in old.values() if isinstance(value, (dict, list, set))
    ]
    try:
        yield
    finally:
        for current, old in (*attributes, *containers):
            if isinstance(current, list):
                current[:] = old
            else:
                current.clear()
                current.update(old)
        with torch.no_grad():
            for (tensor, alias, value), version in zip(values, versions):
                if tensor.data_ptr() != alias.data_ptr():  # `tensor.data = ...`
                    tensor.data = alias
                # Writing raises the version, which would break a backward pass that is still to come: only if needed.
                if version_of(alias) != version or (not tensor.requires_grad and not torch.equal(alias, value)):
                    alias.copy_(value)


def version_of(tensor: Tensor) -> int:
    """A number that rises when something writes into a tensor; always -1 for one made in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def preserved_globals(devices: Collection[str]) -> Iterator[None]:
    """Restore autocast, the default dtype and torch's switches of determinism and cudnn."""
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    undo = [
        partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()),
        partial(torch.set_default_dtype, torch.get_default_dtype()),
        partial(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only),
        *(partial(setattr, cudnn, name, getattr(cudnn, name)) for name in ("enabled", "benchmark", "deterministic")),
        *(partial(torch.set_autocast_enabled, kind, torch.is_autocast_enabled(kind)) for kind in devices),
        *(partial(torch.set_autocast_dtype, kind, torch.get_autocast_dtype(kind)) for kind in devices),
    ]
    try:
        yield
    finally:
        for each in undo:
            each()


def check_module(model: Any) -> None:
    """Raise a ReSegError unless it is a module that takes hooks."""
    if not isinstance(model, nn.Module):
        raise ReSegError(f"expected an nn.Module, got {outline(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ReSegError("a scripted module takes no hooks; pass the Python module that it was made from")


def refuse_lazy(model: nn.Module) -> None:
    """Raise a ReSegError if the model has lazy parameters or buffers."""
    if any(nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ReSegError("the model has lazy parameters: run one forward of it first, so that they get their shapes")


@contextmanager
def dry_run(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, nothing compiled; afterwards the model and the process are as before.

    Raises:
        ReSegError: the model has lazy parameters, which a forward would initialize for good.
    """
    refuse_lazy(model)
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} | {"cpu"}
    devices = {kind for kind in devices if torch.amp.is_autocast_available(kind)}
    with (
        preserved_globals(devices),
        preserved_rng(),
        preserved_state(model),
        preserved_modes(model),
        torch.no_grad(),
        # compiled modules as they were written, so that their operators are seen; no import of the compiler
        torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext(),
    ):
        # A weight cast while gradients are off must not be found in the cache by a later forward that needs them.
        torch.set_autocast_cache_enabled(False)
        for module in model.modules():
            module.training = False  # not eval(): models that override it fuse or switch parts
        _RUNNING.append(model)
        try:
            yield
        finally:
            _RUNNING.pop()
            fsdp = sys.modules.get("torch.distributed.fsdp")
            for module in model.modules():
                # FSDP2's root keeps whole parameters after a forward, and counts on them
                if fsdp is not None and isinstance(module, fsdp.FSDPModule):
                    fsdp.FSDPModule.reshard(module)


_RUNNING: list[nn.Module] = []


def is_dry() -> bool:
    """Whether a `dry_run` is going on; hooks that record training must ignore it."""
    return bool(_RUNNING)


def private_copy(example_input: Any) -> Any:
    """A copy of `example_input`, so that a model that writes into its input leaves no trace on it."""
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, example_input)


def tracked_copy(example_input: Any) -> Any:
    """A `private_copy` with autograd history, so that outputs tell what made them, even if the model is frozen."""

    def track(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.requires_grad_().clone()  # no leaf, for a model may write into it

    return tree_map(track, private_copy(example_input))


def call(model: nn.Module, example_input: Any) -> Any:
    """`model` on an example input: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ReSegError: the example is empty, or the model fails on it.
    """
    image = image_of(example_input)
    if image.shape[0] == 0:
        raise ReSegError(f"the example is empty: its image has shape {tuple(image.shape)}")
    try:
        if isinstance(example_input, Mapping):
            return model(**example_input)
        return model(*example_input) if isinstance(example_input, (tuple, list)) else model(example_input)
    except (torch.OutOfMemoryError, ReSegError):
        raise
    except Exception as error:
        like = next((p for p in model.parameters() if p.is_floating_point()), image)
        remedy = "pass what its forward takes in training"
        if (image.dtype, image.device) != (like.dtype, like.device):
            remedy = (
                f"its parameters are {like.dtype} on {like.device}: pass images as in training, "
                f"image.to({like.device.type!r}, {like.dtype})"
            )
        raise ReSegError(
            f"the model fails on the example, whose image is {outline(image)}; {remedy} "
            f"({type(error).__name__}: {error})"
        ) from error


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
