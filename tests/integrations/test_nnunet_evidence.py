"""benchmarks/nnunet.py on a few patients of a few small slices: every kind of row, cut short and gone on with."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nnunet_tiny as tiny
import numpy as np
import pytest
from native_slices import write_native

pytestmark = tiny.MARKS


@pytest.fixture
def nnunet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; nothing later finds the checkout by its path, so that the installed package stays the one tested."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "")  # the script sets them
    return importlib.import_module("benchmarks.nnunet")


def write_few(path: Path) -> None:
    """acdc_native.npz of eight patients: three with labels, two without, two to test, one to validate."""
    parts = {"labelled_1": [99], "labelled_3": [99, 38, 50], "labelled_7": [99], "validation": [70], "test": [7, 8]}
    patients = (7, 8, 38, 50, 60, 61, 70, 99)
    write_native(path, patients, lambda patient: (32, 36 - patient % 3 * 4), range(4), 12, parts)


def test_the_rows_run_are_gone_on_with_and_reported(one_process, nnunet, monkeypatch, tmp_path, capsys):
    write_few(tmp_path / "acdc_native.npz")
    names = [row.name for row in nnunet.ROWS[:4]]
    out = tmp_path / "out.jsonl"
    command = ["--data", tmp_path, "--work", tmp_path / "work", "--out", out, "--epochs", "2", "--iterations", "2"]
    command = [*map(str, command), "--processes", "1", "--rows", *names]
    monkeypatch.setattr(nnunet, "ROWS", tuple(_of_one_seed(row) for row in nnunet.ROWS))
    seen: list[str] = []
    plan = nnunet.plan

    def small_plan(dataset: str, *args: Any, **kwargs: Any) -> None:
        seen.append(dataset)
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # 0 crashes the planning
        plan(dataset, *args, **kwargs)
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        tiny.shrink_plans(tmp_path / "work" / "preprocessed", dataset)

    monkeypatch.setattr(nnunet, "plan", small_plan)
    nnunet.main([*command, "--minutes", "0.0001"])
    assert "the time is up; run it again to go on" in capsys.readouterr().out
    assert not out.exists()
    nnunet.main(command)
    lines = {line["row"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert [*lines] == names
    assert seen == ["Dataset103_acdc_native_3"]
    for line in lines.values():
        assert line["patients"] == [7, 7, 8, 8]
        assert len(line["each_dsc"]) == 3
        assert 0 <= line["mean_dsc"] <= 1
        assert line["seconds"] > 0
        assert line["nnunetv2"]
    assert lines[names[0]]["epochs"] == lines[names[1]]["epochs"] == lines[names[3]]["epochs"] == 2
    as_long = round(2 * lines[names[1]]["ms"] / lines[names[0]]["ms"])
    assert lines[names[2]]["epochs"] == max(1, as_long)  # of steps so short it may be 0
    assert lines[names[3]]["seconds"] > lines[names[0]]["seconds"]
    raw = tmp_path / "work" / "raw"
    for folder, images in (("imagesTr", 6), ("labelsTr", 6), ("imagesUn", 4)):
        assert len([*(raw / "Dataset103_acdc_native_3" / folder).iterdir()]) == images
    assert len([*(raw / "Dataset104_acdc_native_3_taught" / "labelsTr").iterdir()]) == 10
    nnunet.main(command)
    assert len(out.read_text().splitlines()) == 4
    capsys.readouterr()
    nnunet.main(["--out", str(out), "--report"])
    told = capsys.readouterr().out
    by_hand = {name: 100 * lines[name]["mean_dsc"] for name in names}
    assert f"| {names[1]} | {by_hand[names[1]]:.1f} | " in told
    assert f"| {names[1]} - {names[0]} | {by_hand[names[1]] - by_hand[names[0]]:+.1f} | " in told
    assert lines[names[3]]["taught_by_dsc"] == lines[names[0]]["mean_dsc"]
    assert f"{names[3]} learnt from the predictions of a stock run that has {by_hand[names[0]]:.1f} DSC." in told
    steps = tmp_path / "steps.jsonl"
    nnunet.main([*command[:-3], "--out", str(steps), "--smoke"])
    assert re.search(f"{names[0]}: \\d+\\.\\d ms a step", capsys.readouterr().out)
    line = json.loads(steps.read_text().splitlines()[0])
    assert (line["row"], line["batch"], line["patch"], line["iterations"]) == (names[0], 2, [32, 32], 100)
    assert line["ms"] > 0
    nnunet.main([*command[:-3], "--epochs", "1", "--iterations", "3", "--rows", names[0]])
    shorter = json.loads(out.read_text().splitlines()[-1])
    assert (shorter["row"], shorter["epochs"], shorter["iterations"]) == (names[0], 1, 3)
    trained = [*(tmp_path / "work" / "results").glob("*-1x3/**/checkpoint_final.pth")]
    assert len(trained) == 1, "it did not go on with the longer run"
    with pytest.raises(ValueError, match=rf"{names[0]}: runs of \[3, 4\] steps"):
        nnunet.main(["--out", str(out), "--report"])
    with pytest.raises(SystemExit):
        nnunet.main([*command, "--seeds", "99"])


def test_runs_side_by_side_make_a_data_set_once_and_over_what_was_left_half_done(nnunet, monkeypatch, tmp_path):
    folder = tmp_path / "preprocessed" / "Dataset103_acdc_native_3"
    folder.mkdir(parents=True)
    (folder / "half").touch()
    made: list[list[Path]] = []

    def slow_plan(*_: Any) -> None:
        made.append([*tmp_path.glob("preprocessed/*/half")])
        time.sleep(0.2)
        folder.mkdir()

    monkeypatch.setattr(nnunet, "read", lambda *_: None)
    monkeypatch.setattr(nnunet, "write_raw", lambda *_: None)
    monkeypatch.setattr(nnunet, "plan", slow_plan)
    bench = nnunet.Bench(argparse.Namespace(data=tmp_path, work=tmp_path, minutes=1, processes=1))
    with ThreadPoolExecutor() as pool:
        names = [*pool.map(lambda seed: bench.dataset(nnunet.ROWS[0], seed), range(3))]
    assert names == [folder.name] * 3
    assert made == [[]]


def _of_one_seed(row: Any) -> Any:
    return replace(row, seeds=row.seeds[:1])


def test_rows_and_pairs_hold_together(nnunet):
    names = [row.name for row in nnunet.ROWS]
    assert len({*names}) == len(names)
    assert {name for pair in nnunet.PAIRS for name in pair} == {*names}
    for row in nnunet.ROWS:
        earlier = nnunet.ROWS[: nnunet.ROWS.index(row)]
        for other in filter(None, (row.as_long_as, row.taught_by)):
            assert nnunet.named(other) in earlier
            assert nnunet.named(other).task == row.task


def test_volumes_come_back_as_nnunet_reads_them(nnunet, tmp_path):
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nnunet.write_nifti(tmp_path / "a.nii.gz", array, (10.0, 1.5, 1.25))
    image, about = NibabelIO().read_images([str(tmp_path / "a.nii.gz")])
    assert np.array_equal(image[0], array)
    assert about["spacing"] == [10.0, 1.5, 1.25]
