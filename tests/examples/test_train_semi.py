"""train_semi.py from end to end with a handful of steps, and folders of NIfTI files in any orientation."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_semi
from common.data import TrainingBatches
from common.nifti import load_folders, save_prediction
from launch import run

from reseg_loss import SemiSupervised

ROOT = Path(__file__).parents[2]
AFFINES = {
    "RAS": np.diag([1.0, 2.0, 3.0, 1.0]),
    "LPS": np.array([[-1.0, 0, 0, 50], [0, -2.0, 0, 40], [0, 0, 3.0, -7], [0, 0, 0, 1]]),
    "SAL": np.array([[0, 0, -1.0, 9], [0, 2.0, 0, 1], [3.0, 0, 0, 2], [0, 0, 0, 1]]),
}


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Three labelled and two other volumes in several orientations, in which a bright box is to be found."""
    rng = np.random.default_rng(0)
    for index, affine in enumerate([*AFFINES.values(), *list(AFFINES.values())[1:]]):
        label = np.zeros((36, 40, 16), np.uint8)
        x, y, z = rng.integers(0, 6, 3)
        label[x + 4 : x + 26, y + 4 : y + 30, z : z + 9] = 1
        image = (1000 * label.astype(int) + rng.integers(-200, 200, label.shape)).astype(np.int16)
        for folder, array in (("images", image), ("labels", label)):
            name = folder if index < 3 else {"images": "others", "labels": "truth"}[folder]
            (tmp_path / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), tmp_path / name / f"case{index}.nii.gz")
    return [
        f"--{key}={tmp_path / name}"
        for key, name in zip(("images", "labels", "unlabelled"), ("images", "labels", "others"))
    ]


def load(folders: list[str], **kwargs: Any):
    return load_folders(*(Path(option.partition("=")[2]) for option in folders), **kwargs)


# --- folders


@pytest.mark.parametrize("channels", [False, True])
def test_volumes_are_read_from_feet_to_head_whatever_their_orientation(folders, channels):
    data = load(folders, channels=channels)
    assert [len(part) for part in (data.train, data.unlabelled, data.test)] == [3, 2, 0]
    assert data.class_names == ("background", "class 1")
    for case, (axes, affine) in zip(data.train, AFFINES.items()):
        image, label = case.read()
        assert image.shape == (*([1] if channels else []), *label.shape)
        assert image.dtype == np.float32
        assert image.min() == 0
        assert image.max() == 1
        volume = image[0] if channels else image
        assert volume[label == 1].mean() > 0.6 > 0.4 > volume[label == 0].mean()  # image and label turn together
        world = np.abs(affine[:3, :3]).sum(1)  # millimetres a voxel along left-right, back-front, feet-head
        assert case.spacing == tuple(world[::-1])
        raw = nib.load(case.name)
        corner = np.asarray(raw.dataobj)[tuple(-1 if code in "LPI" else 0 for code in axes)]  # right-most is last
        again = np.asarray(nib.as_closest_canonical(raw).dataobj)
        assert again[0, 0, 0] == corner
        assert label.shape == again.shape[::-1]


def test_predictions_are_on_the_grid_and_with_the_header_of_their_image(folders, tmp_path):
    data = load(folders)
    for case in data.train:
        path = save_prediction(case, case.read()[1], tmp_path / "out")
        written, image = nib.load(path), nib.load(case.name)
        label = nib.load(case.name.replace("images", "labels"))
        assert np.array_equal(np.asarray(written.dataobj), np.asarray(label.dataobj))
        assert np.array_equal(written.affine, image.affine)
        assert written.get_data_dtype() == np.uint8
        for key in ("pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b", "descrip"):
            assert np.array_equal(written.header[key], image.header[key]), key


def test_folders_that_do_not_fit_are_explained(folders, tmp_path):
    (tmp_path / "labels" / "case1.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"has no case1\.nii\.gz"):
        load(folders)
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4)), tmp_path / "labels" / "case1.nii.gz")
    with pytest.raises(ValueError, match="its label"):
        [case.read() for case in load(folders).train]
    image = nib.load(tmp_path / "images" / "case1.nii.gz")
    flipped = image.affine @ np.diag([-1, 1, 1, 1])
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), flipped), tmp_path / "labels" / "case1.nii.gz")
    with pytest.raises(ValueError, match="lie more than 1 mm apart according to their headers"):
        [case.read() for case in load(folders).train]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"There is no \.nii"):
        load([*folders[:2], f"--unlabelled={tmp_path / 'none'}"])
    for wrong in (
        np.full((3, 4, 5), 0.5, np.float32),
        np.full((3, 4, 5), -1, np.int16),
        np.full((3, 4, 5), 300, np.int16),
    ):
        nib.save(nib.Nifti1Image(wrong, np.eye(4)), tmp_path / "labels" / "case1.nii.gz")
        with pytest.raises(ValueError, match=r"case1\.nii\.gz has values from .* labels are 0, 1, 2"):
            load(folders)
    nib.save(nib.Nifti1Image(np.full(image.shape, np.nan, np.float32), np.eye(4)), tmp_path / "others" / "case3.nii.gz")
    shutil.copy(tmp_path / "labels" / "case0.nii.gz", tmp_path / "labels" / "case1.nii.gz")
    with pytest.raises(ValueError, match=r"case3\.nii\.gz: the image has NaN"):
        [case.read() for case in load(folders).unlabelled]


