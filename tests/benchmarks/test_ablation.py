"""Figure 4 of the paper, drawn from made-up results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from benchmarks import accuracy_report
from benchmarks.accuracy_report import ablation, paired, select
from benchmarks.evidence.ablation import TERMS, named, terms_of, weight_of
from benchmarks.evidence.plan import Plan, read_plan
from benchmarks.evidence.results import append
from benchmarks.evidence.variants import CATALOGUE, Variant

PLAN = Path(__file__).parents[2] / "benchmarks/plans/figure_4_5.json"


@pytest.fixture
def plan() -> Plan:
    return read_plan(PLAN)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Every figure that is saved."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *args, **keywords: (figures.append(self), save(self, *args, **keywords)),
    )
    return figures


def made_up(plan: Plan) -> list[dict[str, Any]]:
    rng, lines = np.random.default_rng(0), []
    for seed, variant in plan.runs():
        dsc = 0.7 + 0.01 * rng.normal()
        scores = {"classes": ["lv"], "dsc": [dsc], "hd95": [1.0], "mean_dsc": dsc, "mean_hd95": 1.0}
        lines.append({"key": plan.key(seed, variant, 224), "stored": 224, "seed": seed, "scores": {"test": scores}})
    return lines


def marks(axes: Any) -> dict[tuple[float, float], tuple[float, float]]:
    """{(x, y): the ends of the interval in x or in y} of what `errorbar` drew."""
    found = {}
    for container in axes.containers:
        (line, _, bars) = container
        (x,), (y,) = line.get_data()
        (start, end), *_ = bars[0].get_segments()
        found[x, y] = (start[0], end[0]) if start[0] != end[0] else (start[1], end[1])
    return found


def test_the_plan_has_every_set_of_terms_and_the_weights_of_the_paper(plan):
    drawn = [(terms_of(variant), weight_of(variant)) for variant in plan.variants if variant.reseg is not None]
    at_its_weight = [terms for terms, weight in drawn if weight == 0.035]
    assert len(at_its_weight) == len(set(at_its_weight)) == 2 ** len(TERMS) - 1
    assert sorted(weight for terms, weight in drawn if terms == tuple(TERMS)) == [0.01, 0.02, 0.035, 0.05, 0.1]
    assert named(tuple(TERMS)) == "all"


def test_what_is_more_than_terms_and_weight_is_not_drawn():
    assert terms_of(CATALOGUE["paper"]) == tuple(TERMS)
    assert terms_of(Variant("x", reseg={"preset": "paper", "bottleneck": 0.0, "weight": 1.0})) == tuple(TERMS)[:2]
    for other in (
        CATALOGUE["bare"],
        CATALOGUE["standardized"],
        replace(CATALOGUE["paper"], teacher="untrained"),
        replace(CATALOGUE["paper"], deep={}),
        Variant("x", reseg={"preset": "paper", "bottleneck": 0.5}),
        Variant("x", reseg={"preset": "paper", "label_input": "onehot"}),
    ):
        assert terms_of(other) is None


def test_the_figure_shows_the_paired_differences(plan, drawn, tmp_path):
    lines = made_up(plan)
    scores = select(plan, lines, "test")
    assert ablation(scores, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert drawn[0].get_suptitle() == "figure_4_5: acdc, 5 patients, unet, test, pairs of seeds: 8"
    left, right = drawn[0].axes
    base, by_terms, by_weight = scores.values("bare", "mean_dsc"), marks(left), marks(right)
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    assert (len(by_terms), len(by_weight), len(labels)) == (7, 5, 7)
    assert labels[-1] == "all"
    assert labels[:3] == list(TERMS.values())
    for variant in plan.variants:
        terms = terms_of(variant)
        if terms is None:
            continue
        gain = paired(scores.values(variant.name, "mean_dsc"), base)
        assert gain is not None
        assert gain.half_width is not None
        ends = (pytest.approx(gain.mean - gain.half_width), pytest.approx(gain.mean + gain.half_width))
        if weight_of(variant) == 0.035:
            assert by_terms[gain.mean, labels.index(named(terms))] == ends
        if len(terms) == 3:
            assert by_weight[weight_of(variant), gain.mean] == ends


def test_rows_that_are_missing_are_left_out(plan, drawn, tmp_path):
    lines = made_up(plan)
    kept = [line for line, (seed, v) in zip(lines, plan.runs()) if seed < 6 and "bottleneck" not in v.name]
    one = [line for line, (seed, _) in zip(lines, plan.runs()) if seed == 4]
    without = [line for line, (_, v) in zip(lines, plan.runs()) if v.name != "bare"]
    bare = [line for line, (_, v) in zip(lines, plan.runs()) if v.name == "bare"]
    assert ablation(select(plan, kept, "test"), tmp_path / "figure.png")
    assert [len(axes.containers) for axes in drawn[0].axes] == [4, 5]
    assert ablation(select(plan, one, "test"), tmp_path / "one.png"), "without intervals"
    assert ablation(select(plan, lines[:50] + bare[5:], "test"), tmp_path / "few.png")
    assert [figure.get_suptitle().rpartition(": ")[2] for figure in drawn] == ["2", "1", "4 to 5"]
    assert ablation(select(plan, [*bare, lines[8]], "test"), tmp_path / "weights.png")
    for nothing in (without, bare, []):
        assert not ablation(select(plan, nothing, "test"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_report_draws_it_when_asked(plan, tmp_path, monkeypatch, capsys):
    results, figure = tmp_path / "results.jsonl", tmp_path / "figure.png"
    arguments = ["accuracy_report.py", str(results), "--plan", str(PLAN), "--ablation", str(figure)]
    monkeypatch.setattr("sys.argv", arguments)
    results.touch()
    with pytest.raises(SystemExit):
        accuracy_report.main()
    assert "--ablation: give one plan" in capsys.readouterr().err
    for line in made_up(plan):
        append(results, line)
    accuracy_report.main()
    assert figure.exists()
    assert "figure_4_5: acdc, 5 labelled patients, test" in capsys.readouterr().out
