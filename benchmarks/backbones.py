"""The five networks of the train scripts on one data set: bare, with deep supervision, with reseg, at a short schedule.

    python benchmarks/backbones.py --data acdc.npz --out benchmarks/results/backbones.json -- --amp bf16 --workers 8

What follows `--` goes to the train scripts. Seconds per step are medians and leave out the loading of data. DSC and
HD95 are of one seed, so they say that a network trains, not which variant is better.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from ablation import BACKBONES
from common.experiment import main as run_script

import reseg_loss
from benchmarks.evidence.commit import head_commit

RUNS = {"bare": "bare", "deep supervision": "deep", "reseg": "reseg"}
KEYS = ("steps", "seconds_per_step", "peak_mib", "stage1_seconds", "task_loss", "mean_dsc", "mean_hd95", "unit", "dsc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=head_commit(), help="what was measured, where there is no git to tell")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("options", nargs="*", help="options of the train scripts, after --")
    args = parser.parse_args()
    about = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "reseg_loss": reseg_loss.__version__,
        "commit": args.commit,
        "data": args.data.name,
        "options": args.options,
    }
    results = []
    if args.out.exists():  # goes on after the backbones that it has, if they were measured alike
        before = json.loads(args.out.read_text())
        if before["about"] != about:
            parser.error(f"{args.out} was measured otherwise ({before['about']}); name another file")
        results = before["results"]
    known = {result["backbone"] for result in results}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.backbones:
            backbone, out = importlib.import_module(f"train_{name}").BACKBONE, Path(folder) / name
            if backbone.name in known:
                continue
            for comparison in (["--weight", "0", "--deep-supervision"], ["--preset", "standardized"]):
                chosen = ["--data", str(args.data), "--out", str(out), *comparison]
                run_script(backbone, [*chosen, *args.options])
            for row, file in RUNS.items():
                content = json.loads((out / f"{file}.json").read_text())
                setting = content["options"]
                results.append({"backbone": backbone.name, "row": row, "batch": setting["batch_size"]})
                results[-1] |= {key: content[key] for key in KEYS}
            args.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    print(f"\n{'':12}{'':18}{'ms/step':>9}{'peak MiB':>10}{'DSC %':>8}{'HD95':>8}")
    for r in results:
        peak = f"{r['peak_mib']:10.0f}" if r["peak_mib"] else f"{'-':>10}"
        scores = f"{100 * (r['mean_dsc'] or 0):8.2f}{r['mean_hd95'] or 0:8.2f}"
        print(f"{r['backbone']:12}{r['row']:18}{1e3 * r['seconds_per_step']:9.1f}{peak}{scores}")


if __name__ == "__main__":
    main()
