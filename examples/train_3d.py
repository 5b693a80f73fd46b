"""MONAI's DynUNet or UNet on 3D patches: bare, with deep supervision, and with reseg-loss.

    python examples/train_3d.py --small                           # the packaged template, a few minutes on 2 cores
    python examples/train_3d.py --small --contrasts 2             # with a second, made-up contrast
    python examples/train_3d.py --data hippocampus.npz --amp bf16 # on a GPU; D x H x W volumes, see common/volumes.py
    torchrun --nproc_per_node 2 examples/train_3d.py ...          # several GPUs share each batch

The networks are tested with sliding windows; DSC and HD95 (in mm) are computed in 3D. Runs, resuming and the loop are
those of the 2D train scripts (`common/experiment.py`, `common/training.py`): the same command resumes a stopped run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from common.experiment import (
    AMP,
    TOO_SHORT,
    Backbone,
    Setting,
    Variant,
    positive,
    preset_for_reseg,
    rate,
    say,
    trained_and_tested,
    unlabelled_option,
    with_others,
)
from common.metrics import VolumeScores
from common.processes import processes, rank, world_size
from common.recipes import Recipe
from common.report import scores_table
from common.volumes import Patch, PatchBatches, evaluate_volumes, fitting_patch, load_volumes
from monai.networks.nets import DynUNet, UNet
from torch import nn

from reseg_loss import PRESETS

FILTERS, SMALL_FILTERS = (32, 64, 128, 256), (8, 16, 32, 64)
RUNS = ("bare", "deep", "reseg", "reseg+deep", "semi")


def dynunet(channels: int, classes: int, filters: Sequence[int]) -> nn.Module:
    """nnU-Net's plain network; its own deep supervision is off, for ours does the same on any network."""
    return DynUNet(
        3, channels, classes, [3] * len(filters), [1, 2, 2, 2], [2, 2, 2], filters=list(filters), norm_name="instance"
    )


def unet(channels: int, classes: int, filters: Sequence[int]) -> nn.Module:
    """MONAI's residual U-Net."""
    return UNet(3, channels, classes, tuple(filters), (2, 2, 2), num_res_units=2)


NETWORKS: dict[str, Callable[[int, int, Sequence[int]], nn.Module]] = {"dynunet": dynunet, "unet": unet}
RECIPE = Recipe("our choice: it learns in few steps", lr=1e-3, weight_decay=1e-2, optimizer="AdamW", batch_size=2)
SMALL_RECIPE = replace(RECIPE, lr=3e-3)


@dataclass(frozen=True)
class VolumeSetting(Setting):
    """A setting whose networks see patches."""

    patch: Patch = field(kw_only=True)

    def options(self, variant: Variant) -> dict[str, Any]:
        """What the result of a run depends on."""
        own = {"contrasts": self.args.contrasts, "patch": list(self.patch)}
        return super().options(variant) | own

    def evaluate(self, model: nn.Module, title: str) -> list[VolumeScores]:
        """Score the test volumes with sliding windows."""
        return evaluate_volumes(model, self.data, self.patch, title)


