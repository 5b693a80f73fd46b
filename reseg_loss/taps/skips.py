"""Step 5: where other tensors join the trunk, and what of the encoder they carry; modules are opened to see more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from .graph import Folded, Graph, Size
from .locate import tap_at
from .trunk import Trunk, find_trunk


class Origin(IntEnum):
    """How sure it is that a tensor belongs to the encoder, the surest first."""

    ENCODER = 0  # the bottleneck was computed from it
    ADAPTER = 1  # convolutions or the like made it of the encoder's, on the way of the skip
    DESCENDING = 2  # it was never upsampled: a norm or an activation on the way of the skip
    OTHER = 3  # merely not computed from the bottleneck


class Candidate(NamedTuple):
    """A tensor that a skip may stand for."""

    origin: Origin
    distance: int  # steps back from where the skip joins the trunk
    node: int


@dataclass
class Floor:
    """One level of the U: the trunk's nodes there (output side first), the skips, and the nodes that merge them."""

    size: Size
    trunk: list[int] = field(default_factory=list)
    skips: list[Candidate] = field(default_factory=list)
    merges: list[int] = field(default_factory=list)

    def merged(self) -> list[int]:
        """The trunk's nodes that hold everything merged at this level; all of them where nothing is."""
        return self.trunk[: min(self.trunk.index(node) for node in self.merges) + 1] if self.merges else self.trunk


@dataclass(frozen=True)
class Shape:
    """A trunk with its floors."""

    trunk: Trunk
    floors: dict[Size, Floor]

    def score(self) -> int:
        """How many levels a skip joins."""
        graph = self.trunk.graph
        return sum(any(graph.channels(c.node) > 1 for c in floor.skips) for floor in self.floors.values())


def find_shape(graph: Graph) -> Shape | None:
    """The trunk and its skips, with as many modules opened as reveals more levels, and no more."""
    opened = frozenset({0})
    shape = _analyse(graph, opened)
    found = True
    while found:
        found = False
        candidates = _openable(shape) if shape else graph.working(0)
        for call in candidates:
            if better := _open(graph, call, opened, shape):
                opened, shape = better
                found = True
                break
    return shape


def _open(
    graph: Graph, call: int, opened: frozenset[int], base: Shape | None, depth: int = 0
) -> tuple[frozenset[int], Shape] | None:
    """Open `call`, and what is in it, until that improves on `base`."""
    if depth > 8 or len(graph.sizes_inside(call)) < 2:
        return None
    opened = opened | {call}
    shape = _analyse(graph, opened)
    if shape and shape.score() > (base.score() if base else 0) and _is_deeper_encoder(base, shape):
        return opened, shape
    end = graph.calls[call].end
    inner = [c for c in _openable(shape) if call < c and graph.calls[c].start < end] if shape else graph.working(call)
    for child in inner:
        if better := _open(graph, child, opened, base, depth + 1):
            return better
    return None


def _openable(shape: Shape) -> Iterator[int]:
    """The folded calls on the trunk, then those at the level of the bottleneck behind it."""
    graph, folded = shape.trunk.graph, shape.trunk.folded
    todo, seen, given = list(shape.trunk.path), set(shape.trunk.path), set()
    for node in todo:
        call = folded.owner(node)
        if call is not None and call not in given and graph.working(call):
            given.add(call)
            yield call
        if graph.size(node) == shape.trunk.size:
            behind = [s for s in folded.sources(node) if s not in seen and graph.size(s) == shape.trunk.size]
            seen.update(behind)
            todo += behind


def _is_deeper_encoder(base: Shape | None, shape: Shape) -> bool:
    """Whether a deeper bottleneck is more of the encoder, not a small pyramid inside the bottleneck.

    The encoder is at least as wide there as at the level above, and pools by a factor, not to a given number of bins.
    """
    if base is None or base.score() < 1 or shape.trunk.size == base.trunk.size:
        return True
    graph = shape.trunk.graph
    made_it = [graph.nodes[node].operator for node in shape.trunk.encoder if graph.size(node) == shape.trunk.size]
    if any("adaptive" in operator for operator in made_it):
        return False
    joined = [floor for floor in base.floors.values() if floor.skips]
    skip = pick_skip(base.trunk, min(joined, key=lambda floor: floor.size)) if joined else None
    return skip is None or graph.channels(shape.trunk.bottleneck) >= graph.channels(skip)


