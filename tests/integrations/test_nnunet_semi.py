"""nnU-Net with unlabelled images: prepared, trained, killed, resumed and predicted with the stock trainer."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnunet_tiny as tiny
import numpy as np
import pytest
import torch
from frameworks_page import section
from launch import environment, run
from nnunet_tiny import equal, predict
from torch import Tensor, nn

from reseg_loss import ReSegError
from reseg_loss.integrations.nnunet import __main__ as command_line
from reseg_loss.mean_teacher import MeanTeacher
from reseg_loss.mixing import boxes, mix, perturb_intensities

pytestmark = tiny.MARKS

SEMI = "nnUNetTrainerSemi"
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [1, 2], "inner": [2]},
    "regions_class_order": [3, 1, 2],
}


def make(configuration: str = "2d", **options: Any) -> Any:
    """A trainer that is sure of a part of the voxels, though it has hardly learnt anything."""
    made = tiny.make(SEMI, configuration, **options)
    made.threshold = 0.65 if made.label_manager.has_regions else 0.4
    return made


@pytest.fixture
def copied(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a copy in the place of nnUNet_raw or nnUNet_preprocessed, and returns the data set's folder in it."""

    def copy_of(part: str) -> Path:
        shutil.copytree(folders / part, tmp_path / part)
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
        return tmp_path / part / tiny.DATASET

    return copy_of


def file_of(made: Any, name: str) -> dict[str, Any]:
    return torch.load(Path(made.output_folder) / f"checkpoint_{name}.pth", map_location="cpu", weights_only=False)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def log_of(made: Any) -> str:
    return "".join(file.read_text() for file in Path(made.output_folder).glob("training_log*"))


# --- the commands


TRAINERS = """
import random
import numpy, torch
from reseg_loss.integrations.nnunet.semi import nnUNetTrainerSemi

def seed(number):
    for function in (random.seed, numpy.random.seed, torch.manual_seed):
        function(number)

class nnUNetTrainerSemiTiny(nnUNetTrainerSemi):
    threshold = 0.4
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # as nnU-Net reads them
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 4, 3, 1
        self.save_every = 1
        seed(0)
    def on_epoch_start(self):
        super().on_epoch_start()
        seed(self.current_epoch)
"""
SLOW = """
class nnUNetTrainerSemiTiny(nnUNetTrainerSemiTiny):
    def train_step(self, batch):
        if self.current_epoch == 2:
            open(self.output_folder + "/waits", "w").close()
            __import__("time").sleep(1000)
        return super().train_step(batch)
"""
WITHOUT_US = "import sys; sys.modules['reseg_loss'] = None; from nnunetv2.inference.predict_from_raw_data import "


