"""What a comparison prints: a table of two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from .metrics import Summary


def comparison_table(
    title: str, class_names: Sequence[str], bare: Summary, reseg: Summary, ours: str = "with reseg"
) -> str:
    """DSC and HD95 per foreground class and on average, without | with reseg-loss (the run named `ours`)."""
    width = max(len(title), *map(len, class_names), len("mean of classes")) + 2
    unit = {"mm": "mm", "px": "pixels"}[bare.unit]
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
    return "\n".join(lines)


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.2f}"
