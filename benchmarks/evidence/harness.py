"""Training: one captured step per kind of variant, reused for every seed.

All that a step reads lies in tensors that stay where they are: weights, optimizer state, tables of batches, a clock.
So a run resets them in place and replays the step; on a GPU that is one CUDA graph with nothing to copy or wait for.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from examples.backbones.unet import UNet
from reseg_loss import (
    CutMixConsistency,
    DeepSupervision,
    FeatureExtractor,
    Features,
    ReconLoss,
    ReSegWrapper,
    SemiSupervised,
)
from reseg_loss.alignment.teacher import Teacher
from reseg_loss.mixing import pseudo_label

from .batches import Augmentation, Feed
from .compiler import set_up
from .copy_paste import CopyPaste
from .damage import damaged
from .field_unet import FieldUNet
from .graphs import warm_up
from .label_teacher import (
    RESTORED,
    Aligning,
    Cleaned,
    Cleaning,
    Corrected,
    Distilling,
    LabelTeacher,
    Seen,
    distillation,
    restorer_sees,
)
from .lite0 import lite0_unet
from .losses import IGNORED, SURE, consistency, entropy, segmentation_loss
from .mixing import mixing_of
from .variants import Variant

TO_LOOK = 50  # steps between two looks at the time
EVALUATED = 64  # slices, or volumes in 3D, predicted at once
RAMP = 0.4  # share of the run over which the loss on unlabelled images grows
EMA = 0.99  # of the mean teacher's weights
STATISTICS = 50  # batches
NOISE = 0.1  # standard deviation of what the mean teacher's student sees on top of the image


Network = Literal[
    "unet",
    "field_unet",
    "smp_unet",
    "smp_lite0",
    "smp_lite0_imagenet",
    "transunet",
    "swin_unet",
    "vm_unet",
    "unet_3d",
    "unet_3d_thick",
]
IN_3D = ("unet_3d", "unet_3d_thick")
LATER = ("stage_1", "protocol", "others", "depth")  # settings that came after the first results


@dataclass(frozen=True)
class Settings:
    """What all variants of a plan share; what is stored as volumes is trained on as it is, whatever `size` is."""

    steps: int = 1200
    stage1_steps: int = 600
    batch: int = 24
    size: int = 224
    width: int = 32
    model: Network = "unet"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    weight_decay: float = 1e-4
    augmentation: Augmentation = "published"
    stage_1: Literal["adamw 0.001", "as stage 2"] = "adamw 0.001"
    """Optimizer, learning rate and schedule of stage 1; published is that of stage 2."""
    protocol: Literal["own", "ssl4mis"] = "own"
    """Of `acdc_native`: in the field's, slices become squares by order 0, and the published augmentation is before."""
    others: int | None = None
    """Images a step of the batch from other patients; as many as `batch` by default."""
    depth: int | None = None
    """Train on volumes of so many slices, black behind those that there are, for "unet_3d_thick"; None: on slices."""

    def options(self) -> dict[str, Any]:
        """As plain values; what came later is left out at its default, so that earlier runs keep their keys."""
        options = asdict(self)
        defaults = {field.name: field.default for field in fields(self)}
        return {k: v for k, v in options.items() if k not in LATER or v != defaults[k]}


Compiled = Literal["all", "losses", "none"]


