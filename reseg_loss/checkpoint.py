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
