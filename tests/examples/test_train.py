"""The train scripts and the ablation with a handful of steps: every network, resume after a kill, two processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import ablation
from common.data import TrainingBatches, load_data
from common.experiment import fingerprint, main, parse_arguments, trained_and_tested
from common.processes import gather, share
from common.recipes import Recipe
from common.training import train
from launch import TORCHRUN, environment, run

from reseg_loss import ReSegWrapper, SemiSupervised

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train_unet", "train_smp", "train_transunet", "train_swin_unet", "train_vm_unet")

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")  # a few steps teach it nothing


def backbone(script: str):
    return importlib.import_module(script).BACKBONE


def options(slices: Path, *more: str) -> list[str]:
    short = ["--steps", "3", "--recon-steps", "2", "--batch-size", "4", "--device", "cpu"]
    return ["--small", "--data", str(slices), *short, "--out", str(slices.parent / "out"), *more]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_network_trains_without_and_with_reseg_and_deep_supervision(script, slices, capsys):
    main(backbone(script), options(slices, "--deep-supervision", "--amp", "bf16"))
    out = slices.parent / "out"
    bare, ours = (json.loads((out / f"{name}.json").read_text()) for name in ("bare", "reseg+deep"))
    for result in (bare, ours):
        assert result["steps"] == 3
        assert result["seconds_per_step"] > 0
        assert len(result["volumes"]) == 1
        assert result["options"]["seed"] == 0
    assert bare["stage1_losses"] == []
    assert len(ours["stage1_losses"]) == 1
    assert bare["task_loss"] != ours["task_loss"]
    assert (out / "overlays.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("DSC in %", "HD95 in pixels", "reseg+deep", "class 1", "One seed proves nothing", "too short"):
        assert text in printed
    keys = list(backbone(script).small(2, 96).state_dict())
    assert list(torch.load(out / "reseg+deep.pt", weights_only=True)["model"]) == keys


def test_a_script_in_another_folder_on_the_packaged_data(tmp_path):
    script = ROOT / "examples" / "train_unet.py"
    done = run(sys.executable, script, "--small", "--steps", "2", "--recon-steps", "2", cwd=tmp_path)
    for text in ("MNI152", "grey matter", "HD95 in mm", "never evidence"):
        assert text in done.stdout
    assert "U-Net, reseg" in done.stderr  # the progress bars
    assert {file.name for file in (tmp_path / "outputs" / "u_net").iterdir()} == {
        *("bare.pt", "bare.json", "stage1.pt", "stage1.json", "reseg.pt", "reseg.json", "overlays.png")
    }


def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(slices):
    """TransUNet has dropout: the random numbers go on exactly as well."""
    out = slices.parent / "out"
    script = [sys.executable, str(ROOT / "examples" / "train_transunet.py")]
    command = [*script, *options(slices, "--steps", "20", "--save-every", "4", "--deep-supervision")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()) as process:
        while not (out / "reseg+deep.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    stopped = torch.load(out / "reseg+deep.pt", weights_only=True)
    assert 4 <= len(stopped["run"]["losses"]) < 20
    run(*command)

    whole = slices.parent / "whole"
    run(*command, "--out", whole)
    for name in ("bare", "reseg+deep"):
        again, once = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in (out, whole))
        assert again["run"]["losses"] == once["run"]["losses"]
        assert len(once["run"]["losses"]) == 20
        for key, value in once["model"].items():
            assert torch.equal(value, again["model"][key]), key


def test_two_processes_share_every_batch_and_end_with_one_network(slices):
    done = run(*TORCHRUN, ROOT / "examples" / "train_unet.py", *options(slices, "--deep-supervision"))
    assert done.stdout.count("DSC in %") == 1
    assert json.loads((slices.parent / "out" / "reseg+deep.json").read_text())["steps"] == 3


def test_unlabelled_images_are_learnt_from_and_the_mean_teacher_is_tested(slices, capsys):
    out, unet = slices.parent / "out", backbone("train_unet")
    few = [*options(slices, "--steps", "6", "--patients", "1"), "--unlabelled"]
    main(unet, few)
    assert "reseg+semi" in capsys.readouterr().out
    state = torch.load(out / "reseg+semi.pt", weights_only=True)
    assert list(state["average"]) == list(state["model"]) == list(unet.small(2, 96).state_dict())
    assert any(not torch.equal(value, state["average"][key]) for key, value in state["model"].items())
    assert state["reseg"]["calls"] == state["semi"]["calls"] == 6
    main(unet, [*few, "--weight", "0"])  # without the alignment
    alone = json.loads((out / "semi.json").read_text())
    assert alone["options"]["reseg"] is None
    without = torch.load(out / "semi.pt", weights_only=True)["average"]
    assert any(not torch.equal(value, without[key]) for key, value in state["average"].items())
    main(unet, [*few, "--weight", "0"])  # what is finished is read, the mean teacher as well
    assert json.loads((out / "semi.json").read_text()) == alone


def test_with_unlabelled_images_it_goes_on_where_it_stopped(slices, monkeypatch):
    unet, few = backbone("train_unet"), ["--steps", "6", "--patients", "1", "--save-every", "2", "--unlabelled"]
    main(unet, options(slices, *few, "--out", str(slices.parent / "whole")))
    original, seen = TrainingBatches.__getitem__, []

    def killed(self, step):
        seen.append(step)
        if len(seen) == 22:  # bare: an example and 6 batches; then an example, stage 1, and 2 a step
            raise KeyboardInterrupt
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingBatches, "__getitem__", killed)
        with pytest.raises(KeyboardInterrupt):
            main(unet, options(slices, *few))
    out = slices.parent / "out"
    assert 0 < len(torch.load(out / "reseg+semi.pt", weights_only=True)["run"]["losses"]) < 6
    main(unet, options(slices, *few))
    again, once = (torch.load(slices.parent / name / "reseg+semi.pt", weights_only=True) for name in ("out", "whole"))
    assert again["run"]["losses"] == once["run"]["losses"]
    for key, value in once["average"].items():
        assert torch.equal(value, again["average"][key]), key


def test_the_alignment_leaves_unlabelled_images_out(slices):
    """Of two runs that differ in their unlabelled images alone the aligned parts are the same."""
    image, label = TrainingBatches(load_data(slices), 4, seed=0)[0]
    values = []
    for other in (image.flip(0), torch.rand_like(image)):
        torch.manual_seed(0)
        model = backbone("train_unet").small(2, 32)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # whose statistics would see the others
        semi = SemiSupervised(model, example_input=image, rampup_steps=5)
        reseg = ReSegWrapper(model, example_input=image, ignore_index=255)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        reseg.fit_recon([(image, label)], steps=1, progress=False)
        model.train = lambda mode=True, model=model: model  # as a user who freezes statistics does
        train(model, [(image, label, other)], optimizer, steps=1, semi=semi, reseg=reseg)
        values.append(reseg.stats()["alignment"])
    assert values[0] == values[1] > 0


def test_two_processes_share_labelled_and_unlabelled_batches(slices):
    more = ["--patients", "1", "--unlabelled", "--weight", "0"]
    run(*TORCHRUN, ROOT / "examples" / "train_unet.py", *options(slices, *more))
    state = torch.load(slices.parent / "out" / "semi.pt", weights_only=True)
    assert state["semi"]["calls"] == 3


def test_unlabelled_images_may_come_from_a_file(slices):
    file = slices.parent / "others.npz"
    np.savez(file, images=np.random.default_rng(0).integers(0, 200, (9, 32, 32)).astype(np.uint8))
    args = parse_arguments(backbone("train_unet"), options(slices, "--unlabelled", str(file)))
    assert [len(case.read()[0]) for case in args.dataset.unlabelled] == [9]
    args = parse_arguments(backbone("train_unet"), ["--small", "--unlabelled"])
    assert args.slices == 4
    assert sum(len(case.read()[0]) for case in args.dataset.unlabelled) == 60


def test_processes_draw_their_share_of_the_same_batch(slices):
    data = load_data(slices)
    image, label = TrainingBatches(data, 6, seed=1)[3]
    for rank in range(3):
        part, part_label = TrainingBatches(data, 6, seed=1, rank=rank, world_size=3)[3]
        assert torch.equal(part, image[rank::3])
        assert torch.equal(part_label, label[rank::3])
    with pytest.raises(ValueError, match="shared evenly by 4"):
        TrainingBatches(data, 6, seed=1, rank=0, world_size=4)


def test_scores_of_several_processes_come_in_the_order_of_the_volumes(monkeypatch):
    volumes = ["a", "b", "c"]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        parts.append(share(volumes))

    def all_gather(found, part):
        found[:] = parts

    monkeypatch.setattr(dist, "all_gather_object", all_gather)
    assert [len(part) for part in parts] == [2, 1]
    assert [gather(part, len(volumes)) for part in parts] == [volumes, volumes]


def test_what_is_finished_is_not_repeated_and_other_options_are_refused(slices):
    unet, out = backbone("train_unet"), slices.parent / "out"
    main(unet, options(slices))
    before = {name: (out / name).stat().st_mtime_ns for name in ("bare.pt", "bare.json", "reseg.pt", "reseg.json")}
    main(unet, options(slices, "--weight", "0", "--deep-supervision"))  # another comparison beside it
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert (out / "deep.json").exists()
    with pytest.raises(SystemExit, match=r"bare\.pt is of a run with other options .*seed 0, now 1"):
        main(unet, options(slices, "--seed", "1"))
    with np.load(slices) as file:
        arrays = dict(file)
    np.savez(slices, **{**arrays, "patient": np.array([f"other {who}" for who in arrays["patient"]])})
    with pytest.raises(SystemExit, match=r"bare\.pt is of a run with other options \(\d+ new: labelled patient other"):
        main(unet, options(slices))


def test_killed_while_it_writes_scores_it_leaves_none_cut(slices, monkeypatch):
    replace_file, file = os.replace, slices.parent / "out" / "bare.json"

    def killed(source, target):
        if Path(target) == file:
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            main(backbone("train_unet"), options(slices))
    assert not file.exists()
    main(backbone("train_unet"), options(slices))
    assert json.loads(file.read_text())["steps"] == 3


@pytest.mark.parametrize(("steps", "what"), [("1", "the network's output"), ("6", r"the loss of step \d")])
def test_a_run_that_diverged_gets_no_score(slices, steps, what):
    """The loss of its first step is finite."""
    with pytest.raises(SystemExit, match=rf"has diverged: {what} is not finite\. Lower --lr"):
        main(backbone("train_unet"), options(slices, "--lr", "1e38", "--steps", steps))
    assert not list((slices.parent / "out").glob("*.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of the runs that `COMMAND` makes, and of its data."""
    folder, rng = tmp_path_factory.mktemp("finished"), np.random.default_rng(0)
    labels = np.zeros((20, 32, 32), np.uint8)
    labels[:, 8:24, 8:24] = 1
    images = (labels * 120 + rng.integers(0, 100, labels.shape)).astype(np.uint8)
    for name in ("data", "copy"):
        np.savez(folder / f"{name}.npz", images=images, labels=labels, patient=np.repeat(np.arange(5), 4))
    np.savez(folder / "more.npz", images=images + 1)
    main(LOADS, command(folder))
    return folder