def _analyse(graph: Graph, opened: frozenset[int]) -> Shape | None:
    trunk = find_trunk(Folded(graph, opened))
    if trunk is None:
        return None
    floors: dict[Size, Floor] = {}
    for node, below in zip(trunk.path, trunk.path[1:]):
        size = graph.size(node)
        if size is None:
            continue
        if size != trunk.size:
            floors.setdefault(size, Floor(size)).trunk.append(node)
        for operand in trunk.folded.sources(node):
            if operand == below or operand in graph.inputs or size == trunk.size or graph.size(operand) != size:
                continue
            if candidates := _encoder_side(trunk, operand, size):
                floors[size].skips += candidates
                floors[size].merges.append(node)
    return Shape(trunk, floors)


def _encoder_side(trunk: Trunk, operand: int, size: Size) -> list[Candidate]:
    """The tensors behind an operand, at its level, that the bottleneck has no part in (this undoes gates)."""
    graph, seen, todo = trunk.graph, {operand}, [operand]
    found: list[Candidate] = []
    for node in todo:
        if node not in trunk.decoder:
            pure = trunk.pure.get(node, False)
            if node in trunk.encoder or (pure and _fuses(trunk, node) and tap_at(graph, node)):
                adapters = [c for c in found if c.origin is Origin.DESCENDING and _adapts(trunk, c.node)]
                found = [c._replace(origin=Origin.ADAPTER) if c in adapters else c for c in found]
                return [*found, Candidate(Origin.ENCODER, len(found), node)]
            found.append(Candidate(Origin.DESCENDING if pure else Origin.OTHER, len(found), node))
        if node in trunk.pure:
            new = [s for s in trunk.folded.sources(node) if s not in seen and s not in graph.inputs]
            new = [s for s in new if graph.size(s) == size]
            seen.update(new)
            todo += new
    return found


def _fuses(trunk: Trunk, node: int) -> bool:
    """Whether a node is made of several of the encoder's features of its size: of two encoders, one is not enough."""
    graph, sources = trunk.graph, trunk.folded.sources(node)
    return sum(source in trunk.encoder and graph.size(source) == graph.size(node) for source in sources) > 1


def _adapts(trunk: Trunk, node: int) -> bool:
    """Whether what made a node on the way of a skip is more than a norm or an activation."""
    owner = trunk.folded.owner(node)
    call = None if owner is None else trunk.graph.calls[owner]
    made = trunk.graph.nodes[call.start : call.end] if call else [trunk.graph.nodes[node]]
    return any(kind in each.operator for each in made for kind in ("conv", "mm", "attention"))


def is_one_of_several(trunk: Trunk, floor: Floor, skip: int) -> bool:
    """Whether no hook sees the skip that several features of the encoder make, of which `skip` is one."""
    fused = [c.node for c in floor.skips if c.origin is not Origin.OTHER and _fuses(trunk, c.node)]
    return any(skip in trunk.folded.sources(node) for node in fused)


def pick_skip(trunk: Trunk, floor: Floor) -> int | None:
    """The skip of a level: of the encoder's own tensors, or those that project them, one as wide as the decoder."""
    graph = trunk.graph
    candidates = [c for c in floor.skips if tap_at(graph, c.node)]
    if not candidates:
        return None
    widths = _module_widths(trunk, floor.merged()) or _module_widths(trunk, floor.trunk)

    def order(candidate: Candidate) -> tuple[int, int, int]:
        origin, distance, node = candidate
        wide_as_decoder = graph.channels(node) in widths and origin < Origin.OTHER
        later_first = -node if origin < Origin.OTHER else node
        first = 0 if origin is Origin.ADAPTER else int(origin)
        return (first if wide_as_decoder else 3 + int(origin)), distance, later_first

    return min(candidates, key=order).node


def _module_widths(trunk: Trunk, nodes: list[int]) -> set[int]:
    graph = trunk.graph
    returned = [node for node in nodes if tap_at(graph, node, inputs=False, views=False)]
    return {graph.channels(node) for node in returned if not is_raw_join(trunk, node)}


def is_raw_join(trunk: Trunk, node: int) -> bool:
    """A bare concatenation that holds an encoder's tensor as it is; a block's own branches make none."""
    operator, sources = trunk.graph.nodes[node].operator, trunk.graph.nodes[node].sources
    return operator in ("aten::cat", "aten::stack") and not trunk.decoder.issuperset(sources)
