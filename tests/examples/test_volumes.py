"""3D data, patches and sliding windows, and train_3d.py from end to end with a handful of steps."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_3d
from common.data import Case, SegmentationData, load_mni152
from common.experiment import Variant
from common.volumes import (
    PatchBatches,
    evaluate_volumes,
    fitting_patch,
    inverted_contrast,
    load_npz_volumes,
    load_volumes,
    predict_volume,
)
from models import Threshold

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")  # a few steps teach it nothing


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Five patients with two noisy volumes each, in which a bright box is to be found."""
    rng = np.random.default_rng(0)
    labels = np.zeros((10, 16, 24, 16), np.uint8)
    for label in labels:
        z, y, x = rng.integers(0, 8, 3)
        label[z : z + 8, y : y + 8, x : x + 8] = 1
    images = (labels * 120 + rng.integers(0, 100, labels.shape)).astype(np.uint8)
    path = tmp_path / "boxes.npz"
    spacing = np.tile([2.0, 1.0, 1.0], (10, 1))
    np.savez(path, images=images, labels=labels, patient=np.repeat(np.arange(5), 2), spacing=spacing)
    return path


def coded(*shapes: tuple[int, int, int]) -> SegmentationData:
    """Volumes whose first channel is the label and whose second numbers the voxels."""

    def case(index: int, shape: tuple[int, int, int]) -> Case:
        label = (np.random.default_rng(index).random(shape) < 0.01).astype(np.uint8)
        image = np.stack([label, np.arange(label.size).reshape(shape)]).astype(np.float32)
        return Case(f"case {index}", str(index), lambda: (image, label), (1.0, 1.0, 1.0))

    cases = [case(index, shape) for index, shape in enumerate(shapes)]
    return SegmentationData("coded", tuple(cases[:-1]), tuple(cases[-1:]), ("background", "dots"), 16)


# --- data


def test_the_template_s_volumes_are_the_slabs_of_the_2d_scripts():
    flat, data, both = load_mni152(), load_volumes(), load_volumes(contrasts=2)
    for part in ("train", "test"):
        for a, b, c in zip(getattr(flat, part), getattr(data, part), getattr(both, part), strict=True):
            (image, label), (one, same), (two, still) = a.read(), b.read(), c.read()
            assert np.array_equal(one, image[None])
            assert np.array_equal(two[0], image)
            assert np.array_equal(same, label)
            assert np.array_equal(still, label)
            assert b.spacing == c.spacing == (1.0, 2.0, 2.0)
            assert np.array_equal(two[1], c.read()[0][1]), "the same at every reading"


def test_the_second_contrast_is_inverted_with_noise_and_a_field_of_its_own_and_knows_the_image_alone():
    grid = np.meshgrid(*[np.linspace(-1, 1, 32)] * 3, indexing="ij")
    t1 = np.where(np.sum(np.square(grid), axis=0) < 0.8, 0.5 + 0.4 * np.sin(9 * grid[0]), 0).astype(np.float32)
    inside = t1 > 0
    a, b = inverted_contrast(t1, 1), inverted_contrast(t1, 2)
    assert a.dtype == np.float32
    assert (a[~inside] == 0).all()
    assert np.corrcoef(a[inside], t1[inside])[0, 1] < -0.8
    assert np.array_equal(a, inverted_contrast(t1, 1))
    field = a[inside] / (t1.max() - t1[inside] + 1e-6)
    other = b[inside] / (t1.max() - t1[inside] + 1e-6)
    bright = t1[inside] < 0.5  # where the noise counts little
    assert np.std(field[bright]) > 0.05
    assert np.corrcoef(field[bright], other[bright])[0, 1] < 0.95


def test_volumes_of_a_file_are_split_by_patient_and_have_channels(volumes):
    data = load_npz_volumes(volumes)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert not {case.group for case in data.train} & {case.group for case in data.test}
    image, label = data.train[0].read()
    assert (image.shape, label.shape, image.dtype) == ((1, 16, 24, 16), (16, 24, 16), np.float32)
    assert 0 <= image.min() < image.max() <= 1
    assert data.train[0].spacing == (2.0, 1.0, 1.0)
    assert len(load_npz_volumes(volumes, patients=2).train) == 4
    with np.load(volumes) as file:
        arrays = dict(file)
    del arrays["spacing"]
    np.savez(volumes, **{**arrays, "images": np.stack([arrays["images"]] * 3, 1)})
    case = load_npz_volumes(volumes).train[0]
    assert case.read()[0].shape == (3, 16, 24, 16)
    assert case.spacing is None


