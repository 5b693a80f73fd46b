"""Triton kernels of the alignment terms: every feature is read once for the value and once for the gradient.

Both sides of a pair are (B, C, S) in one of two memory orders, channels second or last. Sums are fp32 whatever the
features are. Partial sums go through memory, not through atomics, so results are deterministic. All pairs share a
launch, because a launch costs the host more time than the GPU: each program looks up the pair that it works on.
`terms.py` calls this module, and has the same in torch. This imports triton, so it is only imported where it is used.
"""

# a kernel's body is not Python, and its arguments are converted on the way
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a tile
LOOPS = 8  # tiles that one program sums up
FINISH = 16  # channels that one program finishes

# In the kernels a name in the plural is a tuple with an entry for every pair; `ends` is where the programs of each end.
# Triton compiles a kernel anew, for seconds, wherever an integer of its arguments becomes 1 or a multiple of 16, or no
# longer is. So what goes up and down with batch and image is passed in sixteenths, or rounded up to a multiple of 16.


@triton.jit
def _squares(ss, ts, partial, width, scales, sizes, ends, block: tl.constexpr, loops: tl.constexpr):
    """partial[pair, program] = scale * sum (s - t)^2 over the program's elements."""
    begin = 0
    for i in tl.static_range(len(ss)):
        end = ends[i] // 16
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            program = tl.program_id(0) - begin
            start = program.to(tl.int64) * block * loops
            total = tl.zeros((block,), tl.float32)
            for j in range(loops):
                at = start + j * block + tl.arange(0, block)
                inside = at < sizes[i]
                x = tl.load(ss[i] + at, mask=inside, other=0).to(tl.float32)
                y = tl.load(ts[i] + at, mask=inside, other=0).to(tl.float32)
                total += (x - y) * (x - y)
            tl.store(partial + i * width + program, tl.sum(total) * scales[i])
        begin = end


@triton.jit
def _differences(ss, ts, outs, upstream, terms, scales, sizes, ends, block: tl.constexpr):
    """out = upstream[term] * scale * (s - t); in fp16 the product is rounded once, with the loss scale in it."""
    begin = 0
    for i in tl.static_range(len(ss)):
        end = ends[i] // 16
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            factor = tl.load(upstream + terms[i]).to(tl.float32) * scales[i]
            at = (tl.program_id(0) - begin).to(tl.int64) * block + tl.arange(0, block)
            inside = at < sizes[i]
            x = tl.load(ss[i] + at, mask=inside, other=0).to(tl.float32)
            y = tl.load(ts[i] + at, mask=inside, other=0).to(tl.float32)
            tl.store(outs[i] + at, (factor * (x - y)).to(outs[i].dtype.element_ty), mask=inside)
        begin = end


@triton.jit
def _moments(
    ss, ts, moments, starts, batches, channels, sizes, blocks, ends,
    last: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, loops: tl.constexpr,
):  # fmt: skip
    """The moments of every pair, which begin at its start."""
    begin = 0
    for i in tl.static_range(len(ss)):
        end = ends[i] // 16
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            program = tl.program_id(0) - begin
            c = (program % blocks[i]) * columns[i] + tl.arange(0, columns[i])
            _moments_of(
                ss[i], ts[i], moments + starts[i], program // blocks[i], c, batches[i], channels[i], sizes[i],
                last[i], rows[i], columns[i], loops,
            )  # fmt: skip
        begin = end


