"""The page on frameworks is reseg_loss/integrations/README.md, whose links are made to fit the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "reseg_loss" / "integrations" / "README.md"
PAGE = "how-to/frameworks.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the page."""
    files.append(File.generated(config, PAGE, content=fitted(SOURCE.read_text(encoding="utf-8"))))
    return files


def fitted(text: str) -> str:
    """The text with links to pages, and to the README as the site's first one, and with the names of other files."""
    text = re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?!\.\./|README|docs/pages/)([^)]*)\)", r"\1 (`\2`)", text)
    text = re.sub(r"\]\(\.\./\.\./docs/pages/", "](../", text)
    return re.sub(r"\]\(\.\./\.\./README\.md(#[^)]*)?\)", "](../index.md)", text)
