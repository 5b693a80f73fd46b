"""What a training step costs with each regularizer, next to the bare step; see benchmarks/README.md.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json

A group is a model in a precision, eager or compiled. Its rows are interleaved, a few steps of each in turn; a number is
the median of such samples after a warm-up, by CUDA events on a GPU. Results are written after every group, and a group
that the file has already is skipped. On CPU it runs smaller.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import reseg_loss
from benchmarks.evidence.commit import head_commit
from benchmarks.evidence.compiler import set_up
from benchmarks.evidence.graphs import warm_up
from examples.backbones.swin_unet import SwinUNet
from examples.backbones.transunet import TransUNet
from examples.backbones.unet import UNet
from examples.backbones.vm_unet import VMUNet
from reseg_loss import CutMixConsistency, DeepSupervision, FeatureExtractor, ReSegWrapper, SemiSupervised
from reseg_loss.alignment import terms

FORMAT = 2
CLASSES = 9
PRECISIONS = ("fp32", "bf16", "bf16 channels_last")
GRAPH = "bf16 channels_last, one CUDA graph"  # a step: what is left where the host is no limit
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STAGE_1 = 8  # stage 2 has so many times the steps of stage 1
IN_A_ROW = 8 if CUDA else 1  # steps of a sample: one alone would have the GPU wait for the host where training does not

# {row: settings of the wrapper, over the preset paper}; a row of None is made by its own method
ROWS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "naive": None,
    "paper": {},
    "standardized": {"preset": "standardized"},
    "paper, compiled teacher": {"compile_teacher": True},
    "standardized, compiled teacher": {"preset": "standardized", "compile_teacher": True},
    "paper, captured teacher": {"capture_teacher": True},
    "standardized, captured teacher": {"preset": "standardized", "capture_teacher": True},
    "deep supervision": None,
    "paper, every=8": {"every": 8},
    # half of the batch without labels
    "semi-supervised": None,
    "semi-supervised, two forwards": None,
    # and for who is short of memory: the labelled half, and the other half with a backward of its own
    "bare, half the batch": None,
    "deep supervision and CutMix in turn": None,
}
SEMI = [row for row in ROWS if row.startswith("semi")]
# what each means saves or costs, on the U-Net in eager mode
MEANS: dict[str, dict[str, Any] | None] = {
    "paper, whole teacher": {},
    "paper, loss in torch": {},
    "standardized, loss in torch": {"preset": "standardized"},
    "paper, narrow teacher": {},
    "paper, every=4": {"every": 4},
}
MEANS_FP32: dict[str, dict[str, Any] | None] = {
    "paper, whole teacher": {},
    "paper, bf16 teacher": {"teacher_dtype": torch.bfloat16},
    "paper, teacher in channels_last": {},
}
NOT_COMPILED = (
    "standardized, compiled teacher",
    "standardized, captured teacher",
)


class Group(NamedTuple):
    """A model in a precision, eager or compiled."""

    model: str
    precision: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, {'compiled' if self.compiled else 'eager'}"


def plan(models: list[str]) -> list[Group]:
    """Every group, what matters most first."""
    if not CUDA:
        return [Group(model, "fp32", False) for model in models]
    order = [("bf16 channels_last", False), ("bf16", False), ("fp32", False), ("bf16 channels_last", True)]
    groups = [Group("U-Net", *rest) for rest in order]
    groups += [Group(model, precision, False) for precision in PRECISIONS[::-1] for model in models]
    groups += [Group(model, precision, True) for precision in PRECISIONS[::-1] for model in models]
    groups.append(Group("U-Net", GRAPH, False))
    return [group for group in dict.fromkeys(groups) if group.model in models]


def make(name: str, width: int, size: int) -> nn.Module:
    """A model by its name; with a width under 64 all are small, for CPUs."""
    small = width < 64
    if name == "U-Net":
        return UNet(CLASSES, 3, width)
    if name == "TransUNet":
        sizes: dict[str, Any] = {"width": 32, "units": (1, 1, 1), "dim": 24, "depth": 2, "heads": 2, "mlp": 48}
        return TransUNet(CLASSES, image_size=size, **(sizes if small else {}))
    if name == "Swin-UNet":
        sizes = {"width": 12, "heads": (1, 2, 3, 4), "window": 2}
        return SwinUNet(CLASSES, image_size=size, **(sizes if small else {}))
    if name == "VM-UNet":
        sizes = {"width": 8, "depths": (1, 1, 1, 1), "depths_up": (1, 1, 1, 1), "state": 2}
        return VMUNet(CLASSES, **(sizes if small else {}))
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)


MODELS = ["U-Net", "TransUNet", "Swin-UNet", "VM-UNet", "smp Unet(resnet34)"]


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label)


IGNORING = nn.CrossEntropyLoss(ignore_index=255)


class Bench:
    """One group: a fresh model, optimizer and batch for every row."""

    def __init__(self, group: Group, batch: int, size: int, width: int, only: list[str] | None = None) -> None:
        self.group, self.size, self.width, self.only = group, size, width, only
        self.image = torch.randn(batch, 3, size, size, device=DEVICE)
        self.label = torch.randint(0, CLASSES, (batch, size, size), device=DEVICE)
        self.channels_last = "channels_last" in group.precision
        if self.channels_last:
            self.image = self.image.to(memory_format=torch.channels_last)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = make(self.group.model, self.width, self.size).to(DEVICE)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model  # pyright: ignore

    def autocast(self) -> Any:
        return torch.autocast(DEVICE.type, dtype=torch.bfloat16) if "bf16" in self.group.precision else nullcontext()

    def rows(self) -> dict[str, dict[str, Any] | None]:
        rows = self.all_rows()
        return {row: rows[row] for row in rows if self.only is None or row in self.only}

    def all_rows(self) -> dict[str, dict[str, Any] | None]:
        if self.group.compiled:
            return {row: values for row, values in ROWS.items() if row not in NOT_COMPILED}
        if self.group.precision == GRAPH:  # its one step has no alignment every few steps, and is captured whole
            return {row: values for row, values in ROWS.items() if "every" not in row and "teacher" not in row}
        if self.group.model == "VM-UNet" or (self.group.model != "U-Net" and self.group.precision != PRECISIONS[-1]):
            return {row: values for row, values in ROWS.items() if not (values or {}).get("compile_teacher")}
        if self.group.model != "U-Net" or not CUDA or self.group.precision == "bf16":
            return ROWS
        return {**ROWS, **(MEANS_FP32 if self.group.precision == "fp32" else MEANS)}

    def extra(self, row: str, model: nn.Module) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
        """What a row adds to the loss, and its parameters beside the model's."""
        if row.startswith("bare"):
            return lambda: torch.zeros((), device=DEVICE), []
        if row == "naive":
            return self.naive(model), []
        if row == "deep supervision":
            ds = DeepSupervision(model, num_classes=CLASSES, example_input=self.image[:1])
            return lambda: ds.loss(self.label, task_loss), list(ds.parameters())
        settings = {"preset": "paper", **(self.rows()[row] or {})}
        if row == "paper, narrow teacher":
            settings["teacher"] = UNet(CLASSES, 3, self.width // 2).to(DEVICE)
        reseg = ReSegWrapper(model, example_input=self.image[:1], **settings)
        reseg.freeze_teacher()
        if row == "paper, whole teacher":

            def with_a_whole_teacher() -> Tensor:
                with patch.object(FeatureExtractor, "features_of", whole):
                    return reseg.alignment_loss(self.label)

            return with_a_whole_teacher, []
        if row == "paper, teacher in channels_last":
            reseg.teacher.to_channels_last()
        if row.endswith("loss in torch"):

            def in_torch() -> Tensor:
                with backend("torch"):
                    return reseg.alignment_loss(self.label)

            return in_torch, []
        return lambda: reseg.alignment_loss(self.label), []

    def naive(self, model: nn.Module) -> Callable[[], Tensor]:
        """As one writes it by hand: full teacher forward, one F.mse_loss a term, input index repeated."""
        taps = FeatureExtractor(model, example_input=self.image[:1]).plan
        student = FeatureExtractor(model, taps=taps).attach()
        teacher_model = self.model().eval().requires_grad_(False)
        teacher = FeatureExtractor(teacher_model, taps=taps, when="always").attach()
        maps: dict[tuple[int, int], Tensor] = {}

        def matched(a: Tensor, b: Tensor) -> Tensor:
            """Through a fixed 1x1 map where channels differ."""
            shape = b.shape[1], a.shape[1]
            if shape[0] != shape[1] and shape not in maps:
                maps[shape] = F.normalize(torch.randn(*shape, 1, 1, device=DEVICE))
            return a if shape[0] == shape[1] else F.conv2d(a, maps[shape])

        def loss() -> Tensor:
            s = student.pop()
            with torch.no_grad(), self.autocast():
                teacher_model(self.label.unsqueeze(1).float().expand(-1, 3, -1, -1))
            t = teacher.pop()
            pairs = [*zip(s.decoder, t.encoder), *zip(s.encoder, t.decoder), (s.bottleneck, t.bottleneck)]
            return 0.035 / 3 * torch.stack([F.mse_loss(matched(a.float(), b), b.float()) for a, b in pairs]).sum()

        return loss

    def step(self, row: str) -> Callable[[], Any]:
        step = self.plain_step(row)
        return captured(step) if self.group.precision == GRAPH else step

    def plain_step(self, row: str) -> Callable[[], Tensor]:
        if row in SEMI:
            return self.semi(joint="two" not in row)
        if row == "deep supervision and CutMix in turn":
            return self.in_turn()
        half = len(self.image) // 2 if "half" in row else len(self.image)
        image, label = self.image[:half], self.label[:half]
        model = self.model().train()
        extra, parameters = self.extra(row, model)
        optimizer = torch.optim.SGD([*model.parameters(), *parameters], 0.01, momentum=0.9)
        run = torch.compile(model) if self.group.compiled else model

        def step() -> Tensor:
            with self.autocast():
                logits = run(image)
            loss = task_loss(logits, label) + extra()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def semi(self, joint: bool) -> Callable[[], Tensor]:
        """A step of `SemiSupervised` with as many images as the bare one, half of them without labels."""
        half, model = len(self.image) // 2, self.model().train()
        semi = SemiSupervised(model, self.image[:1], rampup_steps=1, task_loss=IGNORING, joint=joint)
        optimizer = torch.optim.SGD([*model.parameters(), *semi.parameters()], 0.01, momentum=0.9)
        run = torch.compile(model) if self.group.compiled else model

        def step() -> Tensor:
            with self.autocast():
                loss = semi.loss(self.image[:half], self.label[:half], self.image[half:], forward=run)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            semi.update()
            return loss.detach()

        return step

    def in_turn(self) -> Callable[[], Tensor]:
        """A step of its two parts, with a backward after each, so that one graph at a time is in memory."""
        half, model = len(self.image) // 2, self.model().train()
        deep = DeepSupervision(model, self.image[:1], ignore_index=IGNORING.ignore_index)
        mixed = CutMixConsistency(model, deep=deep, rampup_steps=1, ignore_index=IGNORING.ignore_index)
        optimizer = torch.optim.SGD([*model.parameters(), *deep.parameters()], 0.01, momentum=0.9)
        run = torch.compile(model) if self.group.compiled else model

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                logits = run(self.image[:half])
                loss = IGNORING(logits, self.label[:half]) + deep.loss(self.label[:half], IGNORING)
            del logits
            loss.backward()
            value = loss.detach()
            del loss
            with self.autocast():
                other = mixed.loss(self.image[half:], IGNORING, forward=run)
            other.backward()
            optimizer.step()
            mixed.update()
            return value

        return step


def whole(extractor: FeatureExtractor, forward: Callable[[], Any]) -> Any:
    """`features_of` without its early end."""
    extractor.enabled = True
    try:
        forward()
        return extractor.pop()
    finally:
        extractor.enabled = False


@contextmanager
def backend(name: str) -> Iterator[None]:
    before, terms.BACKEND = terms.BACKEND, name
    try:
        yield
    finally:  # a row that fails is not the last one
        terms.BACKEND = before


def timed(step: Callable[[], Any], steps: int = 1) -> float:
    """Milliseconds of one step, over `steps` of them in a row."""
    if CUDA:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / steps
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    return 1e3 * (time.perf_counter() - begin) / steps


def captured(step: Callable[[], Any]) -> Callable[[], None]:
    """A replay of the step."""
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_kept: Callable[[], Any] = step) -> None:  # with the step go the weights that the graph reads
        graph.replay()

    return replay