@triton.jit
def _moments_of(
    s, t, out, program, c, batch, channels, size,
    last: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, loops: tl.constexpr,
):  # fmt: skip
    """out[program, :, c] = count, mean of s and t, sum of squared deviations of s and t, and of their product.

    Sums are of deviations from the mean of the program's first tile, which is near the channel's: no cancellation.
    """
    tiles = tl.cdiv(size, rows)
    n = 0.0
    shift_s = tl.zeros((columns,), tl.float32)
    shift_t = tl.zeros((columns,), tl.float32)
    # summed up over the rows at the end only
    s1 = tl.zeros((rows, columns), tl.float32)
    t1 = tl.zeros((rows, columns), tl.float32)
    s2 = tl.zeros((rows, columns), tl.float32)
    t2 = tl.zeros((rows, columns), tl.float32)
    st = tl.zeros((rows, columns), tl.float32)
    for j in range(loops):
        k = program * loops + j
        b = k // tiles
        r = (k % tiles) * rows + tl.arange(0, rows)
        inside = ((r < size) & (b < batch))[:, None] & (c < channels)[None, :]
        at = _at(b, r, c, channels, size, last)
        x = tl.load(s + at, mask=inside, other=0).to(tl.float32)
        y = tl.load(t + at, mask=inside, other=0).to(tl.float32)
        here = tl.where(b < batch, tl.minimum(size - (k % tiles) * rows, rows), 0).to(tl.float32)
        if j == 0:
            shift_s = tl.sum(x, 0) / here
            shift_t = tl.sum(y, 0) / here
        x = tl.where(inside, x - shift_s[None, :], 0.0)
        y = tl.where(inside, y - shift_t[None, :], 0.0)
        n += here
        s1 += x
        t1 += y
        s2 += x * x
        t2 += y * y
        st += x * y
    sum_s, sum_t = tl.sum(s1, 0), tl.sum(t1, 0)
    out = out + program.to(tl.int64) * 6 * channels + c
    keep = c < channels
    tl.store(out, n + tl.zeros((columns,), tl.float32), mask=keep)
    tl.store(out + channels, shift_s + sum_s / n, mask=keep)
    tl.store(out + 2 * channels, shift_t + sum_t / n, mask=keep)
    tl.store(out + 3 * channels, tl.sum(s2, 0) - sum_s * sum_s / n, mask=keep)
    tl.store(out + 4 * channels, tl.sum(t2, 0) - sum_t * sum_t / n, mask=keep)
    tl.store(out + 5 * channels, tl.sum(st, 0) - sum_s * sum_t / n, mask=keep)


@triton.jit
def _at(b, r, c, channels, size, last: tl.constexpr):
    """Offsets (rows, columns) of the cells r of sample b in the channels c."""
    if last:  # all samples are one plane
        at = r[:, None].to(tl.int64) * channels + c[None, :]
    else:
        at = (b.to(tl.int64) * channels + c[None, :]) * size + r[:, None]
    return at


