"""Batches of two loaders side by side: each in its own length, and the same to the bit after a resume."""

from __future__ import annotations

import random
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import through_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, TensorDataset

from reseg_loss import ReSegError, batches
from reseg_loss.common.dryrun import restore_rng, rng_state


class Slices(Dataset):
    """Images that tell which sample they are, by one pixel, and what was drawn for them."""

    def __init__(self, n: int, labelled: bool, draw: Callable[[], float] = float) -> None:
        self.n, self.labelled, self.draw = n, labelled, draw

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        image = torch.tensor([float(index), self.draw()]).view(1, 1, 2)
        return (image, torch.tensor([[index, index]])) if self.labelled else image


def by_torch() -> float:
    return float(torch.rand(()))


def by_numpy_and_random() -> float:
    return float(np.random.rand()) + random.random()


def numbers(image: Tensor) -> list[int]:
    return [int(x) for x in image[:, 0, 0, 0]]


def listed(n: int, size: int = 2) -> tuple[list[Any], list[Any]]:
    """Labelled and unlabelled batches in lists of n and n + 2."""
    make = lambda i: torch.full((size, 1, 4, 4), float(i))  # noqa: E731
    return [(make(i), make(i).long()[:, 0]) for i in range(n)], [make(100 + i) for i in range(n + 2)]


def test_each_loader_is_gone_round_in_its_own_length():
    labelled, unlabelled = listed(3)
    data = batches(labelled, unlabelled, steps=11)
    assert len(data) == 11
    seen = []
    for step, (image, label, other) in enumerate(data, 1):
        assert data.step == step
        assert (image.shape, label.shape, label.dtype) == ((2, 1, 4, 4), (2, 4, 4), torch.int64)
        seen.append((numbers(image)[0], int(label[0, 0, 0]), numbers(other)[0]))
    assert seen == [(i % 3, i % 3, 100 + i % 5) for i in range(11)]
    with pytest.warns(UserWarning, match="all 11 steps are done, so this loop has none"):
        assert [*data] == []


def test_every_round_is_shuffled_anew_and_has_every_sample_once():
    def rounds(name: str, **kwargs: Any) -> list[list[int]]:
        loaders = {"labelled": DataLoader(Slices(6, True), 2), "unlabelled": DataLoader(Slices(8, False), 2)}
        data = Slices(6 if name == "labelled" else 8, name == "labelled")
        sampler = DistributedSampler(data, num_replicas=1, rank=0) if kwargs.pop("distributed", False) else None
        if sampler is not None:
            kwargs["sampler"] = sampler
        loaders[name] = DataLoader(data, 2, **kwargs)
        images = [part[0 if name == "labelled" else 2] for part in batches(**loaders, steps=24)]
        flat, n = [i for image in images for i in numbers(image)], len(data)
        return [flat[i : i + n] for i in range(0, 48, n)]

    for name in ("labelled", "unlabelled"):
        for kwargs in ({"shuffle": True}, {"distributed": True}):
            orders = rounds(name, **kwargs)
            assert all(sorted(order) == [*range(len(order))] for order in orders)
            assert len({*map(tuple, orders)}) == len(orders)


def test_whatever_shuffles_by_the_epoch_is_told_the_round():
    told: list[tuple[str, int]] = []

    class Told:
        def __init__(self, name: str) -> None:
            self.name = name

        def set_epoch(self, number: int) -> None:
            told.append((self.name, number))

    class Loader(Told):
        def __init__(self) -> None:
            super().__init__("loader")
            self.sampler, self.batch_sampler, self.dataset = Told("sampler"), Told("batch_sampler"), Told("dataset")
            self.batch_sampler.sampler = self.sampler  # pyright: ignore[reportAttributeAccessIssue]

        def __iter__(self) -> Iterator[Any]:
            return iter(listed(2)[0])

    assert len([*batches(Loader(), listed(1)[1], steps=4)]) == 4
    parts = {"dataset", "sampler", "batch_sampler", "loader"}
    assert sorted(told) == sorted((part, number) for part in parts for number in range(2))


def test_nothing_is_kept_in_memory():
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            for _ in range(5):
                image = torch.zeros(1, 1, 2, 2)
                alive.add(image)
                yield image
                del image

    data = batches(listed(2)[0], Loader(), steps=17)
    for image, label, other in data:
        assert len(alive) <= 2
        del image, label, other


# --- resumption


