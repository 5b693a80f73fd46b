"""The hooks by which a forward of a model leaves its features behind, and what they write to."""

# ruff: noqa: D102 - what a hook does when it is called, its class says

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ReSegError, TapError
from .taps import Tap
from .taps.dryrun import image_of


class Recording:
    """What the hooks of one extractor share. It holds no module, so the hooks make no reference cycle."""

    def __init__(self, training_only: bool) -> None:
        self.training_only = training_only
        self.enabled = True
        self.clone: frozenset[str] = frozenset()  # taps that are overwritten later
        self.wanted = 0  # the number of taps after which a forward is ended; 0: it goes on
        self.held = False  # a forward of `record()` waits to be read: others are ignored
        self.open: dict[str, Any] | None = None  # the forward that is running
        self.done: dict[str, Any] | None = None  # the forward that waits to be read
        self.several = False

    def forget(self) -> None:
        """Drop every forward, whether running or waiting."""
        self.open = self.done = None
        self.several = self.held = False

    def finish(self) -> None:
        """The running forward has ended: it waits, unless another does already."""
        finished, self.open = self.open, None
        if self.several or self.done is not None:
            self.done, self.several = None, True  # keep no features that nobody may read
        else:
            self.done = finished


class AllSeen(Exception):  # noqa: N818
    """Ends a forward of which every tap was recorded."""


class Recorder:
    """A hook of an extractor; inert in a copied or pickled model, so that no copy writes into the original's."""

    def __init__(self, recording: Recording | None = None) -> None:
        self.recording = recording

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return type(self)()

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return type(self), ()


class RootEnter(Recorder):
    """Before the model: opens a forward, if it is one to record."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording = self.recording
        if recording is None:
            return
        if getattr(module, "_is_replica", False):
            raise ReSegError("nn.DataParallel runs replicas whose features are lost; use DistributedDataParallel")
        recording.open = None
        # torch.compiler.is_exporting() itself is True in every compiled graph of torch 2.11
        if not recording.enabled or recording.held or getattr(torch.compiler, "_is_exporting_flag", False):
            return
        if recording.training_only:
            if not (module.training and torch.is_grad_enabled()):
                return
            # a checkpointed root runs again inside backward (never the case in a compiled graph)
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                return
        image = args[0] if args else None
        if not (isinstance(image, Tensor) and image.ndim in (4, 5) and image.is_floating_point()):
            image = image_of((args, kwargs))  # a search, which older compilers cannot trace
        recording.open = {
            "image": image,
            "autocast": None,
            "grad": torch.is_grad_enabled(),
            "calls": {},
            "seen": {},
        }


class RootExit(Recorder):
    """After the model: finishes the forward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording is not None and self.recording.open is not None:
            self.recording.finish()


class RootFailed(Recorder):
    """Always called, after `RootExit`: a forward that is still open then has raised.

    A hook that looked at its output to tell would make torch.compile guard on it.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording is not None and self.recording.open is not None:
            self.recording.forget()


class _TapHook(Recorder):
    """Records the outputs (or inputs) of one module under the taps' names."""

    def __init__(self, recording: Recording | None = None, taps: tuple[Tap, ...] = ()) -> None:
        super().__init__(recording)
        # plain values only: this runs in every training step, traced by torch.compile or not
        self.slots = [(str(tap), (tap.keys or (0,)) if tap.is_input else tap.keys, tap.call) for tap in taps]
        self.source = f"in:{taps[0].module}" if taps and taps[0].is_input else taps[0].module if taps else ""

    def record(self, value: Any) -> None:
        recording = self.recording
        if recording is None or recording.open is None:
            return
        call = recording.open["calls"].get(self.source, 0)
        recording.open["calls"][self.source] = call + 1
        for name, keys, wanted in self.slots:
            if wanted == call:
                tensor = _element(value, keys, name)
                if recording.open["autocast"] is None:  # here, for a forward may enter it itself (Accelerate's do)
                    device = tensor.device.type
                    recording.open["autocast"] = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                kept = tensor.clone() if name in recording.clone else tensor
                # a compiled graph's output has no history: whether it was overwritten there is not known
                version = None if torch.compiler.is_compiling() else tensor._version
                recording.open["seen"][name] = (kept, tensor, version, torch.is_grad_enabled())
        # in a compiled graph what comes after the last tap is dead code, which the compiler removes
        if recording.wanted and len(recording.open["seen"]) == recording.wanted and not torch.compiler.is_compiling():
            recording.finish()
            raise AllSeen


class OutputHook(_TapHook):
    """After a module: records what it returned."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record(output)


class InputHook(_TapHook):
    """Before a module: records what it takes in."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # so that in:module is the first argument, in:module[1] the second, in:module[name] a named one
        self.record({**dict(enumerate(args)), **kwargs})


def drop_recorders(module: nn.Module) -> None:
    """Take the hooks of extractors off a copied module, where they are inert."""
    for part in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            for key in [key for key, hook in getattr(part, name).items() if isinstance(hook, Recorder)]:
                for kind in (name, f"{name}_with_kwargs", f"{name}_always_called"):
                    getattr(part, kind, {}).pop(key, None)


def _element(value: Any, keys: tuple[int | str, ...], name: str) -> Tensor:
    for key in keys:
        try:
            value = getattr(value, key) if isinstance(key, str) and not isinstance(value, Mapping) else value[key]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise TapError(f"{name}: there is no [{key}] in {_outline(value)}") from error
    if not isinstance(value, Tensor):
        raise TapError(f"{name} is no tensor but {_outline(value)}; name the element, as in {name}[0]")
    return value


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}: " + ", ".join(type(v).__name__ for v in value)
    return f"a {type(value).__name__}"
