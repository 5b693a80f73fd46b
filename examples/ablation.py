"""The ablations of the paper's figure 4 on your data: which of the three terms are on, and the weight lambda.

    python examples/ablation.py --small                                   # one seed, a few minutes on 2 cores
    python examples/ablation.py --data ACDC --amp bf16 --seeds 0 1 2      # on a GPU

Every seed has one teacher, which all its runs share. Finished runs are not repeated when the script starts again.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from common.experiment import (
    TOO_SHORT,
    Variant,
    complete,
    options_parser,
    prepare,
    read_data,
    trained_and_tested,
    write_atomically,
)
from common.plots import ablation_figure, save_figure
from common.processes import processes, rank

from reseg_loss import PRESETS

BACKBONES = ("unet", "smp", "transunet", "swin_unet", "vm_unet")
SMALL_STEPS = 60  # of each of the twelve runs
WEIGHT = 0.035
WEIGHTS = (0.0, 0.01, 0.02, 0.035, 0.05, 0.1)
TERMS = {"E→D": "encoder_to_decoder", "D→E": "decoder_to_encoder", "B": "bottleneck"}
SUBSETS = ((), ("E→D",), ("D→E",), ("B",), ("E→D", "D→E"), ("E→D", "B"), ("D→E", "B"), ("E→D", "D→E", "B"))


def variant(terms: Sequence[str], weight: float, preset: str) -> Variant:
    """A run with some of the terms; without any, or without weight, the bare one."""
    if not terms or weight == 0:
        return Variant("bare")
    on = {setting: float(name in terms) for name, setting in TERMS.items()}
    name = "+".join(setting for setting, value in on.items() if value)
    return Variant(f"{name}_{weight}", {"preset": preset, "weight": weight, **on})


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    subsets: dict[str, list[float]] = {" + ".join(terms) or "none": [] for terms in SUBSETS}
    weights: dict[str, list[float]] = {str(weight): [] for weight in WEIGHTS}
    with processes(args.device) as device:
        for seed in args.seeds:
            data = args.datasets[seed]
            setting = prepare(args.network, args, device, data, seed, args.out / f"seed{seed}")

            def mean_dsc(terms: Sequence[str], weight: float, setting=setting) -> float:
                _, summary = trained_and_tested(variant(terms, weight, args.preset), setting)
                return 100 * (summary.mean_dsc or 0.0)

            for terms, values in zip(SUBSETS, subsets.values()):
                values.append(mean_dsc(terms, WEIGHT))
            for weight, values in zip(WEIGHTS, weights.values()):
                values.append(mean_dsc(SUBSETS[-1], weight))
        if rank() == 0:
            content = {"seeds": args.seeds, "dsc_by_terms": subsets, "dsc_by_weight": weights}
            write_atomically(json.dumps(content, indent=1) + "\n", args.out / "ablation.json")
            figure = ablation_figure(
                subsets, weights, f"{args.network.name}, {args.datasets[args.seeds[0]].name}, preset {args.preset}"
            )
            save_figure(figure, args.out / "ablation.png")
            for title, table in (("terms", subsets), ("weight", weights)):
                print(f"\n{title:22} DSC in %, mean over {len(args.seeds)} seeds, and each")
                for name, values in table.items():
                    each = " ".join(f"{value:.2f}" for value in values)
                    print(f"{name:22} {sum(values) / len(values):6.2f}   {each}")
            print(f"\nThe plot is {args.out / 'ablation.png'}. Differences within the spread of the seeds say nothing.")
            if args.small:
                print(TOO_SHORT)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options_parser("Train with each combination of the alignment's terms, and with each weight.")
    parser.add_argument("--backbone", choices=BACKBONES, default="unet", help="default: unet")
    parser.add_argument("--preset", choices=list(PRESETS), default="paper", help="default: paper")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"), help="folder of checkpoints and results")
    args = parser.parse_args(argv)
    args.unlabelled = None
    if args.small:
        args.steps = args.steps or SMALL_STEPS
    args.network = importlib.import_module(f"train_{args.backbone}").BACKBONE
    complete(args, args.network, parser)
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds}: a seed is named twice")
    args.datasets = {seed: read_data(args, seed, parser) for seed in args.seeds}
    return args


if __name__ == "__main__":
    main()
