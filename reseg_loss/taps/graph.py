"""Step 3: the trace as a graph of feature maps, in which calls can be folded into one node or opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import takewhile

from . import layouts
from .axes import follow
from .trace import Call, Keys, Ref, Trace

Size = tuple[int, ...]


def covers(fine: Size, coarse: Size) -> bool:
    """Whether `fine` is at least as fine as `coarse` along every axis."""
    return all(a >= b for a, b in zip(fine, coarse))


def reached(start: Iterable[int], sources: Callable[[int], Iterable[int]]) -> set[int]:
    """`start` and everything that it was computed from."""
    seen, todo = set(start), list(start)
    while todo:
        new = [source for source in sources(todo.pop()) if source not in seen]
        seen.update(new)
        todo += new
    return seen


def _edge(node: int, sources: Callable[[int], Iterable[int]], inside: Callable[[int], bool]) -> list[int]:
    """The nearest sources of a node that are not `inside`; it looks through those that are."""
    found: list[int] = []
    seen, todo = {node}, [node]
    while todo:
        for source in sources(todo.pop()):
            if source not in seen:
                seen.add(source)
                (todo if inside(source) else found).append(source)
    return found


class Graph:
    """A trace with what the tap finder needs: sizes and sources of nodes, and the calls that return or take them."""

    def __init__(self, trace: Trace) -> None:
        self.nodes, self.calls, self.trace = trace.nodes, trace.calls, trace
        self.batch, self.image = trace.image[0], trace.image[2:]
        self.inputs = {node.index for node in self.nodes if node.operator == "input"}
        self.outputs = list(dict.fromkeys(n for _, n in self.calls[0].outputs if self.nodes[n].dynamic))
        self.returned: dict[int, list[tuple[Call, Keys]]] = {}
        self.taken: dict[int, list[tuple[Call, Keys]]] = {}
        for call in self.calls[1:]:
            for keys, node in call.outputs:
                self.returned.setdefault(node, []).append((call, keys))
            for keys, node in call.inputs:
                self.taken.setdefault(node, []).append((call, keys))
        self._grids, self.hidden = follow(trace)

    def grid(self, node: int) -> layouts.Grid | None:
        """A node's layout over the image; None if it is not a feature map but attention, windows or a pooled vector."""
        return self._grids[node]

    def read(self, node: int, layout: str) -> layouts.Grid | None:
        """A node's layout over the image, read in the layout that the user passed; None if that does not fit."""
        grid = self._grids[node]
        if grid is not None and grid.layout == layout:
            return grid
        seen = {math.prod(grid.spatial): grid.spatial for grid in self._grids if grid}
        found = layouts.readings(self.nodes[node].shape, self.batch, self.image, seen)
        return next((grid for grid in found if grid.layout == layout), None)

    def size(self, node: int) -> Size | None:
        """The spatial size of a node: its level."""
        return grid.spatial if (grid := self.grid(node)) else None

    def channels(self, node: int) -> int:
        """The channels of a node; 0 if it is not a feature map."""
        return grid.channels if (grid := self.grid(node)) else 0

    def before_going_up(self, node: int) -> int:
        """The input of a bare 1x1 convolution, if only interpolation follows it; else the node itself.

        The two commute, so such a convolution belongs to the upsampling, whichever comes first.
        """
        made = self.nodes[node]
        weight = made.arguments.get("weight")
        if made.operator != "aten::convolution" or not isinstance(weight, Ref) or set(weight.shape[2:]) != {1}:
            return node
        users = [later.operator for later in self.nodes[node + 1 :] if node in later.sources]
        goes_up = bool(users) and all("upsample" in operator for operator in users)
        return made.sources[0] if goes_up and self.size(made.sources[0]) == self.size(node) else node

    def ancestors(self, nodes: Iterable[int]) -> set[int]:
        """`nodes` and everything that they were computed from."""
        return reached(nodes, lambda node: self.nodes[node].sources)

    def descendants(self, node: int) -> set[int]:
        """`node` and everything that was computed from it."""
        seen = {node}
        for later in self.nodes[node + 1 :]:
            if not seen.isdisjoint(later.sources):
                seen.add(later.index)
        return seen

    @cached_property
    def depth(self) -> list[int]:
        """The longest path of operators from the input to each node."""
        depth: list[int] = []
        for node in self.nodes:
            depth.append(1 + max((depth[source] for source in node.sources), default=0))
        return depth

    @cached_property
    def lineage(self) -> list[tuple[int, ...]]:
        """For every node, the calls in which it was made, starting with the model's; empty for inputs."""
        lineage: list[tuple[int, ...]] = [()] * len(self.nodes)
        for call in self.calls:  # in order of their start, so inner calls come later
            if call.start < call.end:
                line = (*lineage[call.start], call.index)
                lineage[call.start : call.end] = [line] * (call.end - call.start)
        return lineage

    def working(self, call: int) -> list[int]:
        """The children of a call that compute something."""
        return [inner.index for inner in self.inside(call) if inner.parent == call and inner.start < inner.end]

    def inside(self, call: int) -> list[Call]:
        """All calls made within a call, not including itself."""
        # calls are in order of their start, so what comes after it up to the next call outside
        return [*takewhile(lambda inner: inner.parent >= call, self.calls[call + 1 :])]

    def where(self, node: int) -> str:
        """The innermost module that made a node, for messages."""
        line = self.lineage[node]
        return (self.calls[line[-1]].name if line else "") or "the model's own forward"


class Folded:
    """The graph with every call folded to one node, except those in `opened`."""

    def __init__(self, graph: Graph, opened: frozenset[int]) -> None:
        self.graph, self.opened = graph, opened
        self._sources: dict[int, tuple[int, ...]] = {}

    def owner(self, node: int) -> int | None:
        """The folded call that made a node; None if an opened call made it directly."""
        return next((call for call in self.graph.lineage[node] if call not in self.opened), None)

    def sources(self, node: int) -> tuple[int, ...]:
        """The feature maps and model inputs from which a node's folded call computed it."""
        if node not in self._sources:
            self._sources[node] = tuple(self._maps(node, self._direct))
        return self._sources[node]

    def placed(self, node: int) -> set[int]:
        """Those `sources` that give a node its places; the others reach it only as keys and values of an attention."""
        return {*self._maps(node, lambda n: () if _is_attention(self.graph, n) else self._direct(n))}

    def _maps(self, node: int, direct: Callable[[int], Sequence[int]]) -> Sequence[int]:
        """The next feature maps and model inputs on the way up from a node."""
        graph = self.graph
        return _edge(node, direct, lambda n: n not in graph.inputs and graph.size(n) is None)

    def _direct(self, node: int) -> Sequence[int]:
        graph, owner = self.graph, self.owner(node)
        if owner is None:
            return graph.nodes[node].sources
        return _edge(node, lambda n: graph.nodes[n].sources, lambda n: n >= graph.calls[owner].start)


def _is_attention(graph: Graph, node: int) -> bool:
    """Whether a node is a product of activations. It has the places of its query, not those of keys and values."""
    made = graph.nodes[node]
    product = any(name in made.operator for name in ("scaled_dot_product", "::bmm", "::matmul", "::baddbmm"))
    return product and len(made.sources) > 1
