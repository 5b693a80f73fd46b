"""What unlabelled images are worth in nnU-Net itself: its own trainer against `nnUNetTrainerSemi`, patients held out.

    python benchmarks/nnunet.py --data data --work outputs/nnunet --out nnunet.jsonl --minutes 9  # and again
    python benchmarks/nnunet.py --out nnunet.jsonl --report > nnunet.md
    python benchmarks/nnunet.py --data data --work outputs/nnunet --out nnunet_steps.jsonl --smoke   # time of a step

Needs nnunetv2 in an environment of its own (pip install '.[nnunet]'; of image readers it uses nibabel alone), and
`acdc_native.npz` and `hippocampus.npz` in `data`. ACDC has the field's patients (SSL4MIS): 70 to train on, of which 3
or 7 have labels, and 20 for testing. The file has no voxel sizes, so all volumes are given the same ones: what counts
is the difference to our own stock runs, not the value. Fold "all", last epoch's weights, nothing chosen on any part.

nnU-Net does not seed its augmentation: a seed is that of the network's weights, and runs of one seed are paired by the
patients alone. A run that `--minutes` cuts short goes on in the next call, and a finished one has a line in `--out`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.accuracy_report import paired, paired_by_patient, resampled
from benchmarks.evidence.commit import head_commit
from benchmarks.evidence.data import Slices, load, load_native, split
from benchmarks.evidence.metrics import score
from benchmarks.evidence.results import append, finished, read_lines

EPOCHS, ITERATIONS = 40, 250  # of nnU-Net's 1000 epochs
# between slices, rows and columns, in mm; ACDC's are a guess
ACDC_SPACING, HIPPOCAMPUS_SPACING = (10.0, 1.5, 1.5), (1.0, 1.0, 1.0)
ABOUT = """Fold "all", last weights, test patients; nothing was chosen on any part. nnU-Net trains 250,000 steps by
default. ACDC's voxel sizes are guessed, so differences count, not values. HD95 is in pixels of the images. Milliseconds
are medians of epochs, with other runs on the same GPU. Do not compare those of two rows: up to commit 2ed1700, cuDNN
chose its kernels by trial in a process's second run and later, but not in its first. --smoke measures steps."""
STOCK, SEMI = "nnUNetTrainer", "nnUNetTrainerSemi"


@dataclass(frozen=True)
class Task:
    """A data set of nnU-Net's."""

    dataset: int
    data: str
    labelled: int
    """Patients."""
    again: bool = False
    """The labelled images are the unlabelled ones, too: there are no further images."""


@dataclass(frozen=True)
class Row:
    """A kind of run, and what it is compared with."""

    name: str
    task: Task
    configuration: str
    trainer: str
    seeds: tuple[int, ...]
    minutes: float
    """That a run is expected to take on an H200, to be corrected by --smoke."""
    as_long_as: str | None = None
    """A row of the same task, whose seconds set the number of epochs."""
    taught_by: str | None = None
    """A row of the same task, whose predictions are the labels of the images without."""


ACDC_3, ACDC_7 = Task(103, "acdc_native", 3), Task(107, "acdc_native", 7)
ACDC_70, HIPPOCAMPUS = Task(170, "acdc_native", 70, again=True), Task(200, "hippocampus", 150)
ROWS = (  # in the order in which they are run
    Row("3 patients, 2d: stock", ACDC_3, "2d", STOCK, (0, 1, 2), 9),
    Row("3 patients, 2d: semi", ACDC_3, "2d", SEMI, (0, 1, 2), 12),
    Row("3 patients, 2d: stock, as long", ACDC_3, "2d", STOCK, (0,), 12, as_long_as="3 patients, 2d: semi"),
    Row("3 patients, 2d: self-training", ACDC_3, "2d", STOCK, (0,), 10, taught_by="3 patients, 2d: stock"),
    Row("7 patients, 2d: stock", ACDC_7, "2d", STOCK, (0,), 9),
    Row("7 patients, 2d: semi", ACDC_7, "2d", SEMI, (0,), 12),
    Row("3 patients, 3d: stock", ACDC_3, "3d_fullres", STOCK, (0,), 15),
    Row("3 patients, 3d: semi", ACDC_3, "3d_fullres", SEMI, (0,), 36),
    Row("70 patients, 2d: stock", ACDC_70, "2d", STOCK, (0,), 9),
    Row("70 patients, 2d: semi, no further images", ACDC_70, "2d", SEMI, (0,), 12),
    Row("hippocampus, 150 of 182, 3d: stock", HIPPOCAMPUS, "3d_fullres", STOCK, (0,), 6),
    Row("hippocampus, 150 of 182, 3d: semi", HIPPOCAMPUS, "3d_fullres", SEMI, (0,), 8),
)
PAIRS = (  # a row, and the one that it is compared with
    *((semi.name, stock.name) for stock, semi in pairwise(ROWS) if (stock.trainer, semi.trainer) == (STOCK, SEMI)),
    ("3 patients, 2d: semi", "3 patients, 2d: stock, as long"),
    ("3 patients, 2d: semi", "3 patients, 2d: self-training"),
)


