"""What a tap is, how it is written, and the plan that a set of taps makes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from ..errors import TapError
from .layouts import CHANNELS_FIRST

_SYNTAX = re.compile(r"(?P<input>in:)?(?P<module>[^\[\]@]*)(?P<keys>(\[[^\[\]]+\])*)(@(?P<call>\d+))?")


@dataclass(frozen=True)
class Tap:
    """One tensor of a forward pass: an output (or input) of a module, written `[in:]module.path[key]...[@call]`.

    Attributes:
        module: path of the module in the root, as in `named_modules()`.
        spatial: spatial size of the tensor for the example input; empty until it is seen in a forward.
        channels: its number of channels; 0 until it is seen.
        layout: its layout, one of `taps.layouts.LAYOUTS`; empty until it is seen. A layout that you pass is kept: if
            the number of channels equals the sides, the shape alone cannot tell NCHW from NHWC.
        stride: image size divided by `spatial`, per axis; empty until it is seen.
        keys: path into a tuple, list, dict or dataclass. For an input, the first key is the argument's position or
            name; no key means the first argument.
        call: which call of the module within one forward, counted from 0.
        is_input: tap the module's input, not its output.
        mutated: the tensor is overwritten in place later in the forward, so the extractor keeps a clone. Pass True if
            this happens only in training.
    """

    module: str
    spatial: tuple[int, ...] = ()
    channels: int = 0
    layout: str = ""
    stride: tuple[int, ...] = ()
    keys: tuple[int | str, ...] = ()
    call: int = 0
    is_input: bool = False
    mutated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.module, str):
            raise TapError(f"module={self.module!r}: it must be the path of a module, as in named_modules()")

    def __str__(self) -> str:
        keys = "".join(f"[{k}]" for k in self.keys)
        return ("in:" if self.is_input else "") + self.module + keys + (f"@{self.call}" if self.call else "")

    @classmethod
    def parse(cls, text: str) -> Tap:
        """The tap that `text` names, not yet seen in a forward.

        Raises:
            TapError: `text` is not of the form `[in:]module.path[key]...[@call]`.
        """
        match = _SYNTAX.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise TapError(
                f"{text!r} is not a tap: write [in:]module.path[key]...[@call], "
                "for example 'encoder.layer1', 'encoder[2]' or 'in:decoder.up[0]@1'"
            )
        keys = tuple(int(k) if re.fullmatch(r"-?\d+", k) else k for k in re.findall(r"\[([^\[\]]+)\]", match["keys"]))
        return cls(match["module"], keys=keys, call=int(match["call"] or 0), is_input=bool(match["input"]))


def _is_stride(stride: Any) -> bool:
    numbers = stride if isinstance(stride, (list, tuple)) else [stride]
    return all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)


def check_strides(levels: Any) -> None:
    """Raise a TapError unless it is a list of strides, each a whole number or one per axis."""
    if not isinstance(levels, Sequence) or not all(map(_is_stride, levels)):
        raise TapError(
            f"levels={levels!r}: it must be a list of strides, each a whole number or one number per axis, such as "
            "levels=[2, 4]"
        )


@dataclass(frozen=True)
class Level:
    """One resolution of the U: its encoder and decoder taps, which have the same spatial size."""

    stride: tuple[int, ...]
    spatial: tuple[int, ...]
    encoder: Tap
    decoder: Tap
    selected: bool = True


@dataclass(frozen=True)
class TapPlan:
    """Every level found, finest first, and the bottleneck.

    `notes` says which levels were left out, and which layouts were inferred from the shape alone.
    """

    levels: tuple[Level, ...]
    bottleneck: Tap
    notes: tuple[str, ...] = field(default=())

    @property
    def selected(self) -> tuple[Level, ...]:
        """The levels that hooks, features and losses cover, finest first."""
        return tuple(level for level in self.levels if level.selected)

    def select(self, strides: Sequence[int | Sequence[int]] | None = None) -> TapPlan:
        """The same plan with other levels selected.

        Args:
            strides: which levels: for each an int (the largest stride over the axes) or one int per axis. None is the
                default choice: the three finest levels below full resolution. If there are fewer than two of those,
                full resolution counts, too.

        Raises:
            TapError: no level has one of these strides, or they are not strides.
        """
        if strides is None:
            below = [level for level in self.levels if max(level.stride) > 1]
            chosen = below[:3] if len(below) >= 2 else self.levels[:3]
        else:
            check_strides(strides)
            chosen = []
            for stride in strides:
                wanted = tuple(stride) if isinstance(stride, Sequence) else int(stride)
                hits = [level for level in self.levels if wanted in (level.stride, max(level.stride))]
                if not hits:
                    known = ", ".join(str(level.stride) for level in self.levels)
                    raise TapError(f"levels={strides}: no level has stride {stride}; the strides found are {known}")
                chosen += hits
        return replace(self, levels=tuple(replace(level, selected=level in chosen) for level in self.levels))

    def draw(self, title: str = "") -> str:
        """The U as text, one line per level; `*` marks the selected levels."""
        rows = [("stride", "size", "encoder", "decoder")]
        for level in self.levels:
            rows.append((*_lies(level, level.selected), _describe(level.encoder), _describe(level.decoder)))
        last = _lies(self.bottleneck)
        widths = [max(len(row[i]) for row in [*rows, (*last, "", "")]) for i in range(4)]
        lines = [title] if title else []
        for i, (stride, size, encoder, decoder) in enumerate(rows):
            link = "     " if i == 0 else " --> "
            lines.append(
                f"{stride:<{widths[0]}}  {size:<{widths[1]}}  {encoder:<{widths[2]}}{link}{decoder:<{widths[3]}}"
            )
        middle = f"\\- {_describe(self.bottleneck)} -/"
        lines.append(f"{last[0]:<{widths[0]}}  {last[1]:<{widths[1]}}  {middle:^{widths[2] + 5 + widths[3]}}")
        return "\n".join(line.rstrip() for line in [*lines, *(f"note: {n}" for n in self.notes)])


def _lies(level: Level | Tap, selected: bool = True) -> tuple[str, str]:
    """The stride, marked if selected, and the size."""
    stride = level.stride[:1] if len(set(level.stride)) == 1 else level.stride
    return ("* " if selected else "  ") + "x".join(map(str, stride)), "x".join(map(str, level.spatial))


def _describe(tap: Tap) -> str:
    usual = tap.layout in ("", *CHANNELS_FIRST.values())
    return f"{tap} ({tap.channels})" if usual else f"{tap} ({tap.channels}, {tap.layout})"