@triton.jit
def _finish(
    moments, starts, partial, width, coefficients, firsts, programs, channels, counts, eps, ends,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The channels' values and coefficients of every pair, which begin at its row and at 4 times its first channel."""
    begin = 0
    for i in tl.static_range(len(starts)):
        end = ends[i] // 16
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            c = (tl.program_id(0) - begin) * columns + tl.arange(0, columns)
            _finish_of(
                moments + starts[i], partial + i * width, coefficients + 4 * firsts[i], programs[i] // 16, c,
                channels[i], counts[i], eps, rows, columns,
            )  # fmt: skip
        begin = end


@triton.jit
def _finish_of(
    moments, value, coefficients, programs, c, channels, count, eps, rows: tl.constexpr, columns: tl.constexpr
):
    """Merge the programs' moments (Chan et al. 1979): value[c], and the four numbers per channel of the gradient."""
    mean_s = tl.zeros((columns,), tl.float32)
    mean_t = tl.zeros((columns,), tl.float32)
    for start in range(0, programs, rows):
        p = start + tl.arange(0, rows)
        inside = (p < programs)[:, None] & (c < channels)[None, :]
        at = moments + p[:, None].to(tl.int64) * 6 * channels + c[None, :]
        n = tl.load(at, mask=inside, other=0) / count
        mean_s += tl.sum(n * tl.load(at + channels, mask=inside, other=0), 0)
        mean_t += tl.sum(n * tl.load(at + 2 * channels, mask=inside, other=0), 0)
    var_s = tl.zeros((columns,), tl.float32)
    var_t = tl.zeros((columns,), tl.float32)
    cov = tl.zeros((columns,), tl.float32)
    for start in range(0, programs, rows):
        p = start + tl.arange(0, rows)
        inside = (p < programs)[:, None] & (c < channels)[None, :]
        at = moments + p[:, None].to(tl.int64) * 6 * channels + c[None, :]
        n = tl.load(at, mask=inside, other=0)
        x = tl.load(at + channels, mask=inside, other=0) - mean_s[None, :]
        y = tl.load(at + 2 * channels, mask=inside, other=0) - mean_t[None, :]
        var_s += tl.sum(tl.load(at + 3 * channels, mask=inside, other=0) + n * x * x, 0)
        var_t += tl.sum(tl.load(at + 4 * channels, mask=inside, other=0) + n * y * y, 0)
        cov += tl.sum(tl.load(at + 5 * channels, mask=inside, other=0) + n * x * y, 0)
    var_s, var_t, cov = var_s / count, var_t / count, cov / count
    a = 1 / tl.sqrt(var_s + eps)
    b = 1 / tl.sqrt(var_t + eps)
    keep = c < channels
    tl.store(value + c, (var_s * a * a + var_t * b * b - 2 * cov * a * b) / channels, mask=keep)
    out = coefficients + c
    factor = 2 / (count * channels)
    tl.store(out, mean_s, mask=keep)
    tl.store(out + channels, mean_t, mask=keep)
    tl.store(out + 2 * channels, factor * (eps * a * a * a * a + cov * a * a * a * b), mask=keep)
    tl.store(out + 3 * channels, factor * a * b, mask=keep)


@triton.jit
def _standardized(
    ss, ts, outs, upstream, terms, coefficients, firsts, channels, sizes, blocks, ends,
    last: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """out = upstream[term] * (p (s - mean of s) - q (t - mean of t)), with p and q per channel."""
    begin = 0
    for i in tl.static_range(len(ss)):
        end = ends[i] // 16
        if (tl.program_id(0) >= begin) & (tl.program_id(0) < end):
            program = tl.program_id(0) - begin
            factor = tl.load(upstream + terms[i]).to(tl.float32)
            c = (program % blocks[i]) * columns[i] + tl.arange(0, columns[i])
            keep = c < channels[i]
            numbers = coefficients + 4 * firsts[i] + c
            mean_s = tl.load(numbers, mask=keep, other=0)
            mean_t = tl.load(numbers + channels[i], mask=keep, other=0)
            p = factor * tl.load(numbers + 2 * channels[i], mask=keep, other=0)
            q = factor * tl.load(numbers + 3 * channels[i], mask=keep, other=0)
            k = program // blocks[i]
            tiles = tl.cdiv(sizes[i], rows[i])
            r = (k % tiles) * rows[i] + tl.arange(0, rows[i])
            inside = (r < sizes[i])[:, None] & keep[None, :]
            at = _at(k // tiles, r, c, channels[i], sizes[i], last[i])
            x = tl.load(ss[i] + at, mask=inside, other=0).to(tl.float32) - mean_s[None, :]
            y = tl.load(ts[i] + at, mask=inside, other=0).to(tl.float32) - mean_t[None, :]
            tl.store(outs[i] + at, (p[None, :] * x - q[None, :] * y).to(outs[i].dtype.element_ty), mask=inside)
        begin = end


class Launches(NamedTuple):
    """The arguments of the standardized kernels for pairs with given layouts (see `_layout`)."""

    batches: tuple[int, ...]
    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    last: tuple[bool, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    blocks: tuple[int, ...]  # of channels
    programs: tuple[int, ...]  # of the moments, for every block of channels; in sixteenths
    starts: tuple[int, ...]  # of the pairs' moments
    firsts: tuple[int, ...]  # of the pairs' channels
    counts: tuple[float, ...]
    moments: int  # numbers in all
    for_moments: tuple[int, ...]  # `ends`
    for_finish: tuple[int, ...]
    for_gradients: tuple[int, ...]


@lru_cache(maxsize=256)  # every step asks for the same few, and the host's time counts
def launches(shapes: tuple[tuple[int, int, int, bool], ...]) -> Launches:
    """How features of these shapes (see `shape_of`) are distributed over programs."""
    batches, channels, sizes, last, rows, columns = zip(*(_layout(*shape) for shape in shapes))
    tiles = [b * _parts(n, r) for b, n, r in zip(batches, sizes, rows)]  # along all planes
    blocks = tuple(_parts(c, n) for c, n in zip(channels, columns))
    programs = [_parts(n, LOOPS) for n in tiles]
    room = [_rounded(6 * n * c) for n, c in zip(programs, channels)]
    return Launches(
        batches, channels, sizes, last, rows, columns, blocks,
        programs=tuple(16 * n for n in programs),
        starts=tuple(accumulate(room, initial=0))[:-1],
        firsts=tuple(accumulate(channels, initial=0))[:-1],
        counts=tuple(float(b * n) for b, n in zip(batches, sizes)),
        moments=sum(room),
        for_moments=_ends(n * b for n, b in zip(programs, blocks)),
        for_finish=_ends(_parts(c, FINISH) for c in channels),
        for_gradients=_ends(n * b for n, b in zip(tiles, blocks)),
    )  # fmt: skip


def _layout(batch: int, channels: int, size: int, contiguous: bool) -> tuple[int, int, int, bool, int, int]:
    """Batch, channels, cells, whether channels come last; rows and columns of a tile."""
    if contiguous:
        return batch, channels, size, False, min(BLOCK, triton.next_power_of_2(size)), 1
    columns = min(64, triton.next_power_of_2(channels))
    # all samples are one plane
    return 1, channels, batch * size, True, BLOCK // columns, columns


def shape_of(x: Tensor) -> tuple[int, int, int, bool]:
    """Batch, channels, cells, and whether the channels come second in memory."""
    return x.shape[0], x.shape[1], x.shape[2:].numel(), x.is_contiguous()


def _ends(programs: Iterable[int]) -> tuple[int, ...]:
    return tuple(16 * n for n in accumulate(programs))


def _grid(ends: tuple[int, ...]) -> tuple[int]:
    return (ends[-1] // 16,)


def _rounded(n: int) -> int:
    return 16 * _parts(n, 16)


def _parts(n: int, size: int) -> int:
    return -(-n // size)


def values(pairs: Sequence[tuple[Tensor, Tensor]], normalize: bool, eps: float) -> tuple[Tensor, list[Tensor]]:
    """The terms of pairs, (terms,) in fp32; with `normalize` also what their gradients need, (4 * all channels,).

    Args:
        pairs: (s, t) of the same shape and memory order, contiguous with channels second or last.
        normalize: whether channels are standardized.
        eps: added to their variance.
    """
    ss, ts = zip(*pairs)
    with torch.cuda.device_of(ss[0]):  # where Triton launches
        if not normalize:
            sizes = tuple(s.numel() for s in ss)
            programs = [_parts(n, BLOCK * LOOPS) for n in sizes]
            width, ends, scales = _rounded(max(programs)), _ends(programs), tuple(1 / n for n in sizes)
            partial = ss[0].new_zeros(len(ss), width, dtype=torch.float32)
            _squares[_grid(ends)](ss, ts, partial, width, scales, sizes, ends, block=BLOCK, loops=LOOPS)
            return partial.sum(1), []
        x = launches(tuple(shape_of(s) for s in ss))
        width = max(x.channels)
        partial = ss[0].new_zeros(len(ss), width, dtype=torch.float32)
        moments, coefficients = partial.new_empty(x.moments), partial.new_empty(4 * sum(x.channels))
        _moments[_grid(x.for_moments)](
            ss, ts, moments, x.starts, x.batches, x.channels, x.sizes, x.blocks, x.for_moments,
            last=x.last, rows=x.rows, columns=x.columns, loops=LOOPS, num_warps=8,
        )  # fmt: skip
        _finish[_grid(x.for_finish)](
            moments, x.starts, partial, width, coefficients, x.firsts, x.programs, x.channels, x.counts, eps,
            x.for_finish, rows=64, columns=FINISH,
        )  # fmt: skip
    return partial.sum(1), [coefficients]


def gradients(
    pairs: Sequence[tuple[Tensor, Tensor]], upstream: Tensor, kept: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor]:
    """The gradients of the `wanted` terms with respect to their s, times upstream, in the dtype and memory order of s.

    Args:
        pairs: as in `values`.
        upstream: (terms,) on the device.
        kept: what `values` returned.
        wanted: indices into `pairs`.
    """
    terms, upstream = tuple(wanted), upstream.contiguous()
    ss, ts = zip(*(pairs[i] for i in terms))
    outs = tuple(torch.empty_like(s) for s in ss)
    with torch.cuda.device_of(ss[0]):
        if not kept:
            sizes = tuple(s.numel() for s in ss)
            ends, scales = _ends(_parts(n, BLOCK) for n in sizes), tuple(2 / n for n in sizes)
            _differences[_grid(ends)](ss, ts, outs, upstream, terms, scales, sizes, ends, block=BLOCK)
        else:
            shapes = tuple(shape_of(s) for s, _ in pairs)
            x, firsts = launches(tuple(shapes[i] for i in terms)), launches(shapes).firsts
            _standardized[_grid(x.for_gradients)](
                ss, ts, outs, upstream, terms, kept[0], tuple(firsts[i] for i in terms), x.channels, x.sizes, x.blocks,
                x.for_gradients, last=x.last, rows=x.rows, columns=x.columns,
            )  # fmt: skip
    return list(outs)
