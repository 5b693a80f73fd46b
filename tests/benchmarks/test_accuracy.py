"""The accuracy benchmark: splits, batches, metrics, resuming, the report, and small runs from end to end."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter, rotate, zoom
from scipy.stats import ttest_rel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import accuracy, accuracy_report
from benchmarks.accuracy_report import BESIDE, field_figure, figure, paired, report, resampled, select
from benchmarks.evidence.batches import Augmentation, Feed, augment, draw
from benchmarks.evidence.compiler import compiler_settings
from benchmarks.evidence.copy_paste import pasted
from benchmarks.evidence.data import Slices, load, load_native, rows, split
from benchmarks.evidence.field import FieldFeed, Native, draw_turns, zoomed
from benchmarks.evidence.field_unet import FieldUNet
from benchmarks.evidence.harness import (
    Machine,
    OutOfTimeError,
    Pause,
    Settings,
    Stage1,
    Stage2,
    initial_weights,
    reset_teacher,
    schedule,
)
from benchmarks.evidence.losses import entropy, segmentation_loss
from benchmarks.evidence.metrics import score
from benchmarks.evidence.mixing import SizedBoxes, Turned, blur_and_contrast, blurred, mixing_of, sized_boxes, turned
from benchmarks.evidence.pack import pack
from benchmarks.evidence.plan import Plan, read_plan
from benchmarks.evidence.results import append, finished, read_lines
from benchmarks.evidence.synapse import TEST, load_synapse
from benchmarks.evidence.variants import CATALOGUE, REMOVED, from_plan
from benchmarks.released_code import task_loss as released_loss
from examples.backbones.unet import UNet
from examples.common.metrics import score_volume, summarize
from reseg_loss import consistency, semi
from reseg_loss.alignment import wrapper
from reseg_loss.common import inputs
from reseg_loss.mixing import boxes

ROOT = Path(__file__).parents[2]

SETTINGS = Settings(steps=3, stage1_steps=2, batch=2, size=32, width=2)
FIELD = replace(SETTINGS, model="field_unet", protocol="ssl4mis", others=4)
IN_3D = replace(SETTINGS, model="unet_3d", augmentation="strong")
SHAPE = (16, 48, 32)  # of the volumes in conftest.py


@pytest.fixture(scope="module")
def hippocampus(folder: Path) -> Slices:
    return load(folder / "hippocampus.npz")


def plan_of(**changes: object) -> Plan:
    variants = tuple(CATALOGUE[name] for name in ("bare", "ds x2"))
    base = Plan("trial", "which?", "the higher", "acdc", 5, (0, 1), "test", variants, SETTINGS, ("test",))
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def run(plan: Plan, folder: Path, out: Path, seconds: float = 1e6, machine: Machine | None = None) -> bool:
    deadline = accuracy.time.monotonic() + seconds
    return accuracy.run_plan(plan, folder, out, machine or Machine.make(), {}, deadline)


# --- data


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("patients", [5, 15, 70])
def test_acdc_splits_every_pathology_group_alike_and_no_patient_is_in_two_parts(acdc, seed, patients):
    parts = split(acdc, patients, seed)
    everyone = [*parts.labelled, *parts.unlabelled, *parts.validation, *parts.test]
    assert sorted(everyone) == list(range(1, 101))
    for group in range(5):
        members = range(20 * group + 1, 20 * group + 21)
        counts = [len(set(members) & set(p)) for p in (parts.test, parts.validation, parts.labelled)]
        assert counts == [4, 2, patients // 5]


def test_fewer_patients_are_a_part_of_more_and_seeds_differ(acdc):
    few, more, other = split(acdc, 5, 0), split(acdc, 15, 0), split(acdc, 5, 1)
    assert few.labelled == more.labelled[:5]
    assert few.test == more.test
    assert few.test != other.test
    assert few.labelled != other.labelled


def test_sunnybrook_keeps_its_own_test_set_and_separates_the_phases(folder):
    data = load(folder / "sunnybrook.npz")
    parts = split(data, 5, 0)
    assert parts.test == tuple(range(2, 45, 3))
    assert not set(parts.test) & {*parts.labelled, *parts.unlabelled}
    assert len(parts.labelled) + len(parts.unlabelled) == 30
    assert {data.stratum[p] for p in parts.labelled} == {"SC-N", "SC-HYP"}
    assert len(np.unique(data.volume)) == 90


def test_the_hippocampus_has_a_volume_per_patient_and_no_strata(hippocampus):
    few, more, other = split(hippocampus, 5, 0), split(hippocampus, 15, 0), split(hippocampus, 5, 1)
    assert [len(p) for p in (few.labelled, few.unlabelled, few.validation, few.test)] == [5, 177, 26, 52]
    assert sorted([*few.labelled, *few.unlabelled, *few.validation, *few.test]) == list(range(1, 261))
    assert few.labelled == more.labelled[:5]
    assert few.test == more.test != other.test
    assert len(np.unique(hippocampus.volume)) == 260


def test_slices_of_a_volume_are_neighbours_in_order(tmp_path, acdc):
    shuffled = np.random.default_rng(0).permutation(len(acdc.patient))
    keys = np.arange(len(shuffled))
    images = np.broadcast_to(keys[:, None, None], (len(keys), 2, 2)).astype(np.uint8)
    patient, phase, position = (a.ravel() for a in np.meshgrid(range(1, 101), [0, 1], [0, 1], indexing="ij"))
    arrays = {"images": images, "labels": images, "patient": patient, "phase": phase, "slice": position}
    np.savez(tmp_path / "acdc.npz", **{name: array[shuffled] for name, array in arrays.items()})
    data = load(tmp_path / "acdc.npz")
    assert (data.images == images).all()
    assert (data.volume == keys // 2).all()


def test_too_many_patients_are_refused(acdc):
    with pytest.raises(ValueError, match="70 patients to train on, not 71"):
        split(acdc, 71, 0)


def test_packing_changes_nothing_but_the_size_of_the_file(folder, tmp_path, acdc):
    pack(folder / "acdc.npz", tmp_path / "acdc.npz")
    again = load(tmp_path / "acdc.npz")
    assert (again.images == acdc.images).all()
    assert (again.labels == acdc.labels).all()
    pack(folder / "acdc.npz", tmp_path / "small.npz", size=16, bits=6)
    small = load(tmp_path / "small.npz")
    assert small.images.shape == (400, 16, 16)
    mean = acdc.images.reshape(400, 16, 2, 16, 2).astype(float).mean((2, 4))
    assert np.abs(small.images - mean).max() <= 2.5
    assert set(np.unique(small.images % 4)) <= {0, 3}  # 3 is 255


def test_packing_keeps_millimetres_and_refuses_what_it_would_destroy(tmp_path):
    image = np.zeros((3, 32, 64), np.uint8)
    arrays = {"images": image, "labels": image, "spacing": np.array([[10.0, 2.0, 1.0]] * 3)}
    np.savez(tmp_path / "whole.npz", **arrays)
    pack(tmp_path / "whole.npz", tmp_path / "small.npz", size=16)
    with np.load(tmp_path / "small.npz") as small:
        assert small["spacing"].tolist() == [[10.0, 4.0, 4.0]] * 3
    np.savez(tmp_path / "whole.npz", **{**arrays, "images": image / 255})
    for smaller in ({"size": 16}, {"bits": 7}):
        with pytest.raises(ValueError, match=r"whole\.npz: images are float64, and only uint8 can be made smaller"):
            pack(tmp_path / "whole.npz", tmp_path / "small.npz", **smaller)


@pytest.mark.parametrize("file", ["acdc.npz", "hippocampus.npz"])
def test_files_that_would_be_misread_are_refused(file, folder, tmp_path):
    with np.load(folder / file) as original:
        arrays = dict(original)
    np.savez(tmp_path / file, **{**arrays, "images": arrays["images"] / 255})
    with pytest.raises(ValueError, match=r"images are float64, and must be uint8"):
        load(tmp_path / file)
    np.savez(tmp_path / file, **{key: np.concatenate([value, value[:1]]) for key, value in arrays.items()})
    with pytest.raises(ValueError, match="two images are of the same patient, phase and slice"):
        load(tmp_path / file)


def test_native_slices_are_resized_and_their_labels_kept(folder, native):
    data = load_native(folder / "acdc_native.npz", 32)
    assert data.native is not None
    order = [4 * p + i for p in range(100) for i in (3, 2, 1, 0)]  # by phase, then by position
    for where, (image, label, kept) in enumerate(zip(data.images, data.labels, data.native)):
        original, truth = native[order[where]]
        assert (kept == truth).all()
        nearest = [((np.arange(32) + 0.5) * side / 32).astype(int) for side in truth.shape]
        assert (label == truth[np.ix_(*nearest)]).all()
        assert abs(image.mean() / 2.55 - original.mean()) < 1
    assert (data.patient == np.repeat(range(1, 101), 4)).all()
    assert (data.volume == np.arange(400) // 2).all()
    same = load_native(folder / "acdc_native.npz", 36)
    wide = np.flatnonzero(np.isin(same.patient, [1 + 15 * k for k in range(7)]))  # 28 x 36
    assert all(same.native is not None and same.native[i].shape == (28, 36) for i in wide)
    columns = same.images[wide].astype(float).mean(1) / 2.55
    assert np.abs(columns - [native[order[i]][0].mean(0) for i in wide]).max() < 1.5


def test_a_damaged_native_file_is_refused(folder, native, tmp_path):
    with np.load(folder / "acdc_native.npz") as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(tmp_path / "turned.npz", **{**arrays, "height": arrays["width"], "width": arrays["height"]})
    with pytest.raises(ValueError, match=r"slice \d+ is \(.*, and its label"):
        load_native(tmp_path / "turned.npz", 32)


@pytest.mark.parametrize(("patients", "labelled"), [(1, [99]), (3, [38, 50, 99]), (7, [21, 38, 49, 50, 58, 99, 100])])
def test_the_fields_split_is_one_for_every_seed(folder, native, patients, labelled):
    data = load_native(folder / "acdc_native.npz", 16)
    parts, every = split(data, patients, 0), split(data, 70, 3)
    assert parts == split(data, patients, 1)
    assert list(parts.labelled) == labelled
    assert parts.test == every.test == (*range(11, 21), *range(71, 81))
    assert parts.validation == every.validation == tuple(range(1, 11))
    assert sorted(parts.labelled + parts.unlabelled) == list(every.labelled)
    everyone = every.labelled + every.validation + every.test
    assert sorted(everyone) == list(range(1, 101))
    assert not every.unlabelled
    with pytest.raises(ValueError, match="choices of 1, 3, 7, 70 labelled patients, not of 5"):
        split(data, 5, 0)


def test_other_labelled_patients_are_drawn_from_those_for_training(folder, native, acdc):
    data = load_native(folder / "acdc_native.npz", 16)
    field, draws = split(data, 3, 0), [split(data, 3, seed, drawn=True) for seed in range(20)]
    assert draws[4] == split(data, 3, 4, drawn=True)
    assert len({draw.labelled for draw in draws}) == 20
    for few, more in zip(draws, (split(data, 7, seed, drawn=True) for seed in range(20))):
        assert (few.validation, few.test) == (field.validation, field.test)
        assert sorted(few.labelled + few.unlabelled) == sorted(field.labelled + field.unlabelled)
        assert (len(set(few.labelled)), set(few.labelled) <= set(more.labelled)) == (3, True)
    with pytest.raises(ValueError, match="acdc has no labelled patients of the field's"):
        split(acdc, 5, 0, drawn=True)


# --- the field's protocol


SHAPES = [(154, 224), (224, 154), (174, 208), (256, 216), (256, 256), (512, 428), (31, 20)]


def by_scipy(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Order 0; by default scipy fills some last lines with 0, whose positions are rounded to beyond the edge."""
    return zoom(image, np.array(shape) / image.shape, order=0, mode="nearest")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [32, 224, 256])