def in_graphs() -> int:
    """Bytes that CUDA graphs hold beside living tensors, which the counters of allocated memory leave out."""
    segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in segments)


def measure(bench: Bench, steps: int, warmup: int) -> list[dict[str, Any]]:
    """All rows of a group, interleaved so that they share the machine's moods."""
    settings = bench.rows()
    cycle = {row: max(IN_A_ROW, (values or {}).get("every", 1)) for row, values in settings.items()}
    samples = {row: max(6, steps // cycle[row]) for row in settings}
    run, memory = {}, {}
    for row in settings:
        held = torch.cuda.memory_allocated() + in_graphs() if CUDA else 0
        run[row] = bench.step(row)
        for _ in range(max(warmup, cycle[row] + 1)):
            run[row]()
        if CUDA:
            # what the row holds for good, weights, teacher and its graphs, and what a step needs on top of it
            torch.cuda.reset_peak_memory_stats()
            for _ in range(cycle[row]):
                run[row]()
            torch.cuda.synchronize()
            memory[row] = torch.cuda.max_memory_allocated() + in_graphs() - held
    times: dict[str, list[float]] = {row: [] for row in run}
    # a collection takes longer than some steps
    gc.disable()
    try:
        for i in range(max(samples.values())):
            gc.collect()
            for row, step in run.items():
                if i < samples[row]:
                    times[row].append(timed(step, cycle[row]))
    finally:  # a group that fails is not the last one
        gc.enable()
    base = {row: median(times[row]) for row in ("bare", "naive") if row in times}
    added = base.get("naive", 0.0) - base["bare"]
    results = []
    for row, values in times.items():
        low, _, high = quantiles(values, n=4)
        ms = median(values)
        results.append(
            {
                **bench.group._asdict(),
                "row": row,
                "ms": ms,
                "ms_quartiles": [low, high],
                "samples": len(values),
                "steps_per_sample": cycle[row],
                "ratio": ms / base["bare"],
                # of what the naive way adds
                "share": (ms - base["bare"]) / added if added > 0 else None,
                "peak_mib": memory[row] / 2**20 if CUDA else None,
                "peak_ratio": memory[row] / memory["bare"] if CUDA else None,
            }
        )
    return results


def profile(bench: Bench, rows: list[str]) -> None:
    """Print the kernels that take the most time in some rows."""
    for row in rows:
        step = bench.step(row)
        for _ in range(6):
            step()
        kinds = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            step()
        key = f"self_{'cuda' if CUDA else 'cpu'}_time_total"
        print(f"{bench.group}: {row}")
        print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70))


