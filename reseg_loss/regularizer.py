"""What all training-time losses share: a weight, counters, the recorded forward, statistics and a state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .common.inputs import check_number, check_weight, refuse_evaluation
from .common.state import check_state
from .errors import ReSegError
from .recording.copying import unwrap
from .recording.extractor import FeatureExtractor

if TYPE_CHECKING:
    from typing_extensions import Self


class Regularizer:
    """The base of all losses here: a loss on a model that is trained by your own loop. On purpose no nn.Module.

    The model's parameters and state_dict keys stay as they are, even if the loss is an attribute of the module that
    holds the model. Integrations look for this class: moving, saving, logging and removing are the same for each loss.

    Args:
        model: the model, or its DistributedDataParallel or torch.compile wrapper.
        weight: a factor of the loss.

    Raises:
        ReSegError: the model is not an nn.Module, or is wrapped in something that is not supported; the weight is
            negative or not finite; or inference mode is on.
    """

    FORMAT: ClassVar[int] = 1  # of the state_dict
    ENTRIES: ClassVar[Mapping[str, Any]] = {}  # of the state_dict, as `check_state` takes them

    def __init__(self, model: nn.Module, weight: float) -> None:
        if not isinstance(model, nn.Module):
            raise ReSegError(f"{type(self).__name__} needs an nn.Module as its model, got {type(model).__name__}")
        if torch.is_inference_mode_enabled():
            raise ReSegError("tensors made in inference mode cannot be trained: build this outside inference mode")
        self._model = unwrap(model)
        self._calls, self._removed = 0, False
        self._last: dict[str, Tensor | float] = {}
        self._weight = check_weight("weight", weight)

    @property
    def model(self) -> nn.Module:
        """The model itself, without its wrappers."""
        return self._model

    @property
    def weight(self) -> float:
        """A factor of the loss; it may change between steps. At 0, what it multiplies neither runs nor is recorded."""
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._weight = check_weight("weight", value)
        self._arm()

    @property
    def calls(self) -> int:
        """How many calls of the loss have returned at a weight other than 0."""
        return self._calls

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that your optimizer must train along with the model's."""
        return iter(())

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the modules that belong to the loss and not to the model, as `nn.Module.to` does. Returns self."""
        for module in self._beside():
            module.to(*args, **kwargs)
        return self

    def record(self) -> AbstractContextManager[None]:
        """Mark the forward that the next loss is for, in loops with several forwards a step: `with loss.record():`."""
        extractor = self._extractor_if_any()
        return nullcontext() if extractor is None else extractor.record()

    def remove(self) -> None:
        """Remove all hooks: the model is as it was, and the loss raises from now on. May be called twice."""
        extractor = self._extractor_if_any()
        if extractor is not None:
            extractor.remove()
        self._removed = True

    def stats(self) -> dict[str, float]:
        """The last call's values, for a log, and "weight". Reading them waits for the device."""
        return {"weight": self._weight, **{name: float(value) for name, value in self._last.items()}}

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to resume: tensors and plain Python values only."""
        return {
            "kind": self._kind(),
            "format": self.FORMAT,
            "weight": self._weight,
            "calls": self._calls,
            **self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, settings included. It needs no example input.

        Raises:
            ReSegError: the state is of another kind, format or model, or incomplete. Nothing has changed then.
            TapError: the model does not have the taps of the state. Nothing has changed then, either.
        """
        self._check_state(state)
        weight = check_weight("weight", state["weight"])
        check_number("calls", state["calls"], least=0, whole=True)
        self._load(state)
        self._weight, self._calls = weight, state["calls"]
        self._arm()

    def __repr__(self) -> str:
        told = {"weight": self._weight, "calls": self._calls, **self._told()}
        shown = ", ".join(f"{name}={value!r}" for name, value in told.items())
        return f"{type(self).__name__}({type(self._model).__name__}, {shown})"

    # --- what each loss defines

    @classmethod
    def _kind(cls) -> str:
        """The name of the class whose states fit; for a user's subclass, the name of our class."""
        return next(c.__name__ for c in cls.__mro__ if c.__module__.partition(".")[0] == __name__.partition(".")[0])

    def _beside(self) -> list[nn.Module]:
        """What `to` moves."""
        return []

    def _extractor_if_any(self) -> FeatureExtractor | None:
        """The extractor that records the model's forward, once there is one."""
        return None

    def _arm(self) -> None:
        """Switch recording on or off, after the weight or the counter has changed."""

    def _state(self) -> dict[str, Any]:
        """Entries of the state other than kind, format, weight and calls."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """Restore what `_state` returned, or raise and change nothing."""

    def _told(self) -> dict[str, Any]:
        """What `repr` shows other than weight and calls."""
        return {}

    # --- guards

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise a ReSegError unless a state is complete and of this kind."""
        check_state(state, self._kind(), self.FORMAT, {"weight": float, "calls": int, **self.ENTRIES})

    def _refuse_misuse(self) -> None:
        """Raise a ReSegError if the loss cannot be computed in this step."""
        if self._removed:
            raise ReSegError(f"the hooks were removed; build a new {type(self).__name__}")
        refuse_evaluation(self._model)
        if not torch.is_grad_enabled():
            raise ReSegError("gradients are off (torch.no_grad or inference mode); this loss is for training steps")
        has_any = next(self._model.parameters(), None) is not None
        if has_any and not any(p.requires_grad for p in self._model.parameters()):
            raise ReSegError(
                "no parameter of the model requires a gradient, so it would not learn: call model.requires_grad_(True) "
                "(a mean teacher, `average`, comes without)"
            )


def nothing(device: torch.device) -> Tensor:
    """The loss of a call that computes nothing: a zero that supports backward."""
    return torch.zeros((), device=device, requires_grad=True)