def test_the_zoom_is_scipys_of_order_0(shape, side):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    there = by_scipy(image, (side, side))
    assert (zoomed(image, (side, side)) == there).all()
    assert (zoomed(there[None], shape)[0] == by_scipy(there, shape)).all()
    if side == 256:  # the field's, by default
        assert (there == zoom(image, np.array([side, side]) / shape, order=0)).all()


def by_hand(image: np.ndarray, turn: np.ndarray, side: int) -> np.ndarray:
    """What the field's loader makes of a slice, by the steps that have this matrix: all are tried."""
    once, flips = np.array([[0, 1], [-1, 0]]), (np.diag([-1, 1]), np.diag([1, -1]))
    found = [
        np.flip(np.rot90(image, k), axis)
        for k in range(4)
        for axis, flip in enumerate(flips)
        if (np.linalg.matrix_power(once, k) @ flip == turn).all()
    ]
    if not found:
        angle = round(np.rad2deg(np.arctan2(turn[0, 1], turn[0, 0])))
        assert -20 <= angle <= 19
        found = [rotate(image, angle, order=0, reshape=False)]
    zooms = [by_scipy(each, (side, side)) for each in found]
    assert all((each == zooms[0]).all() for each in zooms)
    return zooms[0]


@pytest.mark.parametrize("side", [32, 256])
def test_slices_are_turned_as_they_are_and_zoomed_then(side):
    rng = np.random.default_rng(side)
    images, labels = ([rng.integers(0, high, shape).astype(np.uint8) for shape in SHAPES] for high in (256, 4))
    native = Native.of(images, labels, torch.device("cpu"))
    index, turns = rng.integers(0, len(SHAPES), 60), draw_turns(60, rng)
    image, label = native.turned(torch.from_numpy(index), torch.from_numpy(turns), side)
    for i, turn, ours, classes in zip(index, turns, image[:, 0].numpy(), label.numpy()):
        assert np.abs(255 * ours - by_hand(images[i], turn, side)).max() < 1e-3
        assert (classes == by_hand(labels[i], turn, side)).all()


def test_half_are_quarter_turns_with_a_flip_and_half_of_the_rest_small_whole_angles():
    turns = draw_turns(8000, np.random.default_rng(0))
    determinant = np.linalg.det(turns)
    assert np.abs(np.abs(determinant) - 1).max() < 1e-9
    flipped = determinant < 0
    assert abs(flipped.mean() - 0.5) < 0.02
    assert len(np.unique(turns[flipped], axis=0)) == 4, "of the 8 pairs of a turn and a flip two each are the same"
    angle = np.rad2deg(np.arctan2(turns[~flipped][:, 0, 1], turns[~flipped][:, 0, 0]))
    assert np.abs(angle - angle.round()).max() < 1e-9
    assert abs((angle == 0).mean() - (0.5 + 0.5 / 40)) < 0.02
    assert sorted(set(angle.round().astype(int).tolist())) == list(range(-20, 20))
    assert (turns[:100] == draw_turns(100, np.random.default_rng(0))).all(), "fewer are the beginning of more"


def test_the_fields_network_is_the_one_of_its_description():
    network = FieldUNet(4)
    assert sum(p.numel() for p in network.parameters()) == 1_813_764
    kinds = [type(module) for module in network.modules()]
    assert [m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)] == [0.05, 0.1, 0.2, 0.3, 0.5]
    assert kinds.count(torch.nn.BatchNorm2d) == kinds.count(torch.nn.LeakyReLU) == 18
    sizes = []
    for module in (*network.encoder, network.bottleneck, *network.decoder):
        module.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[1:])))
    assert network(torch.zeros(2, 1, 48, 32)).shape == (2, 4, 48, 32)
    down = [(16 << level, 48 >> level, 32 >> level) for level in range(5)]
    assert sizes == down + down[-2::-1]


def test_the_fields_batches_come_from_the_slices_as_they_are(folder, native):
    data = load_native(folder / "acdc_native.npz", 32, order_0=True)
    assert data.native is not None
    assert data.native_images is not None
    assert all((image == zoomed(whole, (32, 32))).all() for image, whole in zip(data.images, data.native_images))
    pixels = Native.of(data.native_images, data.native, torch.device("cpu"))
    squares = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    feed = FieldFeed(pixels, *squares, 3, 2, "published", torch.device("cpu"), 5)
    parts = split(data, 3, 0)
    feed.load(rows(data, parts.labelled), rows(data, parts.unlabelled), 7)
    for tables, size, who in ((feed.labelled, 2, parts.labelled), (feed.others, 5, parts.unlabelled)):
        image, label, row = feed.batch_of(tables, torch.tensor([1]))
        assert image.shape == (size, 1, 32, 32)
        assert set(data.patient[row.index]) <= set(who)
        for i, turn, ours, classes in zip(row.index.tolist(), row.theta.numpy(), image[:, 0].numpy(), label.numpy()):
            assert np.abs(255 * ours - by_hand(data.native_images[i], turn, 32)).max() < 1e-3
            assert (classes == by_hand(data.native[i], turn, 32)).all()
    with pytest.raises(ValueError, match="the published augmentation alone, not 'strong'"):
        FieldFeed(pixels, *squares, 3, 2, "strong", torch.device("cpu"))


@pytest.mark.parametrize(("augmentation", "drawn"), [("published", False), ("strong", True)])
def test_the_fields_protocol_from_end_to_end(augmentation, drawn, folder, native, tmp_path):
    out, semi = tmp_path / "results.jsonl", CATALOGUE["ds equal + deep cutmix"]
    wide = replace(semi, name="wide", mixing={"sides": [0.25, 0.7], "perturb": "blur and contrast"}, batch=2.0)
    joint = replace(semi, name="joint", mixing={"joint": "averaged buffers"})
    other = replace(semi, name="turned", mixing={"turned": True})
    variants, settings = (CATALOGUE["bare"], semi, wide, joint, other), replace(FIELD, augmentation=augmentation)
    plan = plan_of(data="acdc_native", patients=3, seeds=(5,), variants=variants, settings=settings, drawn=drawn)
    assert accuracy.run_plan(plan, folder, out, Machine.make(), {}, float("inf"), None, tmp_path / "kept")
    lines = read_lines(out)
    assert not [line["error"] for line in lines if "error" in line]
    data = load_native(folder / "acdc_native.npz", 32, order_0=True)
    assert data.native is not None
    for line in lines:
        assert line.get("labelled") == (list(split(data, 3, 5, drawn=True).labelled) if drawn else None)
        averages = line["variant"] != "bare"
        assert set(line["scores"]) == {"test", "test, mean teacher"} if averages else {"test"}
    chosen = rows(data, split(data, 3, 5, drawn).test)
    with np.load(tmp_path / "kept" / "trial_5_bare_test.npz") as file:
        predicted = file["prediction"]
    natives = [data.native[i] for i in chosen]
    back = [by_scipy(p, t.shape) for p, t in zip(predicted, natives)]
    volume, scores = data.volume[chosen], lines[0]["scores"]["test"]
    for number, which in enumerate(np.unique(volume)):
        where = np.flatnonzero(volume == which)
        a, b = (np.stack([stack[i] for i in where]) for stack in (back, natives))
        for c in range(1, 4):
            assert scores["each_dsc"][c - 1][number] == pytest.approx(
                2 * ((a == c) & (b == c)).sum() / ((a == c).sum() + (b == c).sum())
            )


