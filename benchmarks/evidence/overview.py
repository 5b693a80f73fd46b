"""A figure of the field's protocol: labelled patients against DSC, ours and what was published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from .published import PUBLISHED, Published

if TYPE_CHECKING:
    from benchmarks.accuracy_report import Scores

COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "Dvs^<>P"


def overview(all_scores: Sequence[Scores], path: Path) -> bool:
    """Draw seeds as dots and their means as a line per variant, published points beside them; False without any run.

    Raises:
        ValueError: two of the plans have runs of a variant with the same number of labelled patients.
    """
    ours = of_variants(all_scores)
    if not ours:
        return False
    from matplotlib.figure import Figure

    counts = sorted({n for rows in ours.values() for n in rows} | {p.patients for p in PUBLISHED})
    drawn = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = drawn.subplots()
    for number, (name, rows) in enumerate(ours.items()):
        colour, left = COLOURS[number % len(COLOURS)], 0.05 * number - 0.3
        for count, values in rows.items():
            axes.plot([counts.index(count) + left] * len(values), values, ".", color=colour, alpha=0.4)
        means = [fmean(rows[count]) if count in rows else math.nan for count in counts]  # a line has gaps, no guesses
        axes.plot([x + left for x in range(len(counts))], means, "o-", color=colour, label=name, linewidth=1)
    for number, (label, points) in enumerate(by_choice().items()):
        x = [counts.index(p.patients) + 0.08 + 0.07 * number for p in points]
        axes.plot(x, [p.dsc for p in points], MARKERS[number], color="#D55E00", markersize=4, mfc="none", label=label)
    axes.set_xlim(-0.5, len(counts) - 0.5)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("labelled patients of 70")
    axes.set_ylabel(f"DSC, %; ours on {', '.join(sorted({s.part for s in all_scores}))}, last weights, dots: seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    drawn.legend(loc="outside right upper", fontsize=7)
    drawn.savefig(path, dpi=110)
    return True


def of_variants(all_scores: Sequence[Scores]) -> dict[str, dict[int, list[float]]]:
    """{variant: {labelled patients: DSC of every seed, in percent}}, of what was run."""
    found: dict[str, dict[int, list[float]]] = {}
    for scores in all_scores:
        for name in scores.lines:
            values = list(scores.values(name, "mean_dsc").values())
            rows = found.setdefault(name, {})
            if scores.plan.patients in rows:
                raise ValueError(f"{name!r} with {scores.plan.patients} labelled patients is in two plans; give one")
            if values:
                rows[scores.plan.patients] = values
    return {name: rows for name, rows in found.items() if rows}


def by_choice() -> dict[str, list[Published]]:
    """What was published, by what it was chosen on and whether it has unlabelled images."""
    found: dict[str, list[Published]] = {}
    for point in PUBLISHED:
        alone = "labelled only" in point.method
        chosen = "the last weights" if point.chosen.startswith("the last") else point.chosen
        chosen = {"not said": "how it was chosen is not said"}.get(chosen, chosen.replace("these", "the scored"))
        found.setdefault(f"published{', labelled only' * alone}: {chosen}", []).append(point)
    return found
