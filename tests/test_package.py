"""What importing costs, what the package declares, and that its files agree."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import reseg_loss

ROOT = Path(__file__).parents[1]


def imported_by(code: str) -> set[str]:
    """Top-level modules outside the standard library that a fresh interpreter has after `code`."""
    script = f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(result.stdout.split()) - set(sys.stdlib_module_names)


def test_importing_brings_nothing_beyond_torch_and_tqdm():
    ours = imported_by("import reseg_loss") - imported_by("import torch, torch.nn.parallel, tqdm.auto")
    assert {m for m in ours if not m.startswith("_")} == {"reseg_loss"}


def test_the_import_test_can_fail():
    assert "hypothesis" in imported_by("import reseg_loss, hypothesis")


def test_version_license_and_extras_are_declared_once():
    assert version("reseg-loss") == reseg_loss.__version__
    assert f"\nversion: {reseg_loss.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    about = metadata("reseg-loss")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    core = [r for r in about.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert sorted(re.match(r"[a-z]+", r)[0] for r in core) == ["torch", "tqdm"]


def test_mamba_ssm_comes_with_its_own_extra_alone():
    """It is built from source with nvcc, which no other install may need."""
    brings = [r for r in metadata("reseg-loss").get_all("Requires-Dist") or [] if "mamba" in r.lower()]
    assert len(brings) == 1
    assert re.search(r"extra == ['\"]mamba['\"]", brings[0])


def test_the_readme_on_the_package_index_links_to_files_of_this_version():
    """Relative links are dead there; a link that names no file would be code that reads like one."""
    about = metadata("reseg-loss")
    urls = dict(entry.split(", ") for entry in about.get_all("Project-URL") or [])
    files = re.compile(rf"{re.escape(urls['Repository'])}/(?:blob|raw)/v{re.escape(reseg_loss.__version__)}/([^#]+)")
    targets = re.findall(r"""(?:\]\(|(?:src|href)=")([^)"\s]+)""", about["Description"])
    assert any(map(files.match, targets))
    for target in targets:
        assert re.match(r"\w+:|#", target), target
        if file := files.match(target):
            assert (ROOT / file[1]).exists(), target


def test_every_public_name_has_a_docstring():
    for name in reseg_loss.__all__:
        assert name == "PRESETS" or getattr(reseg_loss, name).__doc__, name


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{reseg_loss.__version__}]" in text
    assert "**Changed (numerics)**" in text
