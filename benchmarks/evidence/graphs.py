"""What comes before a step is captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3  # eager steps: they compile, choose algorithms and make the optimizer's state


def warm_up(step: Callable[[], Any]) -> None:
    """Run a step on a stream of its own, as a capture needs it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
