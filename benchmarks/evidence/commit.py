"""What was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path


def head_commit() -> str | None:
    """The commit of this checkout, "-dirty" if files have changed since; None where there is no git to tell."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
