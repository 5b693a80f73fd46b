"""The code of reseg_loss/integrations/README.md, and short versions of it for tests."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "reseg_loss" / "integrations" / "README.md"
SHORTER = {"epochs=50": "steps=4, progress=False", "range(first, 100)": "range(first, 3)", "64, 64)": "16, 16)"}


def section(title: str) -> str:
    """The text below a heading of either size, as far as the next."""
    (heading,) = re.findall(rf"^##+ {re.escape(title)}\n", PAGE.read_text(), re.MULTILINE)
    _, text = PAGE.read_text().split(f"\n{heading}")
    return re.split(r"^##+ ", text, flags=re.MULTILINE)[0]


def code_after_the_diff(title: str, **more: str) -> str:
    """The code that a section's diff results in, with fewer steps."""
    (diff,) = re.findall(r"```diff\n(.*?)```", section(title), re.DOTALL)
    code = "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))
    return shorter(code, **more)


def code_before_the_diff(title: str, **more: str) -> str:
    """The code that the diff starts from."""
    (diff,) = re.findall(r"```diff\n(.*?)```", section(title), re.DOTALL)
    return shorter("\n".join(line[2:] for line in diff.splitlines() if not line.startswith("+")), **more)


def shorter(code: str, **more: str) -> str:
    for old, new in {**SHORTER, **more}.items():
        code = code.replace(old, new)
    return code
