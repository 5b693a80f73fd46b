"""All alignment terms as one differentiable operation that keeps the two features of a pair and nothing else.

Written as plain torch operations (`functional.alignment_term`), autograd keeps several fp32 copies of every feature
and passes over each many times. Here the value is one pass and the gradient, in closed form, another.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import functional as RF
from ..errors import ReSegError

logger = logging.getLogger("reseg_loss")

# "triton" or "torch" forces one; "auto" takes Triton on a CUDA device where a small example comes out right
BACKEND = os.environ.get("RESEG_KERNELS", "auto")


def alignment_terms(pairs: Sequence[tuple[Tensor, Tensor]], *, normalize: str | None = None) -> tuple[Tensor, ...]:
    """`functional.alignment_term` of every pair (student, teacher), without a gradient to the teacher's side.

    Args:
        pairs: features (B, C, *spatial), any float dtype; the two of a pair have the same shape.
        normalize: as in `functional.alignment_term`.

    Returns:
        A scalar for every pair, in at least fp32.
    """
    students, teachers = zip(*pairs)
    terms: Tensor = _Terms.apply(normalize, [t.detach() for t in teachers], *students)  # pyright: ignore
    return terms.unbind()


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, normalize: str | None, teachers: list[Tensor], *students: Tensor) -> Tensor:
        ctx.normalize, ctx.triton = normalize, triton_serves(students, teachers)
        pairs = list(zip(students, teachers))
        if ctx.triton:
            from . import kernels

            pairs = [_in_order(s, t) for s, t in pairs]
            terms, kept = kernels.values(pairs, normalize == "batch", RF.EPS)
        else:
            with torch.autocast(students[0].device.type, enabled=False):
                terms, kept = values(pairs, normalize == "batch")
        ctx.save_for_backward(*students, *(t for _, t in pairs), *kept)
        return terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, saved, normalize = len(upstream), _saved(ctx), ctx.normalize
        pairs, kept = list(zip(saved[:n], saved[n : 2 * n])), saved[2 * n :]
        wanted = [i for i in range(n) if ctx.needs_input_grad[2 + i]]
        if torch.is_grad_enabled():  # create_graph=True
            terms = {i: RF.alignment_term(*pairs[i], normalize=normalize) for i in wanted}
            found = [
                torch.autograd.grad(term, pairs[i][0], upstream[i].to(term.dtype), create_graph=True)[0]
                for i, term in terms.items()
            ]
        elif ctx.triton:
            from . import kernels

            found = kernels.gradients([_in_order(s, t) for s, t in pairs], upstream, kept, wanted)
        else:
            found = [gradient(*pairs[i], upstream[i], kept[i] if normalize else None) for i in wanted]
        gradients = dict(zip(wanted, found))
        return (None, None, *(gradients.get(i) for i in range(n)))


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ReSegError(
            "a feature was overwritten between alignment_loss and backward. With capture_teacher=True the next "
            "alignment_loss does that: call backward before it, or leave out capture_teacher. Otherwise an in-place "
            "operation in your model or step does it"
        ) from error


def values(pairs: Sequence[tuple[Tensor, Tensor]], normalize: bool) -> tuple[Tensor, list[Tensor]]:
    """The terms of pairs, (terms,) in at least fp32; with `normalize` also what each gradient needs, (4, C).

    With z = (f - mean) / sqrt(v + eps) on both sides a term is the mean over channels of v_s a^2 + v_t b^2 - 2 cov a b,
    where v and cov are variances and covariance, and a, b = 1 / sqrt(v + eps).
    """
    terms, kept = [], []
    for s, t in pairs:
        x, y = _raised(s, t)
        if not normalize:
            x = x - y
            terms.append(x.mul_(x).mean())  # in place: on CPU new memory costs more than the arithmetic
            continue
        axes = [0, *range(2, s.ndim)]
        mean_s, mean_t = x.mean(axes, keepdim=True), y.mean(axes, keepdim=True)
        # not torch.var_mean, which takes twenty times as long on CPU
        x, y = x - mean_s, y - mean_t
        off_s, off_t = x.mean(axes), y.mean(axes)  # of the means, which are rounded
        cov = (x * y).mean(axes) - off_s * off_t
        var_s, var_t = x.mul_(x).mean(axes) - off_s**2, y.mul_(y).mean(axes) - off_t**2
        a, b = (var_s + RF.EPS).rsqrt(), (var_t + RF.EPS).rsqrt()
        terms.append((var_s * a**2 + var_t * b**2 - 2 * cov * a * b).mean())
        means = mean_s.flatten() + off_s, mean_t.flatten() + off_t
        p, q = RF.EPS * a**4 + cov * a**3 * b, a * b
        kept.append(torch.stack([*means, p * (2 / s.numel()), q * (2 / s.numel())]))
    dtype = max((term.dtype for term in terms), key=lambda d: d.itemsize)
    return torch.stack([term.to(dtype) for term in terms]), kept


def gradient(s: Tensor, t: Tensor, upstream: Tensor, kept: Tensor | None) -> Tensor:
    """The gradient of one term to the student's feature, times `upstream`, in the feature's dtype.

    Through v_s and cov it is 2 / n (p (s - mean_s) - q (t - mean_t)) with p = eps a^4 + cov a^3 b and q = a b.
    """
    x, y = _raised(s, t)
    if kept is None:
        return (x - y).mul_(upstream * (2 / s.numel())).to(s.dtype)
    mean_s, mean_t, p, q = (row.view(-1, *[1] * (s.ndim - 2)) for row in kept)
    return (x - mean_s).mul_(upstream * p).addcmul_(y - mean_t, upstream * -q).to(s.dtype)


def _raised(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    return s.to(dtype), t.to(dtype)


def _in_order(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous, with their channels either second or last, as the student's are."""
    if not s.is_contiguous() and not s.movedim(1, -1).is_contiguous():
        s = s.contiguous()
    return s, t if t.stride() == s.stride() else torch.empty_like(s, dtype=t.dtype).copy_(t)


