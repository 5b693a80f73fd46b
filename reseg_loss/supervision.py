"""Deep supervision for any U-shaped model: 1x1 heads on its decoder, trained with it and dropped afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .common.distributed import UnmovedWarning, distributed, refuse_join, undistributed
from .common.dryrun import preserved_rng
from .common.inputs import OF_IMAGES, OF_MODEL, check_number, check_weight, refuse_not_finite, value_of
from .common.labels import FEW_OPERATORS, LabelEncoding, has_value, plain_label
from .common.outputs import is_activation, loss_of_logits, refuse_probabilities, select_output, trained_ending
from .common.state import load_states
from .errors import ReSegError, TapError, outline, warn
from .recording.extractor import FeatureExtractor
from .regularizer import Regularizer, nothing
from .taps import TapPlan, Trace, look
from .taps.named import parse_taps
from .taps.plain import PLAN, plan_from_dict, plan_to_dict, refuse_other_channels, same_taps

TaskLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadOutputs:
    """The heads' outputs for one forward, for its whole batch or a part of it.

    Attributes:
        logits: of each head by name, (B, classes, *spatial), the finest first.
        features: the decoder feature that each head ran on, (B, C, *spatial).
        image: the images of that forward, (B, C, *spatial).
    """

    logits: dict[str, Tensor]
    features: dict[str, Tensor]
    image: Tensor

    def split(self, sizes: Sequence[int]) -> list[HeadOutputs]:
        """The same for parts of the batch, of these sizes and in this order."""
        logits, features = (
            [dict(zip(x, part)) for part in zip(*(value.split(sizes) for value in x.values()))]
            for x in (self.logits, self.features)
        )
        return [HeadOutputs(*parts) for parts in zip(logits, features, self.image.split(sizes))]


class DeepSupervision(Regularizer):
    """1x1 heads on a model's decoder features, each trained with the task loss on the label at its level.

    The model's parameters and state_dict keys stay as they are. Train `parameters()` together with the model's, add
    `loss(label, task_loss)` to your loss, and drop the heads with `remove()` at the end. It can be used together with
    `ReSegWrapper` on the same model. Both record the model's features by the same rules (`FeatureExtractor`).

    Each level adds about as much as the task loss, so with three levels the loss is about four times as large:

    - The model's gradients grow, too. Adam and similar optimizers divide that out. SGD takes larger steps, so a
      learning rate that was tuned without deep supervision may be too large. A smaller `weight` reduces this.
    - If you clip gradients, clip the heads' together with the model's: `clip_grad_norm_([*model.parameters(),
      *ds.parameters()], ...)`. The norm is larger than before, so the same limit clips more.
    - The total loss cannot be compared with that of runs without deep supervision. Log the task loss separately, along
      with `stats()`.

    Args:
        model: any U-shaped nn.Module in 2D or 3D, or its DistributedDataParallel or torch.compile wrapper.
        example_input: an image batch as the model takes it, to find the taps and make the heads. It may only be left
            out before `load_state_dict`.
        num_classes: output channels of each head; 1 for a binary model. None takes the channels of the model's output.
        taps: as in `ReSegWrapper`; None finds them automatically.
        levels: strides of the levels to supervise; None is the default choice of `TapPlan.select`, as for the
            alignment.
        level_weights: one weight per level, finest first, relative to a weight of 1 for the main loss. None uses 1 for
            each level.
        weight: a factor of the whole loss; it may change between steps.
        ignore_index: the label value that your task loss ignores. A level whose label has no other value is left out
            (most losses would be NaN there).

    Raises:
        TapError: the model has no levels that can be paired, or a tap is unknown.
        ReSegError: the weights do not fit the levels, or the model ends in a sigmoid or softmax that is not a module.
    """

    ENTRIES: ClassVar[Mapping[str, Any]] = {
        "num_classes": int,
        "level_weights": [float],
        "ignore_index": (int, None),
        "ending": (str, None),
        "taps": PLAN,
        "heads": dict,
    }

    def __init__(
        self,
        model: nn.Module,
        example_input: Any = None,
        *,
        num_classes: int | None = None,
        taps: Mapping[str, Any] | None = None,
        levels: Sequence[int | Sequence[int]] | None = None,
        level_weights: Sequence[float] | None = None,
        weight: float = 1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(model, weight)
        parse_taps(taps)  # raises for invalid taps now, not later
        self._num_classes = (
            None if num_classes is None else check_number("num_classes", num_classes, least=1, whole=True)
        )
        self.level_weights = None if level_weights is None else _checked(level_weights)
        self.ignore_index = None if ignore_index is None else check_number("ignore_index", ignore_index, whole=True)
        self._extractor: FeatureExtractor | None = None
        self._heads: nn.Module | None = None
        self._ending: str | None = None
        self._checked = False
        self._told_of_gradients = False
        self._unmoved = UnmovedWarning(
            "the deep supervision heads",
            "pass ds.parameters() to your optimizer (semi.parameters() for SemiSupervised)",
        )
        if example_input is not None:
            plan, trace = look(self._model, example_input, taps=taps, levels=levels)
            activation, self._ending = trained_ending(self._model, example_input, trace.common_activation())
            if self._ending is None:
                what = "your task loss takes probabilities, but the heads return logits"
                refuse_probabilities(activation, what, self._model)
            if self._num_classes is None:
                self._num_classes = _channels(trace)
            self._extractor, self._heads = self._make(plan, self._num_classes, self.level_weights)

    @property
    def num_classes(self) -> int:
        """Output channels of each head."""
        self._need_bound()
        assert self._num_classes is not None
        return self._num_classes

    @property
    def extractor(self) -> FeatureExtractor:
        """The model's taps; `print` it to see the levels of the U."""
        self._need_bound()
        assert self._extractor is not None
        return self._extractor

    @property
    def heads(self) -> nn.ModuleDict:
        """The 1x1 convolutions by name: decoder_1 is the finest."""
        self._need_bound()
        assert self._heads is not None
        return undistributed(self._heads).heads  # pyright: ignore[reportReturnType]

    @property
    def ending(self) -> str | None:
        """The path of the sigmoid or softmax module that the model ends in, if any; it is applied to the heads, too."""
        return self._ending

    def parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters, for your optimizer."""
        return iter(self.heads.parameters())

    def weight_of(self, name: str) -> float:
        """The weight of one head, without `weight`. Raises a ReSegError for a name that no head has."""
        names = list(self.heads)
        if name not in names:
            raise ReSegError(f"there is no head {name!r}; there are {', '.join(names)}")
        return 1.0 if self.level_weights is None else self.level_weights[names.index(name)]

    def loss(self, label: Any, task_loss: TaskLoss) -> Tensor:
        """The weighted sum over levels of the task loss, for the one training forward since the last call.

        Args:
            label: the label of that forward's images: (B, *spatial), (B, 1, *spatial) or (B, classes, *spatial). If it
                is a list, element 0 is used.
            task_loss: your loss of logits (B, classes, *spatial) and label. It gets the label at the level's size, in
                its original form and dtype. If the model ends in a sigmoid or softmax module, it must be a loss of
                probabilities; the same kind of module is applied to the heads' logits first.

        Returns:
            A scalar to add to the task loss. At weight 0, a zero that supports backward.

        Raises:
            ReSegError: no training forward or several since the last call, the model is in evaluation, gradients are
                off, or the label does not fit.
            TapError: a tap did not fire.
        """
        try:
            label = plain_label(label)
            self._refuse_misuse()
            if self._weight == 0:
                self._last = {}
                return nothing(label.device)
            total = self.loss_of(self.outputs(), label, loss_of_logits(task_loss, self._model, self._ending))
        except BaseException:
            if self._extractor is not None:
                self._extractor.forget()
            raise
        self._calls += 1
        self._last |= {"loss": total.detach(), "weight": self._weight}
        return self._weight * total

    def outputs(self) -> HeadOutputs:
        """The heads' outputs for the one training forward since the last call. Pass them, or parts, to `loss_of`.

        Raises:
            ReSegError, TapError: as in `loss`, except for the label.
        """
        self._refuse_misuse()
        recorded = self.extractor.take()
        assert self._heads is not None
        features, image = recorded.features.decoder, recorded.image
        device = features[0].device
        for level, x in zip(self.extractor.plan.selected, features):
            _check_covers(level.stride, x.shape[2:], image.shape[2:])
        refuse_join(self._model, "the heads of deep supervision are reduced separately")
        enabled, dtype = recorded.autocast
        if not enabled:
            _check_dtype(next(self.parameters()).dtype, features)
        self._heads = distributed(self._heads, device)
        self._unmoved.check(self._heads.parameters())
        inputs = {f"decoder_{i + 1}": x for i, x in enumerate(features)}
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            logits = self._heads(inputs)
        name, first = next(iter(logits.items()))
        if not self._told_of_gradients and first.requires_grad and not torch.compiler.is_compiling():
            # in the backward, because frameworks clear gradients between the loss and that
            first.register_hook(lambda _: self._look_at_gradients(self.heads[name]))
        return HeadOutputs(logits, inputs, image)

    def loss_of(self, outputs: HeadOutputs, label: Tensor, task_loss: TaskLoss) -> Tensor:
        """The weighted sum over heads of the task loss, without `weight`.

        Args:
            outputs: what `outputs` returned, or a part of it.
            label: the label of that part, as in `loss`.
            task_loss: as in `loss`, but always of logits, even if the model ends in a sigmoid or softmax module.

        Raises:
            ReSegError: the label does not fit, or the task loss fails on it.
        """
        if not isinstance(outputs, HeadOutputs):
            raise ReSegError(f"outputs= must be what outputs() returned, or a part of it, got {outline(outputs)}")
        label = plain_label(label).to(outputs.image.device, non_blocking=True)
        image = outputs.image.shape
        LabelEncoding("onehot", self.num_classes, len(image) - 2, self.ignore_index).check_shape(label, image)
        total = torch.zeros((), device=outputs.image.device)
        self._last = {}
        for name, x in outputs.logits.items():
            value = coarse_loss(x, label, task_loss, self.ignore_index, f"the head {name}")
            made_of = {
                OF_IMAGES: [outputs.image],
                OF_MODEL: [outputs.features[name]],
                f"the head {name} is not finite": [x],
            }
            refuse_not_finite(value, made_of, _of_task_loss(name, self.ignore_index), first=not self._checked)
            total = total + self.weight_of(name) * value
            self._last[name] = value.detach()
        self._checked = True
        return total

    def stats(self) -> dict[str, float]:
        """The last call's values, for a log: each head's task loss, "loss" and "weight".

        "decoder_1" is the task loss of that head, "weighted/decoder_1" its share of what `loss` returned. "loss" is the
        weighted sum over heads; `loss` returned this times "weight". After a call at weight 0 there is only "weight".
        With `CutMixConsistency(deep=...)` the last call of a step is that of the unlabelled images. Reading the values
        waits for the device.
        """
        found = super().stats()
        parts = {name: self.weight_of(name) * value for name, value in found.items() if name.startswith("decoder_")}
        return {**found, **{f"weighted/{name}": found["weight"] * part for name, part in parts.items()}}

    def _look_at_gradients(self, head: nn.Module) -> None:
        """Warn once if a head has gradients before its backward, but none of the model's trained parameters has."""
        if self._told_of_gradients or all(p.grad is None for p in head.parameters()):
            return
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if trained and all(p.grad is None for p in trained):
            self._told_of_gradients = True
            warn(
                "the heads still have the gradients of an earlier step, but the model's were cleared, so the heads' "
                "add up: clear both, by zero_grad() of the optimizer that has them instead of the model's"
            )

    def _state(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            # also if they are the default, so that a state stays the same when the default changes
            "level_weights": [self.weight_of(name) for name in self.heads],
            "ignore_index": self.ignore_index,
            "ending": self._ending,
            "taps": plan_to_dict(self.extractor.plan),
            "heads": dict(self.heads.state_dict()),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        classes, known = state["num_classes"], self._num_classes
        if known is not None and classes != known:
            raise ReSegError(f"this state is for {classes} classes, not {known}")
        check_number("num_classes", classes, least=1, whole=True)
        ending = dict(self._model.named_modules()).get(state["ending"])
        if state["ending"] is not None and (ending is None or not is_activation(ending)):
            raise ReSegError(
                f"this state is of a model that ends in a sigmoid or softmax module {state['ending']!r}; this model "
                "does not have it"
            )
        plan = plan_from_dict(state["taps"])
        weights = _checked(state["level_weights"])
        if len(weights) != len(plan.selected):
            raise ReSegError(f"this state is inconsistent: {len(weights)} weights for {len(plan.selected)} levels")
        extractor, heads = self._extractor, self._heads
        if extractor is not None:
            refuse_other_channels(extractor.plan, plan)
        # rebuilt only where it differs: optimizers hold the heads, compiled models their hooks
        if extractor is None or not same_taps(extractor.plan, plan):
            extractor, heads = self._make(plan, classes, weights)
        assert heads is not None
        try:
            load_states((undistributed(heads).heads, state["heads"]))  # pyright: ignore[reportArgumentType]
        except ReSegError:
            if extractor is not self._extractor:
                extractor.remove()
            raise
        if self._extractor is not None and self._extractor is not extractor:
            self._extractor.remove()
        self._extractor, self._heads, self._num_classes = extractor, heads, classes
        self.level_weights, self.ignore_index, self._ending = weights, state["ignore_index"], state["ending"]
        self._checked = False

    def _told(self) -> dict[str, Any]:
        levels = None if self._extractor is None else [level.stride for level in self._extractor.plan.selected]
        return {"num_classes": self._num_classes, "levels": levels, "ignore_index": self.ignore_index}

    def _beside(self) -> list[nn.Module]:
        return [self.heads]

    def _extractor_if_any(self) -> FeatureExtractor | None:
        return self._extractor

    def _make(self, plan: TapPlan, classes: int, weights: list[float] | None) -> tuple[FeatureExtractor, _Heads]:
        """Heads and hooks for known taps."""
        if not plan.selected:
            raise TapError(f"no level is left to supervise:\n{plan.draw()}")
        channels = {f"decoder_{i + 1}": level.decoder.channels for i, level in enumerate(plan.selected)}
        if weights is not None and len(weights) != len(channels):
            raise ReSegError(f"{len(weights)} weights for {len(channels)} levels:\n{plan.draw()}")
        with preserved_rng():
            heads = _Heads(channels, classes, len(plan.bottleneck.spatial))
        like = next((p for p in self._model.parameters() if p.is_floating_point()), torch.zeros(()))
        extractor = FeatureExtractor(self._model, taps=plan, decoder_only=True)
        extractor.enabled = self._weight != 0
        return extractor if self._removed else extractor.attach(), heads.to(like.device, like.dtype)

    def _need_bound(self) -> None:
        if self._extractor is None:
            raise ReSegError("taps are not known: pass example_input= (an image batch), or call load_state_dict(state)")

    def _arm(self) -> None:
        if self._extractor is not None:
            self._extractor.enabled = self._weight != 0


def _channels(trace: Trace) -> int:
    try:
        return select_output(trace.output, trace.image[0], trace.image[2:]).shape[1]
    except ReSegError as error:
        raise ReSegError("the number of classes cannot be read from the model's output; pass num_classes=") from error


def _checked(level_weights: Sequence[float]) -> list[float]:
    if not isinstance(level_weights, Iterable) or isinstance(level_weights, (Mapping, set, frozenset)):
        raise ReSegError(f"level_weights={level_weights!r}; pass one weight for each level, the finest first")
    return [check_weight("level_weights", weight) for weight in level_weights]


class _Heads(nn.Module):
    """All heads in one module with one forward, so that DistributedDataParallel reduces them once a step."""

    def __init__(self, channels: Mapping[str, int], classes: int, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.heads = nn.ModuleDict({name: conv(c, classes, 1) for name, c in channels.items()})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: head(features[name]) for name, head in self.heads.items()}


def _of_task_loss(name: str, ignore_index: int | None) -> str:
    hint = "" if ignore_index is not None else ": pass ignore_index= to DeepSupervision to leave out such a level"
    return (
        f"task_loss is NaN or infinite for the head {name}, although its logits are finite. Either every pixel of the "
        f"label is ignored, where most losses are NaN{hint}; or the label itself is not finite"
    )


def _check_dtype(own: torch.dtype, features: Sequence[Tensor]) -> None:
    """Raise a ReSegError unless the heads' dtype is that of the features."""
    for x in features:
        if x.dtype != own:
            raise ReSegError(
                f"the decoder's features are {x.dtype}, but the heads of deep supervision are {own}: the model was "
                f"moved to another dtype, so move the heads, too: ds.to({x.dtype})"
            )


def _check_covers(stride: Sequence[int], size: Sequence[int], image: Sequence[int]) -> None:
    """Raise a ReSegError for features that extend two or more cells beyond the image: the label would be stretched."""
    if any(abs(n - full / s) >= 2 for n, full, s in zip(size, image, stride)):
        raise ReSegError(
            f"the decoder's features of stride {tuple(stride)} have size {tuple(size)} for an image of size "
            f"{tuple(image)}, so their cells do not line up with the label: the model seems to pad inside. Pad image "
            "and label yourself, to a multiple of the largest stride"
        )


def refuse_other_heads(deep: DeepSupervision, model: nn.Module, ignore_index: int) -> None:
    """Raise a ReSegError unless the heads belong to this model and ignore the pixels that are not sure."""
    if deep.model is not model:
        raise ReSegError("deep= belongs to another model; build DeepSupervision for this one")
    if deep.ignore_index != ignore_index:
        raise ReSegError(
            f"deep supervision has ignore_index={deep.ignore_index}, but pixels that are not sure are labelled "
            f"{ignore_index}, which it must ignore, too: build DeepSupervision(..., ignore_index={ignore_index})"
        )


def coarse_loss(logits: Tensor, label: Tensor, task_loss: TaskLoss, ignore_index: int | None, where: str) -> Tensor:
    """The task loss of logits (B, classes, *size) on a label of the image's size, resized by nearest neighbour.

    It is a scalar, and 0 if every pixel of the label is ignored, because most losses are NaN then. `where` is for
    messages.
    """
    target = nearest(label, logits.shape[2:])
    if ignore_index is None:
        return value_of(task_loss, logits, target, where)
    counts = has_value(target, ignore_index).all().logical_not()
    wide = target.long() if target.dtype in FEW_OPERATORS else target
    target = torch.where(counts, wide, torch.zeros_like(wide)).to(target.dtype)
    return counts * value_of(task_loss, logits, target, where)


def nearest(label: Tensor, size: Sequence[int]) -> Tensor:
    """The label at a coarser size, by nearest neighbour as in F.interpolate; its form and dtype stay the same."""
    first = label.ndim - len(size)
    for axis, n in enumerate(size):
        full = label.shape[first + axis]
        if full % n == 0:  # a view: the index below takes several kernels
            label = label[(slice(None),) * (first + axis) + (slice(None, None, full // n),)]
        else:
            label = label.index_select(first + axis, torch.arange(n, device=label.device) * full // n)
    return label.contiguous()
