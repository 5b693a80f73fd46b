"""Train the variants of a plan with equal seeds, batches, steps and augmentation, and score them.

    python benchmarks/accuracy.py --plan benchmarks/plans/choose_5.json --data folder --out results.jsonl --minutes 9.5

`folder` holds acdc.npz, acdc_native.npz, sunnybrook.npz, hippocampus.npz and Synapse (synapse.npz, or the folder of
TransUNet's files), as far as the plan asks for them (see `evidence/pack.py`). A line is appended per run; runs that
have one are skipped, so the same command goes on where it stopped. With `--checkpoints` a run that the time cuts short
is saved there, and the same command ends it.
`accuracy_report.py` makes tables and figures of the lines.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import reseg_loss
from benchmarks.evidence.batches import Feed
from benchmarks.evidence.commit import head_commit
from benchmarks.evidence.data import (
    Slices,
    Split,
    centred,
    drawn_patients,
    half_without,
    load,
    load_native,
    rows,
    split,
)
from benchmarks.evidence.field import FieldFeed, Native
from benchmarks.evidence.harness import Machine, OutOfTimeError, Pause, Stage1, Stage2
from benchmarks.evidence.metrics import score
from benchmarks.evidence.overlays import keep_slices
from benchmarks.evidence.plan import Plan, read_plan, smaller
from benchmarks.evidence.results import append, finished, read_lines
from benchmarks.evidence.stacks import StackedFeed, Stacks
from benchmarks.evidence.synapse import load_synapse
from benchmarks.evidence.variants import CATALOGUE, REMOVED, Variant

FILES = {
    "acdc": ("acdc.npz",),
    "acdc_native": ("acdc_native.npz",),
    "sunnybrook": ("sunnybrook.npz", "sunnybrook_128.npz"),
    "hippocampus": ("hippocampus.npz",),
    "synapse": ("synapse.npz", "Synapse"),
}


class Scored(NamedTuple):
    """What networks are scored on: images on the device, and the rest on the CPU."""

    images: Tensor
    truth: Tensor | Sequence[Tensor]
    size: int
    """At which networks predict; the truth may be of other sizes."""
    volume: Tensor
    patients: list[int]
    """One per volume."""
    classes: list[tuple[int, int]]
    """(ours, theirs), as `score` takes them."""
    order_0: bool
    """How predictions are brought to the size of the truth."""
    spacing: list[tuple[float, float, float]] | None
    """Of each volume, in mm."""
    rows: np.ndarray | None = None
    """Of the plan's data; None where another data set is scored."""
    inside: Tensor | None = None
    """(V, D) bool, where networks predict stacks: the places of the slices that are scored."""


