"""The data sets as stacks of slices or of volumes, and splits of their patients that depend on the seed alone."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .field import zoomed

ACDC_CLASSES = ("right ventricle", "myocardium", "left ventricle")
TEST, VALIDATION = 5, 10  # one in so many patients of each stratum; the others are for training
FIELD_LABELLED = {1: "labelled_1", 3: "labelled_3", 7: "labelled_7"}  # the field's choices of labelled patients


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
    field_parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Patients of "validation", "test", "labelled_1", ..., where the field has one split for all seeds."""
    native: Sequence[np.ndarray] | None = None
    """Label maps at the sizes that slices come in, where `images` and `labels` are resized; these are scored."""
    native_images: Sequence[np.ndarray] | None = None
    """The images at these sizes, uint8."""
    spacing: Mapping[int, tuple[float, float, float]] | None = None
    """Of each volume, between slices, rows and columns of what is scored, in mm; distances are in pixels without."""


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
    for key in ("images", "labels"):
        if arrays[key].dtype != np.uint8:
            raise ValueError(f"{path.name}: {key} are {arrays[key].dtype}, and must be uint8 (images 0 to 255)")
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
    if len(np.unique(np.stack([patient, frame, position]), axis=1).T) < len(patient):
        raise ValueError(f"{path.name}: two images are of the same patient, phase and slice")
    patient, frame = patient[order], frame[order]
    starts = np.r_[True, (np.diff(patient) != 0) | (np.diff(frame) != 0)]
    images, labels = arrays["images"][order], arrays["labels"][order]
    return Slices(name, images, labels, patient, np.cumsum(starts) - 1, stratum, fixed_test, class_names)


def load_native(path: Path, size: int, order_0: bool = False) -> Slices:
    """ACDC with the field's patients from `acdc_native.npz`, slices resized to `size` whatever their shape.

    Images are interpolated bilinearly, antialiased where they shrink, and labels by nearest neighbour, or both by order
    0 as the field does it; intensities are 0 to 100 in the file.
    """
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    patient, phase = arrays["patient"].astype(np.int64), arrays["phase"].astype(np.int64)
    order = np.lexsort((arrays["slice"], phase, patient))
    shapes = list(zip(arrays["height"].tolist(), arrays["width"].tolist()))
    areas = np.cumsum([h * w for h, w in shapes])
    blobs = np.split(arrays["webp"], arrays["ends"][:-1])
    labels = [flat.reshape(shape) for flat, shape in zip(np.split(arrays["labels"], areas[:-1]), shapes)]

    def read(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, label = decode_webp(blobs[i].tobytes()), labels[i]
        if image.shape != label.shape:
            raise ValueError(f"{path.name}: slice {i} is {image.shape}, and its label {label.shape}")
        pixels = torch.from_numpy(image)[None, None].float() * (255 / 100)
        whole = pixels[0, 0].round().byte().numpy()
        if order_0:
            return whole, zoomed(whole, (size, size)), zoomed(label, (size, size))
        resized = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0, 0]
        nearest = resized_labels(label[None], (size, size))[0]
        return whole, resized.round().clamp(0, 255).byte().numpy(), nearest

    with ThreadPoolExecutor() as pool:
        read_all = list(pool.map(read, order.tolist()))
    native_images = [image for image, _, _ in read_all]
    images, smaller = (np.stack([slices[i] for slices in read_all]) for i in (1, 2))
    patient, phase = patient[order], phase[order]
    starts = np.r_[True, (np.diff(patient) != 0) | (np.diff(phase) != 0)]
    names = ("validation", "test", *FIELD_LABELLED.values())
    parts = {name: tuple(sorted(arrays[name].tolist())) for name in names}
    return Slices(
        "acdc_native",
        images,
        smaller,
        patient,
        np.cumsum(starts) - 1,
        dict.fromkeys(patient.tolist(), ""),
        frozenset(parts["test"]),
        ACDC_CLASSES,
        parts,
        [labels[i] for i in order],
        native_images,
    )


def decode_webp(blob: bytes) -> np.ndarray:
    """A grey image (H, W) uint8; by Pillow, or by OpenCV where there is none."""
    try:
        from PIL import Image
    except ImportError:
        import cv2  # pyright: ignore[reportMissingImports]

        return cv2.imdecode(np.frombuffer(blob, np.uint8), cv2.IMREAD_COLOR)[..., 0]
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))[..., 0].copy()


