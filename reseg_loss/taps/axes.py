"""Step 2: find out what each axis of every tensor means, from the operators that made it.

An axis holds pieces, outermost first. A token axis holds the rows and the columns of the image. The first axis of a
batch of windows holds the batch, the rows of windows and the columns of windows. Views regroup pieces, permutations
move them, convolutions and matrix products make new ones. So a tensor's layout follows from its operator and its
sources. Shapes are used only after an operator that hides what it does (a custom kernel, an indexing); `follow` says
where.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import layouts
from .trace import Node, Trace, refs

Size = tuple[int, ...]

# What a piece is of: an axis of the image, by its number, or one of these.
BATCH, CHANNEL, UNKNOWN = "batch", "channel", "unknown"
SLOT = "slot"  # what a product over all places of two feature maps leaves: neither place nor channel of one map
JOINED = "joined"  # axes that were concatenated, as a class token and tokens are
MIXED = "mixed"  # what a linear layer over space made of it; one of as many outputs as there were cells undoes it


class Piece(NamedTuple):
    """A part of an axis.

    `step` is the distance of neighbours along an axis of the image, in the finest cells that the tensor tells apart: 4
    for windows of 4 cells, 1 for the cells in a window. `parts` are the axes in a piece that is joined or mixed.
    """

    label: int | str
    size: int
    step: int = 1
    parts: tuple[Axis, ...] = ()


Axis = tuple[Piece, ...]
Axes = tuple[Axis, ...]


class Given(NamedTuple):
    """A tensor that an operator took in; its axes are None if nothing is known of them."""

    shape: Size
    axes: Axes | None
    constant: bool  # does not depend on the model's input, as weights do not


def follow(trace: Trace) -> tuple[list[layouts.Grid | None], dict[int, str]]:
    """The layout of every node over the image, or None; and by node, the operators that made shapes necessary."""
    batch, image = trace.image[0], trace.image[2:]
    known: list[Axes | None] = []
    grids: list[layouts.Grid | None] = []
    hidden: dict[int, str] = {}
    seen = {image}
    for node in trace.nodes:
        axes = _axes(node, known, trace.image) if node.dynamic else None
        grid = _grid_of(axes, batch, image)
        if grid is None and node.dynamic and (axes is None or any(map(_is_hidden, axes))):
            guess = _guess(node, axes, known, batch, image, seen)
            if guess is not None:
                axes, grid = guess, _grid_of(guess, batch, image)
                hidden[node.index] = node.operator
        elif axes and not (_is_spatial(node.operator) and len(node.shape) == len(trace.image)):
            behind = [hidden.get(source, "") for source in node.sources if known[source]]
            if behind and all(behind):
                hidden[node.index] = behind[0]
        known.append(axes)
        grids.append(grid)
        if grid:
            seen.add(grid.spatial)
    return grids, hidden


# ------------------------------------------------------------------ from axes to a layout and back


def _grid_of(axes: Axes | None, batch: int, image: Size) -> layouts.Grid | None:
    """The layout over the image of a tensor with these axes; None if it is attention, windows or a vector."""
    if not axes or _length(axes[0]) != batch or any(piece.label != BATCH for piece in axes[0]):
        return None
    rest = [axis[0].parts[1] if _has_class_token(axis) else axis for axis in axes[1:]]
    outer = _outermost(rest)
    if outer is None:
        return None
    space = [axis for axis in rest if _is_space(axis, outer)]
    others = [axis for axis in rest if not _is_space(axis, outer)]
    letters: dict[tuple[int | str, ...], str] = {along: letter for letter, along in _letters(len(image)).items()}
    names = [letters.get(tuple(piece.label for piece in axis), "?") if axis in space else "C" for axis in rest]
    layout = "".join(["CLS+" if any(map(_has_class_token, axes)) else "", "N", *names])
    spatial = tuple(piece.size for axis in space for piece in axis)
    stride = layouts.strides(spatial, image)
    if layout not in layouts.LAYOUTS or any(map(_is_unknown, others)) or stride is None:
        return None
    if not others and spatial != image:
        return None
    return layouts.Grid(spatial, _length(others[0]) if others else 1, layout, stride)


def _letters(dims: int) -> dict[str, tuple[int, ...]]:
    """For each letter in the names of layouts, the axes of the image that this axis of a tensor holds."""
    return {"L": tuple(range(dims)), **{letter: (axis,) for axis, letter in enumerate("DHW"[-dims:])}}


def _axes_of(grid: layouts.Grid, batch: int) -> Axes:
    """The axes of a tensor with this layout over the image."""
    space = [Piece(axis, size) for axis, size in enumerate(grid.spatial)]
    named = {letter: tuple(space[k] for k in along) for letter, along in _letters(len(space)).items()}
    named |= {"N": (Piece(BATCH, batch),), "C": (Piece(CHANNEL, grid.channels),)}
    if grid.layout == "CLS+NLC":
        named["L"] = (_joined([_unknown(1), named["L"]]),)
    return tuple(named[letter] for letter in grid.layout.removeprefix("CLS+"))


def _channels_first(shape: Size) -> Axes:
    batch, channels, *space = shape
    return (Piece(BATCH, batch),), (Piece(CHANNEL, channels),), *((Piece(i, n),) for i, n in enumerate(space))


def _length(axis: Axis) -> int:
    return math.prod(piece.size for piece in axis)


def _shape(axes: Axes) -> Size:
    return tuple(map(_length, axes))


def _unknown(n: int) -> Axis:
    return (Piece(UNKNOWN, n),)


def _is_unknown(axis: Axis) -> bool:
    """Whether it is unknown what an axis is: space or channels."""
    return bool(axis) and all(piece.label in (UNKNOWN, JOINED, MIXED) for piece in axis)


def _is_hidden(axis: Axis) -> bool:
    """Whether an operator hid what an axis is, so that the shape has to be used."""
    return bool(axis) and all(piece.label == UNKNOWN for piece in axis)


def _joined(axes: Sequence[Axis]) -> Piece:
    return Piece(JOINED, sum(map(_length, axes)), parts=tuple(axes))


def _has_class_token(axis: Axis) -> bool:
    """Whether one element without a place, such as a class token, comes before the cells."""
    parts = axis[0].parts if len(axis) == 1 and axis[0].label == JOINED else ()
    return len(parts) == 2 and _length(parts[0]) == 1 and _is_cells(parts[1])


def _is_cells(axis: Axis) -> bool:
    return bool(axis) and all(isinstance(piece.label, int) for piece in axis)


def _has_cells(axis: Axis) -> bool:
    return any(isinstance(piece.label, int) or any(map(_has_cells, piece.parts)) for piece in axis)


def _outermost(axes: Sequence[Axis]) -> dict[int | str, int] | None:
    """The step of the outermost piece of each axis of the image; None if an axis, or the batch, occurs twice."""
    spans: dict[int | str, list[tuple[int, int]]] = {}
    for piece in (piece for axis in axes for piece in axis):
        if piece.label == BATCH and piece.size > 1:
            return None
        if isinstance(piece.label, int):
            spans.setdefault(piece.label, []).append((piece.step, piece.step * piece.size))
    for found in spans.values():
        found.sort()
        if any(end > start for (_, end), (start, _) in itertools.pairwise(found)):
            return None
    return {label: found[-1][0] for label, found in spans.items()}


def _is_space(axis: Axis, outer: dict[int | str, int]) -> bool:
    """Whether an axis runs over whole rows, columns or both; parts inside windows and patches count as channels."""
    return _is_cells(axis) and any(piece.step == outer[piece.label] for piece in axis)


def _guess(
    node: Node, axes: Axes | None, known: list[Axes | None], batch: int, image: Size, seen: set[Size]
) -> Axes | None:
    """Axes by shape: those of a source of the same shape, or of the likeliest layout on a grid that was seen before.

    If some axes are known, the unknown ones must be spatial.
    """
    same = (found for s in node.sources if (found := known[s]) is not None and _shape(found) == node.shape)
    if axes is None and (first := next(same, None)):
        return first
    grids = {math.prod(size): size for size in sorted(seen)}
    for grid in layouts.readings(node.shape, batch, image, grids):
        guess = _axes_of(grid, batch)
        pairs = zip(axes or (), guess)
        if grid.spatial in seen and all(
            _is_cells(b) if _is_hidden(a) else {p.label for p in a} == {p.label for p in b} for a, b in pairs
        ):
            return guess
    return None


# ------------------------------------------------------------------ operators

# Parts of names: of operators that take and give channels first, and of those of torch's own that hide what they do.
# What is on neither list, nor has a rule below, keeps its axes: it broadcasts, reduces or resizes them.
_SPATIAL = ("conv", "pool", "upsample", "pixel_shuffle", "pixel_unshuffle", "col2im", "grid_sampler")
_OPAQUE = ("index", "gather", "scatter", "sort", "topk", "take", "masked_s", "as_strided", "embedding", "opaque")


def _is_spatial(operator: str) -> bool:
    namespace, _, name = operator.rpartition("::")
    return namespace in ("aten", "torchvision") and any(kind in name for kind in _SPATIAL)


def _axes(node: Node, known: list[Axes | None], image: Size) -> Axes | None:
    """The axes of a node, from its operator; None if the operator hides them."""
    namespace, _, name = node.operator.rpartition("::")
    if name == "input":
        return _channels_first(node.shape) if len(node.shape) == len(image) else None
    sources = [axes for source in node.sources if (axes := known[source]) is not None]
    if _is_spatial(node.operator):
        return _spatial(node, sources, image)
    if namespace not in ("aten", "") or any(kind in name for kind in _OPAQUE) or not sources:
        return None
    if name in _VIEWS:
        regrouped, scrambled = _regrouped(sources[0], node.shape)
        lost = scrambled and len(node.shape) in (3, len(image)) and _grid_of(regrouped, image[0], image[2:]) is None
        return None if lost else regrouped
    if rule := _OF_ONE.get(name.rstrip("_")):
        return rule(sources[0], node)
    taken = refs([value for key, value in node.arguments.items() if key != "out"])
    given = [Given(ref.shape, None if ref.node is None else known[ref.node], ref.node is None) for ref in taken]
    if rule := _OF_SEVERAL.get(name.rstrip("_")):
        return rule(given, node)
    if "scaled_dot_product" in name:
        query, value = given[0].axes, given[2].axes
        return (*query[:-1], value[-1]) if query and value else None
    return _elementwise(node, sources) or _reduced(sources[0], node) or _resized_all(node, sources)


def _resized(axis: Axis, n: int) -> Axis:
    """An axis with another length."""
    if _length(axis) == n:
        return axis
    label = axis[0].label if len(axis) == 1 else UNKNOWN
    return _unknown(n) if label in (JOINED, MIXED) else (Piece(label, n),)


def _spatial(node: Node, sources: list[Axes], image: Size) -> Axes | None:
    """Axes after a convolution, a pooling or an interpolation: channels first.

    Spatial axes keep their axes of the image if these are known, as in a 3D net that convolves slice by slice.
    """
    declared = _channels_first(node.shape) if len(node.shape) == len(image) else None
    source = next((axes for axes in sources if len(axes) == len(node.shape)), None)
    if source is None:
        return declared if node.shape[0] == image[0] else None
    space = [_resized(axis, n) for axis, n in zip(source[2:], node.shape[2:])]
    plain = all(len(axis) == 1 and isinstance(axis[0].label, int) for axis in space)
    placed = any((len(axis) > 1 and _is_cells(axis)) or any(piece.label == SLOT for piece in axis) for axis in space)
    if declared and not plain and not placed and _length(source[0]) == image[0]:
        return declared
    wide = node.shape[1]
    channels = _mapped(source, 1, wide) if "conv" in node.operator else _resized(source[1], wide)
    return source[0], channels, *space


def _mapped(axes: Axes, k: int, n: int) -> Axis:
    """What weights make of axis `k`: channels, unless it holds the batch or whole rows and columns."""
    axis, outer = axes[k], _outermost([axis for axis in axes if axis and axis[0].label != BATCH])
    if axis and axis[0].label == BATCH:  # grouped by image, as convolutions with dynamic weights are
        wide = axis[0].size
        return (axis[0], Piece(CHANNEL, n // wide)) if n % wide == 0 else _unknown(n)
    if len(axis) == 1 and axis[0].label in (MIXED, JOINED):
        whole = axis[0].parts[0] if axis[0].label == MIXED else axis
        return whole if _length(whole) == n else (Piece(MIXED, n, parts=(whole,)),)
    if outer and _is_space(axis, outer):
        return axis if _length(axis) == n else (Piece(MIXED, n, parts=(axis,)),)
    return _unknown(n) if _is_unknown(axis) else (Piece(CHANNEL, n),)


def _elementwise(node: Node, sources: list[Axes]) -> Axes | None:
    """Axes after an operator that broadcasts its inputs, or keeps their shape, like a norm."""
    shapes = [_shape(axes) for axes in sources]
    fits = all(n in (1, wide) for shape in shapes for n, wide in zip(reversed(shape), reversed(node.shape)))
    return _merged(sources, node.shape) if fits and max(map(len, shapes)) == len(node.shape) else None


def _merged(sources: Sequence[Axes], shape: Size) -> Axes:
    """For every axis, the entry of the first source that knows it."""
    merged = []
    for back, n in zip(range(len(shape), 0, -1), shape):
        given = [axes[-back] for axes in sources if len(axes) >= back and axes[-back] and _length(axes[-back]) == n]
        clear = [axis for axis in given if not _is_unknown(axis)]
        merged.append((*clear, *given, () if n == 1 else _unknown(n))[0])
    return tuple(merged)


def _reduced(axes: Axes, node: Node) -> Axes | None:
    """Axes after an operator that removes axes: a mean, or the selection of one index."""
    gone = _dims(axes, node)
    left = tuple(axis for k, axis in enumerate(axes) if k not in gone)
    return left if _shape(left) == node.shape else None


def _dims(axes: Axes, node: Node) -> set[int]:
    """The axes that an operator names by `dim`, one or several; all if it names none."""
    dims = node.arguments.get("dim")
    dims = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    return {dim % max(len(axes), 1) for dim in dims}


def _resized_all(node: Node, sources: list[Axes]) -> Axes | None:
    """Axes after an operator that changes at most the sizes, like padding."""
    alike = [axes for axes in sources if len(axes) == len(node.shape)]
    near = next((axes for axes in alike if _shape(axes) == node.shape), alike[0] if alike else None)
    return None if near is None else tuple(_resized(axis, n) for axis, n in zip(near, node.shape))


# ------------------------------------------------------------------ views


def _regrouped(axes: Axes, shape: Size) -> tuple[Axes, bool]:
    """The same pieces in the same order, as axes of other lengths, and whether the view scrambles: cuts across pieces.

    Pieces of size 1 stay where they were, so that an axis of the image of a single cell is not lost.
    """
    queue = [(piece, k) for k, axis in enumerate(axes) for piece in axis]
    found: list[Axis] = []
    scrambled = False
    for n in shape:
        taken: list[Piece] = []
        have, origin = 1, -1
        while have < n and queue:
            (piece, origin), missing = queue.pop(0), n // have
            if piece.size > missing:
                if n % have or piece.size % missing or piece.parts:
                    break
                inner = piece.size // missing
                queue.insert(0, (piece._replace(size=inner), origin))
                piece = piece._replace(size=missing, step=piece.step * inner)
                scrambled = scrambled or bool(taken)
            if piece.size > 1 or isinstance(piece.label, int):
                taken.append(piece)
            have *= piece.size
        if have != n:
            return tuple(map(_unknown, shape)), True
        while queue and queue[0][0].size == 1 and (queue[0][1] == origin or (n == 1 and not taken)):
            taken.append(queue.pop(0)[0])
        found.append(tuple(taken))
    if queue and found:
        found[-1] = (*found[-1], *(piece for piece, _ in queue))
    whole = [_as_one(axis, _continues) for axis in found]
    pieces = Counter(piece.label for axis in whole for piece in axis)

    def grows(last: Piece, piece: Piece) -> bool:
        """Channels right behind all rows of a map are more rows: in patch expansion, and where pixels are repeated."""
        return isinstance(last.label, int) and piece.label in (CHANNEL, UNKNOWN) and pieces[last.label] == 1

    return tuple(_as_one(axis, grows) for axis in whole), scrambled


def _as_one(axis: Axis, belong: Callable[[Piece, Piece], bool]) -> Axis:
    """The axis, with neighbouring pieces that belong together merged into one."""
    found: list[Piece] = []
    for piece in axis:
        if found and belong(found[-1], piece):
            last = found.pop()
            piece = Piece(last.label, last.size * piece.size, piece.step if isinstance(piece.label, int) else 1)
        found.append(piece)
    return tuple(found)


def _continues(last: Piece, piece: Piece) -> bool:
    """Whether pieces are of one axis, with nothing between: rows of windows and rows in a window are rows."""
    cells = isinstance(piece.label, int)
    return last.label == piece.label and not piece.parts and (not cells or last.step == piece.step * piece.size)


def _transpose(axes: Axes, node: Node) -> Axes:
    moved, a, b = list(axes), node.arguments["dim0"], node.arguments["dim1"]
    if axes:  # of a single number torch allows it too
        moved[a], moved[b] = axes[b], axes[a]
    return tuple(moved)


def _unsqueeze(axes: Axes, node: Node) -> Axes:
    dim = node.arguments["dim"] % len(node.shape)
    return *axes[:dim], (), *axes[dim:]


def _squeeze(axes: Axes, node: Node) -> Axes:
    gone = _dims(axes, node)
    return tuple(axis for k, axis in enumerate(axes) if k not in gone or _length(axis) > 1)


def _expand(axes: Axes, node: Node) -> Axes:
    axes = (*((),) * (len(node.shape) - len(axes)), *axes)
    alike = [_length(axis) == n or [piece.label for piece in axis] == [CHANNEL] for axis, n in zip(axes, node.shape)]
    return tuple(_resized(axis, n) if like else _unknown(n) for axis, n, like in zip(axes, node.shape, alike))


def _slice(axes: Axes, node: Node) -> Axes:
    dim, step = node.arguments["dim"], node.arguments["step"]
    start, _, _ = slice(node.arguments["start"], None).indices(_length(axes[dim]))
    return _part(axes, dim, start, node.shape[dim], step)


def _split(axes: Axes, node: Node) -> Axes:
    dim, kind = node.arguments["dim"], "split_size" if "split_size" in node.arguments else "split_sizes"
    sizes = node.arguments[kind]
    start = node.output * sizes if isinstance(sizes, int) else sum(sizes[: node.output])
    return _part(axes, dim, start, node.shape[dim])


def _part(axes: Axes, dim: int, start: int, n: int, step: int = 1) -> Axes:
    """The axes of `n` elements of one axis, from `start`."""
    dim %= len(axes)
    axis, part = axes[dim], None
    if len(axis) == 1 and axis[0].label == JOINED and step == 1 and n < axis[0].size:
        ends = itertools.accumulate(map(_length, axis[0].parts))
        inside = [each for each, end in zip(axis[0].parts, ends) if start <= end - _length(each) and end <= start + n]
        if sum(map(_length, inside)) == n:
            part = inside[0] if len(inside) == 1 else (_joined(inside),)
    return *axes[:dim], _resized(axis, n) if part is None else part, *axes[dim + 1 :]


def _unfold(axes: Axes, node: Node) -> Axes:
    dim, size = node.arguments["dimension"] % len(axes), node.arguments["size"]
    axis, n = axes[dim], node.shape[dim]
    windows, inner = _resized(axis, n), _unknown(size)
    if len(axis) == 1 and not axis[0].parts and node.arguments["step"] == size and axis[0].size == n * size:
        windows, inner = (axis[0]._replace(size=n, step=axis[0].step * size),), (axis[0]._replace(size=size),)
    return *axes[:dim], windows, *axes[dim + 1 :], inner


# ------------------------------------------------------------------ joins and products


def _cat(given: list[Given], node: Node) -> Axes | None:
    dim, n = node.arguments["dim"] % len(node.shape), node.shape[node.arguments["dim"]]
    parts = [part for part in given if len(part.shape) == len(node.shape)]
    known = [part.axes for part in parts if part.axes]
    if not known:
        return None
    along = [axes[dim] for axes in known]
    merged = list(_merged(known, node.shape))
    if len({tuple(piece.label for piece in axis) for axis in along}) == len(along[0]) == 1 and not along[0][0].parts:
        merged[dim] = _resized(along[0], n)
    elif not any(_is_cells(axis) or _is_unknown(axis) for axis in along):
        merged[dim] = _unknown(n) if dim == 0 else (Piece(CHANNEL, n),)
    else:
        merged[dim] = (_joined([part.axes[dim] if part.axes else _unknown(part.shape[dim]) for part in parts]),)
    return tuple(merged)


def _stack(given: list[Given], node: Node) -> Axes:
    dim = node.arguments["dim"] % len(node.shape)
    merged = _merged([part.axes for part in given if part.axes], (*node.shape[:dim], *node.shape[dim + 1 :]))
    return *merged[:dim], _unknown(node.shape[dim]), *merged[dim:]


def _product(given: list[Given], node: Node) -> Axes | None:
    """Axes after a matrix product: the rows of one factor, the columns of the other."""
    a, b = given[-2:]  # behind what is added
    if a.constant and b.axes:
        return *b.axes[:-2], _mapped(b.axes, -2, node.shape[-2]), b.axes[-1]
    if a.axes is None:
        return None
    if b.constant:
        return *a.axes[:-1], _mapped(a.axes, -1, node.shape[-1])
    if b.axes is None:
        return *a.axes[:-1], _unknown(node.shape[-1])
    rows, columns = a.axes[-2], b.axes[-1]
    if not any(map(_has_cells, (rows, columns))):
        rows, columns = ((Piece(SLOT, _length(axis)),) for axis in (rows, columns))
    return *a.axes[:-2], rows, columns


_VIEWS = ("view", "_unsafe_view", "_reshape_alias", "reshape", "view_copy")
# by what an operator takes in: one tensor, or several
_OF_ONE: dict[str, Callable[[Axes, Node], Axes]] = {
    "permute": lambda axes, node: tuple(axes[dim] for dim in node.arguments["dims"]),
    "t": lambda axes, node: axes[::-1],
    "transpose": _transpose,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split"), _split),
    "unfold": _unfold,
}
_OF_SEVERAL: dict[str, Callable[[list[Given], Node], Axes | None]] = {
    "cat": _cat,
    "stack": _stack,
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _product),
}
