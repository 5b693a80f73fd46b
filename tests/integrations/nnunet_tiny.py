"""A tiny data set for nnU-Net, and trainers on it: used by test_nnunet.py and, in two processes, as a script."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from reseg_loss import ReSegError

DATASET, ID = "Dataset901_Tiny", "901"
LABELS = {"background": 0, "outer": 1, "inner": 2, "rim": 3}
CPU = torch.device("cpu")
MARKS = [  # of every test that runs nnU-Net
    pytest.mark.nnunet,
    pytest.mark.skipif(
        importlib.util.find_spec("nnunetv2") is None,
        reason="needs nnunetv2, in an environment of its own: pip install '.[nnunet]' pytest",
    ),
    pytest.mark.filterwarnings("default"),  # nnU-Net and its libraries warn a lot
]


def write_dataset(
    raw: Path,
    cases: int = 8,
    unlabelled: int = 4,
    size: int = 32,
    dataset: str = DATASET,
    ignored: tuple[int, ...] = (),
) -> None:
    """Noisy nested ellipsoids. The labels of `ignored` cases are "ignore" alone."""
    import SimpleITK as sitk  # noqa: N813

    folder = raw / dataset
    for name in ("imagesTr", "labelsTr", "imagesTs", "imagesUn"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    for case in range(cases + unlabelled):
        center, radius = size / 2 + rng.uniform(-3, 3, 3), rng.uniform(8, 12, 3)
        distance = (((grid - center[:, None, None, None]) / radius[:, None, None, None]) ** 2).sum(0)
        label = np.select([distance < 0.35, distance < 0.8, distance < 1], [2, 1, 3], 0).astype(np.uint8)
        image = (label + rng.normal(0, 0.4, label.shape)).astype(np.float32)
        if case >= cases:
            name = f"more_{case - cases:03d}"
            sitk.WriteImage(sitk.GetImageFromArray(image), folder / "imagesUn" / f"{name}_0000.nii.gz")
            continue
        name = f"case_{case:03d}"
        label = np.full_like(label, len(LABELS)) if case in ignored else label
        sitk.WriteImage(sitk.GetImageFromArray(image), folder / "imagesTr" / f"{name}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(label), folder / "labelsTr" / f"{name}.nii.gz")
        if case == 0:
            sitk.WriteImage(sitk.GetImageFromArray(image), folder / "imagesTs" / f"{name}_0000.nii.gz")
    labels = {**LABELS, "ignore": len(LABELS)} if ignored else LABELS
    about = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about))


def shrink_plans(preprocessed: Path, dataset: str = DATASET) -> None:
    """Patch, batch and network so small that a step takes milliseconds."""
    file = preprocessed / dataset / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    for name, patch in (("2d", [32, 32]), ("3d_fullres", [16, 16, 16])):
        if name not in plans["configurations"]:
            continue
        configuration = plans["configurations"][name]
        configuration |= {"patch_size": patch, "batch_size": 2}
        dims, stages = len(patch), 4
        configuration["architecture"]["arch_kwargs"] |= {
            "n_stages": stages,
            "features_per_stage": [4, 8, 16, 16],
            "strides": [[1] * dims] + [[2] * dims] * (stages - 1),
            "kernel_sizes": [[3] * dims] * stages,
            "n_conv_per_stage": [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
        }
    file.write_text(json.dumps(plans))


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make(
    trainer: str,
    configuration: str,
    *,
    resume: bool = False,
    labels: dict[str, Any] | None = None,
    batch: int | None = None,
    dataset: str = DATASET,
) -> Any:
    """A trainer of a few steps, found as nnU-Net finds it, whose batches follow from the epoch's number."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset  # noqa: SIM112
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": resume}
    if batch is not None:
        plans["configurations"][configuration]["batch_size"] = batch
    about = json.loads((folder / "dataset.json").read_text()) | copy.deepcopy(labels or {})
    seed_everything(0)
    made = recursive_find_trainer_class_by_name(trainer)(plans, configuration, 0, about, CPU)
    made.num_epochs, made.num_iterations_per_epoch, made.num_val_iterations_per_epoch = 3, 3, 1
    made.save_every, made.recon_epochs = 1, 2
    if labels:
        made.oversample_foreground_percent = 0.0  # the preprocessed cases know other classes
    start = made.on_epoch_start

    def on_epoch_start() -> None:
        start()
        seed_everything(2 * made.current_epoch + made.local_rank)

    made.on_epoch_start = on_epoch_start
    step = made.train_step

    def train_step(batch: Any) -> Any:
        made.steps += 1
        return step(batch)

    made.steps, made.train_step = 0, train_step
    return made


