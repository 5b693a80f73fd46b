"""The processes of torch.distributed, of which there is one without it."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn


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
