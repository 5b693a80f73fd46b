"""Preprocess a data set's images without labels with nnU-Net's own plans."""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from ...errors import ReSegError
from .patients import UP_TO_A_NUMBER, patients, split_between, write_splits
from .unlabelled import folder_of, named, numbered, preprocessing, record_of, refuse_labelled, without_labels


def prepare(
    dataset: str,
    plans_name: str = "nnUNetPlans",
    configurations: Sequence[str] | None = None,
    processes: int | None = None,
    patient_splits: str | bool = False,
) -> None:
    """Preprocess imagesUn for the configurations that nnU-Net has preprocessed, and check which patients they are of.

    Cases of imagesTr whose label is only "ignore" are unlabelled images, too. nnU-Net has preprocessed them already.

    Args:
        dataset: id or name.
        plans_name: the plans, as in nnU-Net's -p.
        configurations: some of the plans' configurations; None takes all that nnU-Net has preprocessed.
        processes: number of processes; None takes nnU-Net's number.
        patient_splits: True writes a splits_final.json that keeps each patient's cases together. A string does so, too,
            and is a regular expression for the start of an id that names the patient. The default is everything up to
            and including the first number.

    Raises:
        ReSegError: there are no such images or plans, or nnU-Net preprocessed imagesTr with other plans; an image
            cannot be read, lacks files or channels, has NaN or only one value; an id is also in imagesTr; or an
            argument is invalid.
    """
    if processes is not None and processes < 1:
        raise ReSegError(f"the number of processes must be at least 1, got {processes}")
    if patient_splits == "":
        raise ReSegError("the pattern for patients is empty; leave it out to use an id's start up to its first number")
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        raise ReSegError(f"nnU-Net finds no data set {dataset!r}, which must be an id or a name: {error}") from error
    raw, done = Path(nnUNet_raw) / name, Path(nnUNet_preprocessed) / name
    if not (done / f"{plans_name}.json").exists():
        raise ReSegError(
            f"{done / plans_name}.json does not exist; run nnUNetv2_plan_and_preprocess first, or name your plans with "
            "-p"
        )
    plans = PlansManager(str(done / f"{plans_name}.json"))
    about = json.loads((done / "dataset.json").read_text())
    chosen = _configurations(plans, configurations, done)
    first = str(done / chosen[0].data_identifier)
    dataset_of_first = infer_dataset_class(first)(first)
    ignored = without_labels(dataset_of_first, plans.get_label_manager(about))
    labelled = sorted({*dataset_of_first.identifiers} - ignored)
    sources = labelled_files(raw, about)
    cases = find_cases(raw / "imagesUn", about["file_ending"], files_per_case(sources, about))
    if not cases and not ignored:
        raise ReSegError(
            f"{raw / 'imagesUn'} has no images; name them as in imagesTr: NAME_0000{about['file_ending']} and so on"
        )
    if others := other_files(raw / "imagesUn", about["file_ending"]):
        print(f"WARNING: not used, because they do not end in {about['file_ending']}: {named(others)}")
    refuse_labelled(cases, dataset_of_first.identifiers)
    splits_file = done / "splits_final.json"
    pattern = patient_splits if isinstance(patient_splits, str) else UP_TO_A_NUMBER
    if patient_splits:
        groups = patients(labelled, pattern)
        write_splits(groups, splits_file)
        print(f"{splits_file}: folds of {len(groups)} patients with {len(labelled)} cases")
    for line in warnings_of(labelled, {*cases, *ignored}, splits_file, pattern):
        print(f"WARNING: {line}")
    if not cases:
        for configuration in chosen:
            remove(folder_of(done, configuration))
        print(f"{raw / 'imagesUn'} has no images; {len(ignored)} cases of imagesTr are unlabelled, and preprocessed")
        return
    for configuration in chosen:
        refuse_other_plans(sources, done, plans, configuration, about)
    processes = processes or default_num_processes
    for configuration in chosen:
        preprocess(cases, folder_of(done, configuration), plans, configuration, about, processes)