LOADS = replace(backbone("train_unet"), load=lambda model, path: None)
COMMAND = {
    **{"small": True, "data": "data.npz", "patients": "2", "steps": "1", "recon-steps": "1", "batch-size": "2"},
    **{"lr": "0.01", "unlabelled": True, "size": "32", "device": "cpu", "out": "out"},
}
CHANGES: dict[str, dict[str, Any]] = {
    **{"small": {"small": None}, "paper": {"small": None, "paper": True, "steps": None, "recon-steps": None}},
    **{"data": {"data": "copy.npz"}, "patients": {"patients": "3"}, "slices": {"slices": "3"}, "size": {"size": "64"}},
    **{"steps": {"steps": "2"}, "recon_steps": {"recon-steps": "2"}, "batch_size": {"batch-size": "4"}},
    **{"lr": {"lr": "0.02"}, "weights": {"weights": "file"}, "amp": {"amp": "bf16"}, "seed": {"seed": "1"}},
    **{"reseg": {"weight": "0.5"}, "unlabelled": {"unlabelled": "more.npz"}, "cases": {"patients": "3"}, "network": {}},
}


def command(folder: Path, **changes: Any) -> list[str]:
    """`COMMAND` with changes; None leaves an option out."""
    words = []
    for key, value in {**COMMAND, **changes}.items():
        is_path = key == "out" or str(value).endswith(".npz")
        words += (
            []
            if value is None
            else [f"--{key}"]
            if value is True
            else [f"--{key}={folder / value if is_path else value}"]
        )
    return words


