"""Where the encoder, the bottleneck and the decoder of a U-shaped model are, found from one dry forward.

The steps, one module each: `trace` what the forward does, follow what lies along the `axes` of its tensors, view it
as a `graph` of feature maps, find the `trunk` from an output down to the bottleneck, see which `skips` join it, and
`choose` one pair of taps per level. Besides: `locate` finds the hook that sees a node, `named` serves taps that the
user names, `tap` holds the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..errors import TapError
from .choose import choose_taps
from .graph import Graph
from .named import KINDS, pair_up, parse_taps, replaced, resolve, told_by_shape
from .skips import find_shape
from .tap import Level, Tap, TapPlan
from .trace import Trace, named_modules, trace_forward

__all__ = ["Level", "Tap", "TapPlan", "Trace", "find_taps", "look", "named_modules"]


def find_taps(
    model: nn.Module,
    example_input: Any,
    *,
    taps: Mapping[str, Any] | None = None,
    levels: Sequence[int | Sequence[int]] | None = None,
    encoder: Literal["skip", "block"] = "skip",
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
        encoder: "skip" taps the tensor that the skip connection carries, "block" the encoder's last block of the level.

    Raises:
        TapError: the model has no such shape, or a named tap does not exist or does not fit.
        ReSegError: there is no image in `example_input`, or the model fails on it, is lazy or no module.
    """
    return look(model, example_input, taps=taps, levels=levels, encoder=encoder)[0]


def look(
    model: nn.Module,
    example_input: Any,
    *,
    taps: Mapping[str, Any] | None = None,
    levels: Sequence[int | Sequence[int]] | None = None,
    encoder: Literal["skip", "block"] = "skip",
) -> tuple[TapPlan, Trace]:
    """What `find_taps` finds, and the forward that it was found in: what the model returned, and by which operators."""
    if encoder not in ("skip", "block"):
        raise TapError(f"encoder={encoder!r}: it is 'skip' or 'block'")
    named = parse_taps(taps)
    trace = trace_forward(model, example_input)
    graph = Graph(trace)
    plan = _plan(graph, model, named, encoder)
    given = [tap for entries in named.values() for tap in entries]
    plan = replace(plan, notes=(*plan.notes, *told_by_shape(graph, model, plan, given)))
    # levels that the user named are all selected, unless `levels` says otherwise
    return (plan if levels is None and {"encoder", "decoder"} <= named.keys() else plan.select(levels)), trace


def _plan(graph: Graph, model: nn.Module, named: Mapping[str, list[Tap]], encoder: Literal["skip", "block"]) -> TapPlan:
    """The plan of what is named, and found where it is not, every level selected."""
    seen = {kind: [resolve(graph, model, tap) for tap in entries] for kind, entries in named.items()}
    if len(seen) == len(KINDS):
        return pair_up(seen["encoder"], seen["decoder"], seen["bottleneck"][0])
    plan = choose_taps(graph, find_shape(graph), encoder)
    bottleneck = seen["bottleneck"][0] if "bottleneck" in seen else plan.bottleneck
    if "encoder" in seen and "decoder" in seen:
        return pair_up(seen["encoder"], seen["decoder"], bottleneck)
    for side in ("encoder", "decoder"):
        plan = replaced(plan, side, seen.get(side, []))
    return replace(plan, bottleneck=bottleneck)
