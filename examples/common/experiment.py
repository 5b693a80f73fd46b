"""What the train scripts share: options, the runs without and with reseg-loss, exact resume, scores and pictures.

A run is named after what it adds: `bare`, `reseg`, `deep`, `semi`, `reseg+deep`, `reseg+semi`. It leaves NAME.pt and
NAME.json in the output folder. The same command again goes on where it was stopped. A run that is finished is not
repeated, so that another comparison in the same folder trains only what is new.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from reseg_loss import PRESETS, DeepSupervision, ReSegWrapper, SemiSupervised
from reseg_loss.consistency import BROADCASTS_TWICE
from reseg_loss.task_losses import CrossEntropyDiceLoss

from .data import SegmentationData, TrainingBatches, beside, load_data, load_images, scanned
from .metrics import Summary, VolumeScores, summarize
from .plots import OverlayRow, overlays_figure, save_figure
from .processes import processes, rank, share_buffers, world_size
from .recipes import Recipe
from .report import comparison_table
from .training import IGNORED, evaluate, predict, train

TOO_SHORT = "A --small run shows that all works. It is too short for its differences to mean anything."
SMALL_STEPS, SMALL_RECON_STEPS = 150, 100
SMALL_SEMI_STEPS = 500  # the mean teacher is an average over some hundreds of steps
STEPS, RECON_STEPS = 1500, 800
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP = 5  # steps that say nothing about speed
CASES = 4  # rows of the picture
FEW_SLICES = 4  # labelled ones of the template, where nothing else is said: one in each slab


@dataclass(frozen=True)
class Backbone:
    """A network, and how it is trained."""

    name: str
    build: Callable[[int, int], nn.Module]
    """(classes, image size) to the network at its published size."""
    small: Callable[[int, int], nn.Module]
    """The same for a CPU."""
    recipe: Recipe
    """As published."""
    small_recipe: Recipe
    load: Callable[[Any, Path], object] | None = None
    """Fills the network from a public file of pretrained weights."""
    weights: str = ""
    """The name of that file."""
    small_steps: int = SMALL_STEPS


@dataclass
class Run:
    """One training run so far."""

    losses: list[float] = field(default_factory=list)
    """Task loss per step; likewise ``seconds``, which leave out the loading of data."""
    seconds: list[float] = field(default_factory=list)
    recon_losses: list[float] = field(default_factory=list)
    """Stage 1's, per `--save-every` steps."""
    recon_seconds: float = 0.0
    """Stage 1's since it last began or went on."""
    peak_mib: float | None = None


@dataclass(frozen=True)
class Variant:
    """What is added to a run."""

    name: str
    reseg: Mapping[str, Any] | None = None
    """Keywords of ReSegWrapper; None: no alignment."""
    deep: bool = False
    """Whether there is deep supervision."""
    semi: bool = False
    """Whether it learns from the unlabelled images, too; its network is the mean teacher then."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    backbone: Backbone
    data: SegmentationData
    batches: TrainingBatches
    args: argparse.Namespace
    device: torch.device
    seed: int
    out: Path
    others: TrainingBatches | None = None
    """Unlabelled images, of which the labels are not used."""

    def evaluate(self, model: nn.Module, title: str) -> list[VolumeScores]:
        """Score the test volumes."""
        return evaluate(model, self.data, title)

    @property
    def recipe(self) -> Recipe:
        args = self.args
        return args.recipe if args.paper else args.recipe.shortened(args.steps, self.batches.steps_per_epoch)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Of the sources of images: they may change under the same names."""
        return {key: fingerprint(vars(self.args)[key]) for key in ("data", "unlabelled")}

    def options(self, variant: Variant) -> dict[str, Any]:
        """What the result of a run depends on."""
        keys = ["small", "paper", "data", "patients", "slices", "steps", "batch_size", "size", "lr", "weights", "amp"]
        values: dict[str, Any] = {key: getattr(self.args, key) for key in keys}
        values["network"] = self.backbone.name
        values["cases"] = self.data.cases(unlabelled=variant.semi)  # files may come and go between two runs
        values["contents of data"] = self.contents["data"]
        values |= {"seed": self.seed, "deep": variant.deep, "reseg": variant.reseg and dict(variant.reseg)}
        if variant.semi:
            values["unlabelled"] = self.args.unlabelled
            values["contents of unlabelled"] = self.contents["unlabelled"]
        if variant.reseg is not None:
            values["recon_steps"] = self.args.recon_steps
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def main(backbone: Backbone, argv: Sequence[str] | None = None) -> None:
    """Train without and with reseg-loss, test both, and leave table, scores and picture in the output folder."""
    args = parse_arguments(backbone, argv)
    reseg = {"preset": args.preset, **({} if args.weight is None else {"weight": args.weight})}
    bare = Variant("bare")
    semi = args.unlabelled is not None
    ours = Variant(args.ours, reseg if args.weight != 0 else None, args.deep_supervision and not semi, semi)
    with processes(args.device) as device:
        setting = prepare(backbone, args, device, args.dataset, args.seed, args.out, semi)
        results = {variant.name: trained_and_tested(variant, setting) for variant in (bare, ours)}
        if rank() > 0:
            return
        models = {name: model for name, (model, _) in results.items()}
        names = args.dataset.class_names
        save_figure(overlays_figure(overlay_rows(models, args.dataset), names), args.out / "overlays.png")
        table = comparison_table(backbone.name, names, results["bare"][1], results[ours.name][1], ours.name)
        print(
            f"\n{table}\n\nScores and pictures are in {args.out}/. One seed proves nothing: repeat with another --seed."
        )
        if args.small:
            print(TOO_SHORT)
        if args.data is None:
            print("The MNI152 template is one averaged brain: this is a demonstration, never evidence.")


