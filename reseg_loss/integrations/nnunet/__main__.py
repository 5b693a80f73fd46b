"""Print the line that shows nnU-Net our trainer: `eval "$(python -m reseg_loss.integrations.nnunet)"`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def folder() -> Path:
    """Where nnU-Net finds the trainer."""
    return Path(__file__).with_name("ext")


def main() -> None:
    """The folder joins those that nnUNet_extTrainer names already."""
    named = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)  # noqa: SIM112
    paths = dict.fromkeys([*filter(None, named), str(folder())])
    print(f"export nnUNet_extTrainer={shlex.quote(os.pathsep.join(paths))}")


if __name__ == "__main__":
    main()
