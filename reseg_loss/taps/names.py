"""From a node of the graph to the tap that names it, and back from what a user wrote."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..errors import TapError, did_you_mean
from .graph import Graph
from .record import Call, Keys, named_modules
from .tap import Tap

# Operators that keep the values of a feature map: what they return may be tapped at their source.
_SAME_VALUES = {
    *("alias", "inplace", "aten::_reshape_alias", "aten::_to_copy", "aten::_unsafe_view", "aten::alias", "aten::clone"),
    *("aten::detach", "aten::expand", "aten::permute", "aten::slice", "aten::squeeze", "aten::t", "aten::transpose"),
    *("aten::unsqueeze", "aten::view"),
}


def tap_at(graph: Graph, node: int, inputs: bool = True, views: bool = True) -> Tap | None:
    """The tap that yields `node`: preferably a module's output, else (with `inputs`) what a module takes in.

    With `views` the output may also be one that `node` is only a view or a copy of. None if no hook sees the node.
    """
    source = node
    while True:
        if graph.size(source) and (found := graph.returned.get(source)):
            # Modules that computed it before those that pass it on; a tensor before a tuple's element; the largest,
            # then the outermost module.
            call, keys = min(
                found,
                key=lambda hit: (
                    not hit[0].start <= source < hit[0].end,
                    len(hit[1]),
                    -hit[0].parameters,
                    hit[0].index,
                ),
            )
            return _tap(graph, call, keys, source, is_input=False)
        if not views or graph.nodes[source].operator not in _SAME_VALUES or len(graph.nodes[source].sources) != 1:
            break
        source = graph.nodes[source].sources[0]
    if inputs and graph.size(node) and (found := graph.taken.get(node)):
        return _tap(graph, *found[0], node, is_input=True)
    return None


def _tap(graph: Graph, call: Call, keys: Keys, node: int, is_input: bool) -> Tap:
    grid = graph.grid(node)
    assert grid is not None, "callers ask only for feature maps"
    if is_input and keys == (0,):
        keys = ()  # the short way to write the first argument
    mutated = graph.record.mutated(node, replace(call, end=call.start) if is_input else call)
    return Tap(call.name, *grid, keys=keys, call=call.count, is_input=is_input, mutated=mutated)


def resolve(graph: Graph, model: nn.Module, tap: str | Tap) -> Tap:
    """The tap a user named, with its shape as the dry forward showed it.

    Raises:
        TapError: the module, the call or the key does not exist, or the tensor there is no feature map.
    """
    tap = Tap.parse(tap) if isinstance(tap, str) else tap
    modules = named_modules(model)
    name = tap.module if tap.module in modules else _plain(tap.module)
    if name not in modules:
        raise TapError(f"the model has no module {tap.module!r}.{did_you_mean(name, modules)}")
    calls = [call for call in graph.calls if call.module is modules[name]]
    if not calls:
        raise TapError(
            f"tap {tap}: the forward never calls {name!r} itself"
            + (", only modules inside it; name one of those" if list(modules[name].children()) else "")
        )
    call = next((call for call in calls if call.count == tap.call), None)
    if call is None:
        raise TapError(f"tap {tap}: {name!r} is called {len(calls)} time(s) in a forward, counted from @0")
    slots = call.inputs if tap.is_input else call.outputs
    wanted = tap.keys or (slots[0][0] if tap.is_input and slots else ())
    hit = next(((keys, node) for keys, node in slots if _matches(wanted, keys, slots)), None)
    if hit is None:
        verb = "takes" if tap.is_input else "returns"
        shown = ", ".join("".join(f"[{key}]" for key in keys) + f" {graph.nodes[node].shape}" for keys, node in slots)
        raise TapError(f"tap {tap}: {name!r} {verb} {shown or 'no tensor'}; choose one of these by its key")
    keys, node = hit
    if graph.grid(node) is None:
        raise TapError(
            f"tap {tap}: a tensor of shape {graph.nodes[node].shape} is no feature map of an image of size {graph.image}"
        )
    return replace(_tap(graph, call, keys, node, tap.is_input), module=name)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod").removeprefix("module.")


def _matches(wanted: Keys, keys: Keys, slots: list[tuple[Keys, int]]) -> bool:
    """Whether `wanted` is written for `keys`: negative positions count from the end, '0' and 0 are the same key."""
    if len(wanted) != len(keys):
        return False
    for depth, (ask, key) in enumerate(zip(wanted, keys)):
        if isinstance(ask, int) and ask < 0:
            ask += len({other[depth] for other, _ in slots if other[:depth] == keys[:depth] and len(other) > depth})
        if str(ask) != str(key):
            return False
    return True
