"""States: taps and NumPy's numbers as plain values, for checkpoints that load with weights_only=True."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from .errors import ReSegError
from .taps import Level, Tap, TapPlan

_TAP = {"tap": str, "channels": int, "layout": str, "spatial": [int], "stride": [int], "mutated": bool}
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
    """Raise a ReSegError where the taps of two plans have one name and other channels: they are of two models."""
    here = {str(tap): tap.channels for tap in _taps(mine)}
    for tap in _taps(theirs):
        if here.get(str(tap), tap.channels) != tap.channels:
            raise ReSegError(
                f"this state is of another model: {tap} has {tap.channels} channels there and {here[str(tap)]} here"
            )


def check_state(state: Any, kind: str, known: int, entries: Mapping[str, Any]) -> None:
    """Raise a ReSegError unless a state is whole: of this kind and of the format that is known, with these entries.

    Called before anything is changed, so that a state which does not fit leaves all as it was.

    Args:
        state: what was given to `load_state_dict`.
        kind: the class whose `state_dict` must have made it.
        known: the format that it must have.
        entries: what it holds beside its kind and format. A type, or a tuple of what is allowed, None too; a dict for
            a mapping with these entries and no others; a list of one for a list of such.
    """
    if not isinstance(state, Mapping) or "format" not in state:
        what = "" if isinstance(state, Mapping) else f" but a {type(state).__name__}"
        raise ReSegError(f"this is no state that state_dict() of a {kind} gave{what}; is it the model's?")
    if state.get("kind") != kind:
        made_by = f"a {state['kind']}" if "kind" in state else "an earlier version, which does not name its kind"
        raise ReSegError(f"this state is of {made_by}, and a {kind} is to load it")
    if state["format"] != known:
        raise ReSegError(f"this state has format {state['format']!r}, not {known}; it is of another version")
    _check_entry(state, {"kind": str, "format": int, **entries}, f"this state of a {kind}")


def _check_entry(value: Any, wanted: Any, where: str) -> None:
    allowed = wanted if isinstance(wanted, tuple) else (wanted,)
    for each in allowed:
        if isinstance(each, Mapping) and isinstance(value, Mapping):
            if missing := [repr(name) for name in each if name not in value]:
                raise ReSegError(f"{where} has no {', '.join(missing)}; it is not whole, or of another version")
            if unknown := [repr(name) for name in value if name not in each]:
                raise ReSegError(f"{where} has {', '.join(unknown)}, which is unknown here; it is of another version")
            for name, entry in each.items():
                _check_entry(value[name], entry, f"{name!r} of {where}")
            return
        if isinstance(each, list) and isinstance(value, (list, tuple)):
            for i, element in enumerate(value):
                _check_entry(element, each[0], f"element {i} of {where}")
            return
        fits = each is None and value is None
        if isinstance(each, type):
            kinds = (int, float) if each is float else (each,)  # a file of another program may hold 1 for 1.0
            fits = isinstance(value, kinds) and (not isinstance(value, bool) or each in (bool, object))
        if fits:
            return
    names = ["None" if x is None else (x if isinstance(x, type) else type(x)).__name__ for x in allowed]
    raise ReSegError(f"{where} is {_shown(value)}, not {' or '.join(names)}")


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value)[:40] if plain else f"a {type(value).__name__}"


def load_states(*pairs: tuple[nn.Module, Mapping[str, Any]]) -> None:
    """`load_state_dict` of every module, or of none.

    Raises:
        ReSegError: a state does not fit its module. All are then as they were, which torch does not see to.
    """
    before = [copy.deepcopy(module.state_dict()) for module, _ in pairs]
    try:
        for module, state in pairs:
            module.load_state_dict(state)
    except Exception as error:  # a module may read its state by code of its own
        for (module, _), state in zip(pairs, before):
            module.load_state_dict(state)
        lines = str(error).splitlines() or [type(error).__name__]
        more = f" (and {len(lines) - 3} lines more)" if len(lines) > 3 else ""
        raise ReSegError(f"this state is of another model: {' '.join(map(str.strip, lines[:3]))}{more}") from error


def plain_state(value: Any) -> Any:
    """The same with NumPy's numbers as Python's and its arrays as tensors, at any depth of dicts, lists and tuples.

    Other values stay: they may be plain or not.
    """
    kind, numpy = type(value), sys.modules.get("numpy")
    if kind in (dict, OrderedDict):
        return kind((plain_state(key), plain_state(entry)) for key, entry in value.items())
    if kind in (list, tuple):
        return kind(plain_state(entry) for entry in value)
    if numpy and isinstance(value, numpy.ndarray) and value.ndim:
        try:
            return torch.from_numpy(numpy.array(value))
        except (TypeError, ValueError):  # strings, objects, or bytes in another order
            return plain_state(value.tolist())
    if numpy and isinstance(value, (numpy.generic, numpy.ndarray)):
        value = value.item()
    if isinstance(value, bool) or type(value) in (int, float):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return str.__str__(value) if isinstance(value, str) else value


def _taps(plan: TapPlan) -> list[Tap]:
    return [*(tap for level in plan.levels for tap in (level.encoder, level.decoder)), plan.bottleneck]


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