def test_wrong_files_are_explained(volumes):
    with np.load(volumes) as file:
        arrays = dict(file)
    for wrong, message in (
        ({"labels": arrays["labels"][:, :-1]}, r"labels \(N, D, H, W\)"),
        ({"images": arrays["images"][:, 0]}, r"images \(N, D, H, W\) or"),
        ({"patient": None}, "'patient'"),
        ({"labels": arrays["labels"] * 0.9}, r"boxes\.npz, volume 0 has values from 0 to 0\.9; labels are 0, 1"),
        ({"labels": arrays["labels"].astype(int) * 257}, r"volume 0 has values from 0 to 257"),
        ({"labels": arrays["labels"].astype(int) * -1}, r"volume 0 has values from -1 to 0"),
        ({"images": arrays["images"].astype(np.int16) - 1000}, r"boxes\.npz, volume 0: .* looks like raw intensities"),
        ({"images": np.where(arrays["images"] > 200, np.nan, 0)}, r"boxes\.npz, volume 0: .* NaN or infinite"),
    ):
        kept = {key: value for key, value in {**arrays, **wrong}.items() if value is not None}
        np.savez(volumes, **kept)
        with pytest.raises(ValueError, match=message):
            load_npz_volumes(volumes)
    with pytest.raises(ValueError, match="as a channel"):
        load_volumes(volumes, contrasts=2)
    with pytest.raises(ValueError, match="one averaged brain"):
        load_volumes(patients=3)


# --- patches


def test_a_patch_is_a_window_of_image_and_label_together():
    data = coded((20, 24, 30), (16, 16, 16), (16, 16, 16))
    batches = PatchBatches(data, (8, 16, 16), batch_size=4, seed=0)
    assert batches.steps_per_epoch == 1
    seen, flips = set(), set()
    for step in range(20):
        image, label = batches[step]
        assert (tuple(image.shape), tuple(label.shape)) == ((4, 2, 8, 16, 16), (4, 8, 16, 16))
        assert label.dtype == torch.int64
        assert torch.equal(image[:, 0], label.float())
        for number in image[:, 1]:
            steps = [int(number[1, 0, 0] - number[0, 0, 0]), int(number[0, 1, 0] - number[0, 0, 0])]
            steps.append(int(number[0, 0, 1] - number[0, 0, 0]))
            assert [abs(s) for s in steps] in ([24 * 30, 30, 1], [256, 16, 1])
            flips.add(tuple(s > 0 for s in steps))
            seen.add(float(number.min()))
    assert len(flips) == 8
    assert len(seen) > 20


def test_batches_depend_on_seed_and_step_alone_and_are_shared_by_processes():
    data = coded((20, 24, 30), (16, 16, 16), (16, 16, 16))
    batches, again = (PatchBatches(data, (8, 8, 8), 4, seed=3) for _ in range(2))
    later = again[5]
    for step, (image, label) in enumerate(batches.loader(7, start=5), 5):
        assert torch.equal(image, again[step][0])
        assert torch.equal(label, again[step][1])
    assert torch.equal(again[5][0], later[0])
    assert not torch.equal(PatchBatches(data, (8, 8, 8), 4, seed=4)[5][0], later[0])
    parts = [PatchBatches(data, (8, 8, 8), 4, 3, rank, 2)[5][0] for rank in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), later[0])
    with pytest.raises(ValueError, match="shared evenly"):
        PatchBatches(data, (8, 8, 8), 3, 3, 0, 2)


def test_half_of_the_patches_lie_around_foreground():
    label = np.zeros((8, 8, 200), np.uint8)
    label[4, 4, 100] = 1
    case = Case("dot", "0", lambda: (label[None].astype(np.float32), label))
    data = SegmentationData("dot", (case,), (Case("other", "1", case.read),), ("background", "dot"), 8)
    batches = PatchBatches(data, (8, 8, 8), 1, seed=0)
    hits = np.mean([float(batches[step][1].any()) for step in range(200)])
    assert 0.4 < hits < 0.65


