"""Images without labels for nnU-Net's loader: those from `prepare`, and cases whose label is only "ignore"."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from ...errors import ReSegError

OTHER = {  # what a configuration says beside how images are preprocessed
    "architecture", "batch_dice", "batch_size", "data_identifier", "inherits_from", "median_image_size_in_voxels",
    "next_stage", "patch_size", "previous_stage",
}  # fmt: skip


def command(dataset: str, plans: Any) -> str:
    """What a user runs to prepare a data set's images, for a message."""
    other = "" if plans.plans_name == "nnUNetPlans" else f" -p {plans.plans_name}"
    return f"`python -m reseg_loss.integrations.nnunet prepare {dataset}{other}`"


def folder_of(dataset: Path, configuration: Any) -> Path:
    """The folder of a configuration's preprocessed images. It is not nnU-Net's own, because nnU-Net deletes those."""
    return dataset / "unlabelled" / configuration.data_identifier


def record_of(folder: Path) -> Path:
    """The file that records how and from which images a folder was made; it is written last."""
    return folder.with_name(f"{folder.name}.json")


def preprocessing(plans: Any, configuration: Any) -> dict[str, Any]:
    """The part of the plans that determines how images are preprocessed, as JSON returns it."""
    settings = {
        "configuration": {name: value for name, value in configuration.configuration.items() if name not in OTHER},
        "transpose": plans.transpose_forward,
        "intensities": plans.foreground_intensity_properties_per_channel,
        "reader": plans.plans["image_reader_writer"],
    }
    return json.loads(json.dumps(settings))


def prepared(dataset: Path, plans: Any, configuration: Any) -> dict[str, Any]:
    """The data set of each image that `prepare` has preprocessed, by id; empty if it was not run.

    Raises:
        ReSegError: it was run for other configurations only, with other plans, or to no end; or files are missing.
    """
    folder = folder_of(dataset, configuration)
    record = record_of(folder)
    again = f"run {command(dataset.name, plans)} again"
    if not record.exists():
        if folder.exists():
            raise ReSegError(f"the preprocessing of the unlabelled images in {folder} did not end: {again}")
        if any(folder.parent.glob("*.json")):
            raise ReSegError(
                f"the unlabelled images are not preprocessed for this configuration: run "
                f"{command(dataset.name, plans)}, or move {folder.parent} away to train without them"
            )
        return {}
    about = json.loads(record.read_text())
    if about["preprocessing"] != preprocessing(plans, configuration):
        raise ReSegError(f"the unlabelled images in {folder} were preprocessed with other plans: {again}")
    names = {file.name for file in folder.glob("*")}
    ends = (".b2nd", "_seg.b2nd", ".pkl") if any(name.endswith(".b2nd") for name in names) else (".npz", ".pkl")
    if {name for name in names if name.endswith(ends)} != {f"{case}{end}" for case in about["cases"] for end in ends}:
        raise ReSegError(f"{folder} does not have the {len(about['cases'])} images that {record.name} names: {again}")
    return dict.fromkeys(about["cases"], infer_dataset_class(str(folder))(str(folder)))


def numbered(folder: Path, ending: str) -> tuple[dict[str, dict[int, str]], list[str]]:
    """{case: {number of a channel: file}}, and the names of files without a number."""
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
    cases: dict[str, dict[int, str]] = defaultdict(dict)
    others: list[str] = []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := pattern.fullmatch(file.name):
            cases[match[1]][int(match[2])] = str(file)
        elif file.name.endswith(ending):
            others.append(file.name)
    return cases, others


def refuse_unprepared(sources: Iterable[str], dataset: str, ending: str, plans: Any) -> None:
    """Raise a ReSegError unless the unlabelled images that nnUNet_raw has of a data set, if any, are those prepared."""
    if not nnUNet_raw.is_set():
        return
    folder = Path(nnUNet_raw) / dataset / "imagesUn"
    there, known = set(numbered(folder, ending)[0]), set(sources)
    if folder.is_dir() and known and there != known:
        raise ReSegError(
            f"{folder} has other images than were prepared: {named(there ^ known)}. Run {command(dataset, plans)} again"
        )
    if not known and folder.is_dir() and any(file.name[0] != "." for file in folder.iterdir()):
        raise ReSegError(
            f"the images in {folder} are not preprocessed for this configuration: run {command(dataset, plans)}, "
            "or move them away to train without them"
        )


def refuse_labelled(unlabelled: Iterable[str], labelled: Iterable[str]) -> None:
    """Raise a ReSegError if an image without a label is a case of imagesTr as well; it may have got a label since."""
    if both := set(unlabelled) & set(labelled):
        raise ReSegError(
            f"{named(both)}: in imagesUn and in imagesTr, so labelled images would count as unlabelled ones; remove "
            "them from imagesUn, and prepare the other images again if you have done that before"
        )