@dataclass(frozen=True)
class Machine:
    """Where and how it runs.

    Attributes:
        device: a GPU, or the CPU for trials.
        compile: "all" compiles networks and losses, "losses" the losses alone.
        backend: of torch.compile.
        pool: the memory that a plan's graphs share: they never run at the same time, and none reads what another has
            left. It goes with the last of them.
    """

    device: torch.device
    compile: Compiled = "none"
    backend: str = "inductor"
    pool: Any = None

    @classmethod
    def make(cls, compiled: Compiled = "none") -> Machine:
        if not torch.cuda.is_available():
            return cls(torch.device("cpu"))
        set_up()
        return cls(torch.device("cuda"), compiled)

    def with_pool(self) -> Machine:
        """The same with memory of its own for graphs."""
        return self if self.device.type == "cpu" else replace(self, pool=torch.cuda.graph_pool_handle())

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def network(self, module: Any) -> Any:
        """Compiled, or as it is."""
        return torch.compile(module, dynamic=False, backend=self.backend) if self.compile == "all" else module

    def loss(self, function: Any) -> Any:
        """Compiled, or as it is."""
        return torch.compile(function, dynamic=False, backend=self.backend) if self.compile != "none" else function

    def compile_inside(self, reseg: ReSegWrapper) -> None:
        """Compile what the wrapper calls by itself."""
        if self.compile != "none":
            reseg.criterion.compile(dynamic=False, backend=self.backend)
        if self.compile == "all":
            reseg.teacher.body.compile(dynamic=False, backend=self.backend)

    def compile_average(self, mixed: CutMixConsistency) -> None:
        """Compile the mean teacher."""
        if self.compile == "all":
            mixed.compile(self.network)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_model(settings: Settings, classes: int) -> nn.Module:
    """A new network for one image channel."""
    if settings.model == "unet":
        return UNet(classes, 1, settings.width)
    if settings.model == "field_unet":
        return FieldUNet(classes)
    if settings.model == "smp_unet":
        import segmentation_models_pytorch as smp

        return smp.Unet("resnet34", encoder_weights=None, in_channels=1, classes=classes)
    if settings.model in ("smp_lite0", "smp_lite0_imagenet"):
        return lite0_unet(classes, imagenet=settings.model == "smp_lite0_imagenet")
    if settings.model == "transunet":
        from examples.backbones.transunet import TransUNet

        return TransUNet(classes, 1, settings.size)
    if settings.model == "swin_unet":
        from examples.backbones.swin_unet import SwinUNet

        return SwinUNet(classes, 1, settings.size)
    if settings.model in IN_3D:
        from monai.networks.nets import DynUNet

        filters = [settings.width << level for level in range(5)]
        kernels: list[Any] = [3] * 5
        strides: list[Any] = [1, 2, 2, 2, 2]
        if settings.model == "unet_3d_thick":  # slices lie farther apart than pixels: as nnU-Net does it
            kernels, strides = [[1, 3, 3], 3, 3, 3, 3], [1, [1, 2, 2], 2, 2, [1, 2, 2]]
        return DynUNet(3, 1, classes, kernels, strides, strides[1:], filters=filters, norm_name="instance")
    from examples.backbones.vm_unet import VMUNet

    return VMUNet(classes, 1)


def on_device(settings: Settings, classes: int, device: torch.device) -> nn.Module:
    """A new network, in 2D with channels last; in 3D its instance normalisations would undo that."""
    layout = torch.contiguous_format if settings.model in IN_3D else torch.channels_last
    return make_model(settings, classes).to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]


