"""Batches of two loaders side by side, each gone round in its own length, and a state to go on from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ReSegError, outline
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

    Each step has the next batch of both loaders. A loader that ends begins anew, so each is gone round in its own
    length, and shuffled anew where it shuffles: `set_epoch` of the loader, its data set, its sampler and its batch
    sampler is called with the number of the round, as DistributedSampler needs it. Nothing is kept in memory.

    A loop that is left goes on where it was, in a second loop over the same object or, by `state_dict`, in another
    process: with the same batches, to the bit, where the loaders draw their order at the start of a round, as torch's
    samplers do. For that the batches of the round that were used are loaded again and left out. Random augmentations
    in worker processes are the same; those in this process (num_workers=0) are, too, if you restore the states of
    torch's, NumPy's and Python's generators that they draw from, as you do for dropout. Random states that a data set
    keeps in itself are not seen. A loader with a `state_dict` of its own, such as torchdata's StatefulDataLoader, is
    asked for that instead.

    Args:
        labelled: a DataLoader or another iterable, of pairs (image, label) or dicts with "image" and "label", or "data"
            and "target".
        unlabelled: an iterable of image tensors, of tuples or lists whose element 0 is one, or of dicts with "image"
            or "data". A generator of its own (`DataLoader(generator=)`) must not be the other loader's.
        steps: how many there are, those before a resume counted.
        batch: a function from a labelled batch of another form to (image, label).

    Yields:
        (image, label, unlabelled image): tensors as the loaders gave them, (B, C, *spatial), (B, *spatial) or with
        channels, (B', C, *spatial); on their device, in their dtype.

    Raises:
        ReSegError: an argument is none of these; a loader is empty, or an iterator that cannot begin anew; a batch has
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
            raise ReSegError(f"batch= is a function from a batch to (image, label), got {type(batch).__name__}")
        self._unpack = batch
        self._step = 0
        self._labelled, self._unlabelled = Rounds(labelled, "labelled"), Rounds(unlabelled, "unlabelled")
        if labelled is unlabelled:
            raise ReSegError("labelled and unlabelled are the same loader; make two, for each is gone round by itself")
        if {*map(id, self._labelled.generators)} & {*map(id, self._unlabelled.generators)}:
            raise ReSegError(
                "both loaders draw from the same torch.Generator, so neither can resume by itself; give each its own: "
                "DataLoader(..., generator=torch.Generator().manual_seed(0))"
            )

    @property
    def step(self) -> int:
        """How many steps have begun: within the loop the number of this one, counted from 1."""
        return self._step

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while self._step < self.steps:
            image, label = pair_of(self._labelled.next_batch(), self._unpack, "batches")
            unlabelled = unlabelled_image(self._unlabelled.next_batch())
            self._step += 1
            yield image, label, unlabelled

    def state_dict(self) -> dict[str, Any]:
        """Where it is: tensors and plain Python values only. Take it after a step within the loop, or between loops.

        Under torch.distributed each process has its own.
        """
        return {
            "kind": "batches",
            "format": 1,
            "step": self._step,
            "labelled": self._labelled.state(),
            "unlabelled": self._unlabelled.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. It loads the batches that were used of the present rounds once more.

        The random states of the process stay as they are; a loader's own generators become what they were.

        Raises:
            ReSegError: the state is of another kind, is beyond `steps`, or does not fit the loaders. All is then as it
                was, but for the states within loaders that have them.
        """
        check_state(state, "batches", 1, {"step": int, "labelled": _PLACE, "unlabelled": _PLACE})
        step = check_number("step", state["step"], least=0, whole=True)
        if step > self.steps:
            raise ReSegError(f"this state is of step {step}, and steps={self.steps} counts from the start of the run")
        generators = [*self._labelled.generators, *self._unlabelled.generators]
        before = _states(generators)
        try:
            places = (self._labelled.resumed(state["labelled"]), self._unlabelled.resumed(state["unlabelled"]))
        except BaseException:
            _restore(generators, before)
            raise
        (self._labelled, self._unlabelled), self._step = places, step


