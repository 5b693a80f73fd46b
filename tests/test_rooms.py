"""The package's rooms, read from its sources: what lies in the open, who imports whom, and whose names are exempt."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reseg_loss"
FLOORS = (  # a room imports from those below its floor and from itself; those of one floor don't know each other
    ("errors",),
    ("common",),
    ("functional", "mixing", "task_losses"),
    ("taps",),
    ("recording",),
    ("mean_teacher", "regularizer"),
    ("alignment", "supervision"),
    ("consistency",),
    ("semi",),
    ("integrations",),
)
LATER = {"semi", "task_losses"}  # for few labels
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}


def name_of(file: Path) -> tuple[str, ...]:
    """The module of a file: its path in the package."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = [PACKAGE.name, *file.relative_to(PACKAGE).parts]
            start = here[: len(here) - node.level] if node.level else []
            module = [*start, *(node.module or "").split(".")] if node.module else start
            paths = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for first, *rest in paths:
            if first == PACKAGE.name:
                # what is imported is a module, or a name in one
                yield tuple(rest) if tuple(rest) in MODULES else tuple(rest[:-1])


def test_the_package_opens_with_few_modules():
    names = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert len(names - LATER) <= 7
    assert {file.name for file in PACKAGE.iterdir() if file.is_dir() and file.name != "__pycache__"} <= set(FLOOR)


def test_every_import_is_seen():
    seen = {name: set(imported(file)) for name, file in MODULES.items()}
    assert ("common", "inputs") in seen["regularizer",]
    assert ("functional",) in seen["alignment", "terms"]  # from .. import functional
    assert ("alignment", "kernels") in seen["alignment", "terms"]  # in a function
    assert ("alignment", "wrapper") in seen["integrations", "nnunet", "trainer"]


@pytest.mark.parametrize("module", [name for name in MODULES if name], ids=".".join)
def test_imports_go_one_way(module):
    room = module[0]
    for other in imported(MODULES[module]):
        assert other, f"{'.'.join(module)} imports from the package as a whole"
        assert other[0] == room or FLOOR[other[0]] < FLOOR[room], f"{'.'.join(module)} imports {'.'.join(other)}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imported(file)) - {name} for name, file in MODULES.items() if name}
    assert len([*TopologicalSorter(graph).static_order()]) >= len(graph)  # raises CycleError


def test_names_that_the_linter_takes_for_torchs_are_none_of_ours():
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    exempt = set(settings["flake8-self"]["extend-ignore-names"])
    ours: set[str] = set()
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                ours.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    assert "_beside" in ours
    assert "_last" in ours
    assert exempt & ours == set()


def test_private_names_of_others_are_named_exceptions_and_few():
    files = [f for folder in ("reseg_loss", "tests", "examples", "benchmarks") for f in (ROOT / folder).rglob("*.py")]
    lines = [line for file in files if file != Path(__file__) for line in file.read_text().splitlines()]
    exceptions = [line for line in lines if "SLF001" in line]
    assert len(exceptions) <= 10
    assert all("# noqa: SLF001 - " in line for line in exceptions)
