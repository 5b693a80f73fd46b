"""Find the encoder, the bottleneck and the decoder of a U-shaped model from one dry forward.

The steps, one module each: `trace` what the forward does, follow the meaning of the `axes` of its tensors, view it as
a `graph` of feature maps, find the `trunk` from an output down to the bottleneck, see which `skips` join it, and
`choose` one pair of taps per level. In addition, `locate` finds the hook that sees a node, `named` handles taps that
the user names, and `tap` holds the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..errors import TapError
from .choose import choose_taps
from .graph import Graph
from .named import KINDS, check_order, pair_up, parse_taps, replaced, resolve, told_by_shape
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
        model: any module that goes down in resolution and up again, with skip connections; without wrappers.
        example_input: what the forward takes: an image (B, C, H, W) or (B, C, D, H, W), a tuple of positional
            arguments, or a mapping of keyword arguments. The image should have the size of training.
        taps: taps to use instead of finding them: "encoder" and "decoder" (lists, finest first) and "bottleneck". Each
            is a `Tap` or its text, `[in:]module.path[key]...[@call]`. If both "encoder" and "decoder" are given, they
            are the levels, pair by pair. If only one is given, it replaces the found taps of the same sizes.
        levels: the strides of the levels to select; see `TapPlan.select`.
        encoder: "skip" taps the tensor that the skip connection carries, "block" the encoder's last block of the level.

    Raises:
        TapError: the model does not have this shape, or a named tap does not exist or does not fit.
        ReSegError: there is no image in `example_input`; or the model fails on it, has lazy parameters, or is not a
            module.
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
    """The result of `find_taps`, and the traced forward: what the model returned, and by which operators."""
    if encoder not in ("skip", "block"):
        raise TapError(f"encoder={encoder!r}: it must be 'skip' or 'block'")
    named = parse_taps(taps)
    trace = trace_forward(model, example_input)
    graph = Graph(trace)
    plan = _plan(graph, model, named, encoder)
    given = [tap for entries in named.values() for tap in entries]
    if named:
        check_order(graph, model, plan)
    plan = replace(plan, notes=(*plan.notes, *told_by_shape(graph, model, plan, given)))
    # levels that the user named are all selected, unless `levels` says otherwise
    return (plan if levels is None and {"encoder", "decoder"} <= named.keys() else plan.select(levels)), trace


def _plan(graph: Graph, model: nn.Module, named: Mapping[str, list[Tap]], encoder: Literal["skip", "block"]) -> TapPlan:
    """The plan with the named taps, and found ones where none are named; every level is selected."""
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
