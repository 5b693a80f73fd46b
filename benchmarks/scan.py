"""How much slower VM-UNet's selective scan is in torch than with mamba-ssm's kernel: a training step with each.

python benchmarks/scan.py --out benchmarks/results/scan.json    # on a GPU where mamba-ssm runs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from overhead import timed

from benchmarks.evidence.commit import head_commit
from examples.backbones.vm_unet import VMUNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=head_commit(), help="what was measured, where there is no git to tell")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=15)
    args = parser.parse_args()
    device = torch.device("cuda")
    image = torch.randn(args.batch, 3, args.size, args.size, device=device)
    steps, peaks = {}, {}
    for backend in ("cuda", "torch"):
        torch.manual_seed(0)
        model = VMUNet(9, drop_path=0.0, scan=backend).to(device)

        def step(model: VMUNet = model) -> torch.Tensor:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(image).float().square().mean()
            loss.backward()
            return loss.detach()

        steps[backend] = step
        for _ in range(3):
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[backend] = torch.cuda.max_memory_allocated() / 2**20
    times: dict[str, list[float]] = {backend: [] for backend in steps}
    for _ in range(args.steps):
        for backend, step in steps.items():
            times[backend].append(timed(step))
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": args.commit,
        "batch": args.batch,
        "size": args.size,
        "ms": {backend: median(values) for backend, values in times.items()},
        "peak_mib": peaks,
    }
    result["ratio"] = result["ms"]["torch"] / result["ms"]["cuda"]
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
