"""The hostile trial of benchmarks/hostile: a sample of it, and all of it among the slow tests."""

from __future__ import annotations

import pytest

from benchmarks.hostile import caught, changes, inputs, kills, nets, processes
from benchmarks.hostile.__main__ import main
from benchmarks.hostile.verdict import Tally, tally

HOW = "python -m benchmarks.hostile"
EVERY = 31  # of the bad inputs, in the sample


def clean(found: Tally, at_least: int) -> None:
    assert not found.findings, "\n".join(map(str, found.findings))
    assert sum(sum(counts.values()) for counts in found.counts.values()) >= at_least


def test_a_sample_of_bad_inputs() -> None:
    found = Tally()
    tally("inputs", inputs.attempts()[::EVERY], found, HOW)
    clean(found, 60)


def test_every_public_method_has_ten_bad_inputs() -> None:
    assert inputs.uncovered(inputs.attempts()) == {}
    assert len(inputs.public_methods()) > 60


def test_some_nets_and_models_changed_under_the_hooks() -> None:
    found = Tally()
    tally("nets", [*nets.attempts_on_own(), *nets.attempts(0, 5)], found, HOW)
    tally("compile", [a for a in changes.attempts() if not a.target.startswith("compile")][::12], found, HOW)
    clean(found, 14)


def test_a_few_kills() -> None:
    found = Tally()
    assert kills.run(found, seed=1, kills=2) == 2
    clean(found, 2)


def test_two_processes() -> None:
    found = Tally()
    processes.run(found, ["deep supervision, uneven batches"])
    clean(found, 1)


def test_some_mutants_are_caught() -> None:
    found = Tally()
    caught.run(found, some=3, parts=["nets"])
    clean(found, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["nets", "inputs", "compile", "processes", "kills", "mutants"])
def test_the_whole_trial(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--part", part])
    assert status == 0, capsys.readouterr().out