def test_the_commands_plan_prepare_train_survive_a_kill_and_predict_without_the_library(folders, monkeypatch, tmp_path):
    """As the page has them; the trainer has few steps, and endless ones for the run that is killed."""
    for command in ("plan_and_preprocess -d", "train 27 2d 0 -tr nnUNetTrainerSemi", "predict -d", "nnunet prepare 27"):
        assert command in section("nnU-Net with unlabelled images")
    programs = Path(sys.executable).parent
    shutil.copytree(folders / "raw", tmp_path / "raw")
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    (tmp_path / "preprocessed").mkdir()
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    planning = ["-d", tiny.ID, "-c", "2d", "-npfp", "1", "-np", "1"]
    run(programs / "nnUNetv2_plan_and_preprocess", *planning)
    tiny.shrink_plans(tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    ours = (sys.executable, "-m", "reseg_loss.integrations.nnunet")
    # elsewhere, for -m would find the checkout's package where it is run
    assert "WARNING" not in run(*ours, "prepare", tiny.ID, "-np", "2", cwd=tmp_path).stdout
    fast, slow = tmp_path / "fast", tmp_path / "slow"
    for folder, code in ((fast, TRAINERS), (slow, TRAINERS + SLOW)):
        folder.mkdir()
        (folder / "mine.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", str(fast))
    line = run(*ours, cwd=tmp_path).stdout.strip()
    paths = line.removeprefix("export nnUNet_extTrainer=")
    assert paths.split(os.pathsep) == [str(fast), str(command_line.folder())]

    train = (programs / "nnUNetv2_train", tiny.ID, "2d", "0", "-tr", "nnUNetTrainerSemiTiny", "-device", "cpu")
    folder = Path(tiny.DATASET) / "nnUNetTrainerSemiTiny__nnUNetPlans__2d" / "fold_0"
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    variables = environment(nnUNet_results=str(tmp_path / "killed"), nnUNet_extTrainer=str(slow))
    with open(tmp_path / "killed.log", "wb") as out:
        killed = subprocess.Popen(train, env=variables, stdout=out, stderr=out)
    try:
        run(*train, nnUNet_results=str(tmp_path / "whole"), nnUNet_extTrainer=paths)
        while not (tmp_path / "killed" / folder / "waits").exists() and killed.poll() is None:
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
    finally:
        killed.kill()
    run(*train, "--c", nnUNet_results=str(tmp_path / "killed"), nnUNet_extTrainer=paths)
    whole, resumed = (
        torch.load(tmp_path / name / folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
        for name in ("whole", "killed")
    )
    assert whole["trainer_name"] == "nnUNetTrainer"
    for part in ("network_weights", "reseg_student"):
        assert same(resumed[part], whole[part])
    assert not same(whole["network_weights"], whole["reseg_student"])
    assert (tmp_path / "whole" / folder / "validation" / "summary.json").exists()

    arguments = ["-d", tiny.ID, "-c", "2d", "-tr", "nnUNetTrainerSemiTiny", "-f", "0", "-device", "cpu"]
    arguments += ["-i", tmp_path / "raw" / tiny.DATASET / "imagesTs", "-o", tmp_path / "predicted"]
    program = (sys.executable, "-c", f"{WITHOUT_US}predict_entry_point; predict_entry_point()")
    run(*program, *arguments, "-npp", "1", "-nps", "1", nnUNet_results=str(tmp_path / "whole"), nnUNet_extTrainer="")
    assert len(list((tmp_path / "predicted").glob("case_*.nii.gz"))) == 1


# --- prepare


def test_images_are_preprocessed_as_nnunet_does_it(copied, capsys):
    import blosc2

    raw, done = copied("raw"), copied("preprocessed")
    shutil.copy(raw / "imagesTr" / "case_003_0000.nii.gz", raw / "imagesUn" / "again_0000.nii.gz")
    command_line.main(["prepare", tiny.DATASET, "-c", "3d_fullres", "-np", "1"])
    folder = done / "unlabelled" / "nnUNetPlans_3d_fullres"
    assert sorted(f.name for f in folder.glob("*.pkl")) == ["again.pkl", *(f"more_00{i}.pkl" for i in range(4))]
    image, original = (blosc2.open(str(f))[:] for f in (folder / "again.b2nd", done / folder.name / "case_003.b2nd"))
    assert np.array_equal(image, original)
    properties = pickle.loads((folder / "again.pkl").read_bytes())
    assert properties["class_locations"] == {1: [], 2: [], 3: []}
    assert len(list((done / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 8

    def refused(message: str, *arguments: str, dataset: str = tiny.ID) -> None:
        with pytest.raises(SystemExit) as caught:
            command_line.main(["prepare", dataset, "-np", "1", *arguments])
        assert caught.value.code == 1
        assert message in capsys.readouterr().err

    shutil.copy(raw / "imagesTr" / "case_003_0000.nii.gz", raw / "imagesUn")
    refused("case_003: in imagesUn and in imagesTr")
    os.rename(raw / "imagesUn" / "case_003_0000.nii.gz", raw / "imagesUn" / "case.nii.gz")
    refused(f"case.nii.gz in {raw / 'imagesUn'}: name images as in imagesTr, NAME_0000.nii.gz and so on")
    os.rename(raw / "imagesUn" / "case.nii.gz", raw / "imagesUn" / "other_0001.nii.gz")
    refused(f"other in {raw / 'imagesUn'}: each needs the files _0000, like the cases of imagesTr")
    shutil.rmtree(raw / "imagesUn")
    refused("imagesUn has no images; name them as in imagesTr: NAME_0000.nii.gz and so on")
    (raw / "imagesUn").mkdir()
    refused("imagesUn has no images; name them as in imagesTr: NAME_0000.nii.gz and so on")
    refused("nnU-Net finds no data set 'Tiny', which must be an id or a name", dataset="Tiny")
    refused("nnU-Net finds no data set '977', which must be an id or a name: Could not find", dataset="977")
    refused("the plans have no configuration 4d; they have 2d, 3d_fullres", "-c", "4d")
    missing = "OtherPlans.json does not exist; run nnUNetv2_plan_and_preprocess first, or name your plans with -p"
    refused(missing, "-p", "OtherPlans")
    shutil.rmtree(done / "nnUNetPlans_2d")
    refused("lacks preprocessed cases of imagesTr; run nnUNetv2_plan_and_preprocess first", "-c", "2d")


def test_an_image_has_as_many_files_as_the_labelled_ones(tmp_path):
    """One per channel, but RGB images have one; cases of the data set may be listed in dataset.json."""
    from reseg_loss.integrations.nnunet.prepare import files_per_case, find_cases, labelled_files

    def per_case(about: dict[str, Any]) -> int:
        return files_per_case(labelled_files(tmp_path, about), about)

    about: dict[str, Any] = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    listed = {"dataset": {"a": {"images": ["there/a.png", "there/b.png"], "label": "there/c.png"}}}
    assert per_case(about) == 3
    assert per_case(about | listed) == 2
    for folder in ("imagesTr", "imagesUn"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p_1_0000.png").touch()
    assert per_case(about) == 1
    assert find_cases(tmp_path / "imagesUn", ".png", 1) == {"p_1": [str(tmp_path / "imagesUn" / "p_1_0000.png")]}
    with pytest.raises(ReSegError, match=r"p_1 in .*imagesUn: each needs the files _0000 to _0002, like the cases of"):
        find_cases(tmp_path / "imagesUn", ".png", 3)


@pytest.mark.parametrize(
    ("channels", "value", "message"),
    [(1, 0.0, "1 channels, but dataset.json has 3"), (3, np.nan, "it has values that are not finite")],
)
def test_images_with_other_channels_or_nan_are_refused(channels, value, message, tmp_path):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    from reseg_loss.integrations.nnunet.prepare import preprocess_case

    class Preprocessor:
        def __init__(self, verbose: bool) -> None:
            pass

        def run_case_save(self, output: str, *_: Any) -> None:
            image = np.zeros((channels, 1, 8, 8), np.float32)
            image[-1, 0, 3, 4] = value
            nnUNetDatasetBlosc2.save_case(image, np.zeros((1, 1, 8, 8), np.int16), {}, output)

    about = {"channel_names": {"0": "R", "1": "G", "2": "B"}}
    configuration = types.SimpleNamespace(preprocessor_class=Preprocessor)
    with pytest.raises(ReSegError, match=f"gray_0000.png: .*{message}"):
        preprocess_case(str(tmp_path / "gray"), ["gray_0000.png"], None, configuration, about)


def test_images_that_nnunet_cannot_preprocess_or_that_are_empty_are_refused_by_name(tmp_path):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    from reseg_loss.integrations.nnunet.prepare import preprocess_case

    class Fails:
        def __init__(self, verbose: bool) -> None:
            pass

        def run_case_save(self, output: str, *_: Any) -> None:
            raise RuntimeError

    class Empty(Fails):
        def run_case_save(self, output: str, *_: Any) -> None:
            nnUNetDatasetBlosc2.save_case(
                np.ones((1, 1, 8, 8), np.float32), np.zeros((1, 1, 8, 8), np.int16), {}, output
            )

    for kind, message in ((Fails, "nnU-Net cannot preprocess it"), (Empty, "all its voxels have the same value")):
        configuration = types.SimpleNamespace(preprocessor_class=kind)
        with pytest.raises(ReSegError, match=f"a_0000.png: .*{message}"):
            preprocess_case(str(tmp_path / "a"), ["a_0000.png"], None, configuration, {"channel_names": {"0": "R"}})


def test_files_that_are_no_images_are_named_and_arguments_are_checked(copied, capsys):
    images = copied("raw") / "imagesUn"
    done = copied("preprocessed") / "unlabelled" / "nnUNetPlans_2d"
    command = ["prepare", tiny.ID, "-c", "2d", "-np"]
    for name in ("scan_0000.nii", ".hidden", "spacing.json"):
        (images / name).touch()
    command_line.main([*command, "1"])
    assert "WARNING: not used, because they do not end in .nii.gz: scan_0000.nii\n" in capsys.readouterr().out
    first = next(images.glob("*.nii.gz"))
    shutil.copy(first, images / "more_000_seg_0000.nii.gz")
    for arguments, message in (
        (["1"], "more_000_seg in .*: an id cannot end in _seg"),
        (["0"], "processes must be at least 1, got 0"),
        (["1", "--patient-splits", ""], "the pattern for patients is empty"),
    ):
        with pytest.raises(SystemExit):
            command_line.main([*command, *arguments])
        assert re.search(message, capsys.readouterr().err)
    assert len([*done.glob("*.pkl")]) == 4


def test_without_nnunet_prepare_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["prepare", tiny.ID])
    assert stopped.value.code == 1
    assert "pip install 'reseg-loss[nnunet]'" in capsys.readouterr().err


def test_patients_by_their_ids():
    from reseg_loss.integrations.nnunet.patients import patients

    heart = ["patient002_frame01", "patient001_frame12", "patient001_frame01"]
    whole = {"patient001": ["patient001_frame01", "patient001_frame12"], "patient002": ["patient002_frame01"]}
    assert patients(heart) == whole
    assert patients(["la_003", "la_004"]) == {"la_003": ["la_003"], "la_004": ["la_004"]}
    assert patients(["TCGA-02-0006_a", "TCGA-02-0009"], r"TCGA-\d+-\d+") == {
        "TCGA-02-0006": ["TCGA-02-0006_a"], "TCGA-02-0009": ["TCGA-02-0009"],
    }  # fmt: skip
    assert patients(["nobody"]) == {"nobody": ["nobody"]}
    with pytest.raises(ReSegError, match="not a regular expression"):
        patients(heart, "(")


def test_folds_of_patients_and_warnings_where_they_are_not(tmp_path):
    from reseg_loss.integrations.nnunet.patients import patients, write_splits
    from reseg_loss.integrations.nnunet.prepare import warnings_of

    cases = [f"p{who}_{frame}" for who in range(7) for frame in "ab"]
    file, pattern = tmp_path / "splits_final.json", r".*?\d+"
    (told,) = warnings_of(cases, ["other1_a"], file, pattern)
    assert told.startswith("several cases seem to be of one patient: p0, p1, p2, p3, p4 and 2 more. nnU-Net splits")
    write_splits(patients(cases), file)
    folds = json.loads(file.read_text())
    assert len(folds) == 5
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == cases
        assert not {c[:2] for c in fold["train"]} & {c[:2] for c in fold["val"]}
    assert sorted(c for fold in folds for c in fold["val"]) == cases
    write_splits(patients(cases), file)  # the same again
    assert warnings_of(cases, ["other1_a"], file, pattern) == []
    (told,) = warnings_of(cases, ["p3_c", "other1_a"], file, pattern)
    assert told.startswith("patients with labels seem to have images without, too: p3. All folds")
    folds[0]["train"].append(folds[0]["val"][0])
    file.write_text(json.dumps(folds))
    (told,) = warnings_of(cases, [], file, pattern)
    assert re.match(r".*splits_final.json has cases of one patient on both sides of a fold.*: p\d\. Move", told)
    with pytest.raises(ReSegError, match="has other folds, and trainings may use them"):
        write_splits(patients(cases), file)
    with pytest.raises(ReSegError, match="5 folds need at least 5 patients, but there are 2: p0, p1"):
        write_splits(patients(cases[:4]), tmp_path / "none.json")
    (told,) = warnings_of(["site1_a", "site1_b"], ["site1_c"], tmp_path / "none.json", pattern)
    assert told.startswith("all ids start with 'site1', which tells no patients, so it was not checked")


def test_patient_splits_are_written_on_request(copied, capsys):
    file = copied("preprocessed") / "splits_final.json"
    file.unlink(missing_ok=True)
    # of case_000 to case_007, by the last digit over two
    command_line.main(["prepare", tiny.ID, "-c", "2d", "-np", "1", "--patient-splits", "case_00[0-3]?"])
    assert "folds of 5 patients with 8 cases" in capsys.readouterr().out
    assert any(
        sorted(fold["val"])[-4:] == [f"case_00{i}" for i in (4, 5, 6, 7)] for fold in json.loads(file.read_text())
    )


def test_images_are_not_prepared_by_other_plans_than_the_labelled_ones(copied, capsys):
    raw, done = copied("raw"), copied("preprocessed")
    command = ["prepare", tiny.ID, "-c", "2d", "-np", "1"]
    plans = json.loads((done / "nnUNetPlans.json").read_text())
    plans["configurations"]["2d"]["normalization_schemes"] = ["NoNormalization"]
    (done / "nnUNetPlans.json").write_text(json.dumps(plans))
    record = done / "unlabelled" / "nnUNetPlans_2d.json"
    before = record.read_text()
    with pytest.raises(SystemExit):
        command_line.main(command)
    assert "nnUNetPlans_2d is not what nnUNetPlans makes of imagesTr: case_000 differs" in capsys.readouterr().err
    assert record.read_text() == before
    shutil.rmtree(raw / "imagesTr")
    command_line.main(command)
    assert "WARNING: imagesTr has none of the cases in" in capsys.readouterr().out


def test_images_of_other_plans_or_missing_ones_are_refused(copied, monkeypatch, tmp_path):
    done = copied("preprocessed")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    folder = done / "unlabelled" / "nnUNetPlans_2d"
    for lost in ("more_001_seg.b2nd", "more_002.pkl"):
        (folder / lost).rename(done / lost)
        with pytest.raises(
            ReSegError, match=f"not have the 4 images that nnUNetPlans_2d.json names: run .* {tiny.DATASET}"
        ):
            make().on_train_start()
        (done / lost).rename(folder / lost)
    with monkeypatch.context() as elsewhere:  # where nobody can look for the images
        elsewhere.delenv("nnUNet_raw")
        record = folder.with_name("nnUNetPlans_2d.json")
        kept = record.read_text()
        record.unlink()
        with pytest.raises(ReSegError, match=r"the unlabelled images in .*nnUNetPlans_2d did not end: run"):
            make().on_train_start()
        folder.rename(done / "away")
        with pytest.raises(
            ReSegError, match=r"not preprocessed for this configuration: run .*, or move .*unlabelled away"
        ):
            make().on_train_start()
        (done / "away").rename(folder)
        record.write_text(kept)
    file = done / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    file.write_text(json.dumps(plans))
    with pytest.raises(ReSegError, match="were preprocessed with other plans: run `python -m reseg_loss"):
        make().on_train_start()
    plans["plans_name"], plans["configurations"]["2d"]["data_identifier"] = "MyPlans", "MyPlans_2d"
    file.write_text(json.dumps(plans))
    (done / "nnUNetPlans_2d").rename(done / "MyPlans_2d")
    command = f"`python -m reseg_loss.integrations.nnunet prepare {tiny.DATASET} -p MyPlans`"
    with pytest.raises(ReSegError, match=f"are not preprocessed for this configuration: run {command}, or move"):
        make().on_train_start()


def test_images_that_got_a_label_since_they_were_prepared_are_refused(copied, monkeypatch, tmp_path):
    """nnU-Net keeps the fingerprint and the plans unless told otherwise, so these are the same."""
    own = copied("preprocessed") / "nnUNetPlans_2d"
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    for end in (".b2nd", "_seg.b2nd", ".pkl"):
        shutil.copy(own / f"case_000{end}", own / f"more_001{end}")
    with pytest.raises(ReSegError, match="more_001: in imagesUn and in imagesTr, so labelled images would count"):
        make().on_train_start()


def test_images_added_or_removed_since_they_were_prepared_are_refused(copied, monkeypatch, tmp_path):
    images = copied("raw") / "imagesUn"
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    first, second, *_ = sorted(images.iterdir())
    message = "has other images than were prepared: {}. Run `python -m reseg_loss.integrations.nnunet prepare "
    shutil.copy(first, images / first.name.replace("more_", "new_"))
    with pytest.raises(ReSegError, match=message.format("new_[0-9]+")):
        make().on_train_start()
    first.rename(images / first.name.replace("more_", "new_"))
    second.unlink()
    with pytest.raises(ReSegError, match=message.format("more_[0-9]+, more_[0-9]+, new_[0-9]+")):
        make().on_train_start()
    for file in images.iterdir():
        file.unlink()
    with pytest.raises(ReSegError, match=message.format("more_.*")):
        make().on_train_start()
    images.rmdir()
    made = make()
    made.on_train_start()  # what was prepared is enough
    assert made.mean_teacher is not None


# --- the step


@pytest.mark.parametrize(
    ("configuration", "batch", "labels", "deep"),
    [("2d", 5, None, True), ("3d_fullres", 2, None, True), ("3d_fullres", 2, REGIONS, True), ("2d", 2, None, False)],
    ids=["2d, halves", "3d, whole batches", "regions", "no deep supervision"],
)
def test_a_step_is_that_of_plain_loops(folders, configuration, batch, labels, deep, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = make(configuration, batch=batch, labels=labels)
    made.enable_deep_supervision = deep
    made.on_train_start()
    made.on_train_epoch_start()
    made.rampup = 0.0
    with torch.no_grad():
        for p in made.mean_teacher.network.parameters():
            p.add_(0.01 * torch.randn_like(p))
    student, teacher = copy.deepcopy(made.network), copy.deepcopy(made.mean_teacher.network)
    labelled = next(made.dataloader_train)
    images = labelled["unlabelled"].clone()
    assert (len(labelled["data"]), len(images)) == {5: (3, 2), 2: (2, 2)}[batch]
    assert next(made.dataloader_val)["data"].shape[0] == len(labelled["data"])
    assert made.num_val_iterations_per_epoch == {5: 2, 2: 1}[batch]  # of as many patches as 1 of the whole batch
    torch.manual_seed(1)
    output = made.train_step({name: copy.deepcopy(value) for name, value in labelled.items()})

    torch.manual_seed(1)
    target = naive_pseudo_label(levels(teacher(images))[0].detach(), made.threshold, labels is not None)
    box = boxes(torch.rand(len(images), images.ndim - 1), images.shape[2:])
    mixed, target = mix(images, box), mix(target, box)
    mixed = perturb_intensities(mixed, torch.rand(len(images), 3), torch.randn_like(mixed))
    outputs = levels(student(torch.cat([labelled["data"], mixed])))
    labelled["target"] = levels(labelled["target"])
    n, weights = len(labelled["data"]), [2 / 3, 1 / 3] if deep else [1.0]
    assert len(outputs) == len(labelled["target"]) == (3 if deep else 1)  # nnU-Net gives the coarsest no weight
    first, second = torch.zeros(()), torch.zeros(())
    for level, (logits, weight) in enumerate(zip(outputs, weights)):
        batch_dice = made.configuration_manager.batch_dice
        truth = labelled["target"][level].long()
        everywhere = torch.ones_like(truth[:, :1], dtype=torch.bool)
        first = first + weight * naive_loss(logits[:n], truth, everywhere, labels is not None, batch_dice)
        coarse = every(target, 2**level)
        counts = coarse[:, -1:] == 0 if labels else coarse != 255
        coarse = coarse[:, :-1] if labels else coarse.masked_fill(~counts, 0)
        second = second + weight * naive_loss(logits[n:], coarse, counts, labels is not None, batch_dice)
    sure = (target[:, -1] == 0 if labels else target != 255).float().mean().item()
    assert 0.02 < sure < 0.98
    assert output["sure_share"] == pytest.approx(sure, abs=1e-6)
    assert output["unlabelled_loss"] == pytest.approx(second.item(), rel=1e-4)
    assert output["loss"] == pytest.approx((first + second).item(), rel=1e-4)
    (first + second).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 12)
    alone = torch.autograd.grad(naive_sum(student, labelled, weights, labels, batch_dice), [*student.parameters()][:1])
    assert not torch.allclose(alone[0], next(student.parameters()).grad, rtol=0.05)
    for mine, theirs in zip(made.network.parameters(), student.parameters(), strict=True):
        if theirs.grad is None:
            continue
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5 * theirs.grad.abs().max().item() + 1e-7)
    torch.optim.SGD(student.parameters(), 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True).step()
    for mine, theirs, before in zip(
        made.mean_teacher.network.parameters(), made.network.parameters(), teacher.parameters(), strict=True
    ):
        assert torch.allclose(mine, 0.99 * before + 0.01 * theirs, atol=1e-7)
    for mine, theirs in zip(made.network.parameters(), student.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_patches_without_labels_are_cut_and_augmented_as_those_with(folders, configuration, monkeypatch, tmp_path):
    """To the bit what nnU-Net's loader gives for the same images, if it oversamples nothing."""
    from reseg_loss.integrations.nnunet.unlabelled import patches

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = make(configuration)
    made.initialize()
    images = made.unlabelled_images()
    made.configuration_manager.configuration["use_mask_for_norm"] = [True]  # an augmentation of its own
    theirs = made.get_dataloaders()[0].data_loader
    theirs._data, theirs.indices = images, images.identifiers  # noqa: SLF001 - nnU-Net's
    theirs.oversample_foreground_percent = 0.0
    ours = patches(made, images, theirs.batch_size)
    for seed in range(6):
        tiny.seed_everything(seed)
        expected = theirs.generate_train_batch()
        tiny.seed_everything(seed)
        found = ours.generate_train_batch()
        assert list(found["keys"]) == list(expected["keys"])
        assert torch.equal(found["data"], expected["data"])


def test_a_step_has_two_images_without_labels_at_least():
    from reseg_loss.integrations.nnunet.step import shares

    assert [shares(size) for size in range(1, 7)] == [(1, 2), (2, 2), (3, 3), (2, 2), (3, 2), (3, 3)]


def levels(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [*outputs]


def naive_sum(student: Any, labelled: Any, weights: list[float], labels: Any, batch_dice: bool) -> Tensor:
    """The labelled images' loss alone."""
    total = torch.zeros(())
    for logits, target, weight in zip(levels(student(labelled["data"])), labelled["target"], weights):
        counts = torch.ones_like(target[:, :1], dtype=torch.bool)
        total = total + weight * naive_loss(logits, target.long(), counts, labels is not None, batch_dice)
    return total


def naive_pseudo_label(logits: Tensor, threshold: float, regions: bool) -> Tensor:
    """Voxel by voxel: (B, 1, ...) with 255, of regions (B, R + 1, ...) with 1 in the last where any is not sure."""
    channels = logits.shape[1] + 1 if regions else 1
    target = torch.zeros(len(logits), channels, *logits.shape[2:], dtype=torch.int64)
    for b, *at in np.ndindex(len(logits), *logits.shape[2:]):
        voxel = logits[(b, slice(None), *at)]
        if regions:
            p = 1 / (1 + torch.exp(-voxel))
            found = [*(p >= 0.5).long().tolist(), int(any(max(q, 1 - q) < threshold for q in p.tolist()))]
            target[(b, slice(None), *at)] = torch.tensor(found)
        else:
            p = torch.exp(voxel) / torch.exp(voxel).sum()
            target[(b, 0, *at)] = p.argmax() if p.max() >= threshold else 255
    return target


def every(target: Tensor, step: int) -> Tensor:
    """Coarser by a power of two: of each cell the voxel behind its centre."""
    where = (slice(None), slice(None), *[slice(step // 2, None, step)] * (target.ndim - 2))
    return target[where]


def naive_loss(logits: Tensor, target: Tensor, counts: Tensor, regions: bool, batch_dice: bool) -> Tensor:
    """Cross-entropy (of regions binary) of the voxels that count, minus the Dice score of the foreground there."""
    if regions:
        p, y = logits.sigmoid(), target.float()
        entropy = -(y * p.log() + (1 - y) * (1 - p).log())
        # without an ignore label nnU-Net takes the mean over regions, too, with one their sum
        entropy = entropy.mean() if counts.all() else (entropy * counts).sum() / counts.sum()
    else:
        p = logits.softmax(1)
        y = torch.cat([(target == c).float() for c in range(logits.shape[1])], 1)
        entropy = -((y * p.log()).sum(1, keepdim=True)[counts]).mean()
        p, y = p[:, 1:], y[:, 1:]
    axes = tuple(range(2, p.ndim))
    axes = (0, *axes) if batch_dice else axes
    both, sizes = (p * y * counts).sum(axes), ((p + y) * counts).sum(axes)
    return entropy - ((2 * both + 1e-5) / (sizes + 1e-5)).mean()


def test_the_first_epochs_weigh_little_and_the_weight_is_the_subclass(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = make()
    made.num_epochs, made.unlabelled_weight = 10, 2.0
    factors = []
    for epoch in range(10):
        made.current_epoch = epoch
        factors.append(made.factor())
    assert factors == pytest.approx([2 * np.exp(-5 * (1 - min(epoch / 4, 1)) ** 2) for epoch in range(10)])
    made.rampup, made.current_epoch = 0.0, 0
    assert made.factor() == 2.0


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("unlabelled_weight", -1.0, "unlabelled_weight"),
        ("threshold", 1.5, "threshold"),
        ("ema_decay", 1.0, "ema_decay"),
        ("rampup", -0.1, "rampup"),
        ("rampup", 20, "rampup"),  # epochs
    ],
)
def test_settings_out_of_range_are_refused(folders, setting, value, message, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = make()
    setattr(made, setting, value)
    with pytest.raises(ReSegError, match=message):
        made.on_train_start()


def test_losses_that_cannot_leave_voxels_out_are_refused(folders, monkeypatch, tmp_path):
    from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerCELoss import nnUNetTrainerCELoss
    from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerDiceLoss import nnUNetTrainerDiceLoss

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    for other in (nnUNetTrainerDiceLoss, nnUNetTrainerCELoss):
        made = make()
        monkeypatch.setattr(made, "_build_loss", lambda made=made, other=other: other._build_loss(made))  # noqa: SLF001 - nnU-Net's
        with pytest.raises(ReSegError, match="loss cannot ignore voxels without a sure pseudo-label"):
            made.on_train_start()


@pytest.mark.parametrize("weights", [(1, 1), (2, 0.5), (1, 0), (0, 1)], ids=str)
def test_the_loss_of_both_is_nnunets_to_the_bit_and_reads_nothing(weights):
    """Also where no voxel counts. Reading would wait for the GPU; "meta" cannot be read."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    from reseg_loss.integrations.nnunet.step import LossOfBoth

    def stock() -> nn.Module:
        dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
        return DC_and_CE_loss(dice, {}, *weights, ignore_label=3, dice_class=MemoryEfficientSoftDiceLoss)

    both = LossOfBoth(stock(), stock())
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 6, 5, requires_grad=True), torch.randint(4, (4, 1, 6, 5), dtype=torch.int16)
    for pseudo in (target[2:], torch.full_like(target[2:], 3)):
        both.expect(pseudo, 0.5)
        found = both(logits, target[:2])
        expected = stock()(logits[:2], target[:2]) + 0.5 * stock()(logits[2:], pseudo)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))
    assert both(logits.to("meta"), target.to("meta")).ndim == 0


def test_a_loss_is_checked_where_it_works(folders):
    """A class-weighted loss has its weights on the GPU."""
    from reseg_loss.integrations.nnunet.step import check_ignoring

    seen = []

    class Weighted(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            seen.extend([output.device.type, target.device.type])
            return output.sum()

    for regions in (False, True):
        with pytest.raises(ReSegError, match="cannot ignore voxels"):
            check_ignoring(Weighted(), 2, None, 2, regions, 2, torch.device("meta"))
    assert seen == ["meta"] * 4


def test_cascades_are_refused(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = make()
    made.initialize()
    made.is_cascaded = True
    with pytest.raises(ReSegError, match="cascades are not supported"):
        made.on_train_start()


def found_by_name(monkeypatch: pytest.MonkeyPatch, *classes: type) -> None:
    """Let nnU-Net find trainers that are in no file."""
    from nnunetv2.utilities import find_objects

    known, original = {each.__name__: each for each in classes}, find_objects.recursive_find_trainer_class_by_name
    monkeypatch.setattr(
        find_objects, "recursive_find_trainer_class_by_name", lambda name: known.get(name) or original(name)
    )


def test_bases_that_go_round_ours_are_refused(folders, monkeypatch, tmp_path):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from reseg_loss.integrations.nnunet.semi import nnUNetTrainerSemi
    from reseg_loss.integrations.nnunet.trainer import nnUNetTrainerReSeg

    class Own(nnUNetTrainer):
        def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
            nnUNetTrainer.load_checkpoint(self, filename_or_checkpoint)

        def train_step(self, batch: Any) -> Any:
            batch = {**batch, "data": batch["data"].to(self.device)}
            return nnUNetTrainer.train_step(self, batch)

    class OwnFirst(Own, nnUNetTrainerSemi):
        pass

    class OursFirst(nnUNetTrainerSemi, Own):
        threshold = 0.4

    class Both(nnUNetTrainerSemi, nnUNetTrainerReSeg):
        pass

    class Perturbs(nnUNetTrainerSemi):
        def perturb(self, images: Tensor) -> Tensor:
            return images[:1]

    found_by_name(monkeypatch, OwnFirst, OursFirst, Both, Perturbs)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    with pytest.raises(ReSegError, match="cannot be bases of the same trainer"):
        tiny.make("Both", "2d").on_train_start()
    with pytest.raises(ReSegError, match=r"perturb must return images of the same shape \(2, 1, 32, 32\)"):
        tiny.train(tiny.make("Perturbs", "2d"))
    with pytest.raises(ReSegError, match="list nnUNetTrainerSemi first among its bases, or call super"):
        tiny.train(tiny.make("OwnFirst", "2d"))
    ours = tiny.train(tiny.make("OursFirst", "2d"))
    longer = tiny.make("OwnFirst", "2d", resume=True)
    longer.num_epochs = 5
    longer.load_checkpoint(str(Path(ours.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ReSegError, match="has no 'reseg_student': this run was started without unlabelled images"):
        longer.on_train_start()


def test_the_trainer_to_predict_with_is_none_of_ours_and_builds_the_same_network():
    from reseg_loss.integrations.nnunet.checkpoints import trainer_to_predict_with

    class Stock:
        def build_network_architecture(self) -> None: ...

    class Ours(Stock): ...

    class Normalized(Stock):
        def build_network_architecture(self) -> None: ...

    class Long(Stock): ...

    def named(*bases: type) -> str:
        return trainer_to_predict_with(type("Mine", bases, {}), Ours)

    assert trainer_to_predict_with(Ours, Ours) == "Stock"
    assert [named(Ours), named(Ours, Long), named(Long, Ours)] == ["Stock", "Long", "Long"]
    assert [named(Ours, Normalized), named(Normalized, Ours)] == ["Normalized", "Normalized"]
    own = type("Own", (Ours,), {"build_network_architecture": lambda self: None})
    assert trainer_to_predict_with(own, Ours) == "Own"
    assert trainer_to_predict_with(type("Mine", (own,), {}), Ours) == "Mine"


# --- a run


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_weight_0_and_a_run_without_images_are_the_stock_trainers_to_the_bit(
    folders, configuration, monkeypatch, tmp_path
):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "stock"))
    stock = tiny.train(tiny.make("nnUNetTrainer", configuration, batch=4))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "zero"))
    made = make(configuration, batch=4)
    made.unlabelled_weight = 0
    tiny.train(made)
    assert "No unlabelled images" not in log_of(made)
    shutil.copytree(
        folders / "preprocessed", tmp_path / "preprocessed", ignore=lambda _, names: {"unlabelled"} & {*names}
    )
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "none"))
    with pytest.raises(ReSegError, match="imagesUn are not preprocessed for this configuration: run `python -m"):
        make(configuration).on_train_start()
    monkeypatch.delenv("nnUNet_raw")  # as on a machine that has what is preprocessed alone
    none = tiny.train(make(configuration, batch=4))
    assert f"run `python -m reseg_loss.integrations.nnunet prepare {tiny.DATASET}`" in log_of(none)
    for other in (made, none):
        assert equal(other.network, stock.network)
        for key in ("train_losses", "val_losses", "ema_fg_dice"):
            assert other.logger.get_value(key, step=None) == stock.logger.get_value(key, step=None)
        for name in ("final", "best"):
            theirs, ours = file_of(stock, name), file_of(other, name)
            assert same(ours["network_weights"], theirs["network_weights"])
            assert set(ours) == {*theirs, "reseg_trainer"}
    monkeypatch.setenv("nnUNet_preprocessed", str(folders / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "other"))
    assert not equal(tiny.train(make(configuration, batch=4)).network, stock.network)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_a_killed_run_goes_on_from_latest_and_from_best(folders, configuration, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = tiny.train(make(configuration))
    for name in ("latest", "best"):
        monkeypatch.setenv("nnUNet_results", str(tmp_path / name))
        cut = make(configuration)
        tiny.kill_at(cut, epoch=2, step=1)
        with pytest.raises(tiny.KilledError):
            tiny.train(cut)
        if name == "best":
            (Path(cut.output_folder) / "checkpoint_latest.pth").unlink()
        resumed = make(configuration, resume=True)
        tiny.train(resumed, resume=True)
        assert resumed.steps < whole.steps
        mine, theirs = (file_of(trainer, "final") for trainer in (resumed, whole))
        for part in ("network_weights", "reseg_student"):
            assert same(mine[part], theirs[part])
        for key in ("train_losses", "val_losses", "ema_fg_dice", "unlabelled_loss", "sure_share"):
            assert resumed.logger.get_value(key, step=None) == whole.logger.get_value(key, step=None)
            assert len(whole.logger.get_value(key, step=None)) == 3
        assert (Path(resumed.output_folder) / "progress_unlabelled.png").stat().st_size > 0
        assert not [*Path(resumed.output_folder).glob("*.stock"), *Path(resumed.output_folder).glob("*.partial")]
    epochs = re.findall(r"unlabelled loss (\S+) times (\S+), (\S+) % of voxels sure", log_of(whole))
    expected = [f"{value:.4f}" for value in whole.logger.get_value("unlabelled_loss", step=None)]
    assert [epoch[0] for epoch in epochs] == expected


def test_final_checkpoints_predict_with_the_mean_teacher_and_go_on_with_the_student(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = make()
    kept: dict[str, Any] = {}
    tiny.note_at_the_end(made, kept)
    trained, validated = [], []
    step, trained_epoch = made.validation_step, made.on_train_epoch_end

    def pair() -> list[list[Tensor]]:
        networks = (made.network, made.mean_teacher.network)
        return [[t.clone() for t in network.state_dict().values()] for network in networks]

    def on_train_epoch_end(outputs: Any) -> None:
        trained.append(pair())
        trained_epoch(outputs)

    def validation_step(batch: Any) -> Any:
        validated.append(pair())
        return step(batch)

    made.validation_step, made.on_train_epoch_end = validation_step, on_train_epoch_end
    tiny.train(made)
    for before, during in zip(trained, validated, strict=True):  # swapped
        for mine, part in zip(during, reversed(before), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, part, strict=True))
    # the last epoch's end: validation had the mean teacher's weights in the network
    for mine, part in zip(validated[-1], ("teacher", "student")):
        assert all(torch.equal(a, b) for a, b in zip(mine, kept[part], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept["teacher"], kept["student"]))
    # nnU-Net validates after the training with what the network has then
    assert all(torch.equal(a, b) for a, b in zip(made.network.state_dict().values(), kept["teacher"], strict=True))
    final, best = (file_of(made, name) for name in ("final", "best"))
    assert final["trainer_name"] == best["trainer_name"] == "nnUNetTrainer"
    assert final["reseg_trainer"] == SEMI
    for part, name in (("teacher", "network_weights"), ("student", "reseg_student")):
        assert all(torch.equal(a, b) for a, b in zip(final[name].values(), kept[part], strict=True))
    assert "reseg_student" in best
    mine = predict(made, folders / "raw")
    monkeypatch.delenv("nnUNet_extTrainer")
    for name in [name for name in sys.modules if name.split(".")[0] == "reseg_loss"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module("reseg_loss")
    assert np.array_equal(predict(made, folders / "raw"), mine)
    monkeypatch.undo()

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    validating = make()
    validating.load_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))  # as --val does it
    assert same(dict(validating.network.state_dict()), final["network_weights"])
    longer = make(resume=True)
    longer.num_epochs = 5
    longer.load_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    longer.on_train_start()
    assert longer.current_epoch == 3
    assert same(dict(longer.network.state_dict()), final["reseg_student"])
    assert same(dict(longer.mean_teacher.network.state_dict()), final["network_weights"])
    momenta = longer.optimizer.state_dict()["state"], final["optimizer_state"]["state"]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[1])

    without = make(resume=True)
    without.unlabelled_weight = 0
    without.load_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(ReSegError, match="started with unlabelled images, but has none now"):
        without.on_train_start()


def test_ignored_cases_are_unlabelled_and_in_no_split(folders, monkeypatch, tmp_path, capsys):
    """A data set with "ignore" and nothing in imagesUn, of which two cases have no other label."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    tiny.write_dataset(tmp_path / "raw", unlabelled=0, size=16, dataset="Dataset902_Ignored", ignored=(1, 6))
    (tmp_path / "raw" / "Dataset902_Ignored" / "imagesUn" / ".DS_Store").touch()
    extract_fingerprints([902], num_processes=1, check_dataset_integrity=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    plan_experiments([902])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    preprocess([902], configurations=("2d",), num_processes=(1,))
    tiny.shrink_plans(tmp_path / "preprocessed", "Dataset902_Ignored")
    made = make(dataset="Dataset902_Ignored")
    made.num_epochs = 1
    seen: set[str] = set()
    step = made.train_step

    def train_step(batch: Any) -> Any:
        seen.update(batch["keys"])
        return step(batch)

    made.train_step = train_step
    tiny.train(made)
    unlabelled = {"case_001", "case_006"}
    assert made.dataloader_train.transform.loader.indices == sorted(unlabelled)
    assert made.dataloader_train.transform.loader.oversample_foreground_percent == 0
    file = tmp_path / "preprocessed" / "Dataset902_Ignored" / "splits_final.json"
    folds = json.loads(file.read_text())
    training, validation = made.do_split()
    assert unlabelled <= {*folds[0]["train"], *folds[0]["val"]}
    assert training == [case for case in folds[0]["train"] if case not in unlabelled]
    assert validation == [case for case in folds[0]["val"] if case not in unlabelled]
    assert seen <= set(training)
    assert "2 unlabelled images; a step has 2 patches with labels and 2 without" in log_of(made)
    assert f"{len(training)} training and {len(validation)} validation cases have a label" in log_of(made)
    assert "WARNING" not in log_of(made)
    made.configuration_manager.configuration["use_mask_for_norm"] = [True]
    assert set(made.unlabelled_images().identifiers) == unlabelled
    assert "WARNING: case_001, case_006: nnU-Net normalizes images of this data set without the zeros" in log_of(made)
    made.fold = "all"
    assert set(made.do_split()[0]) == {f"case_00{i}" for i in range(8)} - unlabelled
    made.unlabelled_weight = 0
    assert set(made.do_split()[0]) == {f"case_00{i}" for i in range(8)}
    # `prepare` has nothing to preprocess, but knows whom these cases are of; 6 and 7 are of one patient
    file.unlink()
    earlier = file.with_name("unlabelled")
    (earlier / "nnUNetPlans_2d").mkdir(parents=True)
    (earlier / "nnUNetPlans_2d.json").write_text("{}")
    command_line.main(["prepare", "902", "--patient-splits", "case_00[0-5]?"])
    assert not [*earlier.iterdir()]
    told = capsys.readouterr().out
    assert "folds of 6 patients with 6 cases" in told
    assert "WARNING: patients with labels seem to have images without, too: case_00. All folds train on these" in told
    assert "imagesUn has no images; 2 cases of imagesTr are unlabelled, and preprocessed" in told
    for fold in json.loads(file.read_text()):
        assert {*fold["train"], *fold["val"]} == {f"case_00{i}" for i in range(8)} - unlabelled


def test_compiled_networks_have_a_compiled_mean_teacher(folders, monkeypatch, tmp_path):
    """nnU-Net compiles on GPUs only; here it is told to on the CPU, with the backend that needs no compiler."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    compiler, original = torch.compile, MeanTeacher.predict
    predicting: list[bool] = [False]
    compiled: list[bool] = []  # of each graph whether it is the mean teacher's

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(predicting[-1])
        return graph.forward

    def noted(teacher: MeanTeacher, images: torch.Tensor) -> Any:
        predicting.append(True)
        try:
            return original(teacher, images)
        finally:
            predicting.pop()

    monkeypatch.setattr(torch, "compile", lambda what, **_: compiler(what, backend=backend))
    monkeypatch.setattr(MeanTeacher, "predict", noted)
    made = make("3d_fullres")
    made._do_i_compile = lambda: True  # noqa: SLF001 - nnU-Net's own switch, and it has no other
    kept: dict[str, Any] = {}
    tiny.note_at_the_end(made, kept)
    tiny.train(made)
    assert type(made.network).__name__ == "OptimizedModule"
    assert {*compiled} == {True, False}
    final = file_of(made, "final")
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "plain"))
    plain = make("3d_fullres")
    assert [*final["network_weights"]] == [*final["reseg_student"]]
    plain.load_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    plain.on_train_start()
    assert same(dict(plain.network.state_dict()), final["reseg_student"])


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_processes_feed_the_images_in_one_piece_and_end(folders, configuration, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    made = make(configuration, batch=2)
    made.num_epochs = 1
    workers: set[Any] = set()
    step = made.train_step

    def train_step(batch: Any) -> Any:
        workers.update(made.dataloader_train._processes)  # noqa: SLF001 - batchgenerators has no other name for them
        tensors = [batch["data"], batch["unlabelled"], *batch["target"]]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
        assert all(t.data_ptr() % 8 == 0 and t.is_contiguous() for t in tensors)
        return step(batch)

    made.train_step = train_step
    tiny.train(made)
    assert made.steps == 3
    assert len(workers) == 2  # twice as many patches as nnU-Net loads
    assert not any(worker.is_alive() for worker in workers)


def test_a_joined_batch_has_the_same_values():
    from reseg_loss.integrations.nnunet.unlabelled import Joined

    images, data, regions = torch.rand(2, 1, 3, 5), torch.rand(3, 1, 7, 5), torch.rand(3, 3) > 0.5
    levels = [torch.randint(3, (3, 1, 7 - i, 5), dtype=torch.int16) for i in range(2)]
    batch = {"data": data.clone(), "target": [level.clone() for level in levels], "regions": regions.clone()}
    joined = Joined(iter([{"data": images.clone(), "target": None}]))(**batch, keys=["a", "b", "c"])
    assert joined.pop("keys") == ["a", "b", "c"]
    assert all(map(torch.equal, joined.pop("target"), levels))
    assert same(joined, {"data": data, "regions": regions, "unlabelled": images})


def test_a_loader_that_is_not_nnu_nets_is_refused():
    from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

    from reseg_loss.integrations.nnunet.unlabelled import joined

    transformed = SingleThreadedAugmenter(iter([]), lambda **batch: batch)  # which would be lost
    for loader in (iter([]), transformed):
        with pytest.raises(ReSegError, match="get_dataloaders does not load as nnU-Net's does"):
            joined((loader, SingleThreadedAugmenter(iter([]), None)), None, 4, False)


def test_the_pages_subclass_is_found(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (code,) = re.findall(r"```python\n(.*?)```", section("nnU-Net with unlabelled images"), re.DOTALL)
    (tmp_path / "my_trainers").mkdir()
    (tmp_path / "my_trainers" / "mine.py").write_text(code)
    paths = [str(tmp_path / "my_trainers"), str(command_line.folder())]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(paths))
    made = tiny.make("nnUNetTrainerSemi_250epochs", "2d")
    assert made.rampup == 0.2
    made.num_epochs = 1
    tiny.train(made)
    assert file_of(made, "final")["trainer_name"] == "nnUNetTrainer_250epochs"