def prepare(
    backbone: Backbone,
    args: argparse.Namespace,
    device: torch.device,
    data: SegmentationData,
    seed: int,
    out: Path,
    semi: bool = False,
) -> Setting:
    """Read the slices, and say what is about to happen."""
    out.mkdir(parents=True, exist_ok=True)
    batches = TrainingBatches(data, args.batch_size, seed, rank(), world_size())
    others = TrainingBatches(data.others, args.batch_size, seed + 1, rank(), world_size()) if semi else None
    if args.paper:
        args.steps = args.recon_steps = backbone.recipe.epochs * batches.steps_per_epoch
    say(
        f"{backbone.name} on {data.name}: {len(data.train)} training and {len(data.test)} test volumes, "
        f"{data.size} x {data.size} pixels, {args.steps} steps of {args.batch_size} slices"
    )
    return Setting(backbone, data, batches, args, device, seed, out, others)


def trained_and_tested(variant: Variant, setting: Setting) -> tuple[nn.Module, Summary]:
    """Do a run, or what is left of it, and leave its scores in NAME.json."""
    model, run = trained(variant, setting)
    path, options = setting.out / f"{variant.name}.json", setting.options(variant)
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("options") == options:
        return model, summarize([VolumeScores(**volume) for volume in known["volumes"]])
    scores = setting.evaluate(model, f"{setting.backbone.name}, {variant.name}, testing")
    summary = summarize(scores)
    if rank() == 0:
        content = {"backbone": setting.backbone.name, "options": options, **cost(run)}
        content |= {"classes": setting.data.class_names, **asdict(summary), "volumes": list(map(asdict, scores))}
        write_atomically(json.dumps(content, indent=1, allow_nan=False) + "\n", path)
    return model, summary


