"""From a node of the graph to the tap by which a hook sees it."""

from __future__ import annotations

from .graph import Graph
from .layouts import Grid
from .tap import Tap
from .trace import Call, Keys

# Operators that keep the values of a feature map: what they return may be tapped at their source.
_SAME_VALUES = {
    *("alias", "inplace", "aten::_reshape_alias", "aten::_to_copy", "aten::_unsafe_view", "aten::alias", "aten::clone"),
    *("aten::detach", "aten::expand", "aten::permute", "aten::slice", "aten::squeeze", "aten::t", "aten::transpose"),
    *("aten::unsqueeze", "aten::view"),
}


def tap_at(graph: Graph, node: int, inputs: bool = True, views: bool = True) -> Tap | None:
    """The tap that yields `node`: preferably a module's output, else (with `inputs`) a module's input.

    With `views`, `node` may also be a view or a copy of that output. None if no hook sees the node.
    """
    source = node
    while True:
        if graph.size(source) and (found := graph.returned.get(source)):
            # Modules that computed it before those that pass it on; a tensor before a tuple's element; the outermost
            # module first.
            call, keys = min(found, key=lambda h: (not h[0].start <= source < h[0].end, len(h[1]), h[0].index))
            return tap_of(graph, call, keys, source, is_input=False)
        if not views or graph.nodes[source].operator not in _SAME_VALUES or len(graph.nodes[source].sources) != 1:
            break
        source = graph.nodes[source].sources[0]
    if inputs and graph.size(node) and (found := graph.taken.get(node)):
        return tap_of(graph, *found[0], node, is_input=True)
    return None


def tap_of(graph: Graph, call: Call, keys: Keys, node: int, is_input: bool, grid: Grid | None = None) -> Tap:
    """The tap for the output or input of `call` under `keys`; `grid` is its layout over the image, if known."""
    grid = grid or graph.grid(node)
    assert grid is not None, "callers ask only for feature maps"
    if is_input and keys == (0,):
        keys = ()  # the short way to write the first argument
    mutated = graph.trace.mutated(node, call.start if is_input else call.end)
    return Tap(call.name, *grid, keys=keys, call=call.count, is_input=is_input, mutated=mutated)
