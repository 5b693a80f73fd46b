"""The processes of torch.distributed (a single one without it), and modules trained along with the user's model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from ..errors import ReSegError, warn


def rank() -> int:
    """This process's rank, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def broadcast(module: nn.Module) -> None:
    """Parameters and buffers of rank 0 to every rank."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)


def gathered(value: Any) -> list[Any]:
    """A plain value of every process, by rank."""
    values: list[Any] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def in_step(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; every process must have the same number of them, or one would wait for another.

    If all loaders have a length, the lengths are compared before the first batch. Loaders without one, or with a data
    set whose length is only a promise (IterableDataset), are checked at every batch, and the processes wait for that.

    Raises:
        ReSegError: the numbers differ. It is raised on every process, at the same batch.
    """
    lengths = gathered(_length(loader))
    if None not in lengths:
        _refuse_uneven(lengths)
        yield from loader
        return
    batches, count, end = iter(loader), 0, object()
    while True:
        batch = next(batches, end)
        have = gathered(batch is not end)
        if not all(have):
            _refuse_uneven([count + more for more in have], " or more")
            return
        count += 1
        yield batch


def _length(loader: Any) -> int | None:
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    try:
        return len(loader)
    except TypeError:
        return None


def _refuse_uneven(numbers: list[int], more: str = "") -> None:
    if len(set(numbers)) > 1:
        listed = ", ".join(f"{n}{more if n == max(numbers) else ''} on rank {i}" for i, n in enumerate(numbers[:8]))
        raise ReSegError(
            f"the ranks have different numbers of batches in an epoch of stage 1: {listed}. All ranks need the same "
            "number: use a DistributedSampler, or shorten the longer loaders; or train by steps=, where each rank "
            "goes through its loader independently"
        )


_T = TypeVar("_T")


def on_rank_0(action: Callable[[], _T]) -> _T:
    """Run `action` on rank 0 and return its result on every rank; a ReSegError is raised on every rank, too."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except ReSegError as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


UNMOVED_CALLS = 100


# {model: the DistributedDataParallel around it, or around what holds it}, looked for once
_AROUND: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[DistributedDataParallel]]] = weakref.WeakKeyDictionary()


def refuse_join(model: nn.Module, what: str) -> None:
    """Raise a ReSegError if the model's DistributedDataParallel is in a `join()` context that outlives a process.

    In such a context a process that has no batches left only answers for the model's own DistributedDataParallel, once
    a step. Any other communication aborts all processes. `what` says what that communication is.
    """
    for wrapper in wrappers_of(model):
        config = wrapper._join_config  # noqa: SLF001 - torch tells it nowhere else
        if config.enable and not config.throw_on_early_termination:
            raise ReSegError(
                f"the model's DistributedDataParallel is in a join() context, but {what}, so a process that has no "
                "batches left would abort the others. Give every process the same number of batches "
                "(DistributedSampler, drop_last=True) and leave out join(), or stop all processes with the first: "
                "join(throw_on_early_termination=True)"
            )


def wrappers_of(model: nn.Module) -> list[DistributedDataParallel]:
    """The DistributedDataParallel around the model, or around what holds it; none in one process or while compiling."""
    if world_size() == 1 or torch.compiler.is_compiling():
        return []
    known = _AROUND.get(model)
    if known is None or (known and not any(ref() for ref in known)):
        # nothing in a module tells what it is wrapped in, and it may be wrapped after this library has seen it
        wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
        _AROUND[model] = [weakref.ref(x) for x in wrappers if any(m is model for m in x.modules())]
    return [wrapper for wrapper in (ref() for ref in _AROUND[model]) if wrapper is not None]


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`; under torch.distributed in its own DDP, or else its replicas would drift apart silently."""
    inner = undistributed(module)
    if next(inner.parameters()).device != device:
        inner.to(device)
    if world_size() == 1 or isinstance(module, DistributedDataParallel):
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def undistributed(module: nn.Module) -> nn.Module:
    """The module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


class UnmovedWarning:
    """Warns once if parameters have not changed after 100 calls with gradient: no optimizer has them."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        self.calls = 0
        self._start: list[Tensor] = []

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count a call; the values are compared only once, at the last call."""
        if self.calls > UNMOVED_CALLS or not torch.is_grad_enabled():
            return
        if self.calls == 0:
            self._start = [p.detach().clone() for p in parameters]
        elif self.calls == UNMOVED_CALLS:
            # fused optimizers leave no other mark than the values themselves
            if all(torch.equal(p, start) for p, start in zip(parameters, self._start)):
                warn(f"{self.what} did not change in {UNMOVED_CALLS} calls with gradient: {self.remedy}")
            self._start = []
        self.calls += 1
