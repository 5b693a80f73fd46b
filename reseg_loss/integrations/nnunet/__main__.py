"""Let nnU-Net find our trainers, `eval "$(python -m reseg_loss.integrations.nnunet)"`; `prepare` unlabelled images."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...errors import ReSegError


def folder() -> Path:
    """The folder in which nnU-Net finds the trainers."""
    return Path(__file__).with_name("ext")


def print_lines() -> None:
    """Add the folder to those in nnUNet_extTrainer. The PowerShell line is for readers, not for `eval`."""
    named = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)  # noqa: SIM112
    paths = os.pathsep.join(dict.fromkeys([*filter(None, named), str(folder())]))
    print(f"export nnUNet_extTrainer={shlex.quote(paths)}")
    if sys.stdout.isatty():
        print("# in PowerShell: $env:nnUNet_extTrainer = '{}'".format(paths.replace("'", "''")))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reseg_loss.integrations.nnunet",
        description="Without a command: print the line that lets nnU-Net find our trainers.",
    )
    command = parser.add_subparsers(dest="command").add_parser(
        "prepare", help="preprocess images without labels (nnUNet_raw/DATASET/imagesUn) with nnU-Net's plans"
    )
    command.add_argument("dataset", help="its id or name")
    command.add_argument("-p", dest="plans", default="nnUNetPlans", help="the plans' name (%(default)s)")
    command.add_argument("-c", dest="configurations", nargs="+", help="default: all that nnU-Net has preprocessed")
    command.add_argument("-np", dest="processes", type=int, help="number of processes (default: nnU-Net's own number)")
    command.add_argument(
        "--patient-splits",
        nargs="?",
        const=True,
        default=False,
        metavar="PATTERN",
        help="write a splits_final.json that keeps each patient's cases together; PATTERN is a regular expression for "
        "the start of an id that names the patient (default: everything up to and including the first number)",
    )
    given = parser.parse_args(arguments)
    if given.command is None:
        print_lines()
        return
    if find_spec("nnunetv2") is None:
        parser.exit(1, "nnU-Net is not installed in this environment: pip install 'reseg-loss[nnunet]'\n")
    from .prepare import prepare

    try:
        prepare(given.dataset, given.plans, given.configurations, given.processes, given.patient_splits)
    except ReSegError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
