"""Deep supervision for any U-shaped model: 1x1 heads on its decoder, trained beside it and dropped afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .common.distributed import UnmovedWarning, distributed, refuse_join, undistributed
from .common.dryrun import preserved_rng
from .common.inputs import OF_IMAGES, OF_MODEL, check_weight, refuse_evaluation, refuse_not_finite, value_of
from .common.labels import LabelEncoding, has_value, plain_label
from .common.outputs import refuse_probabilities, trained_activation
from .common.state import check_state, load_states, plain
from .errors import ReSegError
from .recording.copying import unwrap
from .recording.extractor import FeatureExtractor
from .taps import TapPlan, find_taps
from .taps.named import parse_taps
from .taps.plain import PLAN, plan_from_dict, plan_to_dict, refuse_other_channels, same_taps

FORMAT = 1  # of the state_dict
ENTRIES = {
    "num_classes": int,
    "weights": [float],
    "ignore_index": (int, None),
    "weight": float,
    "calls": int,
    "taps": PLAN,
    "heads": dict,
}

TaskLoss = Callable[[Tensor, Tensor], Tensor]


class DeepSupervision:
    """1x1 heads on a model's decoder features, each trained with the task loss on the label at its level.

    It is no nn.Module: the model's parameters and state_dict keys stay as they are. Train `parameters()` beside the
    model's, add `loss(label, task_loss)` to your loss, and drop it all with `remove()`. It works beside
    `ReSegWrapper` on the same model, and records by the same rules (`FeatureExtractor`).

    It adds about as much as the task loss for every level, so that with three the loss is some four times as large:

    - The model's gradients grow with it. Adam and its kin divide that out; SGD takes larger steps, so that a learning
      rate tuned without may be too large. `weight` makes it less.
    - If you clip gradients, clip the heads' with the model's: `clip_grad_norm_([*model.parameters(),
      *ds.parameters()], ...)`. The norm is a larger one than before, so the same limit clips more.
    - The total can't be compared with that of runs without. Log the task loss by itself, and `stats()` beside it.

    Args:
        model: any U-shaped nn.Module in 2D or 3D, or its DistributedDataParallel or torch.compile wrapper.
        num_classes: output channels of each head; 1 for a binary model.
        taps: as in `ReSegWrapper`; None finds them.
        example_input: an image batch as the model takes it, to find taps and make the heads. It may only be left out
            before `load_state_dict`.
        levels: strides of the levels to supervise; None is the default choice of `TapPlan.select`, as for the
            alignment.
        weights: of the levels, finest first, next to the main loss's 1; None is 1 for each.
        ignore_index: the label value that your task loss ignores. A level whose label has no other is left out (most
            losses are NaN there).

    Raises:
        TapError: the model has no levels that can be paired, or a tap is unknown.
        ReSegError: weights do not fit the levels, a choice is unknown, or the model ends in a sigmoid or softmax.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        taps: Mapping[str, Any] | None = None,
        example_input: Any = None,
        *,
        levels: Sequence[int | Sequence[int]] | None = None,
        weights: Sequence[float] | None = None,
        ignore_index: int | None = None,
    ) -> None:
        if num_classes < 1:
            raise ReSegError(f"num_classes={num_classes}; it must be at least 1")
        parse_taps(taps)  # refuses what is no tap now, not later
        self._model = unwrap(model)
        self.num_classes = plain(num_classes)
        self.level_weights = None if weights is None else [check_weight("weights", w) for w in weights]
        self.ignore_index = plain(ignore_index)
        self._extractor: FeatureExtractor | None = None
        self._heads: nn.Module | None = None
        self._weight, self._calls, self._removed, self._labels_checked = 1.0, 0, False, False
        self._last: dict[str, Tensor | float] = {}
        self._unmoved = UnmovedWarning("the deep supervision heads", "add ds.parameters() to your optimizer")
        if example_input is not None:
            plan = find_taps(self._model, example_input, taps=taps, levels=levels)
            activation = trained_activation(self._model, example_input)
            what = "your task loss takes probabilities, while the heads give logits"
            refuse_probabilities(activation, what, self._model)
            self._extractor, self._heads = self._make(plan, self.level_weights)

    @property
    def extractor(self) -> FeatureExtractor:
        """The model's taps; `print` it to see the U."""
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
    def weight(self) -> float:
        """A factor of everything; it may change between steps. At 0 nothing is recorded."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = check_weight("weight", value)
        self._arm()

    @property
    def calls(self) -> int:
        """How often `loss` has returned a value at a weight other than 0."""
        return self._calls

    def parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters, for your optimizer."""
        return iter(self.heads.parameters())

    def to(self, *args: Any, **kwargs: Any) -> DeepSupervision:
        """Move the heads, as `nn.Module.to`. Returns self."""
        self.heads.to(*args, **kwargs)
        return self

    def weight_of(self, name: str) -> float:
        """The weight of one head, without `weight`."""
        return 1.0 if self.level_weights is None else self.level_weights[int(name.removeprefix("decoder_")) - 1]

    def loss(self, label: Any, task_loss: TaskLoss) -> Tensor:
        """The weighted sum over levels of the task loss, for the one training forward since the last call.

        Args:
            label: of that forward's images: (B, *spatial), (B, 1, *spatial) or (B, classes, *spatial). Of a list,
                element 0.
            task_loss: your loss of logits (B, classes, *spatial) and label. The label comes at the level's size in
                the form and dtype it was given in.

        Returns:
            A scalar to add to the task loss. At weight 0 a zero on which backward works.

        Raises:
            ReSegError: no or several training forwards since the last call, the model is in evaluation, or the label
                does not fit.
            TapError: a tap did not fire.
        """
        try:
            return self._loss(plain_label(label), task_loss)
        except BaseException:
            if self._extractor is not None:
                self._extractor.forget()
            raise

    def record(self) -> AbstractContextManager[None]:
        """Mark the forward that the next `loss` is for, in loops with several forwards a step."""
        return self.extractor.record() if self._extractor is not None else nullcontext()

    def stats(self) -> dict[str, float]:
        """The last call's values for a log: each head's task loss, "loss" and "weight".

        "decoder_1" is the task loss of a head, "weighted/decoder_1" its part in what `loss` returned. "loss" is the sum
        over heads by their weights, times "weight" what was returned. A call at weight 0 leaves "weight"
        alone. With `CutMixConsistency(deep=...)` the last call of a step is that of the unlabelled images. Reading them
        waits for the device.
        """
        return {name: float(value) for name, value in self._last.items()}

    def remove(self) -> None:
        """Take all hooks off; the model is as it was."""
        if self._extractor is not None:
            self._extractor.remove()
        self._removed = True

    def state_dict(self) -> dict[str, Any]:
        """Heads, taps, counters and settings: tensors and plain Python values only."""
        return {
            "kind": "DeepSupervision",
            "format": FORMAT,
            "num_classes": self.num_classes,
            # also where they are the default, so that a state goes on as it was when that changes
            "weights": [self.weight_of(f"decoder_{i + 1}") for i in range(len(self.extractor.plan.selected))],
            "ignore_index": self.ignore_index,
            "weight": self._weight,
            "calls": self._calls,
            "taps": plan_to_dict(self.extractor.plan),
            "heads": dict(self.heads.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, settings included; needs no example.

        Raises:
            ReSegError: the state is of another kind, format or model, or of another number of classes, or not whole.
                All is then as it was.
            TapError: the model has not the taps of the state. All is then as it was, too.
        """
        check_state(state, "DeepSupervision", FORMAT, ENTRIES)
        if state["num_classes"] != self.num_classes:
            raise ReSegError(f"this state is for {state['num_classes']} classes, not {self.num_classes}")
        plan = plan_from_dict(state["taps"])
        weight, *weights = (check_weight("weights", w) for w in (state["weight"], *state["weights"]))
        if len(weights) != len(plan.selected):
            raise ReSegError(f"this state has {len(weights)} weights for {len(plan.selected)} levels; it is not whole")
        extractor, heads = self._extractor, self._heads
        if extractor is not None:
            refuse_other_channels(extractor.plan, plan)
        # rebuilt only where it differs: optimizers hold the heads, compiled models their hooks
        if extractor is None or not same_taps(extractor.plan, plan):
            extractor, heads = self._make(plan, weights)
        assert heads is not None
        try:
            load_states((undistributed(heads).heads, state["heads"]))  # pyright: ignore[reportArgumentType]
        except ReSegError:
            if extractor is not self._extractor:
                extractor.remove()
            raise
        if self._extractor is not None and self._extractor is not extractor:
            self._extractor.remove()
        self._extractor, self._heads = extractor, heads
        self.level_weights, self.ignore_index = weights, state["ignore_index"]
        self._weight, self._calls, self._labels_checked = weight, state["calls"], False
        self._arm()

    def _make(self, plan: TapPlan, weights: list[float] | None) -> tuple[FeatureExtractor, _Heads]:
        """Heads and hooks for known taps."""
        channels = {f"decoder_{i + 1}": level.decoder.channels for i, level in enumerate(plan.selected)}
        if weights is not None and len(weights) != len(channels):
            raise ReSegError(f"{len(weights)} weights for {len(channels)} levels:\n{plan.draw()}")
        with preserved_rng():
            heads = _Heads(channels, self.num_classes, len(plan.bottleneck.spatial))
        like = next((p for p in self._model.parameters() if p.is_floating_point()), torch.zeros(()))
        extractor = FeatureExtractor(self._model, plan, decoder_only=True)
        return extractor if self._removed else extractor.attach(), heads.to(like.device, like.dtype)

    def _need_bound(self) -> None:
        if self._extractor is None:
            raise ReSegError("taps are not known: pass example_input= (an image batch), or call load_state_dict(state)")

    def _arm(self) -> None:
        if self._extractor is not None:
            self._extractor.enabled = self._weight != 0

    def _loss(self, label: Tensor, task_loss: TaskLoss) -> Tensor:
        if self._removed:
            raise ReSegError("the hooks were removed; build a new DeepSupervision")
        refuse_evaluation(self._model)
        if self._weight == 0:
            self._last = {"weight": 0.0}
            return torch.zeros((), device=label.device, requires_grad=True)
        recorded = self.extractor.take()
        assert self._heads is not None
        features, device = recorded.features, recorded.features.decoder[0].device
        label = label.to(device, non_blocking=True)
        image = recorded.image.shape
        encoding = LabelEncoding("onehot", self.num_classes, len(image) - 2, self.ignore_index)
        encoding.check_shape(label, image)
        first = not self._labels_checked
        inputs = {f"decoder_{i + 1}": x for i, x in enumerate(features.decoder)}
        for level, x in zip(self.extractor.plan.selected, features.decoder):
            _check_covers(level.stride, x.shape[2:], image[2:])
        refuse_join(self._model, "the heads of deep supervision are reduced beside it")
        self._heads = distributed(self._heads, device)
        self._unmoved.check(self._heads.parameters())
        enabled, dtype = recorded.autocast
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            logits = self._heads(inputs)
        values: dict[str, Tensor] = {}
        for name, x in logits.items():
            target, counts = _nearest(label, x.shape[2:]), None
            if self.ignore_index is not None:
                counts = (~has_value(target, self.ignore_index)).any()
                target = torch.where(counts, target, torch.zeros_like(target))
            value = value_of(task_loss, x, target, f"the head {name}")
            values[name] = value if counts is None else value * counts
            made_of = {OF_IMAGES: [recorded.image], OF_MODEL: [inputs[name]], f"the head {name} is not finite": [x]}
            refuse_not_finite(value, made_of, _of_task_loss(name, self.ignore_index), first=first)
        total = torch.zeros((), device=device)
        for name, value in values.items():
            total = total + self.weight_of(name) * value
        self._last = {name: value.detach() for name, value in values.items()}
        self._last |= {
            f"weighted/{name}": self._weight * self.weight_of(name) * value for name, value in self._last.items()
        }
        self._last |= {"loss": total.detach(), "weight": self._weight}
        self._calls, self._labels_checked = self._calls + 1, True
        return self._weight * total


class _Heads(nn.Module):
    """All heads in one module with one forward, so that under DistributedDataParallel they are reduced once."""

    def __init__(self, channels: Mapping[str, int], classes: int, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.heads = nn.ModuleDict({name: conv(c, classes, 1) for name, c in channels.items()})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: head(features[name]) for name, head in self.heads.items()}


def _of_task_loss(name: str, ignore_index: int | None) -> str:
    hint = "" if ignore_index is not None else ", and ignore_index= of DeepSupervision leaves such a level out"
    return (
        f"task_loss is NaN or infinite for the head {name}, whose logits are finite. Most losses are where every pixel "
        f"of the label is one that they ignore{hint}; or the label itself is not finite"
    )


def _check_covers(stride: Sequence[int], size: Sequence[int], image: Sequence[int]) -> None:
    """Raise a ReSegError for features that reach two cells or more beyond the image: the label would be stretched."""
    if any(abs(n - full / s) >= 2 for n, full, s in zip(size, image, stride)):
        raise ReSegError(
            f"the decoder's features of stride {tuple(stride)} have size {tuple(size)} for an image of size "
            f"{tuple(image)}, so their cells do not lie on the label's: the model seems to pad inside. Pad image and "
            "label yourself, to a multiple of the largest stride"
        )


def _nearest(label: Tensor, size: Sequence[int]) -> Tensor:
    """The label at a coarser size, by nearest neighbour as in F.interpolate, in the form and dtype it came in."""
    first = label.ndim - len(size)
    for axis, n in enumerate(size):
        full = label.shape[first + axis]
        if full % n == 0:  # a view: the index below takes several kernels
            label = label[(slice(None),) * (first + axis) + (slice(None, None, full // n),)]
        else:
            label = label.index_select(first + axis, torch.arange(n, device=label.device) * full // n)
    return label.contiguous()
