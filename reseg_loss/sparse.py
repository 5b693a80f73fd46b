"""Aligning less: on some samples of a batch, drawn from the seed and the number of the call alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .features import Features


def draw(batch: int, subset: float | int, seed: int, call: int) -> list[int] | None:
    """Positions of the samples to align, in order; None for all of them.

    Args:
        batch: number of samples.
        subset: a fraction (float) or a number (int) of them; at least one is drawn.
        seed: with `call`, all that the draw depends on, so that a resumed run draws the same.
        call: the number of the call.
    """
    count = max(1, round(subset * batch)) if isinstance(subset, float) else subset
    if count >= batch:
        return None
    generator = torch.Generator().manual_seed((seed * 1_000_003 + call) % 2**64)
    return sorted(torch.randperm(batch, generator=generator, device="cpu")[:count].tolist())


def take(features: Features, index: Tensor) -> Features:
    """The features of some samples, in the memory order that they have; the gradient of the others is 0."""
    return Features(
        tuple(_samples(x, index) for x in features.encoder),
        tuple(_samples(x, index) for x in features.decoder),
        _samples(features.bottleneck, index),
    )


def _samples(x: Tensor, index: Tensor) -> Tensor:
    if x.is_contiguous():
        return _Take.apply(x, index)  # pyright: ignore[reportReturnType]
    return _Take.apply(x.movedim(1, -1), index).movedim(-1, 1)  # pyright: ignore


class _Take(torch.autograd.Function):
    """index_select, whose own backward adds with atomics although no index comes twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.batch = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.batch, *gradient.shape[1:])
        return whole.index_copy(0, index, gradient), None
