"""Triton kernels of the alignment terms: every feature is read once for the value and once for the gradient.

Both sides are (B, C, S) in any of two memory orders, given by strides; sums are fp32 whatever the features are. Partial
sums go through memory, not through atomics, so results are deterministic. `terms.py` calls this, and holds the same in
torch. Imports triton, so it is imported where it is used only.
"""

# a kernel's body is not Python, and its arguments are converted on the way
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a tile
LOOPS = 8  # tiles that one program sums up


@triton.jit
def _squares(s, t, partial, scale, n, block: tl.constexpr, loops: tl.constexpr):
    """partial[program] = scale * sum (s - t)^2 over the program's elements."""
    start = tl.program_id(0).to(tl.int64) * block * loops
    total = tl.zeros((block,), tl.float32)
    for i in range(loops):
        at = start + i * block + tl.arange(0, block)
        inside = at < n
        x = tl.load(s + at, mask=inside, other=0).to(tl.float32)
        y = tl.load(t + at, mask=inside, other=0).to(tl.float32)
        total += (x - y) * (x - y)
    tl.store(partial + tl.program_id(0), tl.sum(total) * scale)


@triton.jit
def _difference(s, t, out, upstream, scale, n, block: tl.constexpr):
    """out = upstream * scale * (s - t); in fp16 the product is rounded once, with the loss scale in it."""
    factor = tl.load(upstream).to(tl.float32) * scale
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    x = tl.load(s + at, mask=inside, other=0).to(tl.float32)
    y = tl.load(t + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (factor * (x - y)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _moments(
    s, t, partial, batch, channels, size, s_batch, s_channel, s_cell, tiles,
    rows: tl.constexpr, columns: tl.constexpr, loops: tl.constexpr,
):  # fmt: skip
    """partial[program, :, c] = count, mean of s and t, sum of squared deviations of s and t, and of their product.

    Sums are of deviations from the mean of the program's first tile, which is near the channel's: no cancellation.
    """
    program = tl.program_id(0)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    column = c[None, :].to(tl.int64) * s_channel
    inside_c = (c < channels)[None, :]
    n = 0.0
    shift_s = tl.zeros((columns,), tl.float32)
    shift_t = tl.zeros((columns,), tl.float32)
    # summed up over the rows at the end only
    s1 = tl.zeros((rows, columns), tl.float32)
    t1 = tl.zeros((rows, columns), tl.float32)
    s2 = tl.zeros((rows, columns), tl.float32)
    t2 = tl.zeros((rows, columns), tl.float32)
    st = tl.zeros((rows, columns), tl.float32)
    for i in range(loops):
        k = program * loops + i
        b = k // tiles
        r = (k % tiles) * rows + tl.arange(0, rows)
        inside_r = ((r < size) & (b < batch))[:, None]
        inside = inside_r & inside_c
        at = b.to(tl.int64) * s_batch + r[:, None].to(tl.int64) * s_cell + column
        x = tl.load(s + at, mask=inside, other=0).to(tl.float32)
        y = tl.load(t + at, mask=inside, other=0).to(tl.float32)
        here = tl.where(b < batch, tl.minimum(size - (k % tiles) * rows, rows), 0).to(tl.float32)
        if i == 0:
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
    out = partial + program.to(tl.int64) * 6 * channels + c
    keep = c < channels
    tl.store(out, n + tl.zeros((columns,), tl.float32), mask=keep)
    tl.store(out + channels, shift_s + sum_s / n, mask=keep)
    tl.store(out + 2 * channels, shift_t + sum_t / n, mask=keep)
    tl.store(out + 3 * channels, tl.sum(s2, 0) - sum_s * sum_s / n, mask=keep)
    tl.store(out + 4 * channels, tl.sum(t2, 0) - sum_t * sum_t / n, mask=keep)
    tl.store(out + 5 * channels, tl.sum(st, 0) - sum_s * sum_t / n, mask=keep)


@triton.jit
def _finish(
    partial, value, coefficients, programs, channels, count, eps, scale, rows: tl.constexpr, columns: tl.constexpr
):
    """Merge the partial moments (Chan et al. 1979): value[c], and the four numbers per channel of the gradient."""
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    mean_s = tl.zeros((columns,), tl.float32)
    mean_t = tl.zeros((columns,), tl.float32)
    for start in range(0, programs, rows):
        p = start + tl.arange(0, rows)
        inside = (p < programs)[:, None] & (c < channels)[None, :]
        at = partial + p[:, None].to(tl.int64) * 6 * channels + c[None, :]
        n = tl.load(at, mask=inside, other=0) / count
        mean_s += tl.sum(n * tl.load(at + channels, mask=inside, other=0), 0)
        mean_t += tl.sum(n * tl.load(at + 2 * channels, mask=inside, other=0), 0)
    var_s = tl.zeros((columns,), tl.float32)
    var_t = tl.zeros((columns,), tl.float32)
    cov = tl.zeros((columns,), tl.float32)
    for start in range(0, programs, rows):
        p = start + tl.arange(0, rows)
        inside = (p < programs)[:, None] & (c < channels)[None, :]
        at = partial + p[:, None].to(tl.int64) * 6 * channels + c[None, :]
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
    tl.store(value + c, scale * (var_s * a * a + var_t * b * b - 2 * cov * a * b), mask=keep)
    out = coefficients + c
    factor = 2 * scale / count
    tl.store(out, mean_s, mask=keep)
    tl.store(out + channels, mean_t, mask=keep)
    tl.store(out + 2 * channels, factor * (eps * a * a * a * a + cov * a * a * a * b), mask=keep)
    tl.store(out + 3 * channels, factor * a * b, mask=keep)


@triton.jit
def _standardized(
    s, t, out, upstream, coefficients, batch, channels, size, s_batch, s_channel, s_cell, tiles,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """out = upstream * (p (s - mean of s) - q (t - mean of t)), with p and q per channel."""
    factor = tl.load(upstream).to(tl.float32)
    k = tl.program_id(0)
    c = tl.program_id(1) * columns + tl.arange(0, columns)
    keep = c < channels
    mean_s = tl.load(coefficients + c, mask=keep, other=0)
    mean_t = tl.load(coefficients + channels + c, mask=keep, other=0)
    p = factor * tl.load(coefficients + 2 * channels + c, mask=keep, other=0)
    q = factor * tl.load(coefficients + 3 * channels + c, mask=keep, other=0)
    r = (k % tiles) * rows + tl.arange(0, rows)
    inside = (r < size)[:, None] & keep[None, :]
    at = (k // tiles).to(tl.int64) * s_batch + r[:, None].to(tl.int64) * s_cell + c[None, :].to(tl.int64) * s_channel
    x = tl.load(s + at, mask=inside, other=0).to(tl.float32) - mean_s[None, :]
    y = tl.load(t + at, mask=inside, other=0).to(tl.float32) - mean_t[None, :]
    tl.store(out + at, (p[None, :] * x - q[None, :] * y).to(out.dtype.element_ty), mask=inside)


class Layout(NamedTuple):
    """A feature as (batch, channels, size) with strides, and how it is cut into tiles of (rows, columns)."""

    batch: int
    channels: int
    size: int
    s_batch: int
    s_channel: int
    s_cell: int
    tiles: int  # along one plane
    rows: int
    columns: int

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """The layout of `x`, which is contiguous with its channels either second or last."""
        return _layout(x.shape[0], x.shape[1], x.shape[2:].numel(), x.is_contiguous())

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of cells, and of channels."""
        return self.batch * self.tiles, _parts(self.channels, self.columns)


@lru_cache(maxsize=256)  # every step asks for the same few, and the host's time counts
def _layout(batch: int, channels: int, size: int, contiguous: bool) -> Layout:
    if contiguous:
        rows = min(BLOCK, _power_of_2(size))
        return Layout(batch, channels, size, channels * size, size, 1, _parts(size, rows), rows, 1)
    columns = min(64, _power_of_2(channels))
    rows = BLOCK // columns
    size *= batch
    return Layout(1, channels, size, 0, 1, channels, _parts(size, rows), rows, columns)


def _parts(n: int, size: int) -> int:
    return -(-n // size)  # triton.cdiv is slow outside of kernels


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def values(pairs: Sequence[tuple[Tensor, Tensor]], normalize: bool, eps: float) -> tuple[Tensor, list[Tensor]]:
    """The terms of pairs of the same layout, (terms,) in fp32, and with `normalize` what their gradients need."""
    first, coefficients = pairs[0][0], []
    with torch.cuda.device_of(first):  # where Triton launches
        if not normalize:
            programs = [_parts(s.numel(), BLOCK * LOOPS) for s, _ in pairs]
            partial = first.new_zeros(len(pairs), max(programs), dtype=torch.float32)
            for (s, t), n, out in zip(pairs, programs, partial):
                _squares[(n,)](s, t, out, 1 / s.numel(), s.numel(), block=BLOCK, loops=LOOPS)
            return partial.sum(1), coefficients
        layouts = [Layout.of(s) for s, _ in pairs]
        partial = first.new_zeros(len(pairs), max(x.channels for x in layouts), dtype=torch.float32)
        for (s, t), x, out in zip(pairs, layouts, partial):
            n = _parts(x.grid[0], LOOPS)
            moments, c, columns = out.new_empty(n, 6, x.channels), out.new_empty(4, x.channels), 16
            coefficients.append(c)
            _moments[(n, x.grid[1])](s, t, moments, *x[:7], rows=x.rows, columns=x.columns, loops=LOOPS, num_warps=8)
            _finish[(_parts(x.channels, columns),)](
                moments, out, c, n, x.channels, s.numel() / x.channels, eps, 1 / x.channels, rows=64, columns=columns
            )
    return partial.sum(1), coefficients


def gradient(s: Tensor, t: Tensor, upstream: Tensor, coefficients: Tensor | None) -> Tensor:
    """The gradient of one term to `s`, in its dtype and layout, times `upstream`, a scalar on the device."""
    out, n = torch.empty_like(s), s.numel()
    with torch.cuda.device_of(s):
        if coefficients is None:
            _difference[(_parts(n, BLOCK),)](s, t, out, upstream, 2 / n, n, block=BLOCK)
        else:
            x = Layout.of(s)
            _standardized[x.grid](s, t, out, upstream, coefficients, *x[:7], rows=x.rows, columns=x.columns)
    return out
