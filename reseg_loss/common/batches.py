"""Batches from two loaders together, each repeated at its own length, and a state to resume from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ReSegError, outline, warn
from .dryrun import preserved_rng, restore_rng, rng_state
from .inputs import check_number, is_dense, unpack_batch
from .labels import plain_label, unwrapped
from .state import check_state

_RNG = {"torch": Tensor, "cuda": [Tensor], "random": [object], "numpy": (dict, None)}
_PLACE = {
    "round": int,
    "used": int,
    "start": ({"rng": _RNG, "generators": [Tensor]}, None),
    "generators": [Tensor],
    "loader": (dict, None),
}
_END = object()


class batches:  # noqa: N801 - called as zip and range are
    """Go through labelled and unlabelled batches together, for a given number of steps.

    Each step has the next batch of both loaders. A loader that ends starts over, so each is repeated at its own length
    (one pass is called a round). Shuffling loaders shuffle again in every round: `set_epoch` of the loader, its data
    set, its sampler and its batch sampler is called with the round's number, as DistributedSampler needs it. No batches
    are kept in memory.

    An interrupted loop continues where it stopped: in a second loop over the same object or, with `state_dict`, in
    another process. The batches are bit for bit the same if the loaders draw their order at the start of a round, as
    torch's samplers do. To get there, the batches of the round that were used already are loaded again and skipped.
    Random augmentations in worker processes are the same, too. Those in this process (num_workers=0) are the same if
    you restore the states of torch's, NumPy's and Python's generators, as you do for dropout. Random states inside a
    data set cannot be restored. If a loader has its own `state_dict`, like torchdata's StatefulDataLoader, that is used
    instead.

    Args:
        labelled: a DataLoader or another iterable, of pairs (image, label) or dicts with "image" and "label", or "data"
            and "target".
        unlabelled: an iterable of image tensors, of tuples or lists whose element 0 is one, or of dicts with "image"
            or "data". If it has its own generator (`DataLoader(generator=)`), the labelled loader must not use it, too.
        steps: number of steps in the whole run, including those before a resume.
        batch: a function from a labelled batch of another form to (image, label).

    Yields:
        (image, label, unlabelled image): tensors as the loaders returned them, (B, C, *spatial), (B, *spatial) or with
        channels, (B', C, *spatial); on their device, in their dtype.

    Raises:
        ReSegError: an argument is invalid; a loader is empty, or an iterator that cannot start over; a batch has
            another form.
    """

    def __init__(
        self,
        labelled: Iterable[Any],
        unlabelled: Iterable[Any],
        *,
        steps: int,
        batch: Callable[[Any], Any] | None = None,
    ) -> None:
        self.steps = check_number("steps", steps, least=1, whole=True)
        if not (batch is None or callable(batch)):
            raise ReSegError(f"batch= must be a function from a batch to (image, label), got {type(batch).__name__}")
        self._unpack = batch
        self._step, self._ended = 0, False
        self._labelled, self._unlabelled = Rounds(labelled, "labelled"), Rounds(unlabelled, "unlabelled")
        if labelled is unlabelled:
            raise ReSegError(
                "labelled and unlabelled are the same loader; make two, because each is repeated on its own"
            )
        if {*map(id, self._labelled.generators)} & {*map(id, self._unlabelled.generators)}:
            raise ReSegError(
                "both loaders draw from the same torch.Generator, so neither can resume independently; give each its "
                "own: DataLoader(..., generator=torch.Generator().manual_seed(0))"
            )

    @property
    def step(self) -> int:
        """How many steps have started. Inside the loop this is the current step's number, counted from 1."""
        return self._step

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self._ended and self._step == self.steps:
            warn(f"all {self.steps} steps are done, so this loop has none: steps= is the whole run, not an epoch of it")
        while self._step < self.steps:
            image, label = pair_of(self._labelled.next_batch(), self._unpack, "batches")
            unlabelled = unlabelled_image(self._unlabelled.next_batch())
            self._step += 1
            yield image, label, unlabelled
        self._ended = True

    def state_dict(self) -> dict[str, Any]:
        """The current position: tensors and plain Python values only. Call it after a step in the loop, or outside it.

        Under torch.distributed each process has its own state.
        """
        return {
            "kind": "batches",
            "format": 1,
            "step": self._step,
            "labelled": self._labelled.state(),
            "unlabelled": self._unlabelled.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was called. It loads the used batches of the current rounds again.

        The random states of the process stay as they are. The loaders' own generators are restored.

        Raises:
            ReSegError: the state is of another kind, is beyond `steps`, or does not fit the loaders. Nothing has
                changed then, except the state of loaders that have their own.
        """
        check_state(state, "batches", 1, {"step": int, "labelled": _PLACE, "unlabelled": _PLACE})
        step = check_number("step", state["step"], least=0, whole=True)
        if step > self.steps:
            raise ReSegError(
                f"this state is from step {step}, but steps={self.steps}; steps= counts from the start of the run"
            )
        generators = [*self._labelled.generators, *self._unlabelled.generators]
        before = _states(generators)
        try:
            places = (self._labelled.resumed(state["labelled"]), self._unlabelled.resumed(state["unlabelled"]))
        except BaseException:
            _restore(generators, before)
            raise
        (self._labelled, self._unlabelled), self._step = places, step


class Rounds:
    """A loader that is repeated without end."""

    def __init__(self, loader: Any, name: str) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ReSegError(f"{name} must be a loader that yields batches, got {type(loader).__name__}")
        self.loader, self.name = loader, name
        # Accelerate's loaders have the methods in any case
        self.stateful = getattr(loader, "use_stateful_dataloader", True) and all(
            callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict")
        )
        self.generators = _generators(loader)
        self.round = self.used = 0
        self.start: dict[str, Any] | None = None  # random states at the start of this round
        self.iterator: Iterator[Any] | None = None

    def next_batch(self) -> Any:
        """The next batch, from the next round if this one has ended."""
        if self.iterator is None:
            self.iterator = self._begin()
        batch = next(self.iterator, _END)
        if batch is _END and self.used:
            self.round, self.used = self.round + 1, 0
            self.iterator = self._begin()
            batch = next(self.iterator, _END)
        if batch is _END:
            if self.round == 0:
                raise ReSegError(f"the {self.name} loader is empty (is drop_last=True, with less than one batch?)")
            raise ReSegError(
                f"the {self.name} loader yields nothing in round {self.round + 1}: it is an iterator that can be used "
                "only once. Pass something that can be iterated again, such as a DataLoader or a list"
            )
        self.used += 1
        return batch

    def _begin(self) -> Iterator[Any]:
        set_epoch(self.loader, self.round)
        # of the CPU alone: orders are drawn there, and to set those of a GPU would start it
        self.start = {"rng": {**rng_state(), "cuda": []}, "generators": _states(self.generators)}
        return iter(self.loader)

    def state(self) -> dict[str, Any]:
        """The current position, for `resumed`."""
        return {
            "round": self.round,
            "used": self.used,
            "start": self.start,
            "generators": _states(self.generators),
            "loader": dict(self.loader.state_dict()) if self.stateful and self.iterator is not None else None,
        }

    def resumed(self, state: Mapping[str, Any]) -> Rounds:
        """The same loader at another position, with its generators restored; if that fails, they stay as they are."""
        other = Rounds(self.loader, self.name)
        other.round = check_number("round", state["round"], least=0, whole=True)
        other.used = check_number("used", state["used"], least=0, whole=True)
        other.start = state["start"]
        started = state["generators"] if other.start is None else other.start["generators"]
        if any(len(states) != len(self.generators) for states in (state["generators"], started)):
            raise ReSegError(
                f"the {self.name} loader has {len(self.generators)} torch.Generator of its own, but the state's loader "
                f"had {len(state['generators'])}: build it in the same way"
            )
        if other.start is not None and (state["loader"] is not None) != self.stateful:
            has, had = ("a", "none") if self.stateful else ("no", "one")
            raise ReSegError(
                f"the {self.name} loader has {has} state_dict of its own, but the state's loader had {had}"
            )
        if other.used and not self.stateful and getattr(self.loader, "persistent_workers", False):
            warnings.warn(
                f"the {self.name} loader has persistent_workers=True. Their random states continue from round to round "
                "and are lost with their processes: the rest of this round comes in another order, with other random "
                "augmentations",
                stacklevel=3,
            )
        if other.start is not None:
            with preserved_rng():
                other._go_on(other.start, state["loader"])
        _restore(self.generators, state["generators"])
        return other

    def _go_on(self, start: Mapping[str, Any], own: dict[str, Any] | None) -> None:
        """Restart this round as it started, and skip the batches that were used."""
        _restore(self.generators, start["generators"])
        restore_rng({**start["rng"]})
        set_epoch(self.loader, self.round)
        if own is not None:
            self.loader.load_state_dict(own)
        self.iterator = iter(self.loader)
        for count in range(self.used if own is None else 0):
            if next(self.iterator, _END) is _END:
                raise ReSegError(
                    f"the {self.name} loader ends after {count} batches, but the state had used {self.used}: pass the "
                    "loader that the state was saved with"
                )


def set_epoch(loader: Any, number: int) -> None:
    """Tell a loader and its samplers the number of the coming pass over the data: DistributedSampler shuffles by it."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    told: list[Any] = []
    for part in (
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        getattr(batch_sampler, "sampler", None),
        batch_sampler,
        loader,
    ):
        if callable(getattr(part, "set_epoch", None)) and not any(part is each for each in told):
            part.set_epoch(number)  # pyright: ignore[reportOptionalMemberAccess]
            told.append(part)


def pair_of(batch: Any, unpack: Callable[[Any], Any] | None, caller: str) -> tuple[Tensor, Tensor]:
    """(image, label) of a loader's batch as plain tensors, by `unpack` or from one of the known forms.

    `caller` is the function whose `batch=` the message names.

    Raises:
        ReSegError: the form is unknown, or there is no tensor where one is expected.
    """
    if unpack is not None:
        pair = unpack(batch)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise ReSegError(f"batch= must return (image, label); it returned {type(pair).__name__}")
    else:
        try:
            pair = unpack_batch(batch)
        except ReSegError as error:
            given = "lambda b: (b['image'], b['mask'])" if isinstance(batch, Mapping) else "lambda b: (b[0], b[1])"
            raise ReSegError(
                f"{error}. For other forms, pass {caller}(batch=...) a function that returns (image, label): "
                f"batch={given}"
            ) from error
    image, label = pair
    return plain_label(image, "an image"), plain_label(label)


def unlabelled_image(batch: Any) -> Tensor:
    """The images of an unlabelled batch as a plain tensor.

    Raises:
        ReSegError: the form is unknown.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("image", "data") if key in batch), None)
    found = unwrapped(found)
    if not is_dense(found):
        raise ReSegError(
            f"an unlabelled batch is {outline(batch)}; it must be a tensor of images, a tuple or list whose element 0 "
            "is one, or a dict with 'image' or 'data'"
        )
    return found


def _generators(loader: Any) -> list[torch.Generator]:
    """The loader's own generators, each once."""
    sampler, batch_sampler = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    parts = (loader, sampler, getattr(batch_sampler, "sampler", None), batch_sampler)
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _states(generators: Iterable[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _restore(generators: Iterable[torch.Generator], states: Iterable[Tensor]) -> None:
    for generator, state in zip(generators, states):
        generator.set_state(state)