def resized_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(N, H, W) to another height and width, by nearest neighbour."""
    if labels.shape[1:] == shape:
        return labels
    return F.interpolate(torch.from_numpy(labels)[:, None], shape, mode="nearest-exact")[:, 0].numpy()


def split(data: Slices, patients: int, seed: int, drawn: bool = False) -> Split:
    """`patients` labelled ones, drawn evenly from the strata; fewer are a part of more.

    Where the field has a split, it is that one for every seed; with `drawn` the labelled patients are others, drawn by
    the seed from all that are for training.
    """
    if data.field_parts:
        return _field_split(data, patients, seed if drawn else None)
    if drawn:
        raise ValueError(f"{data.name} has no labelled patients of the field's, beside which others could be drawn")
    rng = np.random.default_rng([seed, 0])
    groups: dict[str, list[int]] = defaultdict(list)
    for who, stratum in sorted(data.stratum.items()):
        groups[stratum].append(who)
    test: list[int] = sorted(data.fixed_test)
    validation: list[int] = []
    pools: list[list[int]] = []
    for _, members in sorted(groups.items()):
        shuffled = [members[i] for i in rng.permutation(len(members)) if members[i] not in data.fixed_test]
        if not data.fixed_test:
            first, second = len(members) // TEST, len(members) // VALIDATION
            test += shuffled[:first]
            validation += shuffled[first : first + second]
            shuffled = shuffled[first + second :]
        pools.append(shuffled)
    turns = range(max(map(len, pools)))
    training = [pool[turn] for turn in turns for pool in pools if turn < len(pool)]
    if not 1 <= patients <= len(training):
        raise ValueError(f"{data.name} has {len(training)} patients to train on, not {patients}")
    return Split(tuple(training[:patients]), tuple(training[patients:]), tuple(validation), tuple(test))


def _field_split(data: Slices, patients: int, seed: int | None) -> Split:
    validation, test = data.field_parts["validation"], data.field_parts["test"]
    training = tuple(sorted(set(data.patient.tolist()) - {*validation, *test}))
    if patients == len(training):
        labelled = training
    elif seed is not None:
        order = np.random.default_rng([seed, 0]).permutation(training)
        labelled = tuple(sorted(order[:patients].tolist()))
    elif patients in FIELD_LABELLED:
        labelled = data.field_parts[FIELD_LABELLED[patients]]
    else:
        known = ", ".join(map(str, [*FIELD_LABELLED, len(training)]))
        raise ValueError(f"{data.name} has the field's choices of {known} labelled patients, not of {patients}")
    return Split(labelled, tuple(p for p in training if p not in labelled), validation, test)


def half_without(parts: Split, seed: int) -> tuple[int, ...]:
    """The unlabelled patients but for so many, drawn by the seed, as are half of all for training.

    Raises:
        ValueError: there are not more than these.
    """
    half = (len(parts.labelled) + len(parts.unlabelled)) // 2
    if len(parts.unlabelled) <= half:
        raise ValueError(f"of {len(parts.unlabelled)} unlabelled patients {half} cannot be left out")
    order = np.random.default_rng([seed, 1]).permutation(parts.unlabelled)
    return tuple(sorted(order[half:].tolist()))


def drawn_patients(data: Slices, count: int, seed: int) -> tuple[int, ...]:
    """`count` of all patients, drawn by the seed. Raises a ValueError if there are fewer."""
    everyone = np.unique(data.patient)
    if len(everyone) < count:
        raise ValueError(f"{data.name} has {len(everyone)} patients, not {count}")
    return tuple(sorted(np.random.default_rng([seed, 2]).permutation(everyone)[:count].tolist()))


def centred(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W) in the middle of squares, black around them: for pixels that are about as large as the others'.

    Raises:
        ValueError: they are larger than the square.
    """
    more = [size - side for side in images.shape[1:]]
    if min(more) < 0:
        raise ValueError(f"slices of {images.shape[1]} x {images.shape[2]} do not fit into squares of {size}")
    return np.pad(images, ((0, 0), *((n // 2, n - n // 2) for n in more)))


def rows(data: Slices, patients: tuple[int, ...]) -> np.ndarray:
    """The slices of some patients."""
    return np.flatnonzero(np.isin(data.patient, patients))
