"""Taking features out of a model while it trains: hooks that record, and the extractor that reads them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ReSegError, TapError
from .formats import to_channels_first
from .taps import Level, Tap, TapPlan, find_taps
from .taps.dryrun import image_of
from .taps.named import KINDS, module_of, pair_up, parse_taps, seen


class Features(NamedTuple):
    """Features of the selected levels, the finest first, each (B, C, *spatial) at the current input's size."""

    encoder: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]
    bottleneck: Tensor


@dataclass
class Recorded:
    """What one recorded forward leaves: its features, its image and the autocast state it ran in."""

    features: Features
    image: Tensor
    autocast: tuple[bool, torch.dtype]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile.

    Raises:
        ReSegError: not a module, or wrapped in something whose forward hooks cannot serve a loss.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise ReSegError(f"expected an nn.Module, got {type(model).__name__}")
        if isinstance(model, nn.DataParallel):
            raise ReSegError("nn.DataParallel runs replicas whose features are lost; use DistributedDataParallel")
        if isinstance(model, torch.jit.ScriptModule):
            raise ReSegError("a scripted module takes no hooks; pass the Python module it was made from")
        if type(model).__name__ == "FullyShardedDataParallel":
            raise ReSegError("FullyShardedDataParallel flattens the model; use fully_shard (FSDP2)")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


class _Recording:
    """What the hooks of one extractor share. It holds no module, so the hooks make no reference cycle."""

    def __init__(self, training_only: bool) -> None:
        self.training_only = training_only
        self.enabled = True
        self.clone: frozenset[str] | None = None  # taps that are overwritten later; None: not known yet, clone all
        self.wanted = 0  # the number of taps after which a forward is ended; 0: it goes on
        self.held = False  # a forward of `record()` waits to be read: others are ignored
        self.open: dict[str, Any] | None = None  # the forward that is running
        self.done: dict[str, Any] | None = None  # the forward that waits to be read
        self.several = False

    def forget(self) -> None:
        self.open = self.done = None
        self.several = self.held = False

    def finish(self) -> None:
        finished, self.open = self.open, None
        if self.several or self.done is not None:
            self.done, self.several = None, True  # keep no features that nobody may read
        else:
            self.done = finished


class _AllSeen(Exception):  # noqa: N818
    """Ends a forward of which every tap was recorded."""


class Recorder:
    """A hook of an extractor; inert in a copied or pickled model, so that no copy writes into the original's."""

    def __init__(self, recording: _Recording | None = None) -> None:
        self.recording = recording

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return type(self)()

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return type(self), ()


class _RootEnter(Recorder):
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


class _RootExit(Recorder):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording is not None and self.recording.open is not None:
            self.recording.finish()


class _RootFailed(Recorder):
    """Always called, after `_RootExit`: a forward that is still open then has raised.

    A hook that looked at its output to tell would make torch.compile guard on it.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.recording is not None and self.recording.open is not None:
            self.recording.forget()


class _TapHook(Recorder):
    """Records the outputs (or inputs) of one module under the taps' names."""

    def __init__(self, recording: _Recording | None = None, taps: tuple[Tap, ...] = ()) -> None:
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
                copy = recording.clone is None or name in recording.clone
                kept = tensor.clone() if copy else tensor
                # a compiled graph's output has no history: whether it was overwritten there is not known
                version = None if torch.compiler.is_compiling() else tensor._version
                recording.open["seen"][name] = (kept, tensor, version, torch.is_grad_enabled())
        # in a compiled graph what comes after the last tap is dead code, which the compiler removes
        if recording.wanted and len(recording.open["seen"]) == recording.wanted and not torch.compiler.is_compiling():
            recording.finish()
            raise _AllSeen


def drop_recorders(module: nn.Module) -> None:
    """Take the hooks of extractors off a copied module, where they are inert."""
    for part in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            for key in [key for key, hook in getattr(part, name).items() if isinstance(hook, Recorder)]:
                for kind in (name, f"{name}_with_kwargs", f"{name}_always_called"):
                    getattr(part, kind, {}).pop(key, None)