class Session:
    """What the runs of a plan share: data on the device, captured steps, and the seed's teachers."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        machine: Machine,
        about: dict[str, Any],
        checkpoints: Path | None = None,
        deadline: float = float("inf"),
        predictions: Path | None = None,
        overlays: Path | None = None,
    ) -> None:
        self.plan, self.machine, self.about = plan, machine.with_pool(), about
        self.checkpoints, self.deadline, self.predictions, self.overlays = checkpoints, deadline, predictions, overlays
        settings = plan.settings
        self.order_0 = settings.protocol == "ssl4mis"
        if self.order_0 and plan.data != "acdc_native":
            raise ValueError(f"{plan.name}: the protocol ssl4mis is one of acdc_native, not of {plan.data}")
        self.data = find(folder, plan.data, settings.size, self.order_0)
        if overlays is not None and self.data.images.ndim == 4:
            raise ValueError(f"{plan.name}: overlays are of slices, and {plan.data} has volumes")
        self.classes = len(self.data.class_names) + 1
        self.images, self.labels = (x.to(machine.device) for x in to_size(self.data, settings.size))
        self.stacks: Stacks | None = None
        if settings.depth is not None:
            if settings.augmentation != "strong":
                raise ValueError(f"{plan.name}: stacks of slices have the strong augmentation alone")
            self.stacks = Stacks.of(self.data, self.images, self.labels, settings.depth)
            self.images, self.labels = self.stacks.images, self.stacks.labels
        self.native: Native | None = None
        if self.order_0 and settings.augmentation == "published":
            assert self.data.native is not None
            assert self.data.native_images is not None
            self.native = Native.of(self.data.native_images, self.data.native, machine.device)
        self.elsewhere: Slices | None = None
        if plan.elsewhere:
            if self.stacks is not None or self.native is not None:
                raise ValueError(f"{plan.name}: beside images of {plan.elsewhere} are slices with strong augmentation")
            self.elsewhere = find(folder, plan.elsewhere, settings.size)
            images = torch.from_numpy(centred(self.elsewhere.images, settings.size)).to(machine.device)
            self.images = torch.cat([self.images, images])  # behind ours
            self.labels = torch.cat([self.labels, torch.zeros_like(images)])  # which nobody reads
        lengths = (variant.steps(settings.steps, settings.stage1_steps) for variant in plan.variants)
        self.most_steps = max(settings.stage1_steps, *lengths)
        kinds = {(variant.batch, variant.images) for variant in (CATALOGUE["bare"], *plan.variants)}
        self.feeds = {(batch, images): self.feed_of(batch) for batch, images in sorted(kinds)}
        self.other: dict[str, Scored] = {}
        if plan.also_test is not None:
            other = find(folder, plan.also_test["data"], settings.size)
            images, _ = to_size(other, settings.size)
            everyone = np.arange(len(other.patient))
            images = images.to(machine.device)
            self.other[other.name] = scored(other, images, everyone, plan.also_test["classes"], False)
        self.steps: dict[str, Stage2] = {}
        self.stage_1: dict[tuple[str, str], Stage1] = {}
        self.teachers: dict[tuple[str, str], tuple[dict[str, Tensor], float]] = {}
        self.seed: int | None = None
        self.parts: Split | None = None

    def begin(self, seed: int) -> None:
        """The seed's patients and batches; its teachers are trained when a variant asks for one."""
        if self.seed == seed:
            return
        self.parts = split(self.data, self.plan.patients, seed, self.plan.drawn)
        for (_, images), feed in self.feeds.items():
            feed.load(self.rows(self.parts.labelled), self.unlabelled(self.parts, images, seed), seed)
        self.teachers.clear()
        self.seed = seed

    def rows(self, patients: tuple[int, ...]) -> np.ndarray:
        """The images of some patients: slices or stacks."""
        if self.stacks is not None:
            return np.flatnonzero(np.isin(self.stacks.patient, patients))
        return rows(self.data, patients)

    def unlabelled(self, parts: Split, images: str, seed: int) -> np.ndarray:
        """The images without labels of a kind (`Variant.images`)."""
        if images not in ("half", "half elsewhere"):
            return self.rows(parts.unlabelled)
        kept = half_without(parts, seed)
        ours = self.rows(kept)
        if images == "half":
            return ours
        assert self.elsewhere is not None
        others = drawn_patients(self.elsewhere, len(parts.unlabelled) - len(kept), seed)
        return np.concatenate([ours, len(self.data.patient) + rows(self.elsewhere, others)])

    def feed_of(self, batch: float) -> Feed:
        """Of `batch` times the plan's images a step."""
        settings = self.plan.settings
        sizes = [round(batch * (n or settings.batch)) for n in (settings.batch, settings.others)]
        how = self.most_steps, sizes[0], settings.augmentation, self.machine.device, sizes[1]
        if self.native is not None:
            return FieldFeed(self.native, self.images, self.labels, *how)
        return (Feed if self.stacks is None else StackedFeed)(self.images, self.labels, *how)

    def step_of(self, variant: Variant) -> Stage2:
        key = json.dumps(variant.step.options(), sort_keys=True)
        if key not in self.steps:
            feed = self.feeds[variant.batch, variant.images]
            self.steps[key] = Stage2(variant.step, self.plan.settings, self.classes, feed, self.machine)
        return self.steps[key]

    def teacher_of(self, variant: Variant, seed: int) -> tuple[dict[str, Tensor] | None, float | None]:
        kind = variant.stage_1
        if kind is None:
            return None, None
        if kind not in self.stage_1:
            self.stage_1[kind] = Stage1(kind, self.plan.settings, self.classes, self.feeds[1.0, "others"], self.machine)
        if kind not in self.teachers:
            self.teachers[kind] = self.stage_1[kind].fit(seed, self.pause("-".join((*kind, self.stage_1_key(seed)))))
        return self.teachers[kind]

    def stage_1_key(self, seed: int) -> str:
        """The same where stage 1 is the same, whichever variant asks for it."""
        return self.plan.key(seed, CATALOGUE["bare"], self.data.images.shape[-1])

    def pause(self, name: str) -> Pause | None:
        return None if self.checkpoints is None else Pause(self.checkpoints / f"{name}.pt", self.deadline)

    def run(self, seed: int, variant: Variant) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
        """Train one variant and predict; what is known then, and how to get the rest, the scores, on the CPU."""
        self.begin(seed)
        assert self.parts is not None
        if variant.name in REMOVED:
            raise ValueError(f"{variant.name} was run with an option that the library has no longer")
        if variant.sees_others and not self.parts.unlabelled:
            raise ValueError(f"{variant.name} needs unlabelled patients, and all are labelled")
        began = time.perf_counter()
        step = self.step_of(variant)
        built = time.perf_counter()
        teacher, recon = self.teacher_of(variant, seed)
        self.machine.synchronize()
        start = time.perf_counter()
        pause = self.pause(self.plan.key(seed, variant, self.data.images.shape[-1]))
        loss = step.train(variant, seed, teacher, pause)
        self.machine.synchronize()
        if pause is not None:
            pause.file.unlink(missing_ok=True)
        trained = time.perf_counter()
        scored = {part: self.part(self.parts.part(part)) for part in self.plan.parts} | self.other
        scores: dict[str, Callable[[], dict[str, Any]]] = {}
        for whose, network in step.networks().items():
            for name, on in scored.items():
                prediction = self.predict(step, network, on, f"{seed} {variant.name} {name}{whose}")
                scores[name + whose] = partial(self.score, prediction, on)
                if self.overlays is not None and on.rows is not None:
                    file = self.overlays / f"{self.plan.name}_{seed}_{name}.npz"
                    keep_slices(file, self.data, on.rows, variant.name + whose, prediction)
        resumed_at = step.loop.resumed_at
        taken_up = 0 if variant.stage_1 is None else self.stage_1[variant.stage_1].loop.resumed_at
        steps = variant.steps(self.plan.settings.steps, self.plan.settings.stage1_steps) - resumed_at
        done = time.perf_counter()
        line = {
            **({"labelled": self.parts.labelled} if self.plan.drawn else {}),
            "task_loss": loss,
            "stage_1_loss": recon,
            "ms_per_step": 1e3 * (trained - start) / steps if steps else None,
            **({"resumed_at": resumed_at} if resumed_at else {}),  # times are of what came after
            **({"stage_1_resumed_at": taken_up} if taken_up else {}),
            "seconds": {
                "build": built - began,
                "stage_1": start - built,
                "train": trained - start,
                "predict": done - trained,
            },
        }
        return line, lambda: {name: score_it() for name, score_it in scores.items()}

    def part(self, patients: tuple[int, ...]) -> Scored:
        chosen, images = rows(self.data, patients), torch.from_numpy(self.rows(patients))
        inside = None if self.stacks is None else self.stacks.inside[images]
        seen, classes = self.images[images.to(self.machine.device)], [(i, i) for i in range(1, self.classes)]
        return scored(self.data, seen, chosen, classes, self.order_0)._replace(rows=chosen, inside=inside)

    def predict(self, step: Stage2, network: nn.Module, on: Scored, name: str) -> Tensor:
        """Classes (N, size, size), or of volumes, on the CPU."""
        prediction = step.predict(network, on.images, on.size).cpu()
        if on.inside is not None:
            prediction = prediction[on.inside]
        if self.predictions is not None:
            self.predictions.mkdir(parents=True, exist_ok=True)
            file = "_".join([self.plan.name, *re.findall(r"[a-z0-9]+", name)])
            np.savez_compressed(self.predictions / f"{file}.npz", prediction=prediction.numpy())
        return prediction

    def score(self, prediction: Tensor, on: Scored) -> dict[str, Any]:
        return {
            "classes": [self.data.class_names[ours - 1] for ours, _ in on.classes],
            **score(prediction, on.truth, on.volume, on.classes, on.order_0, on.spacing),
            "patients": on.patients,
            **({"distances": "mm"} if on.spacing is not None else {}),
        }

    def line(self, seed: int, variant: Variant) -> dict[str, Any]:
        """What is said of a run before it begins."""
        plan = self.plan
        return {
            "key": plan.key(seed, variant, self.data.images.shape[-1]),
            "plan": plan.name,
            "data": plan.data,
            "stored": self.data.images.shape[-1],
            "patients": plan.patients,
            "seed": seed,
            "variant": variant.name,
            "options": variant.options(),
            "settings": plan.settings.options(),
            **self.about,
        }


