"""The documentation's code is run, its numbers are those of the results, and its messages are the library's."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import docs_pages
import pytest
import torch
from docs_pages import PAGES, blocks
from measured import (
    CL,
    NETWORKS,
    SETTINGS,
    check_accuracy,
    check_claim,
    check_controls,
    check_costs,
    check_field,
    check_hd95,
    check_heldout,
    check_ideas,
    check_memory,
    check_nnunet,
    table,
)
from models import UNet, batch, ignoring, loader
from torch import nn

import reseg_loss

ROOT = Path(__file__).parents[1]
WITH_CODE = [str(page.relative_to(PAGES).with_suffix("")) for page in sorted(PAGES.rglob("*.md"))]
WITH_CODE = [page for page in WITH_CODE if blocks(page)]

few = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")  # a few steps teach it nothing


def given() -> dict[str, Any]:
    """What the pages say that a reader has: a model and loaders; for NIfTI, files."""
    image, label = batch()
    unlabelled, _ = batch(seed=1)
    return {
        "torch": torch,
        "nn": nn,
        "MyUNet": UNet,
        "model": UNet(),
        "image": image,
        "label": label,
        "unlabelled": unlabelled,
        "train_loader": loader(),
        "unlabelled_loader": [other for other, _ in loader(seed=1)],
        "task_loss": ignoring,
    }


@few
@pytest.mark.parametrize("page", [page for page in WITH_CODE if page not in ("start", "how-to/nifti")])
def test_a_pages_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    docs_pages.run(page, given())


def test_the_tutorials_code_runs_as_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    docs_pages.run("start", scope)
    assert len(scope["scores"]) == 5
    assert list(torch.load("model.pt", weights_only=True)) == list(scope["UNet"]().state_dict())


@pytest.mark.filterwarnings("default")  # MONAI's own
def test_the_code_for_nifti_files_runs(tmp_path, monkeypatch):
    nib = pytest.importorskip("nibabel")
    np = pytest.importorskip("numpy")
    random = np.random.default_rng(0)
    counts = {"image": 2, "label": 2, "other": 3}
    names = {kind: [str(tmp_path / f"{kind}{n}.nii.gz") for n in range(count)] for kind, count in counts.items()}
    for kind, files in names.items():
        for file in files:
            voxels = random.integers(0, 3, (40, 40, 20)).astype(np.uint8 if kind == "label" else np.float32)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), file)
    scope = {"images": names["image"], "labels": names["label"], "unlabelled_images": names["other"]}
    monkeypatch.chdir(tmp_path)
    docs_pages.run("how-to/nifti", scope)
    assert scope["semi"].calls == 3
    for file in names["other"]:
        written = nib.load(tmp_path / "predictions" / Path(file).name)
        assert written.shape == nib.load(file).shape
        assert np.array_equal(written.affine, np.eye(4))


def test_every_page_is_in_the_navigation():
    config = (ROOT / "docs" / "mkdocs.yml").read_text()
    listed = re.findall(r"- (\S+\.md)$", config, re.MULTILINE)
    pages = {str(page.relative_to(PAGES)) for page in PAGES.rglob("*.md")}
    assert set(listed) == pages | {"how-to/frameworks.md"}  # which docs/hooks.py makes


def test_the_messages_of_troubleshooting_are_the_librarys():
    """As its literals say them, joined as Python joins them."""
    trees = [ast.parse(file.read_text()) for file in Path(reseg_loss.__file__).parent.rglob("*.py")]
    joined = [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, (ast.Constant, ast.JoinedStr))
    ]
    titles = re.findall(r"^### (.*)$", (PAGES / "how-to" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(titles) > 15
    for title in titles:
        assert any(title in text for text in joined), title


@pytest.mark.parametrize(("start", "plans"), [("| augmentation |", SETTINGS), ("| network |", NETWORKS)])
def test_the_accuracy_tables_are_those_of_the_results(start, plans):
    check_accuracy(table((PAGES / "explanation" / "measured.md").read_text(), start), plans)


def test_the_table_of_unseen_data_is_that_of_the_results():
    check_heldout(table((PAGES / "explanation" / "measured.md").read_text(), "| never seen before |"))


def test_the_table_of_the_fields_protocol_is_that_of_the_results():
    text = (PAGES / "explanation" / "measured.md").read_text()
    check_field(table(text, "| the field's patients |"), text)


def test_what_is_said_of_hd95_is_what_the_results_say():
    check_hd95((PAGES / "explanation" / "measured.md").read_text())


def test_the_table_of_nnunet_is_that_of_the_results():
    text = (PAGES / "explanation" / "measured.md").read_text()
    check_nnunet(table(text, "| nnU-Net, labelled patients |"), text)


def test_the_table_of_the_papers_claim_is_that_of_the_results():
    text = (PAGES / "explanation" / "measured.md").read_text()
    check_claim(table(text, "| the paper's claim |"), text)


def test_the_controls_are_those_of_the_results():
    check_controls(table((PAGES / "explanation" / "measured.md").read_text(), "| instead of"))


def test_the_table_of_label_teachers_is_that_of_the_results():
    text = (PAGES / "explanation" / "measured.md").read_text()
    check_ideas(table(text, "| what a teacher of label maps does |"), text)


@pytest.mark.parametrize(
    ("start", "file", "precision", "compiled", "size"),
    [
        ("| with unlabelled images |", "overhead_h200_semi.json", None, False, (6, 1)),
        ("| unlabelled images, compiled |", "overhead_h200_semi.json", None, True, (6, 1)),
        ("| | U-Net, fp32 |", "overhead_h200.json", None, False, (8, 7)),
        ("| compiled student | U-Net |", "overhead_h200.json", CL, True, (8, 5)),
        ("| compiled student, H100 |", "overhead_h100_compiled.json", None, True, (8, 5)),
    ],
)
def test_the_cost_tables_are_those_of_the_results(start, file, precision, compiled, size):
    check_costs(table((PAGES / "explanation" / "cost.md").read_text(), start), file, precision, compiled, size)


@pytest.mark.parametrize(
    ("start", "file"),
    [("| | GiB |", "overhead_h200.json"), ("| with unlabelled images | GiB |", "overhead_h200_semi.json")],
)
def test_the_memory_tables_are_those_of_the_results(start, file):
    check_memory(table((PAGES / "explanation" / "cost.md").read_text(), start), file)


def test_the_peak_of_both_parts_in_turn_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "overhead_h200_semi.json").read_text())["results"]
    peak = {r["row"]: r["peak_mib"] for r in results if not r["compiled"]}
    ratio = peak["deep supervision and CutMix in turn"] / peak["bare, half the batch"]
    assert f"take {ratio:.2f} times the peak" in (PAGES / "explanation" / "cost.md").read_text()


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