@pytest.mark.parametrize("key", CHANGES)
def test_a_run_is_not_resumed_with_another(key, finished):
    told = "1 new: labelled patient" if key == "cases" else f"[(; ]{key} "
    network = replace(LOADS, name="Other") if key == "network" else LOADS
    with pytest.raises(SystemExit, match=rf"\.pt is of a run with other options .*{told}"):
        main(network, command(finished, **CHANGES[key]))


def test_every_option_of_a_run_is_tried(finished):
    known = torch.load(finished / "out" / "reseg+semi.pt", weights_only=True)["options"]
    contents = {"contents of data", "contents of unlabelled"}
    assert {*known} - {"deep"} - contents == {*CHANGES}  # runs with and without heads have other names


@pytest.mark.parametrize("key", ["data", "unlabelled"])
def test_a_run_is_not_resumed_on_other_contents_under_the_same_names(key, slices):
    file = {"data": slices, "unlabelled": slices.parent / "others.npz"}[key]
    np.savez(slices.parent / "others.npz", images=np.full((4, 32, 32), 7, np.uint8))
    more = options(slices, "--unlabelled", str(slices.parent / "others.npz"), "--weight", "0", "--steps", "1")
    main(backbone("train_unet"), more)
    with np.load(file) as arrays:
        before = dict(arrays)
    np.savez(file, **before)  # the same again
    main(backbone("train_unet"), more)
    np.savez(file, **{**before, "images": before["images"] + 1})
    with pytest.raises(SystemExit, match=rf"other options \(contents of {key} \w{{8}}, now \w{{8}}\); choose"):
        main(backbone("train_unet"), more)