class OutOfTimeError(Exception):
    """The run goes on in another call."""


# --- data sets


@dataclass(frozen=True)
class Volume:
    """Image and label map (D, H, W) of a patient, uint8."""

    name: str
    patient: int
    image: np.ndarray
    label: np.ndarray


def read(task: Task, folder: Path) -> Slices:
    """The data set as the other benchmarks read it; ACDC at the sizes that its slices come in."""
    path = folder / f"{task.data}.npz"
    return load_native(path, 32) if task.data == "acdc_native" else load(path)


def volumes(data: Slices, patients: Sequence[int]) -> Iterator[Volume]:
    """All volumes of some patients."""
    for number in np.unique(data.volume[np.isin(data.patient, patients)]):
        rows = np.flatnonzero(data.volume == number).tolist()
        who = int(data.patient[rows[0]])
        if data.native is None or data.native_images is None:
            image, label = data.images[rows[0]], data.labels[rows[0]]
        else:
            image, label = (np.stack([a[i] for i in rows]) for a in (data.native_images, data.native))
        yield Volume(f"patient{who:03d}_{number:04d}", who, image, label)


def spacing_of(task: Task) -> tuple[float, float, float]:
    return ACDC_SPACING if task.data == "acdc_native" else HIPPOCAMPUS_SPACING


def write_raw(task: Task, data: Slices, folder: Path, pseudo: Mapping[str, np.ndarray] | None = None) -> None:
    """A data set for nnUNet_raw; with pseudo-labels, these label the images that have no label."""
    parts, spacing = split(data, task.labelled, 0), spacing_of(task)
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir(parents=True)

    def write(name: str, image: np.ndarray, label: np.ndarray | None) -> None:
        part = "imagesUn" if label is None else "imagesTr"
        write_nifti(folder / part / f"{name}_0000.nii.gz", image.astype(np.float32), spacing)
        if label is not None:
            write_nifti(folder / "labelsTr" / f"{name}.nii.gz", label, spacing)

    for volume in volumes(data, parts.labelled):
        write(volume.name, volume.image, volume.label)
        if task.again:
            write(f"again_{volume.name}", volume.image, None)
    for volume in volumes(data, parts.unlabelled):
        write(volume.name, volume.image, None if pseudo is None else pseudo[volume.name])
    about = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, **{name: i + 1 for i, name in enumerate(data.class_names)}},
        "numTraining": len(list((folder / "labelsTr").iterdir())),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIO",
    }
    (folder / "dataset.json").write_text(json.dumps(about))


def write_nifti(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """An array (D, H, W), as nnU-Net's NibabelIO reads it back."""
    import nibabel

    affine = np.diag([*spacing[::-1], 1.0])
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), affine), path)


def plan(dataset: str, configurations: Sequence[str], processes: int) -> None:
    """nnU-Net's fingerprint, plans and preprocessing, and ours for the images without labels."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    from reseg_loss.integrations.nnunet.prepare import prepare

    number = int(dataset[7:10])
    api.extract_fingerprints([number], num_processes=processes, verbose=False)
    api.plan_experiments([number])
    api.preprocess([number], configurations=[*configurations], num_processes=[processes] * len(configurations))
    prepare(dataset, configurations=configurations, processes=processes)


def plan_as(source: Path, target: Path, raw: Path, configuration: str, processes: int) -> None:
    """Preprocess a data set by the plans of another, and so for the same network and batches."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "dataset_fingerprint.json", target)
    shutil.copy(raw / "dataset.json", target)
    plans = json.loads((source / "nnUNetPlans.json").read_text())
    (target / "nnUNetPlans.json").write_text(json.dumps({**plans, "dataset_name": target.name}))
    api.preprocess([int(target.name[7:10])], configurations=[configuration], num_processes=[processes])


# --- a run


