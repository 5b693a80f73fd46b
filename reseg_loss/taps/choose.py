"""Step 6: one encoder and one decoder tap per level, the bottleneck, and the message if there is no U."""

from __future__ import annotations

import math
from typing import Literal

from ..errors import TapError
from .graph import Graph, Size, covers
from .locate import tap_at
from .skips import Floor, Shape, is_one_of_several, is_raw_join, pick_skip
from .tap import Level, Tap, TapPlan
from .trace import Call
from .trunk import Trunk


def choose_taps(graph: Graph, shape: Shape | None, encoder: Literal["skip", "block"]) -> TapPlan:
    """The plan for a shape, with all its levels.

    Raises:
        TapError: there are fewer than two levels, or the resolution goes down a second time, or no hook sees the
            bottleneck, or the bottleneck has a single cell.
    """
    if shape is None or shape.score() < 1:
        what = "no decoder was found that goes up in resolution and receives skip features"
        if any(side % 32 for side in graph.image):  # which is all that such a model's features have in common
            what += f". If the model pads inside, show it an example whose sides are multiples of 32, not {graph.image}"
        raise TapError(_explain(graph, what))
    trunk = shape.trunk
    met = {graph.size(node) for call in graph.calls for _, node in call.outputs}
    # the others are of a step on the way from one level to the next
    floors = [floor for floor in shape.floors.values() if floor.size in met or floor.skips]
    found = [_level(trunk, floor, encoder) for floor in sorted(floors, key=lambda floor: floor.size, reverse=True)]
    levels = [level for level, _ in found if level]
    notes = [note for _, note in found if note]
    _check_single_descent(trunk)
    bottleneck = _bottleneck(trunk)
    if bottleneck is None:
        raise TapError(_explain(graph, f"no hook can see the bottleneck, of size {trunk.size}"))
    if len(levels) < 2:
        pairs = "; ".join(f"{level.spatial}: {level.encoder} and {level.decoder}" for level in levels) or "none"
        what = f"two levels with an encoder and a decoder feature are needed, but {len(levels)} found ({pairs})"
        raise TapError(_explain(graph, what, notes))
    if _widest_vanished(graph) >= bottleneck.channels:
        what = f"the example input, of size {graph.image}, is too small: a feature map shrinks to a single cell"
        raise TapError(_explain(graph, what + "; use the image size of training"))
    return TapPlan(tuple(levels), bottleneck, tuple(notes))


def _level(trunk: Trunk, floor: Floor, kind: Literal["skip", "block"]) -> tuple[Level | None, str]:
    """A level, or None; and a note on it, or on why it was left out."""
    graph = trunk.graph
    name = f"level {'x'.join(map(str, floor.size))}"
    where = f"{name} left out: "
    skip = pick_skip(trunk, floor)
    skip_tap = None if skip is None else tap_at(graph, skip)
    block_tap = _block(trunk, floor.size, None if skip is None else graph.channels(skip))
    encoder = (skip_tap or block_tap) if kind == "skip" else (block_tap or skip_tap)
    if encoder is None or encoder.channels < 2:
        return None, where + "no feature of the encoder joins the decoder there"
    decoder = _decoder(trunk, floor, encoder)
    if decoder is None:
        return None, where + "no module returns a feature of the decoder there"
    if not floor.skips and decoder.channels != encoder.channels:
        channels = f"{encoder.channels} and {decoder.channels}"
        return None, where + f"no skip connection, and {encoder} and {decoder} differ in channels ({channels})"
    note = ""
    if encoder is skip_tap and skip is not None and is_one_of_several(trunk, floor, skip):
        note = f"{name}: the skip combines several encoder features, and no hook can see it; {encoder} is one of them"
    return Level(encoder.stride, floor.size, encoder, decoder), note


