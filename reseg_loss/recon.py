"""Stage 1: train the teacher to reconstruct images from their label maps. A helper, not a trainer."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .checkpoint import restore_rng, rng_state
from .errors import ReSegError
from .labels import plain_label, unpack_batch
from .losses import ReconLoss
from .processes import in_step, rank, world_size
from .teacher import Teacher

READ_EVERY = 10  # steps between two looks at the loss; each one waits for the device
SAMPLED_BATCHES, SAMPLED_PIXELS = 50, 128  # of each, for the best constant image
CHECKED_STEPS = 100  # whose label values are looked at
RECENT_STEPS = 20  # whose loss is that of the end of stage 1

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def fit(
    loader: Iterable[Any],
    prepare: Callable[[Tensor], Teacher],
    after_first: Callable[[], None],
    loss: ReconLoss,
    *,
    epochs: int | None,
    steps: int | None,
    optimizer: OptimizerLike | None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    amp: torch.dtype | None,
    resumed: dict[str, Any] | None,
    save: Callable[[dict[str, Any]], None] | None,
    progress: bool,
) -> list[float]:
    """Train what `prepare` returns for the first batch; the mean loss of every epoch.

    `after_first` is called once, after the first step, whose gradients are still there. `resumed` is what an earlier
    `save` was given; with it the run goes on after its last epoch. The caller keeps random states, freezes the teacher
    and makes files of what `save` gets.

    Raises:
        ReSegError: the loader is empty, a batch has another form, or the loss is not finite.
    """
    history: list[float] = list(resumed["history"]) if resumed else []
    step, constants = (resumed["step"], list(resumed["constants"])) if resumed else (0, [])
    run: _Run | None = None
    recent: deque[Tensor] = deque(maxlen=RECENT_STEPS)
    generator = torch.Generator().manual_seed(0)  # of the pixels that `_compare_with_constant` sees
    if resumed:
        restore_rng(resumed["rng"])
    bar = tqdm(total=steps, initial=step, disable=not progress or rank() > 0, desc="stage 1", unit="step")
    if epochs is not None:
        with suppress(TypeError):  # loaders of iterable data sets have no length
            bar.total = epochs * len(loader)  # pyright: ignore[reportArgumentType]
    with bar:
        while (len(history) < epochs) if epochs is not None else (step < (steps or 0)):
            sampler = getattr(loader, "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(len(history))  # pyright: ignore[reportOptionalMemberAccess]
            total, seen = None, 0
            for batch in in_step(loader) if steps is None else loader:
                image, label = unpack_batch(batch)
                image, label = plain_label(image, "an image"), plain_label(label)
                if run is None:
                    teacher = prepare(image)
                    run = _Run(teacher, loss, optimizer, scheduler, amp, resumed)
                check_image(image, label, run.teacher)
                if not history and step < CHECKED_STEPS:
                    run.teacher.encoding.check_values(label)
                value, valid = run.step(image, label)
                if not recent:
                    after_first()
                if len(constants) < SAMPLED_BATCHES:
                    constants.append(_pixels(image, valid, generator))
                total = value if total is None else total + value
                recent.append(value)
                seen, step = seen + 1, step + 1
                bar.update()
                if seen % READ_EVERY == 0:
                    bar.set_postfix(loss=f"{_finite(total, seen, step):.4f}")
                if steps is not None and step >= steps:
                    break
            if total is None or run is None:
                raise ReSegError("the loader is empty (or a one-shot iterator that is used up); stage 1 needs batches")
            history.append(_finite(total, seen, step))
            bar.set_postfix(loss=f"{history[-1]:.4f}")
            if save is not None:
                save({**run.state(), "history": history, "step": step, "constants": constants, "rng": rng_state()})
    if history and constants:  # the last steps', for a pass may hold the whole training
        last = float(torch.stack([*recent]).mean()) if recent else history[-1]
        _compare_with_constant(last, torch.cat(constants, 1), loss)
    return history


class _Run:
    """Teacher, optimizer and schedule while stage 1 runs; under torch.distributed in a DDP of its own."""

    def __init__(
        self,
        teacher: Teacher,
        loss: ReconLoss,
        optimizer: OptimizerLike | None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        amp: torch.dtype | None,
        resumed: dict[str, Any] | None,
    ) -> None:
        self.teacher, self.loss, self.amp = teacher, loss, amp
        self.device = teacher.reference.device
        self.module: nn.Module = teacher
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # heads that the reconstruction does not reach get no gradient
            self.module = DistributedDataParallel(teacher, device_ids=ids, find_unused_parameters=True)
        if optimizer is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
        elif isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer = optimizer
        else:
            self.optimizer = optimizer(teacher.parameters())
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(p) in known for p in teacher.parameters()):
            raise ReSegError(
                "the optimizer holds no parameter of the teacher; give a function: optimizer=torch.optim.Adam"
            )
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        if resumed:
            if (self.scheduler is None) != (resumed["scheduler"] is None):
                one, other = ("without", "with") if self.scheduler is None else ("with", "without")
                raise ReSegError(f"stage 1 is to go on {one} scheduler=, its file was written {other}; give the same")
            self.optimizer.load_state_dict(resumed["optimizer"])
            self.scaler.load_state_dict(resumed["scaler"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(resumed["scheduler"])

    def step(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step; the loss and the valid mask."""
        image, label = (x.to(self.device, non_blocking=True) for x in (image, label))
        _, valid = self.teacher.encoding.encode(label)
        context = torch.autocast(self.device.type, dtype=self.amp) if self.amp else nullcontext()
        with torch.enable_grad(), context:
            prediction = self.module(label)
            value = self.loss(prediction, image.to(torch.promote_types(image.dtype, torch.float32)), valid)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        return value.detach(), valid

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
        }


