"""One process or several: what `torchrun` starts, the examples share the work of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

T = TypeVar("T")


@contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """This process's device; under `torchrun` the processes are connected while the block runs."""
    if "LOCAL_RANK" not in os.environ:
        yield torch.device(device)
        return
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the work."""
    return items[rank() :: world_size()]


def gather(part: Sequence[T], total: int) -> list[T]:
    """What every process made of its `share`, in the order of the whole, in every process."""
    parts: list[Sequence[T]] = [part] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(parts, part)
    return [parts[place % len(parts)][place // len(parts)] for place in range(total)]


def share_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers: each has counted the batch statistics of its own share."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
