"""Taps that the user names: what their modules are, and the U they make once their tensors were seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import TapError, did_you_mean
from ..formats import interpret
from .tap import Level, Tap, TapPlan

KINDS = ("encoder", "decoder", "bottleneck")


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} without the prefixes of torch.compile and DistributedDataParallel.

    A compiled submodule stands for itself, not for the module inside it: hooks on it fire outside the graph.
    """
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        modules.setdefault(".".join(parts), module)
    return modules


def module_of(model: nn.Module, tap: Tap) -> nn.Module:
    """The module of a tap.

    Raises:
        TapError: the model has no such module; close matches are named.
    """
    modules = named_modules(model)
    if tap.module not in modules:
        raise TapError(
            f"the model has no module {tap.module!r}.{did_you_mean(tap.module, modules)} "
            "Paths are those of model.named_modules()"
        )
    return modules[tap.module]


def parse_taps(taps: Mapping[str, Any]) -> dict[str, list[Tap]]:
    """{"encoder": [...], "decoder": [...], "bottleneck": [one]} as Taps, from strings or Taps; absent ones left out.

    Raises:
        TapError: an unknown kind, or a string that is no tap.
    """
    parsed: dict[str, list[Tap]] = {}
    for kind, named in taps.items():
        if kind not in KINDS:
            raise TapError(f"taps has no kind {kind!r}; the kinds are 'encoder', 'decoder' and 'bottleneck'")
        entries = [named] if isinstance(named, (str, Tap)) else list(named)
        if not entries or (kind == "bottleneck" and len(entries) > 1):
            raise TapError(f"taps[{kind!r}] names {len(entries)} taps; it needs {'one' if entries else 'at least one'}")
        parsed[kind] = [replace(entry, module=_bare(entry.module)) for entry in map(_as_tap, entries)]
    return parsed


def seen(
    tap: Tap,
    shape: Sequence[int],
    batch: int,
    image: Sequence[int],
    *,
    mutated: bool,
    grids: dict[int, tuple[int, ...]] | None = None,
) -> Tap:
    """The tap with what its tensor's shape tells, for a batch of images of size `image`; a layout given stays.

    Raises:
        TapError: the tensor is no feature map over the image.
    """
    grid = interpret(shape, batch, image, grids)
    if grid is None:
        raise TapError(
            f"{tap} has shape {tuple(shape)}, which is no feature map of a batch of {batch} images of size "
            f"{tuple(image)}: its size is not the image's divided by a whole number. Tap another module"
        )
    return replace(
        tap,
        spatial=grid.spatial,
        channels=grid.channels,
        layout=grid.layout,
        stride=grid.stride,
        mutated=tap.mutated or mutated,
    )


def pair_up(encoder: Sequence[Tap], decoder: Sequence[Tap], bottleneck: Tap) -> TapPlan:
    """The plan of named taps, all levels selected.

    Raises:
        TapError: numbers or sizes of encoder and decoder differ, or they are not named finest first.
    """
    if len(encoder) != len(decoder):
        raise TapError(
            f"{len(encoder)} encoder taps and {len(decoder)} decoder taps are named; levels need one of each"
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


def _as_tap(entry: str | Tap) -> Tap:
    return entry if isinstance(entry, Tap) else Tap.parse(entry)


def _bare(module: str) -> str:
    parts = [part for part in module.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts and parts[0] == "module" else parts)
