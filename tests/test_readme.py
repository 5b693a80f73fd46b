"""The README's code is run, and its claims about commands are those of the CI."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from measured import CL, NETWORKS, SETTINGS, check_accuracy, check_costs, table
from models import UNet, loader, task_loss
from torch import nn

from reseg_loss import ReSegWrapper

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


def test_the_diff_for_deep_supervision_runs_and_saves_the_bare_models_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = UNet()
    keys, data = list(model.state_dict()), loader()
    scope = {"model": model, "train_loader": data, "task_loss": task_loss, "torch": torch}
    exec(after_the_diff(fences("diff")[1]), scope)
    assert list(torch.load("model.pt", weights_only=True)) == keys
    assert scope["ds"].calls == 4


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_every_snippet_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, label = next(iter(loader()))
    model = UNet()
    scope = {"model": model, "image": image, "label": label, "train_loader": loader(), "task_loss": task_loss,
             "torch": torch, "nn": nn, "MyUNet": UNet, "ReSegWrapper": ReSegWrapper,
             "unlabelled_loader": [other for other, _ in loader(seed=1)]}  # fmt: skip
    keys = list(model.state_dict())
    exec(fences("python")[number].replace("epochs = 100", "epochs = 2"), scope)
    if "mixed" in scope:
        assert scope["mixed"].calls == 2 * 4
        assert list(torch.load("model.pt", weights_only=True)) == keys


def test_the_first_code_comes_early_and_commands_are_those_of_the_ci():
    assert README[: README.index("```")].count("\n") < 25
    quickstart, tests = fences("bash")[0].strip().splitlines()[:2]
    assert quickstart.split("#")[0].strip() == "pip install '.[examples]' && python examples/quickstart.py"
    command = tests.split("#")[0].strip()
    ci = (ROOT / ".ci" / "run").read_text()
    assert command.replace("pip install", "pip install -q") in ci


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("start", "file", "precision", "compiled", "size"),
    [
        ("| | U-Net, fp32 |", "overhead_h200.json", None, False, (8, 7)),
        ("| compiled student | U-Net |", "overhead_h200.json", CL, True, (8, 5)),
        ("| compiled student, H100 |", "overhead_h100_compiled.json", None, True, (8, 5)),
    ],
)
def test_the_cost_tables_are_those_of_the_results(start, file, precision, compiled, size):
    check_costs(table(README, start), file, precision, compiled, size)


@pytest.mark.parametrize(("start", "plans"), [("| augmentation |", SETTINGS), ("| network |", NETWORKS)])
def test_the_accuracy_tables_are_those_of_the_results(start, plans):
    check_accuracy(table(README, start), plans)


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
    assert f"{scan['ratio']:.1f} times" in README
