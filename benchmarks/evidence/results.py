"""Results as JSON lines, one per run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are there; one that a kill has cut short is left out."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path.name}: a broken line is left out", flush=True)
    return found


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Write a line at once, also after one that was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"\n", b"")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(line) + "\n")


def finished(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{key: line} of the runs that did not fail."""
    return {line["key"]: line for line in lines if "error" not in line}