def _heavy(calls: list[tuple[Call, int]]) -> list[tuple[Call, int]]:
    """The calls with at least 20 % of the parameters of the largest one: blocks, not norms and activations."""
    most = max((call.parameters for call, _ in calls), default=0)
    return [(call, node) for call, node in calls if call.parameters >= 0.2 * most and call.parameters > 0]


def _block(trunk: Trunk, size: Size, channels: int | None) -> Tap | None:
    """The encoder's last block at a level, including the norm or activation that completes it."""
    graph = trunk.graph
    made = [
        (call, node)
        for call in graph.calls[1:]
        for keys, node in call.outputs
        if not keys and node in trunk.encoder and node != trunk.bottleneck and node not in graph.inputs
        if node >= call.start and graph.size(node) == size and channels in (None, graph.channels(node))
    ]
    blocks = _heavy(made)
    if not blocks:
        return None
    last = max(node for _, node in blocks)
    parents = {call.parent for call, node in blocks if node == last}
    return tap_at(graph, max(node for call, node in made if call.parent in parents or node == last))


def _decoder(trunk: Trunk, floor: Floor, encoder: Tap) -> Tap | None:
    """A level's last decoder feature after the merge and before the head; as wide as the encoder's if possible."""
    graph, merged, head = trunk.graph, floor.merged(), _head_start(trunk)
    body = [node for node in merged if node < head and not is_raw_join(trunk, node)]
    made = [(node, tap) for node in body if (tap := tap_at(graph, node, inputs=False, views=False))]
    taps = [tap for node, tap in made if graph.before_going_up(node) == node] or [tap for _, tap in made]
    if inner := _inner(trunk, floor, [node for node, _ in made]):
        taps.insert(0, inner)
    if not taps:  # nothing is computed there after the merge: the decoder block's output before it
        before = [n for n in floor.trunk if n not in merged and n < head and not is_raw_join(trunk, n)]
        taps = [tap for node in before or body if (tap := tap_at(graph, node))]
    # the first as wide: the pyramid's sum in smp's FPN with resnet50, not what all levels are merged to after it
    return max(taps, key=lambda tap: tap.channels == encoder.channels, default=None)


def _head_start(trunk: Trunk) -> int:
    """The first node of the head, which is the last module with parameters on the way to the output.

    Without this, the head would count as a decoder feature in smp's FPN with vgg11_bn and in U-KAN.
    """
    for node in trunk.path[:-1]:
        owner = trunk.folded.owner(node)
        if owner is not None and trunk.graph.calls[owner].parameters:
            return trunk.graph.calls[owner].start
    return len(trunk.graph.nodes)


def _inner(trunk: Trunk, floor: Floor, seen: list[int]) -> Tap | None:
    """The last block at this level inside the module that leaves the level, if that module does most of its work.

    Such a module upsamples at its end, like the stages of Swin-UNet. `seen` are the level's nodes that modules return.
    """
    graph = trunk.graph
    above = trunk.path.index(floor.trunk[0]) - 1
    owner = trunk.folded.owner(trunk.path[above]) if above >= 0 else None
    if owner is None:
        return None
    made = [
        (call, node)
        for call in graph.inside(owner)
        for keys, node in call.outputs
        if not keys and node >= call.start and graph.size(node) == floor.size
        if graph.channels(node) == graph.channels(floor.trunk[0])
    ]
    calls = {call.index: call for call, _ in made}
    nested = {inner.index for call in calls for inner in graph.inside(call)}
    outermost = [call for index, call in calls.items() if index not in nested]
    owners = {trunk.folded.owner(node) for node in seen} - {None}
    outside = sum(call.parameters for call in graph.calls if call.index in owners)
    if sum(call.parameters for call in outermost) <= outside:
        return None
    return tap_at(graph, max(node for _, node in _heavy(made)))


