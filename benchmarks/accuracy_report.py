"""Tables and a figure of what `accuracy.py` has measured.

    python benchmarks/accuracy_report.py results.jsonl --plan benchmarks/plans/confirm_acdc_5.json --figure out.png

Scores in percent (DSC) and pixels or voxels (HD95), over the seeds that a variant was run with; differences are paired,
over the seeds that both have, with Student's 95 % interval. `(2 pairs)`: the row has more seeds. Where a plan compares
ideas at equal GPU time, a second table says what each run took. Where it has published scores, a second table puts them
beside ours, with a paired bootstrap over the patients that were scored. For a plan of the field's protocol the second
table also has the worst seed or draw, and what was published follows it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.evidence.ablation import ablation_figure
from benchmarks.evidence.overview import overview
from benchmarks.evidence.plan import Plan, read_plan
from benchmarks.evidence.published import PUBLISHED, SEEN, published
from benchmarks.evidence.results import finished, read_lines
from benchmarks.evidence.variants import Variant

REFERENCES = ("bare", "ds x2")
FIELD_REFERENCES = ("bare", "ds equal")  # of plans of the field's protocol; in one that chooses, its first variant
BESIDE = {
    "mean teacher": "its mean teacher",
    "corrected mean teacher": "its mean teacher, corrected",
    "statistics of others": "with batch statistics of others",
}
ORIGINS = ("commit", "device", "compiled")  # entries of a line that may move its numbers
SHORT = 7  # characters of a commit
RESAMPLED = 10_000  # times that the patients are drawn


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean and the half width of its 95 % interval (None with one pair)."""

    mean: float
    half_width: float | None
    pairs: int

    def __str__(self) -> str:
        spread = "" if self.half_width is None else f" ± {self.half_width:.1f}"
        return f"{self.mean:+.1f}{spread}"

    def over(self, seeds: int) -> str:
        """As text, with the number of pairs where the row has more seeds than that."""
        few = f" ({self.pairs} pair{'s' * (self.pairs > 1)})" if self.pairs < seeds else ""
        return f"{self}{few}"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """a - b over the seeds that both have; None without one."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    count = len(differences)
    if not count:
        return None
    if count == 1:
        return Difference(differences[0], None, 1)
    mean = fmean(differences)
    return Difference(mean, float(t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count), count)


def resampled(differences: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over patients, by drawing them with replacement; the same at every call."""
    values = np.asarray(differences)
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Scores:
    """What was measured of one plan on one part: {variant: {seed: ...}}, in the plan's order of variants.

    `runs` are the lines of the results that this is of, one per run.
    """

    plan: Plan
    part: str
    classes: tuple[str, ...]
    lines: dict[str, dict[int, dict[str, Any]]]
    runs: tuple[Mapping[str, Any], ...]

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """{seed: value} of "mean_dsc" (in percent) or "mean_hd95"; seeds without any such volume are left out."""
        scale = 100 if metric == "mean_dsc" else 1
        return {seed: scale * s[metric] for seed, s in self.lines[variant].items() if s[metric] is not None}

    def of_patients(self, variant: str, reference: str) -> dict[int, float]:
        """{patient: difference in DSC, in percent, of two variants}, a mean over classes, volumes and their seeds."""
        return paired_by_patient(self.lines.get(variant, {}), self.lines.get(reference, {}))

    def per_class(self, variant: str, metric: str) -> list[float | None]:
        """Means over seeds of "dsc" (in percent) or "hd95" per class."""
        columns = zip(*(s[metric] for s in self.lines[variant].values()))
        known = [[value for value in column if value is not None] for column in columns]
        scale = 100 if metric == "dsc" else 1
        return [scale * fmean(values) if values else None for values in known]

    def patients(self, variant: str) -> dict[int, float]:
        """{patient: DSC in percent}, a mean over classes, volumes and seeds."""
        each = [_by_patient(scores) for scores in self.lines[variant].values() if "patients" in scores]
        return {p: 100 * fmean(values[p] for values in each if p in values) for p in sorted(set().union(*each))}