def trained(variant: Variant, setting: Setting) -> tuple[nn.Module, Run]:
    """The network after a run, which begins here or goes on from its checkpoint."""
    backbone, batches, args, device = setting.backbone, setting.batches, setting.args, setting.device
    recipe, title = setting.recipe, f"{backbone.name}, {variant.name}"
    torch.manual_seed(setting.seed)
    model = (backbone.small if args.small else backbone.build)(len(setting.data.class_names), setting.data.size)
    if args.weights is not None and backbone.load is not None:
        backbone.load(model, args.weights)
    model.to(device)

    run, path, options = Run(), setting.out / f"{variant.name}.pt", setting.options(variant)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    if state is not None:
        refuse_other_options(path, state["options"], options)
        run = Run(**state["run"])
        if len(run.losses) == args.steps:
            model.load_state_dict(state["average" if variant.semi else "model"])
            return model, run

    def factor(step: int) -> float:
        return recipe.factor(step, args.steps, batches.steps_per_epoch)

    example = batches[0][0][:1].to(device)
    reseg = deep = semi = None
    task_loss = recipe.loss()
    parameters = [*model.parameters()]
    if variant.semi:
        semi = SemiSupervised(
            model,
            example_input=example,
            rampup_steps=max(1, args.steps * 2 // 5),
            task_loss=lambda logits, label: task_loss(logits.float(), label),
            unlabelled_loss=CrossEntropyDiceLoss(IGNORED),
        )
        parameters += semi.parameters()
    if variant.reseg is not None:
        ignored = {"ignore_index": IGNORED} if variant.semi else {}
        reseg = ReSegWrapper(model, example_input=example, **ignored, **variant.reseg)
        if state is None:
            stage1 = setting.out / "stage1.pt"
            claim_stage1(stage1, setting.options(Variant("stage 1", reseg={})))  # all runs of a folder share it
            begin = time.perf_counter()
            published = {"optimizer": recipe.make_optimizer, "scheduler": lambda opt: LambdaLR(opt, factor)}
            run.recon_losses = reseg.fit_recon(
                batches.loader(args.save_every, workers=args.workers),  # it is saved after every pass
                steps=args.recon_steps,
                amp=AMP[args.amp],
                checkpoint=stage1,
                **(published if args.paper else {}),
            )
            run.recon_seconds = time.perf_counter() - begin
    if variant.deep:
        deep = DeepSupervision(model, num_classes=len(setting.data.class_names), example_input=example)
        parameters += deep.parameters()
    optimizer = recipe.make_optimizer(parameters)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler, "reseg": reseg, "deep": deep}
    if semi is not None:
        parts |= {"semi": semi, "average": semi.average}
    parts = {key: part for key, part in parts.items() if part is not None}
    if state is not None:
        for key, part in parts.items():
            part.load_state_dict(state[key])

    def after_step(loss: float, seconds: float) -> None:
        run.losses.append(loss)
        run.seconds.append(seconds)
        if device.type == "cuda":
            run.peak_mib = torch.cuda.max_memory_allocated(device) / 2**20
        if rank() == 0 and (len(run.losses) % args.save_every == 0 or len(run.losses) == args.steps):
            states = {key: part.state_dict() for key, part in parts.items()}
            write_atomically({"options": options, "run": asdict(run), **states}, path)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    student = model
    if world_size() > 1:
        # before torch 2.13 it cannot copy rank 0's buffers at two forwards a step
        copied = semi is None or BROADCASTS_TWICE
        ids = [device] if device.type == "cuda" else None
        student = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=copied)
    start = len(run.losses)
    loader = batches.loader(args.steps, start=start, workers=args.workers)
    if semi is not None and setting.others is not None:
        loader = beside(loader, setting.others.loader(args.steps, start=start, workers=args.workers))
    train(
        student,
        loader,
        optimizer,
        steps=args.steps,
        start=start,
        task_loss=task_loss,
        factor=factor,
        amp=AMP[args.amp],
        scaler=scaler,
        seed=setting.seed,
        reseg=reseg,
        deep=deep,
        semi=semi,
        after_step=after_step,
        title=title,
    )
    for part in (reseg, deep, semi):
        if part is not None:
            part.remove()  # the model is a plain network again
    network = model if semi is None else semi.average
    share_buffers(network)
    return network, run


def cost(run: Run) -> dict[str, Any]:
    """What the run cost."""
    steady = run.seconds[WARM_UP:] or run.seconds
    return {
        "steps": len(run.losses),
        "seconds_per_step": median(steady),
        "seconds_in_steps": sum(run.seconds),
        "peak_mib": run.peak_mib,
        "stage1_seconds": run.recon_seconds,
        "stage1_losses": run.recon_losses,
        "task_loss": float(np.mean(run.losses[-20:])),
    }


def overlay_rows(models: dict[str, nn.Module], data: SegmentationData) -> list[OverlayRow]:
    """Test cases evenly spread, each at the slice with the most foreground: chosen before any result is known."""
    rows = []
    for place in np.linspace(0, len(data.test) - 1, min(CASES, len(data.test))).round().astype(int):
        case = data.test[place]
        image, label = case.read()
        z = int((label > 0).sum(axis=(1, 2)).argmax())
        predictions = {name: predict(model, image[z][None], data.size)[0] for name, model in models.items()}
        rows.append(OverlayRow(case.name, image[z], {"truth": label[z], **predictions}))
    return rows


