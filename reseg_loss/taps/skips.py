"""Step 5: find where other tensors join the trunk, and what they carry of the encoder; modules are opened as needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from .graph import Folded, Graph, Size
from .locate import tap_at
from .trunk import Trunk, find_trunk


class Standing(IntEnum):
    """How a tensor is related to the encoder; the likeliest skip comes first."""

    ADAPTER = 0  # convolutions or the like computed it from the encoder's feature, inside the skip connection
    ENCODER = 1  # the bottleneck was computed from it
    OTHER = 2  # only not computed from the bottleneck: norms in the skip connection, UNETR's upsampled tokens


class Candidate(NamedTuple):
    """A tensor that may be the skip."""

    standing: Standing
    node: int


@dataclass
class Floor:
    """One level of the U: the trunk's nodes there (output side first), the skips, and the nodes that merge them."""

    size: Size
    trunk: list[int] = field(default_factory=list)
    skips: list[Candidate] = field(default_factory=list)
    merges: list[int] = field(default_factory=list)

    def merged(self) -> list[int]:
        """The trunk's nodes that contain everything merged at this level; all nodes if nothing is merged."""
        return self.trunk[: min(self.trunk.index(node) for node in self.merges) + 1] if self.merges else self.trunk


@dataclass(frozen=True)
class Shape:
    """A trunk with its floors."""

    trunk: Trunk
    floors: dict[Size, Floor]

    def score(self) -> int:
        """The number of levels with a skip."""
        return sum(bool(floor.skips) for floor in self.floors.values())


def find_shape(graph: Graph) -> Shape | None:
    """The trunk and its skips. Modules are opened only as long as that reveals more levels."""
    opened = frozenset({0})
    shape = _analyse(graph, opened)
    while True:
        candidates = _openable(shape) if shape else graph.working(0)
        better = next(filter(None, (_open(graph, call, opened, shape) for call in candidates)), None)
        if better is None:
            return shape
        opened, shape = better


def _open(
    graph: Graph, call: int, opened: frozenset[int], base: Shape | None, depth: int = 0
) -> tuple[frozenset[int], Shape] | None:
    """Open `call` and the calls inside it until the result improves on `base`."""
    sizes = {graph.size(node) for inner in graph.inside(call) for _, node in inner.outputs}
    if depth > 8 or len(sizes - {None}) < 2:
        return None
    opened = opened | {call}
    shape = _analyse(graph, opened)
    if shape and shape.score() > (base.score() if base else 0) and _is_deeper_encoder(base, shape):
        return opened, shape
    end = graph.calls[call].end
    inner = [c for c in _openable(shape) if call < c and graph.calls[c].start < end] if shape else graph.working(call)
    return next(filter(None, (_open(graph, child, opened, base, depth + 1) for child in inner)), None)


def _openable(shape: Shape) -> Iterator[int]:
    """The folded calls on the trunk, then those before the bottleneck at its level."""
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
    """Whether a deeper bottleneck belongs to the encoder, and is not a small pyramid inside the bottleneck.

    An encoder is at least as wide there as at the level above, and pools by a factor, not to a given number of bins.
    """
    if base is None or base.score() < 1 or shape.trunk.size == base.trunk.size:
        return True
    graph = shape.trunk.graph
    made_it = [graph.nodes[node].operator for node in shape.trunk.encoder if graph.size(node) == shape.trunk.size]
    if any("adaptive" in operator for operator in made_it):
        return False
    joined = [floor for floor in base.floors.values() if floor.skips]
    skip = pick_skip(base.trunk, min(joined, key=lambda floor: floor.size))
    return skip is None or graph.channels(shape.trunk.bottleneck) >= graph.channels(skip)


def _analyse(graph: Graph, opened: frozenset[int]) -> Shape | None:
    trunk = find_trunk(Folded(graph, opened))
    if trunk is None:
        return None
    floors: dict[Size, Floor] = {}
    for node, below in zip(trunk.path, trunk.path[1:]):
        size = graph.size(node)
        if size is None or size == trunk.size:
            continue
        floor = floors.setdefault(size, Floor(size))
        floor.trunk.append(node)
        for operand in trunk.folded.sources(node):
            joins = operand != below and operand not in graph.inputs and graph.size(operand) == size
            if joins and (candidates := _encoder_side(trunk, operand, size)):
                floor.skips += candidates
                floor.merges.append(node)
    return Shape(trunk, floors)


def _encoder_side(trunk: Trunk, operand: int, size: Size) -> list[Candidate]:
    """The sources of an operand, at its level, that do not depend on the bottleneck (this looks through gates)."""
    graph, seen, todo = trunk.graph, {operand}, [operand]
    found: list[Candidate] = []
    chain = True  # no other way led around what was found so far, as one does around a gate
    for node in todo:
        if node not in trunk.decoder:
            if node in trunk.encoder or (_fuses(trunk, node) and tap_at(graph, node)):
                return [*found, Candidate(Standing.ENCODER, node)]
            found.append(Candidate(Standing.ADAPTER if chain and _adapts(trunk, node) else Standing.OTHER, node))
        if node in trunk.pure:
            new = [s for s in trunk.folded.sources(node) if s not in seen | graph.inputs and graph.size(s) == size]
            chain = chain and len(new) == 1
            seen.update(new)
            todo += new
    return [Candidate(Standing.OTHER, candidate.node) for candidate in found]


def _fuses(trunk: Trunk, node: int) -> bool:
    """Whether a node combines several encoder features of its size, as in models with two encoders."""
    graph, sources = trunk.graph, trunk.folded.sources(node)
    parts = [source for source in sources if source in trunk.encoder and graph.size(source) == graph.size(node)]
    return trunk.pure.get(node, False) and len(parts) > 1


def _adapts(trunk: Trunk, node: int) -> bool:
    """Whether a node is more than a norm or an activation of an encoder feature, and not upsampled as in UNet++."""
    owner = trunk.folded.owner(node)
    call = None if owner is None else trunk.graph.calls[owner]
    made = trunk.graph.nodes[call.start : call.end] if call else [trunk.graph.nodes[node]]
    computes = any(kind in each.operator for each in made for kind in ("conv", "mm", "attention"))
    return trunk.pure.get(node, False) and computes


def is_one_of_several(trunk: Trunk, floor: Floor, skip: int) -> bool:
    """Whether `skip` is one of several encoder features that are combined into a skip that no hook sees."""
    return any(skip in trunk.folded.sources(c.node) and _fuses(trunk, c.node) for c in floor.skips)


def pick_skip(trunk: Trunk, floor: Floor) -> int | None:
    """The skip of a level: the tensor that carries the encoder's feature, as close as possible to where it joins."""
    candidates = [c for c in floor.skips if tap_at(trunk.graph, c.node)]
    return min(candidates, key=lambda candidate: candidate.standing).node if candidates else None


def is_raw_join(trunk: Trunk, node: int) -> bool:
    """Whether a node is a bare concatenation with an unchanged encoder tensor, not one of a block's own branches."""
    operator, sources = trunk.graph.nodes[node].operator, trunk.graph.nodes[node].sources
    return operator in ("aten::cat", "aten::stack") and not trunk.decoder.issuperset(sources)