def without_labels(dataset: Any, labels: Any) -> set[str]:
    """The ids of a data set's cases whose label is "ignore" everywhere, according to their preprocessing."""
    if not labels.has_ignore_label:
        return set()
    annotated = (-1, *labels.all_labels)

    def nothing(identifier: str) -> bool:
        places = dataset.load_case(identifier)[-1]["class_locations"].get(annotated)
        return places is not None and len(places) == 0

    return {identifier for identifier in dataset.identifiers if nothing(identifier)}


class Images:
    """Cases of several of nnU-Net's data sets as one data set, for its loader.

    Args:
        sources: the data set of each id.
    """

    def __init__(self, sources: Mapping[str, Any]) -> None:
        self.sources = dict(sources)
        self.identifiers = sorted(sources)

    def load_case(self, identifier: str) -> Any:
        """Image, segmentation, no segmentation of a previous stage, and properties, as from nnU-Net's data sets."""
        return self.sources[identifier].load_case(identifier)


def patches(trainer: Any, images: Images, batch_size: int) -> nnUNetDataLoader:
    """nnU-Net's loader, for patches from anywhere in the images, with the trainer's own augmentation."""
    configuration = trainer.configuration_manager
    rotation, dummy_2d, initial_patch, mirrored = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(
        configuration.patch_size, rotation, None, mirrored, dummy_2d, use_mask_for_norm=configuration.use_mask_for_norm
    )
    loader = nnUNetDataLoader(
        images,
        batch_size,
        initial_patch,
        configuration.patch_size,
        trainer.label_manager,
        oversample_foreground_percent=0.0,
        transforms=transforms,
    )
    loader.has_ignore = False  # it would look for annotated voxels
    return loader


class Joined:
    """What the processes of nnU-Net's loader make of a batch: "unlabelled" is added, and all tensors share a storage.

    The training process fetches each storage over a socket of its own, and holds Python's lock for much of that. Small
    networks have to wait for this lock more than for the GPU, and nnU-Net alone sends a storage per output.
    """

    def __init__(self, loader: nnUNetDataLoader) -> None:
        self.loader = loader

    def __call__(self, **batch: Any) -> dict[str, Any]:
        """nnU-Net's batch with patches from `loader`; tensors are moved, their values stay."""
        batch["unlabelled"] = next(self.loader)["data"]
        values = (value if isinstance(value, list) else [value] for value in batch.values())
        tensors = [t for value in values for t in value if isinstance(t, Tensor)]
        sizes = [-(-t.nbytes // 8) * 8 for t in tensors]  # each has to start at a multiple of its dtype's size
        for t, part in zip(tensors, torch.empty(sum(sizes), dtype=torch.uint8).split(sizes)):
            t.data = part[: t.nbytes].view(t.dtype).view(t.shape).copy_(t)
        return batch


@contextmanager
def without_processes() -> Iterator[None]:
    """Let nnU-Net load in this process: it starts others at once, when nothing can be added to what they do."""
    name = "nnUNet_n_proc_DA"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def joined(loaders: tuple[Any, Any], images: nnUNetDataLoader, whole: int, pinned: bool) -> tuple[Any, Any]:
    """Endless iterators over training and validation batches, where those for training have unlabelled images, too.

    Processes load both, as many per patch as in nnU-Net: further ones for the unlabelled images would take time to
    watch.

    Args:
        loaders: from nnU-Net's `get_dataloaders`, `without_processes`.
        images: the loader of the unlabelled images.
        whole: the batch size for which nnU-Net would use its number of processes.
        pinned: batches come in pinned memory.
    """
    training, validation = loaders
    if not all(isinstance(batches, SingleThreadedAugmenter) and batches.transform is None for batches in loaders):
        raise ReSegError("this trainer's get_dataloaders does not load as nnU-Net's does: unlabelled images need that")
    training.transform = Joined(images)
    processes = get_allowed_n_proc_DA()
    if processes == 0:
        return training, validation
    share = (training.data_loader.batch_size + images.batch_size) / whole
    started = []
    for batches, n, least in ((training, math.ceil(processes * share), 6), (validation, max(1, processes // 2), 3)):
        started.append(
            NonDetMultiThreadedAugmenter(
                batches.data_loader,
                batches.transform,
                n,
                num_cached=max(least, n // 2),
                pin_memory=pinned,
                wait_time=0.02,  # not nnU-Net's 0.002: after each, a thread asks all processes whether they live
            )
        )
        next(started[-1])  # the processes start with it
    return started[0], started[1]


def named(identifiers: Iterable[str], shown: int = 5) -> str:
    """The first few ids, for a message."""
    found = sorted(set(identifiers))
    return ", ".join(found[:shown]) + (f" and {len(found) - shown} more" if len(found) > shown else "")
