"""Small trainable modules beside the user's model, which neither its optimizer nor its DDP knows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .processes import world_size

UNMOVED_CALLS = 100


def distributed(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` on `device`, under torch.distributed in a DDP of its own, else its replicas drift apart silently."""
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
    """Warns once if parameters have not changed after 100 calls with gradient: no optimizer knows them."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        self.calls = 0
        self._start: list[Tensor] = []

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count a call; the values are compared once only, at the last."""
        if self.calls > UNMOVED_CALLS or not torch.is_grad_enabled():
            return
        if self.calls == 0:
            self._start = [p.detach().clone() for p in parameters]
        elif self.calls == UNMOVED_CALLS:
            # fused optimizers leave no other mark than the values themselves
            if all(torch.equal(p, start) for p, start in zip(parameters, self._start)):
                message = f"{self.what} did not change in {UNMOVED_CALLS} calls with gradient: {self.remedy}"
                warnings.warn(message, stacklevel=4)  # the line that called `loss`
            self._start = []
        self.calls += 1