# --- options and files ----------------------------------------------------------------------------------------------


def parse_arguments(backbone: Backbone, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options_parser(f"Train {backbone.name} without and with reseg-loss, side by side.")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: paper")
    parser.add_argument("--weight", type=float, help="factor of the alignment loss (default: the preset's)")
    parser.add_argument(
        "--deep-supervision",
        action="store_true",
        help="train the second run with deep supervision too; with --weight 0 with that alone",
    )
    unlabelled_option(parser)
    parser.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    name = backbone.name.lower().replace(" ", "_").replace("-", "_")
    parser.add_argument("--out", type=Path, default=Path("outputs") / name, help="folder of checkpoints and results")
    args = parser.parse_args(argv)
    if args.weight is not None and not args.weight >= 0:
        parser.error(f"--weight {args.weight} has to be 0 or more")
    added = "semi" if args.unlabelled is not None else "deep" if args.deep_supervision else None
    if args.weight == 0 and added is None:
        parser.error("--weight 0 without --deep-supervision or --unlabelled would train the same network twice")
    preset_for_reseg(args, parser, args.weight != 0)
    args.ours = "+".join([*(["reseg"] if args.weight != 0 else []), *([] if added is None else [added])])
    complete(args, backbone, parser)
    if args.unlabelled is not None and args.data is None and args.slices is None:
        args.slices = FEW_SLICES
    args.dataset = with_others(read_data(args, args.seed, parser), args, parser)
    return args


def preset_for_reseg(args: argparse.Namespace, parser: argparse.ArgumentParser, reseg: bool) -> None:
    """Fill in the preset; refuse one, or a weight, that no run would use. `--weight 0` is how to ask for none."""
    given = ["--preset"] * (args.preset is not None) + ["--weight"] * (args.weight not in (None, 0))
    if given and not reseg:
        parser.error(
            f"{' and '.join(given)}: only runs with reseg use this, and there is none; leave it out or add one"
        )
    args.preset = args.preset or "paper"


def options_parser(description: str) -> argparse.ArgumentParser:
    """The options of every train script."""
    parser = argparse.ArgumentParser(description=description)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--small", action="store_true", help="a narrow network, few steps: minutes on 2 CPU cores")
    length.add_argument("--paper", action="store_true", help="the network's published settings and epochs")
    data_options(parser)
    parser.add_argument("--steps", type=positive, help=f"training steps of each run (default: {STEPS})")
    parser.add_argument("--recon-steps", type=positive, help=f"steps of stage 1 (default: {RECON_STEPS})")
    parser.add_argument("--batch-size", type=positive, help="slices a step, over all processes (default: published)")
    parser.add_argument("--size", type=positive, help="side of the square the network sees (default: published)")
    parser.add_argument("--lr", type=rate, help="learning rate (default: published)")
    parser.add_argument("--weights", type=Path, help="public file of pretrained weights to start from")
    parser.add_argument("--amp", choices=list(AMP), default="off", help="mixed precision (default: off)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches (default: 0)")
    return parser


def data_options(parser: argparse.ArgumentParser) -> None:
    """Which data, and how many patients of it."""
    parser.add_argument(
        "--data",
        type=Path,
        help="an .npz with images, labels and patient, or a TransUNet folder of Synapse or ACDC; default: the MNI152 "
        "template that comes with nilearn",
    )
    parser.add_argument("--patients", type=positive, help="train on this many patients (default: all)")
    parser.add_argument("--slices", type=positive, help="use the labels of this many slices alone (default: all)")


def unlabelled_option(parser: argparse.ArgumentParser) -> None:
    """Whether to learn from unlabelled images, too."""
    parser.add_argument(
        "--unlabelled",
        nargs="?",
        const=True,
        type=Path,
        metavar="FILE",
        help="the second run learns from unlabelled images and with deep supervision, too, and its mean teacher is "
        "tested: the images that --patients or --slices leave without labels, and those of an .npz",
    )


def with_others(data: SegmentationData, args: argparse.Namespace, parser: argparse.ArgumentParser) -> SegmentationData:
    """The data with the unlabelled images that were asked for."""
    if isinstance(args.unlabelled, Path):
        if args.data is not None and args.unlabelled.exists() and args.unlabelled.samefile(args.data):
            parser.error(
                "--unlabelled: this is the file of --data, whose test images are not for training; without a file it "
                "takes the images that --patients or --slices leave without labels"
            )
        try:
            data = replace(data, unlabelled=(*data.unlabelled, *load_images(args.unlabelled, data.train[0])))
        except ValueError as error:
            parser.error(str(error))
    if args.unlabelled is not None and not data.unlabelled:
        parser.error("--unlabelled: no image is left without a label; use fewer labels, or give an .npz of images")
    return data


def complete(args: argparse.Namespace, backbone: Backbone, parser: argparse.ArgumentParser) -> None:
    """Fill in what was not said from the network's recipe."""
    if args.paper and (args.steps or args.recon_steps):
        parser.error("--paper sets the number of steps itself; leave out --steps and --recon-steps")
    if args.weights is not None and backbone.load is None:
        parser.error(f"--weights: there is no loader of pretrained weights for {backbone.name}")
    if args.paper and args.weights is None and backbone.load is not None:
        say(f"note: {backbone.name} was published from pretrained weights; give them with --weights {backbone.weights}")
    recipe = backbone.small_recipe if args.small else backbone.recipe
    small = backbone.small_steps if args.unlabelled is None else SMALL_SEMI_STEPS
    args.steps = args.steps or (small if args.small else STEPS)
    args.recon_steps = args.recon_steps or (SMALL_RECON_STEPS if args.small else RECON_STEPS)
    args.batch_size = args.batch_size or recipe.batch_size
    args.lr = recipe.lr if args.lr is None else args.lr
    args.size = args.size or recipe.size
    args.recipe = replace(recipe, lr=args.lr)


def read_data(args: argparse.Namespace, seed: int, parser: argparse.ArgumentParser) -> SegmentationData:
    """The data that was asked for, at the size the network sees."""
    try:
        data = load_data(args.data, patients=args.patients, seed=seed)
        data = replace(data, size=args.size or data.size)
        if args.slices is None:
            return data
        return (data if args.data is not None else scanned(data)).with_labels_of(args.slices)
    except ValueError as error:  # its message says what to do, so a traceback would only hide it
        parser.error(str(error))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} has to be 1 or more")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} has to be more than 0, and finite")
    return value


