"""The processes of torch.distributed, of which there is one without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

from .errors import ReSegError


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
    """The batches of a loader, of which every process must have the same number: none may wait for another's.

    Loaders that have a length are compared before the first batch. Those that have none, or a data set that may keep to
    its length or not (IterableDataset), are asked for every batch whether all have one, which the processes wait for.

    Raises:
        ReSegError: the numbers differ; on every process, and at the same batch.
    """
    if world_size() == 1:
        yield from loader
        return
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
            f"the ranks have different numbers of batches in an epoch of stage 1: {listed}. Each needs as many: use a "
            "DistributedSampler, or cut the longer loaders; or train by steps=, which passes over each by itself"
        )