def paired_by_patient(a: Mapping[int, Mapping[str, Any]], b: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """{patient: a - b in DSC, in percent} of {seed: scores}, a mean over classes, volumes and the seeds of both."""
    seeds = [seed for seed in a.keys() & b.keys() if "patients" in a[seed] and "patients" in b[seed]]
    found: dict[int, list[float]] = {}
    for seed in seeds:
        ours, theirs = _by_patient(a[seed]), _by_patient(b[seed])
        for patient in ours.keys() & theirs.keys():
            found.setdefault(patient, []).append(100 * (ours[patient] - theirs[patient]))
    return {patient: fmean(values) for patient, values in sorted(found.items())}


def _by_patient(scores: Mapping[str, Any]) -> dict[int, float]:
    """{patient: DSC}, a mean over classes and volumes; a class that truth and prediction lack is left out."""
    found: dict[int, list[float]] = {}
    for values in scores["each_dsc"]:
        for patient, value in zip(scores["patients"], values):
            if value is not None:
                found.setdefault(patient, []).append(value)
    return {patient: fmean(values) for patient, values in found.items()}


def _planned(plan: Plan, lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, Variant]]:
    """{key: (seed, variant)} of all runs of a plan, on slices of the sizes that the lines have."""
    sizes = {line["stored"] for line in lines}
    return {plan.key(seed, variant, size): (seed, variant) for seed, variant in plan.runs() for size in sizes}


def select(plan: Plan, lines: Sequence[Mapping[str, Any]], part: str) -> Scores:
    """The runs of a plan, by what was run and not by the plan's name, so that plans share runs."""
    wanted = _planned(plan, lines)
    found: dict[str, dict[int, dict[str, Any]]] = {variant.name: {} for variant in plan.variants}
    classes: tuple[str, ...] = ()
    runs: list[Mapping[str, Any]] = []
    for line in lines:
        if line["key"] in wanted and part in line["scores"]:
            seed, variant = wanted[line["key"]]
            name = variant.name
            if seed in found[name]:
                raise ValueError(f"{plan.name}: seed {seed} of {name!r} was run on slices of two sizes; report one")
            found[name][seed] = _of_class(line["scores"][part], plan.of_class)
            for network, title in BESIDE.items():
                if f"{part}, {network}" in line["scores"]:
                    beside = _of_class(line["scores"][f"{part}, {network}"], plan.of_class)
                    found.setdefault(f"{name}: {title}", {})[seed] = beside
            classes = tuple(found[name][seed]["classes"])
            runs.append(line)
    return Scores(plan, part, classes, {name: seeds for name, seeds in found.items() if seeds}, tuple(runs))


def _of_class(scores: dict[str, Any], name: str) -> dict[str, Any]:
    """Those of one class alone, or as they are without a name."""
    if not name:
        return scores
    which = scores["classes"].index(name)
    alone = {key: [scores[key][which]] for key in ("classes", "dsc", "hd95", "each_dsc", "each_hd95") if key in scores}
    return {**scores, **alone, "mean_dsc": alone["dsc"][0], "mean_hd95": alone["hd95"][0]}


def table(scores: Scores, references: Sequence[str] = REFERENCES) -> str:
    """A Markdown table: DSC and HD95, and their differences to the references."""
    references = [name for name in references if name in scores.lines]
    head = ["variant", "seeds", "DSC ± sd", *(f"to {name}" for name in references)]
    head += ["HD95 ± sd", *(f"to {name}" for name in references), *scores.classes]
    rows = [head, ["---"] * len(head)]
    for name, seeds in scores.lines.items():
        row = [name, str(len(seeds))]
        for metric in ("mean_dsc", "mean_hd95"):
            values = scores.values(name, metric)
            spread = f" ± {stdev(values.values()):.1f}" if len(values) > 1 else ""
            row.append(f"{fmean(values.values()):.1f}{spread}" if values else "-")
            for reference in references:
                difference = paired(values, scores.values(reference, metric))
                row.append("" if reference == name or difference is None else difference.over(len(seeds)))
        pairs = zip(scores.per_class(name, "dsc"), scores.per_class(name, "hd95"))
        row += ["-" if dsc is None or hd is None else f"{dsc:.1f} / {hd:.1f}" for dsc, hd in pairs]
        rows.append(row)
    return _markdown(rows)


