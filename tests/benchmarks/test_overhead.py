"""The overhead benchmark runs on CPU, resumes, and writes what its own check and the README's table rely on."""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benchmarks.evidence.compiler import compiler_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch):
    spec = importlib.util.spec_from_file_location("overhead", ROOT / "benchmarks" / "overhead.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = ("bare", "naive", "standardized", "deep supervision", "paper, every=8", "paper")
    monkeypatch.setattr(module, "ROWS", {row: module.ROWS[row] for row in rows})
    monkeypatch.setattr(module, "CUDA", False)
    monkeypatch.setattr(module, "DEVICE", module.torch.device("cpu"))
    return module


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
def test_a_run_writes_results_that_pass_the_check_and_resumes(overhead, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "cpu.json"
    arguments = ["overhead.py", "--out", str(out), "--batch", "1", "--size", "32", "--width", "4", "--steps", "6",
                 "--warmup", "1", "--stage2-steps", "8", "--models", "U-Net"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    overhead.main()
    report = json.loads(out.read_text())
    overhead.check(report)
    assert [r["row"] for r in report["results"]] == list(overhead.ROWS)
    assert {r["row"]: r["steps_per_sample"] for r in report["results"]}["paper, every=8"] == 8
    assert [r["stage1_steps"] for r in report["stages"]] == [0, 1, 1, 1]
    assert report["failed"] == []
    assert out.with_suffix(".png").stat().st_size > 1000
    capsys.readouterr()
    overhead.main()
    assert json.loads(out.read_text()) == report
    assert "ms" not in capsys.readouterr().out, "a group that is there already is not measured again"
    monkeypatch.setattr(sys, "argv", [*arguments, "--batch", "2"])
    with pytest.raises(SystemExit):
        overhead.main()
    broken = {**report, "results": [{**report["results"][0], "ratio": 2.0}]}
    with pytest.raises(ValueError, match="does not add up"):
        overhead.check(broken)
    with pytest.raises(ValueError, match="'ms'"):
        overhead.check({**report, "results": [{k: v for k, v in report["results"][0].items() if k != "ms"}]})


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
def test_rows_of_a_compiled_student_do_not_share_the_bare_rows_code(overhead, monkeypatch):
    torch = overhead.torch
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = {**dict.fromkeys(compiler_settings(), 1), "skip_nnmodule_hook_guards": True}
    with torch._dynamo.config.patch(settings), torch.backends.cudnn.flags(benchmark=False):
        torch._dynamo.reset()
        overhead.set_up()
        bench = overhead.Bench(overhead.Group("U-Net", "fp32", compiled=True), 1, 32, 4)
        rows = overhead.measure(bench, steps=6, warmup=1)  # a tap that does not fire is an error
    torch._dynamo.reset()
    assert [row["row"] for row in rows] == list(bench.rows())


def test_a_group_that_fails_leaves_garbage_collection_on_for_the_next_one(overhead):
    class Failing:
        def rows(self):
            return {"bare": None}

        def step(self, row):
            def step():
                if not gc.isenabled():
                    raise RuntimeError("out of memory")

            return step

    with pytest.raises(RuntimeError, match="out of memory"):
        overhead.measure(Failing(), steps=2, warmup=1)
    assert gc.isenabled()


def test_a_row_that_fails_leaves_the_backend_as_it_was(overhead, monkeypatch):
    monkeypatch.setattr(overhead.terms, "BACKEND", "before")
    with pytest.raises(RuntimeError, match="out of memory"), overhead.backend("torch"):
        raise RuntimeError("out of memory")
    assert overhead.terms.BACKEND == "before"


def test_mistaken_arguments_are_refused_with_a_sentence(overhead, tmp_path, monkeypatch, capsys):
    empty = tmp_path / "empty.json"
    keys = ("gpu", "torch", "cuda", "triton", "python", "reseg_loss", "commit", "batch", "size", "width", "steps",
            "warmup", "stage2_steps")  # fmt: skip
    about = {"format": overhead.FORMAT, **dict.fromkeys(keys)}
    empty.write_text(json.dumps({"about": about, "results": [], "stages": [], "failed": []}))
    few = json.loads((Path(overhead.__file__).parent / "results" / "overhead_cpu.json").read_text())
    few["results"] = [result for result in few["results"] if result["row"] != "paper, every=8"]
    other = tmp_path / "few.json"
    other.write_text(json.dumps(few))
    for arguments, message in (
        (["--plot-only"], "there is no --out"),
        (["--plot-only", "--out", str(tmp_path / "none.json")], "none.json is not there"),
        (["--rows", "bare", "paper, every=8", "--out", str(other)], "has groups without paper, every=8; name another"),
        (["--plot-only", "--out", str(empty)], "empty.json has no results yet"),
        (["--profile", "bare", "nonsense"], "no row ['nonsense']; those of U-Net, fp32, eager are ['bare', 'naive',"),
    ):
        monkeypatch.setattr(sys, "argv", ["overhead.py", *arguments])
        with pytest.raises(SystemExit):
            overhead.main()
        assert message in " ".join(capsys.readouterr().err.split())


def test_results_that_are_published_pass_the_check(overhead):
    for file in (ROOT / "benchmarks" / "results").glob("overhead_*.json"):
        report = json.loads(file.read_text())
        if "format" in report["about"]:
            overhead.check(report)
            assert report["about"]["commit"], file


def test_what_matters_most_is_measured_first(overhead, monkeypatch):
    monkeypatch.setattr(overhead, "CUDA", True)
    groups = overhead.plan(overhead.MODELS)
    assert [str(g) for g in groups[:2]] == ["U-Net, bf16 channels_last, eager", "U-Net, bf16, eager"]
    assert len(groups) == len(set(groups)) == len(overhead.MODELS) * 3 * 2 + 1
    assert groups[-1] == overhead.Group("U-Net", overhead.GRAPH, False)
