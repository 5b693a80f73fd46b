"""The README's code is run, and its claims about commands are those of the CI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import NNUNET, check_rows, check_settings, table
from models import UNet, loader, task_loss

ROOT = Path(__file__).parents[1]
RUNS = ("bare", "deep supervision", "reseg")
README = (ROOT / "README.md").read_text()


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def after_the_diff(diff: str) -> str:
    """The code that a diff results in."""
    return "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
def test_the_diff_of_a_training_loop_runs_and_saves_the_bare_models_keys(tmp_path, monkeypatch):
    diff = fences("diff")[0]
    monkeypatch.chdir(tmp_path)
    model = UNet()
    keys = list(model.state_dict())
    code = after_the_diff(diff).replace("epochs=50", "epochs=2, progress=False")
    scope = {
        "model": model,
        "train_loader": loader(),
        "task_loss": task_loss,
        "optimizer": torch.optim.Adam(model.parameters()),
        "torch": torch,
    }
    before = model.head.weight.detach().clone()
    exec(code, scope)
    assert list(torch.load("model.pt", weights_only=True)) == keys
    assert not torch.equal(model.head.weight, before)
    assert scope["reseg"].calls == 4


def test_the_diff_for_deep_supervision_runs_and_leaves_nothing_behind():
    model = UNet()
    keys, data = list(model.state_dict()), loader()
    scope = {"model": model, "train_loader": data, "task_loss": task_loss, "torch": torch}
    exec(after_the_diff(fences("diff")[1]), scope)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    assert scope["ds"].calls == 4


def test_the_program_runs_as_pasted_and_learns_from_both_kinds_of_images(tmp_path, monkeypatch):
    (code,) = fences("python")
    assert len(code.splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert list(torch.load("model.pt", weights_only=True)) == list(scope["UNet"]().state_dict())
    assert (scope["semi"].calls, scope["semi"].stats()["weight"]) == (100, 1.0)
    assert list(scope["semi"].parameters())  # of heads: the levels were found


def test_it_is_short():
    assert len(README.split()) <= 1300


def test_the_first_code_comes_early_and_commands_are_those_of_the_ci():
    assert README[: README.index("```")].count("\n") < 25
    quickstart, tests = fences("bash")[0].strip().splitlines()[:2]
    assert quickstart.split("#")[0].strip() == "pip install '.[examples]' && python examples/quickstart.py"
    command = tests.split("#")[0].strip()
    ci = (ROOT / ".ci" / "run").read_text()
    assert command.replace("pip install", "pip install -q") in ci


def anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", ["README.md", "examples/README.md", "benchmarks/README.md", "reseg_loss/integrations/README.md"]
)
def test_every_linked_file_and_heading_exists(page):
    for target, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", (ROOT / page).read_text()):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert target.startswith("http") or file.exists(), target
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)), heading


def test_the_cost_table_is_that_of_the_results():
    check_rows(table(README, "| a training step |"), ("overhead_h200.json", "overhead_h200_semi.json"))


def test_the_accuracy_table_is_that_of_the_results():
    check_settings(table(README, "| data | labelled patients |"))


def test_the_decision_table_says_what_the_other_tables_say():
    decisions = {row[1]: row for row in table(README, "| you want to |")}
    acdc = table(README, "| data | labelled patients |")[2]
    times = {row: time for row, time, _ in table(README, "| a training step |")[2:]}
    for name, column, time in (
        ("`ReSegWrapper`", 4, f"{times['paper']}, and stage 1 before"),
        ("`DeepSupervision`", 5, times["deep supervision"]),
        (
            "`SemiSupervised`; keep its mean teacher",
            6,
            f"{times['semi-supervised, two forwards']}; {times['semi-supervised']} without batch normalisation",
        ),
    ):
        assert decisions[name][2:] == [acdc[column], time]
    (in_nnunet,) = (row for row in table(README, "| data | labelled patients |") if row[2] == NNUNET)
    measured = (ROOT / "docs" / "pages" / "explanation" / "measured.md").read_text()
    (decision,) = (row for row in decisions.values() if row[0] == "train with nnU-Net")
    assert decision[2] == f"{in_nnunet[6]} with `nnUNetTrainerSemi`"
    assert f"a step of ours takes {decision[3]} times as long in batches of 6" in " ".join(measured.split())


def test_the_examples_numbers_are_those_of_the_results():
    text = (ROOT / "examples" / "README.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "backbones_h100.json").read_text())["results"]
    for name in {result["backbone"] for result in results}:
        runs = [next(r for r in results if (r["backbone"], r["row"]) == (name, row)) for row in RUNS]
        values = {
            "ms a step": [f"{1e3 * run['seconds_per_step']:.0f}" for run in runs],
            "peak memory, GiB": [f"{run['peak_mib'] / 1024:.1f}" for run in runs],
            "DSC, %": [f"{100 * run['mean_dsc']:.1f}" for run in runs],
        }
        lines = iter(text[text.index(f"| {name} |") :].splitlines())
        for (what, row), line in zip(values.items(), lines):
            assert line.endswith(f"| {what} | {' | '.join(row)} |"), (name, line)
    scan = json.loads((ROOT / "benchmarks" / "results" / "scan_h100.json").read_text())
    assert f"{scan['ms']['cuda']:.0f} ms with the kernel and {scan['ms']['torch']:.0f} ms in torch" in text
    assert f"{scan['ratio']:.1f}\ntimes" in text