class Rounds:
    """A loader that is gone round without end."""

    def __init__(self, loader: Any, name: str) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ReSegError(f"{name} is a loader that yields batches, got {type(loader).__name__}")
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
        """The next batch, of the next round if this one has ended."""
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
                f"the {self.name} loader gives nothing in round {self.round + 1}: it is an iterator that can be used "
                "once. Give what can be iterated again and again, such as a DataLoader or a list"
            )
        self.used += 1
        return batch

    def _begin(self) -> Iterator[Any]:
        set_epoch(self.loader, self.round)
        # of the CPU alone: orders are drawn there, and to set those of a GPU would start it
        self.start = {"rng": {**rng_state(), "cuda": []}, "generators": _states(self.generators)}
        return iter(self.loader)

    def state(self) -> dict[str, Any]:
        """Where it is, for `resumed`."""
        return {
            "round": self.round,
            "used": self.used,
            "start": self.start,
            "generators": _states(self.generators),
            "loader": dict(self.loader.state_dict()) if self.stateful and self.iterator is not None else None,
        }

    def resumed(self, state: Mapping[str, Any]) -> Rounds:
        """The same loader at another place; what it draws from is as it was there, or as now if that fails."""
        other = Rounds(self.loader, self.name)
        other.round = check_number("round", state["round"], least=0, whole=True)
        other.used = check_number("used", state["used"], least=0, whole=True)
        other.start = state["start"]
        started = state["generators"] if other.start is None else other.start["generators"]
        if any(len(states) != len(self.generators) for states in (state["generators"], started)):
            raise ReSegError(
                f"the {self.name} loader has {len(self.generators)} torch.Generator of its own, that of the state had "
                f"{len(state['generators'])}: make it as it was"
            )
        if other.start is not None and (state["loader"] is not None) != self.stateful:
            has, had = ("a", "none") if self.stateful else ("no", "one")
            raise ReSegError(f"the {self.name} loader has {has} state_dict of its own, that of the state had {had}")
        if other.used and not self.stateful and getattr(self.loader, "persistent_workers", False):
            warnings.warn(
                f"the {self.name} loader has persistent_workers=True, whose random states go on from round to round "
                "and end with their processes: the rest of this round comes in another order, and its random "
                "augmentations are others",
                stacklevel=3,
            )
        if other.start is not None:
            with preserved_rng():
                other._go_on(other.start, state["loader"])
        _restore(self.generators, state["generators"])
        return other

    def _go_on(self, start: Mapping[str, Any], own: dict[str, Any] | None) -> None:
        """Begin this round as it began, and leave out what was used."""
        _restore(self.generators, start["generators"])
        restore_rng({**start["rng"]})
        set_epoch(self.loader, self.round)
        if own is not None:
            self.loader.load_state_dict(own)
        self.iterator = iter(self.loader)
        for count in range(self.used if own is None else 0):
            if next(self.iterator, _END) is _END:
                raise ReSegError(
                    f"the {self.name} loader ends after {count} batches, of which the state had used {self.used}: give "
                    "the loader that the state was saved with"
                )


def set_epoch(loader: Any, number: int) -> None:
    """Tell a loader, and what gives it its order, which pass over the data comes: DistributedSampler shuffles by it."""
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
    """(image, label) of a loader's batch as plain tensors, by `unpack` or in one of the forms that are known.

    `caller` is the function whose `batch=` the message names.

    Raises:
        ReSegError: the form is another, or there is no tensor where one is expected.
    """
    if unpack is not None:
        pair = unpack(batch)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise ReSegError(f"batch= is a function from a batch to (image, label); it returned {type(pair).__name__}")
    else:
        try:
            pair = unpack_batch(batch)
        except ReSegError as error:
            given = "lambda b: (b['image'], b['mask'])" if isinstance(batch, Mapping) else "lambda b: (b[0], b[1])"
            raise ReSegError(
                f"{error}. Of another form, give {caller}(batch=...) a function to (image, label): batch={given}"
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
    """The generators that are a loader's own, each once."""
    sampler, batch_sampler = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    parts = (loader, sampler, getattr(batch_sampler, "sampler", None), batch_sampler)
    found = [getattr(part, "generator", None) for part in parts]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _states(generators: Iterable[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _restore(generators: Iterable[torch.Generator], states: Iterable[Tensor]) -> None:
    for generator, state in zip(generators, states):
        generator.set_state(state)