WORKERS = [0, 2]
KINDS: dict[str, Callable[[int], tuple[DataLoader, DataLoader]]] = {}


def kind(make: Callable[[int], tuple[DataLoader, DataLoader]]) -> Callable[[int], tuple[DataLoader, DataLoader]]:
    KINDS[make.__name__] = make
    return make


@kind
def shuffled(workers: int) -> tuple[DataLoader, DataLoader]:
    first = DataLoader(Slices(7, True), 2, shuffle=True, num_workers=workers)
    return first, DataLoader(Slices(10, False), 3, shuffle=True, num_workers=workers, drop_last=True)


@kind
def augmented(workers: int) -> tuple[DataLoader, DataLoader]:
    first = DataLoader(Slices(7, True, by_torch), 2, shuffle=True, num_workers=workers)
    return first, DataLoader(Slices(10, False, by_torch), 3, shuffle=True, num_workers=workers)


@kind
def augmented_by_numpy_and_random(workers: int) -> tuple[DataLoader, DataLoader]:
    first = DataLoader(Slices(7, True, by_numpy_and_random), 2, shuffle=True, num_workers=workers)
    return first, DataLoader(Slices(10, False, by_numpy_and_random), 3, num_workers=workers)


@kind
def with_own_generators(workers: int) -> tuple[DataLoader, DataLoader]:
    first, second = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    labelled, unlabelled = Slices(7, True, by_torch), Slices(40, False, by_torch)
    sampler = RandomSampler(unlabelled, replacement=True, num_samples=70, generator=second)
    return (
        DataLoader(labelled, 2, shuffle=True, generator=first, num_workers=workers),
        DataLoader(unlabelled, 3, sampler=sampler, num_workers=workers),
    )


@kind
def distributed(workers: int) -> tuple[DataLoader, DataLoader]:
    labelled, unlabelled = Slices(7, True, by_torch), Slices(20, False, by_torch)
    samplers = [DistributedSampler(data, num_replicas=2, rank=1) for data in (labelled, unlabelled)]
    return (
        DataLoader(labelled, 2, sampler=samplers[0], num_workers=workers),
        DataLoader(unlabelled, 3, sampler=samplers[1], num_workers=workers),
    )


STEPS = 14
Parts = list[tuple[Tensor, Tensor, Tensor]]


def run(data: batches, until: int = STEPS) -> Parts:
    """Steps that draw random numbers, as dropout does."""
    found = []
    for part in data:
        torch.rand(3)
        np.random.rand()
        random.random()
        found.append(part)
        if data.step == until:
            break
    return found


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def equal(a: Parts, b: Parts) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_goes_on_with_the_same_batches(name, workers):
    def fresh() -> batches:
        return batches(*KINDS[name](workers), steps=STEPS)

    seeded(0)
    whole = run(fresh())
    assert len(whole) == STEPS
    every = range(STEPS + 1) if not workers else [random.Random(name).randrange(1, STEPS)]  # processes take long
    for at in every:
        seeded(0)
        data = fresh()
        first = run(data, at) if at else []
        assert equal(first, whole[:at])
        state, rng = through_file(data.state_dict()), rng_state()
        seeded(99)
        other = fresh()
        run(other, 2)  # what it was before does not matter
        restore_rng(rng)
        other.load_state_dict(state)
        assert_same_rng(rng)
        assert (other.step, len(other)) == (at, STEPS)
        assert equal(run(other), whole[at:])


def assert_same_rng(before: dict[str, Any]) -> None:
    after = rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert (before["random"], before["numpy"]) == (after["random"], after["numpy"])


def test_a_run_resumed_twice_and_a_loop_that_is_left_go_on():
    seeded(0)
    whole = run(batches(*augmented(0), steps=STEPS))
    seeded(0)
    data = batches(*augmented(0), steps=STEPS)
    found = run(data, 3)
    found += run(data, 5)
    for until in (9, STEPS):
        state, rng = through_file(data.state_dict()), rng_state()
        seeded(1)
        data = batches(*augmented(0), steps=STEPS)
        data.load_state_dict(state)
        restore_rng(rng)
        found += run(data, until)
    assert equal(found, whole)


