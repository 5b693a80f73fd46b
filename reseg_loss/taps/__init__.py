"""Where the encoder, the bottleneck and the decoder of a U-shaped model are, found from one dry forward.

The stages, one module each: `record` what the forward does, view it as a `graph` of feature maps, find the `trunk`
from an output down to the bottleneck, see which `skips` join it, and `choose` one pair of taps per level. `names` maps
between the graph and taps; `tap` has the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from ..errors import TapError, did_you_mean
from .choose import choose
from .graph import Graph
from .names import resolve
from .record import named_modules, record
from .skips import find_shape
from .tap import Level, Tap, TapPlan

__all__ = ["Level", "Tap", "TapPlan", "find_taps", "named_modules"]

_KEYS = ("encoder", "decoder", "bottleneck")


def find_taps(
    model: nn.Module,
    example_input: Any,
    *,
    taps: Mapping[str, Any] | None = None,
    levels: Sequence[int | Sequence[int]] | None = None,
    encoder: Literal["skip", "stage"] = "skip",
) -> TapPlan:
    """Encoder and decoder taps of every level of a U-shaped model, and its bottleneck.

    The model runs once, in evaluation mode and without gradients, and is left as it was.

    Args:
        model: any module that goes down in resolution and up again, with skip connections; unwrapped.
        example_input: what the forward takes: an image (B, C, H, W) or (B, C, D, H, W), a tuple of positional or a
            mapping of keyword arguments. Its size should be that of training.
        taps: taps to use instead of finding them: "encoder" and "decoder" (lists, finest first) and "bottleneck", each
            tap a `Tap` or its text, `[in:]module.path[key]...[@call]`. If "encoder" and "decoder" are both named, they
            are the levels, pair by pair; one alone replaces the taps found at its sizes.
        levels: the strides of the levels to select; see `TapPlan.select`.
        encoder: "skip" taps the tensor that the skip connection carries, "stage" the encoder's last block of the level.

    Raises:
        TapError: the model has no such shape, or a named tap does not exist or does not fit.
        ReSegError: there is no image in `example_input`, or the model has lazy parameters.
    """
    if encoder not in ("skip", "stage"):
        raise TapError(f"encoder={encoder!r}: it is 'skip' or 'stage'")
    named = dict(taps or {})
    for key, value in named.items():
        if key not in _KEYS:
            raise TapError(f"taps has no key {key!r}.{did_you_mean(str(key), _KEYS)} Keys are {', '.join(_KEYS)}")
        if key != "bottleneck" and isinstance(value, (str, Tap)):
            raise TapError(f"taps[{key!r}] is a list of taps, finest first; got {value!r}")
    graph = Graph(record(model, example_input))
    sides = {key: [resolve(graph, model, tap) for tap in named[key]] for key in _KEYS[:2] if named.get(key)}
    bottom = resolve(graph, model, named["bottleneck"]) if named.get("bottleneck") else None
    pairs = _pair(sides["encoder"], sides["decoder"]) if len(sides) == 2 else None
    if pairs and bottom:
        return TapPlan(pairs, bottom).select(levels)
    plan = choose(graph, find_shape(graph), encoder)
    if pairs:
        plan = TapPlan(pairs, plan.bottleneck)
    else:
        for side, replacements in sides.items():
            plan = _replaced(plan, side, replacements)
    return TapPlan(plan.levels, bottom or plan.bottleneck, plan.notes).select(levels)


def _pair(encoder: list[Tap], decoder: list[Tap]) -> tuple[Level, ...]:
    if len(encoder) != len(decoder):
        raise TapError(f"{len(encoder)} encoder and {len(decoder)} decoder taps were named; one of each per level")
    for first, second in zip(encoder, decoder):
        if first.spatial != second.spatial:
            raise TapError(
                f"encoder tap {first} is of size {first.spatial}, decoder tap {second} of size {second.spatial}: a level "
                "needs both at the same size; list both sides finest first"
            )
    return tuple(Level(e.stride, e.spatial, e, d) for e, d in zip(encoder, decoder))


def _replaced(plan: TapPlan, side: str, taps: list[Tap]) -> TapPlan:
    """The plan with the tap of one side replaced at each level that one of `taps` has the size of."""
    by_size = {tap.spatial: tap for tap in taps}
    known = {level.spatial: level for level in plan.levels}
    for tap in taps:
        if tap.spatial not in known:
            other = "decoder" if side == "encoder" else "encoder"
            found = ", ".join(f"{getattr(level, other)} {level.spatial}" for level in plan.levels)
            raise TapError(
                f"{side} tap {tap} is of size {tap.spatial}, at which no {other} feature was found (found: {found}); "
                f"name the {other} taps too"
            )
        if by_size[tap.spatial] is not tap:
            raise TapError(f"{side} taps {by_size[tap.spatial]} and {tap} are both of size {tap.spatial}")
    levels = []
    for level in plan.levels:
        pair = {"encoder": level.encoder, "decoder": level.decoder, **{side: by_size.get(level.spatial, getattr(level, side))}}
        levels.append(Level(level.stride, level.spatial, pair["encoder"], pair["decoder"]))
    return TapPlan(tuple(levels), plan.bottleneck, plan.notes)