def beside_published(scores: Scores, reference: str = "bare") -> str:
    """A Markdown table of published scores and ours, and of what both gain over the reference."""
    published, published_hd95 = scores.plan.published, scores.plan.published_hd95
    head = ["variant", "published DSC", "our DSC", "seeds", "published gain", "our gain, over seeds", "over patients"]
    if published_hd95:
        head += ["published HD95", "our HD95"]
    rows = [head, ["---"] * len(head)]
    for name in scores.lines:
        values, base = (scores.values(of, "mean_dsc") if of in scores.lines else {} for of in (name, reference))
        row = [name, f"{published[name]:.2f}" if name in published else "", f"{fmean(values.values()):.2f}"]
        row += [str(len(values)), "", "", ""]
        if name != reference:
            if name in published and reference in published:
                row[4] = f"{published[name] - published[reference]:+.2f}"
            difference, patients = paired(values, base), list(scores.of_patients(name, reference).values())
            row[5] = "" if difference is None else f"{difference} ({difference.pairs})"
            if patients:
                low, high = resampled(patients)
                row[6] = f"{fmean(patients):+.2f} ({low:+.2f} to {high:+.2f}, {len(patients)} patients)"
        if published_hd95:
            row.append(f"{published_hd95[name]:.2f}" if name in published_hd95 else "")
            row.append(f"{fmean(scores.values(name, 'mean_hd95').values()):.2f}")
        rows.append(row)
    return _markdown(rows)


def times(scores: Scores) -> str:
    """A Markdown table of what a run takes, medians over seeds; a stage 1 that runs share counts for each of them."""
    plan, planned = scores.plan, _planned(scores.plan, scores.runs)
    each: dict[str, list[float]] = {}
    shared: dict[tuple[str, str], dict[int, float]] = {}
    for run in scores.runs:
        if not run.get("ms_per_step"):
            continue
        seed, variant = planned[run["key"]]
        each.setdefault(variant.name, []).append(run["ms_per_step"])
        # the first that asked for it has waited, for all of it unless an earlier call had begun it
        if variant.stage_1 is not None and not run.get("stage_1_resumed_at"):
            of_kind = shared.setdefault(variant.stage_1, {})
            of_kind[seed] = max(of_kind.get(seed, 0.0), run["seconds"]["stage_1"])
    rows = [["variant", "steps", "ms a step", "stage 2, s", "stage 1, s", "both, s"], ["---"] * 6]
    for variant in plan.variants:
        if variant.name not in each:
            continue
        steps = variant.steps(plan.settings.steps, plan.settings.stage1_steps)
        ms = median(each[variant.name])
        second, first = steps * ms / 1e3, 0.0
        if variant.stage_1 is not None:
            whole = shared.get(variant.stage_1)
            first = median(whole.values()) if whole else None
        both = ["-", "-"] if first is None else [f"{first:.1f}", f"{second + first:.1f}"]
        rows.append([variant.name, str(steps), f"{ms:.1f}", f"{second:.1f}", *both])
    return _markdown(rows)


def references_of(plan: Plan) -> tuple[str, ...]:
    """The rows that others are compared with, where none are asked for."""
    if plan.settings.protocol != "ssl4mis":
        return REFERENCES
    if plan.decide_on == "validation":
        first = plan.variants[0].name
        return first, f"{first}: {BESIDE['mean teacher']}"
    return FIELD_REFERENCES


def field_section(scores: Scores, references: Sequence[str]) -> list[str]:
    """For a plan of the field's protocol: what its numbers stand for, and the published ones beside them."""
    plan = scores.plan
    over = "draw" if plan.drawn else "seed"
    references = [name for name in references if name in scores.lines]
    head = ["DSC", f"worst {over}", "95 % over patients", *(f"to {name}, over patients" for name in references)]
    rows = [["variant", *head, "HD95", f"worst {over}"], ["---"] * (len(head) + 3)]
    for name in scores.lines:
        dsc, hd95 = (list(scores.values(name, metric).values()) for metric in ("mean_dsc", "mean_hd95"))
        row = [name, _spread(dsc), f"{min(dsc):.1f}", _over_patients(list(scores.patients(name).values()), "{:.1f}")]
        for reference in references:
            gains = [] if reference == name else list(scores.of_patients(name, reference).values())
            row.append(f"{fmean(gains):+.1f} ({_over_patients(gains, '{:+.1f}')})" if gains else "")
        rows.append([*row, _spread(hd95), f"{max(hd95):.1f}"])
    parts = [_markdown(rows)]
    if plan.drawn:
        labelled = {line["seed"]: line["labelled"] for line in scores.runs}
        draws = (f"{seed}: {', '.join(map(str, who))}" for seed, who in sorted(labelled.items()))
        parts.append(f"Labelled patients by seed: {'; '.join(draws)}.")
    if plan.decide_on == "validation":
        parts.append(f"Changes screened in this plan: {len(plan.variants) - 1}.")
    # the published are of test patients, and means over all classes
    known = "" if plan.of_class or plan.decide_on == "validation" else published(plan.patients)
    return [*parts, *filter(None, [known]), SEEN]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _over_patients(values: Sequence[float], form: str) -> str:
    return " to ".join(map(form.format, resampled(values))) if values else ""


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def origins(runs: Sequence[Mapping[str, Any]]) -> str:
    """Of which commits, devices and compiled settings runs are, with the number of each where they differ."""
    parts = []
    for name in ORIGINS:
        values = [str(run.get(name) or "unknown") for run in runs]
        counts = Counter(value[:SHORT] if name == "commit" else value for value in values)
        each = [f"{value} ({count})" if len(counts) > 1 else value for value, count in counts.items()]
        parts.append(f"{name} {', '.join(each)}")
    return f"Runs: {'; '.join(parts)}."


