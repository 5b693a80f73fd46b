"""What a 3D training step costs with each regularizer: time and memory at patches of 96^3 and 128^3.

    python benchmarks/volumes.py --out benchmarks/results/volumes.json   # about a minute on a GPU

MONAI's DynUNet at nnU-Net's widths, batch 2, bf16 autocast. Median over steps that are interleaved with the other
rows', after a warm-up, by CUDA events. Two memories: what a row holds between steps (weights, momentum, the teacher),
and the peak of a step above that. On CPU it runs smaller, in fp32, without memory. Stage 1 is not in the step.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import reseg_loss
from benchmarks.evidence.commit import head_commit
from reseg_loss import DeepSupervision, ReSegWrapper

CLASSES = 3
ROWS = ("bare", "deep supervision", "paper", "standardized", "deep supervision + standardized")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label)


def make_step(row: str, image: Tensor, label: Tensor, filters: list[int]) -> Callable[[], None]:
    """A training step of a network of its own."""
    torch.manual_seed(0)
    strides = [1] + [2] * (len(filters) - 1)
    kernels = [3] * len(filters)
    model = DynUNet(3, 1, CLASSES, kernels, strides, strides[1:], filters=filters, norm_name="instance").to(DEVICE)
    parameters, added = [*model.parameters()], []
    if "deep supervision" in row:
        ds = DeepSupervision(model, num_classes=CLASSES, example_input=image[:1])
        parameters += ds.parameters()
        added.append(lambda: ds.loss(label, task_loss))
    preset = row.split(" + ")[-1]
    if preset in reseg_loss.PRESETS:
        reseg = ReSegWrapper(model, example_input=image[:1], preset=preset)
        reseg.freeze_teacher()
        added.append(lambda: reseg.alignment_loss(label))
    optimizer = torch.optim.SGD(parameters, 0.01, momentum=0.99, nesterov=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=CUDA):
            logits = model(image)
        loss = task_loss(logits, label)
        for term in added:
            loss = loss + term()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None]) -> float:
    """Milliseconds of one step."""
    if not CUDA:
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(patch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows at one patch size."""
    image = torch.randn(args.batch, 1, patch, patch, patch, device=DEVICE)
    label = torch.randint(0, CLASSES, (args.batch, patch, patch, patch), device=DEVICE)
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, dict[str, float]] = {}
    for row in ROWS:
        without = torch.cuda.memory_allocated() if CUDA else 0
        steps[row] = make_step(row, image, label, args.filters)
        for _ in range(args.warmup):
            steps[row]()
        if CUDA:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            steps[row]()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - held
            memory[row] = {"held_mib": (held - without) / 2**20, "step_peak_mib": peak / 2**20}
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(args.steps):
        for row, step in steps.items():
            times[row].append(timed(step))
    results = []
    for row, values in times.items():
        low, middle, high = quantiles(values, n=4)
        ratio = middle / median(times["bare"])
        result = {"patch": patch, "row": row, "ms": middle, "ms_quartiles": [low, high], "ratio": ratio}
        results.append(result | memory.get(row, {}))
        text = "".join(f"  {name} {value:.0f}" for name, value in memory.get(row, {}).items())
        print(f"{patch}^3  {row:<32} {middle:9.2f} ms  x{ratio:.3f}{text}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=head_commit(), help="what was measured, where there is no git to tell")
    parser.add_argument("--patches", type=int, nargs="+", default=[96, 128] if CUDA else [16, 32])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--filters", type=int, nargs="+", default=[32, 64, 128, 256, 320] if CUDA else [4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=20 if CUDA else 3)
    parser.add_argument("--warmup", type=int, default=5 if CUDA else 1)
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    about = {
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "reseg_loss": reseg_loss.__version__,
        **{key: value for key, value in vars(args).items() if key != "out"},
    }
    results = []
    for patch in args.patches:
        results += measure(patch, args)
        if CUDA:
            torch.cuda.empty_cache()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