def both_stages(group: Group, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Wall clock of a whole training, stage 1 included, against the bare one's; nothing compiled is timed."""
    bench, results = Bench(group, args.batch, args.size, args.width), []
    amp = torch.bfloat16 if "bf16" in group.precision else None
    for row in ("bare", "paper", "standardized", "paper, every=8"):
        settings = {"preset": "paper", **(ROWS[row] or {})}
        model = bench.model().train()
        reseg = None if row == "bare" else ReSegWrapper(model, example_input=bench.image[:1], **settings)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        seconds = []
        for steps in (2 * STAGE_1, args.stage2_steps):  # the first for warming up
            if reseg is not None:
                reseg.remove()
                reseg = ReSegWrapper(model, example_input=bench.image[:1], **settings)
            if CUDA:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            if reseg is not None:
                batches = [(bench.image, bench.label)] * (steps // STAGE_1)
                reseg.fit_recon(batches, epochs=1, amp=amp, progress=False)
            for _ in range(steps):
                with bench.autocast():
                    logits = model(bench.image)
                loss = task_loss(logits, bench.label)
                if reseg is not None:
                    loss = loss + reseg.alignment_loss(bench.label)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if CUDA:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        results.append({**group._asdict(), "row": row, "stage2_steps": args.stage2_steps, "seconds": seconds[-1]})
        results[-1]["stage1_steps"] = 0 if row == "bare" else args.stage2_steps // STAGE_1
        results[-1]["ratio"] = seconds[-1] / results[0]["seconds"]
        print(f"both stages, {group}: {row:<36} {seconds[-1]:8.2f} s  x{results[-1]['ratio']:.3f}", flush=True)
    return results


def check(report: dict[str, Any]) -> None:
    """Raise a ValueError unless `report` has the form of this script's results."""
    keys = {
        "about": {"format", "gpu", "torch", "cuda", "triton", "python", "reseg_loss", "commit", "batch", "size",
                  "width", "steps", "warmup", "stage2_steps"},
        "results": {*Group._fields, "row", "ms", "ms_quartiles", "samples", "steps_per_sample", "ratio", "share",
                    "peak_mib", "peak_ratio"},
        "stages": {*Group._fields, "row", "stage1_steps", "stage2_steps", "seconds", "ratio"},
        "failed": {*Group._fields, "error"},
    }  # fmt: skip
    if set(report) != set(keys) or report["about"]["format"] != FORMAT:
        raise ValueError(f"no results of format {FORMAT}: {sorted(report)}")
    for part, expected in keys.items():
        for entry in [report["about"]] if part == "about" else report[part]:
            if set(entry) != expected:
                raise ValueError(f"{part}: {sorted(set(entry) ^ expected)} in {entry}")
    for group in {tuple(r[k] for k in Group._fields) for r in report["results"]}:
        mine = {r["row"]: r for r in report["results"] if tuple(r[k] for k in Group._fields) == group}
        bare = mine["bare"]["ms"]
        for row, r in mine.items():
            low, high = r["ms_quartiles"]
            if not (0 < low <= r["ms"] <= high and abs(r["ratio"] - r["ms"] / bare) < 1e-6 and r["samples"] >= 6):
                raise ValueError(f"{group}: {row} does not add up: {r}")


def plot(report: dict[str, Any], file: Path) -> None:
    """Ratios to the bare step, a panel for every model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in report["results"]))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 5), sharey=True, squeeze=False)
    rows = [row for row in ROWS if row != "bare"]
    for axis, model in zip(axes[0], models):
        mine = [r for r in report["results"] if r["model"] == model]
        groups = list(dict.fromkeys((r["precision"], r["compiled"]) for r in mine))
        for i, (precision, compiled) in enumerate(groups):
            value = {r["row"]: r["ratio"] for r in mine if (r["precision"], r["compiled"]) == (precision, compiled)}
            shift = (i - (len(groups) - 1) / 2) / (len(groups) + 1)
            label = precision + (", compiled student" if compiled else "")
            here = [j for j, row in enumerate(rows) if row in value]
            axis.barh(
                [j + shift for j in here], [value[rows[j]] - 1 for j in here], 0.8 / len(groups), left=1, label=label
            )
        axis.set_title(model)
        axis.set_xlabel("step time over the bare step's")
        axis.set_yticks(range(len(rows)), rows)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.legend(fontsize=7)
    axes[0][0].invert_yaxis()
    gpu = report["about"]["gpu"] or "CPU"
    figure.suptitle(f"{gpu}, torch {report['about']['torch']}, batch {report['about']['batch']}")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file, written after every group; the plot goes beside it")
    parser.add_argument("--commit", default=head_commit(), help="what was measured, where there is no git to tell")
    parser.add_argument("--batch", type=int, default=24 if CUDA else 2)
    parser.add_argument("--size", type=int, default=224 if CUDA else 64)
    parser.add_argument("--width", type=int, default=64 if CUDA else 16, help="of the U-Net; under 64 all are small")
    parser.add_argument("--steps", type=int, default=64 if CUDA else 10)
    parser.add_argument("--warmup", type=int, default=6 if CUDA else 3)
    parser.add_argument(
        "--stage2-steps", type=int, default=400 if CUDA else 16, help="of the wall clock of both stages"
    )
    parser.add_argument("--minutes", type=float, default=8, help="no group is begun later than that")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--precisions", nargs="+", default=[*PRECISIONS, GRAPH], choices=[*PRECISIONS, GRAPH])
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", choices=ROWS, help="these alone, and no wall clock; with bare"
    )
    parser.add_argument("--profile", nargs="+", metavar="ROW", help="print the kernels of these rows and stop")
    parser.add_argument("--plot-only", action="store_true", help="draw what --out has")
    args = parser.parse_args()
    if args.plot_only and args.out is None:
        parser.error("--plot-only draws the file that --out names, and there is no --out")
    if args.plot_only and not args.out.exists():
        parser.error(f"--plot-only: {args.out} is not there")
    if args.rows is not None and "bare" not in args.rows:
        parser.error("--rows: a ratio needs the row bare")
    begin = time.monotonic()
    set_up()
    if args.profile:
        bench = Bench(plan(args.models)[0], args.batch, args.size, args.width)
        unknown = [row for row in args.profile if row not in bench.rows()]
        if unknown:
            parser.error(f"--profile: no row {unknown}; those of {bench.group} are {list(bench.rows())}")
        profile(bench, args.profile)
        return
    triton = importlib.util.find_spec("triton")
    about = {
        "format": FORMAT,
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__ if triton else None,
        "python": platform.python_version(),
        "reseg_loss": reseg_loss.__version__,
        **{k: getattr(args, k) for k in ("commit", "batch", "size", "width", "steps", "warmup", "stage2_steps")},
    }
    report: dict[str, Any] = {"about": about, "results": [], "stages": [], "failed": []}
    if args.out and args.out.exists():
        report = json.loads(args.out.read_text())
        check(report)
        known = {r["row"] for r in report["results"]}
        if known and args.rows is not None and not {*args.rows} <= known:
            parser.error(f"{args.out} has groups without {', '.join(sorted({*args.rows} - known))}; name another file")
        if report["about"] != about and not args.plot_only:
            other = {k: v for k, v in report["about"].items() if v != about[k]}
            parser.error(f"{args.out} is of another run ({other}); name another file")

    def save() -> None:
        check(report)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")

    if args.plot_only:
        if not report["results"]:
            parser.error(f"--plot-only: {args.out} has no results yet")
        plot(report, args.out.with_suffix(".png"))
        return
    if not report["stages"] and "U-Net" in args.models and args.rows is None:
        report["stages"] = both_stages(Group("U-Net", PRECISIONS[-1] if CUDA else "fp32", False), args)
        save()
    seen = {tuple(r[k] for k in Group._fields) for r in (*report["results"], *report["failed"])}
    for group in plan(args.models):
        if group in seen or group.precision not in args.precisions or time.monotonic() - begin > 60 * args.minutes:
            continue
        torch._dynamo.reset()
        try:
            rows = measure(Bench(group, args.batch, args.size, args.width, args.rows), args.steps, args.warmup)
        except (RuntimeError, ImportError, ValueError) as error:  # another model may still run
            rows = []
            report["failed"].append({**group._asdict(), "error": f"{type(error).__name__}: {error}"[:500]})
            print(f"{group}: failed, {error}", flush=True)
        report["results"] += rows
        for r in rows:
            share = "" if r["share"] is None else f"{r['share']:6.2f} of naive"
            memory = "" if r["peak_mib"] is None else f"{r['peak_mib']:8.0f} MiB x{r['peak_ratio']:.2f}"
            print(f"{group!s:<40} {r['row']:<36} {r['ms']:8.2f} ms  x{r['ratio']:.3f} {share} {memory}", flush=True)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
        save()
        if CUDA:
            torch.cuda.empty_cache()
    if args.out and report["results"] and importlib.util.find_spec("matplotlib"):
        plot(report, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
