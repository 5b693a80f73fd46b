"""Few labels and many images without labels: one network learns from both, with `SemiSupervised`.

    python examples/train_semi.py --small                            # the packaged template, a few minutes on 2 cores
    python examples/train_semi.py --data acdc.npz --patients 3 --amp bf16     # the other patients without their labels
    python examples/train_semi.py --images imagesTr --labels labelsTr --unlabelled imagesTs --patch 32 96 96

The last command is for folders of NIfTI files: 2D slices, or 3D patches with `--patch D H W`. It writes the predictions
of the unlabelled images to `--out`, each with the header of its image. Killed? The same command resumes the run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from common.data import SegmentationData, TrainingBatches
from common.experiment import (
    AMP,
    FEW_SLICES,
    data_options,
    fingerprint,
    positive,
    rate,
    read_data,
    refuse_other_options,
    write_atomically,
)
from common.metrics import summarize
from common.nifti import load_folders, save_prediction
from common.recipes import poly, sgd
from common.report import scores_table
from common.training import evaluate, predict, refuse_diverged
from common.volumes import PatchBatches, predict_volume
from monai.networks.nets import BasicUNet
from torch import nn

from reseg_loss import SemiSupervised, batches

WIDTHS, SMALL_WIDTHS = (32, 32, 64, 128, 256, 32), (8, 8, 16, 32, 64, 8)
STEPS, SMALL_STEPS = 6000, 500
SETTINGS = ("small", "data", "patients", "slices", "images", "labels", "unlabelled", "patch", "size")
OPTIONS = (*SETTINGS, "steps", "batch_size", "lr", "amp", "seed")  # what a run depends on


def network(dims: int, classes: int, *, small: bool) -> nn.Module:
    return BasicUNet(dims, 1, classes, features=SMALL_WIDTHS if small else WIDTHS, norm="batch")


def learn(model: nn.Module, labelled: Iterable, unlabelled: Iterable, args: argparse.Namespace) -> nn.Module:
    """Train the model, and return its mean teacher, which is the better network: the same class, the same keys."""
    image, _ = next(iter(labelled))
    semi = SemiSupervised(model, example_input=image.to(args.device), rampup_steps=max(1, args.steps * 2 // 5))
    optimizer = sgd([*model.parameters(), *semi.parameters()], args.lr)
    data = batches(labelled, unlabelled, steps=args.steps)
    parts = {"model": model, "semi": semi, "optimizer": optimizer, "data": data}
    checkpoint, options = args.out / "training.pt", {key: str(vars(args)[key]) for key in OPTIONS}
    options["cases"] = args.dataset.cases(unlabelled=True)  # files may come and go between two runs
    options["contents of data"] = fingerprint(args.data)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        refuse_other_options(checkpoint, state["options"], options)
        for name, part in parts.items():
            part.load_state_dict(state[name])
    model.train()
    for image, label, other in data:
        torch.manual_seed(args.seed * 1_000_003 + data.step)  # so that the same command goes on exactly where it was
        for group in optimizer.param_groups:
            group["lr"] = args.lr * poly(data.step - 1, args.steps)
        with torch.autocast(args.device, dtype=AMP[args.amp], enabled=args.amp != "off"):
            loss = semi.loss(image, label, other)  # moves them to the model's device
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        semi.update()  # the mean teacher follows
        if data.step % 50 == 0:
            print(f"step {data.step}: " + ", ".join(f"{name} {value:.3f}" for name, value in semi.stats().items()))
        if data.step % args.save_every == 0 or data.step == args.steps:
            refuse_diverged(f"the loss of step {data.step}", loss)  # once it is not, it never is again
            states = {name: part.state_dict() for name, part in parts.items()}
            write_atomically({"options": options, **states}, checkpoint)
    semi.remove()
    write_atomically(semi.average.state_dict(), args.out / "model.pt")
    return semi.average


def finish(model: nn.Module, data: SegmentationData, args: argparse.Namespace) -> None:
    """Score the test volumes; without any, predict the unlabelled ones."""
    if data.test:
        summary = summarize(evaluate(model, data))
        print(f"\n{scores_table({'semi': summary}, data.class_names)}\n\nOne seed proves nothing.")
        if args.data is None:
            print("The MNI152 template is one averaged brain: this is a demonstration, never evidence.")
        return
    for case in data.unlabelled:
        image, _ = case.read()
        label = predict_volume(model, image, args.patch) if args.patch else predict(model, image, data.size)
        print(save_prediction(case, label, args.out))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    data: SegmentationData = args.dataset
    draw = partial(PatchBatches, patch=args.patch) if args.patch else TrainingBatches
    sources = [draw(part, batch_size=args.batch_size, seed=args.seed + i) for i, part in enumerate((data, data.others))]
    labelled, others = (len(source.images) for source in sources)
    print(f"{data.name}: {labelled} labelled and {others} unlabelled {'volumes' if args.patch else 'slices'}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = network(2 if args.patch is None else 3, len(data.class_names), small=args.small).to(args.device)
    labelled, unlabelled = (source.loader(workers=args.workers) for source in sources)
    finish(learn(model, labelled, unlabelled, args), data, args)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a narrow network, few steps: minutes on 2 CPU cores")
    data_options(parser)
    for name, what in (("images", "images"), ("labels", "labels, named as the images"), ("unlabelled", "other images")):
        parser.add_argument(f"--{name}", type=Path, help=f"folder of NIfTI files: {what}")
    parser.add_argument("--patch", type=positive, nargs=3, metavar=("D", "H", "W"), help="3D; multiples of 16")
    parser.add_argument("--size", type=positive, help="side of the square a 2D network sees (default: of the data)")
    parser.add_argument("--steps", type=positive, help="(default: 6000, small 500)")
    parser.add_argument("--batch-size", type=positive, default=4, help="labelled, and as many others (default: 4)")
    parser.add_argument("--lr", type=rate, help="learning rate (default: 0.01, small 0.05)")
    parser.add_argument("--amp", choices=("off", "bf16"), default="off", help="mixed precision (default: off)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches (default: 0)")
    parser.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/train_semi"), help="folder of network and predictions"
    )
    args = parser.parse_args(argv)
    args.steps = args.steps or (SMALL_STEPS if args.small else STEPS)
    if args.lr is None:
        args.lr = 0.05 if args.small else 0.01
    folders = [args.images, args.labels, args.unlabelled]
    if any(folders) and not all(folders):
        parser.error("--images, --labels and --unlabelled come together")
    if args.patch and (not all(folders) or any(n % 16 for n in args.patch)):
        parser.error("--patch is for folders of NIfTI files, and the network halves it four times: multiples of 16")
    for key in ("data", "patients", "slices"):
        if any(folders) and vars(args)[key] is not None:
            parser.error(f"--{key} has no effect beside --images; leave it out")
    if args.patch and args.size:
        parser.error("--size has no effect beside --patch; leave it out")
    if not any(folders):
        if args.data is None and not args.slices:
            args.slices = FEW_SLICES
        args.dataset = read_data(args, args.seed, parser)
        if not args.dataset.unlabelled:
            parser.error("no image is left without a label; use fewer with --patients or --slices")
        return args
    places = {folder.resolve() for folder in folders}
    if len(places) < len(folders):
        parser.error("--images, --labels and --unlabelled have to be three folders")
    if args.out.resolve() in places:
        parser.error("--out: predictions have the names of their images, so they need a folder of their own")
    try:
        data = load_folders(*folders, channels=args.patch is not None)
    except ValueError as error:  # its message says what to do, so a traceback would only hide it
        parser.error(str(error))
    args.dataset = replace(data, size=args.size or data.size)
    return args


if __name__ == "__main__":
    main()