def test_the_files_of_a_folder_are_known_by_their_sizes(tmp_path):
    (tmp_path / "slices").mkdir()
    np.savez(tmp_path / "slices" / "a.npz", image=np.zeros(4))
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    assert fingerprint(tmp_path) == before
    np.savez(tmp_path / "slices" / "a.npz", image=np.zeros(5))
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weight", "0"], "the same network twice"),
        (["--weight", "-1"], "0 or more"),
        (["--weight", "0", "--deep-supervision", "--preset", "standardized"], "--preset: only runs with reseg"),
        (["--paper", "--steps", "5"], "--paper sets the number of steps itself"),
        (["--paper", "--small"], "not allowed with"),
        (["--weights", "file.npz"], "no loader of pretrained weights for U-Net"),
        (["--patients", "3"], "one averaged brain"),
        (["--unlabelled", "missing.npz"], "missing.npz is no .npz"),
        *((["--lr", value], "more than 0, and finite") for value in ("0", "-1", "nan", "inf")),
    ],
)
def test_wrong_options_are_explained(more, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(backbone("train_unet"), more)
    assert message in capsys.readouterr().err


def test_the_images_of_the_test_are_not_unlabelled_ones(slices, capsys):
    link = slices.parent / "link.npz"
    link.symlink_to(slices)
    with pytest.raises(SystemExit):
        parse_arguments(backbone("train_unet"), options(slices, "--unlabelled", str(link)))
    assert "the file of --data" in capsys.readouterr().err


def test_pretrained_weights_reach_both_runs(slices, capsys):
    model = backbone("train_swin_unet").small(2, 96)
    file = slices.parent / "swin.pth"
    torch.save({"model": {"patch_embed.proj.weight": torch.full_like(model.patch_embed.proj.weight, 0.5)}}, file)
    main(backbone("train_swin_unet"), options(slices, "--weights", str(file), "--lr", "1e-12"))
    assert capsys.readouterr().out.count("1 of") == 2
    for name in ("bare", "reseg"):
        state = torch.load(slices.parent / "out" / f"{name}.pt", weights_only=True)
        assert torch.allclose(state["model"]["patch_embed.proj.weight"], torch.tensor(0.5))


PUBLISHED = {
    "train_unet": (torch.optim.SGD, 0.01, 24, 150, 0.5, 0.5),
    "train_smp": (torch.optim.SGD, 0.01, 24, 150, 0.5, 0.5),
    "train_transunet": (torch.optim.SGD, 0.01, 24, 150, 0.5, 0.5),
    "train_swin_unet": (torch.optim.SGD, 0.05, 24, 150, 0.4, 0.6),
    "train_vm_unet": (torch.optim.AdamW, 1e-3, 32, 300, 1.0, 1.0),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_paper_means_the_published_settings(script, slices):
    kind, lr, batch, epochs, cross_entropy, dice = PUBLISHED[script]
    args = parse_arguments(backbone(script), ["--paper", "--data", str(slices)])
    recipe: Recipe = args.recipe
    optimizer = recipe.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == lr
    assert (args.batch_size, recipe.epochs, args.size, args.preset) == (batch, epochs, 224, "paper")
    assert (recipe.cross_entropy, recipe.dice) == (cross_entropy, dice)
    assert recipe.source


def test_schedules_are_torchs():
    parameter = nn.Parameter(torch.zeros(1))
    steps, per_epoch = 30, 5
    poly = Recipe("test").make_optimizer([parameter])
    schedule = torch.optim.lr_scheduler.PolynomialLR(poly, steps, 0.9)
    for step in range(steps):
        assert poly.param_groups[0]["lr"] == pytest.approx(0.01 * Recipe("test").factor(step, steps, per_epoch))
        poly.step()
        schedule.step()
    recipe = Recipe("test", optimizer="AdamW", lr=1e-3, cosine_epochs=2)
    cosine = recipe.make_optimizer([parameter])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(cosine, 2, 1e-5)
    for step in range(steps):
        assert cosine.param_groups[0]["lr"] == pytest.approx(1e-3 * recipe.factor(step, steps, per_epoch))
        cosine.step()
        if (step + 1) % per_epoch == 0:
            schedule.step()
    short = recipe.shortened(steps, per_epoch)
    assert short.factor(0, steps, per_epoch) == 1
    assert short.factor(steps - 1, steps, per_epoch) < 0.1


def test_paper_trains_for_the_published_epochs(slices, monkeypatch):
    seen = {}

    def stop(variant, setting):
        seen[variant.name] = setting
        raise SystemExit

    monkeypatch.setattr("common.experiment.trained_and_tested", stop)
    with pytest.raises(SystemExit):
        main(backbone("train_unet"), ["--paper", "--data", str(slices), "--device", "cpu", "--out", str(slices.parent)])
    # 4 patients of 4 slices are one batch of 24
    assert seen["bare"].args.steps == seen["bare"].args.recon_steps == 150


def test_the_ablation_switches_the_terms_and_shares_the_teacher(slices, monkeypatch):
    seen = {}

    def spy(variant, setting):
        seen[variant.name] = variant
        return trained_and_tested(variant, setting)

    monkeypatch.setattr(ablation, "trained_and_tested", spy)
    ablation.main(options(slices, "--steps", "2", "--seeds", "0", "1"))
    out = slices.parent / "out"
    content = json.loads((out / "ablation.json").read_text())
    assert (len(content["dsc_by_terms"]), len(content["dsc_by_weight"])) == (8, 6)
    assert all(len(values) == 2 for table in ("dsc_by_terms", "dsc_by_weight") for values in content[table].values())
    assert content["dsc_by_terms"]["none"] == content["dsc_by_weight"]["0.0"]
    assert content["dsc_by_terms"]["E→D + D→E + B"] == content["dsc_by_weight"]["0.035"]
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert len(seen) == 12
    only = seen["decoder_to_encoder_0.035"].reseg
    assert (only["encoder_to_decoder"], only["decoder_to_encoder"], only["bottleneck"]) == (0, 1, 0)
    losses = {name: json.loads((out / "seed0" / f"{name}.json").read_text())["task_loss"] for name in seen}
    assert len(set(losses.values())) > 8  # they are different runs
    teachers = [
        torch.load(file, weights_only=True)["reseg"]["parts"]["teacher"]["body.head.weight"]
        for file in sorted((out / "seed0").glob("*_0.*.pt"))
    ]
    assert len(teachers) == 11
    assert all(torch.equal(teacher, teachers[0]) for teacher in teachers)
