"""Labelled volumes for 2D networks: the MNI152 template, any ``.npz``, and the TransUNet folders of Synapse and ACDC.

Every source becomes a :class:`SegmentationData`: cases for training and for testing, each one a stack of slices that
is read when it is needed. :class:`TrainingBatches` draws batches from the training cases.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Spacing = tuple[float, float, float]
Volume = tuple[np.ndarray, np.ndarray]

SYNAPSE_CLASSES = (
    "background",
    "aorta",
    "gallbladder",
    "left kidney",
    "right kidney",
    "liver",
    "pancreas",
    "spleen",
    "stomach",
)
ACDC_CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
TRANSUNET_SIZE = 224  # the input size that the papers on these two folders train at


@dataclass(frozen=True)
class Case:
    """One volume: a stack of slices, its labels, and the voxel size where it is known."""

    name: str
    group: str
    """What a split has to keep together: the patient (for the MNI152 template, which is one brain: the slab)."""
    read: Callable[[], Volume]
    """Returns the image (D, H, W), float32, and the label (D, H, W), uint8."""
    spacing: Spacing | None = None
    """Millimetres between slices, rows and columns."""


@dataclass(frozen=True)
class SegmentationData:
    """Training and test cases that share no patient."""

    name: str
    train: tuple[Case, ...]
    test: tuple[Case, ...]
    class_names: tuple[str, ...]
    """All classes in label order, the background first."""
    size: int
    """Side of the square that the network sees; slices of another shape are resized to it."""
    unlabelled: tuple[Case, ...] = ()
    """Cases for training whose labels are not used."""

    def __post_init__(self) -> None:
        # without test cases the unlabelled ones are what is to be predicted
        for part, cases in (("training", self.train), ("test", self.test or self.unlabelled)):
            if not cases:
                raise ValueError(f"{self.name} has no {part} cases left; it needs at least one for each part.")
        both = sorted({case.group for case in self.train + self.unlabelled} & {case.group for case in self.test})
        if both:
            raise ValueError(f"{self.name} has {', '.join(both)} in training and test; keep each in one of them.")

    @property
    def others(self) -> SegmentationData:
        """The same with the unlabelled cases for training, as background throughout: nobody can read their labels."""
        return replace(self, train=tuple(replace(case, read=_without_label(case.read)) for case in self.unlabelled))

    def cases(self, *, unlabelled: bool) -> list[str]:
        """What all cases are used for, and their names, with or without the unlabelled ones."""
        parts = {"labelled": self.train, "unlabelled": self.unlabelled if unlabelled else (), "test": self.test}
        return [f"{part} {case.name}" for part, cases in parts.items() for case in cases]

    def with_labels_of(self, slices: int) -> SegmentationData:
        """The same with the labels of so many training slices, spread evenly; the other slices are unlabelled."""
        counts = [len(case.read()[1]) for case in self.train]
        if not 1 <= slices < sum(counts):
            raise ValueError(f"{slices} labelled slices were asked for; choose 1 to {sum(counts) - 1}.")
        chosen = {int((i + 0.5) * sum(counts) / slices) for i in range(slices)}
        train, others, first = [], list(self.unlabelled), 0
        for case, count in zip(self.train, counts):
            for part, cases in ((True, train), (False, others)):
                index = [z for z in range(count) if (first + z in chosen) == part]
                if index:
                    cases.append(replace(case, read=_some(case.read, index)))
            first += count
        return replace(self, train=tuple(train), unlabelled=tuple(others))


def load_data(source: Path | None = None, *, patients: int | None = None, seed: int = 0) -> SegmentationData:
    """Read ``source``, or the MNI152 template without one; train on ``patients`` patients (default: all)."""
    if source is None:
        if patients is not None:
            raise ValueError(
                "The MNI152 template is one averaged brain, so there are no patients to choose from; "
                "use the number of patients together with a data set of your own."
            )
        return load_mni152()
    if not source.exists():
        raise ValueError(f"There is nothing at {source}.")
    if source.suffix == ".npz":
        return load_npz(source, patients=patients, seed=seed)
    if (source / "train_npz").is_dir():
        return load_synapse(source, patients=patients, seed=seed)
    if (source / "ACDC_training_slices").is_dir():
        return load_acdc(source, patients=patients, seed=seed)
    raise ValueError(
        f"{source} is none of the known layouts: an .npz with 'images', 'labels' and 'patient'; a folder with "
        "'train_npz' and 'test_vol_h5' (Synapse); or a folder with 'ACDC_training_slices' and 'ACDC_training_volumes'."
    )


# --- the MNI152 template ---------------------------------------------------------------------------------------------


def slabs(depth: int, thickness: int, margin: int) -> list[range]:
    """Cut ``depth`` slices into slabs and leave out the first ``margin`` slices of each."""
    return [range(start + margin, min(start + thickness, depth)) for start in range(0, depth - margin, thickness)]


def load_mni152(side_mm: int = 192, size: int = 96) -> SegmentationData:
    """The MNI152 template with labels from its tissue maps, axial slabs of 20 mm alternately for training and test.

    The template is exactly mirror-symmetric, so its hemispheres would be the same images twice. Neighbouring slices
    are nearly the same image as well; that is why the first 4 mm of each slab belong to neither part.
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    loaders = (load_mni152_template, load_mni152_gm_template, load_mni152_wm_template)
    t1, grey, white = (np.asarray(load(resolution=1).dataobj, dtype=np.float32) for load in loaders)
    # The arrays run left to right, back to front, bottom to top; a stack of pictures has the slice first and the
    # forehead in the first row.
    t1, grey, white = (array.transpose(2, 1, 0)[:, ::-1] for array in (t1, grey, white))
    inside = [slice((length - side_mm) // 2, (length + side_mm) // 2) for length in t1.shape[1:]]
    maps = torch.from_numpy(np.stack([t1, grey, white], axis=1)[:, :, inside[0], inside[1]])
    image, grey_map, white_map = (part.numpy() for part in resize_image(maps, (size, size)).unbind(1))
    label = np.stack([np.full_like(grey_map, 0.25), grey_map, white_map]).argmax(0).astype(np.uint8)

    pixel = side_mm / size
    cases: tuple[list[Case], list[Case]] = ([], [])
    for index, slab in enumerate(slabs(len(label), thickness=20, margin=4)):
        slices = [z for z in slab if label[z].any()]  # above the head there is nothing to learn or to score
        if slices:
            name = f"slab {index} ({slices[0]}-{slices[-1]} mm)"
            read = in_memory(image[slices], label[slices], name)
            cases[index % 2].append(Case(name, group=name, read=read, spacing=(1.0, pixel, pixel)))
    names = ("background", "grey matter", "white matter")
    return SegmentationData("MNI152 template", tuple(cases[0]), tuple(cases[1]), names, size)


def scanned(data: SegmentationData) -> SegmentationData:
    """The template with every slice as another scanner might show it: gamma, bias field and noise of its own, made up.

    Without, its grey values alone tell the tissues, and the labels of a slice or two are enough for any network.
    """
    train, unlabelled, test = (tuple(map(_scanned, cases)) for cases in (data.train, data.unlabelled, data.test))
    return replace(data, name=f"{data.name}, with made-up noise", train=train, unlabelled=unlabelled, test=test)


def _scanned(case: Case) -> Case:
    image, label = case.read()
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    slices = np.stack([_scan(part, rng) for part in image])
    return replace(case, read=lambda: (slices, label))


def _scan(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in image.shape], indexing="ij")
    waves = [np.cos(rng.uniform(0, 2 * np.pi) + np.tensordot(rng.normal(0, 1.5, 2), grid, 1)) for _ in range(3)]
    shown = image ** np.exp(rng.uniform(-0.4, 0.4)) * np.exp(0.15 * np.sum(waves, axis=0))
    return np.clip(shown + rng.normal(0, 0.1, image.shape), 0, 1.5).astype(np.float32)


# --- one .npz --------------------------------------------------------------------------------------------------------


def load_npz(path: Path, *, patients: int | None = None, seed: int = 0) -> SegmentationData:
    """Slices from one ``.npz``: ``images`` (N, H, W), ``labels`` (N, H, W), ``patient`` (N).

    Optional: ``frame`` or ``phase`` (N) where a patient has several volumes, ``slice`` (N) for the order within a
    volume, and ``spacing`` (3) or (N, 3) in millimetres between slices, rows and columns.
    """
    keys = ("images", "labels", "patient", "frame", "phase", "slice", "spacing")
    with np.load(path) as file:
        arrays = {key: file[key] for key in keys if key in file}
    missing = {"images", "labels", "patient"} - arrays.keys()
    if missing:
        raise ValueError(f"{path.name} lacks {sorted(missing)}; it needs 'images', 'labels' and 'patient'.")
    images, labels, patient = arrays["images"], arrays["labels"], arrays["patient"]
    if images.ndim == 4:
        raise ValueError(
            f"{path.name} holds 3D volumes {images.shape}, and these examples train 2D networks; "
            "save the slices one by one, as images (N, H, W) with 'patient' and 'slice'."
        )
    if images.ndim != 3 or labels.shape != images.shape or patient.shape != images.shape[:1]:
        raise ValueError(
            f"{path.name} needs images (N, H, W), labels of the same shape and patient (N,), "
            f"but has {images.shape}, {labels.shape} and {patient.shape}."
        )

    count = len(images)
    kind = "phase" if "phase" in arrays and "frame" not in arrays else "frame"
    frame = arrays.get(kind, np.zeros(count, dtype=int))
    order = np.lexsort((arrays.get("slice", np.arange(count)), frame, patient))
    rows: dict[tuple[Any, Any], list[int]] = defaultdict(list)
    for row in order:
        rows[patient[row], frame[row]].append(row)
    mm = np.broadcast_to(arrays["spacing"], (count, 3)) if "spacing" in arrays else None

    cases = []
    for (who, which), index in rows.items():
        if "slice" in arrays and len(np.unique(arrays["slice"][index])) < len(index):
            raise ValueError(
                f"{path.name} has two slices of one number in a volume of patient {who}; tell the patient's volumes "
                "apart with 'frame' (N,), and the slices of a volume with 'slice' (N,)."
            )
        if mm is not None and not np.allclose(mm[index], mm[index[0]]):
            raise ValueError(
                f"{path.name}: 'spacing' differs between the slices of patient {who}; give one per volume."
            )
        spacing = None if mm is None else tuple(mm[index[0]].tolist())
        name = f"patient {who}" + (f" {kind} {which}" if kind in arrays else "")
        cases.append(Case(name, str(who), in_memory(images[index], labels[index], f"{path.name}, {name}"), spacing))

    train, test = split_groups([str(who) for who in np.unique(patient)], seed=seed, train=patients)
    names = ("background", *(f"class {index}" for index in range(1, int(labels.max()) + 1)))
    size = 32 * -(-max(images.shape[1:]) // 32)  # five halvings have to come out even
    return SegmentationData(path.stem, _of(cases, train), _of(cases, test), names, size, rest(cases, train, test))


def load_images(path: Path, like: Case) -> list[Case]:
    """Cases without labels from an ``.npz`` with ``images``, slices or volumes: what the case `like` has."""
    if path.suffix != ".npz" or not path.exists():
        raise ValueError(f"{path} is no .npz with 'images'.")
    with np.load(path) as file:
        if "images" not in file:
            raise ValueError(f"{path.name} lacks 'images'.")
        images = file["images"]
    axes = like.read()[0].ndim
    if images.ndim == 3 == axes:
        images = images[None]  # one stack of slices
    elif images.ndim == 4 == axes:
        images = images[:, None]  # one channel
    if images.ndim != axes + 1:
        raise ValueError(f"{path.name} has images of shape {images.shape}, which are not as those with labels.")
    unknown = np.zeros(images.shape[1 + (axes == 4) :], np.uint8)
    names = [f"{path.name} {i}" for i in range(len(images))]
    return [
        Case(f"image {i}", name, in_memory(image, unknown, name)) for i, (image, name) in enumerate(zip(images, names))
    ]


# --- the folders of TransUNet ----------------------------------------------------------------------------------------


def load_synapse(root: Path, *, patients: int | None = None, seed: int = 0) -> SegmentationData:
    """``train_npz/caseXXXX_sliceYYY.npz`` for training, ``test_vol_h5/caseXXXX.npy.h5`` for testing."""
    train = _stacks(root / "train_npz", r"(case\d+)_slice(\d+)\.npz")
    test = _volumes(root / "test_vol_h5", r"(case\d+)\.npy\.h5")
    groups = sorted({case.group for case in train})
    chosen = _spread(groups, _checked(patients, len(groups)), np.random.default_rng(seed))
    others = rest(train, chosen)
    return SegmentationData("Synapse", _of(train, chosen), tuple(test), SYNAPSE_CLASSES, TRANSUNET_SIZE, others)


def load_acdc(root: Path, *, patients: int | None = None, seed: int = 0) -> SegmentationData:
    """``ACDC_training_slices/patientXXX_frameYY_slice_Z.h5`` for training, ``ACDC_training_volumes`` for testing.

    Both folders hold all patients, and so the split by patient is made here.
    """
    slices = _stacks(root / "ACDC_training_slices", r"((patient\d+)_frame\d+)_slice_(\d+)\.h5")
    volumes = _volumes(root / "ACDC_training_volumes", r"((patient\d+)_frame\d+)\.h5")
    one_sided = sorted({case.name for case in slices} ^ {case.name for case in volumes})
    if one_sided:  # its patient could be drawn for a part that has nothing of it
        raise ValueError(
            f"{root} has slices or a volume, but not both, of {len(one_sided)} frames ({', '.join(one_sided[:5])}); "
            "complete the folders."
        )
    groups = sorted({case.group for case in slices})
    train, test = split_groups(groups, seed=seed, train=patients)
    others = rest(slices, train, test)
    return SegmentationData("ACDC", _of(slices, train), _of(volumes, test), ACDC_CLASSES, TRANSUNET_SIZE, others)


def _matches(folder: Path, pattern: str) -> list[tuple[re.Match[str], Path]]:
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} is missing.")
    found = [(match, path) for path in sorted(folder.iterdir()) if (match := re.fullmatch(pattern, path.name))]
    if not found:
        raise ValueError(f"No file in {folder} is named like {pattern}.")
    return found


def _stacks(folder: Path, pattern: str) -> list[Case]:
    """Gather single-slice files into cases; groups of ``pattern``: the case, (the patient,) the slice number."""
    paths: dict[tuple[str, str], list[tuple[int, Path]]] = defaultdict(list)
    for match, path in _matches(folder, pattern):
        name, *patient, number = match.groups()
        paths[name, patient[0] if patient else name].append((int(number), path))
    return [
        Case(name, group, _from_slices([path for _, path in sorted(files)])) for (name, group), files in paths.items()
    ]


def _volumes(folder: Path, pattern: str) -> list[Case]:
    """One case per volume file; groups of ``pattern``: the case(, the patient)."""
    return [Case(match[1], match.groups()[-1], _from_volume(path)) for match, path in _matches(folder, pattern)]


# --- reading ---------------------------------------------------------------------------------------------------------


def in_memory(image: np.ndarray, label: np.ndarray, name: str) -> Callable[[], Volume]:
    """A case's `read` of arrays, which are checked now, when nothing has been trained yet."""
    check_image(image, name)
    label = as_label(label, name)
    return lambda: (_as_float(image), label.copy())


def _some(read: Callable[[], Volume], slices: Sequence[int]) -> Callable[[], Volume]:
    def read_some() -> Volume:
        image, label = read()
        return image[slices], label[slices]

    return read_some


def _without_label(read: Callable[[], Volume]) -> Callable[[], Volume]:
    def read_image() -> Volume:
        image, label = read()
        return image, np.zeros_like(label)

    return read_image


def _from_slices(paths: Sequence[Path]) -> Callable[[], Volume]:
    def read() -> Volume:
        images, labels = zip(*(_read_pair(path) for path in paths))
        return np.stack(images), np.stack(labels)

    return read


def _from_volume(path: Path) -> Callable[[], Volume]:
    return lambda: _read_pair(path)


def _read_pair(path: Path) -> Volume:
    with np.load(path) if path.suffix == ".npz" else h5py.File(path, "r") as file:
        if "image" not in file or "label" not in file:
            raise ValueError(f"{path} lacks 'image' or 'label'; it has {sorted(file.keys())}.")
        image, label = np.asarray(file["image"]), np.asarray(file["label"])
    check_image(image, path)
    return _as_float(image), as_label(label, path)


def as_label(array: np.ndarray, name: str | Path) -> np.ndarray:
    """Labels as uint8; what they cannot hold is refused, for it would be cut or wrapped."""
    with np.errstate(invalid="ignore"):  # NaN is found by the comparison
        label = array.astype(np.uint8)
    if not np.array_equal(label, array) or label.max() == 255:
        raise ValueError(
            f"{name} has values from {array.min():g} to {array.max():g}; labels are 0, 1, 2, ... up to 254."
        )
    return label


def check_image(image: np.ndarray, name: str | Path) -> None:
    """8-bit images become 0..1; others have to be scaled already, for the teacher reconstructs their values."""
    if image.dtype == np.uint8:
        return
    check_finite(image, name)
    if not -100 <= image.min() <= image.max() <= 100:
        raise ValueError(
            f"{name}: the image values run from {image.min():g} to {image.max():g}, which looks like raw "
            "intensities; clip them to a window and scale them to 0..1 first."
        )


def check_finite(image: np.ndarray, name: str | Path) -> None:
    """A single NaN becomes the loss of every image that shares its batch."""
    if not np.isfinite(image).all():
        raise ValueError(f"{name}: the image has NaN or infinite values; replace them, for example by background.")


def _as_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)