def test_more_steps_may_be_asked_for_and_less_than_are_done_are_refused():
    data = batches(*listed(2), steps=6)
    run(data, 6)
    longer = batches(*listed(2), steps=8)
    longer.load_state_dict(data.state_dict())
    assert [numbers(part[0])[0] for part in longer] == [0, 1]
    done = batches(*listed(2), steps=6)
    done.load_state_dict(data.state_dict())
    assert [*done] == []
    with pytest.raises(ReSegError, match="from step 6, but steps=5; steps= counts from the start"):
        batches(*listed(2), steps=5).load_state_dict(data.state_dict())


class Stateful:
    """A loader that knows where it is, and cannot be asked twice for a batch."""

    def __init__(self, n: int) -> None:
        self.n, self.at, self.seen = n, 0, []

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < self.n:
            self.at += 1
            self.seen.append(self.at)
            yield torch.full((1, 1, 2, 2), float(self.at))
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def test_a_loader_with_a_state_of_its_own_is_not_asked_again_for_what_was_used():
    whole = [numbers(part[2])[0] for part in batches(listed(2)[0], Stateful(3), steps=8)]
    for at in range(8):
        data = batches(listed(2)[0], Stateful(3), steps=8)
        if at:
            run(data, at)
        loader = Stateful(3)
        other = batches(listed(2)[0], loader, steps=8)
        other.load_state_dict(through_file(data.state_dict()))
        assert loader.seen == []
        assert [numbers(part[2])[0] for part in other] == whole[at:]
    with pytest.raises(
        ReSegError, match="unlabelled loader has no state_dict of its own, but the state's loader had one"
    ):
        batches(*listed(2), steps=8).load_state_dict(data.state_dict())
    data = batches(*listed(2), steps=8)
    run(data, 1)
    with pytest.raises(
        ReSegError, match="unlabelled loader has a state_dict of its own, but the state's loader had none"
    ):
        batches(listed(2)[0], Stateful(3), steps=8).load_state_dict(data.state_dict())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("workers", WORKERS)
def test_torchdatas_loader_is_served(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def fresh() -> batches:
        unlabelled = stateful(Slices(10, False), 3, shuffle=True, num_workers=workers)
        return batches(DataLoader(Slices(7, True), 2, shuffle=True), unlabelled, steps=STEPS)

    seeded(0)
    whole = run(fresh())
    for at in range(STEPS) if not workers else (4, 7):  # 4 batches are a round
        seeded(0)
        data = fresh()
        if at:
            run(data, at)
        state, rng = through_file(data.state_dict()), rng_state()
        seeded(1)
        other = fresh()
        restore_rng(rng)
        other.load_state_dict(state)
        assert equal(run(other), whole[at:]), at


@pytest.mark.filterwarnings("ignore:.*use of fork")  # Python 3.12 on: the first loader's workers have a thread here
def test_workers_that_live_on_cannot_resume_exactly_and_this_is_said():
    def fresh() -> batches:
        loader = DataLoader(Slices(8, True), 2, shuffle=True, num_workers=1, persistent_workers=True)
        return batches(loader, listed(2)[1], steps=9)

    data = fresh()
    run(data, 6)
    other = fresh()
    with pytest.warns(UserWarning, match=r"the labelled loader has persistent_workers=True.*another order") as record:
        other.load_state_dict(data.state_dict())
    assert record[0].filename == __file__
    assert len(run(other, 9)) == 3


# --- what a batch may be


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x,),
        lambda x: [x, "name"],
        lambda x: {"image": x, "name": "name"},
        lambda x: {"data": [x]},
    ],
    ids=["tensor", "tuple", "list", "image", "data"],
)
def test_an_unlabelled_batch_has_its_image_in_one_of_these_places(wrap):
    labelled, unlabelled = listed(2)
    found = [part[2] for part in batches(labelled, [wrap(x) for x in unlabelled], steps=4)]
    assert all(torch.equal(x, y) for x, y in zip(found, unlabelled, strict=True))


def test_images_of_a_subclass_come_as_plain_tensors():
    meta = pytest.importorskip("monai.data").MetaTensor
    labelled, unlabelled = listed(1)
    image, label = labelled[0]
    pairs = [{"image": meta(image), "label": meta(label)}]
    (part,) = batches(pairs, [{"image": meta(x)} for x in unlabelled], steps=1)
    assert [type(x) for x in part] == [Tensor] * 3


