"""Reading features of a model while it trains: the extractor sets the hooks and reads what they recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ReSegError, TapError
from ..taps import Level, Tap, TapPlan, find_taps
from ..taps.layouts import to_channels_first
from ..taps.named import module_of
from .copying import unwrap
from .hooks import (
    AllSeen,
    Forward,
    InputHook,
    OutputHook,
    Place,
    Recording,
    RootEnter,
    RootExit,
    RootFailed,
    refuse_backward_hooks,
)


class Features(NamedTuple):
    """Features of the selected levels, finest first, each (B, C, *spatial) for the current input's size."""

    encoder: tuple[Tensor, ...]
    decoder: tuple[Tensor, ...]
    bottleneck: Tensor

    def all(self) -> list[Tensor]:
        """Encoder, decoder, bottleneck."""
        return [*self.encoder, *self.decoder, self.bottleneck]


@dataclass
class Recorded:
    """The content of one recorded forward: its features, its image and the autocast state that it ran in."""

    features: Features
    image: Tensor
    autocast: tuple[bool, torch.dtype]


class FeatureExtractor:
    """Forward hooks on a model's taps. Use it as a context manager, or with `attach()` and `remove()`.

    It records one forward of the model in training mode with gradients on; `pop()` reads its features. The model's
    outputs, parameters and state_dict keys stay as they are.

    Args:
        model: the model, or its DistributedDataParallel or torch.compile wrapper.
        example_input: an image batch (B, C, *spatial), or a tuple or dict of the model's arguments. One dry forward on
            it finds the taps and their layouts. Not needed with a `TapPlan`.
        taps: {"encoder": [...], "decoder": [...], "bottleneck": ...}, finest level first, each a `Tap` or its string
            form `[in:]module.path[key]...[@call]`; or a `TapPlan`. Kinds that are left out are found automatically.
        levels: strides of the levels to select; see `TapPlan.select`.
        encoder: "skip" taps what the skip connection carries, "block" the last block of the level.
        when: "training" records as above; "always" records every forward (for a frozen teacher).
        decoder_only: record only the decoder; the other features are then empty. In a compiled model each recorded
            feature costs a gradient, whether it is used or not.

    Raises:
        TapError: a tap is unknown, or the model has no levels that can be paired.
        ReSegError: the model is wrapped in nn.DataParallel, there is neither an example nor a plan, or `when` or
            `decoder_only` has another value.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        taps: Mapping[str, Any] | TapPlan | None = None,
        levels: Any = None,
        encoder: Literal["skip", "block"] = "skip",
        when: Literal["training", "always"] = "training",
        decoder_only: bool = False,
    ) -> None:
        if when not in ("training", "always") or not isinstance(decoder_only, bool):
            raise ReSegError(
                f"when={when!r} and decoder_only={decoder_only!r}; when must be 'training' or 'always', and "
                "decoder_only a bool"
            )
        self._model = unwrap(model)
        self._recording = Recording(when == "training")
        self._handles: list[Any] = []
        self._decoder_only = decoder_only
        if isinstance(taps, TapPlan):
            self._plan = taps if levels is None else taps.select(levels)
        elif example_input is not None:
            self._plan = find_taps(self._model, example_input, taps=taps, levels=levels, encoder=encoder)
        else:
            raise ReSegError(
                "the taps are not known: pass example_input=, an image batch as the model takes it, or taps= a TapPlan"
            )
        self._recording.clone = frozenset(str(tap) for tap in self.taps if tap.mutated)
        for tap in self.taps:
            module = module_of(self._model, tap)
            if not tap.is_input:
                refuse_backward_hooks(module, str(tap))
        # hooks go when the extractor does, so a forgotten one neither records nor holds memory
        self._finalizer = weakref.finalize(self, _detach, self._recording, self._handles)

    @property
    def plan(self) -> TapPlan:
        """Levels and bottleneck."""
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
        """Whether forwards are recorded at all. Switching it off drops what was recorded."""
        return self._recording.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._recording.enabled = value
        if not value:
            self.forget()

    def attach(self) -> FeatureExtractor:
        """Set the hooks. If the model is compiled, do this before its first call. Returns self."""
        if self._handles:
            raise ReSegError("the extractor is attached already")
        recording, model = self._recording, self._model
        groups: dict[tuple[nn.Module, bool, str], list[Tap]] = {}
        for tap in self.taps:
            groups.setdefault((module_of(model, tap), tap.is_input, tap.module), []).append(tap)
        named = list(model.named_modules(remove_duplicate=False))
        places: list[Place] = []
        self._handles.append(model.register_forward_pre_hook(RootEnter(recording), with_kwargs=True))
        for (module, is_input, _), taps in groups.items():
            if is_input:
                handle = module.register_forward_pre_hook(InputHook(recording, tuple(taps)), with_kwargs=True)
            else:
                handle = module.register_forward_hook(OutputHook(recording, tuple(taps)))
            self._handles.append(handle)
            kind = "_forward_pre_hooks" if is_input else "_forward_hooks"
            places += [Place(str(taps[0]), path, kind, handle.id) for path, other in named if other is module]
        recording.places = tuple(places)
        self._handles.append(model.register_forward_hook(RootExit(recording), with_kwargs=True))
        self._handles.append(model.register_forward_hook(RootFailed(recording), always_call=True))
        return self

    def remove(self) -> None:
        """Remove the hooks and drop what was recorded; the model is as it was. May be called twice."""
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
        """Whether a recorded forward has not been read yet."""
        return self._recording.done is not None or self._recording.several

    def forget(self) -> None:
        """Drop recorded forwards that were not read."""
        self._recording.forget()

    def recorded(self) -> dict[str, Any]:
        """What the taps of the forward that waits to be read left, by name; empty without one."""
        return {} if self._recording.done is None else self._recording.done["seen"]

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record only the forward inside the block, for loops with several forwards a step.

        Entering the block drops unread forwards. Forwards after the block are ignored until `pop()`.
        """
        self.forget()
        try:
            yield
        except BaseException:
            self.forget()
            raise
        self._recording.held = self.waiting

    def features_of(self, forward: Callable[[], Any]) -> Features:
        """The features of one forward, which is stopped after its last tap. At other times nothing is recorded.

        Args:
            forward: a function that calls the model once. Its result is not used.

        Raises:
            ReSegError, TapError: as in `pop`.
        """
        self.enabled, self._recording.wanted = True, len({str(tap) for tap in self.taps})
        try:
            with suppress(AllSeen):
                forward()
            return self.pop()
        finally:
            self.enabled, self._recording.wanted = False, 0

    def pop(self) -> Features:
        """The features of the one forward recorded since the last call.

        Raises:
            ReSegError: no forward was recorded, or several were.
            TapError: a tap did not fire, fired without gradients, has another layout than before, or its module was
                wrapped or replaced after the hooks were set.
        """
        return self.take().features

    def take(self) -> Recorded:
        """Like `pop`, with the image and the autocast state of the forward."""
        recording = self._recording
        forward, several = recording.done, recording.several
        recording.forget()
        if several:
            raise ReSegError(
                "several training forwards were recorded since the last call; run the one that belongs to the label "
                "inside `with reseg.record():` (for deep supervision, inside its own `record()`)"
            )
        if forward is None and not self.attached:
            raise ReSegError(
                "there are no hooks on the model: call attach() of this extractor (`.extractor`) before the forward. "
                "When a model is copied or unpickled together with its attributes, the copy gets no hooks automatically"
            )
        recording.check(self._model, settled=forward is None or forward["settled"])
        if forward is None:
            raise ReSegError(
                "no training forward was recorded since the last call. Call the model itself (not model.forward) once, "
                "in train() mode, with gradients on (if the whole model is checkpointed, pass use_reentrant=False) and "
                "at a weight other than 0. If it is compiled, its first call must come after the hooks are set: build "
                "this loss before that call, or call torch._dynamo.reset() now"
            )
        missing = [name for name in map(str, self.taps) if name not in forward["seen"]]
        if missing:
            raise TapError(
                f"taps did not fire in this forward: {', '.join(missing)}. Their modules were not called (or not "
                "through __call__, or not as often as @call says), or were compiled and run before the hooks were set. "
                "If another model of this class was compiled earlier without hooks, its code is reused for this one: "
                "call torch._dynamo.reset() after the hooks are set"
            )
        without = [name for name, (*_, grad) in forward["seen"].items() if forward["grad"] and not grad]
        if without:
            raise TapError(
                f"taps ran without gradients although they are on for the model: {', '.join(without)}. "
                "If the reason is activation checkpointing, pass use_reentrant=False. If it is no_grad around a frozen "
                "encoder, freeze the encoder with requires_grad_(False) instead"
            )
        assert forward["autocast"] is not None  # a tap has fired
        return Recorded(self._read(forward), forward["image"], forward["autocast"])

    def _read(self, forward: Forward) -> Features:
        image = forward["image"].shape[2:]

        def feature(tap: Tap) -> Tensor:
            kept, tensor, version, _ = forward["seen"][str(tap)]
            if kept is tensor and version is not None and tensor._version != version:
                raise TapError(
                    f"{tap} was overwritten in place after it was recorded (by an in-place activation or dropout?). "
                    "This did not happen in the forward of the example. Tap the module that overwrites it, or pass "
                    f"taps= with this one as Tap({tap.module!r}, ..., mutated=True), so that a clone is kept"
                )
            # MetaTensor and other subclasses would make every later operation slow
            plain = kept if type(kept) is Tensor else kept.as_subclass(Tensor)
            x = to_channels_first(plain, tap.layout, image, tap.stride)
            if x.shape[1] != tap.channels:
                raise TapError(f"{tap} has {x.shape[1]} channels, but had {tap.channels} when the taps were found")
            return x

        selected = self.plan.selected
        decoder = tuple(feature(level.decoder) for level in selected)
        if self._decoder_only:
            return Features((), decoder, decoder[0].new_empty(0))
        return Features(tuple(feature(level.encoder) for level in selected), decoder, feature(self.plan.bottleneck))

    @property
    def taps(self) -> list[Tap]:
        """Every recorded tap, once."""
        selected = self._plan.selected
        taps = [level.decoder for level in selected]
        if not self._decoder_only:
            taps = [*(level.encoder for level in selected), *taps, self._plan.bottleneck]
        return list(dict.fromkeys(taps))

    def __getstate__(self) -> dict[str, Any]:
        # hooks do not travel with a copied module, nor do features: only leaves of the graph can be copied
        state = {name: value for name, value in self.__dict__.items() if name not in ("_finalizer", "_handles")}
        recording = Recording(self._recording.training_only)
        recording.enabled, recording.clone = self._recording.enabled, self._recording.clone
        return {**state, "_recording": recording, "_attached": self.attached}

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("_attached")
        self.__dict__.update(state)
        self._handles = []
        self._finalizer = weakref.finalize(self, _detach, self._recording, self._handles)
        # a copy of model and extractor together works like the two. A model that holds the extractor is not copied yet
        # when its attribute is: it has no place for hooks, and `attach` sets them later
        if attached and "_forward_hooks" in vars(self._model):
            self.attach()

    def __repr__(self) -> str:
        title = f"{type(self._model).__name__} ({'attached' if self.attached else 'not attached'})"
        return self._plan.draw(title)


def _detach(recording: Recording, handles: list[Any]) -> None:
    recording.enabled = False
    recording.forget()
    for handle in handles:
        handle.remove()