def refuse_other_plans(sources: dict[str, Any], done: Path, plans: Any, configuration: Any, about: Any) -> None:
    """Raise a ReSegError unless the plans make of a case of imagesTr what nnU-Net has made of it.

    nnU-Net does not notice if plans change after it has preprocessed. Then images with and without labels would differ.
    """
    folder = str(done / configuration.data_identifier)
    dataset = infer_dataset_class(folder)(folder)
    case = min({*dataset.identifiers} & sources.keys(), default=None)
    if case is None:
        print(
            f"WARNING: imagesTr has none of the cases in {folder}, so it was not checked that these are of these plans"
        )
        return
    files = sources[case]["images"], sources[case]["label"]
    image, _, _ = configuration.preprocessor_class(verbose=False).run_case(*files, plans, configuration, about)
    there = dataset.load_case(case)[0][:]
    if there.shape != image.shape or not np.allclose(there, image, rtol=1e-3, atol=1e-3):
        raise ReSegError(
            f"{folder} is not what {plans.plans_name} makes of imagesTr: {case} differs. Run nnUNetv2_preprocess with "
            "these plans first"
        )


def _configurations(plans: Any, names: Sequence[str] | None, done: Path) -> list[Any]:
    """The configurations asked for, or those that nnU-Net has preprocessed; one of several with the same images."""
    known = plans.available_configurations
    for name in names or ():
        if name not in known:
            raise ReSegError(f"the plans have no configuration {name}; they have {', '.join(known)}")
    chosen = {c.data_identifier: c for c in (plans.get_configuration(name) for name in reversed(names or known))}
    found = [c for identifier, c in chosen.items() if (done / identifier).is_dir()]
    if not found or (names and len(found) < len(chosen)):
        raise ReSegError(f"{done} lacks preprocessed cases of imagesTr; run nnUNetv2_plan_and_preprocess first")
    return found


def labelled_files(raw: Path, about: Any) -> dict[str, Any]:
    """The files of each labelled case, in imagesTr or where dataset.json says; empty if there is neither."""
    if "dataset" not in about and not (raw / "imagesTr").is_dir():
        return {}
    return get_filenames_of_train_images_and_targets(str(raw), copy.deepcopy(about))  # it changes what it gets


def files_per_case(sources: dict[str, Any], about: Any) -> int:
    """How many files a labelled case has: one per channel, but one in all for RGB images."""
    return len(next(iter(sources.values()))["images"]) if sources else channels_of(about)


def channels_of(about: Any) -> int:
    """The number of channels of an image, according to dataset.json."""
    return len(about.get("channel_names", about.get("modality")))


def find_cases(folder: Path, ending: str, files: int) -> dict[str, list[str]]:
    """The files of each image, in the order of channels.

    Raises:
        ReSegError: an image lacks files, or a file's name lacks the number of a channel.
    """
    cases, unnumbered = numbered(folder, ending)
    if unnumbered:
        raise ReSegError(f"{named(unnumbered)} in {folder}: name images as in imagesTr, NAME_0000{ending} and so on")
    if clash := [case for case in cases if case.endswith("_seg")]:
        raise ReSegError(
            f"{named(clash)} in {folder}: an id cannot end in _seg, as nnU-Net's files of segmentations do"
        )
    wrong = [case for case, own in cases.items() if sorted(own) != list(range(files))]
    if wrong:
        last = "" if files == 1 else f" to _{files - 1:04d}"
        raise ReSegError(f"{named(wrong)} in {folder}: each needs the files _0000{last}, like the cases of imagesTr")
    return {case: [own[channel] for channel in range(files)] for case, own in cases.items()}


def other_files(folder: Path, ending: str) -> list[str]:
    """Names of what else is in a folder of images, except hidden files and the .json with a TIFF's spacing."""
    files = folder.iterdir() if folder.is_dir() else ()
    return [file.name for file in files if not file.name.endswith((ending, ".json")) and file.name[0] != "."]