class _OutputHook(_TapHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record(output)


class _InputHook(_TapHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # so that in:module is the first argument, in:module[1] the second, in:module[name] a named one
        self.record({**dict(enumerate(args)), **kwargs})


class FeatureExtractor:
    """Forward hooks on a model's taps, as a context manager or as `attach()` and `remove()`.

    One training forward is recorded between the root's pre- and post-hook, when the root is in training with
    gradients on; `pop()` reads it. Outputs of the model, its parameters and state_dict keys stay as they are.

    Args:
        model: the model, or its DistributedDataParallel or torch.compile wrapper.
        taps: {"encoder": [...], "decoder": [...], "bottleneck": ...}, the finest level first, as `Tap` or its string
            form `[in:]module.path[key]...[@call]`; or a `TapPlan`. What is not named is found, given an example.
        example_input: an image batch (B, C, *spatial), or a tuple or dict of the model's arguments, for one dry
            forward that finds the taps and their layouts. With all taps named it may be left out; layouts are then
            those of the first recorded forward.
        levels: strides of the levels to select; see `TapPlan.select`.
        encoder: "skip" taps what the skip connection carries, "stage" the last block of the level.
        when: "training" records as above; "always" records every forward (for a frozen teacher).

    Raises:
        TapError: a tap is unknown, or the model has no levels that can be paired.
        ReSegError: the model is wrapped in nn.DataParallel, or neither all taps nor an example are given.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Mapping[str, Any] | TapPlan | None = None,
        example_input: Any = None,
        *,
        levels: Any = None,
        encoder: Literal["skip", "stage"] = "skip",
        when: Literal["training", "always"] = "training",
    ) -> None:
        self._model = unwrap(model)
        self._recording = _Recording(when == "training")
        self._handles: list[Any] = []
        self._named: dict[str, list[Tap]] = {}
        self._select = levels
        self._plan: TapPlan | None = None
        if isinstance(taps, TapPlan):
            self._know(taps if levels is None else taps.select(levels))
        elif example_input is not None:
            self._know(find_taps(self._model, example_input, taps=taps, levels=levels, encoder=encoder))
        else:
            self._named = parse_taps(taps)
            unnamed = [kind for kind in KINDS if kind not in self._named]
            if unnamed:
                raise ReSegError(
                    f"no taps are named for {', '.join(unnamed)}: to find them pass example_input=, an image batch as "
                    'the model takes it; or name all: taps={"encoder": [...], "decoder": [...], "bottleneck": ...}'
                )
        self._modules = {tap: module_of(self._model, tap) for tap in self.taps}
        # hooks go when the extractor does, so a forgotten one neither records nor holds memory
        self._finalizer = weakref.finalize(self, _detach, self._recording, self._handles)

    @property
    def plan(self) -> TapPlan:
        """Levels and bottleneck.

        Raises:
            ReSegError: all taps were named without an example, and no forward was recorded yet.
        """
        if self._plan is None:
            raise ReSegError("layouts are not known before the first recorded forward; pass example_input= to know now")
        return self._plan

    @property
    def levels(self) -> tuple[Level, ...]:
        """Every level found, finest first; see `plan`."""
        return self.plan.levels

    @property
    def bottleneck(self) -> Tap:
        """The tap of the bottleneck; see `plan`."""
        return self.plan.bottleneck

    @property
    def enabled(self) -> bool:
        """Whether forwards are recorded at all; switching it off forgets what was."""
        return self._recording.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._recording.enabled = value
        if not value:
            self.forget()

    def attach(self) -> FeatureExtractor:
        """Set the hooks (before the first compiled call, if the model is compiled). Returns self."""
        if self._handles:
            raise ReSegError("the extractor is attached already")
        recording, model = self._recording, self._model
        groups: dict[tuple[nn.Module, bool, str], list[Tap]] = {}
        for tap, module in self._modules.items():
            groups.setdefault((module, tap.is_input, tap.module), []).append(tap)
        self._handles.append(model.register_forward_pre_hook(_RootEnter(recording), with_kwargs=True))
        for (module, is_input, _), taps in groups.items():
            if is_input:
                handle = module.register_forward_pre_hook(_InputHook(recording, tuple(taps)), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_OutputHook(recording, tuple(taps)))
            self._handles.append(handle)
        self._handles.append(model.register_forward_hook(_RootExit(recording)))
        self._handles.append(model.register_forward_hook(_RootFailed(recording), always_call=True))
        return self

    def remove(self) -> None:
        """Take the hooks off and forget what was recorded; the model is as it was. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.forget()

    def __enter__(self) -> FeatureExtractor:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @property
    def attached(self) -> bool:
        """Whether the hooks are set."""
        return bool(self._handles)

    @property
    def waiting(self) -> bool:
        """Whether a recorded forward was not read yet."""
        return self._recording.done is not None or self._recording.several

    def forget(self) -> None:
        """Drop recorded forwards that were not read."""
        self._recording.forget()

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record only the forward inside the block, for loops with several forwards a step.

        Unread forwards are forgotten on entering; forwards after the block are ignored until `pop()`.
        """
        self.forget()
        try:
            yield
        except BaseException:
            self.forget()
            raise
        self._recording.held = self.waiting

    def features_of(self, forward: Callable[[], Any]) -> Features:
        """The features of one forward, which is ended after its last tap; at other times nothing is recorded.

        Args:
            forward: calls the model once. Its result is not used.

        Raises:
            ReSegError, TapError: as `pop`.
        """
        self.enabled, self._recording.wanted = True, len({str(tap) for tap in self.taps})
        try:
            with suppress(_AllSeen):
                forward()
            return self.pop()
        finally:
            self.enabled, self._recording.wanted = False, 0

    def pop(self) -> Features:
        """The features of the one forward recorded since the last call.

        Raises:
            ReSegError: no forward, or several, were recorded.
            TapError: a tap did not fire, fired without gradients, or has another layout than before.
        """
        return self.take().features

    def take(self) -> Recorded:
        """As `pop`, with the image and the autocast state of the forward."""
        recording = self._recording
        forward, several = recording.done, recording.several
        recording.forget()
        if several:
            raise ReSegError(
                "several training forwards were recorded since the last call; mark the one that belongs to the label "
                "with `with reseg.record():`"
            )
        if forward is None:
            raise ReSegError(
                "no training forward was recorded since the last call. Call the model itself (not model.forward) once, "
                "in train(), with gradients on (checkpointing all of it needs use_reentrant=False) and at a weight "
                "other than 0. If it is "
                "compiled, its first call must come after the hooks are set: build this before, or call "
                "torch._dynamo.reset() now"
            )
        taps = self.taps
        missing = [str(tap) for tap in taps if str(tap) not in forward["seen"]]
        if missing:
            raise TapError(
                f"taps did not fire in this forward: {', '.join(missing)}. Their modules were not called (or not "
                "through __call__, or not as often as @call says), or were compiled and run before the hooks were set. "
                "If another model of this class was compiled before, without hooks, its code is used for this one, "
                "too: call torch._dynamo.reset() once the hooks are set"
            )
        without = [str(tap) for tap in taps if forward["grad"] and not forward["seen"][str(tap)][3]]
        if without:
            raise TapError(
                f"taps ran without gradients although they are on for the model: {', '.join(without)}. "
                "If that is activation checkpointing, pass use_reentrant=False; if it is no_grad around a frozen "
                "encoder, freeze it with requires_grad_(False) instead"
            )
        if self._plan is None:
            self._know(self._first_plan(forward))
        return Recorded(self._read(forward), forward["image"], forward["autocast"])

    def _know(self, plan: TapPlan) -> None:
        self._plan = plan
        self._recording.clone = frozenset(str(tap) for tap in self.taps if tap.mutated)

    def _first_plan(self, forward: dict[str, Any]) -> TapPlan:
        """The plan of named taps, from the first forward that showed their tensors."""
        batch, image = forward["image"].shape[0], forward["image"].shape[2:]
        found: dict[str, list[Tap]] = {}
        for kind, taps in self._named.items():
            entries = [(tap, *forward["seen"][str(tap)][1:3]) for tap in taps]
            found[kind] = [
                seen(tap, tensor.shape, batch, image, mutated=version is not None and tensor._version != version)
                for tap, tensor, version in entries
            ]
        plan = pair_up(found["encoder"], found["decoder"], found["bottleneck"][0])
        return plan if self._select is None else plan.select(self._select)

    def _read(self, forward: dict[str, Any]) -> Features:
        image = forward["image"].shape[2:]

        def feature(tap: Tap) -> Tensor:
            kept, tensor, version, _ = forward["seen"][str(tap)]
            if kept is tensor and version is not None and tensor._version != version:
                raise TapError(
                    f"{tap} was overwritten in place after it was recorded (by an in-place activation?), which it was "
                    "not in the example's forward; tap the module that overwrites it"
                )
            # MetaTensor and other subclasses would make every later operation slow
            plain = kept if type(kept) is Tensor else kept.as_subclass(Tensor)
            x = to_channels_first(plain, tap.layout, image, tap.stride)
            if x.shape[1] != tap.channels:
                raise TapError(f"{tap} has {x.shape[1]} channels, it had {tap.channels} when the taps were found")
            return x

        selected = self.plan.selected
        return Features(
            tuple(feature(level.encoder) for level in selected),
            tuple(feature(level.decoder) for level in selected),
            feature(self.plan.bottleneck),
        )

    @property
    def taps(self) -> list[Tap]:
        """Every tap once."""
        if self._plan is not None:
            selected = self._plan.selected
            taps = [level.encoder for level in selected] + [level.decoder for level in selected]
            return list(dict.fromkeys([*taps, self._plan.bottleneck]))
        return list(dict.fromkeys(tap for kind in KINDS for tap in self._named[kind]))

    def __getstate__(self) -> dict[str, Any]:
        # hooks do not travel with a copied module, nor do features: only leaves of the graph can be copied
        state = {name: value for name, value in self.__dict__.items() if name not in ("_finalizer", "_handles")}
        recording = _Recording(self._recording.training_only)
        recording.enabled, recording.clone = self._recording.enabled, self._recording.clone
        return {**state, "_recording": recording, "_attached": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        self.__dict__.update(state)
        self._handles = []
        self._finalizer = weakref.finalize(self, _detach, self._recording, self._handles)
        if attached:  # a copy of model and extractor together works like the two
            self.attach()

    def __repr__(self) -> str:
        title = f"{type(self._model).__name__} ({'attached' if self.attached else 'not attached'})"
        return self._plan.draw(title) if self._plan is not None else f"{title}: {', '.join(map(str, self.taps))}"


def _detach(recording: _Recording, handles: list[Any]) -> None:
    recording.enabled = False
    recording.forget()
    for handle in handles:
        handle.remove()


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
