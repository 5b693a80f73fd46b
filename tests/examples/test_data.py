"""The examples' data: the split of the template, splits by patient, every layout, and the batches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from common.data import (
    Case,
    SegmentationData,
    TrainingBatches,
    augment,
    beside,
    load_data,
    load_images,
    load_mni152,
    scanned,
    slabs,
    split_groups,
)

# --- the MNI152 template


@pytest.fixture(scope="module")
def template() -> SegmentationData:
    """At 1 mm, where every slice is a plain crop of the template's."""
    return load_mni152(side_mm=192, size=192)


@pytest.fixture(scope="module")
def heights() -> dict[bytes, int]:
    """Slice contents, cropped and turned by hand, to their height in the template."""
    volume = np.asarray(load_mni152_template(resolution=1).dataobj, dtype=np.float32)
    # the middle 192 of 197 columns and of 233 rows, counted from the forehead
    crops = {z: np.ascontiguousarray(volume[2:194, ::-1, z].T[20:212]) for z in range(volume.shape[2])}
    return {crop.tobytes(): z for z, crop in crops.items() if crop.any()}


def heights_of(cases: tuple[Case, ...], heights: dict[bytes, int]) -> set[int]:
    return {heights[np.ascontiguousarray(image).tobytes()] for case in cases for image in case.read()[0]}


def test_no_test_slice_within_4_mm_of_a_training_slice(template, heights):
    train, test = heights_of(template.train, heights), heights_of(template.test, heights)
    assert len(train) >= 60
    assert len(test) >= 50
    assert min(abs(a - b) for a in train for b in test) > 4


def test_slabs_alternate_and_lose_their_first_4_mm(template, heights):
    parts = [(heights_of((case,), heights), "train") for case in template.train]
    parts += [(heights_of((case,), heights), "test") for case in template.test]
    parts.sort(key=lambda part: min(part[0]))
    assert [kind for _, kind in parts] == ["train", "test"] * 4
    for number, (slab, _) in enumerate(parts):
        assert slab <= set(range(20 * number + 4, 20 * number + 20))


def test_slabs_cover_the_depth():
    assert slabs(45, thickness=20, margin=4) == [range(4, 20), range(24, 40), range(44, 45)]
    assert slabs(44, thickness=20, margin=4) == [range(4, 20), range(24, 40)]


def test_template_labels_follow_the_tissue_maps(template):
    grey, white = (
        np.asarray(load(resolution=1).dataobj, dtype=np.float32)
        for load in (load_mni152_gm_template, load_mni152_wm_template)
    )
    label = template.test[1].read()[1][0]  # its first slice is at 64 mm
    expected = np.where((grey > 0.25) & (grey >= white), 1, np.where(white > 0.25, 2, 0))[:, :, 64]
    for value in (1, 2):
        assert (label == value).sum() == (expected == value).sum() > 1000  # and the crop cuts nothing off


@pytest.mark.parametrize("part", ["train", "test"])
def test_template_at_its_default_size(part):
    data = load_data()
    again = load_data()
    assert data.class_names == ("background", "grey matter", "white matter")
    for case, same in zip(getattr(data, part), getattr(again, part)):
        image, label = case.read()
        assert image.shape == label.shape == (len(image), data.size, data.size)
        assert set(np.unique(label)) == {0, 1, 2}
        assert case.spacing == (1.0, 192 / data.size, 192 / data.size)
        np.testing.assert_array_equal(image, same.read()[0])
        np.testing.assert_array_equal(label, same.read()[1])


def test_the_scanned_template_is_the_template_with_noise_of_each_slice_s_own():
    plain = load_mni152()
    data, again = scanned(plain), scanned(plain)
    for part in ("train", "test"):
        for before, after, once_more in zip(
            getattr(plain, part), getattr(data, part), getattr(again, part), strict=True
        ):
            (image, label), (noisy, same) = before.read(), after.read()
            assert np.array_equal(label, same)
            assert np.array_equal(noisy, once_more.read()[0])
            assert noisy.dtype == np.float32
            assert 0.03 < np.abs(noisy - image).mean() < 0.3
            assert all(0 < np.corrcoef(a.ravel(), b.ravel())[0, 1] < 0.999 for a, b in zip(image, noisy))


def test_template_has_no_patients_to_choose():
    with pytest.raises(ValueError, match="one averaged brain"):
        load_data(patients=3)


# --- splits by patient