# --- splitting -------------------------------------------------------------------------------------------------------


def split_groups(groups: Sequence[str], *, seed: int, train: int | None = None) -> tuple[list[str], list[str]]:
    """A fifth of the patients for testing, and ``train`` (default: all) of the others for training.

    Both are drawn evenly along the numbering, because data sets often number their patients one pathology after the
    other (ACDC does). The test patients depend on the seed alone, not on ``train``.
    """
    if len(groups) < 2:
        raise ValueError(f"A split by patient needs at least 2 patients, but there is {len(groups)}.")
    test = _spread(groups, max(1, round(len(groups) / 5)), np.random.default_rng([seed, 0]))
    rest = [group for group in groups if group not in set(test)]
    return _spread(rest, _checked(train, len(rest)), np.random.default_rng([seed, 1])), test


def _spread(groups: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """One random member of each of ``count`` consecutive runs of ``groups``."""
    return [str(rng.choice(run)) for run in np.array_split(np.asarray(groups), count)]


def _checked(wanted: int | None, available: int) -> int:
    if wanted is None:
        return available
    if not 1 <= wanted <= available:
        raise ValueError(
            f"{wanted} patients were asked for, and {available} are there to train on; choose 1 to {available}."
        )
    return wanted


def _of(cases: Iterable[Case], groups: Iterable[str]) -> tuple[Case, ...]:
    wanted = set(groups)
    return tuple(case for case in cases if case.group in wanted)


def rest(cases: Iterable[Case], *parts: Iterable[str]) -> tuple[Case, ...]:
    """The cases of all patients that are in none of the parts: images whose labels are not used."""
    known = set().union(*parts)
    return tuple(case for case in cases if case.group not in known)


# --- batches ---------------------------------------------------------------------------------------------------------


def resize_image(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize (B, C, H, W); smoothed where it shrinks."""
    if image.shape[-2:] == shape:
        return image
    return F.interpolate(image, shape, mode="bilinear", antialias=True)


def resize_label(label: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize a label map (B, H, W) to the nearest label."""
    if label.shape[-2:] == shape:
        return label
    return F.interpolate(label[:, None].float(), shape, mode="nearest-exact")[:, 0].to(label.dtype)


class TrainingBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batch number ``step``: an image (B, 1, size, size) and its label (B, size, size), shuffled and augmented.

    A batch depends on the seed and the step alone: two runs see the same batches whatever else they compute, and a
    run that was interrupted goes on with the batch it would have seen. Of several processes each draws its share of
    the same batches.
    """

    def __init__(self, data: SegmentationData, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise ValueError(f"A batch of {batch_size} cannot be shared evenly by {world_size} processes.")
        images, labels = [], []
        for case in data.train:
            image, label = (torch.from_numpy(array) for array in case.read())
            if int(label.max()) >= len(data.class_names):
                raise ValueError(
                    f"{case.name} has the label {int(label.max())}, but the classes of {data.name} are "
                    f"0 to {len(data.class_names) - 1}; relabel the others."
                )
            images.append(resize_image(image[:, None], (data.size, data.size)))
            labels.append(resize_label(label, (data.size, data.size)))
        self.images, self.labels = torch.cat(images), torch.cat(labels)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size)
        image, label = (torch.stack(parts) for parts in zip(*map(self._sample, places)))
        return image, label.long()

    def _sample(self, place: int) -> tuple[Tensor, Tensor]:
        index = self._slice_at(place)
        return augment(self.images[index], self.labels[index], np.random.default_rng([self.seed, 1, place]))

    def _slice_at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.images))
        return int(np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.images))[position])

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every slice once; the last one may begin the next pass."""
        return math.ceil(len(self.images) / self.batch_size)

    def loader(self, steps: int | None = None, *, start: int = 0, workers: int = 0) -> DataLoader:
        """The batches ``start`` to ``steps - 1``; without ``steps`` one pass over all slices."""
        stop = self.steps_per_epoch if steps is None else steps
        return DataLoader(self, batch_size=None, sampler=StepSampler(start, stop), num_workers=workers)


def beside(labelled: Iterable[Any], unlabelled: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(image, label) of one loader with the image of another's batch."""
    for (image, label), (other, _) in zip(labelled, unlabelled):
        yield image, label, other


class StepSampler(Sampler[int]):
    """The steps ``start`` to ``stop - 1``; in epoch n, the steps that follow n such runs."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.epoch = start, stop, 0

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        first = self.start + self.epoch * len(self)
        return iter(range(first, first + len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Called by ``fit_recon`` before each pass, so that no two passes are the same."""
        self.epoch = epoch


def augment(image: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """As published: half of the samples turned by a multiple of 90 degrees and flipped, half of the rest by up to 20.

    ``image`` is (1, S, S), ``label`` (S, S).
    """
    if rng.random() < 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2)) - 2
        image, label = (part.rot90(turns, dims=(-2, -1)).flip(axis) for part in (image, label))
    elif rng.random() < 0.5:
        angle = torch.tensor(np.deg2rad(rng.uniform(-20, 20)), dtype=torch.float32)
        zero = torch.zeros(())
        turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]).view(1, 2, 3)
        grid = F.affine_grid(turn, [1, 1, *label.shape], align_corners=False)
        image = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)[0]
        turned = F.grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0]
        label = turned.to(label.dtype)
    return image, label
