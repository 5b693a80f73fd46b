"""Taps that the user names: their modules, and the plan that they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from ..errors import TapError, did_you_mean
from .graph import Graph
from .locate import tap_of
from .tap import Level, Tap, TapPlan
from .trace import Call, Keys, bare, named_modules

KINDS = ("encoder", "decoder", "bottleneck")


def module_of(model: nn.Module, tap: Tap) -> nn.Module:
    """The module of a tap.

    Raises:
        TapError: the model has no such module; close matches are named.
    """
    return named_modules(model)[name_of(model, tap)]


def name_of(model: nn.Module, tap: Tap) -> str:
    """The name of a tap's module, without DistributedDataParallel's `module.` unless that is a part of the name.

    Raises:
        TapError: the model has no such module; close matches are named.
    """
    modules = named_modules(model)
    for name in (tap.module, tap.module.removeprefix("module.")):
        if name in modules:
            return name
    raise TapError(
        f"the model has no module {tap.module!r}.{did_you_mean(tap.module, modules)} "
        "Use the paths of model.named_modules()"
    )


def parse_taps(taps: Mapping[str, Any] | None) -> dict[str, list[Tap]]:
    """{"encoder": [...], "decoder": [...], "bottleneck": [one]} as Taps, from strings or Taps; absent kinds left out.

    Raises:
        TapError: `taps` is not a mapping, has an unknown kind, or a string that is not a tap.
    """
    if taps is not None and not isinstance(taps, Mapping):
        raise TapError(f"taps must be a mapping, got {type(taps).__name__}; pass an image as example_input=")
    parsed: dict[str, list[Tap]] = {}
    for kind, named in (taps or {}).items():
        if kind not in KINDS:
            raise TapError(f"taps has no kind {kind!r}; the kinds are 'encoder', 'decoder' and 'bottleneck'")
        entries = named if isinstance(named, (list, tuple)) else [named]
        if not entries or (kind == "bottleneck" and len(entries) > 1):
            raise TapError(
                f"taps[{kind!r}] names {len(entries)} taps; it must name {'exactly' if entries else 'at least'} one"
            )
        seen = [tap if isinstance(tap, Tap) else Tap.parse(tap) for tap in entries]
        parsed[kind] = [replace(tap, module=bare(tap.module)) for tap in seen]
    return parsed


def pair_up(encoder: Sequence[Tap], decoder: Sequence[Tap], bottleneck: Tap) -> TapPlan:
    """The plan of named taps, with all levels selected.

    Raises:
        TapError: encoder and decoder differ in number or size, or the taps are not named finest first.
    """
    if len(encoder) != len(decoder):
        raise TapError(
            f"{len(encoder)} encoder taps and {len(decoder)} decoder taps are named; every level needs one of each"
        )
    for e, d in zip(encoder, decoder):
        if e.spatial != d.spatial:
            raise TapError(
                f"encoder tap {e} has size {e.spatial} and decoder tap {d} has size {d.spatial}; the taps of a level "
                "must agree in size. Name both lists finest first"
            )
    sizes = [e.spatial for e in encoder]
    if sizes != sorted(sizes, reverse=True):
        raise TapError(f"the levels are named with sizes {sizes}; name them finest first")
    return TapPlan(tuple(Level(e.stride, e.spatial, e, d) for e, d in zip(encoder, decoder)), bottleneck)


def resolve(graph: Graph, model: nn.Module, tap: Tap) -> Tap:
    """A named tap with its tensor's shape, as seen in the dry forward of `graph`.

    Raises:
        TapError: the module, the call or the key does not exist, or the tensor there is not a feature map.
    """
    call, keys, node = _slot(graph, model, tap)
    grid = graph.read(node, tap.layout) if tap.layout else graph.grid(node)
    if grid is None:
        shape, given = graph.nodes[node].shape, f" in layout {tap.layout}" if tap.layout else ""
        raise TapError(
            f"tap {tap}: a tensor of shape {shape} is not a feature map{given} of an image of size {graph.image}"
        )
    found = tap_of(graph, call, keys, node, tap.is_input, grid)
    return replace(found, module=name_of(model, tap), mutated=tap.mutated or found.mutated)


def told_by_shape(graph: Graph, model: nn.Module, plan: TapPlan, given: Iterable[Tap]) -> list[str]:
    """Notes on taps whose layout was inferred from the shape, except those whose layout is `given`."""
    named = {str(tap) for tap in given if tap.layout}
    behind: dict[str, list[str]] = {}
    for tap in (*(tap for level in plan.levels for tap in (level.encoder, level.decoder)), plan.bottleneck):
        operator = graph.hidden.get(_slot(graph, model, tap)[2])
        if operator and str(tap) not in named:
            behind.setdefault(operator, []).append(f"{tap} ({tap.layout})")
    return [
        f"layout inferred from the shape, because {'a kernel' if operator == 'opaque' else operator} before it hides "
        f"what it does: {', '.join(taps)}. If a layout is wrong, pass the right one: Tap(..., layout=...)"
        for operator, taps in behind.items()
    ]


def check_order(graph: Graph, model: nn.Module, plan: TapPlan) -> None:
    """Raise a TapError if a level's encoder does not come before its decoder, or the bottleneck comes last."""

    def at(tap: Tap) -> int:
        return _slot(graph, model, tap)[2]

    for level in plan.levels:
        if at(level.encoder) >= at(level.decoder):
            raise TapError(
                f"encoder tap {level.encoder} is not computed before decoder tap {level.decoder}; name what the model "
                "computes on its way down as encoder, and on its way up as decoder"
            )
    if all(at(plan.bottleneck) >= at(level.decoder) for level in plan.levels):
        raise TapError(
            f"bottleneck tap {plan.bottleneck} is not computed before any decoder tap; name the deepest output of the "
            "encoder"
        )


