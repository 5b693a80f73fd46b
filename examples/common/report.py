"""What a comparison prints: a table of two runs side by side, or of any number, a run a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .metrics import Summary

UNITS = {"mm": "mm", "px": "pixels"}
MISSED = 0.01  # DSC below which a class was not learnt


def comparison_table(
    title: str, class_names: Sequence[str], bare: Summary, reseg: Summary, ours: str = "with reseg"
) -> str:
    """DSC and HD95 per foreground class and on average, without | with reseg-loss (the run named `ours`)."""
    width = max(len(title), *map(len, class_names), len("mean of classes")) + 2
    unit = UNITS[bare.unit]
    lines = [
        f"{title:{width}} {'DSC in %':^21}   {f'HD95 in {unit}':^21}",
        f"{'':{width}} {'bare':>8} | {ours:>10}   {'bare':>8} | {ours:>10}",
    ]
    rows = list(zip(class_names[1:], bare.dsc, reseg.dsc, bare.hd95, reseg.hd95))
    rows.append(("mean of classes", bare.mean_dsc, reseg.mean_dsc, bare.mean_hd95, reseg.mean_hd95))
    for name, *values in rows:
        texts = [_number(value, scale) for value, scale in zip(values, (100, 100, 1, 1))]
        lines.append(f"{name:{width}} {texts[0]:>8} | {texts[1]:>10}   {texts[2]:>8} | {texts[3]:>10}")
    for run, summary in (("bare", bare), (ours, reseg)):
        skipped = [f"{name} {count}" for name, count in zip(class_names[1:], summary.skipped) if count]
        if skipped:
            lines.append(f"volumes skipped, {run} (class neither in truth nor in prediction): {', '.join(skipped)}")
    return "\n".join([*lines, *_unlearnt({"bare": bare, ours: reseg}, class_names)])


def scores_table(results: Mapping[str, Summary], class_names: Sequence[str]) -> str:
    """DSC per class and on average, and the average HD95, a run a row."""
    unit = UNITS[next(iter(results.values())).unit]
    rows = [["", *(f"DSC {name}" for name in class_names[1:]), "DSC mean", f"HD95 mean in {unit}"]]
    for name, summary in results.items():
        dsc = [_number(value, 100) for value in (*summary.dsc, summary.mean_dsc)]
        rows.append([name, *dsc, _number(summary.mean_hd95, 1)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in rows]
    return "\n".join([*lines, *_unlearnt(results, class_names)])


def _unlearnt(results: Mapping[str, Summary], class_names: Sequence[str]) -> list[str]:
    """A line for each run that has missed a class altogether."""
    lines = []
    for run, summary in results.items():
        missed = [name for name, dsc in zip(class_names[1:], summary.dsc) if dsc is not None and dsc < MISSED]
        if missed:
            lines.append(f"{run} has not learnt {', '.join(missed)}: train longer before you compare it with anything")
    return lines


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.2f}"
