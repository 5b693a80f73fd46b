"""Tables of measured numbers in a text, checked against the results that they are of."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.accuracy_report import Scores, paired, paired_by_patient, resampled, select, times
from benchmarks.evidence.plan import read_plan
from benchmarks.evidence.published import PUBLISHED
from benchmarks.evidence.results import finished, read_lines

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CL = "bf16 channels_last"
CUTMIX = "ds x2 + deep cutmix"
AVERAGE = f"{CUTMIX}: its mean teacher"
VARIANTS = {  # a row of the accuracy tables: what it shows, and over what
    '`preset="paper"`, the default': ("paper", "bare"),
    '`preset="standardized"`': ("standardized", "bare"),
    "deep supervision, equal weights: the default": ("ds equal", "bare"),
    "that and CutMix, unlabelled images: its mean teacher": ("ds equal + deep cutmix: its mean teacher", "bare"),
    "deep supervision, weights 1, 0.5, 0.25": ("ds x2", "bare"),
    "the same, 2.5 times the steps": ("ds x2, 2.5 times as long", "bare"),
    "the same and CutMix, labelled images only": (f"{CUTMIX}, labelled images", "bare"),
    "the same and CutMix, unlabelled images": (CUTMIX, "bare"),
    "that one's mean teacher": (AVERAGE, "bare"),
    "CutMix, unlabelled images, over the same without it": (CUTMIX, "ds x2"),
    "its mean teacher, over the same": (AVERAGE, "ds x2"),
}
CONTROLS = {  # a row of the controls: what takes the place of "standardized"
    "an untrained teacher": "standardized, untrained teacher",
    "teacher fed another sample's label": "standardized, other label",
    "teacher from label to label": "standardized, label to label",
    "teacher from image to image": "standardized, image to image",
    "encoder against encoder, decoder against decoder": "standardized, uncrossed",
    "the bare run, trained as long as both stages": "bare, long",
}
IDEAS = {  # a row of the label teachers: its variant
    "the student learns its logits (label-assisted distillation), temperature 1": "distils, temperature 1",
    "the same, temperature 4": "distils, temperature 4",
    "it corrects pseudo-labels, and sees these alone": "cleans, label",
    "it corrects pseudo-labels, and sees the image as well": "cleans, label and image",
    "the same, averaged with the mean teacher's prediction": "cleans, label and image, mean of both",
    "the student is aligned with it on unlabelled images (`standardized`)": "aligns, unlabelled images",
    "the same on all images": "aligns, all images",
}
# the results of plans that were run here
PLANNED = ("accuracy.jsonl", "ssl4mis.jsonl", "table_2.jsonl", "teacher_ideas.jsonl")
SETTINGS = (
    ("confirm_acdc_5", "time_5"),
    ("sunnybrook_5",),
    ("augmentation_5", "presets_5", "time_strong_5", "free_5", "equal_cutmix_5"),
    ("sunnybrook_strong_5", "equal_sunnybrook_5"),
    ("augmentation_15", "equal_15"),
    ("confirm_acdc_70",),
)
NETWORKS = (
    ("smp_unet_5",),
    ("transunet_5",),
    ("swin_unet_5",),
    ("swin_unet_adamw_5",),
    ("hippocampus_5",),
    ("across", "equal_across"),
)


def table(text: str, start: str) -> list[list[str]]:
    """The cells of a text's table that begins so."""
    lines = text[text.index(start) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def check_costs(
    cells: list[list[str]], file: str, precision: str | None, compiled: bool, size: tuple[int, int]
) -> None:
    """A table of step times: ms of the bare step, and ratios to it."""
    results = json.loads((BENCHMARKS / "results" / file).read_text())["results"]
    header, _, *lines = cells
    names = header[1:] if precision is None else [f"{name}, {precision}" for name in header[1:]]
    groups = [tuple(name.replace(", channels_last", f", {CL}").split(", ")) for name in names]
    known = {(r["model"], r["precision"], r["row"]): r for r in results if r["compiled"] == compiled}
    for row, *values in lines:
        for group, value in zip(groups, values, strict=True):
            r = known.get((*group, row))
            measured = "" if r is None else f"{r['ms']:.1f} ms" if row == "bare" else f"{r['ratio']:.2f}"
            assert value == measured, (row, group)
    assert (len(lines), len(groups)) == size


def check_memory(cells: list[list[str]], file: str) -> None:
    """A table of the eager U-Net's peak memory in bf16 with channels last: GiB, and the ratio to the bare step's."""
    results = json.loads((BENCHMARKS / "results" / file).read_text())["results"]
    known = {r["row"]: r for r in results if (r["model"], r["precision"], r["compiled"]) == ("U-Net", CL, False)}
    _, _, *lines = cells
    assert len(lines) > 2
    for row, *values in lines:
        assert values == [f"{known[row]['peak_mib'] / 1024:.1f}", f"{known[row]['peak_ratio']:.2f}"], row


@cache
def lines_of(*files: str) -> list[dict[str, Any]]:
    """The lines of results, each run's last one."""
    return [*finished([line for file in files for line in read_lines(BENCHMARKS / "results" / file)]).values()]


def scores_of(names: Sequence[str]) -> list[Scores]:
    """What was measured of these plans, each on the part that it decides on."""
    lines = lines_of(*PLANNED)
    plans = (read_plan(BENCHMARKS / "plans" / f"{name}.json") for name in names)
    return [select(plan, lines, plan.decide_on) for plan in plans]


def shown(scores: Scores, variant: str, seeds: Collection[int]) -> str:
    """A table's cell: the bare run's DSC over these seeds, or a variant's paired difference to it; "" if not run."""
    if variant not in scores.lines:
        return ""
    bare, own = (scores.values(name, "mean_dsc") for name in ("bare", variant))
    return f"{fmean(bare[seed] for seed in seeds):.1f}" if variant == "bare" else str(paired(own, bare))


def difference(plans: Sequence[Scores], variant: str, reference: str, pairs: int = 8) -> str | None:
    """A variant's paired difference to the reference, of the first plan that has it; None where none has."""
    for scores in plans:
        for name in (variant, f"{variant}, for free"):
            if name in scores.lines:
                found = paired(scores.values(name, "mean_dsc"), scores.values(reference, "mean_dsc"))
                assert found is not None
                assert found.pairs == pairs, (scores.plan.name, name)
                return str(found)
    return None


def check_accuracy(cells: list[list[str]], plans: Sequence[Sequence[str]]) -> None:
    """A table with a column for each group of plans: DSC of the bare run, and paired differences over 8 seeds."""
    columns = [scores_of(names) for names in plans]
    start = next(i for i, row in enumerate(cells) if row[0].startswith("bare"))
    bare, *rows = [[cell.strip(" *\\") for cell in row] for row in cells[start:]]
    assert bare[1:] == [f"{fmean(each[0].values('bare', 'mean_dsc').values()):.1f}" for each in columns]
    for row, *values in rows:
        variant, reference = VARIANTS[row]
        for value, each in zip(values, columns, strict=True):
            assert value == (difference(each, variant, reference) or ""), row


def check_rows(cells: list[list[str]], files: Sequence[str]) -> None:
    """A table of the eager U-Net's steps in bf16 with channels last: time and peak memory over the bare step's."""
    known: dict[str, tuple[str, str]] = {}
    for file in files:
        for r in json.loads((BENCHMARKS / "results" / file).read_text())["results"]:
            if (r["model"], r["precision"], r["compiled"]) == ("U-Net", CL, False):
                known.setdefault(r["row"], (f"{r['ratio']:.2f}", f"{r['peak_ratio']:.2f}"))
    _, _, *lines = cells
    assert 2 < len(lines) <= 8
    for row, *values in lines:
        assert tuple(values) == known[row], row


def heldout(name: str) -> Scores:
    """What was measured of a plan outside this repository."""
    plan = read_plan(BENCHMARKS / "plans" / f"{name}.json")
    return select(plan, lines_of("heldout_2026-11-29.jsonl"), plan.decide_on)


FIRST = {  # a row of the README's table, by data, patients and network: its plans
    ("ACDC", "5", "U-Net"): SETTINGS[2],
    ("ACDC", "5", "Swin-UNet"): NETWORKS[2],
    ("ACDC, the field's protocol", "3", "U-Net"): ("ssl4mis_3",),
    ("ACDC, the field's protocol", "70", "U-Net"): ("ssl4mis_70",),
    ("Sunnybrook", "5", "U-Net"): SETTINGS[3],
    ("ACDC, tested on Sunnybrook", "15", "U-Net"): NETWORKS[5],
    ("hippocampus, 3D", "5", "DynUNet"): NETWORKS[4],
    ("CHAOS, abdominal MR", "3", "U-Net"): "h_chaos3",
    ("BTCV, abdominal CT", "18", "U-Net"): "h_btcv18",
}
NNUNET = "nnU-Net, 2D"  # has deep supervision of its own, and its results in a file of its own
HEADED = (  # its columns of differences: with equal level weights, and with the earlier ones
    ("paper", "paper"),
    ("ds equal", "ds x2"),
    ("ds equal + deep cutmix: its mean teacher", AVERAGE),
)
PAIRS = {"h_chaos3": 4, "h_btcv18": 2, "ssl4mis_3": 5, "ssl4mis_70": 5}  # others 8


def check_settings(cells: list[list[str]]) -> None:
    """The README's table with a row for each data set: DSC of the bare run, and what the losses gain over it."""
    _, _, *lines = cells
    in_nnunet = next(row for row in lines if row[2] == NNUNET)
    lines.remove(in_nnunet)
    stock, semi = (nnunet_dsc(nnunet_runs(f"3 patients, 2d: {which}")) for which in ("stock", "semi"))
    assert len(stock) == 3
    assert in_nnunet[1:] == ["3", NNUNET, f"{fmean(stock.values()):.1f}", "", "its own", str(paired(semi, stock))]
    assert [tuple(row[:3]) for row in lines] == list(FIRST)
    for row in lines:
        names = FIRST[row[0], row[1], row[2]]
        plans = [heldout(names)] if isinstance(names, str) else scores_of(names)
        assert row[3] == f"{fmean(plans[0].values('bare', 'mean_dsc').values()):.1f}", row
        for value, (equal, earlier) in zip(row[4:], HEADED, strict=True):
            pairs = PAIRS.get(plans[0].plan.name, 8)
            measured = difference(plans, equal, "bare", pairs)
            if measured is None and (older := difference(plans, earlier, "bare", pairs)):
                measured = f"{older} †"
            assert value == (measured or ""), (row, equal)


def check_field(cells: list[list[str]], text: str) -> None:
    """The table of the field's protocol, and what the text says of it in DSC."""
    columns = [scores_of([f"ssl4mis_{name}"])[0] for name in ("3_weak", "1", "3", "7", "70")]
    weak, one, three, seven, everyone = columns
    mixed = "ds equal + deep cutmix"
    rows = ("bare", "ds equal", mixed, f"{mixed}: its mean teacher")
    _, _, *lines = [[cell.strip("*") for cell in row] for row in cells]
    for (_, *values), variant in zip(lines, rows, strict=True):
        for value, scores in zip(values, columns, strict=True):
            seeds = scores.lines.get(variant, scores.lines["bare"]).keys()
            assert len(seeds) == 5
            assert value == shown(scores, variant, seeds)
    text = " ".join(text.split())
    long = scores_of(["ssl4mis_3_minutes"])[0]
    of_1, light, of_3, of_7, in_minutes = (
        f"{fmean(scores.values(rows[-1], 'mean_dsc').values()):.1f}" for scores in (one, weak, three, seven, long)
    )
    assert f"the mean teacher reaches {of_3}, and {light} with light augmentation" in text
    assert f"With 1 patient the mean teacher reaches {of_1}, and with 7 it reaches {of_7}." in text
    assert f"12,000 steps reach {in_minutes} (one seed)." in text
    assert long.plan.settings.steps == 12_000
    all_labelled = f"{fmean(everyone.values('ds equal', 'mean_dsc').values()):.1f}"
    assert f"All 70 labelled patients reach {all_labelled}." in text
    draws = scores_of(["ssl4mis_3_draws"])[0]
    for variant, said in ((rows[-1], "the mean teacher"), ("ds equal", "Deep supervision alone")):
        reached = [*draws.values(variant, "mean_dsc").values()]
        assert len(reached) == 8
        mean = f"{fmean(reached):.1f} (standard deviation {stdev(reached):.1f})"
        assert f"{said} reaches {mean}, and {min(reached):.1f} with the worst." in text
    few, many = (three, rows[-1]), (everyone, "ds equal")
    apart = stdev(few[0].values(few[1], "mean_dsc").values())
    lacks = (f"{b - a:.1f}" for a, b in zip(*(scores.per_class(variant, "dsc") for scores, variant in (few, many))))
    assert f"seeds differ by {apart:.1f}." in text
    assert "right ventricle lacks {}, the myocardium {} and the left ventricle {}.".format(*lacks) in text
    a, b = (scores.patients(variant) for scores, variant in (few, many))
    gaps = sorted((b[patient] - a[patient] for patient in a), reverse=True)
    assert "Five of the 20 test patients make up half of it." in text
    assert len(gaps) == 20
    assert round(sum(gaps[:5]) / sum(gaps), 1) == 0.5


def check_claim(cells: list[list[str]], text: str) -> None:
    """The table of the paper's claim, with the published gains of the plans of its tables 1 and 2."""
    rows = (
        ("table_2_unet", scores_of(["table_2_unet"])),
        (None, scores_of(SETTINGS[2])),
        ("table_1_unet", [heldout("h_btcv18")]),
    )
    _, _, *lines = cells
    for (_, claimed, *values, pairs), (name, plans) in zip(lines, rows, strict=True):
        published = read_plan(BENCHMARKS / "plans" / f"{name}.json").published if name else {}
        assert claimed == (f"{published['paper'] - published['bare']:+.2f}" if published else "")
        variants, counts = ("paper", "standardized", "ds equal"), pairs.split(", ")
        counts *= len(variants) // len(counts)  # one count is that of all
        gains = [difference(plans, v, "bare", int(n)) for v, n in zip(variants, counts, strict=True)]
        assert values == [(gain or "").removesuffix(" (1)") for gain in gains]
    low, high = resampled(list(rows[0][1][0].of_patients("paper", "bare").values()))
    assert f"over the 20 test patients is {low:+.1f} to {high:+.1f} as published" in " ".join(text.split())


def check_hd95(text: str) -> None:
    """That HD95 falls with deep supervision and the mean teachers in all plans but two, and how much."""
    text = " ".join(text.split())
    plans = [scores_of([name])[0] for name in sorted({line["plan"] for line in lines_of(*PLANNED)})]
    higher = {}
    for scores in plans:
        for variant in scores.lines if "bare" in scores.lines else ():
            if variant.startswith("ds ") and ("cutmix" not in variant or variant.endswith("its mean teacher")):
                change = paired(scores.values(variant, "mean_hd95"), scores.values("bare", "mean_hd95"))
                if change is None or change.mean > 0:
                    higher[scores.plan.name, variant] = str(change)
    three, published = (higher.pop((name, "ds equal")) for name in ("ssl4mis_3", "table_2_unet"))
    assert not higher
    assert (
        f"it changed by {three} pixels in the field's protocol with 3 patients, and by {published.split()[0]} in"
        in text
    )
    (few,) = scores_of(["equal_cutmix_5"])
    ours, bare = (
        fmean(few.values(name, "mean_hd95").values()) for name in ("ds equal + deep cutmix: its mean teacher", "bare")
    )
    assert f"the mean teacher of the U-Net lowers it by {100 * (1 - ours / bare):.0f} %." in text


def check_nnunet(cells: list[list[str]], text: str) -> None:
    """The table of nnU-Net's runs and what the text says of them."""
    text = " ".join(text.split())
    _, _, *rows = cells
    few, seven, whole = "3 patients, 2d", "7 patients, 2d", "70 patients, 2d"
    tasks = dict.fromkeys((few, seven, "3 patients, 3d", whole, "hippocampus, 150 of 182, 3d"), "semi")
    tasks[whole] = "semi, no further images"
    for (named, *values), (task, ours) in zip(rows, tasks.items(), strict=True):
        stock, semi = runs = [nnunet_runs(f"{task}: {which}") for which in ("stock", ours)]
        assert f"batches of {stock[0]['batch']}" in named
        scores = [f"{fmean(nnunet_dsc(lines).values()):.1f}" for lines in runs]
        low, high = resampled([*paired_by_patient(semi, stock).values()])
        memory, before = (fmean(line["peak_mib"] for line in lines.values()) for lines in (semi, stock))
        assert values == [*scores, f"{low:+.1f} to {high:+.1f}", f"{memory / before:.2f}"]
    stock, semi = (nnunet_dsc(nnunet_runs(f"{few}: {which}")) for which in ("stock", "semi"))
    assert f"With 3 patients the difference is {paired(semi, stock)} over the seeds." in text
    (a, b), (c, d) = ((min(dsc.values()), max(dsc.values())) for dsc in (stock, semi))
    assert f"Stock trainings differ much: {a:.1f} to {b:.1f}. Ours differ less: {c:.1f} to {d:.1f}." in text
    long, taught = (nnunet_runs(f"{few}: {which}")[0] for which in ("stock, as long", "self-training"))
    assert f"as long as ours reaches {100 * long['mean_dsc']:.1f} (one seed)." in text
    learnt, itself = 100 * taught["mean_dsc"], 100 * taught["taught_by_dsc"]
    assert f"a stock training that has {itself:.1f} itself, reaches {learnt:.1f}." in text
    alone = read_lines(BENCHMARKS / "results" / "nnunet_steps.jsonl")
    assert {line["iterations"] for line in alone} == {100}
    ratios: dict[int, list[float]] = {}
    for task in (seven, whole):
        stock, semi = ([line for line in alone if line["row"] == f"{task}: {w}"] for w in ("stock", tasks[task]))
        for a, b in zip(stock, semi, strict=True):
            assert a["commit"] == b["commit"]
            ratios.setdefault(b["batch"], []).append(b["ms"] / a["ms"])
    (small, each), (large, (other,)) = ratios.items()
    assert len(each) == 4
    assert (
        f"a step of ours takes {min(each):.2f} to {max(each):.2f} times as long in batches of {small} (four "
        f"measurements), and {other:.2f} in batches of {large}."
    ) in text
    (stock_published, semi_published) = (
        next(p.dsc for p in PUBLISHED if (p.method, p.patients) == (method, 3))
        for method in ("nnU-Net, labelled only", "nnU-Net + consistency")
    )
    assert f"report {stock_published:.1f} for nnU-Net with these 3 patients, and {semi_published:.1f} with" in text


def nnunet_runs(row: str) -> dict[int, dict[str, Any]]:
    """{seed: line} of a row of benchmarks/nnunet.py."""
    return {line["seed"]: line for line in lines_of("nnunet.jsonl") if line["row"] == row}


def nnunet_dsc(lines: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    return {seed: 100 * line["mean_dsc"] for seed, line in lines.items()}


def check_heldout(cells: list[list[str]]) -> None:
    """The table of data that nothing was chosen on: of the seeds that have all variants."""
    columns = [heldout(name) for name in ("h_chaos3", "h_btcv5", "h_btcv18")]
    rows = ("bare", "paper", "standardized", "ds equal", "ds equal + deep cutmix: its mean teacher")
    _, _, *lines, pairs = cells
    for (_, *values), variant in zip(lines, rows, strict=True):
        for value, scores, n in zip(values, columns, pairs[1:], strict=True):
            whole = scores.values("bare", "mean_dsc").keys() & scores.values("ds equal", "mean_dsc").keys()
            assert len(whole) == int(n)
            assert value == shown(scores, variant, whole)


def check_controls(cells: list[list[str]]) -> None:
    """The table of what takes the place of `standardized`: paired differences to it."""
    (scores,) = scores_of(["controls_5"])
    reference = scores.values("standardized", "mean_dsc")

    def difference(variant: str) -> str:
        return str(paired(scores.values(variant, "mean_dsc"), reference))

    shown = {row: value.replace("*", "") for row, value in cells[2:]}
    without = [f"standardized, no {term}" for term in ("encoder to decoder", "decoder to encoder", "bottleneck")]
    expected = {row: difference(variant) for row, variant in CONTROLS.items()}
    expected["without the student's decoder, encoder, bottleneck"] = ", ".join(map(difference, without))
    assert shown == expected


def check_ideas(cells: list[list[str]], text: str) -> None:
    """The table of label teachers: all forms of the plan, paired differences at equal GPU time, and their signs."""
    (scores,) = scores_of(["teacher_ideas_5"])
    seconds = {row[0]: float(row[-1]) for row in table(times(scores), "| variant |")[2:]}
    singles: list[float] = []
    assert [row[0] for row in cells[2:]] == list(IDEAS)
    assert {*IDEAS.values()} == {v.name for v in scores.plan.variants if v.label_teacher is not None}
    for row, gain, cost in cells[2:]:
        variant, base, whose = IDEAS[row], "ds equal, as long", ""
        if not variant.startswith("distils"):
            base, whose = "ds equal + deep cutmix, as long", ": its mean teacher"
        with_it, without = (scores.values(name + whose, "mean_dsc") for name in (variant, base))
        found = paired(with_it, without)
        assert found is not None
        assert {*with_it} == {*without} == {*scores.plan.seeds}
        assert gain == (f"**{found}**" if abs(found.mean) > (found.half_width or 0) else str(found))
        assert found.mean < 0.5  # the plan drops it
        assert cost == f"{seconds[base]:.0f}, {seconds[variant]:.0f}"
        assert abs(seconds[variant] / seconds[base] - 1) < 0.1  # the plan's limit
        singles += [with_it[seed] - without[seed] for seed in with_it]
    losses = sum(single < 0 for single in singles)
    assert f"Of the {len(singles)} single differences {losses} are losses." in " ".join(text.split())