@lru_cache(maxsize=4)
def initial_weights(settings: Settings, classes: int, seed: int) -> dict[str, Tensor]:
    """The weights that every variant of a seed starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_model(settings, classes).state_dict()


class OutOfTimeError(Exception):
    """A run was saved before its end."""


@dataclass(frozen=True)
class Pause:
    """The moment of the monotonic clock at which a run is to be saved, and where."""

    file: Path
    deadline: float


class Loop:
    """A step that is captured once and then replayed, with a clock and a learning rate in tensors."""

    def __init__(
        self,
        machine: Machine,
        parameters: list[nn.Parameter],
        name: str,
        lr: float,
        decay: float,
        steps: int,
        modules: list[nn.Module],
    ) -> None:
        device = machine.device
        self.machine, self.modules = machine, modules
        self.clock = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = torch.tensor(lr, device=device)
        self.rates = torch.full((steps,), lr, device=device)
        self.losses = torch.zeros(steps, device=device)
        fused = device.type == "cuda"
        if name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters, self.rate if fused else lr, momentum=0.9, weight_decay=decay, fused=fused
            )
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, self.rate if fused else lr, weight_decay=decay, fused=fused, capturable=fused
            )
        if fused:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate  # this very tensor, which every step sets
        self.graph: torch.cuda.CUDAGraph | None = None
        self.resumed_at = 0  # the step at which this process took the latest run up

    def capture(self, loss_of: Callable[[], tuple[Tensor, Tensor]], after: Callable[[], None] | None = None) -> None:
        """Capture (or on CPU keep) a step of `loss_of`, which gives the loss to minimise and the one to log."""

        def step() -> None:
            self.rate.copy_(self.rates.index_select(0, self.clock)[0])
            loss, logged = loss_of()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if after is not None:
                after()
            self.losses.index_copy_(0, self.clock, logged.detach().float().view(1))
            self.clock.add_(1)

        self.step = step
        if self.machine.device.type != "cuda":
            step()  # what the first step alone does (checks, optimizer state) belongs to no run
            return
        warm_up(step)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.machine.pool):
            step()
        self.optimizer.zero_grad(set_to_none=True)  # the memory stays the graph's, and free for the next capture
        self.graph = graph

    def reset(self, rates: Tensor) -> None:
        """To the state before the first step."""
        self.clock.zero_()
        self.rates[: len(rates)].copy_(rates)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()

    def run(self, steps: int, pause: Pause | None = None) -> None:
        """All steps of a run, from where `pause.file` has it; past `pause.deadline` it is saved there instead."""
        self.resumed_at = 0
        if pause is None:
            self._advance(steps)
            return
        if pause.file.exists():
            self._restore(pause.file)
            self.resumed_at = int(self.clock)
        for done in range(self.resumed_at, steps, TO_LOOK):
            if time.monotonic() > pause.deadline:
                self.save(pause.file)
                raise OutOfTimeError(f"after {done} of {steps} steps")
            self._advance(min(TO_LOOK, steps - done))
            self.machine.synchronize()

    def last_loss(self, steps: int, what: str, how: str = "") -> float:
        """The mean loss of the last 50 steps; a ValueError if it is not finite, which no step on a GPU looks at."""
        loss = float(self.losses[max(0, steps - 50) : steps].mean())
        if not math.isfinite(loss):
            raise ValueError(f"{what} diverged: its loss is {loss} at the end{how}")
        return loss

    def _advance(self, steps: int) -> None:
        if self.graph is not None:
            for _ in range(steps):
                self.graph.replay()
            return
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rates[self.clock])
            self.step()

    def _tensors(self) -> list[Tensor]:
        """All that a step changes, in an order that depends on what was built alone."""
        tensors = [self.clock, self.losses]
        for module in self.modules:
            tensors += module.state_dict().values()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [v for _, v in sorted(self.optimizer.state[parameter].items()) if isinstance(v, Tensor)]
        return tensors

    def save(self, file: Path) -> None:
        """Write the run's state, whole or not at all."""
        cuda = self.machine.device.type == "cuda"
        state = {"tensors": self._tensors(), "random": torch.cuda.get_rng_state() if cuda else torch.get_rng_state()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)

    def _restore(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        ours, theirs = self._tensors(), state["tensors"]
        if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
            raise ValueError(f"{file} was saved by another network or optimizer; remove it to begin the run again")
        with torch.no_grad():
            for mine, saved in zip(ours, theirs):
                mine.copy_(saved)
        cuda = self.machine.device.type == "cuda"
        torch.cuda.set_rng_state(state["random"]) if cuda else torch.set_rng_state(state["random"])


def schedule(settings: Settings, steps: int) -> Tensor:
    """The learning rate of every step: poly 0.9 for SGD, warm-up and cosine for AdamW."""
    t = torch.arange(steps) / steps
    if settings.optimizer == "sgd":
        return settings.lr * (1 - t) ** 0.9
    return settings.lr * torch.minimum(t / 0.05 + 1 / steps, torch.ones_like(t)) * 0.5 * (1 + torch.cos(math.pi * t))


class Stage1:
    """Stage 1 of a kind of teacher; a seed's weights are kept for all its variants."""

    def __init__(self, kind: tuple[str, str], settings: Settings, classes: int, feed: Feed, machine: Machine) -> None:
        self.label_input, self.task = kind
        self.settings, self.classes, self.feed, self.machine = settings, classes, feed, machine
        self.teacher, self.loss_of = self._restoring() if self.label_input == RESTORED else self._reconstructing()
        self.teacher.train()
        recipe = (settings.optimizer, settings.lr, settings.weight_decay)
        how = recipe if settings.stage_1 == "as stage 2" else ("adamw", 1e-3, 0.0)
        self.loop = Loop(machine, list(self.teacher.parameters()), *how, settings.stage1_steps, [self.teacher])
        self.loop.capture(self.losses)

    def losses(self) -> tuple[Tensor, Tensor]:
        """Of a step: what is minimised is also what is logged."""
        image, label, _ = self.feed.batch_of(self.feed.labelled, self.loop.clock)
        loss = self.loss_of(image, label)
        return loss, loss

    def _reconstructing(self) -> tuple[Teacher, Callable[[Tensor, Tensor], Tensor]]:
        """A teacher that is to paint images, and its loss."""
        model = on_device(self.settings, self.classes, self.machine.device)
        example = torch.zeros(1, 1, *self.feed.images.shape[1:], device=self.machine.device)
        label_input: Any = self.label_input
        self.reseg = ReSegWrapper(model, example, label_input=label_input)
        teacher, recon_loss = self.reseg.teacher, ReconLoss()
        body = self.machine.network(teacher.decode)

        def loss_of(image: Tensor, label: Tensor) -> Tensor:
            encoded = image if self.task == "autoencoder" else teacher.encoding.encode(label)[0]
            target = label[:, None].float() / (self.classes - 1) if self.task == "label" else image
            with self.machine.autocast():
                prediction = body(encoded)
            return recon_loss(prediction, target)

        return teacher, loss_of

    def _restoring(self) -> tuple[LabelTeacher, Callable[[Tensor, Tensor], Tensor]]:
        """A teacher that is to restore label maps, and its loss."""
        teacher = label_teacher(self.task, self.settings, self.classes, self.machine.device)
        body, task_loss = self.machine.network(teacher), self.machine.loss(segmentation_loss)

        def loss_of(image: Tensor, label: Tensor) -> Tensor:
            seen = damaged(label, self.classes)
            with self.machine.autocast():
                logits = body(seen, image)
            return task_loss(logits, label)

        return teacher, loss_of

    def fit(self, seed: int, pause: Pause | None = None) -> tuple[dict[str, Tensor], float]:
        """The trained teacher's weights and its last losses' mean; with `pause`, its file keeps them.

        Raises:
            ValueError: the loss is NaN or infinite at the end.
        """
        if isinstance(self.teacher, LabelTeacher):
            self.teacher.redraw(seed)
            torch.manual_seed(seed)  # of the damages
        else:
            reset_teacher(self.teacher, self.settings, self.classes, seed)
        self.teacher.train()
        steps = self.settings.stage1_steps
        as_stage_2 = self.settings.stage_1 == "as stage 2"
        self.loop.reset(schedule(self.settings, steps) if as_stage_2 else torch.full((steps,), 1e-3))
        self.loop.run(steps, pause)
        if pause is not None:
            self.loop.save(pause.file)
        # stage 2 would be for nothing
        loss = self.loop.last_loss(steps, "stage 1", f", with {self.settings.stage_1!r}")
        return {name: value.detach().clone() for name, value in self.teacher.state_dict().items()}, loss


def label_teacher(sees: str, settings: Settings, classes: int, device: torch.device) -> LabelTeacher:
    """A new one that restores label maps, of the width of the plan."""
    if settings.model in IN_3D:
        raise ValueError("teachers that restore label maps are there for slices, not for volumes")
    teacher = LabelTeacher(classes, settings.width, sees)
    return teacher.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def reset_teacher(teacher: Teacher, settings: Settings, classes: int, seed: int) -> None:
    """New weights, other than the student's."""
    teacher.body.load_state_dict(initial_weights(settings, classes, seed + 100_000))
    _redraw(teacher.before, seed)
    _redraw(teacher.after, seed)


def _redraw(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed + 200_000)
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Conv3d)):
            part.reset_parameters()