def _bottleneck(trunk: Trunk) -> Tap | None:
    """The deepest feature: the end of the trunk, or one of its operands if it is a concatenation or no hook sees it."""
    graph, end = trunk.graph, trunk.graph.before_going_up(trunk.bottleneck)
    joined = graph.nodes[end].operator == "aten::cat"
    tap = tap_at(graph, end, inputs=not joined)
    if tap and not joined:
        return tap
    operands: list[tuple[int, int, Tap]] = []
    seen, todo = {end}, [end]
    for node in todo:
        for source in graph.nodes[node].sources:
            if source not in seen and graph.size(source) == trunk.size:
                seen.add(source)
                if operand := tap_at(graph, source, inputs=False):
                    operands.append((graph.depth[source], source, operand))
                else:
                    todo.append(source)
    if tap is None:
        widest = max(operands, key=lambda o: (o[2].channels, o[0]), default=None)
        return widest[2] if widest else tap_at(graph, end)
    if len(operands) > 1:
        # cat([x, f(x)]), a skip around the innermost block: f(x), if it is at least as wide as x
        _, deepest, inner = max(operands, key=lambda o: o[:2])
        before = graph.ancestors([deepest])
        if all(node in before and operand.channels <= inner.channels for _, node, operand in operands):
            return inner
    return tap


def _check_single_descent(trunk: Trunk) -> None:
    """Raise a TapError if the resolution goes down again after it has gone up."""
    graph, leading = trunk.graph, trunk.graph.ancestors(trunk.graph.outputs)
    for node, pure in trunk.pure.items():
        size = graph.size(node)
        if pure or size is None or node not in leading:
            continue
        for source in trunk.folded.sources(node):
            above = graph.size(source)
            if above and above != size and not trunk.pure[source] and covers(above, size):
                what = f"the resolution goes down again after going up ({above} to {size}, in {graph.where(node)})"
                raise TapError(_explain(graph, what + ": several U-Nets or branches; pass the inner U-Net alone"))


def _widest_vanished(graph: Graph) -> int:
    """The largest number of channels of any map that a convolution or max pooling shrank from a few cells to one."""
    rank, widest = len(graph.image) + 2, 0
    for node in graph.nodes:
        shrinks = node.operator.startswith(("aten::convolution", "aten::max_pool"))
        before = graph.nodes[node.sources[0]].shape if shrinks and node.sources else ()
        if len(before) == len(node.shape) == rank and max(node.shape[2:]) == 1 < max(before[2:]) < 4:
            widest = max(widest, node.shape[1])
    return widest


def _explain(graph: Graph, what: str, notes: list[str] | None = None) -> str:
    """The message: `what` is wrong, how to name taps by hand, and the modules that return a feature map, by size."""
    listed: list[tuple[Size, int, Tap]] = []
    for call in graph.calls[1:]:
        around = {graph.size(node) for _, node in graph.calls[call.parent].outputs[:1]} if call.parent else set()
        for keys, node in call.outputs:
            size = graph.size(node)
            if size and size not in around:  # of nested modules of one size, the outermost is enough
                listed.append((size, node, Tap(call.name, keys=keys, call=call.count)))
    whole = {node for _, node, tap in listed if not tap.keys} | graph.inputs
    by_size: dict[Size, list[str]] = {}
    for size, node, tap in listed:
        if not tap.keys or node not in whole:  # an element of a tuple, unless a module returns it by itself
            by_size.setdefault(size, []).append(str(tap))
    rows = []
    for size in sorted(by_size, key=math.prod, reverse=True):
        names = by_size[size]
        shown = names if len(names) <= 8 else [*names[:4], "...", *names[-4:]]
        rows.append(f"  {'x'.join(map(str, size))}: {', '.join(shown)}")
    return "\n".join(
        [
            f"{what}.",
            *(notes or []),
            "Name the taps by hand: taps={'encoder': [...], 'decoder': [...], 'bottleneck': '...'}, finest first, one "
            "encoder and one decoder tap per level, of the same size. Modules that return a feature map, by size:",
            *(rows or ["  none"]),
            "CutMixConsistency needs no taps if deep= is left out, so it works with every segmentation network.",
        ]
    )
