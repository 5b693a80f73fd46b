"""A plan as plain values and back, for states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..common.state import plain
from ..errors import ReSegError
from . import Level, Tap, TapPlan

_SEEN = {"channels": int, "layout": str, "spatial": [int], "stride": [int], "mutated": bool}
_TAP = {"tap": str, **_SEEN}

# what `plan_to_dict` writes down, for `check_state`
PLAN = {"levels": [{"encoder": _TAP, "decoder": _TAP, "selected": bool}], "bottleneck": _TAP}


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


def refuse_other_channels(mine: TapPlan, theirs: TapPlan) -> None:
    """Raise a ReSegError if a tap of the same name has different channels in two plans: they are of two models."""
    here = {str(tap): tap.channels for tap in _taps(mine)}
    for tap in _taps(theirs):
        if here.get(str(tap), tap.channels) != tap.channels:
            raise ReSegError(
                f"this state is of another model: {tap} has {tap.channels} channels there and {here[str(tap)]} here"
            )


def _taps(plan: TapPlan) -> list[Tap]:
    return [*(tap for level in plan.levels for tap in (level.encoder, level.decoder)), plan.bottleneck]


def _sizeless(plan: TapPlan) -> list[Any]:
    return [*(replace(tap, spatial=()) for tap in _taps(plan)), *(level.selected for level in plan.levels)]


def _tap_to_dict(tap: Tap) -> dict[str, Any]:
    return {"tap": str(tap), **{name: plain(getattr(tap, name)) for name in _SEEN}}


def _tap_from_dict(state: Mapping[str, Any]) -> Tap:
    seen = {name: tuple(state[name]) if isinstance(kind, list) else state[name] for name, kind in _SEEN.items()}
    return replace(Tap.parse(state["tap"]), **seen)
