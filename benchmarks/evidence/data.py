"""The data sets as stacks of slices or of volumes, and splits of their patients that depend on the seed alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ACDC_CLASSES = ("right ventricle", "myocardium", "left ventricle")
TEST, VALIDATION = 5, 10  # one in so many patients of each stratum; the others are for training


@dataclass(frozen=True)
class Slices:
    """Images and label maps (N, H, W) uint8, with the patient and the volume of each slice (N).

    In 3D they are (N, D, H, W): each "slice" is a whole volume.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    patient: np.ndarray
    volume: np.ndarray
    """A number per volume (patient and heart phase). The slices of a volume are neighbours, in order."""
    stratum: dict[int, str]
    """Of each patient, for instance its pathology group."""
    fixed_test: frozenset[int]
    """Patients that a data set keeps for testing; empty where every seed draws its own."""
    class_names: tuple[str, ...]
    """The foreground classes, 1, 2, ..."""


@dataclass(frozen=True)
class Split:
    """Patients of each part; `unlabelled` are the training patients whose labels are not used."""

    labelled: tuple[int, ...]
    unlabelled: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]

    def part(self, name: str) -> tuple[int, ...]:
        return getattr(self, name)


def load(path: Path) -> Slices:
    """ACDC, Sunnybrook or the hippocampus from its `.npz`, as it is or packed by `pack`."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    patient = arrays["patient"].astype(np.int64)
    if "phase" in arrays:
        name, class_names = "acdc", ACDC_CLASSES
        frame, position = arrays["phase"].astype(np.int64), arrays["slice"]
        stratum = {int(p): f"group {(p - 1) // 20}" for p in np.unique(patient)}
        fixed_test: frozenset[int] = frozenset()
    elif "patient_name" in arrays:
        name, class_names = "sunnybrook", ("left ventricle",)
        # numbered 20 time frames a position, of which end diastole and end systole have a label
        frame, position = arrays["slice"] % 20, arrays["slice"] // 20
        names = arrays["patient_name"]
        stratum = {int(p): str(names[p]).rsplit("-", 1)[0] for p in np.unique(patient)}
        fixed_test = frozenset(np.unique(patient[arrays["part"] == 3]).tolist())
    elif arrays["images"].ndim == 4:
        name, class_names = "hippocampus", ("anterior hippocampus", "posterior hippocampus")
        frame = position = np.zeros_like(patient)  # a volume per patient
        stratum, fixed_test = dict.fromkeys(patient.tolist(), ""), frozenset()
    else:
        raise ValueError(f"{path} is not ACDC ('phase'), Sunnybrook ('patient_name') or the hippocampus (volumes)")
    order = np.lexsort((position, frame, patient))
    patient, frame = patient[order], frame[order]
    starts = np.r_[True, (np.diff(patient) != 0) | (np.diff(frame) != 0)]
    images, labels = arrays["images"][order], arrays["labels"][order]
    return Slices(name, images, labels, patient, np.cumsum(starts) - 1, stratum, fixed_test, class_names)


def split(data: Slices, patients: int, seed: int) -> Split:
    """`patients` labelled ones, drawn evenly from the strata; fewer are a part of more."""
    rng = np.random.default_rng([seed, 0])
    groups: dict[str, list[int]] = defaultdict(list)
    for who, stratum in sorted(data.stratum.items()):
        groups[stratum].append(who)
    test: list[int] = sorted(data.fixed_test)
    validation: list[int] = []
    pools: list[list[int]] = []
    for _, members in sorted(groups.items()):
        drawn = [members[i] for i in rng.permutation(len(members)) if members[i] not in data.fixed_test]
        if not data.fixed_test:
            first, second = len(members) // TEST, len(members) // VALIDATION
            test += drawn[:first]
            validation += drawn[first : first + second]
            drawn = drawn[first + second :]
        pools.append(drawn)
    turns = range(max(map(len, pools)))
    training = [pool[turn] for turn in turns for pool in pools if turn < len(pool)]
    if not 1 <= patients <= len(training):
        raise ValueError(f"{data.name} has {len(training)} patients to train on, not {patients}")
    return Split(tuple(training[:patients]), tuple(training[patients:]), tuple(validation), tuple(test))


def rows(data: Slices, patients: tuple[int, ...]) -> np.ndarray:
    """The slices of some patients."""
    return np.flatnonzero(np.isin(data.patient, patients))
