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
    """The name of the first base of `mine` that is none of ours and builds the same network, or else of `mine`."""
    for base in mine.__mro__:
        own = getattr(base, "build_network_architecture", None)
        if not issubclass(base, ours) and own is mine.build_network_architecture:
            return base.__name__
    return mine.__name__