def test_the_fields_protocol_is_one_of_its_data(folder):
    with pytest.raises(ValueError, match="the protocol ssl4mis is one of acdc_native, not of acdc"):
        accuracy.Session(plan_of(settings=FIELD), folder, Machine.make(), {})


def test_a_variant_may_have_more_images_a_step_from_the_same_patients(folder, native):
    semi = replace(CATALOGUE["ds equal + deep cutmix"], name="twice", batch=2.0)
    plan = plan_of(data="acdc_native", patients=3, variants=(CATALOGUE["bare"], semi), settings=FIELD)
    session = accuracy.Session(plan, folder, Machine.make(), {})
    session.begin(0)
    feeds = [session.step_of(variant).feed for variant in plan.variants]
    sizes = [[tables.index.shape[1] for tables in (f.labelled, f.others, f.again)] for f in feeds]
    assert sizes == [[2, 4, 2], [4, 8, 4]]
    assert session.parts is not None
    where = rows(session.data, session.parts.unlabelled)
    assert np.isin(feeds[1].others.index.numpy(), where).all()


def test_boxes_of_other_sizes():
    torch.manual_seed(0)
    box = sized_boxes(torch.zeros(500, 1, 64, 96), (0.25, 0.7))
    height, width = box.any(2).sum(1), box.any(1).sum(1)
    assert torch.equal(box.sum((1, 2)), height * width), "they are boxes"
    assert (height / 64 - width / 96).abs().max() < 0.03
    assert 0.24 < (height / 64).min() < 0.28
    assert 0.66 < (height / 64).max() < 0.71
    assert (height / 64).mean().item() == pytest.approx(0.475, abs=0.02)
    first = box.any(2).float().argmax(1)
    assert (first + height).max() == 64
    assert first.min() == 0


def test_the_blur_is_a_gaussian():
    x = torch.rand(3, 1, 24, 20, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.8, 2.0])
    ours = blurred(x, sigma)
    for image, s, smooth in zip(x[:, 0].double().numpy(), sigma.tolist(), ours[:, 0].numpy()):
        assert np.abs(smooth - gaussian_filter(image, s, mode="mirror", radius=6)).max() < 1e-5
    torch.manual_seed(0)
    many = torch.rand(1, 1, 24, 20).expand(400, 1, 24, 20)
    changed = (blur_and_contrast(many) - many).abs().flatten(1).amax(1) > 0.01
    assert abs(changed.float().mean() - (1 - 0.2 * 0.5)) < 0.06
    assert blur_and_contrast(many).dtype == many.dtype


def test_what_the_student_sees_is_turned_with_its_label():
    torch.manual_seed(0)
    x, u = torch.rand(8, 2, 5, 5), torch.cartesian_prod(*[torch.tensor([False, True])] * 3)
    for image, label, (across, down, transposed), before in zip(turned(x, u), turned(x[:, 0], u), u.tolist(), x):
        expected = np.flip(before.numpy(), [axis for axis, does in ((2, across), (1, down)) if does])
        expected = expected.swapaxes(1, 2) if transposed else expected
        assert np.array_equal(image.numpy(), expected)
        assert np.array_equal(label.numpy(), expected[0])


def test_what_is_other_about_cutmix_is_passed_on():
    kind, keywords = mixing_of({"sides": [0.1, 0.7], "perturb": "none", "decay": 0.9})
    assert kind is SizedBoxes
    assert keywords == {"sides": [0.1, 0.7], "perturb": None, "decay": 0.9}
    assert mixing_of(None)[1] == {}
    assert mixing_of({"turned": True}) == (Turned, {})
    with pytest.raises(ValueError, match="mixing is an option of unlabelled='cutmix'"):
        replace(CATALOGUE["bare"], mixing={})


# --- Synapse


CASES = [*sorted(TEST), 5, 6, 7]


