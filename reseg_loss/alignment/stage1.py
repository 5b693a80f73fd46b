"""Stage 1: train the teacher to reconstruct images from their label maps. A helper, not a trainer."""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..common.batches import pair_of, set_epoch
from ..common.distributed import in_step, on_rank_0, rank, world_size
from ..common.dryrun import restore_rng, rng_state
from ..common.inputs import check_number, readable
from ..errors import ReSegError
from ..recording.extractor import FeatureExtractor
from .image_range import ImageMap, far_from_unit, valid_pixels
from .losses import ReconLoss
from .resume import choices, go_on, missing_arguments, schedule_choices
from .stage1_file import Stage1File
from .teacher import Teacher

logger = logging.getLogger("reseg_loss")

READ_EVERY = 10  # steps between two looks at the loss; each one waits for the device
SAMPLED_BATCHES, SAMPLED_PIXELS = 50, 128  # of each, for the best constant image
CHECKED_STEPS = 100  # whose label values are looked at
RECENT_STEPS = 20  # whose loss is that of the end of stage 1

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Arguments:
    """The arguments of `ReSegWrapper.fit_recon`, which describes them.

    Raises:
        ReSegError: an argument is invalid, or inference mode is on.
    """

    loader: Iterable[Any]
    epochs: int | None
    steps: int | None
    optimizer: OptimizerLike | None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None
    amp: torch.dtype | None
    batch: Callable[[Any], Any] | None
    standardize_image: bool
    progress: bool

    def __post_init__(self) -> None:
        loader, optimizer, scheduler, amp, batch = self.loader, self.optimizer, self.scheduler, self.amp, self.batch
        if (self.epochs is None) == (self.steps is None):
            raise ReSegError("pass how long to train: exactly one of epochs= and steps=")
        check_number(*(("epochs", self.epochs) if self.steps is None else ("steps", self.steps)), least=1, whole=True)
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise ReSegError(f"stage 1 needs a loader that yields batches, got {type(loader).__name__}")
        if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer) or callable(optimizer)):
            raise ReSegError(
                f"optimizer= must be a function such as torch.optim.Adam, or an optimizer, got {optimizer!r}"
            )
        if not (amp is None or isinstance(amp, torch.dtype)) or not (scheduler is None or callable(scheduler)):
            raise ReSegError(
                "amp= must be a dtype such as torch.bfloat16, and scheduler= a function that takes the optimizer"
            )
        if not (batch is None or callable(batch)):
            raise ReSegError(f"batch= must be a function from a batch to (image, label), got {type(batch).__name__}")
        if torch.is_inference_mode_enabled():
            raise ReSegError("stage 1 cannot train in inference mode: call fit_recon outside it")