def check_image(image: Tensor, label: Tensor, teacher: Teacher) -> None:
    """Raise a ReSegError unless image and label fit each other and the teacher."""
    if not image.is_floating_point():
        raise ReSegError(f"the image has dtype {image.dtype}; the teacher reconstructs it, so make it float")
    if image.ndim != teacher.encoding.dims + 2:
        raise ReSegError(
            f"the image has shape {tuple(image.shape)}; expected (B, C, ...) with {teacher.encoding.dims} spatial axes"
        )
    if image.shape[1] != teacher.image_channels:
        raise ReSegError(
            f"the image has shape {tuple(image.shape)}; the model was shown {teacher.image_channels} image channels"
        )
    teacher.encoding.check_shape(label, image.shape)


def _finite(total: Tensor, seen: int, step: int) -> float:
    mean = float(total) / seen
    if not math.isfinite(mean):
        raise ReSegError(
            f"the reconstruction loss is {mean} by step {step}: check the images for NaN or infinite values, "
            "scale them to about unit range, or lower the learning rate (optimizer=). This teacher is lost: build a "
            "new wrapper"
        )
    return mean


def _pixels(image: Tensor, valid: Tensor | None, generator: torch.Generator) -> Tensor:
    """Some valid pixels of every channel, at random: at even distances they might all be in a margin."""
    flat = image.movedim(1, 0).flatten(1)
    if valid is not None:
        flat = flat[:, (valid > 0).flatten().to(flat.device)]
    if flat.shape[1] > SAMPLED_PIXELS:
        index = torch.randint(flat.shape[1], (SAMPLED_PIXELS,), generator=generator, device="cpu")
        flat = flat[:, index.to(flat.device)]
    return flat.float().cpu()


def _compare_with_constant(last: float, pixels: Tensor, loss: ReconLoss) -> None:
    """Warn when the teacher has learnt no more than the best constant image (of quantiles and mean, per channel)."""
    if pixels.shape[1] == 0:
        raise ReSegError("every pixel of every label is ignored (ignore_index), so the teacher has learnt nothing")
    levels = torch.linspace(0, 1, 101, dtype=pixels.dtype, device=pixels.device)
    candidates = torch.cat([pixels.quantile(levels, 1), pixels.mean(1)[None]])
    errors = pixels[None] - candidates[..., None]
    best = (loss.alpha * errors.square() + loss.beta * errors.abs()).mean(2).min(0).values.mean()
    if last >= float(best):
        warnings.warn(
            f"the teacher's reconstruction loss is {last:.4f}, no better than the best constant image ({best:.4f}): "
            "it has learnt nothing from the labels. Train longer, check that images and labels belong together, or "
            "change the learning rate (optimizer=)",
            stacklevel=4,
        )