def triton_serves(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> bool:
    """Whether the Triton kernels compute the terms of these features."""
    if BACKEND not in ("auto", "triton", "torch"):
        raise ReSegError(f"RESEG_KERNELS={BACKEND!r} in the environment; it must be auto, triton or torch")
    tensors = [*students, *teachers]
    known = all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.numel() > 0 for x in tensors)
    if not known or BACKEND == "torch":
        return False
    return BACKEND == "triton" or (tensors[0].is_cuda and kernels_work(tensors[0].device))


@cache
def kernels_work(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device and agree with torch on a small example; tested once per process."""
    try:
        from . import kernels

        with torch.no_grad():
            g = torch.Generator().manual_seed(0)

            def drawn(shape: tuple[int, ...]) -> Tensor:
                return torch.randn(shape, generator=g, device="cpu").to(device)

            pairs = [(drawn(shape), drawn(shape)) for shape in ((2, 5, 9, 3), (2, 3, 4, 4))]
            # the other memory order is other code, and bf16 is what not every device can do
            s, t = (x.bfloat16().contiguous(memory_format=torch.channels_last) for x in pairs[1])
            pairs[1] = s, t
            for normalize in (False, True):
                (ours, ours_kept), (theirs, kept) = kernels.values(pairs, normalize, RF.EPS), values(pairs, normalize)
                torch.testing.assert_close(ours, theirs)
                found = kernels.gradients(pairs, theirs, ours_kept, [0, 1])
                expected = [gradient(*pair, theirs[i], kept[i] if kept else None) for i, pair in enumerate(pairs)]
                torch.testing.assert_close(found, expected)
    except Exception as error:  # a missing, broken or unfit Triton must not stop a training that torch can do
        logger.warning("the Triton kernels do not work on %s, so torch is used instead (%s)", device, error)
        return False
    return True
