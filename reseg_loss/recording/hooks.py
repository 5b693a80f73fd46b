"""The hooks that record a model's features in a forward, and the object that they write to."""

# ruff: noqa: D102 - what a hook does when it is called, its class says

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ..common.dryrun import image_of, is_dry
from ..errors import ReSegError, TapError, outline
from ..taps import Tap

NO_REPLICAS = """nn.DataParallel runs replicas whose features are lost; use DistributedDataParallel, one process a GPU:
    torch.distributed.init_process_group()
    device = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(device)
    model = nn.parallel.DistributedDataParallel(model.to(device), device_ids=[device])  # instead of nn.DataParallel
    loader = DataLoader(data, batch_size, sampler=torch.utils.data.DistributedSampler(data))
and start it with: torchrun --nproc_per_node=NUMBER_OF_GPUS train.py"""


# what a tap leaves: what is kept of its tensor (itself or a clone), the tensor, its version, and whether gradients were
# on; a plain tuple, as older compilers trace no more
Seen = tuple[Tensor, Tensor, "int | None", bool]


class Forward(TypedDict):
    """What the hooks write down of one forward."""

    image: Tensor
    settled: bool  # whether the hooks' order was made right before it
    autocast: tuple[bool, torch.dtype] | None  # at the first tap
    grad: bool
    calls: dict[str, int]  # of each tapped module so far
    seen: dict[str, Seen]  # by tap


class Place(NamedTuple):
    """Where a tap's hook was set: a path of the module in the model, and the hook's key in the dict `kind` there."""

    tap: str
    path: str
    kind: str
    key: int


class Recording:
    """The state that the hooks of one extractor share. It holds no module, so the hooks make no reference cycle."""

    def __init__(self, training_only: bool) -> None:
        self.training_only = training_only
        self.places: tuple[Place, ...] = ()
        self.enabled = True
        self.clone: frozenset[str] = frozenset()  # taps that are overwritten later
        self.wanted = 0  # the number of taps after which a forward is ended; 0: it goes on
        self.held = False  # a forward of `record()` waits to be read: others are ignored
        self.open: Forward | None = None  # the forward that is running
        self.done: Forward | None = None  # the forward that waits to be read
        self.several = False

    def forget(self) -> None:
        """Drop every forward, whether running or waiting."""
        self.open = self.done = None
        self.several = self.held = False

    def settle(self, model: nn.Module) -> None:
        """Move the taps' hooks behind hooks that were set later, because the model continues with what those return."""
        for place in self.places:
            module = self._carrier(model, place)
            if module is not None and not _is_last(getattr(module, place.kind), place.key):
                getattr(module, place.kind).move_to_end(place.key)

    def check(self, model: nn.Module, settled: bool) -> None:
        """Raise a TapError unless the recorded tensors are those that the model continues with.

        `settled` says whether the order of the hooks was corrected before the forward.
        """
        for place in self.places:
            module = self._carrier(model, place)
            if module is None:
                raise TapError(
                    f"{place.tap}: {place.path!r} of the model is no longer the module that was hooked. It, or a "
                    "module around it, was wrapped, replaced or moved, or its hooks were removed. Adapters (LoRA), "
                    "quantization and convert_sync_batchnorm do this, for instance. Make such changes first, and build "
                    "the loss or FeatureExtractor afterwards"
                )
            if not settled and not _is_last(getattr(module, place.kind), place.key, sharded=True):
                raise TapError(
                    f"{place.tap}: a hook was set on {place.path!r} after ours. In a compiled model it is unknown "
                    "whether that hook runs, and in which order. Set it before you build the loss or FeatureExtractor"
                )
            if place.kind == "_forward_hooks":
                refuse_backward_hooks(module, place.tap)

    def _carrier(self, model: nn.Module, place: Place) -> nn.Module | None:
        """The module at a path, or the one that was compiled there since, if it has the hook; else None."""
        module = model
        for name in place.path.split(".") if place.path else ():
            inner = module._modules.get(name)
            if inner is None and "_orig_mod" in module._modules:
                inner = module._modules["_orig_mod"]._modules.get(name)  # pyright: ignore[reportOptionalMemberAccess]
            if inner is None:
                return None
            module = inner
        hook = getattr(module, place.kind).get(place.key)
        if hook is None and "_orig_mod" in module._modules and not getattr(module, place.kind):
            module = module._modules["_orig_mod"]
            hook = getattr(module, place.kind).get(place.key)
        # by what it writes to, for copies of a module have hooks with the same keys
        return module if getattr(hook, "recording", None) is self else None

    def finish(self) -> None:
        """The running forward has ended: it now waits to be read, unless another one waits already."""
        finished, self.open = self.open, None
        if self.several or self.done is not None:
            self.done, self.several = None, True  # keep no features that nobody may read
        else:
            self.done = finished


