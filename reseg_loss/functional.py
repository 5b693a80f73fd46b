"""The equations, as pure functions that never broadcast.

All of them compute in at least fp32 (fp64 stays fp64), except that `project` may compute in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.inputs import check_feature, check_number, check_scalar
from .errors import ReSegError

EPS = 1e-5  # of `standardize`, as in method and measurements


def recon_loss(
    prediction: Tensor, image: Tensor, valid: Tensor | None = None, *, alpha: float = 0.6, beta: float = 0.4
) -> Tensor:
    """alpha * MSE + beta * L1, each a mean over all elements (eqs. 1-3).

    Args:
        prediction: (B, C, *spatial), any float dtype.
        image: the same shape.
        valid: (B, 1, *spatial) weights in [0, 1]; each mean becomes sum(valid * error) / (C * sum(valid)).

    Returns:
        A scalar in at least fp32; 0 (with a graph) if nothing is valid.

    Raises:
        ReSegError: shapes differ, or an argument is not a dense floating point tensor.
    """
    with _full_precision(prediction=prediction, image=image) as (prediction, image):
        difference = _counting(prediction - image, valid)
        return alpha * _mean(difference.square(), valid) + beta * _mean(difference.abs(), valid)


def alignment_term(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, normalize: str | None = None
) -> Tensor:
    """Mean squared difference of two features (one term of eqs. 4-6).

    Args:
        student: (B, C, *spatial), any float dtype.
        teacher: the same shape; no gradient is expected to flow into it.
        valid: (B, 1, *spatial) valid area fraction w, at the features' size: sum(w d^2) / (C sum w).
        normalize: "batch" standardizes both sides first (`standardize`, with the same weights); None compares them raw.

    Returns:
        A scalar in at least fp32; 0 (with a graph) if nothing is valid.

    Raises:
        ReSegError: shapes differ, an argument is not a dense floating point tensor, or `normalize` has another value.
    """
    if normalize not in (None, "batch"):
        raise ReSegError(f"normalize={normalize!r}; it must be None or 'batch'")
    with _full_precision(student=student, teacher=teacher) as (student, teacher):
        student, teacher = _counting(student, valid), _counting(teacher, valid)
        if normalize == "batch":
            student, teacher = standardize(student, valid), standardize(teacher, valid)
        return _mean((student - teacher).square(), valid)


def standardize(x: Tensor, valid: Tensor | None = None, eps: float = EPS) -> Tensor:
    """(x - mean) / sqrt(var + eps) per channel over batch and space, biased variance, gradient through both.

    Args:
        x: (B, C, *spatial), any float dtype.
        valid: (B, 1, *spatial) weights of the statistics.
        eps: added to the variance.

    Returns:
        The same shape, in at least fp32.

    Raises:
        ReSegError: `x` or `valid` is not such a tensor, or `eps` is not a finite number > 0.
    """
    check_number("eps", eps, above=0)
    with _full_precision(x=x) as (x,):
        axes = [0, *range(2, x.ndim)]
        if valid is None:
            variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        else:
            weight = _weights(valid, x)
            total = weight.sum().clamp_min(torch.finfo(x.dtype).tiny)
            mean = (weight * x).sum(axes, keepdim=True) / total
            variance = (weight * (x - mean).square()).sum(axes, keepdim=True) / total
        return (x - mean) * (variance + eps).rsqrt()


def valid_fraction(valid: Tensor, spatial: Sequence[int]) -> Tensor:
    """The valid area fraction of every cell of a coarser grid: the mean of `valid` over the pixels that it touches.

    Args:
        valid: (B, 1, *image) weights in [0, 1].
        spatial: the coarser grid's size. Pixels that a cell covers in part count in full.

    Returns:
        (B, 1, *spatial).

    Raises:
        ReSegError: `valid` is not a dense floating point tensor, or `spatial` is not a size with the same number of
            axes.
    """
    check_feature("valid", valid)
    if not isinstance(spatial, Sequence) or len(spatial) != valid.ndim - 2:
        raise ReSegError(f"spatial={spatial!r}; it must be a size with {valid.ndim - 2} axes, like valid")
    for n in spatial:
        check_number("a size in spatial", n, least=1, whole=True)
    return valid if tuple(valid.shape[2:]) == tuple(spatial) else F.interpolate(valid, list(spatial), mode="area")


def semi_orthogonal(out_channels: int, in_channels: int, seed: int = 0) -> Tensor:
    """A fixed (out_channels, in_channels) matrix with orthonormal rows or columns, whichever are fewer; fp64, CPU.

    The same seed and shape give the same matrix. It is unique, because the signs of the decomposition are fixed.

    Raises:
        ReSegError: a number of channels is not a whole number >= 1, or the seed is not one from 0 to 2**63 - 1.
    """
    check_number("out_channels", out_channels, least=1, whole=True)
    check_number("in_channels", in_channels, least=1, whole=True)
    check_number("seed", seed, least=0, most=2**63 - 1, whole=True)
    generator = torch.Generator().manual_seed(seed)
    shape = max(out_channels, in_channels), min(out_channels, in_channels)
    tall = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")  # whatever the default device is
    q, r = torch.linalg.qr(tall)
    q = q * r.diagonal().sign()
    return q if out_channels >= in_channels else q.T.contiguous()


def project(x: Tensor, matrix: Tensor) -> Tensor:
    """A 1x1 convolution over any number of spatial axes: (B, C, *spatial) by (D, C) to (B, D, *spatial).

    Args:
        x: any float dtype.
        matrix: (D, C). If both are in bf16, torch's bf16 matmul is used, which runs on tensor cores and reads and
            writes half as much. Otherwise both are cast to at least fp32 (fp16 could overflow).

    Returns:
        The projected feature, bf16 or at least fp32, in the memory order of `x`.

    Raises:
        ReSegError: an argument is not a dense floating point tensor, or the matrix is not (D, C).
    """
    check_feature("x", x)
    check_feature("matrix", matrix)
    if matrix.ndim != 2 or matrix.shape[1] != x.shape[1]:
        raise ReSegError(
            f"matrix has shape {tuple(matrix.shape)}; for a feature with {x.shape[1]} channels it must be "
            f"(D, {x.shape[1]})"
        )
    with _full_precision(torch.bfloat16 if matrix.dtype == torch.bfloat16 else torch.float32, x=x) as (x,):
        matrix = matrix.to(x.dtype)
        # the result in the order of x, channels second or last, so that no later step has to copy it
        if x.ndim > 2 and x.is_contiguous():
            # not torch.matmul, which puts channels last, with copies, where the matrix is trained
            return torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])
        return F.linear(x.movedim(1, -1), matrix).movedim(-1, 1)


@contextmanager
def _full_precision(least: torch.dtype = torch.float32, **named: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in one dtype of at least fp32 (or `least`), with autocast off; raises if they would broadcast."""
    tensors = tuple(named.values())
    first = tensors[0]
    for name, tensor in named.items():
        check_feature(name, tensor)
        if tensor.shape != first.shape:
            raise ReSegError(
                f"the two sides have different shapes, {tuple(first.shape)} and {tuple(tensor.shape)}; "
                "they are compared element by element and never broadcast"
            )
    dtype = least
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    with torch.autocast(first.device.type, enabled=False):
        yield tuple(tensor.to(dtype) for tensor in tensors)


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return x.mean()
    weight = _weights(valid, x)
    total = x.shape[1] * weight.sum()
    # the clamp only acts where nothing is valid; then the numerator is an exact 0 that still has its graph
    return (weight * x).sum() / total.clamp_min(torch.finfo(x.dtype).tiny)


