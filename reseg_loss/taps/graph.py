"""Stage 2: the record as a graph over feature maps, in which calls can be folded to one node or opened."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from .. import formats
from .record import Call, Keys, Record

Size = tuple[int, ...]
_SPATIAL_OPERATORS = ("conv", "pool", "upsample")
# what tells where the channels are, in the names of operators
_FIRST, _LAST = (*_SPATIAL_OPERATORS, "batch_norm", "group_norm"), ("layer_norm", "rms_norm")
_EXCHANGES = ("aten::permute", "aten::transpose")


def covers(fine: Size, coarse: Size) -> bool:
    """Whether `fine` is at least as fine as `coarse` along every axis."""
    return all(a >= b for a, b in zip(fine, coarse))


class Graph:
    """What the stages ask of a record: sizes of nodes, where they come from, which calls return or take them."""

    def __init__(self, record: Record) -> None:
        self.nodes, self.calls, self.record = record.nodes, record.calls, record
        self.batch, self.image = record.image[0], record.image[2:]
        self.inputs = {node.index for node in self.nodes if node.operator == "input"}
        self.outputs = list(dict.fromkeys(n for _, n in self.calls[0].outputs if self.nodes[n].dynamic))
        self.returned: dict[int, list[tuple[Call, Keys]]] = {}
        self.taken: dict[int, list[tuple[Call, Keys]]] = {}
        for call in self.calls[1:]:
            for keys, node in call.outputs:
                self.returned.setdefault(node, []).append((call, keys))
            for keys, node in call.inputs:
                self.taken.setdefault(node, []).append((call, keys))
        self._grids: dict[tuple[int, ...], formats.Grid | None] = {}

    @cached_property
    def _spatial(self) -> set[Size]:
        """The sizes that convolutions, poolings and interpolations made."""
        return {
            node.shape[2:]
            for node in self.nodes
            if any(kind in node.operator for kind in _SPATIAL_OPERATORS) and len(node.shape) == len(self.image) + 2
        }

    @cached_property
    def _tokens(self) -> dict[int, Size]:
        """Token grids of uncommon strides: those of the maps that tokens are made of."""
        known = formats.token_grids(self.image)
        sizes = sorted((s for s in self._spatial if min(s) >= 2 and formats.strides(s, self.image)), reverse=True)
        return {math.prod(size): size for size in sizes if math.prod(size) not in known}

    def grid(self, node: int) -> formats.Grid | None:
        """How a node lies over the image; None for what is no feature map: attention, windows, pooled vectors."""
        shape = self.nodes[node].shape
        if _equal_sides(shape):
            return self._equal_sided.get(node)
        if shape not in self._grids:
            self._grids[shape] = self._interpret(shape)
        return self._grids[shape]

    def read(self, node: int, layout: str) -> formats.Grid | None:
        """How a node lies over the image in a layout that the user gives."""
        return formats.interpret(self.nodes[node].shape, self.batch, self.image, self._tokens, layout)

    @cached_property
    def _equal_sided(self) -> dict[int, formats.Grid]:
        """The grids of nodes whose channels equal their size: by the operators around them, for the shape is silent."""
        users, grids = self.record.users(), {}
        for node in self.nodes:
            if not _equal_sides(node.shape):
                continue
            ways = formats.readings(node.shape, self.batch, self.image, self._tokens)
            if not (ways := [grid for grid in ways if self._believed(grid)]):
                continue
            hints = [
                _told(node.operator),
                *(self._use(node.index, user) for user in users.get(node.index, ())),
                *(self._passed_on(node.index, source, grids.get(source)) for source in node.sources),
            ]
            sides = {_side(grid.layout): grid for grid in reversed(ways)}  # the likeliest of each
            grids[node.index] = next((sides[hint] for hint in hints if hint in sides), ways[0])
        return grids

    def _use(self, node: int, user: int) -> str:
        """Where the channels of a node are, going by what takes it in."""
        taken, into = self.nodes[node].shape, self.nodes[user]
        rows = len(into.shape) == 2 and into.shape[1] == taken[-1]  # of a linear layer
        return "last" if rows else _told(into.operator)

    def _passed_on(self, node: int, source: int, grid: formats.Grid | None) -> str:
        """Where the channels of a node are, going by what it was made of; `grid` is the source's, if equal-sided."""
        made, origin = self.nodes[node], self.nodes[source]
        if len(origin.shape) == 2:
            return "last" if origin.shape[1] == made.shape[-1] else ""
        if grid is None and not _equal_sides(origin.shape):
            grid = self.grid(source)
        if grid is None:
            return ""
        if len(made.shape) == len(self.image) + 1 and grid.spatial == self.image:
            return "none"  # a map that has lost its axis of channels
        side = _side(grid.layout)
        exchanged = made.operator in _EXCHANGES and made.shape == origin.shape
        return {"first": "last", "last": "first"}.get(side, side) if exchanged else side

    def _interpret(self, shape: tuple[int, ...]) -> formats.Grid | None:
        dims, size = len(self.image), shape[2:]
        stride = formats.strides(size, self.image) if shape[:1] == (self.batch,) and size in self._spatial else None
        if stride:
            return formats.Grid(size, shape[1], formats.CHANNELS_FIRST[dims], stride)
        grid = formats.interpret(shape, self.batch, self.image, self._tokens)
        return grid if grid is not None and self._believed(grid) else None

    def _believed(self, grid: formats.Grid) -> bool:
        """In 2D an uneven grid may be attention's (heads, tokens): believed only where a spatial operator made it."""
        return len(self.image) != 2 or len(set(grid.stride)) == 1 or grid.spatial in self._spatial

    def size(self, node: int) -> Size | None:
        """The spatial size of a node: its level."""
        grid = self.grid(node)
        return grid.spatial if grid else None

    def channels(self, node: int) -> int:
        """The channels of a node, 0 if it is no feature map."""
        grid = self.grid(node)
        return grid.channels if grid else 0

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
    def _lineage(self) -> list[tuple[int, ...]]:
        """For every node the calls in which it was made, the model's first."""
        lineage: list[tuple[int, ...]] = [()] * len(self.nodes)
        for call in self.calls:  # in order of their start, so inner calls come later
            if call.start < call.end:
                line = (*lineage[call.start], call.index)
                lineage[call.start : call.end] = [line] * (call.end - call.start)
        return lineage

    def lineage(self, node: int) -> tuple[int, ...]:
        """The calls in which a node was made, outermost first; empty for inputs."""
        return self._lineage[node]

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
        line = self.lineage(node)
        return (self.calls[line[-1]].name if line else "") or "the model's own forward"


def _equal_sides(shape: tuple[int, ...]) -> bool:
    """Whether all axes but the batch are as long, so that a shape does not tell which of them are the channels."""
    return len(shape) > 2 and len(set(shape[1:])) == 1


def _told(operator: str) -> str:
    """Where an operator has the channels of what it takes in and gives out; empty if it does not care."""
    return "first" if any(k in operator for k in _FIRST) else "last" if any(k in operator for k in _LAST) else ""


def _side(layout: str) -> str:
    """Where a layout has its channels: first, last, or none."""
    if layout in formats.NO_CHANNELS.values():
        return "none"
    return "last" if layout.endswith("C") else "first"


class Folded:
    """The graph with every call folded to one node, except those in `opened`."""

    def __init__(self, graph: Graph, opened: frozenset[int]) -> None:
        self.graph, self.opened = graph, opened
        self._sources: dict[int, tuple[int, ...]] = {}

    def owner(self, node: int) -> int | None:
        """The folded call that made a node; None if an opened call did so itself."""
        return next((call for call in self.graph.lineage(node) if call not in self.opened), None)

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