class KilledError(Exception):
    pass


def kill_at(made: Any, epoch: int, step: int) -> None:
    """Let a training step raise."""
    original, seen = made.train_step, []

    def train_step(batch: Any) -> Any:
        seen.append(made.current_epoch)
        if seen.count(epoch) > step:
            raise KilledError
        return original(batch)

    made.train_step = train_step


def train(made: Any, *, resume: bool = False) -> Any:
    from nnunetv2.run.run_training import maybe_load_checkpoint

    maybe_load_checkpoint(made, resume, False)
    made.run_training()
    return made


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def predict(trained: Any, raw: Path) -> np.ndarray:
    import SimpleITK as sitk  # noqa: N813
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(trained.output_folder_base, (0,), "checkpoint_final.pth")
    image = sitk.GetArrayFromImage(sitk.ReadImage(raw / DATASET / "imagesTs" / "case_000_0000.nii.gz"))[None]
    return predictor.predict_single_npy_array(image, {"spacing": [1, 1, 1]}, None, None, False)


def note_at_the_end(made: Any, kept: dict[str, Any]) -> None:
    """Keep the weights that are there when all epochs are done."""
    end = made.on_train_end

    def on_train_end() -> None:
        teacher = made.mean_teacher.network if hasattr(made, "mean_teacher") else made.reseg.teacher
        parts = {"student": made.network, "teacher": teacher}
        kept.update({name: [t.clone() for t in part.state_dict().values()] for name, part in parts.items()})
        end()

    made.on_train_end = on_train_end


def refusal_of_a_loss() -> str:
    """What is said of a loss that is not finite if all is ignored."""
    from nnunetv2.training.nnUNetTrainer.variants.loss.nnUNetTrainerCELoss import nnUNetTrainerCELoss

    made = make("nnUNetTrainerSemi", "2d")
    made._build_loss = lambda: nnUNetTrainerCELoss._build_loss(made)  # noqa: SLF001 - nnU-Net's
    try:
        made.on_train_start()
    except ReSegError as error:
        return str(error)
    return "nothing"


def main(rank: int, folder: str) -> None:
    """One of two processes. nnU-Net takes DDP for CUDA, so its device and its DDP call are turned to the CPU."""
    import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as module  # noqa: N813

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    real, init = module.DDP, module.nnUNetTrainer.__init__

    def on_cpu(self: Any, plans: Any, configuration: Any, fold: Any, dataset_json: Any, device: Any) -> None:
        init(self, plans, configuration, fold, dataset_json, device)
        self.device, self.grad_scaler = CPU, None

    module.DDP = lambda network, device_ids=None: real(network)
    module.nnUNetTrainer.__init__ = on_cpu
    module.MetaLogger.plot_progress_png = lambda *args, **kwargs: None
    found = {}
    for trainer in ("nnUNetTrainerReSeg", "nnUNetTrainerSemi"):
        for run in ("whole", "cut", "resumed"):
            os.environ["nnUNet_results"] = f"{folder}/{run.replace('resumed', 'cut')}"  # noqa: SIM112
            made = make(trainer, "3d_fullres", resume=run == "resumed")
            seed_everything(rank)
            if run == "cut":
                kill_at(made, epoch=2, step=1)
            if trainer == "nnUNetTrainerSemi":
                made.threshold = 0.3
            kept: dict[str, Any] = {}
            note_at_the_end(made, kept)
            try:
                train(made, resume=run == "resumed")
            except KilledError:
                continue
            kept |= {"wrapped": type(made.network).__name__, "steps": made.steps}
            found[f"{trainer} {run}"] = kept
    found["refused"] = refusal_of_a_loss()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