def fit(
    given: Arguments,
    prepare: Callable[[Tensor], tuple[Teacher, FeatureExtractor]],
    loss: ReconLoss,
    copied: bool,
    file: Stage1File | None,
    resumed: dict[str, Any] | None,
    state: Callable[[], dict[str, Any]],
) -> list[float]:
    """Train the teacher; returns the mean loss of every epoch. `prepare` gives the teacher and its taps for a batch.

    `copied` says whether the teacher is a copy of the model. The run continues after the last epoch of what was
    `resumed` from the file. The file gets the `state` of the wrapper along with that of the run. The caller preserves
    the random states and freezes the teacher.

    Raises:
        ReSegError: the loader is empty, a batch has another form, the loss or a weight is not finite, the file cannot
            be written, the run cannot continue from it with these arguments, or the output that is trained does not
            depend on all tapped modules.
        TapError: a tapped module of a copy of the model runs without gradients.
    """
    start = resumed or {"history": [], "step": 0, "constants": []}
    history, step, constants = start["history"], start["step"], start["constants"]
    epochs, steps = given.epochs or math.inf, given.steps or math.inf
    if file is not None and (len(history) >= epochs or step >= steps):
        logger.warning(
            "%s holds a finished stage 1 (%s): its teacher is used, and this loader is not. If that teacher was fitted "
            "on other patients, pass another file",
            file.path,
            f"{step} steps" if given.epochs is None else f"{len(history)} epochs",
        )
    elif file is not None:
        file.check()
        if resumed:
            logger.info("stage 1 resumes from %s after epoch %d, step %d", file.path, len(history), step)
    run: _Run | None = None
    taps: FeatureExtractor | None = None
    reached: set[str] = set()
    recent: deque[Tensor] = deque(maxlen=RECENT_STEPS)
    generator = torch.Generator().manual_seed(0)  # of the pixels that `_compare_with_constant` sees
    if resumed:
        restore_rng(resumed["rng"])
    hidden = not given.progress or rank() > 0
    with tqdm(total=given.steps, initial=step, disable=hidden, desc="stage 1", unit="step") as bar:
        if given.epochs is not None:
            with suppress(TypeError):  # loaders of iterable data sets have no length
                bar.total = given.epochs * len(given.loader)  # pyright: ignore[reportArgumentType]
        while len(history) < epochs and step < steps:
            set_epoch(given.loader, len(history))
            total, seen = None, 0
            for batch in in_step(given.loader) if given.steps is None else given.loader:
                image, label = pair_of(batch, given.batch, "fit_recon")
                if run is None:
                    teacher, taps = prepare(image)
                else:
                    teacher = run.teacher
                check_image(image, label, teacher)
                if readable(label.device) or (not history and step < CHECKED_STEPS):
                    teacher.encoding.check_values(label)
                if run is None:
                    _settle_range(teacher, image, label, given.standardize_image)
                    run = _Run(teacher, loss, given, resumed, kept=file is not None)
                    if file is not None:
                        file.rehearse({**state(), **run.state()})
                around = nullcontext() if taps is None else _watched(taps, reached, copied)
                value, valid = run.step(image, label, around)
                if taps is not None:  # in the first step alone
                    _check_reached(taps, reached)
                    taps = None
                if len(constants) < SAMPLED_BATCHES:
                    constants.append(run.standardized(sample_pixels(image, valid, generator)))
                total = value if total is None else total + value
                recent.append(value)
                seen, step = seen + 1, step + 1
                bar.update()
                if seen % READ_EVERY == 0:
                    bar.set_postfix(loss=f"{_finite(total, seen, step):.4f}")
                if step >= steps:
                    break
            if total is None or run is None:
                raise ReSegError("the loader is empty (or an iterator that is used up); stage 1 needs batches")
            history.append(_finite(total, seen, step))
            bar.set_postfix(loss=f"{history[-1]:.4f}")
            if rank() == 0:
                logger.info("stage 1, epoch %d, step %d: reconstruction loss %.4f", len(history), step, history[-1])
            if file is not None:
                run.teacher.check_finite(f"after {step} steps, although the loss before the last was finite")
                now = {"history": history, "step": step, "constants": constants, "rng": rng_state()}
                file.write({**state(), **run.state(), **now})
    if history and constants:  # the last steps', for a pass may hold the whole training, or be hardly longer than these
        last = float(torch.stack([*recent][-max(1, step // 2) :]).mean()) if recent else history[-1]
        _compare_with_constant(last, torch.cat(constants, 1), loss)
    return history


class _Run:
    """Teacher, optimizer and schedule while stage 1 runs; under torch.distributed the teacher is in its own DDP."""

    def __init__(
        self, teacher: Teacher, loss: ReconLoss, given: Arguments, resumed: dict[str, Any] | None, kept: bool
    ) -> None:
        self.teacher, self.loss, self.amp = teacher, loss, given.amp
        self.device = teacher.reference.device
        self.range = teacher.image_map and teacher.image_map.tensors(teacher.encoding.dims, self.device)
        self.module: nn.Module = teacher
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # heads that the reconstruction does not reach get no gradient
            self.module = DistributedDataParallel(teacher, device_ids=ids, find_unused_parameters=True)
        optimizer = torch.optim.Adam if given.optimizer is None else given.optimizer  # at its own rate, 1e-3
        self.optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer(teacher.parameters())
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ReSegError(f"optimizer= must be a function that returns an optimizer; it returned {self.optimizer!r}")
        if error := missing_arguments(self.optimizer.step):
            raise ReSegError(
                f"stage 1 calls step() of its optimizer without arguments, and {type(self.optimizer).__name__}'s needs "
                f"some ({error}); use one that needs none, such as torch.optim.Adam"
            ) from error
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in known for p in teacher.parameters()):
            raise ReSegError(
                "the optimizer has no parameter of the teacher; pass a function: optimizer=torch.optim.Adam"
            )
        self.choices = choices(self.optimizer, given.amp)
        self.scheduler = None
        if given.scheduler is not None:
            self.scheduler = given.scheduler(self.optimizer)
            self.choices["schedule"] = schedule_choices(self.scheduler, kept)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=given.amp is torch.float16)
        if resumed:
            changes = go_on(self.optimizer, self.scheduler, self.scaler, resumed, self.choices)
            if changes and rank() == 0:
                logger.warning(
                    "stage 1 continues with settings that differ from its file's; those of this call are used: %s",
                    "; ".join(changes),
                )

    def step(self, image: Tensor, label: Tensor, forward: AbstractContextManager[None]) -> tuple[Tensor, Tensor | None]:
        """One step, with its forward inside the context `forward`; returns the loss and the valid mask."""
        image, label = (x.to(self.device, non_blocking=True) for x in (image, label))
        _, valid = self.teacher.encoding.encode(label)
        target = self.standardized(image.to(torch.promote_types(image.dtype, torch.float32)))
        context = torch.autocast(self.device.type, dtype=self.amp) if self.amp else nullcontext()
        with torch.enable_grad(), context:
            with forward:
                prediction = self.module(label)
            value = self.loss(prediction, target, valid)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        return value.detach(), valid

    def standardized(self, image: Tensor) -> Tensor:
        """An image (B, C, *spatial), or pixels (C, N), standardized as the teacher has to reconstruct it."""
        if self.range is None:
            return image
        mean, std = self.range if image.ndim > 2 else (x.flatten(1).to(image.device) for x in self.range)
        return (image - mean) / std

    def state(self) -> dict[str, Any]:
        return {
            "choices": self.choices,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
        }


@contextmanager
def _watched(taps: FeatureExtractor, reached: set[str], copied: bool) -> Iterator[None]:
    """Around a forward of the teacher: notes in `reached` the taps that its backward gives a gradient.

    If the teacher is a copy of the model, a TapError is raised for taps without gradients: the model's taps would have
    none in stage 2, either. A teacher of the user's own needs none there.
    """
    taps.enabled = True
    try:
        yield
        for name, (_, tensor, *_) in taps.recorded().items():
            if tensor.requires_grad:
                tensor.register_hook(lambda _, name=name: reached.add(name))
            elif not copied:
                reached.add(name)
        if copied:
            taps.take()
    finally:
        taps.enabled = False


def _check_reached(extractor: FeatureExtractor, reached: set[str]) -> None:
    """Raise a ReSegError if the reconstruction loss gives a tap no gradient.

    If a model returns several images, the one that is used may not depend on every tap. Those taps would stay random.
    """
    unreached = [name for name in map(str, extractor.taps) if name not in reached]
    if unreached:
        raise ReSegError(
            f"stage 1 would not train {', '.join(unreached)} of the teacher: the output that is trained to be the "
            "image does not depend on it. If the model returns several tensors of the image's size, pass output= with "
            "the path to the one at the end of its decoder (output=-1, output='main', ...); otherwise name other taps"
        )


def check_image(image: Tensor, label: Tensor, teacher: Teacher) -> None:
    """Raise a ReSegError unless image and label fit each other and the teacher."""
    if not image.is_floating_point():
        raise ReSegError(f"the image has dtype {image.dtype}; the teacher reconstructs it, so convert it to float")
    if image.numel() == 0:
        raise ReSegError(f"the batch is empty: its image has shape {tuple(image.shape)}")
    if image.ndim != teacher.encoding.dims + 2:
        raise ReSegError(
            f"the image has shape {tuple(image.shape)}; expected (B, C, ...) with {teacher.encoding.dims} spatial axes"
        )
    if image.shape[1] != teacher.image_channels:
        raise ReSegError(
            f"the image has shape {tuple(image.shape)}; the example input had {teacher.image_channels} image channels"
        )
    teacher.encoding.check_shape(label, image.shape)


def _finite(total: Tensor, seen: int, step: int) -> float:
    mean = float(total) / seen
    if not math.isfinite(mean):
        raise ReSegError(
            f"the reconstruction loss is {mean} by step {step}: check the images for NaN or infinite values, "
            "scale them to about unit range (standardize_image=True), or lower the learning rate (optimizer=). This "
            "teacher cannot be used: build a new ReSegWrapper"
        )
    return mean


def _settle_range(teacher: Teacher, image: Tensor, label: Tensor, standardize: bool) -> None:
    """Give the teacher the map of the first batch, unless it has one; or warn if images are far from unit range."""
    _, valid = teacher.encoding.encode(label)
    if standardize:
        if teacher.image_map is None:
            teacher.image_map = on_rank_0(lambda: ImageMap.of(image, valid))
        return
    teacher.image_map = None
    level = far_from_unit(image, valid) if rank() == 0 else None
    if level is not None:
        message = (
            f"the images are far from unit range: the root mean square of the first batch is {level:.4g}. Stage 1 "
            "learns them as they are (eqs. 1-3), which takes long, and the teacher may learn nothing. Scale the images "
            "to about unit range, or pass fit_recon(standardize_image=True) if the network itself does the scaling"
        )
        logger.warning(message)
        warnings.warn(message, stacklevel=4)


def sample_pixels(image: Tensor, valid: Tensor | None, generator: torch.Generator) -> Tensor:
    """A random sample of the valid pixels of every channel. (Evenly spaced pixels might all be in a margin.)"""
    flat = valid_pixels(image, valid)
    if flat.shape[1] > SAMPLED_PIXELS:
        index = torch.randint(flat.shape[1], (SAMPLED_PIXELS,), generator=generator, device="cpu")
        flat = flat[:, index.to(flat.device)]
    return flat.float().cpu()


def _compare_with_constant(last: float, pixels: Tensor, loss: ReconLoss) -> None:
    """Warn if the teacher is no better than the best constant image (of quantiles and mean, per channel)."""
    if pixels.shape[1] == 0:
        raise ReSegError("every pixel of every label is ignored (ignore_index), so the teacher has learnt nothing")
    levels = torch.linspace(0, 1, 101, dtype=pixels.dtype, device=pixels.device)
    candidates = torch.cat([pixels.quantile(levels, 1), pixels.mean(1)[None]])
    errors = pixels[None] - candidates[..., None]
    best = (loss.alpha * errors.square() + loss.beta * errors.abs()).mean(2).min(0).values.mean()
    if last >= float(best):
        warnings.warn(
            f"the teacher's reconstruction loss over its last steps is {last:.4f}, no better than the best constant "
            f"image ({best:.4f}): it has learnt nothing from the labels. Train longer, check that images and labels "
            "belong together, scale the images to about unit range, or change the learning rate (optimizer=)",
            stacklevel=4,
        )