def warnings_of(labelled: Iterable[str], unlabelled: Iterable[str], splits: Path, pattern: str) -> list[str]:
    """Warnings about whatever would let a fold's training see its validation patients, judged by the ids."""
    own, others, found = patients(labelled, pattern), patients(unlabelled, pattern), []
    if len(everyone := {*own, *others}) == 1:
        return [
            f"all ids start with {everyone.pop()!r}, which tells no patients, so it was not checked whether folds mix "
            "them; --patient-splits PATTERN says what does"
        ]
    several = {who: cases for who, cases in own.items() if len(cases) > 1}
    if not splits.exists() and several:
        found.append(
            f"several cases seem to be of one patient: {named(several)}. nnU-Net splits folds by case, so a fold's "
            "validation has patients of its training; --patient-splits splits folds by patient"
        )
    elif splits.exists() and (leaked := split_between(several, splits)):
        found.append(
            f"{splits} has cases of one patient on both sides of a fold, judging by their names: {named(leaked)}. Move "
            "it away and pass --patient-splits to split folds by patient"
        )
    if both := own.keys() & others.keys():
        found.append(
            f"patients with labels seem to have images without, too: {named(both)}. All folds train on these, "
            "including the fold that validates on the patient"
        )
    return found


def preprocess(
    cases: dict[str, list[str]], folder: Path, plans: Any, configuration: Any, about: Any, processes: int
) -> None:
    """All images of one configuration, into an empty folder; the record, written last, marks it as complete."""
    remove(folder)
    folder.mkdir(parents=True)
    work = [(str(folder / case), files, plans, configuration, about) for case, files in cases.items()]
    with tqdm(total=len(work), desc=f"{configuration.data_identifier}, unlabelled") as bar:
        if processes == 1:
            for arguments in work:
                preprocess_case(*arguments)
                bar.update()
        else:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(processes, len(work)), mp_context=spawn) as pool:
                for _ in pool.map(preprocess_case, *zip(*work)):  # one that fails cancels the others
                    bar.update()
    made = {"preprocessing": preprocessing(plans, configuration), "cases": sorted(cases)}
    record_of(folder).write_text(json.dumps(made, indent=4))


def remove(folder: Path) -> None:
    """Remove the images that were preprocessed before."""
    record_of(folder).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def preprocess_case(output: str, files: list[str], plans: Any, configuration: Any, about: Any) -> None:
    """One image with nnU-Net's preprocessor, with an empty list of places for each class, as its loader needs them.

    Raises:
        ReSegError: nnU-Net cannot read or preprocess the image; or it does not have the data set's number of channels,
            has NaN, or only one value.
    """
    try:
        configuration.preprocessor_class(verbose=False).run_case_save(output, files, None, plans, configuration, about)
    except Exception as error:
        raise ReSegError(
            f"{files[0]}: nnU-Net cannot preprocess it like the images of imagesTr, whose channels it must have, "
            f"all of one size ({type(error).__name__}: {error})"
        ) from error
    folder, case = os.path.split(output)
    image = infer_dataset_class(folder)(folder, [case]).load_case(case)[0][:]
    if len(image) != channels_of(about):
        raise ReSegError(f"{files[0]}: {len(image)} channels, but dataset.json has {channels_of(about)}")
    if not np.isfinite(image).all():
        raise ReSegError(f"{files[0]}: preprocessed, it has values that are not finite (NaN or infinite)")
    if (image == image[:, :1, :1, :1]).all():
        raise ReSegError(f"{files[0]}: preprocessed, all its voxels have the same value")
    labels = plans.get_label_manager(about)
    keys = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    keys = [tuple(map(int, key)) if isinstance(key, (tuple, list)) else int(key) for key in keys]
    if labels.has_ignore_label:
        keys.append((-1, *map(int, labels.all_labels)))
    properties = load_pickle(f"{output}.pkl")
    write_pickle({**properties, "class_locations": {key: [] for key in keys}}, f"{output}.pkl")