def prepare(args: argparse.Namespace, device: torch.device) -> VolumeSetting:
    """Read the volumes, and say what is about to happen."""
    data, make = args.dataset, NETWORKS[args.network]
    channels = data.train[0].read()[0].shape[0]
    patch = tuple(args.patch) if args.patch else fitting_patch(data, 64 if args.small else 128)
    backbone = Backbone(
        args.network,
        build=lambda classes, size: make(channels, classes, FILTERS),
        small=lambda classes, size: make(channels, classes, SMALL_FILTERS),
        recipe=RECIPE,
        small_recipe=SMALL_RECIPE,
    )
    batches = PatchBatches(data, patch, args.batch_size, args.seed, rank(), world_size())
    others = None
    if "semi" in args.runs:
        others = PatchBatches(data.others, patch, args.batch_size, args.seed + 1, rank(), world_size())
    say(
        f"{args.network} on {data.name}: {len(data.train)} training and {len(data.test)} test volumes, channels: "
        f"{channels}, {args.steps} steps of {args.batch_size} patches of {' x '.join(map(str, patch))} voxels"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    return VolumeSetting(backbone, data, batches, args, device, args.seed, args.out, others, patch=patch)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    reseg = {"preset": args.preset, **({} if args.weight is None else {"weight": args.weight})}
    with processes(args.device) as device:
        setting = prepare(args, device)
        results = {}
        for name in args.runs:
            variant = Variant(name, reseg if "reseg" in name else None, "deep" in name, name == "semi")
            _, results[name] = trained_and_tested(variant, setting)
        say(f"\n{scores_table(results, args.dataset.class_names)}\n\nScores are in {args.out}/.")
        say("One seed proves nothing: repeat with another --seed.")
        if args.small:
            say(TOO_SHORT)
        if args.data is None:
            say("The MNI152 template is one averaged brain: this is a demonstration, never evidence.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="dynunet")
    parser.add_argument("--small", action="store_true", help="a narrow network, few steps: minutes on 2 CPU cores")
    parser.add_argument("--data", type=Path, help="an .npz of volumes; default: the MNI152 template of nilearn")
    parser.add_argument("--contrasts", type=int, choices=(1, 2), default=1, help="of the template (default: 1)")
    parser.add_argument("--patients", type=positive, help="train on this many patients (default: all)")
    parser.add_argument("--patch", type=positive, nargs=3, metavar=("D", "H", "W"), help="multiples of 8")
    parser.add_argument("--runs", help=f"some of {','.join(RUNS)} (default: bare,deep,reseg)")
    unlabelled_option(parser)
    parser.add_argument("--steps", type=positive, help="training steps of each run (default: 1500, small 100)")
    parser.add_argument("--recon-steps", type=positive, help="steps of stage 1 (default: 800, small 100)")
    parser.add_argument("--batch-size", type=positive, default=RECIPE.batch_size, help="(default: %(default)s)")
    parser.add_argument("--lr", type=rate, help="learning rate (default: 0.001, small 0.003)")
    parser.add_argument("--preset", choices=list(PRESETS), help="(default: paper)")
    parser.add_argument("--weight", type=float, help="factor of the alignment loss (default: the preset's)")
    parser.add_argument("--amp", choices=list(AMP), default="off", help="mixed precision (default: off)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare batches (default: 0)")
    parser.add_argument("--save-every", type=positive, default=500, help="steps between checkpoints (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("outputs/train_3d"), help="folder of checkpoints and results")
    args = parser.parse_args(argv)
    semi = args.unlabelled is not None
    args.runs = args.runs.split(",") if args.runs else ["bare", "deep", "semi" if semi else "reseg"]
    for name in args.runs:
        if name not in RUNS:
            parser.error(f"--runs: {name!r} is none of {', '.join(RUNS)}")
    if ("semi" in args.runs) != semi:
        parser.error("the run 'semi' needs --unlabelled, and is what --unlabelled is for")
    preset_for_reseg(args, parser, any("reseg" in name for name in args.runs))
    if args.patch and any(n % 8 for n in args.patch):
        parser.error(f"--patch {' '.join(map(str, args.patch))}: the networks halve it three times; multiples of 8")
    args.steps = args.steps or (100 if args.small else 1500)
    args.recon_steps = args.recon_steps or (100 if args.small else 800)
    recipe = SMALL_RECIPE if args.small else RECIPE
    args.lr = recipe.lr if args.lr is None else args.lr
    # what the 2D scripts let choose beside
    args.paper, args.weights, args.size, args.slices = False, None, None, None
    args.recipe = replace(recipe, lr=args.lr)
    try:
        data = load_volumes(args.data, contrasts=args.contrasts, patients=args.patients, seed=args.seed)
    except ValueError as error:  # its message says what to do, so a traceback would only hide it
        parser.error(str(error))
    if semi and args.data is None:
        chosen = data.train[len(data.train) // 2]  # the labels of one slab alone
        data = replace(data, train=(chosen,), unlabelled=tuple(case for case in data.train if case is not chosen))
    args.dataset = with_others(data, args, parser)
    return args


if __name__ == "__main__":
    main()
