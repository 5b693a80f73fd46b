"""nnU-Net's checkpoints with changed entries, and the trainer that predicts with them."""

from __future__ import annotations

import os
from typing import Any

import torch

from ...common.files import write_atomically


def finish(partial: str, filename: str, changes: dict[str, Any]) -> None:
    """Write a checkpoint that nnU-Net has saved as `partial`, with changes, atomically; `partial` is removed."""
    checkpoint = torch.load(partial, map_location="cpu", weights_only=False)
    write_atomically({**checkpoint, **changes}, filename)
    os.remove(partial)


def trainer_to_predict_with(mine: Any, ours: type) -> str:
    """The name of the trainer that `ours` extends in `mine`, unless a subclass of `ours` builds its own network."""
    base = mine.__mro__[mine.__mro__.index(ours) + 1]
    same = base.build_network_architecture is mine.build_network_architecture
    return base.__name__ if same else mine.__name__
