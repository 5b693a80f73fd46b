"""Figure 4 of the paper, drawn from results: which terms of the alignment, and which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .variants import Variant

if TYPE_CHECKING:
    from benchmarks.accuracy_report import Difference

TERMS = {
    "encoder_to_decoder": "teacher encoder, student decoder",
    "decoder_to_encoder": "teacher decoder, student encoder",
    "bottleneck": "bottleneck",
}
WEIGHT = 0.035  # of the preset "paper"
STYLE: dict[str, Any] = {"fmt": "s", "color": "#0072B2", "capsize": 3}


def terms_of(variant: Variant) -> tuple[str, ...] | None:
    """Which of `TERMS` a variant of the preset "paper" aligns by; None where more than terms and weight is other."""
    given = dict(variant.reseg or {})
    weights = {name: given.pop(name, 1.0) for name in TERMS}
    given.pop("weight", None)
    plain = Variant(variant.name, reseg=variant.reseg)
    if given != {"preset": "paper"} or variant != plain or not set(weights.values()) <= {0.0, 1.0}:
        return None
    return tuple(name for name, weight in weights.items() if weight)


def weight_of(variant: Variant) -> float:
    """The weight of its alignment."""
    return float((variant.reseg or {}).get("weight", WEIGHT))


def ablation_figure(variants: Sequence[Variant], gains: Mapping[str, Difference], title: str, path: Path) -> bool:
    """Draw the gains over the bare run, by the variant's name, of those that are there; False without any.

    On the left by the terms that are on, at the paper's weight; on the right by the weight, with all terms.
    """
    known = [(v, terms, gains[v.name]) for v in variants if v.name in gains and (terms := terms_of(v)) is not None]
    by_terms = [(terms, gain) for v, terms, gain in known if weight_of(v) == WEIGHT]
    by_weight = sorted((weight_of(v), gain.mean, gain) for v, terms, gain in known if len(terms) == len(TERMS))
    if not known:
        return False
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 1.6 + 0.4 * max(4, len(by_terms))), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[1.3, 1])
    by_terms.sort(key=lambda row: (len(row[0]), [name not in row[0] for name in TERMS]))
    for row, (_, gain) in enumerate(by_terms):
        left.errorbar(gain.mean, row, xerr=gain.half_width, **STYLE)
    left.set_yticks(range(len(by_terms)), [named(terms) for terms, _ in by_terms], fontsize=8)
    left.set_ylim(max(len(by_terms), 1) - 0.5, -0.5)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel(f"DSC, paired difference to bare (95 % interval), weight {WEIGHT}", fontsize=8)
    for weight, mean, gain in by_weight:
        right.errorbar(weight, mean, yerr=gain.half_width, **STYLE)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlim(left=0)
    right.set_xlabel("weight of the alignment, all terms", fontsize=8)
    right.set_ylabel("DSC, paired difference to bare", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    pairs = sorted({gain.pairs for *_, gain in known})
    few_to_many = " to ".join(map(str, dict.fromkeys([pairs[0], pairs[-1]])))
    drawn.suptitle(f"{title}, pairs of seeds: {few_to_many}", fontsize=9)
    drawn.savefig(path, dpi=110)
    return True


def named(terms: Sequence[str]) -> str:
    """For an axis."""
    return "all" if len(terms) == len(TERMS) else "\n".join(TERMS[name] for name in terms) or "none"
