"""Convert any feature layout to channels-first, for the size of the current input.

Layout names: NCHW and NCDHW (channels first), NHWC and NDHWC (channels last), NLC (tokens), CLS+NLC (tokens after
one class token), NCL (tokens last), NHW and NDHW (a map without a channel axis).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import ReSegError

CHANNELS_FIRST = {2: "NCHW", 3: "NCDHW"}
CHANNELS_LAST = {2: "NHWC", 3: "NDHWC"}
NO_CHANNELS = {2: "NHW", 3: "NDHW"}
TOKEN_LAYOUTS = ("NLC", "CLS+NLC", "NCL")
LAYOUTS = (*CHANNELS_FIRST.values(), *CHANNELS_LAST.values(), *NO_CHANNELS.values(), *TOKEN_LAYOUTS)
MAX_STRIDE = 256


class Grid(NamedTuple):
    """The layout of a tensor over the image."""

    spatial: tuple[int, ...]
    channels: int
    layout: str
    stride: tuple[int, ...]


def strides(spatial: Sequence[int], image: Sequence[int]) -> tuple[int, ...] | None:
    """The integer stride per axis that makes `spatial` a feature map of `image`, or None.

    A stride fits if the size is the image's divided by it, rounded up or down. The same stride on every axis and powers
    of two are preferred. Different strides are accepted if each is a power of two.
    """
    sizes = list(zip(spatial, image))
    if len(spatial) != len(image) or max(spatial) < 2 or not all(1 <= size <= full for size, full in sizes):
        return None
    per_axis = [[s for s in range(1, MAX_STRIDE + 1) if size in (full // s, -(-full // s))] for size, full in sizes]
    same = set(per_axis[0]).intersection(*per_axis[1:])
    if same:
        return (min(same, key=lambda s: (s & (s - 1) != 0, s)),) * len(image)
    powers = [[s for s in axis if s & (s - 1) == 0] for axis in per_axis]
    return tuple(axis[0] for axis in powers) if all(powers) else None


def token_grids(image: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """{number of tokens: grid} for the power-of-two strides of `image`; if counts agree, the finest grid."""
    grids: dict[int, tuple[int, ...]] = {}
    for stride in (1, 2, 4, 8, 16, 32, 64):
        for grid in (tuple(s // stride for s in image), tuple(-(-s // stride) for s in image)):
            if min(grid) >= 2:
                grids.setdefault(math.prod(grid), grid)
    return grids


def readings(
    shape: tuple[int, ...], batch: int, image: tuple[int, ...], grids: dict[int, tuple[int, ...]] | None = None
) -> list[Grid]:
    """Every layout that fits a tensor of `shape` for a batch of images of size `image`, the likeliest first.

    Several are equally likely if channels and sizes are equal: (B, 64, 64, 64) of 256x256 images is NCHW or NHWC.
    `grids` adds token counts to those of `token_grids(image)`, for models with uncommon strides.
    """
    dims = len(image)
    if not shape or shape[0] != batch:
        return []
    if len(shape) == dims + 2:
        ways = [(shape[2:], shape[1], CHANNELS_FIRST[dims]), (shape[1:-1], shape[-1], CHANNELS_LAST[dims])]
    elif len(shape) == 3:
        known = {**token_grids(image), **(grids or {})}
        by_count = ((shape[1], shape[2], "NLC"), (shape[1] - 1, shape[2], "CLS+NLC"), (shape[2], shape[1], "NCL"))
        ways = [(known[count], channels, layout) for count, channels, layout in by_count if count in known]
    else:
        ways = []
    found = [Grid(*way, stride) for way in ways if (stride := strides(way[0], image))]
    # a stride per axis is unlikely of maps, one that is no power of two of tokens
    found.sort(key=lambda g: len(set(g.stride)) > 1 if len(shape) == dims + 2 else any(s & (s - 1) for s in g.stride))
    whole = [Grid(image, 1, NO_CHANNELS[dims], (1,) * dims)] if shape[1:] == image else []
    return [*whole, *found]


def grid_of_tokens(count: int, image: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The grid of `count` tokens at `stride` over an image of the current size.

    Raises:
        ReSegError: no grid has that many cells, or several do.
    """
    choices = [(full // s, -(-full // s)) for full, s in zip(image, stride)]
    for grid in zip(*choices):  # all rounded down, or all up
        if math.prod(grid) == count:
            return grid
    mixed = {grid for grid in itertools.product(*choices) if math.prod(grid) == count}
    if len(mixed) != 1:
        raise ReSegError(
            f"the grid of {count} tokens at stride {tuple(stride)} cannot be determined for an image of size "
            f"{tuple(image)}; pad the images to a multiple of the stride"
        )
    return mixed.pop()


def to_channels_first(x: Tensor, layout: str, image: Sequence[int], stride: Sequence[int]) -> Tensor:
    """`x` as (B, C, *spatial), a view where possible; `image` is the current input's spatial size.

    Raises:
        ReSegError: the layout is unknown, the rank contradicts it, or the grid of tokens cannot be determined.
    """
    dims = len(image)
    if layout not in LAYOUTS:
        raise ReSegError(f"unknown layout {layout!r}; the layouts are {', '.join(LAYOUTS)}")
    rank = 3 if layout in TOKEN_LAYOUTS else dims + 1 if layout in NO_CHANNELS.values() else dims + 2
    if x.ndim != rank:
        raise ReSegError(f"a tensor of shape {tuple(x.shape)} is not {layout} over {dims} spatial axes")
    if layout in CHANNELS_FIRST.values():
        return x
    if layout in CHANNELS_LAST.values():
        return x.movedim(-1, 1)
    if layout in NO_CHANNELS.values():
        return x.unsqueeze(1)
    if layout == "CLS+NLC":
        x = x[:, 1:]
    if layout != "NCL":
        x = x.transpose(1, 2)
    return x.unflatten(2, grid_of_tokens(x.shape[2], image, stride))
