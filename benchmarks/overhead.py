"""What a training step costs with each regularizer, next to the bare step.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

Median over interleaved steps after a warm-up, CUDA events on a GPU; peak memory of a step. Rows: bare; naive (the
teacher under no_grad and seven F.mse_loss, written by hand); ours with each preset; deep supervision. On CPU it runs
smaller. Stage 1 is not in the step; `stage1_ms` has its step, to add it up for your schedule.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import reseg_loss
from examples.backbones.unet import UNet
from reseg_loss import DeepSupervision, FeatureExtractor, ReSegWrapper

CLASSES = 9
Step = Callable[[], Tensor]


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label)


class Setting:
    """One precision and memory format: a fresh model, optimizer and batch for every row."""

    def __init__(self, name: str, device: torch.device, batch: int, size: int, width: int) -> None:
        self.name, self.device, self.width = name, device, width
        self.image = torch.randn(batch, 3, size, size, device=device)
        self.label = torch.randint(0, CLASSES, (batch, size, size), device=device)
        self.bf16 = "bf16" in name
        if "channels_last" in name:
            self.image = self.image.to(memory_format=torch.channels_last)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = UNet(CLASSES, 3, self.width).to(self.device)
        return model.to(memory_format=torch.channels_last) if "channels_last" in self.name else model  # pyright: ignore

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def rows(self) -> dict[str, Callable[[nn.Module], tuple[Callable[[], Tensor], list[nn.Parameter]]]]:
        """{row: model -> (what is added to the loss, parameters beside the model's)}."""
        return {
            "bare": lambda model: (lambda: torch.zeros((), device=self.device), []),
            "naive": self.naive,
            "paper": lambda model: self.reseg(model, "paper"),
            "standardized": lambda model: self.reseg(model, "standardized"),
            "deep supervision": self.deep,
        }

    def reseg(self, model: nn.Module, preset: str) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
        reseg = ReSegWrapper(model, example_input=self.image[:1], preset=preset)
        reseg.freeze_teacher()
        return lambda: reseg.alignment_loss(self.label), []

    def deep(self, model: nn.Module) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
        ds = DeepSupervision(model, CLASSES, example_input=self.image[:1])
        return lambda: ds.loss(self.label, task_loss), list(ds.parameters())

    def naive(self, model: nn.Module) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
        """As one writes it by hand: full teacher forward, one F.mse_loss a term, input index repeated."""
        plan = FeatureExtractor(model, example_input=self.image[:1]).plan
        student = FeatureExtractor(model, plan).attach()
        teacher_model = self.model().eval().requires_grad_(False)
        teacher = FeatureExtractor(teacher_model, plan, when="always").attach()
        held: list[Any] = [student, teacher]

        def loss() -> Tensor:
            s = held[0].pop()
            with torch.no_grad(), self.autocast():
                teacher_model(self.label.unsqueeze(1).float().expand(-1, 3, -1, -1))
            t = held[1].pop()
            pairs = [*zip(s.decoder, t.encoder), *zip(s.encoder, t.decoder), (s.bottleneck, t.bottleneck)]
            return 0.035 / 3 * torch.stack([F.mse_loss(a.float(), b.float()) for a, b in pairs]).sum()

        return loss, []

    def step(self, row: str) -> Step:
        model = self.model()
        extra, parameters = self.rows()[row](model)
        optimizer = torch.optim.SGD([*model.parameters(), *parameters], 0.01, momentum=0.9)

        def run() -> Tensor:
            with self.autocast():
                logits = model(self.image)
            loss = task_loss(logits, self.label) + extra()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return run


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def measure(setting: Setting, steps: int, warmup: int) -> list[dict[str, Any]]:
    """All rows of a setting, interleaved step by step so that they share the machine's moods."""
    rows, peak = {}, {}
    for row in setting.rows():
        rows[row] = setting.step(row)
        for _ in range(warmup):
            rows[row]()
        if setting.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            rows[row]()
            torch.cuda.synchronize()
            # what this row itself holds (weights, teacher) came before; the step's own peak is above that
            peak[row] = torch.cuda.max_memory_allocated() - before
    times: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(steps):
        for row, step in rows.items():
            times[row].append(timed(step, setting.device))
    bare = median(times["bare"])
    results = []
    for row, values in times.items():
        low, _, high = quantiles(values, n=4)
        results.append(
            {
                "setting": setting.name,
                "row": row,
                "ms": median(values),
                "ms_quartiles": [low, high],
                "ratio": median(values) / bare,
                "step_peak_mib": peak[row] / 2**20 if row in peak else None,
            }
        )
    return results


def commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default=commit(), help="what was measured, where there is no git to tell")
    parser.add_argument("--batch", type=int, default=24 if cuda else 2)
    parser.add_argument("--size", type=int, default=224 if cuda else 64)
    parser.add_argument("--width", type=int, default=64 if cuda else 16)
    parser.add_argument("--steps", type=int, default=40 if cuda else 10)
    parser.add_argument("--warmup", type=int, default=10 if cuda else 3)
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True
    about = {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "reseg_loss": reseg_loss.__version__,
        **{k: v for k, v in vars(args).items() if k != "out"},
    }
    results = []
    for name in ("fp32", "bf16", "bf16 channels_last") if cuda else ("fp32",):
        results += measure(Setting(name, device, args.batch, args.size, args.width), args.steps, args.warmup)
        for r in results[-5:]:
            memory = f"{r['step_peak_mib']:9.0f} MiB" if r["step_peak_mib"] is not None else ""
            print(f"{r['setting']:<20} {r['row']:<18} {r['ms']:8.2f} ms  x{r['ratio']:.3f} {memory}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
