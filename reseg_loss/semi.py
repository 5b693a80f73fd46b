"""Few labels in one object: deep supervision, and a mean teacher that labels the unlabelled images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .common.distributed import wrappers_of
from .common.inputs import OF_IMAGES, is_dense, readable, refuse_not_finite, value_of
from .common.labels import FEW_OPERATORS, plain_label, unwrapped
from .common.outputs import (
    activation_of,
    as_path,
    coarser_outputs,
    ending_named,
    full_size,
    in_training,
    loss_of_logits,
    refuse_other_ending,
    refuse_probabilities,
)
from .consistency import CutMixConsistency, Mixed, plain_images, refuse_class, refuse_two_forwards
from .errors import ReSegError, TapError, outline, warn
from .mixing import pixels_per_class, random_intensities
from .recording.copying import compiler_of, unwrap
from .recording.extractor import FeatureExtractor
from .regularizer import Regularizer
from .supervision import DeepSupervision, HeadOutputs, TaskLoss, coarse_loss, refuse_other_heads
from .task_losses import BinaryCrossEntropyDiceLoss, CrossEntropyDiceLoss

OURS = (CrossEntropyDiceLoss, BinaryCrossEntropyDiceLoss)  # which take logits, whatever a model ends in
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
IGNORED = 255  # the label value of pixels that do not count, unless the task loss has its own
UNSURE_STEPS = 500  # after the ramp, without a sure pixel of a class that the labels have
BETWEEN_LOOKS = 100  # steps after which the device is asked
NO_CLASS = -1  # in place of a class that we have told of


class Targets(NamedTuple):
    """What `SemiSupervised.mix` returns along with the images: what the model has to learn from them."""

    images: Tensor
    label: Tensor
    mixed: Mixed | None
    """The unlabelled part, which comes last in `images`; None at weight 0."""


class SemiSupervised(Regularizer):
    """The whole loss of a step with labelled and unlabelled images, and the mean teacher that goes with it.

    The mean teacher (an average of the model over its training) predicts the unlabelled images. In each image, a box
    is replaced by the same box of another image, and the intensities are changed (`CutMixConsistency`). The model runs
    on the labelled images and on these mixed ones. The loss is `labelled + weight * ramp * unlabelled`. Each of the two
    parts is the task loss of the model's output plus that of its coarser levels (`DeepSupervision`). Unlabelled pixels
    only count where the mean teacher is sure. Keep the mean teacher (`average`): it segments better than the model.

    ```python
    from reseg_loss import SemiSupervised, batches

    semi = SemiSupervised(model, example_input=image, rampup_steps=2000)
    optimizer = torch.optim.SGD([*model.parameters(), *semi.parameters()], 0.01, momentum=0.9)
    for image, label, unlabelled in batches(train_loader, unlabelled_loader, steps=10_000):
        loss = semi.loss(image, label, unlabelled)  # the whole loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        semi.update()  # the mean teacher follows
    semi.remove()
    torch.save(semi.average.state_dict(), "model.pt")  # the bare model's keys
    ```

    - **Batch statistics.** A model without batch normalisation runs once, on labelled and mixed images together. A
      model with batch normalisation runs twice, once on each kind. Set `joint` to override this. In one joint forward,
      the noise on the mixed images also enters the statistics of the labelled ones. On 3 patients of ACDC that cost
      the mean teacher 0.8 points at equal GPU time (benchmarks/results/ssl4mis.md, joint, averaged buffers).
    - **The mean teacher** runs on the unlabelled images alone, before they are mixed. Its modules are in the same
      modes as the model's. So its batch normalisation uses the statistics of these images and keeps its own running
      statistics, and dropout is on. The exception is a model with batch normalisation that runs once: its mean teacher
      is in evaluation mode, with an average of the model's buffers. (With its own statistics it would lose 6.7 points
      there.)
    - **Memory.** If one forward on both kinds does not fit, use `DeepSupervision` and `CutMixConsistency`, with a
      backward after each part.

    Args:
        model: as in `CutMixConsistency`. If torch.compile is among its wrappers, the mean teacher is compiled, too.
        example_input: an image batch as the model takes it. It may only be left out before `load_state_dict`.
        rampup_steps: number of calls of `loss` over which the unlabelled loss grows to its full weight, for instance
            40 % of the run. None uses the full weight from the start.
        task_loss: a function of the model's output (B, classes, *spatial) and a label. If the model ends in a sigmoid
            or softmax module, the function gets the probabilities. Default: `task_losses.CrossEntropyDiceLoss`, or
            `BinaryCrossEntropyDiceLoss` for one channel or overlapping classes. These two always get logits. Pixels
            that do not count are labelled with its `ignore_index`, or 255 if it has none.
        unlabelled_loss: the loss on the pseudo-labels, if `task_loss` cannot ignore a label value; default `task_loss`.
        deep: "auto" uses the coarser outputs that the model itself returns in training (its own deep supervision). If
            there are none, it puts heads on the decoder (`DeepSupervision`). If that is impossible, it warns and
            trains without. None switches deep supervision off. Or pass a `DeepSupervision` of this model, with the
            same `ignore_index`.
        joint: True for one forward of all images, False for one forward of each kind. None means one forward, or two
            if the model has batch normalisation.
        overlapping: classes may overlap: labels are (B, classes, *spatial), and each channel is a sigmoid. A model that
            ends in a sigmoid module with several channels needs it.
        weight: a factor of the unlabelled loss; it may change between steps. At 0 the mean teacher still follows the
            model, buffers included, and the unlabelled images are not used.
        threshold: a prediction is sure if its probability is at least this.
        ema_decay: decay of the average, per `update`.
        perturb: as in `CutMixConsistency`.
        output: as in `CutMixConsistency`. A sigmoid or softmax module at the model's end is found automatically.

    Raises:
        ReSegError: as in `DeepSupervision` and `CutMixConsistency`.
    """

    ENTRIES: ClassVar[Mapping[str, Any]] = {
        "joint": bool,
        "supervised": str,
        "consistency": dict,
        "deep": (dict, None),
        "unsure": ([int], None),
        "labelled": ([bool], None),
    }

    def __init__(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        rampup_steps: int | None,
        task_loss: TaskLoss | None = None,
        unlabelled_loss: TaskLoss | None = None,
        deep: DeepSupervision | Literal["auto"] | None = "auto",
        joint: bool | None = None,
        overlapping: bool = False,
        weight: float = 1.0,
        threshold: float = 0.95,
        ema_decay: float = 0.99,
        perturb: Callable[[Tensor], Tensor] | None = random_intensities,
        output: int | str | Sequence[int | str] | None = None,
    ) -> None:
        super().__init__(model, weight)
        if not (joint is None or isinstance(joint, bool)):
            raise ReSegError(f"joint={joint!r}; it is True, False, or None for what suits the model")
        self._forward = model
        statistics = any(isinstance(m, BATCH_NORM) for m in self._model.modules())
        self.joint = not statistics if joint is None else joint
        self.task_loss, self.unlabelled_loss = task_loss, unlabelled_loss
        self._ours = tuple(loss(IGNORED) for loss in OURS)
        ignore_index = _ignored_value(task_loss, unlabelled_loss)
        self._deep: DeepSupervision | None = None
        self._supervised: Literal["heads", "outputs", "nothing", ""] = ""  # "": not known yet
        self._bound = example_input is not None
        if example_input is not None:
            output, deep = self._look(example_input, output, deep, ignore_index, overlapping=overlapping)
        if isinstance(deep, DeepSupervision):
            refuse_other_heads(deep, self._model, ignore_index)
            self._deep, self._supervised = deep, "heads"
        elif deep is None:
            self._supervised = self._supervised or "nothing"
        elif deep != "auto":
            raise ReSegError(f"deep={deep!r}; it is 'auto', None or a DeepSupervision")
        # last, for a copy is large
        self._consistency = CutMixConsistency(
            model,
            rampup_steps=rampup_steps,
            ignore_index=ignore_index,
            weight=weight,
            threshold=threshold,
            ema_decay=ema_decay,
            perturb=perturb,
            average_buffers=self.joint and statistics,
            overlapping=overlapping,
            output=output,
        )
        self._unsure: Tensor | None = None  # for each class, the steps after the ramp since it last had a sure pixel
        self._labelled: Tensor | None = None  # for each class, whether a label had it
        self._told_of: set[int] = set()
        self._looked = self._judged = False  # at the images and at the loss of a first call

    @property
    def overlapping(self) -> bool:
        """Whether classes may overlap."""
        return self._consistency.overlapping

    @property
    def average(self) -> nn.Module:
        """The mean teacher, a copy of the model with its state_dict keys: `semi.average.eval()(image)` segments."""
        return self._consistency.average

    @property
    def deep(self) -> DeepSupervision | None:
        """The heads on the model's decoder, if there are any."""
        return self._deep

    @property
    def consistency(self) -> CutMixConsistency:
        """The part that mixes the unlabelled images and holds the mean teacher.

        Its `threshold`, `rampup_steps`, `ema_decay` and `perturb` may be changed.
        """
        return self._consistency

    def parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters, for your optimizer; none if the model has its own deep supervision.

        Raises:
            ReSegError: there was no example, so it is not known yet whether there are heads.
        """
        self._need_bound()
        return iter(()) if self._deep is None else self._deep.parameters()

    def loss(
        self,
        image: Any,
        label: Any,
        unlabelled: Any,
        *,
        weight: float | Tensor | None = None,
        forward: Callable[[Tensor], Any] | None = None,
    ) -> Tensor:
        """The whole loss of a step. It runs the mean teacher and the model, under the caller's autocast.

        Args:
            image: (B, C, *spatial), float. If it is a list, element 0 is used. `image`, `label` and `unlabelled` are
                moved to the model's device.
            label: as `task_loss` takes it: (B, *spatial); also (B, 1, *spatial) for one channel; (B, classes, *spatial)
                for overlapping classes.
            unlabelled: other images, (N, C, *spatial), N at least 2.
            weight: replaces `self.weight` times the ramp, unless `self.weight` is 0. In a step that is captured as a
                CUDA graph it must be a tensor, because the ramp is computed in Python and would be frozen.
            forward: called to run the model, in place of the `model` that this was built with. For instance a wrapper
                of the model that was made later. The mean teacher gets the images themselves, so what prepares them
                belongs into the model, or before this loss.

        Returns:
            A scalar.

        Raises:
            ReSegError: images or label do not fit each other or the model, or are not finite; gradients are off, or
                the model is in evaluation; a task loss fails, or does not ignore the ignored value.
            TapError: a tap of the heads did not fire.
        """
        forward = self._forward if forward is None else forward
        if forward is self._model and any(unwrap(each) is self._model for each in wrappers_of(self._model)):
            raise ReSegError(
                "the model was wrapped in DistributedDataParallel after this was built, and its gradients would not be "
                "averaged over the processes: pass loss(..., forward=the wrapped model)"
            )
        compiler = compiler_of(forward)
        if compiler is not None:
            self._consistency.compile(compiler)
        if self.joint:
            x, y = self.mix(image, label, unlabelled)
            with self.record():
                return self.loss_of(forward(x), y, weight=weight)
        image, label = self._labelled_part(image, label)
        mixed = None
        if self.weight != 0:
            refuse_two_forwards(forward, self._model)
            mixed = self._consistency.mix(self._moved(plain_images(unlabelled)))
        parts = []
        for images in [image] if mixed is None else [image, mixed.images]:
            with self.record():
                parts += self._parts(forward(images), images, [len(images)])
        return self._sum(parts, label, mixed, weight)

    def mix(self, image: Any, label: Any, unlabelled: Any) -> tuple[Tensor, Targets]:
        """The images that the model has to run on in this step, and the targets for `loss_of`.

        For loops in which something else runs the model, and runs it once (`joint`): `x, y = semi.mix(image, label,
        unlabelled)`, then `semi.loss_of(model(x), y)`. The labelled images come first, unchanged.

        Args:
            image: as in `loss`.
            label: as in `loss`.
            unlabelled: as in `loss`, of the same size as the labelled images.

        Returns:
            The images, (B + N, C, *spatial), and their targets.

        Raises:
            ReSegError: as in `loss`, or `joint` is False.
        """
        if not self.joint:
            raise ReSegError(
                "the model runs twice a step here (it has batch normalisation, or joint=False), and mix() is for one "
                "forward only. Call loss(image, label, unlabelled), which runs both; pass forward= if something other "
                "than the model itself must be called"
            )
        image, label = self._labelled_part(image, label)
        if self.weight == 0:
            return image, Targets(image, label, None)
        unlabelled = self._moved(plain_images(unlabelled))
        if (unlabelled.shape[1:], unlabelled.dtype) != (image.shape[1:], image.dtype):
            raise ReSegError(
                f"labelled images are {outline(image)}, the others {outline(unlabelled)}; for one forward they must "
                "have the same size and dtype: crop them alike, or build SemiSupervised(..., joint=False)"
            )
        mixed = self._consistency.mix(unlabelled)
        x = torch.cat([image, mixed.images])
        return x, Targets(x, label, mixed)

    def loss_of(self, output: Any, y: Targets, *, weight: float | Tensor | None = None) -> Tensor:
        """The whole loss, from what the model returned for the images from `mix`.

        Args:
            output: what the model returned, with its graph.
            y: what `mix` returned with the images.
            weight: as in `loss`.

        Returns, Raises: as in `loss`.
        """
        try:
            if not isinstance(y, Targets) or not (isinstance(y.images, Tensor) and isinstance(y.label, Tensor)):
                raise ReSegError(f"y= must be the second value that mix() returned, got {outline(y)}")
            images, label, mixed = y
            sizes = [len(images)] if mixed is None else [len(images) - len(mixed.images), len(mixed.images)]
            return self._sum(self._parts(output, images, sizes), label, mixed, weight)
        except BaseException:
            extractor = self._extractor_if_any()
            if extractor is not None:
                extractor.forget()  # no other label may meet these features
            raise

    def update(self) -> None:
        """Move the mean teacher towards the model; call it once after each optimizer step.

        Raises:
            ReSegError: the model's parameters are not those it had when this was built.
        """
        self._consistency.update()

    def reset(self) -> None:
        """Start over: the mean teacher becomes the model as it is now, in place, and the ramp restarts at 0."""
        self._consistency.reset()
        self._calls, self._unsure, self._labelled = 0, None, None
        self._told_of.clear()

    def remove(self) -> None:
        """Remove all hooks: the model is as it was, and the loss raises from now on. May be called twice."""
        super().remove()
        self._consistency.remove()
        if self._deep is not None:
            self._deep.remove()

    def stats(self) -> dict[str, float]:
        """The last call's values, for a log. Reading them waits for the device.

        "labelled" and "unlabelled" are the task losses of the model's output. "labelled/deep" and "unlabelled/deep" are
        the sums over its coarser levels. "weight" is the factor of the unlabelled losses, ramp included. "sure" is the
        share of unlabelled pixels that count. "sure/1" is that share among the pixels that the mean teacher predicts as
        class 1; it is NaN if there are none.
        """
        found = super().stats()
        sure = {name: value for name, value in self._consistency.stats().items() if name.startswith("sure")}
        return found | (sure if "unlabelled" in found else {})

    # --- the step

    def _labelled_part(self, image: Any, label: Any) -> tuple[Tensor, Tensor]:
        self._refuse_misuse()
        self._need_bound()
        image = unwrapped(image)
        if not is_dense(image) or image.ndim not in (4, 5) or not image.is_floating_point() or not len(image):
            raise ReSegError(
                f"images must be a dense, non-empty float tensor (B, C, H, W) or (B, C, D, H, W), got {outline(image)}"
            )
        image, label = self._moved(image), self._moved(plain_label(label))
        forms = (image.ndim - 1, image.ndim)
        if label.ndim not in forms or len(label) != len(image) or label.shape[2 - image.ndim :] != image.shape[2:]:
            raise ReSegError(f"the label, {outline(label)}, does not fit the images, {outline(image)}")
        refuse_not_finite(image, {}, OF_IMAGES, first=not self._looked)
        self._looked = True
        return image, label

    def _need_bound(self) -> None:
        if not self._bound:
            raise ReSegError("the model is not known: pass example_input= (an image batch), or call load_state_dict")

    def _moved(self, tensor: Any) -> Any:
        parameter = next(self._model.parameters(), None)
        if parameter is None or not isinstance(tensor, Tensor):
            return tensor
        return tensor.to(parameter.device, non_blocking=True)

    def _parts(self, output: Any, images: Tensor, sizes: list[int]) -> list[_Part]:
        """The model's output for images, split along the batch, and the outputs of the coarser levels for each part."""
        self._refuse_misuse()
        prediction, logits = self._consistency.select(output, images)
        deep: Sequence[HeadOutputs | list[Tensor] | None] = [None] * len(sizes)
        if self._supervised == "outputs":
            levels = coarser_outputs(output, prediction)
            if not levels:
                raise ReSegError(
                    "the model returned coarser outputs (its own deep supervision) when this was built, and none "
                    "now: switch its deep supervision on again, or build a new SemiSupervised"
                )
            deep = [list(part) for part in zip(*(level.split(sizes) for level in levels))]
        elif self._deep is not None and self._deep.weight:
            deep = self._deep.outputs().split(sizes)
        return [_Part(*parts) for parts in zip(prediction.split(sizes), logits.split(sizes), deep)]

    def _sum(self, parts: Sequence[_Part], label: Tensor, mixed: Mixed | None, weight: float | Tensor | None) -> Tensor:
        """The loss of a labelled part and, with `mixed`, of an unlabelled one."""
        factor = self._consistency.factor_of(weight)
        labelled = parts[0]
        one = self.overlapping or labelled.logits.shape[1] == 1
        task_loss = self._ours[one] if self.task_loss is None else self.task_loss
        main = value_of(task_loss, labelled.for_loss(task_loss), label, "labelled images")
        said = (
            "task_loss is NaN or infinite for the labelled images, although their logits are finite: check the label "
            "(most losses are NaN if every pixel is ignored)"
        )
        refuse_not_finite(main, {}, said, first=not self._judged)
        self._judged = True
        levels = self._levels_loss(labelled.deep, label, task_loss)
        total = main + levels
        self._last = {"labelled": main.detach(), "labelled/deep": levels.detach(), "weight": 0.0}
        if mixed is None:
            self._consistency.forgotten.check(self._model)
            return total
        name = "task_loss" if self.unlabelled_loss is None else "unlabelled_loss"
        loss = task_loss if self.unlabelled_loss is None else self.unlabelled_loss
        prediction = parts[1].for_loss(loss)
        main = self._consistency.value(prediction, mixed, loss, name=name, instead="another as unlabelled_loss=")
        levels = self._levels_loss(parts[1].deep, mixed.label, loss)
        self._last |= {"unlabelled": main.detach(), "unlabelled/deep": levels.detach()}
        self._last["weight"] = factor.detach() if isinstance(factor, Tensor) else factor
        self._look_at_classes(label, mixed)
        self._calls += 1
        return total + factor * (main + levels)

    def _levels_loss(self, deep: HeadOutputs | list[Tensor] | None, label: Tensor, task_loss: TaskLoss) -> Tensor:
        """The task loss of the coarser levels, summed, each with the weight of its head."""
        if isinstance(deep, HeadOutputs):
            assert self._deep is not None
            ending = None if isinstance(task_loss, OURS) else self._consistency.ending
            of_heads = loss_of_logits(task_loss, self._model, ending)
            return self._deep.weight * self._deep.loss_of(deep, label, of_heads)
        ignored = self._consistency.ignore_index
        values = [
            coarse_loss(x, label, task_loss, ignored, f"coarser output {i + 1}") for i, x in enumerate(deep or [])
        ]
        return torch.stack(values).sum() if values else torch.zeros((), device=label.device)

    def _look_at_classes(self, label: Tensor, mixed: Mixed) -> None:
        """Count how long each class has had no sure pixel since the ramp; warn if the labels contain such a class."""
        classes, device = len(mixed.sure), mixed.sure.device
        if self._unsure is None or self._labelled is None or len(self._unsure) != classes:
            self._unsure = torch.zeros(classes, dtype=torch.int64, device=device)
            self._labelled = torch.zeros(classes, dtype=torch.bool, device=device)
        elif self._unsure.device != device:
            self._unsure, self._labelled = self._unsure.to(device), self._labelled.to(device)
        if label.dtype in FEW_OPERATORS:
            label = label.long()
        per_channel = label.ndim == mixed.images.ndim and (self.overlapping or label.shape[1] > 1)
        if not per_channel or label.shape[1] == classes:  # other forms are known to the task loss alone
            self._labelled |= pixels_per_class(label, classes, overlapping=per_channel) > 0
        calls = self._consistency.calls
        steps = calls - (self._consistency.rampup_steps or 0)
        if steps > 0:
            self._unsure.add_(1).mul_(~(mixed.sure > 0))
        if calls % BETWEEN_LOOKS or not readable(device, first=True):
            return
        ignored, first = self._consistency.ignore_index, 0 if self.overlapping else 1
        if NO_CLASS not in self._told_of and not self._labelled[first:].any() and (label == ignored).any():
            self._told_of.add(NO_CLASS)
            warn(
                f"in {calls} steps no label had anything but background, but labels have the value {ignored}, which "
                "does not count. If that is the foreground of an 8-bit mask, divide the mask by it"
            )
        wrong = (self._labelled & (self._unsure >= UNSURE_STEPS)).nonzero().flatten().tolist()
        for c in (c for c in wrong if c not in self._told_of):
            self._told_of.add(c)
            warn(
                f"the labels have class {c}, but the mean teacher was not sure of any pixel of it for {UNSURE_STEPS} "
                "steps after the ramp: the model learns this class from the labels alone, and may lose it. A longer "
                "rampup_steps or a lower threshold may help"
            )

    # --- what the model is

    def _look(
        self,
        example: Any,
        output: Any,
        deep: DeepSupervision | Literal["auto"] | None,
        ignore_index: int,
        *,
        overlapping: bool,
    ) -> tuple[Any, DeepSupervision | Literal["auto"] | None]:
        """`output` and `deep` as they suit the model, found by one forward in training mode."""
        ran = in_training(self._model, example)
        image, returned = ran.image, ran.output
        spatial = tuple(image.shape[2:])
        named = ending_named(output)
        path = None if named is not None else as_path(output)
        logits = full_size(returned, len(image), spatial, path)
        module = ran.module_of(logits)
        if named is not None and ran.made.get(named) is not logits:
            told = "from no such module" if module is None else f"from {module!r}"
            raise ReSegError(
                f"output={output!r}: the model's output does not come from a sigmoid or softmax module {named!r}, "
                f"but {told}"
            )
        if named is None and (activation := activation_of(logits)) is not None:
            if module is None or (path is not None and full_size(returned, len(image), spatial) is not logits):
                what = "pseudo-labels are made from logits (if the model returns logits as well, name them by output=)"
                refuse_probabilities(activation, what, self._model)
            output = f"in:{module}"
        refuse_class(ignore_index, logits.shape[1], overlapping=overlapping)
        refuse_other_ending(self._model, ending_named(output), logits.shape[1], overlapping=overlapping)
        if isinstance(deep, DeepSupervision) and deep.num_classes != logits.shape[1]:
            raise ReSegError(
                f"the output that is taken for logits has {logits.shape[1]} channels, the heads of deep supervision "
                f"have {deep.num_classes}; pass output= with the path to the logits, or build new heads"
            )
        if deep != "auto":
            return output, deep
        if ending_named(output) is None and coarser_outputs(returned, logits):
            self._supervised = "outputs"
            return output, None
        try:
            return output, DeepSupervision(self._model, example, num_classes=logits.shape[1], ignore_index=ignore_index)
        except TapError as error:
            warn(
                f"no heads of deep supervision on this model; it trains without them: {error}\n"
                "SemiSupervised takes heads on named taps as deep=DeepSupervision(model, example_input, taps=...)."
            )
            return output, None

    # --- of the base

    def _state(self) -> dict[str, Any]:
        self._need_bound()
        return {
            "joint": self.joint,
            "supervised": self._supervised,
            "consistency": self._consistency.state_dict(),
            "deep": None if self._deep is None else self._deep.state_dict(),
            "unsure": None if self._unsure is None else self._unsure.tolist(),
            "labelled": None if self._labelled is None else self._labelled.tolist(),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        supervised, deep = state["supervised"], self._deep
        if supervised not in ("heads", "outputs", "nothing") or (supervised == "heads") != (state["deep"] is not None):
            raise ReSegError(f"this state of SemiSupervised is inconsistent: it has {supervised!r} for coarser levels")
        if self._supervised not in ("", supervised):
            raise ReSegError(
                f"this state has {supervised} for coarser levels, this SemiSupervised has {self._supervised}"
            )
        ignored, known = state["consistency"].get("ignore_index"), self._consistency.ignore_index
        if ignored != known:
            raise ReSegError(f"this state ignores the label value {ignored}, the task losses here ignore {known}")
        unsure, labelled = _counters(state["unsure"], state["labelled"])
        before = None if deep is None else copy.deepcopy(deep.state_dict())
        if supervised == "heads":
            deep = DeepSupervision(self._model) if deep is None else deep
            if self._removed:
                deep.remove()
            deep.load_state_dict(state["deep"])
        try:
            if deep is not None:
                refuse_other_heads(deep, self._model, known)
            self._consistency.load_state_dict(state["consistency"])
        except Exception:
            if deep is not None:
                deep.remove() if before is None else deep.load_state_dict(before)
            raise
        self._deep, self._supervised, self._bound = deep, supervised, True
        self.joint, self._unsure, self._labelled = state["joint"], unsure, labelled

    def _told(self) -> dict[str, Any]:
        told = {"joint": self.joint, "deep": self._supervised or None}
        names = ("rampup_steps", "threshold", "ema_decay", "ignore_index")
        return told | {name: getattr(self._consistency, name) for name in names}

    def _beside(self) -> list[nn.Module]:
        return [self.average] if self._deep is None else [self.average, self._deep.heads]

    def _extractor_if_any(self) -> FeatureExtractor | None:
        return self._deep.extractor if self._deep is not None and self._bound else None

    def _arm(self) -> None:
        self._consistency.weight = self._weight


class _Part(NamedTuple):
    """For labelled or for mixed images: the model's output, its logits, and the outputs of its coarser levels."""

    prediction: Tensor
    logits: Tensor
    deep: HeadOutputs | list[Tensor] | None

    def for_loss(self, task_loss: TaskLoss) -> Tensor:
        """The full-size tensor that this task loss takes."""
        return self.logits if isinstance(task_loss, OURS) else self.prediction


def _ignored_value(task_loss: Any, unlabelled_loss: Any) -> int:
    """The label value that does not count: the task loss's own, or 255. Raises a ReSegError if the losses disagree."""
    values = {"task_loss": IGNORED} if task_loss is None else {}
    for name, loss in (("task_loss", task_loss), ("unlabelled_loss", unlabelled_loss)):
        if loss is not None and not callable(loss):
            raise ReSegError(f"{name} must be a function of the model's output and a label, got {type(loss).__name__}")
        value = getattr(loss, "ignore_index", None)
        if isinstance(value, Integral) and not isinstance(value, bool):
            values[name] = int(value)
    if len(set(values.values())) > 1:
        raise ReSegError(f"the two losses ignore different label values, {values}; give both the same ignore_index")
    return next(iter(values.values()), IGNORED)


def _counters(unsure: list[int] | None, labelled: list[bool] | None) -> tuple[Tensor | None, Tensor | None]:
    """For each class, the steps without a sure pixel and whether a label had it; a ReSegError if they are not valid."""
    if unsure is None or labelled is None:
        return None, None
    if len(unsure) != len(labelled) or not all(0 <= n < 2**63 for n in unsure):
        raise ReSegError(f"this state is inconsistent: it has counters for {len(unsure)} and {len(labelled)} classes")
    return torch.tensor(unsure, dtype=torch.int64), torch.tensor(labelled, dtype=torch.bool)
