"""Learning from images without labels: a mean teacher labels them, the model learns the labels on mixed images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .common.distributed import refuse_join, wrappers_of
from .common.dryrun import preserved_rng, preserved_state
from .common.inputs import (
    OF_IMAGES,
    OF_MODEL,
    check_number,
    check_weight,
    is_dense,
    readable,
    refuse_not_finite,
    value_of,
)
from .common.labels import plain_label, unwrapped
from .common.outputs import (
    activation_of,
    as_path,
    ending_named,
    ending_of,
    full_size,
    in_evaluation,
    refuse_other_ending,
    refuse_probabilities,
)
from .common.state import load_states
from .errors import ReSegError, outline, warn
from .mean_teacher import MeanTeacher
from .mixing import mix, perturbed, pixels_per_class, predicted, ramp_up, random_boxes, random_intensities, sure_label
from .recording.copying import compiler_of
from .recording.ending import Ending
from .regularizer import Regularizer, nothing
from .supervision import DeepSupervision, TaskLoss, refuse_other_heads

INSTEAD = "another loss here: it need not be the same one"  # if a task loss cannot ignore a label value
ASKED_LOSSES = 8  # then no more are, because a loop may make one for each call
FORGOTTEN_STEPS = 20  # changes of the parameters without `update`, after which we warn
# before, DistributedDataParallel's second forward of a step marks buffers as changed that the first has saved
BROADCASTS_TWICE = torch.__version__ >= "2.13"


class Mixed(NamedTuple):
    """Mixed images that the model has to learn from, and their pseudo-labels.

    Attributes:
        images: (B, C, *spatial).
        label: the pseudo-label, in the form of `mixing.predicted`.
        sure: for each class, the share of sure pixels among those that the mean teacher predicts as this class,
            (classes,); NaN if it predicts none.
    """

    images: Tensor
    label: Tensor
    sure: Tensor


class CutMixConsistency(Regularizer):
    """A loss on unlabelled images: the mean teacher's confident predictions are labels for mixed, perturbed images.

    The mean teacher (an average of the model over its training) predicts the images. In each image and its prediction,
    a box is replaced by the same box of another image. The intensities are changed. The model is then trained with your
    own task loss on the predicted classes, where the mean teacher is sure of them. With `deep`, the heads of deep
    supervision learn them, too. Mean teachers: Tarvainen and Valpola, NeurIPS 2017; with CutMix: French et al., BMVC
    2020; with a threshold: Sohn et al., FixMatch, NeurIPS 2020.

    This object can be an attribute of a module: the mean teacher does not become part of that module. The model's
    parameters and state_dict keys stay as they are, and it gets no hooks.

    Random numbers come from torch's default generators, as for dropout. So `torch.manual_seed` fixes them, a run that
    restores their states resumes exactly, and a CUDA graph can capture them.

    Args:
        model: any nn.Module in 2D or 3D that returns logits, of mutually exclusive classes or of one channel (sigmoid).
            Or its DistributedDataParallel or torch.compile wrapper; then the wrapper is run. Before torch 2.13,
            DistributedDataParallel needs broadcast_buffers=False if the model has buffers.
        deep: the model's `DeepSupervision`, with the same `ignore_index`.
        rampup_steps: number of calls over which the loss grows to its full weight (`ramp_up`), for instance 40 % of the
            run. None uses the full weight from the start.
        ignore_index: the label value that your task loss ignores. It marks the pixels where the mean teacher is not
            sure.
        weight: a factor of the loss; it may change between steps. At 0 nothing runs.
        threshold: a prediction is sure if its probability is at least this.
        ema_decay: decay of the average, per `update`.
        perturb: a function that changes the mixed images, from (B, C, *spatial) to the same shape. It must not move
            anything in them. None leaves them unchanged. The default is `perturb_intensities` with random numbers.
        average_buffers: True lets the mean teacher predict in evaluation mode, with an average of the model's buffers.
            False lets it predict in training mode, with its own batch statistics. Use True if the model's batch
            normalisation sees mixed images together with others.
        overlapping: each channel is a class of its own (sigmoid), with its own threshold; labels are (B, C, *spatial).
        output: path to the logits in what the model returns: an index, a key, or a tuple of them. None takes the first
            tensor of the image's size, or the only coarser one, interpolated. If the model ends in a sigmoid or softmax
            module, pass "in:" and that module's path: then the module's input is used as logits, and `task_loss` gets
            the module's output.

    Raises:
        ReSegError: a setting is out of range or does not fit `deep`; classes overlap, but the model ends in a softmax
            module; the model cannot be copied, is sharded (`fully_shard`), or has parameters in less than 32 bits.
    """

    ENTRIES: ClassVar[Mapping[str, Any]] = {
        "rampup_steps": (int, None),
        "ignore_index": int,
        "threshold": float,
        "ema_decay": float,
        "average_buffers": bool,
        "overlapping": bool,
        "output": ([(int, str)], str, None),
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
        average_buffers: bool = False,
        overlapping: bool = False,
        output: int | str | Sequence[int | str] | None = None,
    ) -> None:
        super().__init__(model, weight)
        for name, value in (("average_buffers", average_buffers), ("overlapping", overlapping)):
            if not isinstance(value, bool):
                raise ReSegError(f"{name}={value!r}; it is True or False")
        if perturb is not None and not callable(perturb):
            raise ReSegError(f"perturb={perturb!r}; it is a function of images, or None")
        self._forward = model
        self.deep, self.perturb, self.overlapping = deep, perturb, overlapping
        self._rampup_steps, self._threshold, ema_decay = _checked(rampup_steps, threshold, ema_decay)
        self.ignore_index = check_number("ignore_index", ignore_index, whole=True)
        self.output: Any = output
        self._endings: tuple[Ending, Ending] | None = None
        self._check_deep()  # before a copy is made
        self._mean_teacher = MeanTeacher(model, ema_decay, average_buffers=average_buffers)
        self.output, self._endings = self._hooked(output)
        refuse_other_ending(self._model, ending_named(self.output), None, overlapping=overlapping)
        self._check_deep()
        self._shares: Tensor | None = None
        self.forgotten = _Forgotten()  # `SemiSupervised` asks it, too, for its steps at weight 0
        self._looked = False  # at values of the first call
        self._asked: set[int] = set()  # the task losses that were asked whether they leave `ignore_index` out
        self._skipped = False  # whether the last call was at weight=0

    @property
    def average(self) -> nn.Module:
        """The mean teacher, a copy of the model, for segmentation as well: `mixed.average.eval()(image)`.

        Its parameters average the model's. It has its own buffers, so its batch normalisation knows the unlabelled
        images. At weight 0 it takes the model's buffers, and with `average_buffers` it averages them. `loss` sets the
        modes of its modules: to the model's, dropout included, or with `average_buffers` to evaluation.
        """
        return self._mean_teacher.network

    @property
    def ending(self) -> str | None:
        """The path of the sigmoid or softmax module whose input is the logits; None if the model returns logits."""
        return ending_named(self.output)

    @property
    def rampup_steps(self) -> int | None:
        """Number of calls over which the loss grows to its full weight; it may change."""
        return self._rampup_steps

    @rampup_steps.setter
    def rampup_steps(self, value: int | None) -> None:
        self._rampup_steps = _checked_rampup(value)

    @property
    def threshold(self) -> float:
        """A prediction is sure if its probability is at least this; it may change."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = _checked_threshold(value)

    @property
    def ema_decay(self) -> float:
        """Decay of the average, per `update`; it may change."""
        return self._mean_teacher.decay

    @ema_decay.setter
    def ema_decay(self, value: float) -> None:
        self._mean_teacher.decay = _checked_decay(value)

    def factor(self) -> float:
        """The factor of the next call: `weight` times the ramp."""
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

        Both run under the caller's autocast. Only the first call with a `task_loss` waits for the device: it asks
        for a gradient, to check that the loss ignores `ignore_index`. With `deep`, call `deep.loss` for the labelled
        images first.

        Args:
            images: (B, C, *spatial), float, on the model's device, B at least 2. If it is a list, element 0 is used.
            task_loss: your loss of logits (B, classes, *spatial) and a label (B, *spatial), int64, with
                `ignore_index`. For a model with one channel the label is (B, 1, *spatial), 0 or 1. If no pixel is sure,
                it gets a label of zeros, and its value does not count. It need not be the loss of the labelled images:
                if that one cannot ignore a label value (many Dice losses), use nn.CrossEntropyLoss(ignore_index=...).
            weight: replaces `factor()`. In a step that is captured as a CUDA graph it must be a tensor, because the
                ramp is computed in Python and would be frozen.
            forward: called to run the model on the images, in place of the `model` that this was built with. For
                instance a wrapper of the model that was made later. The mean teacher gets the images themselves, so
                what prepares them belongs into the model, or before this loss.

        Returns:
            A scalar to add to your loss. At weight 0, a zero that supports backward.

        Raises:
            ReSegError: the images are not such a batch, are not finite, or fail in the model; gradients are off, or the
                model is in evaluation; its output has no logits; `task_loss` fails, or does not ignore `ignore_index`;
                `deep` has another `ignore_index`, or a labelled forward that still waits for its loss;
                DistributedDataParallel copies buffers and torch cannot do that twice a step, or it is in a join()
                context.
            TapError: a tap of `deep` did not fire.
        """
        images = plain_images(images)
        forward = self._forward if forward is None else forward
        self._refuse_misuse()
        factor = self.factor_of(weight)
        if not isinstance(factor, Tensor) and factor == 0:
            self._last, self._skipped = {}, True
            return nothing(images.device)
        self._check_deep()
        if self.deep is not None and self.deep.extractor.waiting:
            raise ReSegError(
                "a labelled forward still waits for its deep supervision loss, and the forward of the unlabelled "
                "images would replace it: call deep.loss(label, task_loss) before this loss"
            )
        refuse_two_forwards(forward, self._model)
        compiler = compiler_of(forward)
        if compiler is not None:
            self.compile(compiler)
        y = self.mix(images)
        # all of it inside the record, which forgets the features if anything fails: no other label may meet them
        with self.deep.record() if self.deep is not None else nullcontext():
            prediction, _ = self.select(forward(y.images), y.images)
            self._ask(task_loss, prediction, y.label)
            side = self.deep.loss(y.label, task_loss) if self.deep is not None else 0.0
        value = side + self.value(prediction, y, task_loss)
        self._last |= {"loss": value.detach(), "weight": factor.detach() if isinstance(factor, Tensor) else factor}
        return factor * value

    def compile(self, compiler: Callable[[Any], Any] = torch.compile) -> None:
        """Compile the mean teacher for `loss`, by torch.compile or a function like it. Further calls do nothing.

        This happens automatically if the `model` that was given, or `forward` of `loss`, is compiled.
        """
        self._mean_teacher.compile(compiler)

    # --- the parts of `loss`, for loops in which something else runs the model

    def factor_of(self, weight: float | Tensor | None) -> float | Tensor:
        """The factor of the loss: `weight` as given to `loss`, or `factor()`. Raises a ReSegError if it is invalid."""
        if isinstance(weight, Tensor):
            if weight.ndim:
                raise ReSegError(f"weight= has shape {tuple(weight.shape)}; it must be a number or a scalar tensor")
            refuse_not_finite(weight, {}, "weight= is NaN or infinite")
        elif weight is not None:
            check_weight("weight", weight)
        return self.factor() if weight is None else weight

    def mix(self, images: Any) -> Mixed:
        """Let the mean teacher label images, exchange boxes between them, and change their intensities.

        Raises:
            ReSegError: as in `loss`, for the images, the mean teacher's output and `perturb`.
        """
        images = plain_images(images)
        self._refuse_misuse()
        first = not self._looked
        refuse_not_finite(images, {}, f"unlabelled {OF_IMAGES}", first=first)
        self._mean_teacher.start()
        for ending in self._endings or ():
            ending.forget()  # what a forward of labelled images, or a validation of the mean teacher, may have left
        self._skipped = False
        logits = self._select(self._mean_teacher.predict(images), images, 1)[1]
        classes = logits.shape[1]
        refuse_class(self.ignore_index, classes, overlapping=self.overlapping)
        if first:
            self._refuse_activation_in_evaluation(images)
            refuse_other_ending(self._model, ending_named(self.output), classes, overlapping=self.overlapping)
        if self.deep is not None and self.deep.num_classes != classes:
            raise ReSegError(
                f"the output that was taken for logits has {classes} channels, the heads of deep supervision have "
                f"{self.deep.num_classes}; pass output= with the path to the logits"
            )
        label, confidence = predicted(logits, overlapping=self.overlapping)
        taken = self._per_class(label, classes)
        label = sure_label(label, confidence, self.threshold, self.ignore_index)
        shares = self._per_class(label, classes) / taken
        mixed, label = self.exchange(images, label)
        if self.perturb is not None:
            mixed = perturbed(mixed, self.perturb)
        refuse_not_finite(mixed, {}, "perturb= returned NaN or infinite values for finite images", first=first)
        return Mixed(mixed, label, shares)

    def _refuse_activation_in_evaluation(self, images: Tensor) -> None:
        """Raise a ReSegError if the mean teacher predicts in evaluation mode, and returns probabilities there."""
        # with endings, the logits are those of a module in either mode
        if not self._mean_teacher.average_buffers or self._endings or not readable(images.device, first=True):
            return
        activation = ending_of(self._select(in_evaluation(self.average, images), images, 1)[1])
        if activation is not None:
            raise ReSegError(
                f"the model ends in a {activation} in evaluation mode, in which the mean teacher predicts here, and "
                "pseudo-labels are made from logits: return logits in evaluation as well, and apply the "
                f"{activation} where you predict; or let the mean teacher predict in training mode (joint=False, "
                "average_buffers=False)"
            )

    def exchange(self, images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, *spatial) and their pseudo-label, with boxes from other images. Override it to mix differently.

        Raises:
            ReSegError: the label does not belong to these images.
        """
        images, label = plain_images(images), plain_label(label)
        axes = images.ndim - 2
        if label.ndim <= axes or len(label) != len(images) or label.shape[-axes:] != images.shape[2:]:
            raise ReSegError(f"the pseudo-label must fit the images, {outline(images)}, got {outline(label)}")
        box = random_boxes(images)
        return mix(images, box), mix(label, box)

    def select(self, output: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """The model's prediction (B, C, *spatial) among what it returned for images, and its logits.

        They are the same tensor, unless the model ends in a sigmoid or softmax module.

        Raises:
            ReSegError: there is no such tensor, it has no gradient, is not finite, or comes from a sigmoid or softmax
                that is not a module.
        """
        prediction, logits = self._select(output, images, 0)
        if not prediction.requires_grad and any(p.requires_grad for p in self._model.parameters()):
            raise ReSegError("the model's output has no gradient: the model ran under no_grad, or it was detached")
        refuse_not_finite(logits, {}, OF_MODEL, first=not self._looked)
        if not self._looked:
            self._looked = True
            what = (
                "pseudo-labels are made from logits (if the model returns logits as well, name them by output=; if a "
                "module turns logits into probabilities, pass output='in:' and its path)"
            )
            activation = (ending_of if readable(logits.device, first=True) else activation_of)(logits)
            refuse_probabilities(activation, what, self._model)
        return prediction, logits

    def value(
        self,
        prediction: Tensor,
        y: Mixed,
        task_loss: TaskLoss,
        *,
        name: str = "task_loss",
        instead: str = INSTEAD,
    ) -> Tensor:
        """The task loss of the mixed images on the sure pixels, without weight and ramp. It counts as a call.

        Args:
            prediction: of the mixed images, (B, channels, *spatial): the first value that `select` returned.
            y: what `mix` returned.
            task_loss: as in `loss`.
            name: of the argument that `task_loss` was passed as, for messages.
            instead: what to pass if `task_loss` cannot ignore a label value, for messages.

        Raises:
            ReSegError: the prediction does not belong to the mixed images, or `task_loss` fails, or does not ignore
                `ignore_index`.
        """
        if not isinstance(y, Mixed):
            raise ReSegError(f"y= must be what mix() returned, got {outline(y)}")
        if not isinstance(prediction, Tensor) or (len(prediction), *prediction.shape[2:]) != (
            len(y.images),
            *y.images.shape[2:],
        ):
            raise ReSegError(
                f"the prediction must fit the mixed images, {outline(y.images)}, got {outline(prediction)}"
            )
        if prediction.shape[1] != len(y.sure) and not (prediction.shape[1] == 1 and len(y.sure) == 2):
            raise ReSegError(
                f"the model returned {prediction.shape[1]} channels for the mixed images, its mean teacher "
                f"{len(y.sure)} classes; pass output= with the path to the logits"
            )
        self._ask(task_loss, prediction, y.label, name, instead)
        sure = y.label != self.ignore_index
        counts = sure.any()
        # most losses are NaN where everything is ignored
        target = torch.where(counts, y.label, torch.zeros_like(y.label))
        value = counts * value_of(task_loss, prediction, target, "unlabelled images", name)
        refuse_not_finite(value, {}, f"{name} is NaN or infinite for unlabelled images, although the logits are finite")
        self._shares = y.sure
        self._last = {"sure": sure.float().mean()}
        self._calls += 1
        self.forgotten.check(self._model)
        return value

    def update(self) -> None:
        """Move the mean teacher towards the model; call it once after each optimizer step.

        Raises:
            ReSegError: the model's parameters are not those it had when this was built.
        """
        # at weight 0 no forward of its own brings its buffers up to date
        self._mean_teacher.update(buffers=self._weight == 0 or self._skipped)
        self.forgotten.updated()

    def reset(self) -> None:
        """Start over: the mean teacher becomes the model as it is now, in place, and the ramp restarts at 0.

        The first `loss` or `update` does this by itself, so the model may still get other weights before then.

        Raises:
            ReSegError: the model's parameters or buffers are not those it had when this was built.
        """
        self._mean_teacher.reset()
        self._calls = 0
        self.forgotten.updated()

    def remove(self) -> None:
        """Remove all hooks; the loss raises from now on, and the mean teacher stays. May be called twice."""
        super().remove()
        for ending in self._endings or ():
            ending.remove()

    def stats(self) -> dict[str, float]:
        """The last call's values, for a log: "loss" (unweighted), "weight", and "sure", the share of pixels that count.

        "weight" is the factor of that call's loss, ramp included. "sure/1" is the share of sure pixels among those that
        the mean teacher predicts as class 1; it is NaN if there are none. Reading them waits for the device.
        """
        shares = [] if self._shares is None or not self._last else self._shares.tolist()
        return super().stats() | {f"sure/{c}": share for c, share in enumerate(shares)}

    def _state(self) -> dict[str, Any]:
        # everything except `perturb`. Random numbers are torch's: save its random states, too, as for dropout
        return {
            "rampup_steps": self.rampup_steps,
            "ignore_index": self.ignore_index,
            "threshold": self.threshold,
            "ema_decay": self.ema_decay,
            "average_buffers": self._mean_teacher.average_buffers,
            "overlapping": self.overlapping,
            "output": list(self.output) if isinstance(self.output, tuple) else self.output,
            "started": self._mean_teacher.started,
            "average": dict(self.average.state_dict()),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        rampup_steps, threshold, decay = _checked(state["rampup_steps"], state["threshold"], state["ema_decay"])
        check_number("ignore_index", state["ignore_index"], whole=True)
        output, endings = self._hooked(state["output"])
        try:
            load_states((self.average, state["average"]))
        except ReSegError:
            for ending in endings or ():
                ending.remove()
            raise
        for ending in self._endings or ():
            ending.remove()
        self.output, self._endings = output, endings
        self._rampup_steps, self._threshold, self._mean_teacher.decay = rampup_steps, threshold, decay
        self.ignore_index, self.overlapping = state["ignore_index"], state["overlapping"]
        self._mean_teacher.average_buffers = state["average_buffers"]
        self._mean_teacher.started = state["started"]
        self._asked.clear()  # of another ignore_index

    def _told(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rampup_steps", "threshold", "ema_decay", "ignore_index")}

    def _beside(self) -> list[nn.Module]:
        return [self.average]

    def _hooked(self, output: Any) -> tuple[Any, tuple[Ending, Ending] | None]:
        """`output` as it is stored and, if it is the input of a module, the recorders of that input in both networks.

        Raises:
            ReSegError: it is not a path, or there is no such module, or it is not a sigmoid or softmax.
        """
        path = ending_named(output)
        if path is None:
            return as_path(output), None
        endings = Ending(self._model, path), Ending(self.average, path, grad=False)
        if self._removed:
            for ending in endings:
                ending.remove()
        return output, endings

    def _select(self, output: Any, images: Tensor, which: int) -> tuple[Tensor, Tensor]:
        """Prediction and logits in an output of the model (0) or of the mean teacher (1)."""
        path = None if isinstance(self.output, str) else self.output
        if which == 1 and self._mean_teacher.average_buffers and isinstance(output, Tensor):
            path = None  # a model may return more in training than in evaluation
        prediction = full_size(output, len(images), tuple(images.shape[2:]), path)
        return prediction, prediction if self._endings is None else self._endings[which].logits(prediction)

    def _per_class(self, label: Tensor, channels: int) -> Tensor:
        return pixels_per_class(label, max(channels, 2), overlapping=self.overlapping)

    def _ask(
        self,
        task_loss: TaskLoss,
        prediction: Tensor,
        label: Tensor,
        name: str = "task_loss",
        instead: str = INSTEAD,
    ) -> None:
        """Check at its first call that a task loss ignores `ignore_index`."""
        asked = id(getattr(task_loss, "__code__", task_loss))  # a function may be made anew for each call
        if asked not in self._asked and len(self._asked) < ASKED_LOSSES:
            _check_ignoring(task_loss, prediction.detach(), label, self.ignore_index, name, instead)
            self._asked.add(asked)

    def _check_deep(self) -> None:
        deep = self.deep
        if deep is None:
            return
        if not isinstance(deep, DeepSupervision):
            raise ReSegError(f"deep= must be the model's DeepSupervision, got {type(deep).__name__}")
        refuse_other_heads(deep, self._model, self.ignore_index)
        if self._endings is not None and deep.ending != self.ending:
            raise ReSegError(
                f"the logits are the input of the module {self.ending!r}, but the heads of deep supervision pass "
                f"task_loss {'logits' if deep.ending is None else f'the output of {deep.ending!r}'}; a model that "
                "returns both logits and probabilities is trained on the logits: pass output= with the path to them"
            )


class _Forgotten:
    """Warns once if the parameters change 20 times without an `update`; a loop needs one `update` per change."""

    def __init__(self) -> None:
        self._calls, self._told = 0, False

    def updated(self) -> None:
        """Note an `update`."""
        self._calls = 0

    def check(self, model: nn.Module) -> None:
        """Count a call, and the changes on the device; the device is only read after 20 calls without an update."""
        if self._calls == 0:
            trained = [p for p in model.parameters() if p.requires_grad]
            self._ends = [trained[0], trained[-1]] if trained else []  # either may belong to a part that does not run
        if not self._ends or self._told or not readable(self._ends[0].device, first=True):
            return
        ends = [p.detach() for p in self._ends]
        if self._calls == 0:
            self._seen, self._changes = [p.clone() for p in ends], torch.zeros((), device=ends[0].device)
        else:  # fused optimizers leave no other mark than the values themselves
            first, last = ((p != seen).any() for p, seen in zip(ends, self._seen))
            self._changes += first | last.to(first.device)
            for p, seen in zip(ends, self._seen):
                seen.copy_(p)
        self._calls += 1
        if self._calls > FORGOTTEN_STEPS and self._calls % FORGOTTEN_STEPS == 1 and self._changes >= FORGOTTEN_STEPS:
            self._told = True
            warn(
                f"{FORGOTTEN_STEPS} changes of the parameters without update(): the mean teacher does not learn; call "
                "update() after each optimizer step"
            )


def _checked(rampup_steps: Any, threshold: Any, ema_decay: Any) -> tuple[int | None, float, float]:
    return _checked_rampup(rampup_steps), _checked_threshold(threshold), _checked_decay(ema_decay)


def _checked_rampup(value: Any) -> int | None:
    return None if value is None else check_number("rampup_steps", value, least=1, whole=True)


def _checked_threshold(value: Any) -> float:
    return check_number("threshold", value, least=0, most=1)


def _checked_decay(value: Any) -> float:
    return check_number("ema_decay", value, least=0, below=1)


def _check_ignoring(
    task_loss: TaskLoss, logits: Tensor, like: Tensor, ignore_index: int, name: str, instead: str
) -> None:
    """Raise a ReSegError unless the loss ignores `ignore_index`. This is checked before any prediction is sure.

    Without this check, a loss that fails on the value would fail in the middle of training, on CUDA without a message.
    """
    if logits.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    label = torch.full_like(like, ignore_index)
    label.flatten(1)[:, : label[0].numel() // 2] = 0
    must = (
        f"it must ignore the label value {ignore_index}, as nn.CrossEntropyLoss(ignore_index={ignore_index}) does. "
        f"If the loss of the labelled images cannot, pass {instead}"
    )
    try:
        kept = preserved_state(task_loss) if isinstance(task_loss, nn.Module) else nullcontext()
        with torch.enable_grad(), preserved_rng(), kept:  # a loss may draw random numbers, or count its calls
            logits = logits.requires_grad_()
            value = value_of(task_loss, logits, label, "a label with pixels that do not count", name)
            (gradient,) = torch.autograd.grad(value, logits)
        ignored = (label == ignore_index).unsqueeze(1) if label.ndim < gradient.ndim else label == ignore_index
        leaves_out = bool((gradient.isfinite().all() & ~(gradient != 0).logical_and(ignored).any()).item())
    except torch.OutOfMemoryError:
        raise
    except ReSegError as error:
        raise error if error.__cause__ is None else ReSegError(f"{error}; {must}") from error.__cause__
    except Exception as error:
        raise ReSegError(f"{name} failed on a label of shape {tuple(label.shape)}, int64, with pixels that do not "
                         f"count; {must} ({type(error).__name__}: {error})") from error  # fmt: skip
    if not leaves_out:
        raise ReSegError(f"{name} has a gradient at pixels that do not count, or its gradient is not finite; {must}")


def refuse_class(ignore_index: int, channels: int, *, overlapping: bool) -> None:
    """Raise a ReSegError if the value of pixels that do not count is a class of a model with so many channels."""
    classes = 2 if overlapping else max(channels, 2)
    if 0 <= ignore_index < classes:
        what = "a normal value of this label (0 or 1)" if overlapping else f"one of the model's {classes} classes"
        raise ReSegError(
            f"ignore_index={ignore_index} is {what}; it marks the pixels that do not count, so choose a value that is "
            f"not a class, for instance {max(classes, 255)}"
        )


def _plain(forward: Any) -> Any:
    while isinstance(getattr(forward, "_orig_mod", None), nn.Module):
        forward = forward._orig_mod
    return forward


def refuse_two_forwards(forward: Any, model: nn.Module) -> None:
    """Raise a ReSegError for a DistributedDataParallel that cannot run the model twice a step."""
    forward = _plain(forward)
    if forward is not model:  # which alone is not reduced at each forward
        refuse_join(model, "this loss runs the model twice a step")
    if BROADCASTS_TWICE or forward is model:
        return
    # a function may call it
    wrappers = [forward] if isinstance(forward, nn.Module) else wrappers_of(model)
    if any(isinstance(x, DistributedDataParallel) and x.will_sync_module_buffers() for x in wrappers):
        raise ReSegError(
            "before torch 2.13, DistributedDataParallel cannot copy rank 0's buffers in two forwards a step, because "
            "the backward of the first one then fails: build it with broadcast_buffers=False"
        )


def plain_images(images: Any) -> Tensor:
    """The images as a plain tensor: element 0 of a list, MetaTensor unwrapped."""
    images = unwrapped(images)
    if not is_dense(images) or images.ndim not in (4, 5) or not images.is_floating_point():
        raise ReSegError(
            f"unlabelled images must be a dense float tensor (B, C, H, W) or (B, C, D, H, W), got {outline(images)}"
        )
    if len(images) < 2:
        what = "one unlabelled image has no other" if len(images) else "an empty batch has no unlabelled images"
        raise ReSegError(f"{what} to be mixed with: use batches of at least 2 (drop_last=True)")
    return images