def scored(data: Slices, images: Tensor, chosen: np.ndarray, classes: list[tuple[int, int]], order_0: bool) -> Scored:
    """What to score on some rows of the data, of which `images` are."""
    truth = torch.from_numpy(data.labels[chosen])
    if data.native is not None:
        truth = [torch.from_numpy(data.native[i]) for i in chosen]
    volume = data.volume[chosen]
    patients = data.patient[chosen][np.r_[True, np.diff(volume) != 0]].tolist()
    numbers = torch.from_numpy(volume)
    spacing = None if data.spacing is None else [data.spacing[n] for n in numbers.unique_consecutive().tolist()]
    return Scored(images, truth, data.labels.shape[-1], numbers, patients, classes, order_0, spacing)


@lru_cache(maxsize=2)  # plans that follow each other share it
def find(folder: Path, name: str, size: int, order_0: bool = False) -> Slices:
    """A data set; what is stored at native sizes at `size`, by `order_0` if asked for."""
    if name not in FILES:
        raise ValueError(f"no reader of {name!r} is here; there are those of {', '.join(FILES)}")
    paths = [folder / file for file in FILES[name]]
    for path in paths:
        if path.exists():
            if name == "acdc_native":
                return load_native(path, size, order_0)
            return load_synapse(path, size) if name == "synapse" else load(path)
    raise FileNotFoundError(f"none of {', '.join(map(str, paths))} is there")


