"""Train two U-Nets without and with reseg-loss, and show both side by side.

    pip install '.[examples]'
    python examples/quickstart.py                        # the MNI152 brain template, about 4 minutes on 2 cores
    python examples/quickstart.py --data my_slices.npz   # your own data, split by patient

The lines that matter are in `compare` and, inside the loop, in `common/training.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from common.data import SegmentationData, TrainingBatches, load_data, resize_image, resize_label
from common.experiment import data_options, positive
from common.metrics import VolumeScores, summarize
from common.plots import ModelPictures, comparison_figure, save_figure
from common.recipes import sgd
from common.report import comparison_table
from common.training import evaluate, predict, train
from monai.networks.nets import BasicUNet
from torch import nn

from reseg_loss import PRESETS, DeepSupervision, ReSegWrapper

BATCH_SIZE = 8
LEARNING_RATE = 0.05  # five times the published one: there are only a few steps


def basic_unet(classes: int) -> nn.Module:
    """MONAI's, narrow for CPUs.

    Batch instead of instance normalization: that one would hide from the network how much of a slice is brain.
    """
    return BasicUNet(2, 1, classes, features=(16, 16, 32, 64, 128, 16), norm="batch")


def resnet_unet(classes: int) -> nn.Module:
    """The Unet of segmentation_models_pytorch, from scratch, with a narrow decoder."""
    channels = (128, 64, 32, 16, 16)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=classes, decoder_channels=channels)


MODELS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "basicunet": ("MONAI BasicUNet", basic_unet),
    "unet": ("smp Unet", resnet_unet),
}


@dataclass
class Comparison:
    """One architecture, trained without and with reseg-loss."""

    bare: list[VolumeScores]
    reseg: list[VolumeScores]
    pictures: ModelPictures
    seconds: dict[str, float]


def compare(
    name: str, build: Callable[[int], nn.Module], data: SegmentationData, args: argparse.Namespace
) -> Comparison:
    """Train twice from the same start on the same batches; only the second run has the alignment loss."""
    classes = len(data.class_names)
    seconds: dict[str, float] = {}
    batches = TrainingBatches(data, BATCH_SIZE, args.seed)

    torch.manual_seed(args.seed)
    bare = build(classes).to(args.device)
    with timed(seconds, "training, bare"):
        bare_losses = train(
            bare,
            batches.loader(args.steps),
            sgd(bare.parameters(), LEARNING_RATE),
            steps=args.steps,
            title=f"{name}, bare",
        )

    torch.manual_seed(args.seed)
    model = build(classes).to(args.device)
    overrides = {} if args.weight is None else {"weight": args.weight}
    reseg = ReSegWrapper(model, preset=args.preset, **overrides)
    with timed(seconds, "stage 1, the teacher"):
        recon_losses = reseg.fit_recon(batches.loader(), steps=args.recon_steps, progress=True)
    deep, parameters = None, [*model.parameters()]
    if args.deep_supervision:
        image, _ = next(iter(batches.loader(1)))
        deep = DeepSupervision(model, num_classes=classes, example_input=image.to(args.device))
        parameters += deep.parameters()
    with timed(seconds, "training, with reseg"):
        reseg_losses = train(
            model,
            batches.loader(args.steps),
            sgd(parameters, LEARNING_RATE),
            steps=args.steps,
            reseg=reseg,
            deep=deep,
            title=f"{name}, with reseg",
        )
    image, truth = example_slice(data)
    label = resize_label(torch.from_numpy(truth)[None].long(), (data.size, data.size))
    reconstruction = resize_image(reseg.reconstruct(label), (image.shape[0], image.shape[1]))
    reseg.remove()  # the model is a plain network again
    if deep is not None:
        deep.remove()

    with timed(seconds, "testing, both"):
        scores = [evaluate(each, data, title=f"{name}, testing") for each in (bare, model)]
    pictures = ModelPictures(
        name,
        predict(bare, image[None], data.size)[0],
        predict(model, image[None], data.size)[0],
        reconstruction[0].mean(0).cpu().numpy(),
        bare_losses,
        reseg_losses,
        recon_losses,
        args.recon_steps,
    )
    return Comparison(scores[0], scores[1], pictures, seconds)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


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
    parser = argparse.ArgumentParser(description="Train two U-Nets without and with reseg-loss, side by side.")
    data_options(parser)
    parser.add_argument("--steps", type=positive, default=150, help="training steps of each run (default: 150)")
    parser.add_argument("--recon-steps", type=positive, default=96, help="steps of stage 1 (default: 96)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--preset", choices=list(PRESETS), default="paper", help="default: paper")
    parser.add_argument("--weight", type=float, help="factor of the alignment loss (default: the preset's)")
    parser.add_argument(
        "--deep-supervision",
        action="store_true",
        help="train the second run with deep supervision too; with --weight 0 with that alone",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder for figure and metrics")
    parser.add_argument("--models", default=",".join(MODELS), help=f"some of {','.join(MODELS)} (default: all)")
    args = parser.parse_args(argv)
    args.models = args.models.split(",")
    for name in args.models:
        if name not in MODELS:
            parser.error(f"--models: {name!r} is none of {', '.join(MODELS)}")
    if args.weight is not None and not args.weight >= 0:
        parser.error(f"--weight {args.weight} has to be 0 or more")
    try:
        args.dataset = load_data(args.data, patients=args.patients, seed=args.seed)
    except ValueError as error:  # its message says what to do, so a traceback would only hide it
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    args = parse_arguments(argv)
    data: SegmentationData = args.dataset
    print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test volumes, {data.size} x {data.size} pixels"
    )

    results = {key: compare(*MODELS[key], data, args) for key in args.models}

    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [result.pictures for result in results.values()]
    save_figure(comparison_figure(*example_slice(data), pictures, data.class_names), args.out / "quickstart.png")
    write_metrics(args.out / "metrics.json", results, args)

    for result in results.values():
        bare, reseg = summarize(result.bare), summarize(result.reseg)
        print("\n" + comparison_table(result.pictures.name, data.class_names, bare, reseg))
        print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in result.seconds.items()))
    print(f"\n{time.perf_counter() - start:.0f} s in all. Figure and metrics are in {args.out}/")
    print("\n".join(caveats(data, is_template=args.data is None)))


def write_metrics(path: Path, results: dict[str, Comparison], args: argparse.Namespace) -> None:
    """Everything behind the table, volume by volume."""
    options = {key: value for key, value in vars(args).items() if key != "dataset"}
    content = {
        "data": args.dataset.name,
        "classes": args.dataset.class_names,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in options.items()},
        "caveats": caveats(args.dataset, is_template=args.data is None),
        "models": {
            key: {
                "seconds": result.seconds,
                "bare": {**asdict(summarize(result.bare)), "volumes": [asdict(score) for score in result.bare]},
                "reseg": {**asdict(summarize(result.reseg)), "volumes": [asdict(score) for score in result.reseg]},
            }
            for key, result in results.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
