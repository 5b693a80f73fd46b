"""States and their files: taps as plain values, for checkpoints that load with weights_only=True."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .errors import ReSegError
from .processes import rank, world_size
from .taps import Level, Tap, TapPlan


def plan_to_dict(plan: TapPlan) -> dict[str, Any]:
    """A plan as strings, numbers and lists."""
    return {
        "levels": [
            {"encoder": _tap_to_dict(level.encoder), "decoder": _tap_to_dict(level.decoder), "selected": level.selected}
            for level in plan.levels
        ],
        "bottleneck": _tap_to_dict(plan.bottleneck),
    }


def plan_from_dict(state: Mapping[str, Any]) -> TapPlan:
    """The plan that `plan_to_dict` wrote down, without its notes."""
    levels = []
    for entry in state["levels"]:
        encoder, decoder = _tap_from_dict(entry["encoder"]), _tap_from_dict(entry["decoder"])
        levels.append(Level(encoder.stride, encoder.spatial, encoder, decoder, entry["selected"]))
    return TapPlan(tuple(levels), _tap_from_dict(state["bottleneck"]))


def same_taps(a: TapPlan, b: TapPlan) -> bool:
    """Whether two plans tap the same tensors, whatever the size of the images that they were found with."""
    return _sizeless(a) == _sizeless(b)


def check_format(state: Mapping[str, Any], known: int) -> None:
    """Raise a ReSegError unless a state is of the format that is known."""
    if "format" not in state:
        raise ReSegError("this is no state that state_dict() of this object gave; is it the model's?")
    if state["format"] != known:
        raise ReSegError(f"this state has format {state['format']!r}, not {known}; it is of another version")


def load_states(*pairs: tuple[nn.Module, Mapping[str, Any]]) -> None:
    """`load_state_dict` of every module, or of none.

    Raises:
        ReSegError: a state does not fit its module. All are then as they were, which torch does not see to.
    """
    before = [copy.deepcopy(module.state_dict()) for module, _ in pairs]
    try:
        for module, state in pairs:
            module.load_state_dict(state)
    except RuntimeError as error:
        for (module, _), state in zip(pairs, before):
            module.load_state_dict(state)
        lines = str(error).splitlines()
        more = f" (and {len(lines) - 3} lines more)" if len(lines) > 3 else ""
        raise ReSegError(f"this state is of another model: {' '.join(map(str.strip, lines[:3]))}{more}") from error


def write_atomically(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """torch.save that leaves either the old or the new file, whenever it is killed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write_atomically` wrote, None without a file; under torch.distributed rank 0's file counts for all.

    Raises:
        ReSegError: the file holds something else than a stage 1, on every rank.
    """
    read = [_read(path) if rank() == 0 and os.path.exists(path) else None]
    if world_size() > 1:
        dist.broadcast_object_list(read, 0)
    state = read[0]
    if isinstance(state, str):
        raise ReSegError(f"{path} is no file of stage 1, which would overwrite it; name another ({state})")
    return state


def _read(path: str | os.PathLike[str]) -> dict[str, Any] | str:
    """The stage 1 in a file, or why there is none: other ranks wait for it, so that it is not raised here."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file of another kind, one of many
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'it is empty'}"
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    return state if state.keys() >= {"wrapper", "history", "step"} else "it has other entries"


def _sizeless(plan: TapPlan) -> list[Any]:
    pairs = [(replace(e.encoder, spatial=()), replace(e.decoder, spatial=()), e.selected) for e in plan.levels]
    return [*pairs, replace(plan.bottleneck, spatial=())]


def _tap_to_dict(tap: Tap) -> dict[str, Any]:
    return {
        "tap": str(tap),
        "channels": tap.channels,
        "layout": tap.layout,
        "spatial": list(tap.spatial),
        "stride": list(tap.stride),
        "mutated": tap.mutated,
    }


def _tap_from_dict(state: Mapping[str, Any]) -> Tap:
    return replace(
        Tap.parse(state["tap"]),
        channels=state["channels"],
        layout=state["layout"],
        spatial=tuple(state["spatial"]),
        stride=tuple(state["stride"]),
        mutated=state["mutated"],
    )
