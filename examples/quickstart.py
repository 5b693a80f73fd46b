"""Train one U-Net in four ways with few labelled slices, and compare their predictions on a slice that none has seen.

    pip install '.[examples]'
    python examples/quickstart.py                                  # the MNI152 brain template, 2 minutes on 2 cores
    python examples/quickstart.py --data my_slices.npz --patients 3   # your own data, split by patient

The four ways: the network alone; with the alignment of ReSeg-UNet; with deep supervision; and with deep supervision and
unlabelled images (`SemiSupervised`). They have the same initial weights and labelled batches. The important lines are
in `trained` and, inside the loop, in `common/training.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from common.data import SegmentationData, TrainingBatches, beside, resize_image, resize_label
from common.experiment import FEW_SLICES, data_options, positive, preset_for_reseg, read_data
from common.metrics import VolumeScores, summarize
from common.plots import WayPicture, save_figure, ways_figure
from common.recipes import sgd
from common.report import scores_table
from common.training import evaluate, predict, train
from monai.networks.nets import BasicUNet
from torch import nn

from reseg_loss import PRESETS, DeepSupervision, ReSegWrapper, SemiSupervised

BATCH_SIZE = 4
LEARNING_RATE = 0.05  # five times the published one: there are only a few steps
STEPS = 400
WAYS = ("bare", "reseg", "deep", "semi")
TITLES = {
    "bare": "bare",
    "reseg": "with reseg",
    "deep": "deep supervision",
    "semi": "semi-supervised",
}


def unet(classes: int) -> nn.Module:
    """MONAI's, narrow for CPUs.

    Batch instead of instance normalization: that one would hide from the network how much of a slice is brain.
    """
    return BasicUNet(2, 1, classes, features=(8, 8, 16, 32, 64, 8), norm="batch")


@dataclass
class Trained:
    """What one way gave."""

    network: nn.Module
    seconds: float
    reconstruction: np.ndarray | None = None
    """What reseg's teacher makes of the true label map of the example slice, (H, W)."""