class Bench:
    """The folders of nnU-Net, and the runs in them."""

    def __init__(self, args: argparse.Namespace) -> None:
        from reseg_loss.integrations.nnunet.__main__ import folder

        self.args = args
        self.until = time.monotonic() + 60 * args.minutes
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data: dict[str, Slices] = {}
        for name in ("raw", "preprocessed", "results"):
            (args.work / name).mkdir(parents=True, exist_ok=True)
            os.environ[f"nnUNet_{name}"] = str(args.work / name)
        os.environ["nnUNet_extTrainer"] = str(folder())  # noqa: SIM112

    def of(self, task: Task) -> Slices:
        if task.data not in self.data:
            self.data[task.data] = read(task, self.args.data)
        return self.data[task.data]

    @contextmanager
    def made_once(self, folder: Path) -> Iterator[bool]:
        """Whether to make a folder now. Of runs side by side one makes it, and what a stopped run left is made anew."""
        done = folder / "done"
        with (self.args.work / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            missing = not done.exists()
            if missing:
                shutil.rmtree(folder, ignore_errors=True)  # nnU-Net's files cannot be written over
            yield missing
            done.touch()

    def dataset(self, row: Row, seed: int) -> str:
        """The row's data set, planned and preprocessed unless that was done."""
        task, processes = row.task, self.args.processes
        raw, preprocessed = (self.args.work / part for part in ("raw", "preprocessed"))
        name = f"Dataset{task.dataset:03d}_{task.data}_{task.labelled}"
        with self.made_once(preprocessed / name) as missing:
            if missing:
                write_raw(task, self.of(task), raw / name)
                plan(name, [*dict.fromkeys(r.configuration for r in ROWS if r.task == task)], processes)
        if row.taught_by is None:
            return name
        taught = f"Dataset{task.dataset + 1 + seed:03d}_{task.data}_{task.labelled}_taught"
        with self.made_once(preprocessed / taught) as missing:
            if missing:
                teacher = folder_of(named(row.taught_by), seed, self.args)
                unlabelled = split(self.of(task), task.labelled, 0).unlabelled
                pseudo = {volume.name: segmented for volume, segmented in self.predicted(teacher, task, unlabelled)}
                write_raw(task, self.of(task), raw / taught, pseudo)
                plan_as(preprocessed / name, preprocessed / taught, raw / taught, row.configuration, processes)
        return taught

    def trained(self, row: Row, seed: int, epochs: int, folder: str) -> tuple[Any, list[float]]:
        """The trainer after its last epoch, and the seconds of each epoch.

        Raises:
            OutOfTimeError: the call's time is up; a checkpoint is there to go on from.
        """
        from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

        dataset = self.dataset(row, seed)
        results = self.args.work / "results" / folder
        os.environ["nnUNet_results"] = str(results)  # noqa: SIM112
        resume = any(results.rglob("checkpoint_*.pth"))
        torch.manual_seed(seed)
        torch.backends.cudnn.benchmark = self.device.type == "cuda"  # nnUNetv2_train sets it outside of its trainer
        made = get_trainer_from_args(
            dataset, row.configuration, "all", row.trainer, continue_training=resume, device=self.device
        )
        made.num_epochs, made.num_iterations_per_epoch = epochs, self.args.iterations
        made.num_val_iterations_per_epoch, made.save_every = 1, 10**9
        made._best_ema = float("inf")  # noqa: SLF001 - no checkpoint of a best epoch: it takes seconds, and is not used
        maybe_load_checkpoint(made, resume, False)
        end = made.on_epoch_end

        def on_epoch_end() -> None:
            end()
            if time.monotonic() > self.until and made.current_epoch < epochs:
                made.current_epoch -= 1  # its end has raised it, and so does the checkpoint
                made.save_checkpoint(str(Path(made.output_folder) / "checkpoint_latest.pth"))
                raise OutOfTimeError

        made.on_epoch_end = on_epoch_end
        if made.current_epoch < epochs:
            made.run_training()
        starts, ends = (made.logger.get_value(f"epoch_{which}_timestamps", None) for which in ("start", "end"))
        return made, [b - a for a, b in zip(starts, ends)]

    def predicted(self, folder: str, task: Task, patients: Sequence[int]) -> Iterator[tuple[Volume, np.ndarray]]:
        """Volumes, and what stock nnU-Net predicts of them with a run's last weights."""
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        (fold,) = (self.args.work / "results" / folder).rglob("fold_all")
        gpu = self.device.type == "cuda"
        predictor = nnUNetPredictor(device=self.device, allow_tqdm=False, perform_everything_on_device=gpu)
        predictor.initialize_from_trained_model_folder(str(fold.parent), ("all",), "checkpoint_final.pth")
        about = {"spacing": [*spacing_of(task)]}
        for volume in volumes(self.of(task), patients):
            image = volume.image[None].astype(np.float32)
            yield volume, predictor.predict_single_npy_array(image, about, None, None, False).astype(np.uint8)

    def run(self, row: Row, seed: int, lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Train, and score the test patients: a line of the results."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        epochs = epochs_of(row, self.args.epochs, lines)
        folder = folder_of(row, seed, self.args)
        made, seconds = self.trained(row, seed, epochs, folder)
        peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
        batch, patch = made.configuration_manager.batch_size, made.configuration_manager.patch_size
        before, taught = 0.0, {}
        if row.taught_by is not None:  # both trainings count
            teacher = lines[key_of(named(row.taught_by), seed, self.args)]
            before, taught = teacher["seconds"], {"taught_by_dsc": teacher["mean_dsc"]}
        data = self.of(row.task)
        test = split(data, row.task.labelled, 0).test
        scores = scored(self.predicted(folder, row.task, test), len(data.class_names))
        return {
            "row": row.name, "seed": seed, "epochs": epochs, "iterations": self.args.iterations, "batch": batch,
            "patch": [*patch], "seconds": before + sum(seconds), "ms": 1e3 * median(seconds) / self.args.iterations,
            "peak_mib": peak, **taught, **scores,
        }  # fmt: skip

    def smoke(self, row: Row) -> dict[str, Any]:
        """The time of a step: the median of short epochs, without the first."""
        folder = f"smoke-{folder_of(row, 0, self.args)}"
        shutil.rmtree(self.args.work / "results" / folder, ignore_errors=True)  # a finished one would not train again
        made, seconds = self.trained(row, 0, 4, folder)
        batch, patch = made.configuration_manager.batch_size, made.configuration_manager.patch_size
        ms = 1e3 * median(seconds[1:]) / self.args.iterations
        return {"row": row.name, "iterations": self.args.iterations, "batch": batch, "patch": [*patch], "ms": ms}


def plain(row: Row) -> bool:
    return row.trainer == STOCK and row.as_long_as is None and row.taught_by is None


def named(name: str) -> Row:
    (row,) = (row for row in ROWS if row.name == name)
    return row


def epochs_of(row: Row, epochs: int, lines: Mapping[str, Mapping[str, Any]]) -> int:
    """As many as asked for; or as many as take another row as long."""
    if row.as_long_as is None:
        return epochs
    other = named(row.as_long_as)
    (stock,) = (r for r in ROWS if plain(r) and (r.task, r.configuration) == (row.task, row.configuration))
    theirs, ours = (fmean(line["ms"] for line in lines.values() if line["row"] == r.name) for r in (other, stock))
    return max(1, round(epochs * theirs / ours))


def scored(pairs: Iterator[tuple[Volume, np.ndarray]], classes: int) -> dict[str, Any]:
    """DSC and HD95 (in pixels) per class and volume, and their means, to `benchmarks.evidence.metrics`."""
    patients: list[int] = []
    each: dict[str, list[list[float | None]]] = {name: [[] for _ in range(classes)] for name in ("dsc", "hd95")}
    numbers = [(c, c) for c in range(1, classes + 1)]
    for volume, segmented in pairs:
        predicted, truth = (torch.from_numpy(a)[None] for a in (segmented, volume.label))
        found = score(predicted, truth, torch.zeros(1, dtype=torch.int64), numbers)
        patients.append(volume.patient)
        for name, columns in each.items():
            for column, (value,) in zip(columns, found[f"each_{name}"]):
                column.append(value)
    means = {name: [_mean(column) for column in columns] for name, columns in each.items()}
    return {
        "patients": patients,
        **{f"each_{name}": columns for name, columns in each.items()},
        **means,
        **{f"mean_{name}": _mean(columns) for name, columns in means.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def folder_of(row: Row, seed: int, args: argparse.Namespace) -> str:
    """Of a run's results. Runs of other lengths have others, or one would go on from another's checkpoint."""
    name = row.name.replace(", ", "-").replace(": ", "-").replace(" ", "_")
    return f"{name}-{seed}-{args.epochs}x{args.iterations}"


def key_of(row: Row, seed: int, args: argparse.Namespace) -> str:
    return f"{row.name} | seed {seed} | {args.epochs} x {args.iterations}"


# --- what it says


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Each row's mean over seeds, and paired differences over seeds and over patients, all in percent DSC."""
    text = ["# nnU-Net with unlabelled images", "", ABOUT, ""]
    text += ["| row | DSC | HD95, pixels | ms a step | peak MiB | minutes | steps | runs |", "|---|" + "---|" * 7]
    runs = {row.name: {line["seed"]: line for line in lines if line["row"] == row.name} for row in ROWS}
    for name, of_row in runs.items():
        if of_row:
            dsc, hd95, ms, peak, seconds = (
                _mean([line[what] for line in of_row.values()])
                for what in ("mean_dsc", "mean_hd95", "ms", "peak_mib", "seconds")
            )
            cells = [100 * (dsc or 0), hd95, ms, peak, (seconds or 0) / 60]
            shown = ["-" if cell is None else f"{cell:.1f}" for cell in cells]
            steps = {line["epochs"] * line["iterations"] for line in lines if line["row"] == name}
            if len(steps) > 1:
                raise ValueError(f"{name}: runs of {sorted(steps)} steps; report those of one length")
            text.append(f"| {name} | {' | '.join(shown)} | {steps.pop():,} | {len(of_row)} |")
    text += ["", "| difference | over seeds | over patients, 95 % interval |", "|---|---|---|"]
    for name, other in PAIRS:
        difference = paired(
            *({seed: 100 * line["mean_dsc"] for seed, line in runs[row].items()} for row in (name, other))
        )
        if difference is None:
            continue
        of_patients = [*paired_by_patient(runs[name], runs[other]).values()]
        low, high = resampled(of_patients)
        text.append(f"| {name} - {other} | {difference} | {fmean(of_patients):+.1f} ({low:+.1f} to {high:+.1f}) |")
    for line in lines:
        if "taught_by_dsc" in line:
            dsc = 100 * line["taught_by_dsc"]
            text += ["", f"{line['row']} learnt from the predictions of a stock run that has {dsc:.1f} DSC."]
    text += ["", f"Not run: {'; '.join(name for name, of_row in runs.items() if not of_row) or 'nothing'}."]
    what = ("device", "torch", "nnunetv2", "commit")
    origins = sorted({", ".join(f"{name} {line[name]}" for name in what) for line in lines})
    text += ["", f"Runs: {'; '.join(origins)}."]
    return "\n".join(text)


def origin(device: torch.device) -> dict[str, Any]:
    """What a line was measured with."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    packages = {package: version(package) for package in ("torch", "nnunetv2")}
    return {**packages, "device": name, "commit": head_commit()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with acdc_native.npz and hippocampus.npz")
    parser.add_argument("--work", type=Path, help="folder for nnU-Net's data sets and checkpoints")
    parser.add_argument("--out", type=Path, help="results, a line a run")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which a run is left for the next call")
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], help="some of the rows")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of a row's seeds")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="steps an epoch")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="for preprocessing")
    parser.add_argument("--smoke", action="store_true", help="four epochs of 100 steps of each kind of row")
    parser.add_argument("--report", action="store_true", help="print what --out says")
    args = parser.parse_args(arguments)
    if args.report:
        print(report([*finished(read_lines(args.out)).values()]))
        return
    rows = [named(name) for name in args.rows]
    if args.seeds is not None and not {*args.seeds} <= {seed for row in rows for seed in row.seeds}:
        parser.error(f"--seeds {args.seeds}: not all are seeds of these rows")
    if args.smoke:
        args.iterations = 100
        for row in rows:
            if row.taught_by is None and row.as_long_as is None:
                bench = Bench(args)
                line = bench.smoke(row)
                if args.out is not None:
                    append(args.out, {"key": row.name, **line, **origin(bench.device)})
                print(f"{row.name}: {line['ms']:.1f} ms a step", flush=True)
        return
    bench = Bench(args)
    for row in rows:
        for seed in row.seeds if args.seeds is None else sorted({*row.seeds} & {*args.seeds}):
            lines, key = finished(read_lines(args.out)), key_of(row, seed, args)
            if key in lines:
                continue
            if time.monotonic() > bench.until:
                print("the time is up; run it again to go on")
                return
            try:
                line = bench.run(row, seed, lines)
            except OutOfTimeError:
                print(f"{key}: the time is up; run it again to go on")
                return
            append(args.out, {"key": key, **line, **origin(bench.device)})
            print(f"{key}: DSC {100 * line['mean_dsc']:.2f}, {line['seconds'] / 60:.1f} minutes", flush=True)
    print("all is done")


if __name__ == "__main__":
    main()
