"""Which cases belong to one patient, judged by their ids, and splits that keep a patient's cases together."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from ...errors import ReSegError

UP_TO_A_NUMBER = r".*?\d+"  # patient001 of patient001_frame12, sub-03 of sub-03_ses-1
FOLDS = 5


def patients(identifiers: Iterable[str], pattern: str = UP_TO_A_NUMBER) -> dict[str, list[str]]:
    """Ids by patient. The patient is what `pattern` matches at an id's start, or the whole id. All are sorted.

    Raises:
        ReSegError: `pattern` is not a regular expression.
    """
    try:
        start = re.compile(pattern)
    except re.error as error:
        raise ReSegError(f"the pattern for patients {pattern!r} is not a regular expression: {error}") from error
    groups: dict[str, list[str]] = defaultdict(list)
    for identifier in sorted(identifiers):
        match = start.match(identifier)
        groups[match[0] if match else identifier].append(identifier)
    return dict(groups)


def split_between(groups: dict[str, list[str]], file: Path) -> list[str]:
    """Patients with several cases that a splits_final.json has on both sides of a fold."""
    folds = json.loads(file.read_text())
    sides = [tuple(set(fold[side]) for side in ("train", "val")) for fold in folds]
    return [who for who, cases in groups.items() if any(all(side & set(cases) for side in fold) for fold in sides)]


def write_splits(groups: dict[str, list[str]], file: Path) -> None:
    """Write a splits_final.json as nnU-Net does, but split by patient and not by case.

    Raises:
        ReSegError: there is a different one already, or there are too few patients.
    """
    if len(groups) < FOLDS:
        raise ReSegError(
            f"{FOLDS} folds need at least {FOLDS} patients, but there are {len(groups)}: {', '.join(groups)}"
        )
    folds = generate_crossval_split(list(groups), seed=12345, n_splits=FOLDS)
    splits = [{side: sorted(c for who in whose for c in groups[str(who)]) for side, whose in f.items()} for f in folds]
    if file.exists() and json.loads(file.read_text()) != splits:
        raise ReSegError(f"{file} has other folds, and trainings may use them; move it away to get these folds")
    file.write_text(json.dumps(splits, indent=4))
