"""The Python blocks of a page in docs/pages, run one after the other in one scope, with fewer steps.

As a script it runs pages with what is installed, and leaves out blocks that draw: `python tests/docs_pages.py start`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[1] / "docs" / "pages"
SHORTER = {
    "STEPS = 800": "STEPS = 5",
    "steps=10_000": "steps=3",
    "epochs=50": "epochs=1, progress=False",
    "epochs=150": "epochs=1, progress=False",
}


def blocks(page: str) -> list[str]:
    """What stands between ```python and ``` in a page, which is named without its ending."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(page: str, scope: dict[str, Any], *, without: str = "no such module") -> None:
    """Run the blocks of a page that do not name the module `without`."""
    for number, code in enumerate(blocks(page), 1):
        if without in code:
            continue
        for old, new in SHORTER.items():
            code = code.replace(old, new)
        exec(compile(code, f"{page}.md, block {number}", "exec"), scope)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        assert blocks(name), f"{name}.md has no Python"
        run(name, {}, without="matplotlib")
        print(f"{name}.md runs")
