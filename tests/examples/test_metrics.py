"""The examples' DSC and HD95 against a reference written from the definitions, and what happens without a class."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from common.metrics import VolumeScores, score_volume, summarize
from common.report import comparison_table, scores_table

SHAPE = (5, 23, 17)


def blobs(seed: int, classes: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(classes, *SHAPE))
    return np.stack([gaussian_filter(channel, 1.5) for channel in noise]).argmax(0).astype(np.uint8)


def reference_dsc(a: np.ndarray, b: np.ndarray) -> float:
    voxels_a, voxels_b = ({tuple(v) for v in np.argwhere(mask)} for mask in (a, b))
    return 2 * len(voxels_a & voxels_b) / (len(voxels_a) + len(voxels_b))


def reference_surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face that touches the outside; the edge of the volume is outside."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inner)


def reference_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float, float]) -> float:
    distances = cdist(reference_surface(a) * np.array(spacing), reference_surface(b) * np.array(spacing))
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0), (5.0, 0.75, 1.25)])
@pytest.mark.parametrize("seed", [0, 2])
def test_scores_equal_the_definitions(seed, spacing):
    prediction, truth = blobs(seed), blobs(seed + 1)
    scores = score_volume("v", prediction, truth, 3, spacing)
    for index, (dsc, hd95) in enumerate(zip(scores.dsc, scores.hd95), 1):
        assert dsc == pytest.approx(reference_dsc(prediction == index, truth == index), rel=1e-5)
        expected = reference_hd95(prediction == index, truth == index, spacing or (1.0, 1.0, 1.0))
        assert hd95 == pytest.approx(expected, rel=1e-5)
    assert scores.unit == ("px" if spacing is None else "mm")


def test_perfect_prediction():
    truth = blobs(4)
    scores = score_volume("v", truth.copy(), truth, 3, None)
    assert scores.dsc == (1.0, 1.0)
    assert scores.hd95 == (0.0, 0.0)


def test_class_absent_from_both_is_skipped_and_counted():
    truth, prediction = blobs(0), blobs(1)
    truth[truth == 2] = 0
    prediction[prediction == 2] = 0
    without = score_volume("without", prediction, truth, 3, None)
    assert without.dsc[1] is None
    assert without.hd95[1] is None
    whole = score_volume("with", blobs(0), blobs(1), 3, None)
    summary = summarize([without, whole])
    assert summary.skipped == (0, 1)
    assert summary.dsc[1] == whole.dsc[1]
    assert summary.hd95[1] == whole.hd95[1]


@pytest.mark.parametrize("absent_from", ["truth", "prediction"])
@pytest.mark.parametrize(
    ("spacing", "diagonal"), [(None, math.sqrt(25 + 529 + 289)), ((2.0, 1.0, 3.0), math.sqrt(100 + 529 + 2601))]
)
def test_class_absent_from_one_is_a_failure(absent_from, spacing, diagonal):
    maps = {"truth": blobs(0), "prediction": blobs(1)}
    maps[absent_from][maps[absent_from] == 1] = 0
    scores = score_volume("v", maps["prediction"], maps["truth"], 3, spacing)
    assert scores.dsc[0] == 0
    assert scores.hd95[0] == pytest.approx(diagonal, rel=1e-4)
    assert summarize([scores]).skipped == (0, 0)


def test_summary_averages_volumes_then_classes():
    first = VolumeScores("a", (0.5, 0.9), (4.0, 1.0), "mm")
    second = VolumeScores("b", (0.7, None), (2.0, None), "mm")
    summary = summarize([first, second])
    assert summary.dsc == pytest.approx((0.6, 0.9))
    assert summary.hd95 == pytest.approx((3.0, 1.0))
    assert summary.mean_dsc == pytest.approx(0.75)
    assert summary.mean_hd95 == pytest.approx(2.0)


def test_summary_of_a_class_that_no_volume_has():
    summary = summarize([VolumeScores("a", (0.5, None), (4.0, None), "mm")])
    assert summary.dsc[1] is None
    assert summary.mean_dsc == 0.5


def test_millimetres_and_pixels_are_not_averaged():
    with pytest.raises(ValueError, match="no common unit"):
        summarize([VolumeScores("a", (1.0,), (1.0,), "mm"), VolumeScores("b", (1.0,), (1.0,), "px")])


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 23, 17\).*\(5, 23, 16\)"):
        score_volume("v", blobs(0), blobs(0)[:, :, 1:], 3, None)


def test_labels_beyond_the_classes_are_refused():
    truth = blobs(0)
    truth[0, 0, 0] = 13
    with pytest.raises(ValueError, match="truth of case 7 has the label 13, but the classes are 0 to 2; relabel"):
        score_volume("case 7", blobs(0), truth, 3, None)


def test_table_shows_both_runs_the_unit_and_what_was_skipped():
    bare = summarize([VolumeScores("a", (0.5, None), (4.0, None), "px")])
    reseg = summarize([VolumeScores("a", (0.625, 0.0), (3.0, 28.5), "px")])
    lines = comparison_table("Net", ("background", "liver", "spleen"), bare, reseg).splitlines()
    assert "HD95 in pixels" in lines[0]
    assert lines[2].split() == ["liver", "50.00", "|", "62.50", "4.00", "|", "3.00"]
    assert lines[3].split() == ["spleen", "-", "|", "0.00", "-", "|", "28.50"]
    assert lines[4].split() == ["mean", "of", "classes", "50.00", "|", "31.25", "4.00", "|", "15.75"]
    assert lines[5] == "volumes skipped, bare (class neither in truth nor in prediction): spleen 1"
    assert lines[6:] == ["with reseg has not learnt spleen: train longer before you compare it with anything"]


def test_table_of_any_number_of_runs():
    runs = {"bare": (0.5, 0.0), "semi": (0.75, 0.25), "deep": (0.5, 0.02)}
    results = {name: summarize([VolumeScores("a", dsc, (4.0, 5.5), "mm")]) for name, dsc in runs.items()}
    lines = scores_table(results, ("background", "liver", "spleen")).splitlines()
    assert "  ".join(lines[0].split()) == "DSC  liver  DSC  spleen  DSC  mean  HD95  mean  in  mm"
    assert [line.split() for line in lines[1:4]] == [
        ["bare", "50.00", "0.00", "25.00", "4.75"],
        ["semi", "75.00", "25.00", "50.00", "4.75"],
        ["deep", "50.00", "2.00", "26.00", "4.75"],
    ]
    assert lines[4:] == ["bare has not learnt spleen: train longer before you compare it with anything"]