def trained(way: str, data: SegmentationData, args: argparse.Namespace) -> Trained:
    """Train in one of the four ways, from the same start and on the same labelled batches as in the others."""
    begin = time.perf_counter()
    torch.manual_seed(args.seed)
    model = unet(len(data.class_names)).to(args.device)
    batches = TrainingBatches(data, BATCH_SIZE, args.seed)
    example = batches[0][0].to(args.device)
    loader = batches.loader(args.steps)
    reseg = deep = semi = reconstruction = None
    if way == "reseg":
        overrides = {} if args.weight is None else {"weight": args.weight}
        reseg = ReSegWrapper(model, example_input=example, preset=args.preset, **overrides)
        reseg.fit_recon(batches.loader(), steps=args.recon_steps, progress=True)
    elif way == "deep":
        deep = DeepSupervision(model, example_input=example)
    elif way == "semi":
        semi = SemiSupervised(model, example_input=example, rampup_steps=max(1, args.steps * 2 // 5))
        others = TrainingBatches(data.others, BATCH_SIZE, args.seed + 1)
        loader = beside(loader, others.loader(args.steps))
    parts = [part for part in (reseg, deep, semi) if part is not None]
    optimizer = sgd([*model.parameters(), *(p for part in parts for p in part.parameters())], LEARNING_RATE)
    train(model, loader, optimizer, steps=args.steps, reseg=reseg, deep=deep, semi=semi, title=TITLES[way])
    if reseg is not None:
        image, truth = example_slice(data)
        label = resize_label(torch.from_numpy(truth)[None].long(), (data.size, data.size))
        reconstruction = resize_image(reseg.reconstruct(label), image.shape)[0].mean(0).cpu().numpy()
    for part in parts:
        part.remove()  # the model is a plain network again
    network = model if semi is None else semi.average  # the mean teacher: the same class, the same keys
    return Trained(network, time.perf_counter() - begin, reconstruction)


def example_slice(data: SegmentationData) -> tuple[np.ndarray, np.ndarray]:
    """The slice with the most foreground in the middle test volume: chosen before any result is known."""
    image, label = data.test[(len(data.test) - 1) // 2].read()
    z = int((label > 0).sum(axis=(1, 2)).argmax())
    return image[z], label[z]


def caveats(data: SegmentationData, is_template: bool) -> list[str]:
    """What the numbers do not say."""
    sentences = []
    if is_template:
        sentences.append(
            "The MNI152 template is one averaged brain, and training and test are slabs of that brain: "
            "this is a demonstration, never evidence."
        )
    sentences.append("One seed proves nothing: another --seed can turn any of these differences round.")
    if any(case.spacing is None for case in data.test):
        sentences.append("HD95 is in pixels, because the voxel size is not known; a slice counts as one pixel.")
    return sentences


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one U-Net four ways, side by side.")
    data_options(parser)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"some of {','.join(WAYS)} (default: all)")
    parser.add_argument("--steps", type=positive, default=STEPS, help="training steps of each (default: %(default)s)")
    parser.add_argument("--recon-steps", type=positive, default=96, help="steps of reseg's stage 1 (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--preset", choices=list(PRESETS), help="of reseg (default: paper)")
    parser.add_argument("--weight", type=float, help="factor of reseg's alignment loss (default: the preset's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder for figure and metrics")
    args = parser.parse_args(argv)
    args.ways = args.ways.split(",")
    for name in args.ways:
        if name not in WAYS:
            parser.error(f"--ways: {name!r} is none of {', '.join(WAYS)}")
    if args.weight is not None and not args.weight >= 0:
        parser.error(f"--weight {args.weight} has to be 0 or more")
    preset_for_reseg(args, parser, "reseg" in args.ways)
    args.size = None
    if args.data is None and args.slices is None:
        args.slices = FEW_SLICES
    args.dataset = read_data(args, args.seed, parser)
    if "semi" in args.ways and not args.dataset.unlabelled:
        parser.error("no image is left without a label for 'semi'; use fewer with --patients or --slices, or --ways")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    args = parse_arguments(argv)
    data: SegmentationData = args.dataset
    labelled, others = (sum(len(case.read()[1]) for case in cases) for cases in (data.train, data.unlabelled))
    print(
        f"{data.name}, {data.size} x {data.size} pixels: {labelled} labelled and {others} unlabelled slices for "
        f"training, {len(data.test)} test volumes"
    )
    image, truth = example_slice(data)
    scores: dict[str, list[VolumeScores]] = {}
    seconds, pictures, reconstruction = {}, [], None
    for way in args.ways:
        done = trained(way, data, args)
        scores[way], seconds[way] = evaluate(done.network, data, f"{TITLES[way]}, testing"), done.seconds
        label = predict(done.network, image[None], data.size)[0]
        pictures.append(WayPicture(TITLES[way], label, summarize(scores[way]).mean_dsc))
        if done.reconstruction is not None:
            reconstruction = done.reconstruction
    args.out.mkdir(parents=True, exist_ok=True)
    figure = ways_figure(image, truth, pictures, reconstruction, data.class_names)
    save_figure(figure, args.out / "quickstart.png")
    write_metrics(args.out / "metrics.json", scores, seconds, args)

    table = {TITLES[way]: summarize(each) for way, each in scores.items()}
    print("\n" + scores_table(table, data.class_names))
    print("seconds of training: " + ", ".join(f"{TITLES[way]} {value:.0f}" for way, value in seconds.items()))
    print(f"\n{time.perf_counter() - start:.0f} s in all. Figure and metrics are in {args.out}/")
    print("\n".join(caveats(data, is_template=args.data is None)))


def write_metrics(
    path: Path, scores: dict[str, list[VolumeScores]], seconds: dict[str, float], args: argparse.Namespace
) -> None:
    """Everything behind the table, volume by volume."""
    options = {key: value for key, value in vars(args).items() if key != "dataset"}
    content = {
        "data": args.dataset.name,
        "classes": args.dataset.class_names,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "caveats": caveats(args.dataset, is_template=args.data is None),
        "ways": {
            way: {"seconds": seconds[way], **asdict(summarize(each)), "volumes": [asdict(score) for score in each]}
            for way, each in scores.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