@pytest.mark.parametrize("count", [2, 3, 7, 45, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_split_keeps_patients_apart(count, seed):
    groups = [f"p{index:03}" for index in range(count)]
    train, test = split_groups(groups, seed=seed)
    assert not set(train) & set(test)
    assert sorted(train + test) == groups
    assert len(test) == max(1, round(count / 5))


def test_split_is_even_along_the_numbering():
    train, test = split_groups([str(number) for number in range(1, 101)], seed=3, train=5)
    assert np.bincount([(int(number) - 1) // 20 for number in test]).tolist() == [4] * 5
    assert np.bincount([(int(number) - 1) // 20 for number in train]).tolist() == [1] * 5


def test_test_patients_depend_on_the_seed_alone():
    groups = [str(number) for number in range(40)]
    assert split_groups(groups, seed=0, train=3)[1] == split_groups(groups, seed=0)[1]
    assert split_groups(groups, seed=0)[1] != split_groups(groups, seed=1)[1]


@pytest.mark.parametrize("train", [0, 5])
def test_number_of_patients_is_checked(train):
    with pytest.raises(ValueError, match="choose 1 to 4"):
        split_groups(list("abcde"), seed=0, train=train)


def test_a_patient_in_both_parts_is_refused():
    case = Case("c", "patient 7", lambda: (np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)))
    with pytest.raises(ValueError, match="patient 7 in training and test"):
        SegmentationData("d", (case,), (case,), ("background", "organ"), 32)


# --- one .npz


def write_npz(path: Path, **changes) -> Path:
    """Six patients with two frames of three slices, in random order; each slice is filled with its number."""
    table = np.array([(p, f, s) for p in range(6) for f in (1, 9) for s in range(3)])
    table = np.random.default_rng(0).permutation(table)
    codes = (100 * (table[:, 0] % 2) + 10 * (table[:, 1] > 1) + table[:, 2]).astype(np.uint8)
    images = np.broadcast_to(codes[:, None, None], (len(codes), 40, 24))
    arrays = {
        "images": images,
        "labels": (images % 3).astype(np.uint8),
        "patient": table[:, 0],
        "frame": table[:, 1],
        "slice": table[:, 2],
        **changes,
    }
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_npz_becomes_volumes_in_order(tmp_path):
    data = load_data(write_npz(tmp_path / "heart.npz", spacing=np.array([8.0, 1.5, 1.25])))
    cases = data.train + data.test
    assert len(cases) == 12
    assert {case.group for case in cases} == set("012345")
    assert not {case.group for case in data.train} & {case.group for case in data.test}
    assert data.name == "heart"
    assert data.size == 64  # 40 rows, rounded up to a multiple of 32
    assert data.class_names == ("background", "class 1", "class 2")
    for case in cases:
        image, label = case.read()
        first = 100 * (int(case.group) % 2) + (10 if case.name.endswith("frame 9") else 0)
        assert image.shape == (3, 40, 24)
        np.testing.assert_allclose(image[:, 0, 0] * 255, [first, first + 1, first + 2], rtol=1e-5)
        np.testing.assert_array_equal(label[:, 5, 5], [first % 3, (first + 1) % 3, (first + 2) % 3])
        assert case.spacing == (8.0, 1.5, 1.25)


def test_npz_without_frames_has_one_volume_per_patient(tmp_path):
    data = load_data(write_npz(tmp_path / "a.npz", frame=None, slice=None), patients=2)
    assert len(data.train) == 2
    assert [len(case.read()[0]) for case in data.train] == [6, 6]
    assert data.train[0].spacing is None


def test_npz_may_call_its_frames_phases(tmp_path):
    frames = load_data(write_npz(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz") as file:
        phase = file["frame"]
    phases = load_data(write_npz(tmp_path / "b.npz", frame=None, phase=phase))
    for ours, theirs in zip(phases.train + phases.test, frames.train + frames.test, strict=True):
        assert ours.name == theirs.name.replace("frame", "phase")
        assert np.array_equal(ours.read()[0], theirs.read()[0])
    both = load_data(write_npz(tmp_path / "c.npz", phase=phase))  # a phase may be a frame's kind, as in ACDC
    assert [case.name for case in both.train] == [case.name for case in frames.train]


def test_npz_with_volumes_that_nothing_tells_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.npz has two slices of one number .* patient 0; .* with 'frame'"):
        load_data(write_npz(tmp_path / "a.npz", frame=None))


def test_npz_with_volumes_is_refused(tmp_path):
    volumes = np.zeros((36, 8, 8, 8), np.uint8)
    with pytest.raises(ValueError, match=r"a\.npz holds 3D volumes .* slices one by one"):
        load_data(write_npz(tmp_path / "a.npz", images=volumes, labels=volumes))


def test_npz_without_patients_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"lacks \['patient'\]"):
        load_data(write_npz(tmp_path / "a.npz", patient=None))


def test_npz_with_unequal_shapes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(36, 40, 24\), \(36, 40, 23\)"):
        load_data(write_npz(tmp_path / "a.npz", labels=np.zeros((36, 40, 23), np.uint8)))


def test_npz_with_two_spacings_in_a_volume_is_refused(tmp_path):
    spacing = np.ones((36, 3))
    spacing[4] = 2
    with pytest.raises(ValueError, match="one per volume"):
        load_data(write_npz(tmp_path / "a.npz", spacing=spacing))


def test_raw_intensities_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.npz, patient 0 frame 1: .* -1000 to -1000.*scale them to 0\.\.1"):
        load_data(write_npz(tmp_path / "a.npz", images=np.full((36, 40, 24), -1000, np.int16)))


@pytest.mark.parametrize("value", [0.9, 1.5, -1, 257, 255, np.nan])
def test_npz_with_labels_that_would_be_cut_or_wrapped_is_refused(tmp_path, value):
    labels = np.zeros((36, 40, 24))
    labels[:, 3] = value
    with pytest.raises(ValueError, match=r"a\.npz, patient 0 frame 1 has values .* labels are 0, 1, 2, .* 254"):
        load_data(write_npz(tmp_path / "a.npz", labels=labels))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_npz_with_values_that_are_no_numbers_is_refused(tmp_path, value):
    images = np.zeros((36, 40, 24), np.float32)
    images[:, 3, 3] = value
    with pytest.raises(ValueError, match=r"a\.npz, patient 0 frame 1: the image has NaN or infinite values"):
        load_data(write_npz(tmp_path / "a.npz", images=images))


# --- the folders of TransUNet


def write_h5(path: Path, image: np.ndarray, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


def write_synapse(root: Path, test_cases: tuple[int, ...] = (1, 2)) -> Path:
    (root / "train_npz").mkdir(parents=True)
    for case in (5, 6, 7):
        for z in range(11):
            image = np.full((48, 48), z / 10, np.float32)
            np.savez(root / "train_npz" / f"case{case:04}_slice{z:03}.npz", image=image, label=np.full((48, 48), 8.0))
    for case in test_cases:
        write_h5(
            root / "test_vol_h5" / f"case{case:04}.npy.h5", np.ones((4, 48, 48), np.float32), np.zeros((4, 48, 48))
        )
    return root


def test_synapse_folder(tmp_path):
    data = load_data(write_synapse(tmp_path / "Synapse"))
    assert [case.name for case in data.train] == ["case0005", "case0006", "case0007"]
    assert [case.name for case in data.test] == ["case0001", "case0002"]
    image, label = data.train[1].read()
    np.testing.assert_allclose(image[:, 0, 0], np.arange(11) / 10, rtol=1e-6)
    assert label.dtype == np.uint8
    assert (label == 8).all()
    assert data.test[0].read()[0].shape == (4, 48, 48)  # scored at its own resolution
    assert data.class_names[8] == "stomach"
    assert data.size == 224
    assert all(case.spacing is None for case in data.test)


def test_synapse_with_fewer_patients(tmp_path):
    data = load_data(write_synapse(tmp_path), patients=2)
    assert len(data.train) == 2
    assert len(data.test) == 2


def test_synapse_case_in_both_folders_is_refused(tmp_path):
    with pytest.raises(ValueError, match="case0006 in training and test"):
        load_data(write_synapse(tmp_path, test_cases=(1, 6)))


def test_synapse_without_test_volumes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test_vol_h5 is missing"):
        load_data(write_synapse(tmp_path, test_cases=()))


def write_acdc(root: Path) -> Path:
    for patient in range(1, 6):
        for frame in (1, 12):
            shape = (11, 30 + patient, 40)
            image = np.broadcast_to(np.linspace(0, 1, 11, dtype=np.float32)[:, None, None], shape)
            label = np.full(shape, patient % 4, np.uint8)
            name = f"patient{patient:03}_frame{frame:02}"
            write_h5(root / "ACDC_training_volumes" / f"{name}.h5", image, label)
            for z in range(11):
                write_h5(root / "ACDC_training_slices" / f"{name}_slice_{z}.h5", image[z], label[z])
    return root


def test_acdc_folder(tmp_path):
    data = load_data(write_acdc(tmp_path / "ACDC"))
    train, test = ({case.group for case in part} for part in (data.train, data.test))
    assert len(train) == 4
    assert len(test) == 1
    assert not train & test
    assert len(data.test) == 2  # both frames of the patient
    for case in data.train:
        image, label = case.read()
        np.testing.assert_allclose(image[:, 3, 3], np.linspace(0, 1, 11), rtol=1e-6)  # slice 10 after slice 9
        assert (label == int(case.group[-3:]) % 4).all()
    assert data.class_names == ("background", "right ventricle", "myocardium", "left ventricle")
    assert TrainingBatches(data, 4, seed=0)[0][0].shape == (4, 1, 224, 224)


@pytest.mark.parametrize("folder", ["slices", "volumes"])
def test_acdc_frames_that_only_one_folder_has_are_named(tmp_path, folder):
    for path in (write_acdc(tmp_path) / f"ACDC_training_{folder}").glob("patient003_frame12*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"but not both, of 1 frames \(patient003_frame12\); complete"):
        load_data(tmp_path)


def test_h5_without_labels_is_refused(tmp_path):
    root = write_acdc(tmp_path)
    for path in (root / "ACDC_training_volumes").iterdir():
        with h5py.File(path, "a") as file:
            del file["label"]
    with pytest.raises(ValueError, match=r"lacks 'image' or 'label'; it has \['image'\]"):
        load_data(root).test[0].read()


def test_files_with_values_that_would_be_cut_are_refused(tmp_path):
    root, shape = write_acdc(tmp_path), (11, 35, 40)
    path = root / "ACDC_training_slices" / "patient005_frame01_slice_3.h5"
    for image, label, message in (
        (np.zeros(shape[1:], np.float32), np.full(shape[1:], 0.5), "has values from 0.5 to 0.5; labels are"),
        (np.full(shape[1:], np.nan, np.float32), np.zeros(shape[1:]), "NaN or infinite"),
    ):
        path.unlink()
        write_h5(path, image, label)
        with pytest.raises(ValueError, match=rf"patient005_frame01_slice_3\.h5.*{message}"):
            [case.read() for seed in range(9) for case in load_data(root, seed=seed).train]


def test_unknown_layouts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none of the known layouts"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match="nothing at"):
        load_data(tmp_path / "missing.npz")


# --- images without labels


def test_npz_leaves_the_other_training_patients_without_labels(tmp_path):
    data = load_data(write_npz(tmp_path / "a.npz"), patients=2)
    parts = [{case.group for case in cases} for cases in (data.train, data.unlabelled, data.test)]
    assert [len(part) for part in parts] == [2, 3, 1]
    assert set.union(*parts) == set("012345")
    assert load_data(tmp_path / "a.npz").unlabelled == ()


@pytest.mark.parametrize("slices", [1, 3, 9])
def test_labels_of_a_few_slices(numbered, slices):
    data = numbered.with_labels_of(slices)
    known, unknown = (
        [int(z) for case in cases for z in case.read()[1][:, 0, 0]] for cases in (data.train, data.unlabelled)
    )
    assert len(known) == slices
    assert sorted(known + unknown) == list(range(10))
    assert max(np.diff([-1, *known, 10])) <= 2 * (10 / slices)  # evenly
    for case in (*data.train, *data.unlabelled):
        image, label = case.read()
        np.testing.assert_allclose(image * 10, label)
    assert data.test == numbered.test
    for case, hidden in zip(data.unlabelled, data.others.train, strict=True):
        (image, label), (same, zeros) = case.read(), hidden.read()
        assert hidden.name == case.name
        assert np.array_equal(same, image)
        assert (zeros.shape, zeros.dtype, zeros.any()) == (label.shape, label.dtype, False)


@pytest.mark.parametrize("slices", [0, 10])
def test_number_of_labelled_slices_is_checked(numbered, slices):
    with pytest.raises(ValueError, match="choose 1 to 9"):
        numbered.with_labels_of(slices)


def test_an_unlabelled_test_patient_is_refused(numbered):
    with pytest.raises(ValueError, match="b in training and test"):
        replace(numbered, unlabelled=numbered.test)


def test_images_of_a_file_are_like_those_with_labels(numbered, tmp_path):
    flat = numbered.train[0]
    np.savez(tmp_path / "flat.npz", images=np.full((7, 32, 32), 255, np.uint8))
    (case,) = load_images(tmp_path / "flat.npz", flat)
    assert case.read()[0].shape == case.read()[1].shape == (7, 32, 32)
    assert case.read()[0].max() == 1
    image, label = flat.read()
    volume = replace(flat, read=lambda: (image[None], label))
    np.savez(tmp_path / "deep.npz", images=np.zeros((3, 9, 8, 7), np.uint8))
    cases = load_images(tmp_path / "deep.npz", volume)
    assert [(case.read()[0].shape, case.read()[1].shape) for case in cases] == [((1, 9, 8, 7), (9, 8, 7))] * 3
    np.savez(tmp_path / "deep.npz", images=np.zeros((2, 3, 9, 8, 7), np.uint8))
    with pytest.raises(ValueError, match="not as those with labels"):
        load_images(tmp_path / "deep.npz", flat)
    with pytest.raises(ValueError, match=r"no \.npz"):
        load_images(tmp_path / "missing.npz", flat)
    np.savez(tmp_path / "flat.npz", images=np.full((7, 32, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"flat\.npz 0: the image has NaN"):
        load_images(tmp_path / "flat.npz", flat)
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    with pytest.raises(ValueError, match="lacks 'images'"):
        load_images(tmp_path / "other.npz", flat)


def test_batches_of_two_loaders_side_by_side(numbered):
    data = numbered.with_labels_of(4)
    labelled, unlabelled = TrainingBatches(data, 2, seed=0), TrainingBatches(data.others, 3, seed=1)
    for step, (image, label, other) in enumerate(beside(labelled.loader(5), unlabelled.loader(5))):
        assert torch.equal(image, labelled[step][0])
        assert torch.equal(label, labelled[step][1])
        assert torch.equal(other, unlabelled[step][0])
    assert step == 4


# --- batches


@pytest.fixture
def numbered() -> SegmentationData:
    """Ten training slices, each of which is filled with its number."""

    def read() -> tuple[np.ndarray, np.ndarray]:
        values = np.arange(10)[:, None, None] * np.ones((1, 32, 32))
        return (values / 10).astype(np.float32), values.astype(np.uint8)

    names = tuple(f"class {index}" for index in range(10))
    return SegmentationData("numbers", (Case("a", "a", read),), (Case("b", "b", read),), names, 32)


def centres(image: torch.Tensor) -> list[int]:
    return (image[:, 0, 16, 16] * 10).round().int().tolist()


def test_a_pass_shows_every_slice_and_no_two_passes_are_the_same(numbered):
    loader = TrainingBatches(numbered, 5, seed=0).loader()
    passes = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        passes.append([number for image, _ in loader for number in centres(image)])
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(10))
    assert passes[0] != passes[1]


def test_batches_depend_on_seed_and_step_alone(numbered):
    whole = list(TrainingBatches(numbered, 3, seed=4).loader(6))
    torch.manual_seed(99)
    rest = list(TrainingBatches(numbered, 3, seed=4).loader(6, start=4))
    assert len(whole) == 6
    assert len(rest) == 2
    for (image, label), (same_image, same_label) in zip(whole[4:], rest):
        assert torch.equal(image, same_image)
        assert torch.equal(label, same_label)
    assert label.shape == (3, 32, 32)
    assert label.dtype == torch.int64
    others = list(TrainingBatches(numbered, 3, seed=5).loader(6))
    assert [centres(image) for image, _ in whole] != [centres(image) for image, _ in others]


def test_labels_beyond_the_classes_are_refused(numbered):
    fewer = SegmentationData("numbers", numbered.train, numbered.test, ("background", "organ"), 32)
    with pytest.raises(ValueError, match="label 9, but the classes of numbers are 0 to 1"):
        TrainingBatches(fewer, 2, seed=0)


def test_augmentation_moves_image_and_label_together():
    label = torch.zeros(64, 64, dtype=torch.uint8)
    label[8:30, 12:50] = 1
    label[30:40, 12:20] = 1  # an L: no turn or flip maps it onto itself
    image = label[None].float()
    rng = np.random.default_rng(0)
    same = turned = 0
    for _ in range(400):
        moved_image, moved_label = augment(image, label, rng)
        assert moved_label.dtype == label.dtype
        assert ((moved_image[0] > 0.5) == (moved_label == 1)).float().mean() > 0.99
        same += int(torch.equal(moved_label, label))
        turned += int(not torch.equal(moved_image, moved_label[None].float()))  # interpolated
    assert 70 < same < 130  # a quarter
    assert 70 < turned < 130