def _panels(all_scores: Sequence[Scores], beside: float) -> tuple[Any, list[Any]]:
    """A figure, and a panel of it per plan, as high as the most rows and `beside` inches."""
    from matplotlib.figure import Figure

    most, columns = max(len(scores.lines) for scores in all_scores), min(2, len(all_scores))
    rows = -(-len(all_scores) // columns)
    drawn = Figure(figsize=(5.2 * columns + 1.5, rows * (0.32 * most + beside)), layout="constrained")
    panels = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(all_scores) :]:
        axes.set_visible(False)
    return drawn, panels


def figure(all_scores: Sequence[Scores], path: Path, reference: str = "bare") -> bool:
    """Paired differences in DSC to the reference, a panel per plan that has one, seeds as dots; False without any."""
    all_scores = [s for s in all_scores if reference in s.lines and s.values(reference, "mean_dsc")]
    if not all_scores:
        return False
    drawn, panels = _panels(all_scores, 1.3)
    for axes, scores in zip(panels, all_scores):
        base = scores.values(reference, "mean_dsc")
        names = [name for name in scores.lines if name != reference]
        for row, name in enumerate(names):
            values = scores.values(name, "mean_dsc")
            difference = paired(values, base)
            if difference is None:
                continue
            dots = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
            axes.plot(dots, [row] * len(dots), "o", color="#999999", markersize=3, alpha=0.7)
            axes.errorbar(difference.mean, row, xerr=difference.half_width, fmt="s", color="#0072B2", capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel(f"DSC on {scores.part}, paired difference to {reference} (95 % interval)", fontsize=8)
        plan, settings = scores.plan, scores.plan.settings
        what = f"{plan.data}, {plan.patients} patients, {settings.model}, {settings.augmentation} augmentation"
        axes.set_title(f"{plan.name} ({reference}: {fmean(base.values()):.1f})\n{what}", fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=110)
    return True


def ablation(scores: Scores, path: Path, reference: str = "bare") -> bool:
    """Figure 4 of the paper from a plan's runs: terms and weights of the alignment; False where none was run."""
    base = scores.values(reference, "mean_dsc") if reference in scores.lines else {}
    found = {name: paired(scores.values(name, "mean_dsc"), base) for name in scores.lines}
    gains = {name: difference for name, difference in found.items() if difference is not None}
    plan = scores.plan
    title = f"{plan.name}: {plan.data}, {plan.patients} patients, {plan.settings.model}, {scores.part}"
    return ablation_figure(plan.variants, gains, title, path)


def field_figure(all_scores: Sequence[Scores], path: Path) -> bool:
    """DSC of every seed or draw of plans of the field's protocol, a panel per plan, and what was published."""
    all_scores = [scores for scores in all_scores if scores.runs]
    if not all_scores:
        return False
    drawn, panels = _panels(all_scores, 1.6)
    for axes, scores in zip(panels, all_scores):
        plan, settings = scores.plan, scores.plan.settings
        for row, name in enumerate(scores.lines):
            values = list(scores.values(name, "mean_dsc").values())
            axes.plot(values, [row] * len(values), "o", color="#999999", markersize=4, alpha=0.7)
            axes.plot(fmean(values), row, "s", color="#0072B2")
        others = [p.dsc for p in PUBLISHED if p.patients == plan.patients and not plan.of_class]
        axes.plot(others, [len(scores.lines)] * len(others), "d", color="#D55E00", markersize=4)
        names = [*scores.lines, *(["published, one draw each"] if others else [])]
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        what = "draws of patients" if plan.drawn else "seeds"
        axes.set_xlabel(f"DSC on {scores.part}; dots: {what}, square: their mean", fontsize=8)
        head = f"{plan.patients} labelled, {settings.steps} steps, {settings.augmentation} augmentation"
        axes.set_title(f"{plan.name}\n{head}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(path, dpi=110)
    return True


def report(scores: Scores, references: Sequence[str] | None = None) -> str:
    """Question, rule and table of a plan, and where its runs are from."""
    plan = scores.plan
    references = references_of(plan) if references is None else references
    planned = len(plan.seeds) * len(plan.variants)
    there = sum(len(scores.lines.get(variant.name, ())) for variant in plan.variants)
    in_mm = any(run["scores"][scores.part].get("distances") == "mm" for run in scores.runs)
    unit = "mm" if in_mm else "voxels" if plan.settings.model == "unet_3d" else "pixels"
    parts = [
        f"## {plan.name}: {plan.data}, {plan.patients} labelled patients, {scores.part}",
        plan.question,
        f"Rule, {'written after the runs' if plan.outside else 'written before'}: {plan.rule}",
        *([plan.outside] if plan.outside else []),
        *([f"All scores are of the {plan.of_class} alone."] if plan.of_class else []),
        f"{there} of {planned} runs are there. A class's column is DSC / HD95 ({unit}).",
        *([table(scores, references), origins(scores.runs)] if scores.runs else ["Nothing was run."]),
        *([times(scores)] if scores.runs and any(variant.label_teacher for variant in plan.variants) else []),
        *([beside_published(scores)] if scores.runs and plan.published else []),
        *(field_section(scores, references) if scores.runs and plan.settings.protocol == "ssl4mis" else []),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of accuracy.py")
    parser.add_argument("--plan", type=Path, nargs="+", required=True)
    parser.add_argument("--part", help="which part's scores; default: the one that the plan decides on")
    parser.add_argument(
        "--references", nargs="+", metavar="VARIANT", help="rows that others are compared with; default: by the plan"
    )
    parser.add_argument("--table", type=Path, help="Markdown file; default: print it")
    parser.add_argument(
        "--figure", type=Path, help="picture of the paired differences to the bare run; of the field's protocol of DSC"
    )
    parser.add_argument("--overview", type=Path, help="picture of labelled patients against DSC, over all plans given")
    parser.add_argument("--ablation", type=Path, help="picture of terms and weights of the alignment, of one plan")
    args = parser.parse_args()
    missing = [str(path) for path in args.results if not path.exists()]
    if missing:
        parser.error(f"{', '.join(missing)} is not there")
    lines = list(finished([line for path in args.results for line in read_lines(path)]).values())
    plans = [read_plan(path) for path in args.plan]
    names = {variant.name for plan in plans for variant in plan.variants}
    names |= {f"{name}: {title}" for name in names for title in BESIDE.values()}
    unknown = [name for name in args.references or () if name not in names]
    if unknown:
        parser.error(f"--references: no plan has {', '.join(unknown)}")
    for plan in plans:
        if args.part is not None and args.part not in plan.scored:
            parser.error(f"--part {args.part}: {plan.name} has {', '.join(plan.scored)}")
    scores = [select(plan, lines, args.part or plan.decide_on) for plan in plans]
    text = "\n\n".join(report(each, args.references) for each in scores) + "\n"
    if args.table:
        args.table.write_text(text)
    else:
        print(text)
    if args.overview and not overview(scores, args.overview):
        parser.error("--overview: nothing of these plans was run")
    if args.ablation and not (len(scores) == 1 and ablation(scores[0], args.ablation)):
        parser.error("--ablation: give one plan, of which 'bare' and variants of the preset 'paper' were run")
    if all(plan.settings.protocol == "ssl4mis" for plan in plans):
        if args.figure and not field_figure(scores, args.figure):
            parser.error("--figure: nothing of these plans was run")
    elif args.figure and not figure(scores, args.figure):
        parser.error("--figure: no plan has a run of 'bare' with a DSC, to which differences are drawn")


if __name__ == "__main__":
    main()
