"""Small trainable modules beside the user's model, which neither its optimizer nor its DDP knows."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import ReSegError
from .processes import world_size

UNMOVED_CALLS = 100

# {model: the DistributedDataParallel around it, or around what holds it}, looked for once
_AROUND: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[DistributedDataParallel]]] = weakref.WeakKeyDictionary()


def refuse_join(model: nn.Module, what: str) -> None:
    """Raise a ReSegError if the model's DistributedDataParallel is in a `join()` context that outlives a process.

    In it a process that has no batches left answers for the model's own DistributedDataParallel, once a step, and for
    nothing else: whatever others send beside that aborts them all. `what` says what that is.
    """
    if world_size() == 1 or torch.compiler.is_compiling():
        return
    known = _AROUND.get(model)
    if known is None or (known and not any(ref() for ref in known)):
        # nothing in a module tells what it is wrapped in, and it may be wrapped after this library has seen it
        wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
        _AROUND[model] = [weakref.ref(x) for x in wrappers if any(m is model for m in x.modules())]
    for wrapper in (ref() for ref in _AROUND[model]):
        config = None if wrapper is None else wrapper._join_config
        if config is not None and config.enable and not config.throw_on_early_termination:
            raise ReSegError(
                f"the model's DistributedDataParallel is in a join() context, where {what}, so a process that has no "
                "batches left would abort the others. Give every process as many batches (DistributedSampler, "
                "drop_last=True) and leave join() out, or end all with the first: join(throw_on_early_termination=True)"
            )


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