def to_size(data: Slices, size: int) -> tuple[Tensor, Tensor]:
    """Images and labels (N, size, size), uint8; volumes stay as they are.

    Images are interpolated bilinearly, antialiased where they shrink; `evidence/pack.py` shrinks by area.
    """
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    if images.ndim == 4 or images.shape[1:] == (size, size):
        return images, labels
    resized = []
    for part in images.split(256):
        image = F.interpolate(part[:, None].float(), (size, size), mode="bilinear", antialias=True)
        resized.append(image[:, 0].round().clamp(0, 255).byte())
    nearest = F.interpolate(labels[:, None].float(), (size, size), mode="nearest-exact")
    return torch.cat(resized), nearest[:, 0].byte()


def run_plan(
    plan: Plan,
    folder: Path,
    out: Path,
    machine: Machine,
    about: dict[str, Any],
    deadline: float,
    checkpoints: Path | None = None,
    predictions: Path | None = None,
    overlays: Path | None = None,
) -> bool:
    """Run what is missing; False if the time, up to `deadline` of the monotonic clock, did not suffice.

    Without `checkpoints` no run is begun that would not end in time; with it, the last one is saved there, and the
    next call goes on with it. With `predictions` the predicted classes are written there, a file per network and part;
    with `overlays` those of a few slices.
    """
    session = Session(plan, folder, machine, about, checkpoints, deadline, predictions, overlays)
    done = set(finished(read_lines(out)))
    failed: set[str] = set()
    longest: dict[str, float] = {}
    slowest = 0.0  # with all that is built for a variant's first run
    waiting: tuple[dict[str, Any], Future[dict[str, Any]]] | None = None  # scored while the next one trains

    def write() -> None:
        """Append the waiting run's line, with its scores or what went wrong."""
        nonlocal waiting
        if waiting is None:
            return
        (line, scores), waiting = waiting, None
        try:
            line["scores"] = scores.result()
        except Exception as error:  # the others go on, and the line says what happened
            failed.add(line["variant"])
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
            line["traceback"] = "".join(traceback.format_exception(error)).splitlines()[-8:]
        line["when"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        append(out, line)
        print(summary(line), flush=True)

    with ThreadPoolExecutor(1) as scorer:
        for seed, variant in plan.runs():
            line = session.line(seed, variant)
            if line["key"] in done or variant.name in failed:
                continue
            expected = longest.get(variant.name, max(slowest, 60 * plan.minutes.get(variant.name, 0)))
            if time.monotonic() + (0 if checkpoints is not None else expected) > deadline:
                write()
                print(f"{plan.name}: stopped before seed {seed}, {variant.name}; the time is up", flush=True)
                return False
            done.add(line["key"])
            begin, scores = time.monotonic(), Future[dict[str, Any]]()
            try:
                trained, score_it = session.run(seed, variant)
                line |= trained
                scores = scorer.submit(score_it)
            except OutOfTimeError as error:
                write()
                print(f"{plan.name}: stopped seed {seed}, {variant.name} {error}; the time is up", flush=True)
                return False
            except Exception as error:
                scores.set_exception(error)
            line["seconds_in_all"] = time.monotonic() - begin
            slowest = max(slowest, line["seconds_in_all"])
            longest[variant.name] = line["seconds_in_all"] - line.get("seconds", {}).get("build", 0)
            write()
            waiting = line, scores
            if scores.done():  # also where it failed, so that it is not tried for every seed
                write()
                gc.collect()
        write()
    del session
    gc.collect()  # steps and closures hold each other, and the next plan needs the memory
    return True


def summary(line: dict[str, Any]) -> str:
    head = f"{line['plan']} seed {line['seed']} {line['variant']:<40}"
    if "error" in line:
        return f"{head} ERROR {line['error'].splitlines()[0][:300]}\n    " + "\n    ".join(line["traceback"])
    scores = " ".join(
        f"{part} {100 * (s['mean_dsc'] or 0):5.2f} / {s['mean_hd95'] or 0:5.1f}" for part, s in line["scores"].items()
    )
    spent = " ".join(f"{name} {value:.1f}" for name, value in line["seconds"].items())
    return f"{head} {scores} | {line['ms_per_step'] or 0:6.2f} ms/step | s: {spent}"


def about(machine: Machine, commit: str | None) -> dict[str, Any]:
    cuda = machine.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "reseg_loss": reseg_loss.__version__,
        "compiled": machine.compile,
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, nargs="+", required=True, help="one or more, run in this order")
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets' .npz")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--seeds", type=int, nargs="+", help="these of the plans alone, to share them among GPUs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run that would end later")
    parser.add_argument("--checkpoints", type=Path, help="folder where a run is saved that the time cuts short")
    parser.add_argument("--predictions", type=Path, help="folder for the predicted classes, as .npz")
    parser.add_argument("--overlays", type=Path, help="folder for a few slices, to be drawn (evidence/overlays.py)")
    parser.add_argument("--compile", choices=["all", "losses", "none"], default="none", help="before the capture")
    parser.add_argument("--commit", default=head_commit(), help="what is measured, where there is no git to tell")
    parser.add_argument("--smoke", action="store_true", help="30 steps of each variant of one seed, for the timing")
    parser.add_argument("--all", action="store_true", help="with --smoke: every variant of the catalogue")
    args = parser.parse_args()
    if args.all and not args.smoke:
        parser.error("--all goes with --smoke")
    deadline = time.monotonic() + 60 * args.minutes
    machine = Machine.make(args.compile)
    said = about(machine, args.commit)
    print(json.dumps(said), flush=True)
    for path in args.plan:
        plan = read_plan(path)
        if args.seeds:
            plan = replace(plan, seeds=tuple(seed for seed in plan.seeds if seed in args.seeds))
            if not plan.seeds:
                parser.error(f"--seeds: {path.stem} has none of {args.seeds}")
        if args.smoke:
            plan = trial(plan, everything=args.all)
        kept = args.checkpoints, args.predictions, args.overlays
        if not run_plan(plan, args.data, args.out, machine, said, deadline, *kept):
            break
    if machine.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB", flush=True)


def trial(plan: Plan, everything: bool) -> Plan:
    """One seed of a few steps."""
    variants = tuple(CATALOGUE.values()) if everything else plan.variants
    # of another name, which is that of its overlays and predictions
    plan = replace(plan, name=f"{plan.name}_trial", seeds=plan.seeds[:1], variants=variants, parts=plan.parts[:1])
    return smaller(plan, steps=30, stage1_steps=10)


if __name__ == "__main__":
    main()
