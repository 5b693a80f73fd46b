"""MONAI's engines (and so Ignite's): handlers that add to the loss of a SupervisedTrainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..alignment.wrapper import ReSegWrapper
from ..common.batches import Rounds, unlabelled_image
from ..common.distributed import world_size
from ..common.state import check_state
from ..errors import ReSegError
from ..recording.copying import unwrap
from ..semi import SemiSupervised
from ..supervision import DeepSupervision
from . import checked, follow, random_states, restore_random_states

if TYPE_CHECKING:
    from monai.engines.trainer import SupervisedTrainer


class ReSegHandler:
    """Runs stage 1 before the first epoch, then adds the alignment loss to the trainer's loss.

    Pass the wrapper to CheckpointSaver and CheckpointLoader under its own name, like the network and the optimizer.
    A resumed run then does not repeat stage 1. At weight 0 there is no stage 1, either.

    If your project accesses one of the `train_handlers` by its position (`train_handlers[0]`), make this handler the
    last one, so that the positions of the others do not change.

    Args:
        reseg: the wrapper around the trainer's network.
        loader: batches for stage 1; None takes the trainer's own.
        **fit_recon: keywords of `ReSegWrapper.fit_recon`, above all `epochs=` or `steps=`.
    """

    def __init__(self, reseg: ReSegWrapper, *, loader: Iterable[Any] | None = None, **fit_recon: Any) -> None:
        _check_kind(self, reseg, ReSegWrapper)
        self.reseg, self.loader, self.fit_recon = reseg, loader, checked(fit_recon)

    def attach(self, engine: SupervisedTrainer) -> None:
        """Called by the trainer.

        Raises:
            ReSegError: the engine has no event for when its loss is computed.
        """
        from ignite.engine import Events

        # not at STARTED: there CheckpointLoader may come after us
        engine.add_event_handler(Events.EPOCH_STARTED, self.stage_1)
        _when_the_loss_is_there(engine, self, self.reseg.model)

    def stage_1(self, engine: SupervisedTrainer) -> None:
        """Fit the teacher, unless there is a fitted one."""
        if self.reseg.weight != 0 and not self.reseg.ready:
            self.reseg.fit_recon(engine.state.dataloader if self.loader is None else self.loader, **self.fit_recon)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Add the alignment loss."""
        output = engine.state.output
        output["loss"] = output["loss"] + self.reseg.alignment_loss(output["label"])


