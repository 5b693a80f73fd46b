"""Deep supervision for any U-shaped model: 1x1 heads on its taps, trained beside it and dropped afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional as RF
from .checkpoint import check_format, load_states, plan_from_dict, plan_to_dict, same_taps
from .companion import UnmovedWarning, distributed, undistributed
from .errors import ReSegError
from .features import FeatureExtractor, refuse_evaluation, unwrap
from .labels import LabelEncoding, has_value, plain_label
from .losses import check_weight
from .outputs import refuse_probabilities, trained_activation
from .settings import plain
from .taps import TapPlan, find_taps
from .taps.dryrun import preserved_rng
from .taps.named import parse_taps

FORMAT = 1  # of the state_dict
SIDE_WEIGHT = 0.1  # of a head on an encoder feature or the bottleneck (sides="all")

TaskLoss = Callable[[Tensor, Tensor], Tensor]


class DeepSupervision:
    """1x1 heads on a model's decoder features, each trained with the task loss on the label at its level.

    It is no nn.Module: the model's parameters and state_dict keys stay as they are. Train `parameters()` beside the
    model's, add `loss(label, task_loss)` to your loss, and drop it all with `remove()`. It works beside
    `ReSegWrapper` on the same model, and records by the same rules (`FeatureExtractor`).

    Args:
        model: any U-shaped nn.Module in 2D or 3D, or its DistributedDataParallel or torch.compile wrapper.
        num_classes: output channels of each head; 1 for a binary model.
        taps: as in `ReSegWrapper`; None finds them.
        example_input: an image batch as the model takes it, to find taps and make the heads. It may only be left out
            before `load_state_dict`.
        levels: strides of the levels to supervise; None is the default choice of `TapPlan.select`, as for the
            alignment.
        sides: "decoder" supervises decoder features; "all" encoder features and the bottleneck too, weight 0.1 each.
        weights: of the decoder levels, finest first, next to the main loss's 1; None is 1 for each.
        decay_calls: number of calls over which all weights fall linearly to 0; None keeps them.
        soft: give the task loss area-averaged class fractions (B, classes, *spatial) instead of the nearest label;
            it must take probabilities.
        ignore_index: the label value that your task loss ignores. A level whose label has no other is left out (most
            losses are NaN there). Soft labels leave it out of the averages; a cell that has no other is all 0.

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
        sides: Literal["decoder", "all"] = "decoder",
        weights: Sequence[float] | None = None,
        decay_calls: int | None = None,
        soft: bool = False,
        ignore_index: int | None = None,
    ) -> None:
        if sides not in ("decoder", "all"):
            raise ReSegError(f"sides={sides!r}; it is 'decoder' or 'all'")
        parse_taps(taps)  # refuses what is no tap now, not later
        if num_classes < 1 or (decay_calls is not None and decay_calls < 1):
            raise ReSegError(f"num_classes={num_classes}, decay_calls={decay_calls}; they must be at least 1")
        self._model = unwrap(model)
        self.num_classes, self.sides, self.decay_calls = plain(num_classes), sides, plain(decay_calls)
        self.level_weights = None if weights is None else [check_weight("weights", w) for w in weights]
        self.soft, self.ignore_index = soft, plain(ignore_index)
        self._extractor: FeatureExtractor | None = None
        self._heads: nn.Module | None = None
        self._weight, self._calls, self._removed, self._labels_checked = 1.0, 0, False, False
        self._unmoved = UnmovedWarning("the deep supervision heads", "add ds.parameters() to your optimizer")
        if example_input is not None:
            plan = find_taps(self._model, example_input, taps=taps, levels=levels)
            activation = trained_activation(self._model, example_input)
            refuse_probabilities(activation, "your task loss takes probabilities, while the heads give logits")
            self._extractor, self._heads = self._make(plan, sides, self.level_weights)

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

    def factor(self) -> float:
        """The factor of the next call: `weight`, and its decay."""
        decay = 1.0 if self.decay_calls is None else max(0.0, 1 - self._calls / self.decay_calls)
        return self._weight * decay

    def weight_of(self, name: str) -> float:
        """The weight of one head, without `factor()`."""
        side, _, level = name.partition("_")
        if side != "decoder":
            return SIDE_WEIGHT
        return 1.0 if self.level_weights is None else self.level_weights[int(level) - 1]

    def loss(self, label: Any, task_loss: TaskLoss) -> Tensor:
        """The weighted sum over levels of the task loss, for the one training forward since the last call.

        Args:
            label: of that forward's images: (B, *spatial), (B, 1, *spatial) or (B, classes, *spatial). Of a list,
                element 0.
            task_loss: your loss of logits (B, classes, *spatial) and label. The label comes at the level's size in
                the form and dtype it was given in, unless `soft`.

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

    def remove(self) -> None:
        """Take all hooks off; the model is as it was."""
        if self._extractor is not None:
            self._extractor.remove()
        self._removed = True

    def state_dict(self) -> dict[str, Any]:
        """Heads, taps, counters and settings: tensors and plain Python values only."""
        return {
            "format": FORMAT,
            "num_classes": self.num_classes,
            "sides": self.sides,
            # also where they are the default, so that a state goes on as it was when that changes
            "weights": [self.weight_of(f"decoder_{i + 1}") for i in range(len(self.extractor.plan.selected))],
            "decay_calls": self.decay_calls,
            "soft": self.soft,
            "ignore_index": self.ignore_index,
            "weight": self._weight,
            "calls": self._calls,
            "taps": plan_to_dict(self.extractor.plan),
            "heads": dict(self.heads.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, settings included; needs no example.

        Raises:
            ReSegError: the state is of another format or model, or of another number of classes. All is then as it
                was.
            TapError: the model has not the taps of the state.
        """
        check_format(state, FORMAT)
        if state["num_classes"] != self.num_classes:
            raise ReSegError(f"this state is for {state['num_classes']} classes, not {self.num_classes}")
        plan = plan_from_dict(state["taps"])
        weights = state["weights"]
        extractor, heads = self._extractor, self._heads
        # rebuilt only where it differs: optimizers hold the heads, compiled models their hooks
        if extractor is None or self.sides != state["sides"] or not same_taps(extractor.plan, plan):
            extractor, heads = self._make(plan, state["sides"], weights)
        assert heads is not None
        load_states((undistributed(heads).heads, state["heads"]))  # pyright: ignore[reportArgumentType]
        if self._extractor is not None and self._extractor is not extractor:
            self._extractor.remove()
        self._extractor, self._heads = extractor, heads
        self.sides, self.level_weights, self.decay_calls = state["sides"], weights, state["decay_calls"]
        self.soft, self.ignore_index = state["soft"], state["ignore_index"]
        self._weight, self._calls, self._labels_checked = state["weight"], state["calls"], False
        self._arm()

    def _make(
        self, plan: TapPlan, sides: Literal["decoder", "all"], weights: list[float] | None
    ) -> tuple[FeatureExtractor, _Heads]:
        """Heads and hooks for known taps."""
        channels = {f"decoder_{i + 1}": level.decoder.channels for i, level in enumerate(plan.selected)}
        if weights is not None and len(weights) != len(channels):
            raise ReSegError(f"{len(weights)} weights for {len(channels)} levels:\n{plan.draw()}")
        if sides == "all":
            channels |= {f"encoder_{i + 1}": level.encoder.channels for i, level in enumerate(plan.selected)}
            channels["bottleneck"] = plan.bottleneck.channels
        with preserved_rng():
            heads = _Heads(channels, self.num_classes, len(plan.bottleneck.spatial))
        like = next((p for p in self._model.parameters() if p.is_floating_point()), torch.zeros(()))
        extractor = FeatureExtractor(self._model, plan, sides=sides)
        return extractor if self._removed else extractor.attach(), heads.to(like.device, like.dtype)

    def _need_bound(self) -> None:
        if self._extractor is None:
            raise ReSegError("taps are not known: pass example_input= (an image batch), or call load_state_dict(state)")

    def _arm(self) -> None:
        if self._extractor is not None:
            self._extractor.enabled = self.factor() != 0

    def _loss(self, label: Tensor, task_loss: TaskLoss) -> Tensor:
        if self._removed:
            raise ReSegError("the hooks were removed; build a new DeepSupervision")
        refuse_evaluation(self._model)
        factor = self.factor()
        if factor == 0:
            return torch.zeros((), device=label.device, requires_grad=True)
        recorded = self.extractor.take()
        assert self._heads is not None
        features, device = recorded.features, recorded.features.decoder[0].device
        label = label.to(device, non_blocking=True)
        image = recorded.image.shape
        encoding = LabelEncoding("onehot", self.num_classes, len(image) - 2, self.ignore_index)
        encoding.check_shape(label, image)
        if self.soft and not self._labels_checked:  # else they are the task loss's affair
            encoding.check_values(label)
            self._labels_checked = True
        sides = {"decoder": features.decoder, "encoder": features.encoder}
        inputs = {f"{side}_{i + 1}": x for side, xs in sides.items() for i, x in enumerate(xs)}
        if self.sides == "all":
            inputs["bottleneck"] = features.bottleneck
        for level, x in zip(self.extractor.plan.selected, features.decoder):
            _check_covers(level.stride, x.shape[2:], image[2:])
        self._heads = distributed(self._heads, device)
        self._unmoved.check(self._heads.parameters())
        enabled, dtype = recorded.autocast
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            logits = self._heads(inputs)
        encoded, valid = encoding.encode(label) if self.soft else (None, None)
        total = torch.zeros((), device=device)
        for name, x in logits.items():
            size = x.shape[2:]
            target = _nearest(label, size) if encoded is None else _fractions(encoded, valid, size)
            counts = None
            if self.ignore_index is not None and encoded is None:
                counts = (~has_value(target, self.ignore_index)).any()
                target = torch.where(counts, target, torch.zeros_like(target))
            value = task_loss(x, target)
            if not isinstance(value, Tensor) or value.ndim:
                what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ReSegError(f"task_loss gave {what}, and a scalar is needed")
            total = total + self.weight_of(name) * (value if counts is None else value * counts)
        self._calls += 1
        if self.decay_calls is not None:
            self._arm()
        return factor * total


class _Heads(nn.Module):
    """All heads in one module with one forward, so that under DistributedDataParallel they are reduced once."""

    def __init__(self, channels: Mapping[str, int], classes: int, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.heads = nn.ModuleDict({name: conv(c, classes, 1) for name, c in channels.items()})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: head(features[name]) for name, head in self.heads.items()}


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


def _fractions(encoded: Tensor, valid: Tensor | None, size: Sequence[int]) -> Tensor:
    """The area fraction of every class in the valid part of a coarser cell."""
    area = RF.valid_fraction(encoded, size)
    return area if valid is None else area / RF.valid_fraction(valid, size).clamp_min(torch.finfo(area.dtype).tiny)