def test_a_function_takes_a_labelled_batch_of_another_form():
    labelled, unlabelled = listed(2)
    others = [{"scan": image, "mask": label} for image, label in labelled]
    found = [*batches(others, unlabelled, steps=2, batch=lambda b: (b["scan"], b["mask"]))]
    assert all(torch.equal(part[0], image) for part, (image, _) in zip(found, labelled, strict=True))
    with pytest.raises(ReSegError, match=r"pass batches\(batch=...\) a function that .*: batch=lambda b"):
        next(iter(batches(others, unlabelled, steps=2)))
    with pytest.raises(ReSegError, match=r"batch= must return \(image, label\); it returned Tensor"):
        next(iter(batches(others, unlabelled, steps=2, batch=lambda b: b["scan"])))


@pytest.mark.parametrize("wrong", ["text", {"scan": torch.zeros(1)}, [], [{"image": torch.zeros(1)}], None, 3])
def test_an_unlabelled_batch_without_an_image_is_refused(wrong):
    with pytest.raises(ReSegError, match="it must be a tensor of images, a tuple or list whose element 0 is one"):
        next(iter(batches(listed(1)[0], [wrong], steps=1)))


# --- wrong uses


def test_what_cannot_be_gone_round_is_refused():
    labelled, unlabelled = listed(2)
    for steps in (0, -1, 1.5, True, "3", None):
        with pytest.raises(ReSegError, match=re.escape(f"steps={steps!r}; it must be a whole number >= 1")):
            batches(labelled, unlabelled, steps=steps)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReSegError, match="labelled must be a loader that yields batches, got int"):
        batches(3, unlabelled, steps=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReSegError, match="unlabelled must be a loader that yields batches, got NoneType"):
        batches(labelled, None, steps=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReSegError, match="batch= must be a function"):
        batches(labelled, unlabelled, steps=1, batch="image")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ReSegError, match="the same loader; make two"):
        batches(unlabelled, unlabelled, steps=1)
    generator = torch.Generator()
    two = [DataLoader(TensorDataset(torch.zeros(2)), shuffle=True, generator=generator) for _ in range(2)]
    with pytest.raises(ReSegError, match=r"from the same torch.Generator.*give each its own"):
        batches(*two, steps=1)


def test_an_empty_loader_and_an_iterator_that_has_ended_are_told_of():
    labelled, unlabelled = listed(2)
    with pytest.raises(ReSegError, match="the unlabelled loader is empty"):
        next(iter(batches(labelled, [], steps=1)))
    with pytest.raises(ReSegError, match="the labelled loader is empty"):
        next(iter(batches(DataLoader(Slices(3, True), 4, drop_last=True), unlabelled, steps=1)))
    data = batches(iter(labelled), unlabelled, steps=2)
    assert len([*data]) == 2  # as many as it has
    with pytest.raises(ReSegError, match=r"the labelled loader yields nothing in round 2: it is an iterator"):
        [*batches(iter(labelled), unlabelled, steps=3)]


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    def fresh(n: int = 7, own: bool = True) -> batches:
        generator = torch.Generator().manual_seed(1) if own else None
        return batches(DataLoader(Slices(n, True), 2, shuffle=True, generator=generator), listed(2)[1], steps=STEPS)

    data = fresh()
    run(data, 3)
    state = data.state_dict()
    refused = {
        "not the state_dict": {"step": 3},
        "of a CutMixConsistency": {**state, "kind": "CutMixConsistency"},
        "format 2, not 1": {**state, "format": 2},
        "has no 'step'": {key: value for key, value in state.items() if key != "step"},
        "'step' of this state of a batches is '3'": {**state, "step": "3"},
        "used=-1": {**state, "labelled": {**state["labelled"], "used": -1}},
        "unlabelled loader ends after 4 batches, but the state had used 9": {
            **state, "unlabelled": {**state["unlabelled"], "used": 9},
        },
    }  # fmt: skip
    seeded(1)
    other, untouched = fresh(), fresh()
    expected = [numbers(part[0]) for part in untouched]
    seeded(1)
    for said, wrong in refused.items():
        before = rng_state()
        with pytest.raises(ReSegError, match=said):
            other.load_state_dict(wrong)
        assert_same_rng(before)
        assert other.step == 0
    assert [numbers(part[0]) for part in other] == expected
    with pytest.raises(
        ReSegError, match=r"labelled loader has 0 torch.Generator of its own, but the state's loader had 1"
    ):
        fresh(own=False).load_state_dict(state)
    with pytest.raises(ReSegError, match="labelled loader ends after 1 batches, but the state had used 3"):
        fresh(n=2).load_state_dict(state)