class DeepSupervisionHandler:
    """Adds deep supervision with the trainer's own loss function.

    The optimizer must have `ds.parameters()`. Pass `ds` to CheckpointSaver and CheckpointLoader, too. Make this one of
    the last `train_handlers`, like `ReSegHandler`.

    Args:
        ds: the heads on the trainer's network.
    """

    def __init__(self, ds: DeepSupervision) -> None:
        _check_kind(self, ds, DeepSupervision)
        self.ds = ds

    def attach(self, engine: SupervisedTrainer) -> None:
        """See `ReSegHandler.attach`."""
        _when_the_loss_is_there(engine, self, self.ds.model)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Add the loss of the heads."""

        def task_loss(logits: Tensor, label: Tensor) -> Tensor:
            return engine.loss_function(logits, label).mean()  # as the trainer itself

        output = engine.state.output
        output["loss"] = output["loss"] + self.ds.loss(output["label"], task_loss)


class SemiSupervisedHandler:
    """Gives each step of a SupervisedTrainer a batch of unlabelled images in addition.

    Build the trainer with `loss_function=semi.loss`, and its optimizer with `semi.parameters()` in addition to the
    network's. The trainer's batches stay the labelled ones, and so does its output: image, label and prediction are of
    the labelled images. The mean teacher follows after each optimizer step. It is a network like any other: pass
    `network=semi.average` to an evaluator, and {"net": semi.average} to a CheckpointSaver that keeps the best.

    Pass the handler to CheckpointSaver and CheckpointLoader under its own name, along with network, optimizer and
    trainer. Its state holds that of `semi`, the position in the unlabelled batches, and the random states. A resumed
    run restores the random states when its first epoch starts. Make CheckpointSaver the last of the handlers. With
    several processes only the state of `semi` is kept, because Ignite does not gather the others.

    Args:
        semi: a `SemiSupervised` built for the trainer's network.
        unlabelled: a loader of image batches: tensors (B, C, *spatial), tuples or lists whose element 0 is one, or
            dicts with "image" or "data". It is repeated without end.

    Raises:
        ReSegError: `semi` is not a `SemiSupervised`.
    """

    def __init__(self, semi: SemiSupervised, unlabelled: Iterable[Any]) -> None:
        _check_kind(self, semi, SemiSupervised)
        self.semi = semi
        self._unlabelled = Rounds(unlabelled, "unlabelled")
        self._loss: Tensor | None = None  # of the step whose forward has run
        self._random: list[dict[str, Any]] | None = None
        self._remove: Callable[[], None] = lambda: None

    def attach(self, engine: SupervisedTrainer) -> None:
        """Called by the trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.STARTED, self.start)  # the engine has no optimizer before
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.COMPLETED, self.complete)

    def start(self, engine: SupervisedTrainer) -> None:
        """Take over the trainer's forward.

        Raises:
            ReSegError: the engine is not a SupervisedTrainer, or has another loss function or another network; or its
                optimizer does not have the network's parameters.
        """
        self._remove()  # where a run before has failed
        network, inferer, loss = (getattr(engine, name, None) for name in ("network", "inferer", "loss_function"))
        if inferer is None or loss is None or network is None:
            raise ReSegError(
                f"{type(engine).__name__} is not a SupervisedTrainer of MONAI; call semi.loss in your own update "
                "function instead"
            )
        if unwrap(network) is not self.semi.model:
            raise _of_another(self)
        if loss != self.semi.loss:
            raise ReSegError(
                "SemiSupervised computes the whole loss: pass loss_function=semi.loss of the handler's semi to the "
                "trainer, and your own loss to SemiSupervised(task_loss=...)"
            )

        def run(inputs: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
            returned: list[Any] = []

            def forward(x: Tensor) -> Any:
                returned.append(inferer(x, network, *args, **kwargs))
                return returned[-1]

            unlabelled = unlabelled_image(self._unlabelled.next_batch())
            self._loss = self.semi.loss(inputs, engine.state.output["label"], unlabelled, forward=forward)
            # labelled images come first, whether they are alone or not
            return tree_map(lambda x: x[: len(inputs)] if isinstance(x, Tensor) else x, returned[0])

        def loss_of(output: Any, label: Any) -> Any:
            value, self._loss = self._loss, None
            return value

        running: Any = engine  # which declares an Inferer, and takes any function
        running.inferer, running.loss_function = run, loss_of
        end = follow(self.semi, [engine.optimizer], type(self).__name__)

        def remove() -> None:
            running.inferer, running.loss_function = inferer, loss
            end()

        self._remove = remove

    def start_epoch(self, engine: SupervisedTrainer) -> None:
        """Restore the random states of the checkpoint, if one was loaded."""
        if self._random is not None:
            restore_random_states(self._random)
            self._random = None

    def complete(self, engine: SupervisedTrainer) -> None:
        """Leave the trainer as it was."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to resume, except network, optimizer and trainer."""
        alone = world_size() == 1
        return {
            "kind": "SemiSupervisedHandler",
            "format": 1,
            "semi": self.semi.state_dict(),
            "unlabelled": self._unlabelled.state() if alone else None,
            "random": random_states() if alone else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ReSegError: the state is of another kind, or does not fit.
        """
        entries = {"semi": dict, "unlabelled": (dict, None), "random": ([dict], None)}
        check_state(state, "SemiSupervisedHandler", 1, entries)
        self.semi.load_state_dict(state["semi"])
        if state["unlabelled"] is not None:
            self._unlabelled = self._unlabelled.resumed(state["unlabelled"])
        self._random = state["random"]


def _check_kind(handler: object, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ReSegError(f"{type(handler).__name__} needs a {kind.__name__}, got {type(value).__name__}")


def _refuse_other_network(engine: SupervisedTrainer, handler: object, model: nn.Module) -> None:
    """Raise a ReSegError unless the trainer's network is the model or has it inside, as wrappers of it do."""
    network = getattr(engine, "network", None)  # other engines with our event may have none
    if isinstance(network, nn.Module) and all(module is not model for module in network.modules()):
        raise _of_another(handler)


def _of_another(handler: object) -> ReSegError:
    return ReSegError(
        f"{type(handler).__name__} is for another model than the trainer's network: build its loss and the trainer "
        "with the same model, or pass the handler to the trainer of its own model"
    )


def _when_the_loss_is_there(
    engine: SupervisedTrainer, handler: ReSegHandler | DeepSupervisionHandler, model: nn.Module
) -> None:
    """Call the handler then, and refuse another network than its model when the run starts, before stage 1."""
    from ignite.engine import Events
    from monai.engines.utils import IterationEvents

    engine.add_event_handler(Events.STARTED, _refuse_other_network, handler, model)
    try:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, handler)
    except ValueError as error:
        raise ReSegError(
            f"{type(engine).__name__} has no event LOSS_COMPLETED, so it is not a SupervisedTrainer of MONAI; add "
            "reseg.alignment_loss(label) to the loss in your own update function instead"
        ) from error
