"""Learning from images without labels: a mean teacher labels them, the model learns that on mixed images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .common.distributed import broadcast, refuse_join
from .common.dryrun import refuse_lazy
from .common.inputs import OF_IMAGES, OF_MODEL, check_number, check_weight, refuse_not_finite, value_of
from .common.labels import unwrapped
from .common.outputs import activation_of, as_path, refuse_probabilities, select_output
from .common.state import load_states
from .errors import ReSegError
from .mixing import boxes, mix, pseudo_label, ramp_up, random_intensities
from .recording.copying import copy_model, is_sharded
from .regularizer import Regularizer, nothing
from .supervision import DeepSupervision, TaskLoss

FORGOTTEN_CALLS = 100  # of `loss` without `update`, after which we warn
# before, DistributedDataParallel's second forward of a step marks buffers as changed that the first has saved
BROADCASTS_TWICE = torch.__version__ >= "2.13"


class CutMixConsistency(Regularizer):
    """A loss on unlabelled images: a mean teacher's sure predictions, as labels of mixed and perturbed images.

    The mean teacher (an average of the model over its training) predicts the images. A box of each is exchanged with
    another's, in image and prediction alike, the intensities are changed, and the model is trained with your own task
    loss on the predicted class where the mean teacher is sure of it. With `deep`, the heads of deep supervision learn
    it too. Mean teachers: Tarvainen and Valpola, NeurIPS 2017; with CutMix: French et al., BMVC 2020; with a
    threshold: Sohn et al., FixMatch, NeurIPS 2020.

    The mean teacher becomes no part of a module that this is an attribute of: the model's parameters and state_dict
    keys stay as they are, and it gets no hooks.

    Random numbers come from torch's default generators, as those of dropout do: `torch.manual_seed` fixes them, a run
    that restores their states resumes exactly, and a CUDA graph can capture them.

    Args:
        model: any nn.Module in 2D or 3D that gives logits of classes that exclude each other, or of one channel
            (sigmoid); or its DistributedDataParallel (before torch 2.13 with broadcast_buffers=False if it has
            buffers) or torch.compile wrapper, which is then what runs.
        deep: the model's `DeepSupervision`, with the same `ignore_index`.
        rampup_steps: number of calls over which the loss grows to its weight (`ramp_up`), 40 % of the run for instance;
            None gives it all its weight at once.
        ignore_index: the label value that your task loss leaves out: that of pixels of which the mean teacher is not
            sure.
        weight: a factor of the loss; it may change between steps. At 0 nothing runs.
        threshold: the probability from which on a prediction is sure.
        ema_decay: of the average, per `update`.
        perturb: changes the mixed images, (B, C, *spatial) to the same shape, and must leave everything where it is;
            None leaves them as they are. The default is `perturb_intensities`.
        output: path to the logits in what the model returns, as an index, a key or a tuple of them; None takes the
            first tensor of the image's size.

    Raises:
        ReSegError: a setting is out of range or does not fit `deep`; the model cannot be copied, is sharded
            (`fully_shard`), or has parameters in less than 32 bits.
    """

    ENTRIES: ClassVar[Mapping[str, Any]] = {
        "rampup_steps": (int, None),
        "ignore_index": int,
        "threshold": float,
        "ema_decay": float,
        "output": ([(int, str)], None),
        "started": bool,
        "average": dict,
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        deep: DeepSupervision | None = None,
        rampup_steps: int | None,
        ignore_index: int,
        weight: float = 1.0,
        threshold: float = 0.95,
        ema_decay: float = 0.99,
        perturb: Callable[[Tensor], Tensor] | None = random_intensities,
        output: int | str | Sequence[int | str] | None = None,
    ) -> None:
        super().__init__(model, weight)
        self._forward = model
        self.deep, self.perturb = deep, perturb
        self.rampup_steps, self.threshold, self.ema_decay = _checked(rampup_steps, threshold, ema_decay)
        self.ignore_index = check_number("ignore_index", ignore_index, whole=True)
        self.output = as_path(output)
        self._check_deep()
        self._average = _copy(self._model)
        self._since_update = 0
        self._started = self._ignoring = False

    @property
    def average(self) -> nn.Module:
        """The mean teacher, a copy of the model, which segments as well: `mixed.average.eval()(image)`.

        Its parameters average the model's; buffers are its own, so its batch normalisation knows the unlabelled
        images; at weight 0 they are the model's. `loss` sets its modes back to the model's. `mixed.average.compile()`
        compiles it.
        """
        return self._average

    def factor(self) -> float:
        """The factor of the next call: `weight`, and its ramp."""
        return self._weight * ramp_up(self._calls, self.rampup_steps)

    def loss(
        self,
        images: Any,
        task_loss: TaskLoss,
        *,
        weight: float | Tensor | None = None,
        forward: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """The weighted loss of a batch of unlabelled images. It runs the mean teacher and the model.

        Both run in the autocast that this is called in, and nothing waits for the device but the first call, which
        asks `task_loss` for a gradient to see that it leaves `ignore_index` out. With `deep`, call `deep.loss` of the
        labelled images before.

        Args:
            images: (B, C, *spatial), float, on the model's device, at least 2. Of a list, element 0.
            task_loss: your loss of logits (B, classes, *spatial) and a label (B, *spatial), int64, with
                `ignore_index`; of a model with one channel (B, 1, *spatial), 0 or 1. Where no pixel is sure it gets a
                label of zeros, and its value does not count. It need not be the loss of the labelled images: where
                that one cannot leave a label value out (many Dice losses), nn.CrossEntropyLoss(ignore_index=...) does.
            weight: instead of `factor()`. In a step that is captured as a CUDA graph, a tensor, since Python's ramp
                would stand still.
            forward: runs the model on the images instead of the `model` that this was made with: a wrapper of it that
                was made later, for instance.

        Returns:
            A scalar to add to your loss. At weight 0 a zero on which backward works.

        Raises:
            ReSegError: the images are not such a batch, are not finite, or fail in the model; gradients are off, or the
                model is in evaluation; its output has no logits; `task_loss` fails, or does not leave `ignore_index`
                out; `deep` has another one, or a labelled forward that waits for its loss; DistributedDataParallel
                copies buffers where torch cannot do it twice a step, or is in a join() context.
            TapError: a tap of `deep` did not fire.
        """
        images = _plain_images(images)
        forward = self._forward if forward is None else forward
        self._refuse_misuse()
        if isinstance(weight, Tensor):
            if weight.ndim:
                raise ReSegError(f"weight= has shape {tuple(weight.shape)}; it is a number or a scalar tensor")
            refuse_not_finite(weight, {}, "weight= is NaN or infinite")
        elif weight is not None:
            check_weight("weight", weight)
        factor = self.factor() if weight is None else weight
        if not isinstance(factor, Tensor) and factor == 0:
            self._last = {}
            return nothing(images.device)
        self._check_deep()
        if self.deep is not None and self.deep.extractor.waiting:
            raise ReSegError(
                "a labelled forward still waits for its deep supervision, which the forward of the unlabelled images "
                "would replace: call deep.loss(label, task_loss) before this loss"
            )
        _refuse_broadcast(forward)
        if _plain(forward) is not self._model:  # which alone is not reduced at each forward
            refuse_join(self._model, "two forwards a step are one too many")
        self._start()
        label = self._predict(images)
        mixed, label = self._exchanged(images, label)
        mixed = self._perturbed(mixed)
        # all of it inside the record, which forgets the features if anything fails: no other label may meet them
        with self.deep.record() if self.deep is not None else nullcontext():
            output = forward(mixed)
            logits = select_output(output, len(mixed), tuple(mixed.shape[2:]), self.output)
            made_of = {
                f"unlabelled {OF_IMAGES}": [images],
                "perturb= gave NaN or infinite values for images that are finite": [mixed],
                OF_MODEL: [logits],
            }
            refuse_not_finite(logits, made_of, first=not self._ignoring)
            if not self._ignoring:
                what = "pseudo-labels are taken from logits (output= names others that it returns)"
                refuse_probabilities(activation_of(logits), what, self._model)
                _check_ignoring(task_loss, logits.detach(), label, self.ignore_index)
                self._ignoring = True
            side = self.deep.loss(label, task_loss) if self.deep is not None else 0.0
        sure = label != self.ignore_index
        counts = sure.any()
        # most losses are NaN where everything is ignored
        target = torch.where(counts, label, torch.zeros_like(label))
        value = side + counts * value_of(task_loss, logits, target, "unlabelled images")
        refuse_not_finite(value, {}, "task_loss is NaN or infinite for unlabelled images, whose logits are finite")
        used = factor.detach() if isinstance(factor, Tensor) else factor
        self._last = {"loss": value.detach(), "weight": used, "sure": sure.float().mean()}
        self._calls += 1
        self._since_update += 1
        if self._since_update == FORGOTTEN_CALLS:
            warnings.warn(
                f"{FORGOTTEN_CALLS} calls of loss without update(): the mean teacher does not learn; call update() "
                "after each step of the optimizer",
                stacklevel=2,
            )
        return factor * value

    @torch.no_grad()
    def update(self) -> None:
        """Let the mean teacher follow the model; call it once after each step of the optimizer.

        Raises:
            ReSegError: the model's parameters are others than when this was made.
        """
        _refuse_sharded(self._model)
        self._start()
        mine, theirs = list(self._average.parameters()), list(self._model.parameters())
        _same("parameters", mine, theirs)
        pairs = [(a, p) for a, p in zip(mine, theirs) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - self.ema_decay)  # pyright: ignore
        if self._weight == 0:  # no forward of its own brings its buffers up to date
            self._take_over("buffers")
        self._since_update = 0

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew: the mean teacher becomes the model as it is now, in place, and the ramp begins at 0.

        The first `loss` or `update` does it, so that a model may get other weights before.

        Raises:
            ReSegError: the model's parameters or buffers are others than when this was made.
        """
        _refuse_sharded(self._model)
        self._to_model()
        for what in ("parameters", "buffers"):
            self._take_over(what)
        broadcast(self._average)  # DistributedDataParallel may still have to make the ranks' models equal
        self._started, self._calls, self._since_update = True, 0, 0

    def stats(self) -> dict[str, float]:
        """The last call's values for a log: "loss" (unweighted), "weight", and "sure", the share of pixels that count.

        "weight" is what that call's loss was multiplied with, ramp and all. Reading them waits for the device.
        """
        return super().stats()

    def _state(self) -> dict[str, Any]:
        # but for `perturb`. Random numbers are torch's: save its states beside, as for dropout
        return {
            "rampup_steps": self.rampup_steps,
            "ignore_index": self.ignore_index,
            "threshold": self.threshold,
            "ema_decay": self.ema_decay,
            "output": None if self.output is None else list(self.output),
            "started": self._started,
            "average": dict(self._average.state_dict()),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        settings = _checked(state["rampup_steps"], state["threshold"], state["ema_decay"])
        load_states((self._average, state["average"]))
        self.rampup_steps, self.threshold, self.ema_decay = settings
        self.ignore_index, self.output = state["ignore_index"], as_path(state["output"])
        self._started = state["started"]
        self._ignoring = False  # the task loss was asked about another ignore_index

    def _told(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rampup_steps", "threshold", "ema_decay", "ignore_index")}

    def _beside(self) -> list[nn.Module]:
        return [self._average]

    def _predict(self, images: Tensor) -> Tensor:
        """The mean teacher's pseudo-label."""
        # modes are the model's, so that parts which the user has frozen in evaluation are here, too
        pairs = [*zip_longest(_uncompiled(self._average), _uncompiled(self._model))]
        if any(type(mine) is not type(theirs) for mine, theirs in pairs):
            raise ReSegError(
                "the model has other modules than when its mean teacher was made; build CutMixConsistency after the "
                "model is changed"
            )
        for mine, theirs in pairs:
            if mine.training != theirs.training:
                mine.training = theirs.training
        try:
            with torch.no_grad():
                output = self._average(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ReSegError(
                f"the mean teacher failed on unlabelled images of shape {tuple(images.shape)}, {images.dtype}, on "
                f"{images.device}; they must be as the model takes the labelled ones: {error}"
            ) from error
        logits = select_output(output, len(images), tuple(images.shape[2:]), self.output)
        classes = logits.shape[1]
        if 0 <= self.ignore_index < max(classes, 2):
            raise ReSegError(
                f"ignore_index={self.ignore_index} is one of the model's {max(classes, 2)} classes; it marks the "
                "pixels that do not count, by a value that is no class, 255 for instance"
            )
        if self.deep is not None and self.deep.num_classes != classes:
            raise ReSegError(
                f"the output that was taken for logits has {classes} channels, the heads of deep supervision have "
                f"{self.deep.num_classes}; pass output= with the path to the logits"
            )
        return pseudo_label(logits, self.threshold, self.ignore_index)

    def _exchanged(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images and their label with boxes of others."""
        box = self._boxes(images)
        return mix(images, box), mix(label, box)

    def _boxes(self, images: Tensor) -> Tensor:
        return boxes(torch.rand(len(images), images.ndim - 1, device=images.device), images.shape[2:])

    def _perturbed(self, images: Tensor) -> Tensor:
        if self.perturb is None:
            return images
        shape, images = images.shape, self.perturb(images)
        if not isinstance(images, Tensor) or images.shape != shape:
            found = tuple(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ReSegError(f"perturb= gave {found}, not images of the same shape {tuple(shape)}")
        return images

    def _check_deep(self) -> None:
        deep = self.deep
        if deep is None:
            return
        if not isinstance(deep, DeepSupervision):
            raise ReSegError(f"deep= is the model's DeepSupervision, got {type(deep).__name__}")
        if deep.model is not self._model:
            raise ReSegError("deep= is the deep supervision of another model; build it for this one")
        if deep.ignore_index != self.ignore_index:
            raise ReSegError(
                f"deep supervision has ignore_index={deep.ignore_index}, this {self.ignore_index}, which marks pixels "
                f"that must not count there either: build DeepSupervision(..., ignore_index={self.ignore_index})"
            )

    def _start(self) -> None:
        if self._started:
            self._to_model()
        else:
            self.reset()

    def _take_over(self, what: str) -> None:
        """Give the mean teacher the model's "parameters" or "buffers"."""
        mine, theirs = (list(getattr(m, what)()) for m in (self._average, self._model))
        _same(what, mine, theirs)
        for a, p in zip(mine, theirs):
            a.copy_(p)

    def _to_model(self) -> None:
        """To the model's device, which may have moved since; a ReSegError if its dtype has."""
        mine, theirs = (next(m.parameters(), None) for m in (self._average, self._model))
        if mine is None or theirs is None:
            return
        if mine.device != theirs.device:
            self._average.to(theirs.device)
        if theirs.dtype.itemsize < 4:
            _refuse_low(self._model)
        if mine.dtype != theirs.dtype:
            raise ReSegError(
                f"the model's parameters are {theirs.dtype}, its mean teacher's {mine.dtype}: the model was moved to "
                f"another dtype, so move the mean teacher, too, by mixed.to({theirs.dtype})"
            )


def _checked(rampup_steps: Any, threshold: Any, ema_decay: Any) -> tuple[int | None, float, float]:
    steps = None if rampup_steps is None else check_number("rampup_steps", rampup_steps, least=1, whole=True)
    return (
        steps,
        check_number("threshold", threshold, least=0, most=1),
        check_number("ema_decay", ema_decay, least=0, below=1),
    )


def _copy(model: nn.Module) -> nn.Module:
    """The mean teacher of a model."""
    _refuse_sharded(model)
    refuse_lazy(model)
    _refuse_low(model)
    return copy_model(model, "the mean teacher", "leave it as it was until this is built").requires_grad_(False)


def _refuse_low(model: nn.Module) -> None:
    """Raise a ReSegError if parameters are too coarse for an average."""
    low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if low:
        raise ReSegError(
            f"the model has {', '.join(map(str, low))} parameters, in which the small steps of an average are rounded "
            "away; keep them in float32 and use torch.autocast"
        )


def _uncompiled(model: nn.Module) -> Iterator[Any]:
    """Every module but those that torch.compile put around another."""
    return (module for module in model.modules() if "_orig_mod" not in module._modules)


def _check_ignoring(task_loss: TaskLoss, logits: Tensor, like: Tensor, ignore_index: int) -> None:
    """Raise a ReSegError unless the loss leaves `ignore_index` out: asked before any prediction is sure, not after.

    Without it, one that fails on the value would do so in the middle of a training, on CUDA without a message.
    """
    if logits.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    label = torch.full_like(like, ignore_index)
    label.flatten(1)[:, : label[0].numel() // 2] = 0
    must = (
        f"it must leave the label value {ignore_index} out, as nn.CrossEntropyLoss(ignore_index={ignore_index}) does. "
        "If the loss of the labelled images cannot, give another here: it need not be the same"
    )
    try:
        with torch.enable_grad():
            logits = logits.requires_grad_()
            value = value_of(task_loss, logits, label, "a label with pixels that do not count")
            (gradient,) = torch.autograd.grad(value, logits)
        ignored = (label == ignore_index).unsqueeze(1) if label.ndim < gradient.ndim else label == ignore_index
        leaves_out = bool((gradient.isfinite().all() & ~(gradient != 0).logical_and(ignored).any()).item())
    except torch.OutOfMemoryError:
        raise
    except ReSegError as error:
        raise error if error.__cause__ is None else ReSegError(f"{error}; {must}") from error.__cause__
    except Exception as error:
        raise ReSegError(f"task_loss failed on a label of shape {tuple(label.shape)}, int64, with pixels that do not "
                         f"count; {must} ({type(error).__name__}: {error})") from error  # fmt: skip
    if not leaves_out:
        raise ReSegError(f"task_loss has a gradient at pixels that do not count, or none that is finite; {must}")


def _refuse_sharded(model: nn.Module) -> None:
    """Raise a ReSegError if the model is sharded, now or since its mean teacher was made."""
    if is_sharded(model):
        raise ReSegError("the model is sharded (fully_shard), and its mean teacher needs whole parameters; use DDP")


def _same(what: str, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Raise a ReSegError unless the mean teacher's tensors fit the model's."""
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        raise ReSegError(
            f"the model has other {what} than when its mean teacher was made; build CutMixConsistency after the "
            "model is changed"
        )


def _plain(forward: Any) -> Any:
    while isinstance(getattr(forward, "_orig_mod", None), nn.Module):
        forward = forward._orig_mod
    return forward


def _refuse_broadcast(forward: Any) -> None:
    """Raise a ReSegError for a DistributedDataParallel after whose second forward the first's backward fails."""
    forward = _plain(forward)
    if BROADCASTS_TWICE or not isinstance(forward, DistributedDataParallel):
        return
    if forward.will_sync_module_buffers():
        raise ReSegError(
            "before torch 2.13 DistributedDataParallel cannot copy rank 0's buffers at two forwards a step, since the "
            "backward of the first then fails: build it with broadcast_buffers=False"
        )


def _plain_images(images: Any) -> Tensor:
    """The images as a plain tensor: element 0 of a list, MetaTensor unwrapped."""
    images = unwrapped(images)
    if not isinstance(images, Tensor) or images.ndim not in (4, 5) or not images.is_floating_point():
        found = f"{tuple(images.shape)}, {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise ReSegError(f"unlabelled images are a float tensor (B, C, H, W) or (B, C, D, H, W), got {found}")
    if len(images) < 2:
        what = "one unlabelled image has no other" if len(images) else "an empty batch has no unlabelled images"
        raise ReSegError(f"{what} to be mixed with: use batches of at least 2 (drop_last=True)")
    return images