def refuse_other_options(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Stop unless a checkpoint is of the run that was asked for."""
    other = [_difference(key, theirs.get(key), value) for key, value in ours.items() if theirs.get(key) != value]
    if other:
        raise SystemExit(f"{path} is of a run with other options ({'; '.join(other)}); choose another --out.")


def fingerprint(source: Any) -> str:
    """Of a file its bytes; of a folder the names and sizes of its arrays, for to read them all would take too long."""
    if not isinstance(source, Path):
        return ""  # the template, or no file of unlabelled images
    if source.is_file():
        return f"{zlib.crc32(source.read_bytes()):08x}"
    files = sorted(path for path in source.rglob("*") if path.suffix in (".npz", ".h5"))
    return f"{zlib.crc32(repr([(path.name, path.stat().st_size) for path in files]).encode()):08x}"


def claim_stage1(path: Path, options: dict[str, Any]) -> None:
    """Note beside stage 1's file what it is of, or stop if it is of other data: its teacher may know test images."""
    note = path.with_suffix(".json")
    if not path.exists():
        if rank() == 0:
            write_atomically(json.dumps(options, indent=1) + "\n", note)
    elif not note.exists():
        raise SystemExit(f"{path} has no {note.name} beside it that says what it is of; remove it, or change --out.")
    else:
        refuse_other_options(path, json.loads(note.read_text()), options)


def _difference(key: str, theirs: Any, ours: Any) -> str:
    """An option then and now; of cases, which are new and which are gone."""
    if key != "cases":
        return f"{key} {theirs}, now {ours}"
    theirs = theirs or []  # a checkpoint of an earlier version does not tell
    changes = {
        "new": [case for case in ours if case not in theirs],
        "gone": [case for case in theirs if case not in ours],
    }
    told = [f"{len(cases)} {what}: {', '.join(cases[:3])}" for what, cases in changes.items() if cases]
    return ", ".join(told) or "the cases in another order"


def write_atomically(content: dict[str, Any] | str, path: Path) -> None:
    """Leave the old or the new checkpoint or text, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        torch.save(content, partial)
    os.replace(partial, path)


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)
