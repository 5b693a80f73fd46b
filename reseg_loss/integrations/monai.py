"""MONAI's engines (and so Ignite's): handlers that add to the loss of a SupervisedTrainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..alignment.wrapper import ReSegWrapper
from ..errors import ReSegError
from ..supervision import DeepSupervision
from . import checked

if TYPE_CHECKING:
    from monai.engines.trainer import SupervisedTrainer


class ReSegHandler:
    """Runs stage 1 before the first epoch, then adds the alignment loss to the trainer's loss.

    Give the wrapper to CheckpointSaver and CheckpointLoader under a name of its own, as you do with the network and
    the optimizer: a resumed run has no stage 1. While the weight is 0 there is none either.

    Let it be the last of `train_handlers` where your project takes one of them by its place (`train_handlers[0]`), for
    whatever comes after it has another.

    Args:
        reseg: the wrapper around the trainer's network.
        loader: batches for stage 1; None takes the trainer's own.
        **fit_recon: of `ReSegWrapper.fit_recon`, `epochs=` or `steps=` above all.
    """

    def __init__(self, reseg: ReSegWrapper, *, loader: Iterable[Any] | None = None, **fit_recon: Any) -> None:
        _check_kind(self, reseg, ReSegWrapper)
        self.reseg, self.loader, self.fit_recon = reseg, loader, checked(fit_recon)

    def attach(self, engine: SupervisedTrainer) -> None:
        """Called by the trainer.

        Raises:
            ReSegError: the engine tells nobody when its loss is computed.
        """
        from ignite.engine import Events

        # not at STARTED: there CheckpointLoader may come after us
        engine.add_event_handler(Events.EPOCH_STARTED, self.stage_1)
        _when_the_loss_is_there(engine, self)

    def stage_1(self, engine: SupervisedTrainer) -> None:
        """Fit the teacher, unless it is there."""
        if self.reseg.weight != 0 and not self.reseg.ready:
            self.reseg.fit_recon(engine.state.dataloader if self.loader is None else self.loader, **self.fit_recon)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Add the alignment loss."""
        output = engine.state.output
        output["loss"] = output["loss"] + self.reseg.alignment_loss(output["label"])


class DeepSupervisionHandler:
    """Adds deep supervision with the trainer's own loss function.

    The optimizer must have `ds.parameters()`; give `ds` to CheckpointSaver and CheckpointLoader, too. Let it be one of
    the last of `train_handlers`, as `ReSegHandler`.

    Args:
        ds: the heads on the trainer's network.
    """

    def __init__(self, ds: DeepSupervision) -> None:
        _check_kind(self, ds, DeepSupervision)
        self.ds = ds

    def attach(self, engine: SupervisedTrainer) -> None:
        """As `ReSegHandler.attach`."""
        _when_the_loss_is_there(engine, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Add the loss of the heads."""

        def task_loss(logits: Tensor, label: Tensor) -> Tensor:
            return engine.loss_function(logits, label).mean()  # as the trainer itself

        output = engine.state.output
        output["loss"] = output["loss"] + self.ds.loss(output["label"], task_loss)


def _check_kind(handler: object, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ReSegError(f"{type(handler).__name__} is made with a {kind.__name__}, got {type(value).__name__}")


def _when_the_loss_is_there(engine: SupervisedTrainer, handler: ReSegHandler | DeepSupervisionHandler) -> None:
    from monai.engines.utils import IterationEvents

    try:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, handler)
    except ValueError as error:
        raise ReSegError(
            f"{type(engine).__name__} has no event LOSS_COMPLETED, it is no SupervisedTrainer of MONAI; add "
            "reseg.alignment_loss(label) to the loss in your own update function instead"
        ) from error