def is_of_a_step() -> bool:
    """Whether a forward in training belongs to a step: it is neither a recomputation inside backward nor a dry run."""
    # which a compiled graph never is
    return torch.compiler.is_compiling() or (torch._C._current_graph_task_id() == -1 and not is_dry())


class AllSeen(Exception):  # noqa: N818
    """Stops a forward once every tap is recorded."""


class Recorder:
    """A hook of an extractor. In a copied or pickled model it does nothing, so that no copy writes to the original."""

    def __init__(self, recording: Recording | None = None) -> None:
        self.recording = recording

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return type(self), ()


class RootEnter(Recorder):
    """Before the model: opens a forward, if it has to be recorded."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording = self.recording
        if recording is None:
            return
        if getattr(module, "_is_replica", False):
            raise ReSegError(NO_REPLICAS)
        recording.open = None
        # torch.compiler.is_exporting() itself is True in every compiled graph of torch 2.11
        if not recording.enabled or recording.held or getattr(torch.compiler, "_is_exporting_flag", False):
            return
        if recording.training_only:
            if not (module.training and torch.is_grad_enabled()):
                return
            if not is_of_a_step():
                return
        settled = not torch.compiler.is_compiling()
        if settled:
            recording.settle(module)
        recording.open = {
            "image": _image(args, kwargs),
            "settled": settled,
            "autocast": None,
            "grad": torch.is_grad_enabled(),
            "calls": {},
            "seen": {},
        }


class RootExit(Recorder):
    """After the model: finishes the forward."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.recording is not None and self.recording.open is not None:
            self.recording.open["image"] = _image(args, kwargs)  # which a later pre-hook may have changed
            self.recording.finish()


class RootFailed(Recorder):
    """Always called, after `RootExit`: a forward that is still open then has raised.

    (A hook that decided this by the output would make torch.compile guard on the output.)
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
    """Before a module: records its inputs."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # so that in:module is the first argument, in:module[1] the second, in:module[name] a named one
        self.record({**dict(enumerate(args)), **kwargs})


def drop_recorders(module: nn.Module) -> None:
    """Remove the hooks of extractors from a copied module, where they do nothing."""
    for part in module.modules():
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            for key in [key for key, hook in getattr(part, name).items() if isinstance(hook, Recorder)]:
                for kind in (name, f"{name}_with_kwargs", f"{name}_always_called"):
                    getattr(part, kind, {}).pop(key, None)


def refuse_backward_hooks(module: nn.Module, tap: str) -> None:
    """Raise a TapError if backward hooks make torch pass on a different tensor from the one that forward hooks see."""
    everywhere = nn.modules.module
    if (
        module._backward_pre_hooks
        or (module._backward_hooks and module._is_full_backward_hook)
        or everywhere._global_backward_pre_hooks
        or (everywhere._global_backward_hooks and everywhere._global_is_full_backward_hook)
    ):
        raise TapError(
            f"{tap}: its module has a full backward hook (its own or a global one), which would not see this loss's "
            "gradient, because torch passes the model a different tensor from the one that forward hooks get. Remove "
            "the hook, or tap the input of the next module, written in:module.path"
        )


def _is_last(hooks: Any, key: int, sharded: bool = False) -> bool:
    """Whether only other hooks of ours come after one of our hooks; with `sharded` also those of fully_shard."""
    for other in reversed(hooks):
        if other == key:
            return True
        hook = hooks[other]
        if not (isinstance(hook, Recorder) or (sharded and _shards(hook))):
            return False
    return False


def _shards(hook: Any) -> bool:
    """Whether a hook is FSDP2's, which gathers weights and returns the output, at most in another dtype."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def _image(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    image = args[0] if args else None
    if isinstance(image, Tensor) and image.ndim in (4, 5) and image.is_floating_point():
        return image
    return image_of((args, kwargs))  # a search, which older compilers cannot trace


def _element(value: Any, keys: tuple[int | str, ...], name: str) -> Tensor:
    for key in keys:
        try:
            value = getattr(value, key) if isinstance(key, str) and not isinstance(value, Mapping) else value[key]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise TapError(f"{name}: there is no [{key}] in {outline(value)}") from error
    if not isinstance(value, Tensor):
        raise TapError(f"{name} is not a tensor but {outline(value)}; name the element, for instance {name}[0]")
    return value
