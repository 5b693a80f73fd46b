"""The quickstart from end to end with a handful of steps, and the loop it shares with the other examples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import quickstart
from common.data import TrainingBatches, load_data
from common.recipes import sgd
from common.training import predict, train
from launch import run
from models import Threshold

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")  # a few steps teach it nothing


def test_quickstart_as_a_script_in_another_folder(tmp_path):
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--steps", "3", "--recon-steps", "2"]
    done = run(*command, cwd=tmp_path)
    for text in ("BasicUNet", "smp Unet", "grey matter", "HD95 in mm", "never evidence", "One seed proves nothing"):
        assert text in done.stdout
    assert "stage 1" in done.stderr  # the progress bars
    assert "MONAI BasicUNet, with reseg" in done.stderr

    folder = tmp_path / "outputs" / "quickstart"
    picture = (folder / "quickstart.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 400_000
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["models"]) == {"basicunet", "unet"}
    for model in metrics["models"].values():
        assert len(model["bare"]["volumes"]) == len(model["reseg"]["volumes"]) == 4
        assert model["bare"]["volumes"] != model["reseg"]["volumes"]


def run_quickstart(slices: Path, *more: str) -> dict:
    out = slices.parent / "out"
    options = ["--data", str(slices), "--models", "basicunet", "--steps", "6", "--recon-steps", "3", "--device", "cpu"]
    quickstart.main([*options, "--out", str(out), *more])
    return json.loads((out / "metrics.json").read_text())


def test_both_runs_are_the_same_without_weight(slices, capsys):
    """Same weights, batches, augmentation and steps: nothing but the loss tells the runs apart."""
    metrics = run_quickstart(slices, "--weight", "0")["models"]["basicunet"]
    assert metrics["bare"] == metrics["reseg"]
    printed = capsys.readouterr().out
    assert "HD95 in pixels" in printed
    assert "the voxel size is not known" in printed
    assert "averaged brain" not in printed


def test_deep_supervision_changes_the_second_run_alone(slices):
    without = run_quickstart(slices, "--weight", "0")["models"]["basicunet"]
    deep = run_quickstart(slices, "--weight", "0", "--deep-supervision")["models"]["basicunet"]
    assert deep["bare"] == without["bare"]
    assert deep["reseg"] != without["reseg"]


def test_weight_preset_and_patients_reach_the_run(slices):
    more = ["--weight", "3", "--preset", "paper", "--patients", "2", "--seed", "5", "--steps", "20"]
    metrics = run_quickstart(slices, *more)
    assert metrics["models"]["basicunet"]["bare"] != metrics["models"]["basicunet"]["reseg"]
    expected = {"weight": 3, "preset": "paper", "patients": 2, "seed": 5}
    assert {key: metrics["options"][key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "basicunet,vnet"], "'vnet' is none of basicunet, unet"),
        (["--steps", "0"], "1 or more"),
        (["--weight", "-1"], "0 or more"),
        (["--patients", "3"], "one averaged brain"),
        (["--data", "volumes.npz"], "holds 3D volumes"),
    ],
)
def test_wrong_options_are_explained(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    volumes = np.zeros((4, 8, 8, 8), np.uint8)
    np.savez("volumes.npz", images=volumes, labels=volumes, patient=np.arange(4))
    with pytest.raises(SystemExit):
        quickstart.main(options)
    assert message in capsys.readouterr().err


def test_training_goes_on_where_it_stopped(slices):
    data = load_data(slices)
    batches = TrainingBatches(data, 4, seed=0)

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))

    whole, halves = fresh(), fresh()
    losses = train(whole, batches.loader(6), sgd(whole.parameters(), 0.1), steps=6)
    optimizer = sgd(halves.parameters(), 0.1)
    first = train(halves, [batches[step] for step in range(3)], optimizer, steps=6)
    saved = optimizer.state_dict()
    optimizer = sgd(halves.parameters(), 0.1)
    optimizer.load_state_dict(saved)
    rest = train(halves, batches.loader(6, start=3), optimizer, steps=6, start=3)
    assert first + rest == losses
    for a, b in zip(whole.parameters(), halves.parameters()):
        assert torch.equal(a, b)


def test_training_learns(slices):
    data = load_data(slices)
    torch.manual_seed(0)
    model = quickstart.basic_unet(2)
    losses = train(model, TrainingBatches(data, 8, seed=0).loader(40), sgd(model.parameters(), 0.05), steps=40)
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:3])


def test_prediction_is_at_the_volume_s_own_resolution():
    volume = np.zeros((5, 48, 80), np.float32)
    volume[1, 10:30, 20:70] = 1
    model = Threshold().train()
    prediction = predict(model, volume, size=64, batch_size=2)
    assert model.seen == [(2, 1, 64, 64), (2, 1, 64, 64), (1, 1, 64, 64)]
    assert prediction.shape == volume.shape
    assert (prediction != (volume > 0.5)).mean() < 0.01
    assert (prediction[1] == 1).sum() > 900
    assert model.training
