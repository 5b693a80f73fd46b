"""nnU-Net v2, run for real on a tiny data set: plan, preprocess, train, kill, resume, predict.

Its requirements differ from ours, so it has an environment of its own: pip install '.[nnunet]' pytest
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import nnunet_tiny as tiny
import numpy as np
import pytest
import torch
from frameworks_page import section
from launch import two_processes
from nnunet_tiny import equal, predict

from reseg_loss import ReSegError
from reseg_loss.integrations.nnunet import __main__ as printer

pytestmark = tiny.MARKS


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_killed_resumed_and_predicted_without_the_library(folders, configuration, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = tiny.train(tiny.make("nnUNetTrainerReSeg", configuration))
    assert whole.reseg.calls == 9

    monkeypatch.setenv("nnUNet_results", str(tmp_path / "cut"))
    cut = tiny.make("nnUNetTrainerReSeg", configuration)
    tiny.kill_at(cut, epoch=2, step=1)
    with pytest.raises(tiny.KilledError):
        tiny.train(cut)
    file = Path(cut.output_folder) / "reseg_stage1.pth"
    written = file.stat().st_mtime_ns
    resumed = tiny.train(tiny.make("nnUNetTrainerReSeg", configuration, resume=True), resume=True)
    assert file.stat().st_mtime_ns == written, "the teacher came from its file"
    assert resumed.reseg.calls == 3
    assert equal(resumed.network, whole.network)
    assert equal(resumed.reseg.teacher, whole.reseg.teacher)
    for key in ("train_losses", "val_losses", "ema_fg_dice"):
        assert resumed.logger.get_value(key, step=None) == whole.logger.get_value(key, step=None)
    assert not list(Path(resumed.output_folder).glob("*.stock"))
    assert not list(Path(resumed.output_folder).glob("*.partial"))

    mine = predict(resumed, folders / "raw")
    assert set(np.unique(mine)) <= {0, 1, 2, 3}
    final = Path(resumed.output_folder) / "checkpoint_final.pth"
    about = torch.load(final, map_location="cpu", weights_only=False)
    assert (about["trainer_name"], about["reseg_trainer"]) == ("nnUNetTrainer", "nnUNetTrainerReSeg")
    monkeypatch.delenv("nnUNet_extTrainer")
    for name in [name for name in sys.modules if name.split(".")[0] == "reseg_loss"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        importlib.import_module("reseg_loss")
    assert np.array_equal(predict(resumed, folders / "raw"), mine)


def test_a_killed_stage_1_goes_on_and_another_start_begins_anew(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    whole = tiny.train(tiny.make("nnUNetTrainerReSeg", "2d"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "cut"))
    cut = tiny.make("nnUNetTrainerReSeg", "2d")
    cut.recon_epochs = 1
    tiny.kill_at(cut, epoch=0, step=0)
    with pytest.raises(tiny.KilledError):
        tiny.train(cut)
    file = Path(cut.output_folder) / "reseg_stage1.pth"
    assert len(torch.load(file, weights_only=True)["history"]) == 1
    resumed = tiny.train(tiny.make("nnUNetTrainerReSeg", "2d", resume=True), resume=True)
    assert equal(resumed.reseg.teacher, whole.reseg.teacher)
    assert equal(resumed.network, whole.network)
    anew = tiny.make("nnUNetTrainerReSeg", "2d")
    anew.recon_epochs, anew.num_epochs = 1, 1
    tiny.train(anew)
    assert len(torch.load(file, weights_only=True)["history"]) == 1


@pytest.mark.parametrize("how", ["without its file", "no checkpoints", "longer"])
def test_a_run_that_goes_on_does_so_with_its_own_teacher(folders, how, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    cut = tiny.make("nnUNetTrainerReSeg", "2d")
    tiny.kill_at(cut, epoch=2, step=0)
    with pytest.raises(tiny.KilledError):
        tiny.train(cut)
    resumed = tiny.make("nnUNetTrainerReSeg", "2d", resume=True)
    if how == "no checkpoints":
        resumed.disable_checkpointing = True
        assert equal(tiny.train(resumed, resume=True).reseg.teacher, cut.reseg.teacher)
        return
    if how == "longer":
        resumed.recon_epochs = 3
    else:
        (Path(cut.output_folder) / "reseg_stage1.pth").unlink()
    with pytest.raises(
        ReSegError, match=f"has {2 if how == 'longer' else 0} of {resumed.recon_epochs} epochs of stage 1"
    ):
        tiny.train(resumed, resume=True)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_at_weight_0_there_is_no_stage_1_and_the_run_is_the_stock_trainers_to_the_bit(
    folders, configuration, monkeypatch, tmp_path
):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    stock = tiny.train(tiny.make("nnUNetTrainer", configuration))
    made = tiny.make("nnUNetTrainerReSeg", configuration)
    made.reseg_settings = {"weight": 0}
    tiny.train(made)
    assert equal(made.network, stock.network)
    assert made.logger.get_value("train_losses", step=None) == stock.logger.get_value("train_losses", step=None)
    assert not (Path(made.output_folder) / "reseg_stage1.pth").exists()
    other = tiny.train(tiny.make("nnUNetTrainerReSeg", configuration))
    assert not equal(other.network, stock.network)
    assert list(other.network.state_dict()) == list(stock.network.state_dict())


KINDS = {
    "ignore": {"labels": {"background": 0, "outer": 1, "inner": 2, "ignore": 3}},
    "regions": {
        "labels": {"background": 0, "whole": [1, 2, 3], "core": [1, 2], "inner": [2]},
        "regions_class_order": [3, 1, 2],
    },
    "regions and ignore": {
        "labels": {"background": 0, "whole": [1, 2], "inner": [2], "ignore": 3},
        "regions_class_order": [1, 2],
    },
    "one region and ignore": {
        "labels": {"background": 0, "whole": [1, 2], "ignore": 3}, "regions_class_order": [1],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ignore_labels_and_regions_reach_the_teacher(folders, kind, monkeypatch, tmp_path):
    from nnunetv2.training.dataloading import data_loader

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = tiny.make("nnUNetTrainerReSeg", "3d_fullres", labels=KINDS[kind])
    made.num_epochs = 1
    loader, original = data_loader.nnUNetDataLoader, data_loader.nnUNetDataLoader.__init__

    def anywhere(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.has_ignore = False  # it would look for patches by what the preprocessing knew of ignored voxels

    monkeypatch.setattr(loader, "__init__", anywhere)
    batches = []
    step = made.train_step
    made.train_step = lambda batch: batches.append(batch) or step(batch)
    tiny.train(made)
    assert made.reseg.calls == 3
    encoding = made.reseg.teacher.encoding
    regions = "region" in kind
    assert encoding.num_classes == made.label_manager.num_segmentation_heads
    assert (encoding.mode, encoding.ignore_index) == (
        "onehot" if regions else "index",
        None if "ignore" not in kind else 255 if regions else 3,
    )
    target = batches[0]["target"][0]
    encoded, valid = encoding.encode(made.label_of(target))
    expected, counts = naive(target.numpy(), regions, "ignore" in kind)
    assert np.array_equal(encoded.numpy(), expected)
    assert (valid is None) == (counts is None)
    if counts is not None:
        assert np.array_equal(valid.numpy(), counts)
        assert 0 < counts.mean() < 1


def naive(target: np.ndarray, regions: bool, ignore: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """What the teacher takes in, and what counts, voxel by voxel."""
    channels = target.shape[1] - (regions and ignore)
    encoded = np.zeros((len(target), channels, *target.shape[2:]), np.float32)
    valid = np.ones((len(target), 1, *target.shape[2:]), np.float32)
    for b, *at in np.ndindex(len(target), *target.shape[2:]):
        values = target[(b, slice(None), *at)]
        ignored = ignore and (values[-1] != 0 if regions else values[0] == 3)
        valid[(b, 0, *at)] = not ignored
        encoded[(b, slice(None), *at)] = 0 if ignored else values[:channels]
    return encoded, valid if ignore else None


def test_validation_has_the_stock_loss_and_training_has_ours(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    made = tiny.make("nnUNetTrainerReSeg", "2d")
    made.num_epochs = 1
    tiny.train(made)
    batch = next(made.dataloader_train)
    made.network.train()
    output = made.network(batch["data"])
    stock = made.loss.loss(output, batch["target"])
    assert made.loss(output, batch["target"]) > stock
    with torch.no_grad():
        made.network.eval()
        output = made.network(batch["data"])
        assert made.loss(output, batch["target"]) == made.loss.loss(output, batch["target"])


def test_compiled_networks_are_served(folders, monkeypatch, tmp_path):
    """nnU-Net compiles on GPUs only; here it is told to on the CPU, with the backend that needs no compiler."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiler(network, backend="eager"))
    made = tiny.make("nnUNetTrainerReSeg", "3d_fullres")
    made._do_i_compile = lambda: True  # noqa: SLF001 - nnU-Net's own switch, and it has no other
    tiny.train(made)
    assert type(made.network).__name__ == "OptimizedModule"
    assert made.reseg.calls == 9


