"""The hostile trial of benchmarks/hostile: a sample of it, and all of it among the slow tests."""

from __future__ import annotations

import pytest

from benchmarks.hostile import caught, changes, inputs, nets
from benchmarks.hostile.__main__ import main
from benchmarks.hostile.mutants import MUTANTS
from benchmarks.hostile.verdict import Tally, tally

HOW = "python -m benchmarks.hostile"
EVERY = 61  # of the bad inputs, in the sample


def clean(found: Tally, at_least: int) -> None:
    assert not found.findings, "\n".join(map(str, found.findings))
    assert sum(sum(counts.values()) for counts in found.counts.values()) >= at_least


def test_a_sample_of_bad_inputs() -> None:
    found = Tally()
    tally("inputs", inputs.attempts()[::EVERY], found, HOW)
    clean(found, 30)


def test_every_public_method_has_ten_bad_inputs() -> None:
    assert inputs.uncovered(inputs.attempts()) == {}
    assert len(inputs.public_methods()) > 60


def test_some_nets_and_models_changed_under_the_hooks() -> None:
    found = Tally()
    tally("nets", [*list(nets.attempts_on_own())[::2], *nets.attempts(0, 2)], found, HOW)
    tally("compile", [a for a in changes.attempts() if not a.target.startswith("compile")][::20], found, HOW)
    clean(found, 8)


def test_every_mutant_still_finds_its_place_in_the_code() -> None:
    for mutant in MUTANTS:
        with mutant.applied():
            pass


def test_some_mutants_are_caught() -> None:
    found = Tally()
    caught.run(found, some=2, parts=["nets"])
    clean(found, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["nets", "inputs", "compile", "processes", "kills", "mutants"])
def test_the_whole_trial(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--part", part])
    assert status == 0, capsys.readouterr().out
