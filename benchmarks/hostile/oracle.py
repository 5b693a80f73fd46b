"""Slow, obvious versions of what the library computes, in fp64 where they can be. Nothing here calls the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .verdict import WrongError

Find = Callable[[Tensor], Tensor]  # what a module returned, to (B, C, *spatial)
EPS = 1e-5


@dataclass(frozen=True)
class Truth:
    """The modules of a net that return its features, by path (and [index] in a tuple), the finest level first."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    bottleneck: str
    reading: Callable[[str, Tensor], Tensor] = lambda path, x: x

    @property
    def paths(self) -> tuple[str, ...]:
        return (*self.encoder, *self.decoder, self.bottleneck)


@dataclass
class Seen:
    encoder: list[Tensor]
    decoder: list[Tensor]
    bottleneck: Tensor

    @property
    def all(self) -> list[Tensor]:
        return [*self.encoder, *self.decoder, self.bottleneck]


@contextmanager
def watching(model: nn.Module, truth: Truth) -> Iterator[Callable[[], Seen]]:
    """Plain hooks on what stands at the truth's paths now; gives a function that returns what the last forward left."""
    kept: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        module, _, index = path.partition("[")

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            kept[path] = output[int(index.rstrip("]"))] if index else output

        return model.get_submodule(module).register_forward_hook(hook)

    handles = [keep(path) for path in truth.paths]

    def seen() -> Seen:
        maps = {path: truth.reading(path, kept[path]) for path in truth.paths}
        return Seen([maps[p] for p in truth.encoder], [maps[p] for p in truth.decoder], maps[truth.bottleneck])

    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- the alignment, eqs. 4-8