def _counting(x: Tensor, valid: Tensor | None) -> Tensor:
    """`x` with 0 where nothing counts, so that a NaN there does not reach a sum or a gradient."""
    return x if valid is None else torch.where(_weights(valid, x) > 0, x, 0.0)


def _weights(valid: Tensor, x: Tensor) -> Tensor:
    check_feature("valid", valid)
    if valid.shape != (x.shape[0], 1, *x.shape[2:]):
        raise ReSegError(
            f"valid has shape {tuple(valid.shape)}; for a tensor of shape {tuple(x.shape)} "
            f"it must be {(x.shape[0], 1, *x.shape[2:])}"
        )
    return valid.to(x.dtype)


def gradient_norms(parameters: Iterable[nn.Parameter], losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm of each loss's gradient at a model's parameters, to see how strongly each loss pulls.

    It takes a backward pass for each loss.

    Args:
        parameters: those that do not require a gradient are skipped.
        losses: {name: scalar}; their graphs are kept, so that a backward of their sum may follow.

    Returns:
        {name: scalar}, in fp32; 0 for a loss that depends on none of the parameters.

    Raises:
        ReSegError: a loss is not a scalar.
    """
    wanted = [p for p in parameters if p.requires_grad]

    def norm(name: str, value: Tensor) -> Tensor:
        check_scalar(f"losses[{name!r}]", value)
        if not value.requires_grad:  # everything that it depends on is frozen
            return torch.zeros((), device=value.device)
        gradients = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        norms = [g.float().norm() for g in gradients if g is not None]
        return torch.stack(norms).norm() if norms else torch.zeros((), device=value.device)

    return {name: norm(name, value) for name, value in losses.items()}
