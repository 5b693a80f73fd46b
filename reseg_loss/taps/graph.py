"""Step 3: the trace as a graph over feature maps, in which calls can be folded to one node or opened."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from . import layouts
from .axes import follow, grid_of
from .trace import Call, Keys, Ref, Trace

Size = tuple[int, ...]


def covers(fine: Size, coarse: Size) -> bool:
    """Whether `fine` is at least as fine as `coarse` along every axis."""
    return all(a >= b for a, b in zip(fine, coarse))


class Graph:
    """What finding taps asks of a trace: sizes of nodes, where they come from, which calls return or take them."""

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
        axes, self.hidden = follow(trace)
        self._grids = [grid_of(each, self.batch, self.image) if each else None for each in axes]

    def grid(self, node: int) -> layouts.Grid | None:
        """How a node lies over the image; None for what is no feature map: attention, windows, pooled vectors."""
        return self._grids[node]

    def read(self, node: int, layout: str) -> layouts.Grid | None:
        """How a node lies over the image in a layout that the user gives."""
        grid = self._grids[node]
        if grid is not None and grid.layout == layout:
            return grid
        seen = {math.prod(grid.spatial): grid.spatial for grid in self._grids if grid}
        found = layouts.readings(self.nodes[node].shape, self.batch, self.image, seen)
        return next((grid for grid in found if grid.layout == layout), None)

    def size(self, node: int) -> Size | None:
        """The spatial size of a node: its level."""
        grid = self.grid(node)
        return grid.spatial if grid else None

    def channels(self, node: int) -> int:
        """The channels of a node, 0 if it is no feature map."""
        grid = self.grid(node)
        return grid.channels if grid else 0

    @cached_property
    def users(self) -> dict[int, list[int]]:
        """For every node that is used, those computed from it."""
        users: dict[int, list[int]] = {}
        for node in self.nodes:
            for source in node.sources:
                users.setdefault(source, []).append(node.index)
        return users

    def before_going_up(self, node: int) -> int:
        """What a bare 1x1 convolution takes in, if all that follows it is interpolation; else the node itself.

        The two commute, so such a convolution is a part of going up, whichever comes first.
        """
        made, users = self.nodes[node], self.users.get(node, [])
        weight = made.arguments.get("weight")
        if made.operator != "aten::convolution" or not isinstance(weight, Ref) or set(weight.shape[2:]) != {1}:
            return node
        goes_up = bool(users) and all("upsample" in self.nodes[user].operator for user in users)
        return made.sources[0] if goes_up and self.size(made.sources[0]) == self.size(node) else node

    def ancestors(self, nodes: Iterable[int]) -> set[int]:
        """`nodes` and all that they were computed from."""
        seen, todo = set(nodes), list(nodes)
        while todo:
            new = [source for source in self.nodes[todo.pop()].sources if source not in seen]
            seen.update(new)
            todo += new
        return seen

    def descendants(self, node: int) -> set[int]:
        """`node` and all that was computed from it."""
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
        """For every node the calls in which it was made, the model's first; none for inputs."""
        lineage: list[tuple[int, ...]] = [()] * len(self.nodes)
        for call in self.calls:  # in order of their start, so inner calls come later
            if call.start < call.end:
                line = (*lineage[call.start], call.index)
                lineage[call.start : call.end] = [line] * (call.end - call.start)
        return lineage

    def working(self, call: int) -> list[int]:
        """The children of a call that compute something."""
        return [child for child in self.calls[call].children if self.calls[child].start < self.calls[child].end]

    def inside(self, call: int) -> list[Call]:
        """All calls made within a call, itself not included."""
        found: list[Call] = []
        todo = list(self.calls[call].children)
        while todo:
            found.append(self.calls[todo.pop()])
            todo += found[-1].children
        return found

    def sizes_inside(self, call: int) -> set[Size]:
        """The levels at which the calls within a call return something."""
        return {size for inner in self.inside(call) for _, node in inner.outputs if (size := self.size(node))}

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
        """The folded call that made a node; None if an opened call did so itself."""
        return next((call for call in self.graph.lineage[node] if call not in self.opened), None)

    def sources(self, node: int) -> tuple[int, ...]:
        """The feature maps, and inputs of the model, from which a node's folded call computed it."""
        if node not in self._sources:
            found: list[int] = []
            seen = {node}
            todo = [node]
            while todo:
                for source in self._direct(todo.pop()):
                    if source not in seen:
                        seen.add(source)
                        known = source in self.graph.inputs or self.graph.size(source) is not None
                        (found if known else todo).append(source)
            self._sources[node] = tuple(found)
        return self._sources[node]

    def _direct(self, node: int) -> list[int]:
        owner = self.owner(node)
        if owner is None:
            return list(self.graph.nodes[node].sources)
        start = self.graph.calls[owner].start
        found: list[int] = []
        seen, todo = {node}, [node]
        while todo:
            for source in self.graph.nodes[todo.pop()].sources:
                if source not in seen:
                    seen.add(source)
                    (todo if source >= start else found).append(source)
        return found
