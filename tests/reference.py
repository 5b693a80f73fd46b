"""Slow, obvious versions of the equations in numpy, written from the paper and independent of the package."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def recon(
    x: np.ndarray, y: np.ndarray, valid: np.ndarray | None = None, alpha: float = 0.6, beta: float = 0.4
) -> float:
    """Eqs. 1-3, element by element; `valid` (B, 1, ...) weighs pixels."""
    squared = absolute = count = 0.0
    for index in np.ndindex(*x.shape):
        w = 1.0 if valid is None else float(valid[(index[0], 0, *index[2:])])
        d = float(x[index]) - float(y[index])
        squared += w * d * d
        absolute += w * abs(d)
        count += w
    return 0.0 if count == 0 else alpha * squared / count + beta * absolute / count


def area_fraction(valid: np.ndarray, spatial: Sequence[int]) -> np.ndarray:
    """The mean of `valid` over all pixels that a coarser cell touches."""
    out = np.zeros((*valid.shape[:2], *spatial))
    for index in np.ndindex(*spatial):
        window = tuple(
            slice(math.floor(i * full / size), math.ceil((i + 1) * full / size))
            for i, full, size in zip(index, valid.shape[2:], spatial)
        )
        out[(slice(None), slice(None), *index)] = valid[(slice(None), slice(None), *window)].mean(
            axis=tuple(range(2, valid.ndim))
        )
    return out


def standardize(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Every channel to weighted mean 0 and biased weighted variance 1, 1e-5 added to the variance."""
    out = np.empty_like(x)
    for c in range(x.shape[1]):
        total = w[:, 0].sum()
        mean = (w[:, 0] * x[:, c]).sum() / total
        variance = (w[:, 0] * (x[:, c] - mean) ** 2).sum() / total
        out[:, c] = (x[:, c] - mean) / math.sqrt(variance + 1e-5)
    return out


def term(student: np.ndarray, teacher: np.ndarray, valid: np.ndarray | None = None, normalize: bool = False) -> float:
    """One term of eqs. 4-6: the (weighted) mean squared difference."""
    w = np.ones((student.shape[0], 1, *student.shape[2:])) if valid is None else area_fraction(valid, student.shape[2:])
    if w.sum() == 0:
        return 0.0
    if normalize:
        student, teacher = standardize(student, w), standardize(teacher, w)
    total = 0.0
    for index in np.ndindex(*student.shape):
        total += float(w[(index[0], 0, *index[2:])]) * (float(student[index]) - float(teacher[index])) ** 2
    return total / (student.shape[1] * w.sum())


def project(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A 1x1 convolution, cell by cell."""
    out = np.zeros((x.shape[0], matrix.shape[0], *x.shape[2:]))
    for b, *cell in np.ndindex(x.shape[0], *x.shape[2:]):
        at = (b, slice(None), *cell)
        out[at] = [sum(float(w) * float(v) for w, v in zip(row, x[at])) for row in matrix]
    return out


def alignment(
    student: tuple[Sequence[np.ndarray], Sequence[np.ndarray], np.ndarray],
    teacher: tuple[Sequence[np.ndarray], Sequence[np.ndarray], np.ndarray],
    valid: np.ndarray | None = None,
    normalize: bool = False,
) -> float:
    """Eq. 7: teacher encoder with student decoder, teacher decoder with student encoder, bottlenecks; over 3."""
    total = term(student[2], teacher[2], valid, normalize)
    for level in range(len(student[0])):
        total += term(student[1][level], teacher[0][level], valid, normalize)
        total += term(student[0][level], teacher[1][level], valid, normalize)
    return total / 3


def dice(label: np.ndarray, p: np.ndarray, counts: np.ndarray) -> float:
    """1 - Dice of one class: squared denominators, sums over the pixels that count; `label` 0 or 1, flat as `p`."""
    overlap = squares = size = 0.0
    for y, q, counted in zip(label, p, counts):
        if counted:
            overlap += q * float(y)
            squares += q * q
            size += float(y)
    return 1 - (2 * overlap + 1e-5) / (squares + size + 1e-5)


def cross_entropy_dice(
    logits: np.ndarray, label: np.ndarray, ignore_index: int = 255, weights: Sequence[float] | None = None
) -> float:
    """0.5 cross-entropy + 0.5 Dice of (B, C, ...) and (B, ...), pixel by pixel; ignored pixels add 0 to the mean."""
    classes = logits.shape[1]
    w = [1.0] * classes if weights is None else [float(v) for v in weights]
    columns = np.moveaxis(logits, 1, -1).reshape(-1, classes)
    labels = [int(y) for y in label.reshape(-1)]
    probabilities = []
    nll = weight = counting = 0.0
    for column, y in zip(columns, labels):
        exps = [math.exp(float(v)) for v in column]
        probabilities.append([e / sum(exps) for e in exps])
        if y != ignore_index:
            nll -= w[y] * math.log(probabilities[-1][y])
            weight += w[y]
            counting += 1
    cross_entropy = 0.0 if weight == 0 else nll / weight * counting / len(labels)
    counts = np.array([y != ignore_index for y in labels])
    total = 0.0
    for c in range(classes):
        total += w[c] * dice(np.array(labels) == c, np.array(probabilities)[:, c], counts)
    return 0.5 * cross_entropy + 0.5 * total / sum(w)


def binary_cross_entropy_dice(logits: np.ndarray, label: np.ndarray, ignore_index: int = 255) -> float:
    """0.5 binary cross-entropy + 0.5 Dice per channel of (B, K, ...) both, entry by entry."""
    p = 1 / (1 + np.exp(-logits))
    nll = 0.0
    for q, y in zip(p.reshape(-1), label.reshape(-1)):
        if y != ignore_index:
            nll -= math.log(q) if y == 1 else math.log(1 - q)
    total = 0.0
    for k in range(logits.shape[1]):
        total += dice(label[:, k].reshape(-1), p[:, k].reshape(-1), label[:, k].reshape(-1) != ignore_index)
    return 0.5 * nll / label.size + 0.5 * total / logits.shape[1]