def test_patches_of_unlabelled_volumes_do_not_depend_on_their_labels(volumes):
    def drawn() -> torch.Tensor:
        batches = PatchBatches(load_npz_volumes(volumes, patients=2).others, (8, 8, 8), 4, seed=0)
        return torch.stack([batches[step][0] for step in range(10)])

    with np.load(volumes) as file:
        arrays = dict(file)
    known = [case.group for case in load_npz_volumes(volumes, patients=2).train]
    before = drawn()
    arrays["labels"][~np.isin(arrays["patient"].astype(str), known)] = 0
    np.savez(volumes, **arrays)
    assert torch.equal(drawn(), before)


def test_volumes_smaller_than_a_patch_are_padded_with_background():
    image, label = PatchBatches(coded((5, 16, 9), (16, 16, 16)), (8, 16, 16), 1, seed=0)[0]
    inside = torch.zeros(8, 16, 16, dtype=torch.bool)
    inside[1:6, :, 3:12] = True
    flipped = [inside.flip(axes) for axes in ([], [0], [2], [0, 2])]
    assert any((label[0][~where] == 0).all() and (image[0][:, ~where] == 0).all() for where in flipped)
    assert image[0, 1].max() == 5 * 16 * 9 - 1
    assert fitting_patch(coded((5, 17, 130), (8, 8, 8)), 64) == (8, 16, 64)


# --- windows


@pytest.mark.parametrize("shape", [(16, 30, 41), (5, 16, 16)])
def test_sliding_windows_cover_the_volume_at_its_own_size(shape):
    model = Threshold().train()
    image = np.random.default_rng(0).random((1, *shape), np.float32)
    prediction = predict_volume(model, image, (8, 16, 16))
    assert np.array_equal(prediction, image[0] > 0.5)
    assert {sizes[2:] for sizes in model.seen} == {(8, 16, 16)}
    assert model.training


