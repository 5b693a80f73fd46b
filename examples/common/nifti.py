"""Folders of NIfTI files: images and labels of the same names, images without, and predictions with their headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms.intensity.array import ScaleIntensityRangePercentiles

from .data import Case, SegmentationData, Volume, as_label, check_finite

SCALE = ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)


def load_folders(images: Path, labels: Path, unlabelled: Path, *, channels: bool = False) -> SegmentationData:
    """Every volume with its first axis from feet to head, scaled to 0..1 by its own percentiles; no test cases.

    Args:
        images: a folder of .nii or .nii.gz.
        labels: a folder with a file of the same name for each, whole numbers from 0 to 254.
        unlabelled: a folder of images without labels.
        channels: whether images are (1, D, H, W), as 3D networks take them, or (D, H, W).
    """
    pairs = [(file, labels / file.name) for file in _files(images)]
    missing = [label.name for _, label in pairs if not label.exists()]
    if missing:
        raise ValueError(f"{labels} has no {', '.join(missing[:5])}; a label has the name of its image.")
    classes = 1 + max(int(_label(label).max()) for _, label in pairs)
    train = [_case(image, label, channels) for image, label in pairs]
    others = [_case(image, None, channels) for image in _files(unlabelled)]
    names = ("background", *(f"class {index}" for index in range(1, classes)))
    size = 32 * -(-max(max(_array(image).shape[1:]) for image, _ in pairs) // 32)  # five halvings have to come out even
    return SegmentationData(images.name, tuple(train), (), names, size, tuple(others))


def save_prediction(case: Case, prediction: np.ndarray, folder: Path) -> Path:
    """Write a label map (D, H, W) on the grid and with the header of the image that it is of."""
    image = _load(Path(case.name))
    turned = nib.io_orientation(image.affine)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turned)
    label = nib.apply_orientation(prediction.astype(np.uint8).transpose(2, 1, 0), back)
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0  # of the image's intensities
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(case.name).name
    nib.save(type(image)(label, image.affine, header), path)
    return path


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*") if file.name.endswith((".nii", ".nii.gz")))
    if not files:
        raise ValueError(f"There is no .nii or .nii.gz in {folder}.")
    return files


def _load(path: Path) -> nib.Nifti1Image:
    image = nib.load(path)
    if not isinstance(image, nib.Nifti1Image):
        raise ValueError(f"{path} is a {type(image).__name__}, not a NIfTI image.")
    return image


def _array(path: Path) -> np.ndarray:
    """The volume as (D, H, W): from feet to head, back to front, left to right."""
    array = np.asarray(nib.as_closest_canonical(_load(path)).dataobj)
    if array.ndim != 3:
        raise ValueError(f"{path} has {array.ndim} axes; a volume has 3.")
    return array.transpose(2, 1, 0)


def _corners(path: Path) -> np.ndarray:
    """Where the header says that the first and the last voxel are, in mm, of the volume as `_array` turns it."""
    volume = nib.as_closest_canonical(_load(path))
    ends = np.array([[0, 0, 0, 1], [*(np.array(volume.shape[:3]) - 1), 1]])
    return ends @ np.asarray(volume.affine).T


def _label(path: Path) -> np.ndarray:
    return as_label(_array(path), path)


def _case(image: Path, label: Path | None, channels: bool) -> Case:
    voxel = nib.as_closest_canonical(_load(image)).header.get_zooms()[:3]
    spacing = (float(voxel[2]), float(voxel[1]), float(voxel[0]))
    return Case(str(image), str(image), _reader(image, label, channels), spacing)


def _reader(image: Path, label: Path | None, channels: bool) -> Callable[[], Volume]:
    def read() -> Volume:
        raw = _array(image).astype(np.float32)[None]
        check_finite(raw, image)
        volume = np.asarray(SCALE(raw), dtype=np.float32)
        classes = np.zeros(volume.shape[1:], np.uint8) if label is None else _label(label)
        if classes.shape != volume.shape[1:]:
            raise ValueError(f"{image} has shape {volume.shape[1:]}, its label {classes.shape}.")
        if label is not None and np.abs(_corners(image) - _corners(label)).max() > 1:
            raise ValueError(
                f"{image} and {label} lie more than 1 mm apart according to their headers, so one may be turned or "
                "flipped. If only the header is wrong, copy the image's to the label."
            )
        return volume if channels else volume[0], classes

    return read
