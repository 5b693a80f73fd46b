"""The teacher's forward on some samples of a batch at a time, which holds the activations of those alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import ReSegError
from .features import Features


def in_parts(forward: Callable[[Tensor], Features], encoded: Tensor, most: int | None) -> Features:
    """What `forward` gives of a batch, from parts of at most `most` samples; None is all at once.

    The parts' sizes differ by one at most, so that a compiled forward sees few of them.

    Raises:
        ReSegError: a feature of a part has another number of samples than the part.
    """
    batch = len(encoded)
    if most is None or batch <= most:
        return forward(encoded)
    whole, start = None, 0
    for part in encoded.tensor_split(-(-batch // most)):
        whole = _with(whole, forward(part), start, len(part), batch)  # no name keeps a part while the next runs
        start += len(part)
    assert whole is not None
    return whole


def refuse_mixing(body: nn.Module, most: int | None) -> None:
    """Raise a ReSegError if parts of at most `most` samples would have other features than the whole batch."""
    if most is None:
        return
    norms = [(name, m) for name, m in body.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    mixing = [name or "the teacher" for name, m in norms if m.running_mean is None]
    if mixing:
        raise ReSegError(
            f"teacher_batch={most} would change the teacher's features: {', '.join(mixing)} take their statistics from "
            "the batch even in evaluation (track_running_stats=False). Let them keep statistics, or leave "
            "teacher_batch out"
        )


def _with(whole: Features | None, part: Features, start: int, count: int, batch: int) -> Features:
    """The batch's features with a part's written to their place; the first part tells what memory they take."""
    if whole is None:
        encoder, decoder = (tuple(_room(x, batch) for x in level) for level in (part.encoder, part.decoder))
        whole = Features(encoder, decoder, _room(part.bottleneck, batch))
    for x, y in zip(_flat(whole), _flat(part)):
        if len(y) != count:  # one sample would be broadcast
            raise ReSegError(
                f"the teacher gave a feature of shape {tuple(y.shape)} for {count} samples; leave teacher_batch out"
            )
        x[start : start + count].copy_(y)
    return whole


def _room(part: Tensor, batch: int) -> Tensor:
    """Memory for a batch, where a sample lies as in the part: channels that are last stay last."""
    sample = torch.empty_like(part[0], device="meta")  # dense also where the part is a view with gaps
    return part.new_empty_strided((batch, *sample.shape), (sample.numel(), *sample.stride()))


def _flat(features: Features) -> tuple[Tensor, ...]:
    return *features.encoder, *features.decoder, features.bottleneck
