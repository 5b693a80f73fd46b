"""Glue for frameworks that own the training loop; each module imports only its own. See README.md in this folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..alignment.wrapper import ReSegWrapper
from ..common.distributed import gathered, rank, world_size
from ..common.dryrun import restore_rng, rng_state
from ..consistency import CutMixConsistency
from ..errors import ReSegError
from ..semi import SemiSupervised

Averaging = CutMixConsistency | SemiSupervised  # what has an `average` that follows by `update`


def checked(fit_recon: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `ReSegWrapper.fit_recon`. An unknown one raises a TypeError now, not when stage 1 starts."""
    inspect.signature(ReSegWrapper.fit_recon).bind(None, None, **fit_recon)
    return fit_recon


@contextmanager
def averaged(trained: Averaging) -> Iterator[None]:
    """The model has the mean teacher's parameters and buffers inside the block; afterwards its own again, bit for bit.

    Values are copied in place, so compiled and captured models find them at the same addresses.
    """
    pairs = [
        (mine, theirs)
        for what in ("parameters", "buffers")
        for mine, theirs in zip(getattr(trained.model, what)(), getattr(trained.average, what)())
    ]
    with torch.no_grad():
        kept = [mine.clone() for mine, _ in pairs]
        for mine, theirs in pairs:
            mine.copy_(theirs)
    try:
        yield
    finally:
        with torch.no_grad():
            for (mine, _), value in zip(pairs, kept):
                mine.copy_(value)


def follow(trained: Averaging, optimizers: Iterable[torch.optim.Optimizer], caller: str) -> Callable[[], None]:
    """Call `update()` after each step of the last optimizer that has parameters of the model.

    Until it is ended, any other call of `update()` raises, because the mean teacher would then follow twice as fast.

    Returns:
        A function that ends this.

    Raises:
        ReSegError: no optimizer has parameters of the model.
    """
    own = {id(p) for p in trained.model.parameters()}
    known = [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]
    if not known:
        raise ReSegError(
            f"no optimizer has parameters of the model that {type(trained).__name__} averages; was the optimizer made "
            "for another model?"
        )
    update, of_instance = trained.update, vars(trained).get("update")

    def refused() -> None:
        raise ReSegError(f"{caller} calls update() after each optimizer step; remove your own call")

    trained.update = refused
    handle = known[-1].register_step_post_hook(lambda *_: update())

    def end() -> None:
        handle.remove()
        vars(trained).pop("update", None)
        if of_instance is not None:
            trained.update = of_instance

    return end


def version(model: nn.Module) -> int:
    """A number that grows with whatever is written into the parameters."""
    return sum(p._version for p in model.parameters())


def random_states() -> list[dict[str, Any]]:
    """The random states of every process, by rank. All processes must call this."""
    return gathered(rng_state())


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Restore this process's entry of `random_states`. If the number of processes has changed, nothing is restored."""
    if len(states) == world_size():
        restore_rng(states[rank()])