# --- the script


def options(out: Path, *more: str) -> list[str]:
    return ["--small", "--steps", "6", "--batch-size", "4", "--device", "cpu", "--out", str(out), *more]


def test_a_script_in_another_folder_on_the_packaged_data(tmp_path):
    done = run(sys.executable, ROOT / "examples" / "train_semi.py", "--small", "--steps", "2", cwd=tmp_path)
    for text in ("4 labelled", "60 unlabelled", "grey matter", "never evidence", "One seed proves nothing"):
        assert text in done.stdout
    assert (tmp_path / "outputs" / "train_semi" / "model.pt").exists()


def test_an_npz_is_learnt_with_the_other_patients_as_unlabelled_images(slices, capsys):
    out = slices.parent / "out"
    train_semi.main(options(out, "--data", str(slices), "--patients", "2", "--steps", "50", "--amp", "bf16"))
    printed = capsys.readouterr().out
    assert "8 labelled and 8 unlabelled slices" in printed
    assert "step 50" in printed
    assert "averaged brain" not in printed
    state = torch.load(out / "model.pt", weights_only=True)
    assert list(state) == list(train_semi.network(2, 2, small=True).state_dict())


@pytest.mark.parametrize("patch", [(), ("--patch", "16", "32", "16")])
def test_folders_end_in_predictions_of_the_unlabelled_images(folders, tmp_path, patch):
    more = [*folders, *patch, "--steps", "30", "--lr", "0.1"]
    train_semi.main(options(tmp_path / "out", *more))
    for index in (3, 4):
        prediction, truth = (nib.load(tmp_path / name / f"case{index}.nii.gz") for name in ("out", "truth"))
        ours, theirs = (np.asarray(part.dataobj) for part in (prediction, truth))
        assert np.array_equal(prediction.affine, truth.affine)
        assert 2 * (ours & theirs).sum() > 0.8 * (ours.sum() + theirs.sum())


def test_stopped_and_started_again_it_ends_as_if_nothing_had_happened(slices, monkeypatch):
    more = ["--data", str(slices), "--patients", "2", "--steps", "8", "--save-every", "3"]
    whole, out = slices.parent / "whole", slices.parent / "out"
    train_semi.main(options(whole, *more))
    original, seen = TrainingBatches.__getitem__, []

    def stopped(self: Any, step: int) -> Any:
        seen.append(step)
        if len(seen) == 12:  # an example, then two a step
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__getitem__", stopped)
        with pytest.raises(KeyboardInterrupt):
            train_semi.main(options(out, *more))
    assert torch.load(out / "training.pt", weights_only=True)["data"]["step"] == 3
    train_semi.main(options(out, *more))
    again, once = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, whole))
    for key, value in once.items():
        assert torch.equal(value, again[key]), key
    with pytest.raises(SystemExit, match=r"of a run with other options .*seed 0, now 1"):
        train_semi.main(options(out, *more, "--seed", "1"))


