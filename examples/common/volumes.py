"""Labelled volumes for 3D networks: a second contrast, patches to train on, sliding windows to test with.

In the cases here ``read`` gives the image with its channels, (C, D, H, W).
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from tqdm import tqdm

from .data import Case, SegmentationData, TrainingBatches, in_memory, load_mni152, rest, split_groups
from .metrics import VolumeScores, score_volume
from .processes import gather, rank, share
from .training import refuse_diverged

Patch = tuple[int, int, int]


def load_volumes(
    source: Path | None = None, *, contrasts: int = 1, patients: int | None = None, seed: int = 0
) -> SegmentationData:
    """The slabs of the MNI152 template (1 x 2 x 2 mm), with a second contrast if wanted, or an ``.npz`` of volumes."""
    if source is not None:
        if contrasts != 1:
            raise ValueError("A second contrast is made for the template only; put yours into the .npz as a channel.")
        return load_npz_volumes(source, patients=patients, seed=seed)
    if patients is not None:
        raise ValueError("The MNI152 template is one averaged brain, so there are no patients to choose from.")
    data = load_mni152()
    train, test = (tuple(map(_CONTRASTS[contrasts], cases)) for cases in (data.train, data.test))
    return replace(data, train=train, test=test)


def load_npz_volumes(path: Path, *, patients: int | None = None, seed: int = 0) -> SegmentationData:
    """Volumes from one ``.npz``: ``images`` (N, D, H, W) or (N, C, D, H, W), ``labels`` (N, D, H, W), ``patient`` (N).

    Images are 8-bit or scaled to about unit range. Optional: ``spacing`` (3) or (N, 3) in millimetres.
    """
    if path.suffix != ".npz" or not path.exists():
        raise ValueError(f"{path} is no .npz with 'images', 'labels' and 'patient'.")
    with np.load(path) as file:
        missing = {"images", "labels", "patient"} - set(file)
        if missing:
            raise ValueError(f"{path.name} lacks {sorted(missing)}; it needs 'images', 'labels' and 'patient'.")
        images, labels, patient = file["images"], file["labels"], file["patient"]
        spacing = np.broadcast_to(file["spacing"], (len(images), 3)).tolist() if "spacing" in file else None
    if images.ndim == 4:
        images = images[:, None]
    if images.ndim != 5 or labels.shape != (len(images), *images.shape[2:]) or len(patient) != len(images):
        raise ValueError(
            f"{path.name} needs images (N, D, H, W) or (N, C, D, H, W), labels (N, D, H, W) and patient (N,), "
            f"but has {images.shape}, {labels.shape} and {patient.shape}."
        )
    cases = []
    for row, (image, label) in enumerate(zip(images, labels)):
        read = in_memory(image, label, f"{path.name}, volume {row}")
        cases.append(Case(f"volume {row}", str(patient[row]), read, spacing and tuple(spacing[row])))
    parts = split_groups([str(who) for who in np.unique(patient)], seed=seed, train=patients)
    train, test = (tuple(case for case in cases if case.group in set(part)) for part in parts)
    names = ("background", *(f"class {index}" for index in range(1, int(labels.max()) + 1)))
    return SegmentationData(path.stem, train, test, names, max(images.shape[2:]), rest(cases, *parts))


def _t1(case: Case) -> Case:
    image, label = case.read()
    return replace(case, read=in_memory(image[None], label, case.name))


def _t1_and_inverted(case: Case) -> Case:
    image, label = case.read()
    second = inverted_contrast(image, seed=zlib.crc32(case.name.encode()))
    return replace(case, read=in_memory(np.stack([image, second]), label, case.name))


_CONTRASTS = {1: _t1, 2: _t1_and_inverted}


def inverted_contrast(t1: np.ndarray, seed: int) -> np.ndarray:
    """A made-up second modality: T1 (0..1) inverted inside the brain, with noise and a bias field of its own.

    It follows from the image alone. The tissue maps, of which the labels are made, would give the answer away.
    """
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in t1.shape], indexing="ij")
    waves = [np.cos(rng.uniform(0, 2 * np.pi) + np.tensordot(rng.normal(0, 1.5, 3), grid, 1)) for _ in range(3)]
    field = np.exp(0.15 * np.sum(waves, axis=0))
    noisy = (t1.max() - t1) * field + rng.normal(0, 0.03, t1.shape)
    return np.where(t1 > 0, noisy, 0).astype(np.float32)


def fitting_patch(data: SegmentationData, largest: int, multiple: int = 8) -> Patch:
    """Along every axis what the first volume allows, in multiples of what the network halves, up to ``largest``."""
    shape = data.train[0].read()[1].shape
    depth, height, width = (max(multiple, min(n, largest) // multiple * multiple) for n in shape)
    return depth, height, width


class PatchBatches(TrainingBatches):
    """Batch number ``step``: patches (B, C, *patch) and their labels (B, *patch), cropped and flipped at random.

    Every second patch lies around a foreground voxel, as in nnU-Net; without any, patches lie anywhere. As in
    `TrainingBatches`, a batch depends on the seed and the step alone; a pass takes one patch of every volume.
    """

    def __init__(
        self,
        data: SegmentationData,
        patch: Patch,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"A batch of {batch_size} cannot be shared evenly by {world_size} processes.")
        pairs = [[torch.from_numpy(array) for array in case.read()] for case in data.train]
        # zeros, which are background, around volumes that are smaller than a patch
        self.images, self.labels = ([_padded(part, patch) for part in parts] for parts in zip(*pairs))
        self.foreground = [label.nonzero() for label in self.labels]
        self.patch, self.batch_size, self.seed = patch, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def _sample(self, place: int) -> tuple[Tensor, Tensor]:
        index = self._slice_at(place)
        rng = np.random.default_rng([self.seed, 1, place])
        image, label, voxels = self.images[index], self.labels[index], self.foreground[index]
        room = np.subtract(label.shape, self.patch)
        start = rng.integers(0, room + 1)
        if len(voxels) and rng.random() < 0.5:
            center = voxels[int(rng.integers(len(voxels)))].numpy()
            start = np.clip(center - np.array(self.patch) // 2, 0, room)
        window = tuple(slice(a, a + n) for a, n in zip(start, self.patch))
        axes = [axis - 3 for axis in range(3) if rng.random() < 0.5]
        return image[(slice(None), *window)].flip(axes), label[window].flip(axes)


def _padded(array: Tensor, patch: Patch) -> Tensor:
    missing = [max(0, n - have) for n, have in zip(patch, array.shape[-3:])]
    return F.pad(array, [side for n in reversed(missing) for side in (n // 2, n - n // 2)])


@torch.no_grad()
def predict_volume(model: nn.Module, image: np.ndarray, patch: Patch) -> np.ndarray:
    """Label a volume (C, D, H, W) in windows of the patch's size that overlap by half, weighted by a Gaussian."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    volume = torch.from_numpy(image)[None].to(device)
    logits = sliding_window_inference(volume, patch, 4, model, overlap=0.5, mode="gaussian")
    model.train(was_training)
    assert isinstance(logits, Tensor)  # it may be several where the model gives several
    refuse_diverged("the network's output", logits)
    return logits.argmax(1)[0].byte().cpu().numpy()


def evaluate_volumes(
    model: nn.Module, data: SegmentationData, patch: Patch, title: str = "testing"
) -> list[VolumeScores]:
    """Score every test volume in 3D; several processes share the work."""

    def score(case: Case) -> VolumeScores:
        image, truth = case.read()
        return score_volume(case.name, predict_volume(model, image, patch), truth, len(data.class_names), case.spacing)

    part = [score(case) for case in tqdm(share(data.test), desc=title, disable=rank() > 0)]
    return gather(part, len(data.test))