def test_scores_are_in_3d_and_in_millimetres(volumes):
    data = load_npz_volumes(volumes)

    class Off(nn.Module):
        """The box, one slice too high: the slices are 2 mm apart."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            inside = (nn.functional.avg_pool3d(image, 3, 1, 1) > 0.45).float().roll(1, 2)
            return torch.cat([0.5 - inside, inside - 0.5], 1) * self.scale

    scores = evaluate_volumes(Off(), data, (16, 24, 16))
    assert len(scores) == 2
    for score in scores:
        assert score.unit == "mm"
        assert score.hd95[0] is not None
        assert 2.0 <= score.hd95[0] < 4.0


# --- the script


def options(volumes: Path, out: str, *more: str) -> list[str]:
    short = ["--steps", "6", "--recon-steps", "4", "--save-every", "2", "--device", "cpu", "--patch", "8", "16", "16"]
    return ["--small", "--data", str(volumes), *short, "--out", str(volumes.parent / out), *more]


def test_the_script_trains_tests_and_goes_on_after_a_kill(volumes, monkeypatch, capsys):
    runs = ["--runs", "bare,reseg+deep", "--network", "unet", "--weight", "1"]
    train_3d.main(options(volumes, "whole", *runs))
    assert "DSC class 1" in capsys.readouterr().out
    whole = {name: json.loads((volumes.parent / "whole" / f"{name}.json").read_text()) for name in train_3d.RUNS[::3]}
    assert whole["bare"]["volumes"] != whole["reseg+deep"]["volumes"]
    assert whole["bare"]["unit"] == "mm"

    original = PatchBatches.__getitem__
    seen: list[int] = []

    def killed(self: Any, step: int) -> Any:
        seen.append(step)
        if len(seen) == 17:  # in the second run's second stage
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PatchBatches, "__getitem__", killed)
        with pytest.raises(KeyboardInterrupt):
            train_3d.main(options(volumes, "cut", *runs))
    state = torch.load(volumes.parent / "cut" / "reseg+deep.pt", weights_only=True)
    assert 0 < len(state["run"]["losses"]) < 6
    train_3d.main(options(volumes, "cut", *runs))
    for name in whole:
        ours, theirs = (
            torch.load(volumes.parent / folder / f"{name}.pt", weights_only=True) for folder in ("cut", "whole")
        )
        assert ours["run"]["losses"] == theirs["run"]["losses"]
        assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    with pytest.raises(SystemExit, match="other options"):
        train_3d.main(options(volumes, "cut", *runs[:-2]))


def test_stage_1_of_another_seed_or_of_unknown_origin_is_not_used(volumes, monkeypatch):
    """Its teacher may have seen what are test patients now."""
    file = volumes.parent / "out" / "stage1.pt"

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("common.experiment.train", killed)
        with pytest.raises(KeyboardInterrupt):
            train_3d.main(options(volumes, "out", "--runs", "reseg"))
    with pytest.raises(SystemExit, match=r"stage1\.pt is of a run with other options .*seed 0, now 1"):
        train_3d.main(options(volumes, "out", "--runs", "reseg", "--seed", "1"))
    note = file.with_suffix(".json").rename(file.with_suffix(".moved"))
    with pytest.raises(SystemExit, match=r"stage1\.pt has no stage1\.json beside it"):
        train_3d.main(options(volumes, "out", "--runs", "reseg"))
    note.rename(file.with_suffix(".json"))
    before = file.read_bytes()
    train_3d.main(options(volumes, "out", "--runs", "reseg,reseg+deep", "--weight", "1"))  # both share it
    assert file.read_bytes() == before


def test_a_run_is_not_resumed_with_another_patch_network_or_contrast(volumes):
    train_3d.main(options(volumes, "out", "--runs", "bare"))
    for more, told in (
        (["--patch", "8", "8", "16"], r"patch \[8, 16, 16\], now"),
        (["--network", "unet"], "network dynunet"),
    ):
        with pytest.raises(SystemExit, match=rf"bare\.pt is of a run with other options .*{told}"):
            train_3d.main(options(volumes, "out", "--runs", "bare", *more))
    made = []
    for contrasts in ("1", "2"):
        out = str(volumes.parent / "template")
        args = train_3d.parse_arguments(["--small", "--contrasts", contrasts, "--patch", "8", "8", "8", "--out", out])
        made.append(train_3d.prepare(args, torch.device("cpu")).options(Variant("bare")))
    assert [key for key, value in made[0].items() if made[1][key] != value] == ["contrasts"]


def test_two_channels_reach_the_teacher(volumes):
    with np.load(volumes) as file:
        arrays = dict(file)
    np.savez(volumes, **{**arrays, "images": np.stack([arrays["images"], 255 - arrays["images"]], 1)})
    train_3d.main(options(volumes, "out", "--runs", "reseg"))
    state = torch.load(volumes.parent / "out" / "reseg.pt", weights_only=True)
    assert state["reseg"]["parts"]["image_channels"] == 2
    assert state["reseg"]["calls"] == 6


def test_unlabelled_volumes_are_learnt_from(volumes, capsys):
    train_3d.main(options(volumes, "out", "--patients", "2", "--unlabelled", "--runs", "semi"))
    assert "semi" in capsys.readouterr().out
    state = torch.load(volumes.parent / "out" / "semi.pt", weights_only=True)
    assert state["semi"]["calls"] == 6
    assert list(state["average"]) == list(state["model"])


def test_one_slab_of_the_template_keeps_its_labels():
    args = train_3d.parse_arguments(["--small", "--unlabelled"])
    assert args.runs == ["bare", "deep", "semi"]
    assert (len(args.dataset.train), len(args.dataset.unlabelled)) == (1, 3)
    assert {case.name for case in (*args.dataset.train, *args.dataset.unlabelled)} == {
        case.name for case in load_volumes().train
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--runs", "bare,both"], "'both' is none of"),
        (["--patch", "8", "12", "8"], "multiples of 8"),
        (["--contrasts", "2"], "as a channel"),
        (["--patients", "9"], "9 patients were asked for"),
        (["--unlabelled"], "no image is left without a label"),
        (["--lr", "0"], "more than 0"),
        (["--runs", "bare,deep", "--weight", "5"], "--weight: only runs with reseg"),
        (["--runs", "bare,semi"], "needs --unlabelled"),
    ],
)
def test_wrong_options_are_explained(volumes, more, message, capsys):
    with pytest.raises(SystemExit):
        train_3d.main(options(volumes, "out", *more))
    assert message in capsys.readouterr().err


def test_the_benchmark_writes_every_row(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("volumes")
    options = ["--patches", "16", "--filters", "4", "8", "16", "32", "--batch", "1", "--steps", "2", "--warmup", "1"]
    monkeypatch.setattr(sys, "argv", ["volumes.py", *options, "--out", str(tmp_path / "volumes.json")])
    benchmark.main()
    written = json.loads((tmp_path / "volumes.json").read_text())
    assert [result["row"] for result in written["results"]] == list(benchmark.ROWS)
    assert written["results"][0]["ratio"] == 1
    assert written["about"]["torch"] == torch.__version__