class Stage2:
    """The training step of a kind of variant (`Variant.step`), on a model of its own."""

    def __init__(self, variant: Variant, settings: Settings, classes: int, feed: Feed, machine: Machine) -> None:
        self.variant, self.settings, self.classes, self.feed, self.machine = variant, settings, classes, feed, machine
        device = machine.device
        torch.manual_seed(0)
        self.model = on_device(settings, classes, device)
        self.average = None
        if variant.unlabelled == "mean teacher":
            self.average = copy.deepcopy(self.model).requires_grad_(False)
        example = torch.zeros(1, 1, *feed.images.shape[1:], device=device)
        parameters = list(self.model.parameters())
        self.reseg = self.deep = self.mixed = self.semi = None
        # hooks come before the compiled model's first call
        if variant.reseg is not None:
            self.reseg = ReSegWrapper(self.model, example_input=example, **variant.reseg)
            self.reseg.freeze_teacher()
            machine.compile_inside(self.reseg)
            if variant.fed == "image" or not variant.crossed:
                plan = self.reseg.extractor.plan
                self.taught = FeatureExtractor(self.reseg.teacher.body, taps=plan, when="always").attach()
        if variant.deep is not None:
            ignored = IGNORED if variant.unlabelled_deep else None
            # "weights" is the name in the keys of results, which stay
            given = {"level_weights" if name == "weights" else name: value for name, value in variant.deep.items()}
            self.deep = DeepSupervision(self.model, example, num_classes=classes, ignore_index=ignored, **given)
            parameters += self.deep.parameters()
        self.idea = variant.idea
        sees = restorer_sees(self.idea)
        self.label_teacher = None if sees is None else label_teacher(sees, settings, classes, device)
        if self.label_teacher is not None:
            self.restorer = machine.network(self.label_teacher.eval().requires_grad_(False))
        self.student = machine.network(self.model)
        self.mean_teacher = machine.network(self.average) if self.average is not None else None
        if variant.unlabelled in ("cutmix", "copy-paste"):
            deep = self.deep if variant.unlabelled_deep else None
            # the ramp is a table here, for a captured step would keep the first call's
            kind, options = self._ideas_cutmix() or mixing_of(variant.mixing)
            options = {"threshold": SURE, "ema_decay": EMA, **options}
            joint = (variant.mixing or {}).get("joint")
            if joint is True:
                raise ValueError(f"{variant.name}: at bee5123 it had a mean teacher that the package has no more")
            if joint == "averaged buffers":
                self.semi = SemiSupervised(
                    self.student,
                    example,
                    rampup_steps=None,
                    deep=deep,
                    task_loss=self._logged_loss,
                    joint=True,
                    **options,
                )
                self.mixed = self.semi.consistency
            else:
                self.mixed = (kind if variant.unlabelled == "cutmix" else CopyPaste)(
                    self.student, deep=deep, rampup_steps=None, ignore_index=IGNORED, **options
                )
            machine.compile_average(self.mixed)
        elif variant.free:  # at weight 0 the average follows, and nothing else runs
            self.mixed = CutMixConsistency(
                self.student, rampup_steps=None, ignore_index=IGNORED, weight=0.0, ema_decay=EMA
            )
        self.recon_loss = ReconLoss()
        self.task_loss = machine.loss(segmentation_loss)
        recipe = (settings.optimizer, settings.lr, settings.weight_decay)
        self.loop = Loop(machine, parameters, *recipe, feed.steps, self._modules())
        self.aligned, self.ramp = (torch.zeros(feed.steps, device=device) for _ in range(2))
        self.model.train()
        self.loop.capture(self.losses, self._follow)
        self.forget()

    def _ideas_cutmix(self) -> tuple[type[CutMixConsistency], dict[str, Any]] | None:
        """The class and the keywords of CutMix where the idea is one about it."""
        if isinstance(self.idea, Cleaning):
            other = self.variant.fed == "other label"
            return Cleaned, {"cleaner": self.restorer, "taken": self.idea.taken, "other": other}
        return (Seen, {}) if isinstance(self.idea, Aligning) else None

    def _modules(self) -> list[nn.Module]:
        """All whose weights or statistics a run changes or that differ between seeds."""
        modules = [self.model]
        if self.reseg is not None:
            modules += [self.reseg.criterion, self.reseg.teacher]
        if self.deep is not None:
            modules.append(self.deep.heads)
        if self.label_teacher is not None:
            modules.append(self.label_teacher)
        averages = [self.average, self.mixed.average if self.mixed is not None else None]
        return modules + [average for average in averages if average is not None]

    # --- the step

    def losses(self) -> tuple[Tensor, Tensor]:
        variant, clock = self.variant, self.loop.clock
        image, label, _ = self.feed.batch_of(self.feed.labelled, clock)
        if self.semi is not None:
            others, _, _ = self.feed.batch_of(self.feed.others, clock)
            self.logged = None
            with self.machine.autocast():
                loss = self.semi.loss(image, label, others, weight=self.ramp.index_select(0, clock)[0])
            assert self.logged is not None
            return loss, self.logged
        with self._recording(), self.machine.autocast():
            logits = self.student(image)
        task = loss = self.task_loss(logits, label)
        if self.deep is not None:
            loss = loss + self.deep.loss(label, self.task_loss)
        if isinstance(self.idea, Distilling):
            loss = loss + self.idea.weight * self._distilled(self.idea, logits, image, label)
        if self.reseg is not None and self.reseg.weight and self.idea != Aligning(labelled=False):
            loss = loss + self.aligned.index_select(0, clock)[0] * self._alignment(image, label)
        if variant.unlabelled is not None:
            weight = variant.unlabelled_weight * self.ramp.index_select(0, clock)[0]
            loss = loss + weight * self._unlabelled()
        return loss, task

    def _logged_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """The task loss, of which the first of a step, that of the labelled images, is kept for the log."""
        value = self.task_loss(logits, label)
        self.logged = value if self.logged is None else self.logged
        return value

    def _recording(self) -> AbstractContextManager[Any]:
        """Marks the forward that has labels, where there is another one."""
        if self.variant.unlabelled is None:
            return nullcontext()
        marks = [part.record() for part in (self.reseg, self.deep) if part is not None]
        return _inside_all(marks)

    def _alignment(self, image: Tensor, label: Tensor) -> Tensor:
        assert self.reseg is not None
        label = self._fed(label)
        if self.variant.fed != "image" and self.variant.crossed:
            return self.reseg.alignment_loss(label)
        # what the wrapper does not offer, from its parts
        student = self.reseg.extractor.pop()
        encoded = image if self.variant.fed == "image" else self.reseg.teacher.encoding.encode(label)[0]
        with torch.no_grad(), self.machine.autocast():
            self.reseg.teacher.decode(encoded)
        taught = self.taught.pop()
        if not self.variant.crossed:
            taught = Features(taught.decoder, taught.encoder, taught.bottleneck)
        return self.reseg.weight * self.reseg.criterion(student, taught)

    def _fed(self, label: Tensor) -> Tensor:
        """The labels that a teacher sees: the samples' own, or as a control those of others."""
        return label.roll(1, 0) if self.variant.fed == "other label" else label

    def _distilled(self, idea: Distilling, logits: Tensor, image: Tensor, label: Tensor) -> Tensor:
        seen = damaged(self._fed(label), self.classes)
        with torch.no_grad(), self.machine.autocast():
            taught = self.restorer(seen, image)
        return distillation(logits, taught, idea.temperature)

    def _unlabelled(self) -> Tensor:
        kind, clock = self.variant.unlabelled, self.loop.clock
        tables = self.feed.again if self.variant.images == "labelled" else self.feed.others
        image, _, _ = self.feed.batch_of(tables, clock)
        if self.mixed is not None:
            if isinstance(self.mixed, CopyPaste):
                self.mixed.labelled = self.feed.batch_of(self.feed.again, clock)[:2]
            if isinstance(self.mixed, Seen):
                assert self.reseg is not None
                with self.reseg.record(), self.machine.autocast():
                    loss = self.mixed.loss(image, self.task_loss, weight=1.0)
                return loss + self._alignment(image, self.mixed.taken())
            with self.machine.autocast():
                return self.mixed.loss(image, self.task_loss, weight=1.0)
        seen, target = image, torch.empty(0)
        if self.mean_teacher is not None:
            with torch.no_grad(), self.machine.autocast():
                target = self.mean_teacher(image)
            seen = image + NOISE * torch.randn_like(image)
        deep = self.deep if self.variant.unlabelled_deep else None
        with deep.record() if deep is not None else nullcontext(), self.machine.autocast():
            logits = self.student(seen)
        if kind == "forward":
            return torch.zeros((), device=logits.device)
        if kind == "entropy":
            return entropy(logits)
        if kind == "reconstruction":
            assert self.reseg is not None
            with self.machine.autocast():
                again = self.reseg.teacher.decode(logits.float().softmax(1))
            return self.recon_loss(again, image)
        if kind == "mean teacher":
            return consistency(logits, target)
        label = pseudo_label(logits, SURE, IGNORED)
        loss = self.task_loss(logits, label)
        return loss if deep is None else loss + deep.loss(label, self.task_loss)

    def _follow(self) -> None:
        if self.mixed is not None:
            self.mixed.update()
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - EMA)

    def forget(self) -> None:
        """Drop what the captured step has left, so that the next capture can use its memory."""
        for part in (self.reseg, self.deep):
            if part is not None:
                part.extractor.forget()

    # --- a run

    def train(
        self, variant: Variant, seed: int, teacher: Mapping[str, Tensor] | None, pause: Pause | None = None
    ) -> float:
        """Train from the seed's weights on the feed's batches; the mean task loss of the last 50 steps.

        Args:
            variant: one with this step.
            seed: of the weights.
            teacher: weights from stage 1; None leaves the teacher untrained.
            pause: when to stop for another process to go on; `OutOfTimeError` is raised then.

        Raises:
            ValueError: the loss is NaN or infinite at the end.
        """
        settings = self.settings
        steps = variant.steps(settings.steps, settings.stage1_steps)
        weights = initial_weights(settings, self.classes, seed)
        self.model.load_state_dict(weights)
        if self.average is not None:
            self.average.load_state_dict(weights)
        if self.mixed is not None:
            self.mixed.reset()
        if self.deep is not None:
            for head in self.deep.heads.values():
                _redraw(head, seed)
        if self.reseg is not None:
            if teacher is None:
                reset_teacher(self.reseg.teacher, settings, self.classes, seed)
            else:
                self.reseg.teacher.load_state_dict(teacher)
        if self.label_teacher is not None:
            if teacher is None:
                self.label_teacher.redraw(seed)
            else:
                self.label_teacher.load_state_dict(teacher)
        t = torch.arange(steps) / steps
        self.aligned[:steps].copy_((t < variant.until).float())
        self.ramp[:steps].copy_(torch.exp(-5 * (1 - (t / RAMP).clamp(max=1)) ** 2))
        self.loop.reset(schedule(settings, steps))
        torch.manual_seed(seed)
        self.model.train()
        self.loop.run(steps, pause)
        return self.loop.last_loss(steps, variant.name)

    def networks(self) -> dict[str, nn.Module]:
        """What is scored, by what is added to the part's name: the model, and what the variant has beside it."""
        networks: dict[str, nn.Module] = {"": self.model}
        if self.mixed is not None:
            networks[", mean teacher"] = self.mixed.average
        if isinstance(self.mixed, Cleaned):
            networks[", corrected mean teacher"] = Corrected(self.mixed)
        if self.variant.free:
            networks[", statistics of others"] = self._with_statistics_of_others()
        return networks

    def _with_statistics_of_others(self) -> nn.Module:
        """The model with batch statistics of the first steps' images of the training patients without labels."""
        steps, model = min(STATISTICS, self.feed.steps), copy.deepcopy(self.model)
        clocks = torch.arange(steps, device=self.machine.device)
        images = (self.feed.batch_of(self.feed.others, clock)[0] for clock in clocks.split(1))
        with self.machine.autocast():
            update_bn(images, model)
        return model

    @torch.no_grad()
    def predict(self, network: nn.Module, images: Tensor, size: int) -> Tensor:
        """Classes (N, size, size) of images (N, S, S), both uint8; of volumes as they are."""
        network.eval()
        # all batches of one size, for which algorithms are chosen once
        padded = F.pad(images, (0, 0) * (images.ndim - 1) + (0, -len(images) % EVALUATED))
        classes = []
        for part in padded.split(EVALUATED):
            image = part[:, None].float() / 255
            with self.machine.autocast():
                logits = network(image)
            if logits.shape[-1] != size:
                logits = F.interpolate(logits.float(), (size, size), mode="bilinear", antialias=True)
            classes.append(logits.argmax(1).byte())
        network.train()
        return torch.cat(classes)[: len(images)]


@contextmanager
def _inside_all(contexts: list[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
