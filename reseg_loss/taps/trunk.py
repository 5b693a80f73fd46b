"""Step 4: find the trunk, which is the path from an output down the decoder to the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .graph import Folded, Graph, Size, covers, reached


@dataclass(frozen=True)
class Trunk:
    """The decoder's backbone.

    Attributes:
        folded: the graph that it was found in.
        path: its nodes, from the output to the bottleneck.
        pure: for every feature map that the output depends on, whether the resolution never went up on the way to it.
    """

    folded: Folded
    path: tuple[int, ...]
    pure: dict[int, bool]

    @property
    def graph(self) -> Graph:
        """The graph with nothing folded."""
        return self.folded.graph

    @property
    def bottleneck(self) -> int:
        """The last node of the path."""
        return self.path[-1]

    @property
    def size(self) -> Size:
        """The level of the bottleneck."""
        size = self.graph.size(self.bottleneck)
        assert size is not None, "find_trunk returns no trunk without"
        return size

    @cached_property
    def encoder(self) -> set[int]:
        """All nodes that the bottleneck was computed from, including itself."""
        return self.graph.ancestors([self.bottleneck])

    @cached_property
    def decoder(self) -> set[int]:
        """All nodes computed from the bottleneck, including itself."""
        return self.graph.descendants(self.bottleneck)


def find_trunk(folded: Folded) -> Trunk | None:
    """The best path from an output backward to the first pure node that never enters a finer level.

    The best path has the most levels. Among equals it has the deeper bottleneck (as in UNETR, whose skips leave earlier
    layers of the same size), and then it is the longer path (as in smp's FPN with resnet50, where it goes through the
    pyramid). None if no output has such a path.
    """
    graph = folded.graph
    pure: dict[int, bool] = {}
    rank: dict[int, tuple[int, int, int]] = {}  # levels climbed, depth of the bottleneck, length
    following: dict[int, int] = {}
    for node in sorted(reached(graph.outputs, folded.sources)):
        size, sources = graph.size(node), folded.sources(node)
        sizes = {graph.size(s) for s in sources}
        # keys and values of an attention may be coarser than its query
        if size is not None and size in sizes and len(sizes - {None}) > 1:
            placed = folded.placed(node)
            sources = tuple(s for s in sources if s in placed or covers(graph.size(s) or graph.image, size))
        pure[node] = node in graph.inputs or (
            size is not None and all(pure[s] and covers(graph.size(s) or graph.image, size) for s in sources)
        )
        if pure[node]:
            rank[node] = (0, graph.depth[node], 0)
            continue
        best = None
        for source in sources:
            below = graph.size(source)
            if source not in rank or below is None or (size is not None and not covers(size, below)):
                continue
            levels, depth, length = rank[source]
            candidate = (levels + int(size is not None and below != size), depth, length + 1)
            if best is None or candidate > best:
                best = rank[node] = candidate
                following[node] = source
    ends = [output for output in graph.outputs if output in rank]
    if not ends:
        return None
    path = [max(ends, key=lambda node: rank[node])]
    while path[-1] in following:
        path.append(following[path[-1]])
    return None if path[-1] in graph.inputs else Trunk(folded, tuple(path), pure)