@pytest.fixture(scope="module")
def synapse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also as TransUNet has it, in the folder Synapse: 15 patients of 3 slices of 40x40, two organs each."""
    folder, rng = tmp_path_factory.mktemp("synapse"), np.random.default_rng(2)
    (folder / "Synapse/train_npz").mkdir(parents=True)
    (folder / "Synapse/test_vol_h5").mkdir()
    stacks = {}
    for who in CASES:
        labels = np.zeros((3, 40, 40), np.uint8)
        labels[:, 4:18, 6:30] = 1 + who % 4
        labels[1:, 22:36, who % 7 : who % 7 + 12] = 5 + who % 4
        images = (25 * labels + rng.integers(0, 50, labels.shape)).astype(np.uint8)
        stacks[who] = images, labels
        scaled = {"image": (images / 255).astype(np.float32), "label": labels.astype(np.float32)}
        if who in TEST:
            with h5py.File(folder / f"Synapse/test_vol_h5/case{who:04}.npy.h5", "w") as file:
                for name, array in scaled.items():
                    file[name] = array
            continue
        for i in range(3):
            one = {name: array[i] for name, array in scaled.items()}
            np.savez(folder / f"Synapse/train_npz/case{who:04}_slice{i:03}.npz", **one)
    order = rng.permutation(3 * len(CASES))
    images, labels = (np.concatenate([stack[i] for stack in stacks.values()])[order] for i in range(2))
    patient, position = np.repeat(CASES, 3)[order], np.tile(range(3), len(CASES))[order]
    np.savez(folder / "plain.npz", images=images, labels=labels, patient=patient, slice=position)
    np.savez(
        folder / "synapse.npz",
        **{"images": images, "labels": labels, "patient": patient, "slice": position, "spacing": [3.0, 0.7, 0.8]},
    )
    return folder


def test_synapse_is_read_from_transunets_files_or_from_one(synapse):
    files, one = load_synapse(synapse / "Synapse", 32), load_synapse(synapse / "plain.npz", 32)
    for name in ("images", "labels", "patient", "volume"):
        assert (getattr(files, name) == getattr(one, name)).all(), name
    for data in (files, one):
        assert data.spacing is None
        assert data.images.shape == data.labels.shape == (45, 32, 32)
        assert data.native is not None
        assert [label.shape[0] for label in data.native] == [40 if p in TEST else 32 for p in data.patient]
        assert (data.volume == np.arange(45) // 3).all()
        parts = split(data, 2, 0)
        assert parts.test == tuple(sorted(TEST))
        assert sorted(parts.labelled + parts.unlabelled) == [5, 6, 7]
        assert not parts.validation
    with np.load(synapse / "plain.npz") as file:
        where = np.flatnonzero((file["patient"] == 8) & (file["slice"] == 1))[0]
        assert files.native is not None
        assert (files.native[np.flatnonzero(files.patient == 8)[1]] == file["labels"][where]).all()


def test_synapse_is_scored_per_organ_and_in_mm_where_the_spacing_is_known(synapse, tmp_path):
    plan = plan_of(data="synapse", patients=3, seeds=(0,), variants=(CATALOGUE["paper"],))
    assert accuracy.run_plan(plan, synapse, tmp_path / "mm", Machine.make(), {}, math.inf, None, tmp_path / "kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/Synapse").symlink_to(synapse / "Synapse")
    assert run(plan, tmp_path / "folder", tmp_path / "pixels")
    (line,), (plain,) = (read_lines(tmp_path / name) for name in ("mm", "pixels"))
    scores, without = (each["scores"]["test"] for each in (line, plain))
    assert (scores["distances"], scores["patients"]) == ("mm", sorted(TEST))
    assert scores["classes"][0] == "aorta"
    assert (len(scores["dsc"]), scores["volumes"]) == (8, 12)
    assert "distances" not in without
    assert without["each_dsc"] == scores["each_dsc"]
    assert without["hd95"] != scores["hd95"]
    assert "DSC / HD95 (mm)" in report(select(plan, [line], "test"))
    assert "DSC / HD95 (pixels)" in report(select(plan, [plain], "test"))
    (path,) = (tmp_path / "kept").iterdir()
    data = load_synapse(synapse / "synapse.npz", 32)
    assert data.native is not None
    truth = np.stack([data.native[i] for i in rows(data, tuple(TEST))])
    at = ((np.arange(40) + 0.5) * 32 / 40).astype(int)
    with np.load(path) as file:
        predicted = file["prediction"][:, at][:, :, at]
    for number in range(12):
        where = slice(3 * number, 3 * number + 3)
        alone = score_volume("", predicted[where], truth[where], 9, (3.0, 0.7, 0.8))
        ours = [column[number] for column in scores["each_hd95"]]
        assert [v is None for v in ours] == [v is None for v in alone.hd95]
        assert [v for v in ours if v is not None] == pytest.approx([v for v in alone.hd95 if v is not None], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"labels": a["labels"] + 1}, "labels .* up to 9"),
        (lambda a: {"images": a["images"].astype(np.float32)}, "images from 0 to .*; they are uint8, or"),
        (lambda a: {"patient": np.where(a["patient"] == 8, 9, a["patient"])}, "it needs the test patients"),
        (lambda a: {"spacing": np.arange(135).reshape(45, 3)}, "the spacing differs between the slices of patient 1;"),
    ],
)
def test_a_file_that_is_not_synapse_is_refused(change, message, synapse, tmp_path):
    with np.load(synapse / "plain.npz") as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(tmp_path / "synapse.npz", **{**arrays, **change(arrays)})
    with pytest.raises(ValueError, match=message):
        load_synapse(tmp_path / "synapse.npz", 32)


def test_a_spacing_of_some_test_patients_alone_is_refused(synapse, tmp_path):
    copied = shutil.copytree(synapse / "Synapse", tmp_path / "Synapse")
    (copied / "spacing.json").write_text(json.dumps({f"case{who:04}": [3, 0.7, 0.8] for who in sorted(TEST)[1:]}))
    with pytest.raises(ValueError, match=r"no spacing of the test patients \[1\]"):
        load_synapse(copied, 32)
    (copied / "spacing.json").write_text(json.dumps({f"case{who:04}": [3, 0.7, 0.8] for who in TEST}))
    data = load_synapse(copied, 32)
    assert data.spacing is not None
    assert {data.patient[data.volume == volume][0] for volume in data.spacing} == TEST


# --- batches


def test_batches_depend_on_the_seed_alone_and_fewer_steps_are_the_beginning_of_more():
    where = np.array([3, 5, 8, 13, 21])
    long, short = (draw(where, steps, 4, 7, 0, "published") for steps in (10, 6))
    for name in ("index", "theta", "tone"):
        assert torch.equal(getattr(long, name)[:6], getattr(short, name))
    assert not torch.equal(long.index, draw(where, 10, 4, 8, 0, "published").index)
    epochs = long.index.view(-1)[:40].view(8, 5)
    assert (epochs.sort().values == torch.from_numpy(where)).all()


def test_published_augmentation_is_turns_with_a_flip_small_rotations_or_nothing():
    theta = draw(np.arange(9), 500, 8, 0, 0, "published").theta.view(-1, 2, 3)
    assert (theta[:, :, 2] == 0).all()
    square = theta[:, :, :2]
    determinant = square[:, 0, 0] * square[:, 1, 1] - square[:, 0, 1] * square[:, 1, 0]
    turned = determinant < 0
    assert abs(turned.float().mean() - 0.5) < 0.03
    assert set(square[turned].unique().tolist()) == {-1.0, 0.0, 1.0}
    angle = torch.rad2deg(torch.atan2(square[~turned][:, 1, 0], square[~turned][:, 0, 0]))
    assert angle.abs().max() <= 20.001
    assert abs((angle == 0).float().mean() - 0.5) < 0.05


def test_turns_by_90_degrees_move_every_pixel_exactly():
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (64, 16, 16), generator=rng, dtype=torch.uint8)
    label = torch.randint(0, 4, (64, 16, 16), generator=rng, dtype=torch.uint8)
    theta = draw(np.arange(9), 8, 64, 0, 0, "published").theta.view(-1, 2, 3)
    turned = theta[theta[:, :, :2].abs().amax((1, 2)) == 1]
    turned = turned[(turned[:, 0, 0] != 1) | (turned[:, 1, 1] != 1)][:64]
    image_out, label_out = augment(image, label, turned)
    for i in range(64):
        every = [image[i].rot90(k).flip(0) for k in range(4)]
        match = [k for k in range(4) if torch.allclose(image_out[i, 0] * 255, every[k].float(), atol=1e-2)]
        assert len(match) == 1
        assert torch.equal(label_out[i], label[i].rot90(match[0]).flip(0).long())


def test_turns_of_volumes_are_small_about_any_axis_and_half_are_none():
    long, short, strong = (
        draw(np.arange(9), steps, 8, 0, 0, kind, SHAPE)
        for steps, kind in ((500, "published"), (300, "published"), (500, "strong"))
    )
    assert torch.equal(long.theta[:300], short.theta)
    assert torch.equal(long.index, draw(np.arange(9), 500, 8, 0, 0, "published").index)
    theta, side = long.theta.view(-1, 3, 4), torch.tensor(SHAPE[::-1])
    assert (theta[:, :, 3] == 0).all()
    still = (theta[:, :, :3] == torch.eye(3)).all(2).all(1)
    assert abs(still.float().mean() - 0.5) < 0.03
    turn = (theta[:, :, :3] * side[:, None] / side)[~still]  # in voxels
    assert torch.allclose(turn @ turn.mT, torch.eye(3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(turn), torch.ones(len(turn)), atol=1e-5)
    axis = torch.stack([turn[:, i, j] - turn[:, j, i] for i, j in ((2, 1), (0, 2), (1, 0))], 1) / 2
    angle = axis.norm(dim=1)
    assert 19 < torch.rad2deg(angle.asin()).max() <= 20.001
    assert torch.allclose((axis / angle[:, None]).square().mean(0), torch.full((3,), 1 / 3), atol=0.03)
    theta = strong.theta.view(-1, 3, 4)
    zoom = 1 / torch.linalg.det(theta[:, :, :3]) ** (1 / 3)
    assert 0.749 < zoom.min() < 0.76
    assert 1.31 < zoom.max() < 1.331
    assert torch.allclose((theta[:, :, 3] * zoom[:, None]).abs().amax(0), torch.full((3,), 0.2), atol=1e-3)


def test_volumes_and_their_labels_are_turned_alike(hippocampus):
    image, label = (torch.from_numpy(a[:8]) for a in (hippocampus.images, hippocampus.labels))
    theta = draw(np.arange(9), 1, 8, 0, 0, "strong", SHAPE).theta[0]
    images, labels = augment(image, label, theta)
    side = np.array(SHAPE)
    for i in range(8):
        by_axis = theta[i].double().numpy()[::-1]  # z, y, x
        matrix = by_axis[:, 2::-1] * side[:, None] / side
        offset = (side - 1) / 2 - matrix @ (side - 1) / 2 + by_axis[:, 3] * side / 2
        turned = affine_transform(image[i].float().numpy(), matrix, offset, order=1, mode="grid-constant")
        assert np.abs(255 * images[i, 0].numpy() - turned).max() < 0.1
        nearest = affine_transform(label[i].numpy(), matrix, offset, order=0, mode="grid-constant")
        assert (labels[i].numpy() == nearest).mean() > 0.9995  # but for ties
    images, labels = augment(image, label, torch.eye(3, 4).expand(8, 3, 4))
    assert torch.allclose(images[:, 0] * 255, image.float(), atol=1e-2)
    assert torch.equal(labels, label.long())


# --- losses and metrics


def test_the_task_loss_is_the_published_one_and_takes_fractions_and_volumes():
    torch.manual_seed(0)
    logits, label = torch.randn(3, 4, 8, 8), torch.randint(0, 4, (3, 8, 8))
    one_hot = torch.nn.functional.one_hot(label, 4).movedim(-1, 1).float()
    assert segmentation_loss(logits, label).item() == pytest.approx(released_loss(logits, label).item(), rel=1e-5)
    volumes = logits.view(3, 4, 2, 4, 8), label.view(3, 2, 4, 8)
    assert segmentation_loss(*volumes).item() == pytest.approx(segmentation_loss(logits, label).item())
    assert segmentation_loss(logits, one_hot).item() == pytest.approx(segmentation_loss(logits, label).item())


def test_ignored_pixels_do_not_count():
    torch.manual_seed(0)
    logits, label = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randint(0, 4, (3, 8, 8))
    label[:, :4] = 255
    segmentation_loss(logits, label).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, :4] == 0).all()
    assert (logits.grad[:, :, 4:] != 0).all()
    half = segmentation_loss(logits[:, :, 4:], label[:, 4:])
    cross_entropy = torch.nn.functional.cross_entropy(logits, label, ignore_index=255)
    # the mean is over all pixels, so that few sure ones weigh little
    assert segmentation_loss(logits, label).item() == pytest.approx((half - 0.25 * cross_entropy).item(), rel=1e-4)


def test_entropy():
    assert entropy(torch.zeros(1, 2, 1, 1)).item() == pytest.approx(math.log(2))


def volumes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(seed).normal(size=(2, 3, 12, 20, 17))
    smooth = np.stack([gaussian_filter(channel, (0, 1, 2, 2)) for channel in noise])
    truth, prediction = smooth.argmax(1).astype(np.uint8)
    prediction[:4] = np.where(truth[:4] > 0, truth[:4], prediction[:4])  # nearly right
    truth[4:8][truth[4:8] == 2] = 0  # a class that the truth lacks,
    truth[8:][truth[8:] == 1] = prediction[8:][prediction[8:] == 1] = 0  # and one that both lack
    return prediction, truth


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_examples_by_monai(seed):
    prediction, truth = volumes(seed)
    volume = torch.arange(12) // 4
    ours = score(torch.from_numpy(prediction), torch.from_numpy(truth), volume, [(1, 1), (2, 2)])
    parts = [slice(4 * i, 4 * i + 4) for i in range(3)]
    theirs = summarize([score_volume(str(i), prediction[p], truth[p], 3, None) for i, p in enumerate(parts)])
    assert ours["dsc"] == pytest.approx(theirs.dsc)
    assert ours["hd95"] == pytest.approx(theirs.hd95, rel=1e-5)
    assert ours["mean_dsc"] == pytest.approx(theirs.mean_dsc)
    assert ours["mean_hd95"] == pytest.approx(theirs.mean_hd95, rel=1e-5)
    assert tuple(ours["skipped"]) == theirs.skipped
    assert ours["missed"] == [0, 1]
    assert ours["volumes"] == 3
    whole = (torch.from_numpy(a).view(3, 4, 20, 17) for a in (prediction, truth))
    assert score(*whole, torch.arange(3), [(1, 1), (2, 2)]) == ours


def test_predictions_are_scored_at_the_size_of_each_truth():
    prediction, truth = (torch.from_numpy(a) for a in volumes(1))
    volume = torch.arange(12) // 4
    sizes = [(20, 17), (40, 51), (30, 9)]
    natives = [
        torch.nn.functional.interpolate(t[None, None], sizes[i // 4], mode="nearest-exact")[0, 0]
        for i, t in enumerate(truth)
    ]
    ours = score(prediction, natives, volume, [(1, 1), (2, 2)])
    for number, (height, width) in enumerate(sizes):
        at = [((np.arange(n) + 0.5) * old / n).astype(int) for n, old in ((height, 20), (width, 17))]
        predicted = prediction[volume == number].numpy()[:, at[0]][:, :, at[1]]
        true = np.stack([natives[i].numpy() for i in range(4 * number, 4 * number + 4)])
        alone = summarize([score_volume("", predicted, true, 3, None)])
        for i in range(2):
            each = [ours[f"each_{what}"][i][number] for what in ("dsc", "hd95")]
            known = [alone.dsc[i], alone.hd95[i]]
            assert each == ([None, None] if alone.skipped[i] else pytest.approx(known, rel=1e-5))
    for what in ("dsc", "hd95"):
        for i in range(2):
            known = [value for value in ours[f"each_{what}"][i] if value is not None]
            assert ours[what][i] == pytest.approx(np.mean(known))


def test_a_class_may_have_another_number_in_the_truth():
    prediction, truth = volumes(0)
    swapped = np.where(truth > 0, 3 - truth, 0)
    volume = torch.zeros(12)
    ours = score(torch.from_numpy(prediction), torch.from_numpy(swapped), volume, [(2, 1)])
    plain = score(torch.from_numpy(prediction), torch.from_numpy(truth), volume, [(2, 2)])
    assert ours == plain


# --- runs


def test_variants_that_share_a_step_differ_only_where_a_run_can_be_told():
    shared = {name for name, v in CATALOGUE.items() if v.step == CATALOGUE["standardized"].step}
    assert shared == {
        "standardized",
        "standardized, untrained teacher",
        "standardized, label to label",
        "standardized, first half",
    }
    assert CATALOGUE["bare, long"].step == CATALOGUE["bare"].step


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_variant_trains(name, folder, tmp_path):
    out = tmp_path / "results.jsonl"
    assert run(plan_of(seeds=(0,), variants=(CATALOGUE[name],)), folder, out)
    (line,) = read_lines(out)
    assert "error" not in line, line
    assert math.isfinite(line["task_loss"])
    assert line["scores"]["test"]["volumes"] == 40
    assert (line["stage_1_loss"] is None) == (CATALOGUE[name].stage_1 is None)
    averages = CATALOGUE[name].free or CATALOGUE[name].unlabelled in ("cutmix", "copy-paste")
    assert ("test, mean teacher" in line["scores"]) == averages


def test_what_is_free_is_scored_beside_the_same_training(folder, tmp_path):
    variants, settings = (CATALOGUE["ds x2"], CATALOGUE["ds x2, for free"]), replace(SETTINGS, steps=40, lr=0.05)
    plan = plan_of(seeds=(0,), variants=variants, settings=settings)
    assert run(plan, folder, tmp_path / "results.jsonl")
    plain, free = read_lines(tmp_path / "results.jsonl")
    assert free["scores"]["test"] == plain["scores"]["test"]
    free_ones = ("mean teacher", "statistics of others")
    beside = [f"ds x2, for free: {BESIDE[network]}" for network in free_ones]
    assert list(select(plan, [plain, free], "test").lines) == ["ds x2", "ds x2, for free", *beside]
    assert len({json.dumps(scores) for scores in free["scores"].values()}) == 3


def test_batch_statistics_of_others_are_those_of_their_images(folder):
    plan = plan_of(seeds=(0,), variants=(CATALOGUE["bare, for free"],))
    session = accuracy.Session(plan, folder, Machine.make(), {})
    session.run(0, plan.variants[0])
    step, images = session.step_of(plan.variants[0]), []
    step.model.encoder[0][0].register_forward_hook(lambda module, args, output: images.append(output.detach()))
    others = step.networks()[", statistics of others"]
    expected = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in images])
    assert torch.allclose(others.encoder[0][1].running_mean, expected.mean(0), atol=1e-5)
    assert not torch.allclose(step.model.encoder[0][1].running_mean, expected.mean(0), atol=1e-2)


def test_the_mean_teacher_is_scored_as_a_network_of_its_own(folder, tmp_path):
    variants, settings = (CATALOGUE["ds x2 + deep cutmix"],), replace(SETTINGS, steps=40, lr=0.05)
    out, plan = tmp_path / "results.jsonl", plan_of(seeds=(0, 1), variants=variants, settings=settings)
    assert run(plan, folder, out)
    lines = read_lines(out)
    assert all(line["scores"]["test"] != line["scores"]["test, mean teacher"] for line in lines)
    found = select(plan, lines, "test").lines
    name = "ds x2 + deep cutmix"
    assert {seed: s["mean_dsc"] for seed, s in found[f"{name}: its mean teacher"].items()} == {
        line["seed"]: line["scores"]["test, mean teacher"]["mean_dsc"] for line in lines
    }
    assert "2 of 2 runs" in report(select(plan, lines, "test"))


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (4, 2, 16, 24, 16)])
def test_copy_paste_mixes_labelled_and_unlabelled_images_both_ways(shape):
    labelled = torch.ones(shape), torch.ones(4, *shape[2:], dtype=torch.int64)
    box = boxes(torch.rand(4, len(shape) - 1), shape[2:])
    image, label = pasted(torch.zeros(shape), torch.zeros(4, *shape[2:], dtype=torch.int64), labelled, box)
    assert torch.equal(image, label[:, None].expand_as(image).float())
    share = label.float().flatten(1).mean(1)
    axes = len(shape) - 2
    assert all(0.2**axes < s < 0.6**axes for s in torch.stack([share[0], 1 - share[1], share[2], 1 - share[3]]))


@pytest.mark.parametrize("name", ["ds x2 + standardized", "ds x2 + deep cutmix"])
def test_variants_train_on_smps_unet(name, folder, tmp_path):
    out, settings = tmp_path / "results.jsonl", replace(SETTINGS, model="smp_unet", size=64)
    assert run(plan_of(seeds=(0,), variants=(CATALOGUE[name],), settings=settings), folder, out)
    (line,) = read_lines(out)
    assert "error" not in line, line
    assert math.isfinite(line["task_loss"])
    assert line["settings"]["model"] == "smp_unet"


@pytest.mark.parametrize(
    "name", ["bare", "ds x2 + standardized", "ds x2 + deep cutmix", "ds x2 + reconstruction", "ds x2 + mean teacher"]
)
def test_variants_train_on_volumes(name, folder, tmp_path):
    out, variants = tmp_path / "results.jsonl", (CATALOGUE[name],)
    assert run(plan_of(data="hippocampus", seeds=(0,), variants=variants, settings=IN_3D), folder, out)
    (line,) = read_lines(out)
    assert "error" not in line, line
    assert math.isfinite(line["task_loss"])
    assert line["scores"]["test"]["volumes"] == 52
    assert len(line["scores"]["test"]["dsc"]) == 2


def test_a_run_is_the_same_whatever_ran_before(folder, tmp_path):
    names = ("bare", "standardized", "ds x2 + cutmix")
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    variants = tuple(CATALOGUE[name] for name in names)
    for variant in variants[::-1]:
        run(plan_of(seeds=(1,), variants=(variant,)), folder, alone)
    run(plan_of(seeds=(0, 1), variants=variants), folder, together)
    first, second = (finished(read_lines(path)) for path in (alone, together))
    assert len(first) == 3
    for key, line in first.items():
        assert second[key]["task_loss"] == line["task_loss"]
        assert second[key]["scores"] == line["scores"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_compiled_variants_in_one_process_give_the_same_numbers(folder, tmp_path):
    """They share compiled code where they can, and must not where their hooks differ."""
    names = ("bare", "standardized", "ds x2", "ds x2 + cutmix + standardized", "standardized, uncrossed", "ds coarse")
    plan = plan_of(seeds=(0,), variants=tuple(CATALOGUE[name] for name in names))
    torch._dynamo.reset()
    compiled = Machine(torch.device("cpu"), "all", backend="aot_eager")
    values = []
    for name, machine in (("eager", None), ("compiled", compiled)):
        with torch._dynamo.config.patch(compiler_settings()):
            run(plan, folder, tmp_path / name, machine=machine)
        values.append([line["task_loss"] for line in finished(read_lines(tmp_path / name)).values()])
    torch._dynamo.reset()
    assert len(values[1]) == len(names)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


class Watch(TorchDispatchMode):
    """Refuses what a CUDA graph cannot capture: reading values back, sizes that depend on them, host constants."""

    REFUSED = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "unique",
        "masked_select",
        "lift_fresh",
        "one_hot",
        "allclose",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or name.startswith(self.REFUSED):
            raise AssertionError(f"{func} in a step")
        return func(*args, **(kwargs or {}))


def feed_of(data: Slices, steps: int = 3, augmentation: Augmentation = "published") -> Feed:
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    feed = Feed(images, labels, steps, 2, augmentation, torch.device("cpu"))
    where = rows(data, split(data, 5, 0).labelled)
    feed.load(where, where[:0], 0)
    return feed


def test_the_watch_sees_what_it_is_for():
    for wait in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: torch.tensor(1.0), lambda x: bool(x.any())):
        with pytest.raises(AssertionError, match="in a step"), Watch():
            wait(torch.ones(2))


@pytest.fixture
def unread(monkeypatch):
    """The losses look at values on a CPU in every step, elsewhere not: here the CPU stands for a GPU."""
    for module in (inputs, wrapper, consistency, semi):
        monkeypatch.setattr(module, "readable", lambda device, first=False: False)


@pytest.mark.parametrize(
    "mixing", [{"sides": [0.3, 0.7], "perturb": "blur and contrast"}, {"turned": True}, {"joint": "averaged buffers"}]
)
def test_no_step_of_the_fields_protocol_waits_for_the_device(mixing, folder, native, unread):
    variant = replace(CATALOGUE["ds equal + deep cutmix"], mixing=mixing)
    plan = plan_of(data="acdc_native", patients=3, variants=(variant,), settings=FIELD)
    session = accuracy.Session(plan, folder, Machine.make(), {})
    session.begin(0)
    step = session.step_of(variant)
    assert isinstance(step.feed, FieldFeed)
    with Watch():
        loss, _ = step.losses()
        loss.backward()
        assert step.mixed is not None
        step.mixed.update()


def test_no_step_on_stacked_slices_waits_for_the_device(folder, native, unread):
    settings = replace(FIELD, model="unet_3d_thick", depth=4, augmentation="strong")
    plan = plan_of(data="acdc_native", patients=3, variants=(CATALOGUE["ds equal + deep cutmix"],), settings=settings)
    session = accuracy.Session(plan, folder, Machine.make(), {})
    session.begin(0)
    step = session.step_of(plan.variants[0])
    with Watch():
        loss, _ = step.losses()
        loss.backward()


@pytest.mark.parametrize(
    ("name", "data", "settings"),
    [
        *((name, "acdc", SETTINGS) for name in CATALOGUE),
        ("ds x2 + deep cutmix", "hippocampus", IN_3D),
        ("ds equal + deep cutmix", "acdc", replace(SETTINGS, model="smp_lite0")),
    ],
)
def test_no_step_waits_for_the_device(name, data, settings, request, unread):
    feed = feed_of(request.getfixturevalue(data), augmentation=settings.augmentation)
    step = Stage2(CATALOGUE[name].step, settings, 4, feed, Machine.make())
    with Watch():
        loss, _ = step.losses()
        loss.backward()
        if step.mixed is not None:
            step.mixed.update()


def test_a_step_is_that_of_a_plain_loop(acdc):
    """The harness against the same training written out: plain SGD, the schedule, the batches of the tables."""
    images, labels = torch.from_numpy(acdc.images), torch.from_numpy(acdc.labels)
    where = rows(acdc, split(acdc, 5, 0).labelled)
    feed = feed_of(acdc)
    step = Stage2(CATALOGUE["bare"].step, SETTINGS, 4, feed, Machine.make())
    step.train(CATALOGUE["bare"], 0, None)

    model = UNet(4, 1, 2)
    model.load_state_dict(initial_weights(SETTINGS, 4, 0))
    tables = draw(where, 3, 2, 0, 0, "published")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for i in range(3):
        image, label = augment(images[tables.index[i]], labels[tables.index[i]], tables.theta[i])
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - i / 3) ** 0.9
        optimizer.zero_grad()
        released_loss(model(image), label).backward()
        optimizer.step()
    for ours, plain in zip(step.model.state_dict().values(), model.state_dict().values()):
        assert torch.allclose(ours.float(), plain.float(), rtol=1e-4, atol=1e-5)


def test_stage_1_can_have_the_settings_of_stage_2(acdc):
    """Against the same training written out: plain SGD, the schedule, 0.6 MSE + 0.4 L1."""
    settings = replace(SETTINGS, stage_1="as stage 2", lr=0.05)
    images, labels = torch.from_numpy(acdc.images), torch.from_numpy(acdc.labels)
    stage = Stage1(("index", "image"), settings, 4, feed_of(acdc), Machine.make())
    weights, _ = stage.fit(0)

    plain = Stage1(("index", "image"), settings, 4, feed_of(acdc), Machine.make()).teacher
    reset_teacher(plain, settings, 4, 0)
    plain.train()
    tables = draw(rows(acdc, split(acdc, 5, 0).labelled), 3, 2, 0, 0, "published")
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for i in range(2):
        image, label = augment(images[tables.index[i]], labels[tables.index[i]], tables.theta[i])
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 2) ** 0.9
        optimizer.zero_grad()
        error = plain.decode(plain.encoding.encode(label)[0]) - image
        (0.6 * error.square().mean() + 0.4 * error.abs().mean()).backward()
        optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.allclose(weights[name].float(), value.float(), rtol=1e-4, atol=1e-5), name
    by_default = Stage1(("index", "image"), replace(settings, stage_1="adamw 0.001"), 4, feed_of(acdc), Machine.make())
    ours, _ = by_default.fit(0)
    assert not all(torch.equal(ours[name], value) for name, value in weights.items())


def test_a_run_that_diverges_has_no_score(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    run(plan_of(seeds=(0,), variants=(CATALOGUE["bare"],), settings=replace(SETTINGS, lr=1e12)), folder, out)
    (line,) = read_lines(out)
    assert "bare diverged: its loss is nan" in line["error"]
    assert "scores" not in line


def test_a_stage_1_that_diverges_stops_its_run(acdc):
    """Else stage 2 would align with NaN, and a row of the table be of that."""
    settings = replace(SETTINGS, stage_1="as stage 2", lr=1e20, stage1_steps=6)
    stage = Stage1(("index", "image"), settings, 4, feed_of(acdc, 6), Machine.make())
    with pytest.raises(ValueError, match=r"stage 1 diverged: its loss is (nan|inf) at the end, with 'as stage 2'"):
        stage.fit(0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_learning_rate_ends_near_zero(optimizer):
    rates = schedule(replace(SETTINGS, optimizer=optimizer, lr=0.5), 100)
    assert 0.4 < rates.max() <= 0.5
    assert (rates > 0).all()
    assert rates[-1] < 0.01


def test_runs_that_have_a_line_are_skipped_and_a_stop_leaves_whole_seeds_first(folder, tmp_path):
    out = tmp_path / "results.jsonl"
    assert not run(plan_of(), folder, out, seconds=-1)
    assert not read_lines(out)
    assert run(plan_of(seeds=(0,)), folder, out)
    assert run(plan_of(), folder, out)
    lines = read_lines(out)
    assert [(line["seed"], line["variant"]) for line in lines] == [(s, n) for s in (0, 1) for n in ("bare", "ds x2")]
    assert run(plan_of(name="another"), folder, out)
    assert len(read_lines(out)) == 4
    assert run(plan_of(settings=replace(SETTINGS, lr=0.1), seeds=(0,)), folder, out)
    assert len(read_lines(out)) == 6


@pytest.mark.parametrize("name", ["bare", "paper", "ds equal + deep cutmix"])
def test_a_run_that_the_time_cuts_short_goes_on_where_it_was(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.harness.TO_LOOK", 2)
    plan = plan_of(seeds=(3,), variants=(CATALOGUE[name],), settings=replace(SETTINGS, steps=7, stage1_steps=5))
    whole, parts, kept = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "kept"
    assert run(plan, folder, whole)
    attempts = 0
    while not read_lines(parts):
        looks = iter([0.0])  # at the second look of an attempt, after two steps, the time is up
        fake = SimpleNamespace(monotonic=lambda looks=looks: next(looks, math.inf))
        monkeypatch.setattr("benchmarks.evidence.harness.time", fake)
        ended = accuracy.run_plan(plan, folder, parts, Machine.make(), {}, accuracy.time.monotonic() + 1e6, kept)
        attempts += 1
        assert ended == bool(read_lines(parts))
        assert attempts < 12
    assert attempts > 2
    (ours,), (once,) = read_lines(parts), read_lines(whole)
    assert ours["resumed_at"] == 6
    assert ours.get("stage_1_resumed_at") == (5 if name == "paper" else None)
    scores = select(plan, [ours], "test")
    assert (" | - | - |" in accuracy_report.times(scores)) == (name == "paper"), "no time of a part of stage 1"
    for what in ("task_loss", "stage_1_loss", "scores", "key"):
        assert ours[what] == once[what], what
    assert not list(kept.glob(f"{ours['key']}*")), "what was saved of a run goes with its end"


def test_a_saved_run_of_another_network_is_refused(acdc, tmp_path):
    pause = Pause(tmp_path / "run.pt", -1.0)
    step = Stage2(CATALOGUE["bare"].step, SETTINGS, 4, feed_of(acdc), Machine.make())
    with pytest.raises(OutOfTimeError, match="after 0 of 3 steps"):
        step.train(CATALOGUE["bare"], 0, None, pause)
    other = Stage2(CATALOGUE["ds equal"].step, SETTINGS, 4, feed_of(acdc), Machine.make())
    with pytest.raises(ValueError, match="saved by another network"):
        other.train(CATALOGUE["ds equal"], 0, None, pause)


def test_predictions_and_patients_are_kept(folder, native, tmp_path):
    out = tmp_path / "results.jsonl"
    plan = plan_of(data="acdc_native", patients=7, seeds=(0,), variants=(CATALOGUE["bare"],))
    assert accuracy.run_plan(plan, folder, out, Machine.make(), {}, float("inf"), None, tmp_path / "kept")
    (line,) = read_lines(out)
    scores = line["scores"]["test"]
    assert scores["patients"] == [p for p in (*range(11, 21), *range(71, 81)) for _ in range(2)]
    data = load_native(folder / "acdc_native.npz", 32)
    assert data.native is not None
    chosen = rows(data, split(data, 7, 0).test)
    with np.load(tmp_path / "kept" / "trial_0_bare_test.npz") as file:
        prediction = torch.from_numpy(file["prediction"])
    truth = [torch.from_numpy(data.native[i]) for i in chosen]
    again = score(prediction, truth, torch.from_numpy(data.volume[chosen]), [(1, 1), (2, 2), (3, 3)])
    assert {name: scores[name] for name in again} == again


def test_a_variant_that_fails_leaves_a_line_and_the_others_run(folder, tmp_path):
    out = tmp_path / "results.jsonl"
    bad = from_plan({"name": "bad", "deep": {"weights": [1.0]}})
    assert run(plan_of(variants=(bad, CATALOGUE["bare"])), folder, out)
    lines = read_lines(out)
    assert [line["variant"] for line in lines] == ["bad", "bare", "bare"]
    assert "1 weights for 3 levels" in lines[0]["error"]
    assert len(finished(lines)) == 2


def test_a_variant_that_was_removed_keeps_its_results_and_is_not_run(folder, tmp_path):
    plan = read_plan(ROOT / "benchmarks/plans/deep_5.json")
    results = list(finished(read_lines(ROOT / "benchmarks/results/accuracy.jsonl")).values())
    measured = select(plan, results, plan.decide_on).lines
    assert all(sorted(measured[name]) == [0, 1, 2, 3] for name in REMOVED)
    assert not REMOVED.keys() & CATALOGUE.keys()
    out = tmp_path / "results.jsonl"
    assert run(plan_of(variants=(*REMOVED.values(), CATALOGUE["bare"])), folder, out)
    lines = read_lines(out)
    assert [line["variant"] for line in lines] == [*REMOVED, "bare", "bare"]
    assert all("an option that the library has no longer" in line["error"] for line in lines[: len(REMOVED)])


def test_a_line_that_was_cut_short_is_run_again(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    append(path, {"key": "a"})
    with path.open("a") as file:
        file.write('{"key": "b", "sco')
    append(path, {"key": "c"})
    assert [line["key"] for line in read_lines(path)] == ["a", "c"]
    assert "a broken line is left out" in capsys.readouterr().out


def test_another_data_set_is_scored_beside(folder, tmp_path):
    out = tmp_path / "results.jsonl"
    other = {"data": "sunnybrook", "classes": [[3, 1]]}
    settings = replace(SETTINGS, steps=40, lr=0.05)
    plan = plan_of(seeds=(0,), variants=(CATALOGUE["cutmix"],), also_test=other, settings=settings)
    assert run(plan, folder, out)
    scores = read_lines(out)[0]["scores"]
    network, average = scores["sunnybrook"], scores["sunnybrook, mean teacher"]
    assert network["volumes"] == average["volumes"] == 90
    assert network["classes"] == average["classes"] == ["left ventricle"]
    assert network["dsc"] != average["dsc"]


def test_unlabelled_images_are_asked_for_only_where_there_are_some(folder, tmp_path):
    out = tmp_path / "results.jsonl"
    run(plan_of(patients=70, seeds=(0,), variants=(CATALOGUE["entropy"],)), folder, out)
    assert "all are labelled" in read_lines(out)[0]["error"]


def test_slices_may_be_stored_larger_than_they_are_trained_on(folder, tmp_path):
    out = tmp_path / "results.jsonl"
    assert run(plan_of(settings=replace(SETTINGS, size=64), seeds=(0,)), folder, out)
    assert all("error" not in line for line in read_lines(out))


# --- plans and report


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "plans").glob("*.json")), ids=lambda path: path.stem)
def test_the_written_plans_can_be_read_and_hold_together(path):
    plan = read_plan(path)
    assert plan.question
    assert plan.rule
    if plan.settings.protocol == "ssl4mis":
        assert plan.minutes.keys() == {variant.name for variant in plan.variants}, "said before they are run"
        assert (plan.decide_on == "validation") == ("screen" in path.stem or "blur" in path.stem)
    elif "blur" not in path.stem:
        assert "bare" in {variant.name for variant in plan.variants}
    if plan.outside or plan.data == "synapse":
        assert plan.decide_on == "test"
    elif "confirm" in path.stem or plan.data not in ("acdc", "acdc_native"):
        assert len(plan.seeds) >= 8
        assert plan.decide_on == "test"
    if "choose" in path.stem:
        assert plan.decide_on == "validation"


def test_plans_that_were_written_after_runs_elsewhere_are_of_all_of_them():
    lines = finished(read_lines(ROOT / "benchmarks/results/heldout_2026-11-29.jsonl"))
    plans = [plan for path in (ROOT / "benchmarks/plans").glob("*.json") if (plan := read_plan(path)).outside]
    sizes = {"h_chaos3": 192, "h_btcv5": 224, "h_btcv18": 224}
    assert {plan.name for plan in plans} == set(sizes)
    wanted = {p.key(seed, v, sizes[p.name]): (p.name, seed, v.name) for p in plans for seed, v in p.runs()}
    assert {key: (line["plan"], line["seed"], line["variant"]) for key, line in lines.items()}.items() <= wanted.items()
    assert len(lines) == 27
    text = report(select(plans[0], list(lines.values()), "test"))
    assert "Rule, written after the runs: " in text
    assert "outside this repository" in text
    with pytest.raises(ValueError, match="no reader of 'chaos' is here; there are those of acdc, "):
        accuracy.find(ROOT, "chaos", 192)


def test_the_keys_of_the_results_there_are_stay_as_they_are():
    key = read_plan(ROOT / "benchmarks/plans/confirm_acdc_5.json").key(4, CATALOGUE["bare"], 224)
    line = finished(read_lines(ROOT / "benchmarks/results/accuracy.jsonl"))[key]
    assert (line["plan"], line["seed"], line["variant"]) == ("confirm_acdc_5", 4, "bare")
    assert plan_of(settings=replace(SETTINGS, stage_1="as stage 2")).key(0, CATALOGUE["bare"], 32) != plan_of().key(
        0, CATALOGUE["bare"], 32
    )


def test_confirmation_does_not_use_the_seeds_of_the_choice():
    plans = [read_plan(path) for path in (ROOT / "benchmarks" / "plans").glob("*.json")]
    chosen = {
        s
        for p in plans
        if p.data == "acdc" and p.decide_on == "validation" and "controls" not in p.name
        for s in p.seeds
    }
    confirmed = {s for p in plans if p.data == "acdc" and p.decide_on == "test" for s in p.seeds}
    assert not chosen & confirmed
    field = [p for p in plans if p.settings.protocol == "ssl4mis"]
    screened, scored = ({s for p in field if p.decide_on == part for s in p.seeds} for part in ("validation", "test"))
    assert screened
    assert scored
    assert not screened & scored


def test_plans_with_mistakes_are_refused(tmp_path):
    good = json.loads((ROOT / "benchmarks" / "plans" / "choose_5.json").read_text())
    for change, message in (
        ({"variants": ["bear"]}, "unknown variant 'bear'"),
        ({"variants": [{"name": "x", "depe": {}}]}, r"unknown options \['depe'\]"),
        ({"variants": [{"name": "x", "unlabelled": "cutmx"}]}, "unlabelled='cutmx'; it is one of"),
        ({"variants": [{"name": "x", "unlabelled_deep": True}]}, "needs deep supervision"),
        ({"variants": ["bare", "bare"]}, "named twice"),
        ({"variants": ["bare", "ds x2", {"name": "plain"}]}, "'bare' and 'plain' have the same options"),
        ({"decide_on": "training"}, "only validation, test are scored"),
        ({"sedes": [1]}, r"unknown entries \['sedes'\]"),
    ):
        path = tmp_path / "plan.json"
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            read_plan(path)


def test_paired_differences_have_students_interval():
    rng = np.random.default_rng(0)
    a, b = ({seed: float(value) for seed, value in enumerate(rng.normal(size=9))} for _ in range(2))
    del a[0], b[8]
    difference = paired(a, b)
    assert difference is not None
    both = range(1, 8)
    interval = ttest_rel([a[s] for s in both], [b[s] for s in both]).confidence_interval(0.95)
    assert difference.pairs == 7
    assert difference.half_width is not None
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)
    # by hand: differences 1, 2, 6 have mean 3 and standard deviation sqrt(7); t(0.975, 2) = 4.3027
    three = paired({0: 1.0, 1: 2.0, 2: 6.0}, dict.fromkeys(range(3), 0.0))
    assert str(three) == "+3.0 ± 6.6"
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert str(paired({0: 1.5}, {0: 1.0})) == "+0.5"


ABOUT = {"commit": "a0ec69d", "device": "cpu", "compiled": "none"}


def lines_of(plan: Plan, values: dict[str, list[float | None]]) -> list[dict[str, Any]]:
    """What `accuracy.py` would have written of a plan, with the DSC of every seed and ten times that as HD95."""
    lines = []
    for seed, variant in plan.runs():
        dsc = values[variant.name][seed]
        hd95 = None if dsc is None else 10 * dsc
        scores = {"classes": ["lv"], "dsc": [dsc], "hd95": [hd95], "mean_dsc": dsc, "mean_hd95": hd95}
        line = {"key": plan.key(seed, variant, 16), "stored": 16, "seed": seed, **ABOUT, "scores": {"test": scores}}
        lines.append(line)
    return lines


def test_the_report_says_what_the_lines_say(tmp_path):
    plan = plan_of(seeds=(0, 1, 2))
    lines = lines_of(plan, {"bare": [0.5, 0.6, 0.7], "ds x2": [0.6, 0.8, 0.9]})
    other = {**lines[0], "key": plan.key(0, CATALOGUE["ds"], 16)}
    scores = select(plan, [*lines, other], "test")
    text = report(scores)
    assert "6 of 6 runs" in text
    assert "| bare | 3 | 60.0 ± 10.0 |  | -16.7 ± 14.3 | 6.0 ± 1.0 |  | -1.7 ± 1.4 | 60.0 / 6.0 |" in text
    assert "| ds x2 | 3 | 76.7 ± 15.3 | +16.7 ± 14.3 |  | 7.7 ± 1.5 | +1.7 ± 1.4 |  | 76.7 / 7.7 |" in text
    assert figure([scores], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert "Nothing was run." in report(select(plan, [other], "test"))


def test_published_scores_stand_beside_ours_with_a_bootstrap_over_patients():
    plan = plan_of(seeds=(0, 1), published={"bare": 50.0, "ds x2": 53.5})
    lines = lines_of(plan, {"bare": [0.5, 0.6], "ds x2": [0.6, 0.8]})
    gains = np.random.default_rng(5).normal(0.1, 0.05, (2, 20))  # of each patient, in both phases alike
    for line, gain in zip(lines, [0 * gains[0], gains[0], 0 * gains[1], gains[1]]):
        each = [*np.repeat(0.5 + gain, 2)]
        each[3] = None if line is lines[1] else each[3]  # a class that one volume lacks
        line["scores"]["test"] |= {"each_dsc": [each], "patients": np.repeat(range(20), 2).tolist()}
    scores = select(plan, lines, "test")
    per_patient = 100 * gains.mean(0)
    assert list(scores.of_patients("ds x2", "bare").values()) == pytest.approx(per_patient)
    low, high = resampled(per_patient.tolist())
    normal = 1.96 * per_patient.std() / math.sqrt(20)
    assert low == pytest.approx(per_patient.mean() - normal, abs=0.15 * normal)
    assert high == pytest.approx(per_patient.mean() + normal, abs=0.15 * normal)
    text = report(scores)
    assert "| bare | 50.00 | 55.00 | 2 |  |  |  |" in text
    ours = f"{per_patient.mean():+.2f} ({low:+.2f} to {high:+.2f}, 20 patients)"
    assert f"| ds x2 | 53.50 | 70.00 | 2 | +3.50 | +15.0 ± 63.5 (2) | {ours} |" in text
    assert "published" not in report(select(replace(plan, published={}), lines, "test"))
    text = report(select(replace(plan, published_hd95={"ds x2": 4.25}), lines, "test"))
    assert f"| {ours} | 4.25 | 7.00 |" in text
    assert "| bare | 50.00 | 55.00 | 2 |  |  |  |  | 5.50 |" in text


def test_the_fields_protocol_has_a_section_with_the_worst_draw_and_what_was_published(tmp_path):
    semi, settings = CATALOGUE["ds equal + deep cutmix"], replace(FIELD, width=3)
    variants = (CATALOGUE["bare"], semi)
    plan = plan_of(data="acdc_native", patients=3, variants=variants, settings=settings, drawn=True)
    lines = lines_of(plan, {"bare": [0.4, 0.5], semi.name: [0.8, 0.9]})
    gain = np.random.default_rng(3).normal(0, 0.04, 20)
    for line in lines:
        scores = line["scores"]["test"]
        each = scores["mean_dsc"] + (gain if scores["mean_dsc"] > 0.7 else 0 * gain)
        scores |= {"each_dsc": [each.repeat(2).tolist()], "patients": np.repeat(range(20), 2).tolist()}
        line["labelled"] = [3, 40 + line["seed"], 60]
    scores = select(plan, lines, "test")
    text = report(scores)
    of_patients = 85 + 100 * gain
    assert list(scores.patients(semi.name).values()) == pytest.approx(of_patients)
    low, high = resampled(of_patients.tolist())
    more = f"{of_patients.mean() - 45:+.1f} ({low - 45:+.1f} to {high - 45:+.1f})"
    assert f"| {semi.name} | 85.0 ± 7.1 | 80.0 | {low:.1f} to {high:.1f} | {more} | 8.5 ± 0.7 | 9.0 |" in text
    assert "| bare | 45.0 ± 7.1 | 40.0 | 45.0 to 45.0 |  | 4.5 ± 0.7 | 5.0 |" in text
    assert "worst draw" in text
    assert "Labelled patients by seed: 0: 3, 40, 60; 1: 3, 41, 60." in text
    assert "| UniMatch | 88.86 | validation and test (30 patients) | the best epoch on these 30 patients |" in text
    assert "three of our variants were scored on them on 2026-11-29. Nothing further is chosen on them." in text
    assert "Changes screened" not in text
    assert field_figure([scores, scores], tmp_path / "field.png")
    assert (tmp_path / "field.png").stat().st_size > 5000
    assert not field_figure([select(plan, [], "test")], tmp_path / "none.png")
    screen = replace(plan, decide_on="validation")
    chosen = report(
        select(screen, [{**line, "scores": {"validation": line["scores"]["test"]}} for line in lines], "validation")
    )
    assert "Changes screened in this plan: 1." in chosen
    assert "UniMatch" not in chosen, "published scores are of test patients"
    assert "| to bare |" in chosen, "its first variant"


def test_a_difference_over_fewer_pairs_than_the_row_has_seeds_says_so():
    plan = plan_of(seeds=(0, 1, 2))
    lines = lines_of(plan, {"bare": [0.5, 0.6, 0.7], "ds x2": [0.6, 0.8, 0.9]})
    two, one = report(select(plan, lines[:-1], "test")), report(select(plan, lines[:2] + lines[2::2], "test"))
    assert "| bare | 3 | 60.0 ± 10.0 |  | -15.0 ± 63.5 (2 pairs) |" in two
    assert "| ds x2 | 2 | 70.0 ± 14.1 | +15.0 ± 63.5 |" in two, "all of this row's seeds are paired"
    assert "| bare | 3 | 60.0 ± 10.0 |  | -10.0 (1 pair) |" in one


def test_a_variant_without_any_score_is_a_dash_and_draws_no_panel(tmp_path):
    plan = plan_of(seeds=(0, 1))
    lines = lines_of(plan, {"bare": [None, None], "ds x2": [0.6, 0.8]})
    scores = select(plan, lines, "test")
    assert "| bare | 2 | - |  |  | - |  |  | - |" in report(scores)
    assert not figure([scores], tmp_path / "figure.png")
    assert not figure([select(plan, lines[1::2], "test")], tmp_path / "figure.png"), "without a line of 'bare'"
    assert not figure([], tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_a_figure_without_the_bare_run_is_refused_and_the_table_is_written(tmp_path, monkeypatch, capsys):
    table, drawn, plan = tmp_path / "table.md", tmp_path / "figure.png", ROOT / "benchmarks/plans/choose_5.json"
    (tmp_path / "none.jsonl").touch()
    arguments = [tmp_path / "none.jsonl", "--plan", plan, "--table", table, "--figure", drawn]
    monkeypatch.setattr("sys.argv", ["accuracy_report.py", *map(str, arguments)])
    with pytest.raises(SystemExit):
        accuracy_report.main()
    assert "--figure: no plan has a run of 'bare'" in capsys.readouterr().err
    assert "Nothing was run." in table.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "missing.jsonl is not there"),
        (["results.jsonl", "--part", "tset"], "--part tset: choose_5 has validation, test"),
        (["results.jsonl", "--references", "bare", "Bare"], "--references: no plan has Bare"),
    ],
)
def test_a_report_of_what_is_not_there_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").touch()
    plan = ["--plan", str(ROOT / "benchmarks/plans/choose_5.json")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["accuracy_report.py", *arguments, *plan])
    with pytest.raises(SystemExit):
        accuracy_report.main()
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "99"], "--seeds: choose_5 has none of [99]"), (["--all"], "--all goes with --smoke")],
)
def test_runs_that_no_plan_has_are_refused(arguments, message, folder, tmp_path, monkeypatch, capsys):
    plan = ["--plan", str(ROOT / "benchmarks/plans/choose_5.json"), "--data", str(folder), "--out", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["accuracy.py", *plan, *arguments])
    with pytest.raises(SystemExit):
        accuracy.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_trial_has_a_name_of_its_own_for_what_it_keeps():
    assert accuracy.trial(plan_of(), everything=False).name == f"{plan_of().name}_trial"


def test_the_line_under_a_table_says_where_its_runs_are_from():
    plan = plan_of(seeds=(0, 1))
    lines = lines_of(plan, {"bare": [0.5, 0.6], "ds x2": [0.6, 0.8]})
    assert report(select(plan, lines, "test")).endswith("|\n\nRuns: commit a0ec69d; device cpu; compiled none.")
    lines[0] |= {"commit": None, "device": "H200"}
    lines[1] |= {"commit": "a0ec69d1234"}
    assert report(select(plan, lines, "test")).endswith(
        "Runs: commit unknown (1), a0ec69d (3); device H200 (1), cpu (3); compiled none."
    )