def test_killed_while_it_writes_the_network_it_leaves_none_cut(slices, monkeypatch):
    more = options(slices.parent / "out", "--data", str(slices), "--patients", "2", "--steps", "1")
    replace_file, file = os.replace, slices.parent / "out" / "model.pt"

    def killed(source: Any, target: Any) -> None:
        if Path(target) == file:
            raise KeyboardInterrupt
        replace_file(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train_semi.main(more)
    assert not file.exists()


def test_a_run_that_diverged_leaves_no_network(slices, monkeypatch):
    out, loss = slices.parent / "out", SemiSupervised.loss
    monkeypatch.setattr(SemiSupervised, "loss", lambda *args, **kwargs: loss(*args, **kwargs) / 0)
    with pytest.raises(SystemExit, match=r"has diverged: the loss of step 1 is not finite\. Lower --lr"):
        train_semi.main(options(out, "--data", str(slices), "--patients", "2", "--steps", "1"))
    assert not list(out.iterdir())


CHANGES = {
    **{"steps": ("--steps", "2"), "batch_size": ("--batch-size", "2"), "lr": ("--lr", "0.02"), "seed": ("--seed", "1")},
    **{
        "amp": ("--amp", "bf16"),
        "size": ("--size", "64"),
        "patients": ("--patients", "3"),
        "slices": ("--slices", "3"),
    },
    **{"small": None, "data": None, "images": None, "labels": None, "unlabelled": None},
    "patch": ("--patch", "32", "32", "32"),
}


@pytest.mark.parametrize("key", train_semi.OPTIONS)
def test_a_run_is_not_resumed_with_another(key, slices, folders, tmp_path):
    own = {"patients", "slices", "data", "small"}  # of data in one file
    source = ["--data", str(slices), "--patients", "2"] if key in own else list(folders)
    more = options(
        tmp_path / "out", "--steps", "1", "--lr", "0.01", *([] if key == "patch" else ["--size", "32"]), *source
    )
    train_semi.main(more)
    other = [*more, *(CHANGES[key] or ())]
    if key == "small":
        other.remove("--small")
    elif key == "data":
        other[other.index("--data") + 1] = str(shutil.copy(slices, tmp_path / "copy.npz"))
    elif CHANGES[key] is None:
        moved = shutil.copytree(tmp_path / {"unlabelled": "others"}.get(key, key), tmp_path / "moved")
        other.append(f"--{key}={moved}")
    with pytest.raises(SystemExit, match=rf"training\.pt is of a run with other options .*[(; ]{key} "):
        train_semi.main(other)


def test_a_run_is_not_resumed_on_other_files(folders, tmp_path):
    out = tmp_path / "out"
    more = options(out, *folders, "--size", "32", "--steps", "1")
    train_semi.main(more)
    train_semi.main(more)  # the same files

    def refused(changes: str) -> None:
        with pytest.raises(SystemExit, match=rf"training\.pt is of a run with other options \({changes}\); choose"):
            train_semi.main(more)

    image, label, other = (tmp_path / name for name in ("images", "labels", "others"))
    for path in (image, label):
        shutil.copy(path / "case2.nii.gz", path / "new.nii.gz")
    refused(r"1 new: labelled \S+images/new\.nii\.gz")
    (image / "new.nii.gz").unlink()
    train_semi.main(more)  # nothing reads a label without an image
    (image / "case0.nii.gz").rename(other / "case0.nii.gz")
    refused(r"1 new: unlabelled \S+others/case0\.nii\.gz, 1 gone: labelled \S+images/case0\.nii\.gz")
    (other / "case0.nii.gz").rename(image / "case0.nii.gz")
    for index in range(5):
        shutil.copy(other / "case3.nii.gz", other / f"more{index}.nii.gz")
    refused(r"5 new: unlabelled \S+more\d\.nii\.gz(, unlabelled \S+more\d\.nii\.gz){2}")
    for index in range(5):
        (other / f"more{index}.nii.gz").unlink()
    train_semi.main(more)  # restored


def test_a_run_is_not_resumed_with_other_patients(slices):
    more = options(slices.parent / "out", "--data", str(slices), "--patients", "2", "--steps", "1")
    train_semi.main(more)
    with np.load(slices) as file:
        arrays = dict(file)
    np.savez(slices, **{**arrays, "labels": 1 - arrays["labels"]})
    with pytest.raises(SystemExit, match=r"other options \(contents of data \w{8}, now \w{8}\); choose"):
        train_semi.main(more)
    np.savez(slices, **{**arrays, "patient": np.array([f"other {who}" for who in arrays["patient"]])})
    with pytest.raises(SystemExit, match=r"5 new: labelled patient other .*, 5 gone: labelled patient"):
        train_semi.main(more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "a"], "come together"),
        (["--images", "a", "--labels", "b", "--unlabelled", "c"], "There is no .nii"),
        (["--images", "a", "--labels", "b", "--unlabelled", "./a"], "three folders"),
        *(
            (["--images", "a", "--labels", "b", "--unlabelled", "c", key, "2"], f"{key} has no effect beside --images")
            for key in ("--data", "--patients", "--slices")
        ),
        (
            ["--images", "a", "--labels", "b", "--unlabelled", "c", "--patch", "16", "16", "16", "--size", "9"],
            "--size has no effect",
        ),
        (["--patch", "16", "16", "16"], "folders of NIfTI files"),
        (["--lr", "0"], "more than 0"),
        (["--slices", "64"], "choose 1 to 63"),
        (["--patients", "2"], "one averaged brain"),
    ],
)
def test_wrong_options_are_explained(more, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_semi.main(options(tmp_path, *more))
    assert message in capsys.readouterr().err


def test_predictions_never_take_the_place_of_images(folders, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_semi.main(options(tmp_path / "others", *folders))
    assert "a folder of their own" in capsys.readouterr().err


def test_labels_for_all_leave_nothing_to_learn_from(slices, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_semi.main(options(tmp_path, "--data", str(slices)))
    assert "no image is left without a label" in capsys.readouterr().err
