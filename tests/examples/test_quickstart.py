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
from common.plots import ways_figure
from common.recipes import sgd
from common.training import evaluate, predict, train
from launch import run
from models import Threshold

from reseg_loss import SemiSupervised

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")  # a few steps teach it nothing


def test_quickstart_as_a_script_in_another_folder(tmp_path):
    command = [sys.executable, ROOT / "examples" / "quickstart.py", "--steps", "3", "--recon-steps", "2"]
    done = run(*command, cwd=tmp_path)
    for text in (
        "4 labelled and 60 unlabelled",
        "made-up noise",
        "HD95 mean in mm",
        "never evidence",
        "One seed proves",
    ):
        assert text in done.stdout
    assert "stage 1" in done.stderr  # the progress bars

    folder = tmp_path / "outputs" / "quickstart"
    picture = (folder / "quickstart.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 400_000
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["ways"]) == ["bare", "reseg", "deep", "semi"]
    for name, way in metrics["ways"].items():
        assert len(way["volumes"]) == 4
        assert f"{quickstart.TITLES[name]} " in done.stdout
        assert f" {100 * way['mean_dsc']:.2f} " in done.stdout


def run_quickstart(slices: Path, *more: str) -> dict:
    out = slices.parent / "out"
    options = ["--data", str(slices), "--patients", "2", "--steps", "6", "--recon-steps", "3", "--device", "cpu"]
    quickstart.main([*options, "--out", str(out), *more])
    return json.loads((out / "metrics.json").read_text())


def test_the_picture_says_what_the_table_says(slices, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(quickstart, "ways_figure", lambda *parts: drawn.append(ways_figure(*parts)) or drawn[0])
    metrics = run_quickstart(slices, "--steps", "20", "--ways", "bare,deep,semi")
    titles = [axes.get_title() for axes in drawn[0].axes]
    rows = capsys.readouterr().out.splitlines()
    dsc = {way: f"{100 * scores['mean_dsc']:.2f}" for way, scores in metrics["ways"].items()}
    assert len(set(dsc.values())) > 1
    for way, value in dsc.items():
        title = quickstart.TITLES[way]
        assert f"{title}\nDSC {value} (test set)" in titles
        assert any(row.split()[: len(title.split())] == title.split() and value in row.split() for row in rows)
    assert sum("errors here" in title for title in titles) == 3


def test_all_ways_have_the_same_start_and_batches(slices, capsys):
    """Nothing but the loss tells them apart: without weight the alignment leaves the bare network."""
    metrics = run_quickstart(slices, "--weight", "0", "--ways", "bare,reseg")["ways"]
    assert metrics["bare"]["volumes"] == metrics["reseg"]["volumes"]
    printed = capsys.readouterr().out
    assert "HD95 mean in pixels" in printed
    assert "the voxel size is not known" in printed
    assert "averaged brain" not in printed


def test_every_way_changes_the_network_and_the_mean_teacher_is_tested(slices, monkeypatch):
    networks = []
    monkeypatch.setattr(quickstart, "evaluate", lambda model, *rest: networks.append(model) or evaluate(model, *rest))
    made = []

    class Made(SemiSupervised):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(quickstart, "SemiSupervised", Made)
    run_quickstart(slices, "--weight", "3")
    states = [network.state_dict() for network in networks]
    assert networks[3] is made[0].average
    assert made[0].calls == 6
    for i, one in enumerate(states):
        assert list(one) == list(states[0])
        for other in states[:i]:
            assert any(not torch.equal(value, other[key]) for key, value in one.items())


def test_preset_patients_and_seed_reach_the_run(slices):
    more = ["--preset", "standardized", "--seed", "5", "--ways", "reseg"]
    expected = {"preset": "standardized", "patients": 2, "seed": 5}
    options = run_quickstart(slices, *more)["options"]
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ways", "bare,more"], "'more' is none of bare, reseg, deep, semi"),
        (["--slices", "64"], "choose 1 to 63"),
        (["--steps", "0"], "1 or more"),
        (["--weight", "-1"], "0 or more"),
        (["--ways", "bare", "--weight", "5", "--preset", "paper"], "--preset and --weight: only runs with reseg"),
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
    model = quickstart.unet(2)
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