def _slot(graph: Graph, model: nn.Module, tap: Tap) -> tuple[Call, Keys, int]:
    """The call, the keys and the node of a tap.

    Raises:
        TapError: the module, the call or the key does not exist.
    """
    module = module_of(model, tap)
    calls = [call for call in graph.calls if call.module is module]
    if not calls:
        inner = ", only modules inside it; name one of those" if list(module.children()) else ""
        raise TapError(f"tap {tap}: the forward never calls {tap.module!r} itself{inner}")
    if tap.call >= len(calls):
        raise TapError(f"tap {tap}: a forward calls {tap.module!r} {len(calls)} time(s), and counting starts at @0")
    call = calls[tap.call]
    slots = call.inputs if tap.is_input else call.outputs
    wanted = tap.keys or (slots[0][0] if tap.is_input and slots else ())
    hit = next(((keys, node) for keys, node in slots if _matches(wanted, keys, slots)), None)
    if hit is None:
        shown = ", ".join("".join(f"[{key}]" for key in keys) + f" {graph.nodes[node].shape}" for keys, node in slots)
        verb = "takes in" if tap.is_input else "returns"
        raise TapError(f"tap {tap}: {tap.module!r} {verb} {shown or 'no tensor'}; choose one of these by its key")
    return call, *hit


def replaced(plan: TapPlan, side: Literal["encoder", "decoder"], taps: Sequence[Tap]) -> TapPlan:
    """The plan with the taps of one side replaced, each at the level of its size.

    Raises:
        TapError: two taps have the same size, or no level has a tap's size.
    """
    by_size = {tap.spatial: tap for tap in taps}
    for tap in taps:
        if by_size[tap.spatial] is not tap:
            raise TapError(
                f"{side} taps {tap} and {by_size[tap.spatial]} both have size {tap.spatial}; name only one of them"
            )
        if tap.spatial not in {level.spatial for level in plan.levels}:
            other = "decoder" if side == "encoder" else "encoder"
            found = ", ".join(f"{getattr(level, other)} {level.spatial}" for level in plan.levels)
            raise TapError(
                f"{side} tap {tap} has size {tap.spatial}, but no {other} feature of that size was found (found: "
                f"{found}); name the {other} taps, too"
            )
    levels = [replace(level, **{side: by_size.get(level.spatial, getattr(level, side))}) for level in plan.levels]
    return replace(plan, levels=tuple(levels))


def _matches(wanted: Keys, keys: Keys, slots: list[tuple[Keys, int]]) -> bool:
    """Whether `wanted` means `keys`: negative positions count from the end, and '0' and 0 are the same key."""
    if len(wanted) != len(keys):
        return False
    for depth, (ask, key) in enumerate(zip(wanted, keys)):
        if isinstance(ask, int) and ask < 0:
            ask += len({other[depth] for other, _ in slots if other[:depth] == keys[:depth] and len(other) > depth})
        if str(ask) != str(key):
            return False
    return True