def test_on_two_processes_student_and_teacher_are_the_same_and_a_killed_run_goes_on(folders, tmp_path):
    two_processes(tiny.__file__, tmp_path, nnUNet_results=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for rank in (zero, one):
        assert "loss cannot ignore voxels without a sure pseudo-label" in rank["refused"]
    for trainer in ("nnUNetTrainerReSeg", "nnUNetTrainerSemi"):
        whole = zero[f"{trainer} whole"]
        assert not all(torch.equal(a, b) for a, b in zip(whole["student"], whole["teacher"]))
        for run, steps in (("whole", 9), ("resumed", 3)):
            mine, theirs = (rank[f"{trainer} {run}"] for rank in (zero, one))
            assert mine["wrapped"] == "DistributedDataParallel"
            assert mine["steps"] == theirs["steps"] == steps
            for part in ("student", "teacher"):
                for other in (theirs[part], whole[part]):
                    assert all(torch.equal(a, b) for a, b in zip(mine[part], other, strict=True)), (trainer, run, part)


def test_the_pages_variant_is_found_beside_ours(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (code,) = re.findall(r"```python\n(.*?)```", section("nnU-Net with the alignment"), re.DOTALL)
    (tmp_path / "my_trainers").mkdir()
    (tmp_path / "my_trainers" / "mine.py").write_text(code)
    paths = [str(tmp_path / "my_trainers"), str(printer.folder())]
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(paths))
    made = tiny.make("nnUNetTrainerReSeg_250epochs", "2d")
    assert type(made).recon_epochs == 100
    made.recon_epochs = 1
    tiny.train(made)
    assert made.reseg.weight == 0.1
    assert made.reseg.settings.normalize is None
    about = torch.load(Path(made.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert about["trainer_name"] == "nnUNetTrainer_250epochs"
