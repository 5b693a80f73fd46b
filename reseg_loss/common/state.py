"""States: checks, and plain values for checkpoints that load with weights_only=True."""

from __future__ import annotations

import copy
import io
import sys
from collections import OrderedDict
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReSegError


def check_state(state: Any, kind: str, known: int, entries: Mapping[str, Any]) -> None:
    """Raise a ReSegError unless a state is complete: of this kind, in the known format, with these entries.

    It is called before anything is changed, so a state that does not fit changes nothing.

    Args:
        state: what was given to `load_state_dict`.
        kind: the class whose `state_dict` must have made it.
        known: the format that it must have.
        entries: what it holds other than its kind and format. A type, or a tuple of what is allowed, including None; a
            dict for a mapping with exactly these entries; a list with one item for a list of such items.
    """
    if not isinstance(state, Mapping) or "format" not in state:
        what = "" if isinstance(state, Mapping) else f" but a {type(state).__name__}"
        raise ReSegError(f"this is not the state_dict() of a {kind}{what}; is it the model's?")
    if state.get("kind") != kind:
        made_by = f"a {state['kind']}" if "kind" in state else "something that does not name its kind"
        raise ReSegError(f"this state is of {made_by}, but it is loaded into a {kind}")
    if state["format"] != known:
        raise ReSegError(f"this state has format {state['format']!r}, not {known}; it is from another version")
    check_entries(state, {"kind": str, "format": int, **entries}, f"this state of a {kind}")


def check_entries(value: Any, wanted: Any, where: str) -> None:
    """Raise a ReSegError unless a value is as `wanted`, which is written as `entries` of `check_state`."""
    allowed = wanted if isinstance(wanted, tuple) else (wanted,)
    for each in allowed:
        if isinstance(each, Mapping) and isinstance(value, Mapping):
            if missing := [repr(name) for name in each if name not in value]:
                raise ReSegError(f"{where} has no {', '.join(missing)}; it is incomplete, or from another version")
            if unknown := [repr(name) for name in value if name not in each]:
                raise ReSegError(f"{where} has {', '.join(unknown)}, which is unknown here; it is from another version")
            for name, entry in each.items():
                check_entries(value[name], entry, f"{name!r} of {where}")
            return
        if isinstance(each, list) and isinstance(value, (list, tuple)):
            for i, element in enumerate(value):
                check_entries(element, each[0], f"element {i} of {where}")
            return
        fits = each is None and value is None
        if isinstance(each, type):
            kinds = (int, float) if each is float else (each,)  # a file of another program may hold 1 for 1.0
            fits = isinstance(value, kinds) and (not isinstance(value, bool) or each in (bool, object))
        if fits:
            return
    names = ["None" if x is None else (x if isinstance(x, type) else type(x)).__name__ for x in allowed]
    simple = value is None or isinstance(value, (bool, int, float, str))
    shown = repr(value)[:40] if simple else f"a {type(value).__name__}"
    raise ReSegError(f"{where} is {shown}, not {' or '.join(names)}")


def load_states(*pairs: tuple[nn.Module, Mapping[str, Any]]) -> None:
    """`load_state_dict` of every module, or of none.

    Raises:
        ReSegError: a state does not fit its module. All modules are then unchanged, which torch does not ensure.
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
    """The value with NumPy numbers as Python numbers and arrays as tensors, in nested dicts, lists and tuples.

    Other values stay as they are, whether they are plain or not.
    """
    kind, numpy = type(value), sys.modules.get("numpy")
    if kind in (dict, OrderedDict):
        return kind((plain_state(key), plain_state(entry)) for key, entry in value.items())
    if kind in (list, tuple):
        return kind(plain_state(entry) for entry in value)
    if numpy and isinstance(value, (numpy.generic, numpy.ndarray)):
        if value.ndim:
            try:
                return torch.from_numpy(numpy.array(value))
            except (TypeError, ValueError):  # strings, objects, or bytes in another order
                return plain_state(value.tolist())
        value = value.item()
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return str.__str__(value) if isinstance(value, str) else value


def plain(value: Any) -> Any:
    """`plain_state` of a value, with tensors and tuples as lists and dtypes as names, so that == compares it."""
    value = plain_state(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


_READABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device, Tensor)


def unreadable(value: Any, where: str = "") -> str | None:
    """The first entry that torch.load(weights_only=True) would not read, as "path is a type"; None if it reads all."""
    kind = type(value)
    if kind in _READABLE or kind is nn.Parameter:
        return None
    if kind in (dict, OrderedDict):
        entries = [(f"the key {key!r}" + (f" of {where}" if where else ""), key) for key in value]
        entries += [(f"{where}.{key}" if where else str(key), entry) for key, entry in value.items()]
    elif kind in (list, tuple):
        entries = [(f"{where}.{i}", entry) for i, entry in enumerate(value)]
    else:
        return None if _survives(value) else f"{where} is a {kind.__module__}.{kind.__qualname__}"
    return next((wrong for name, entry in entries if (wrong := unreadable(entry, name))), None)


def _survives(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of pickling or unpickling any type there is
        return False
    return True