def alignment(
    student: Seen,
    teacher: Seen,
    *,
    standardized: bool = False,
    valid: Tensor | None = None,
    weights: Sequence[float] | None = None,
    divisor: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Eq. 7. `weights`: of teacher encoder with student decoder by level, then the other way, then the bottleneck."""
    pairs = [
        *zip(student.decoder, teacher.encoder),
        *zip(student.encoder, teacher.decoder),
        (student.bottleneck, teacher.bottleneck),
    ]
    weights = [1.0] * len(pairs) if weights is None else weights
    total = torch.zeros((), dtype=torch.float64)
    for weight, (s, t) in zip(weights, pairs):
        total = total + weight * term(s.double(), t.detach().double(), standardized, valid, seed)
    return total / divisor


def term(s: Tensor, t: Tensor, standardized: bool, valid: Tensor | None, seed: int = 0) -> Tensor:
    if s.shape[1] != t.shape[1]:
        s = torch.einsum("dc,bc...->bd...", orthonormal(t.shape[1], s.shape[1], seed), s)
    w = torch.ones_like(s[:, :1]) if valid is None else area(valid.double(), s.shape[2:])
    if float(w.sum()) == 0:
        return (s * 0).sum()
    if standardized:
        s, t = standardize(s, w), standardize(t, w)
    return (w * (s - t) ** 2).sum() / (s.shape[1] * w.sum())


def standardize(x: Tensor, w: Tensor) -> Tensor:
    axes = [0, *range(2, x.ndim)]
    mean = (w * x).sum(axes, keepdim=True) / w.sum()
    variance = (w * (x - mean) ** 2).sum(axes, keepdim=True) / w.sum()
    return (x - mean) / torch.sqrt(variance + EPS)


def area(valid: Tensor, spatial: Sequence[int]) -> Tensor:
    """The mean of `valid` (B, 1, *image) over all pixels that a coarser cell touches."""
    out = torch.zeros(*valid.shape[:2], *spatial, dtype=torch.float64)
    for cell in torch.cartesian_prod(*(torch.arange(n) for n in spatial)).tolist():
        window = tuple(
            slice(math.floor(i * full / n), math.ceil((i + 1) * full / n))
            for i, full, n in zip(cell, valid.shape[2:], spatial)
        )
        out[(slice(None), slice(None), *cell)] = valid[(slice(None), slice(None), *window)].flatten(2).mean(2)
    return out


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """The documented fixed map: Gram and Schmidt's of a seeded normal matrix, which is unique."""
    tall = torch.randn(
        max(rows, columns), min(rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    q = torch.zeros_like(tall)
    for i, column in enumerate(tall.T):
        for _ in range(2):  # once more for what is rounded
            column = column - q @ (q.T @ column)
        q[:, i] = column / column.norm()
    return q if rows >= columns else q.T


def index_map(label: Tensor, ignored: float | None = None) -> tuple[Tensor, Tensor | None]:
    """The paper's input of the teacher, (B, 1, *spatial) class indices, and which pixels count."""
    index = label.double().unsqueeze(1)
    if ignored is None:
        return index, None
    valid = index != ignored
    return torch.where(valid, index, torch.zeros_like(index)), valid.double()


# --- deep supervision and cross entropy


def nearest(label: Tensor, spatial: Sequence[int]) -> Tensor:
    """A label (B, *image) at a coarser size: of every cell the pixel at floor(i * image / size)."""
    out = torch.zeros(len(label), *spatial, dtype=label.dtype)
    for cell in torch.cartesian_prod(*(torch.arange(n) for n in spatial)).tolist():
        at = tuple(i * full // n for i, full, n in zip(cell, label.shape[1:], spatial))
        out[(slice(None), *cell)] = label[(slice(None), *at)]
    return out


def cross_entropy(logits: Tensor, label: Tensor, ignored: int | None = None) -> Tensor:
    """The mean over counting pixels of -log softmax; 0 where none counts."""
    logits = logits.double()
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    counts = torch.ones_like(label, dtype=torch.bool) if ignored is None else label != ignored
    if not bool(counts.any()):
        return (logits * 0).sum()
    chosen = log_p.gather(1, torch.where(counts, label, torch.zeros_like(label)).long().unsqueeze(1)).squeeze(1)
    return -chosen[counts].mean()


def deep_supervision(
    heads: Mapping[str, nn.Module], decoder: Sequence[Tensor], label: Tensor, weights: Sequence[float], ignored: Any
) -> Tensor:
    """The weighted sum over levels of the cross entropy of 1x1 heads."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (x, weight) in enumerate(zip(decoder, weights)):
        head: Any = heads[f"decoder_{i + 1}"]
        matrix, bias = head.weight.double().flatten(1), head.bias.double()
        logits = torch.einsum("dc,bc...->bd...", matrix, x.double()) + bias.view(-1, *[1] * (x.ndim - 2))
        total = total + weight * cross_entropy(logits, nearest(label, x.shape[2:]), ignored)
    return total


# --- comparing


def gradients(value: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, of)]


def near(ours: Any, theirs: Any, what: str, tolerance: float = 1e-4) -> None:
    """Raise a WrongError unless two numbers or lists of tensors agree, relative to the norm of the second."""
    a, b = (torch.cat([t.detach().double().flatten() for t in _listed(x)]) for x in (ours, theirs))
    if a.shape != b.shape:
        raise WrongError(f"{what}: {a.numel()} numbers, expected {b.numel()}")
    off, size = float((a - b).norm()), float(b.norm())
    if not off <= tolerance * size + 1e-9:
        raise WrongError(f"{what} is off by {off:.3g}, its norm is {size:.3g}")


def same(ours: Any, theirs: Any, what: str) -> None:
    """Raise a WrongError unless two tensors or lists of tensors are equal to the bit."""
    a, b = _listed(ours), _listed(theirs)
    if len(a) != len(b) or not all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b)):
        raise WrongError(f"{what} is not the same to the bit")


def differ(ours: Any, theirs: Any, what: str) -> None:
    if all(torch.equal(x, y) for x, y in zip(_listed(ours), _listed(theirs))):
        raise WrongError(f"{what} has not changed")


def _listed(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (int, float)):
        return [torch.tensor(float(value), dtype=torch.float64)]
    if isinstance(value, Mapping):
        return _listed(list(value.values()))
    return [x for v in value for x in _listed(v)]
