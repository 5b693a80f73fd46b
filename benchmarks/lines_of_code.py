"""Lines of code of the package, without blank lines, comments and docstrings: `python benchmarks/lines_of_code.py`."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "reseg_loss"
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> int:
    """The lines of a module that hold a token of code."""
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _SILENT:
            counted.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            counted.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(counted)


def main() -> None:
    """Every file, every room, and the sum."""
    rooms: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        count = lines_of_code(path.read_text())
        room = name.parts[0] if len(name.parts) > 1 else "."
        rooms[room] = rooms.get(room, 0) + count
        print(f"{count:6} {name}")
    print(*(f"{count:6} {room}/" for room, count in rooms.items()), f"{sum(rooms.values()):6} in all", sep="\n")


if __name__ == "__main__":
    main()
