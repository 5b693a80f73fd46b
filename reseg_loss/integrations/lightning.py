"""Lightning: a callback that manages this library's losses in a LightningModule, given one line in training_step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..alignment.wrapper import ReSegWrapper
from ..common.batches import batches
from ..common.state import check_entries
from ..errors import ReSegError
from ..regularizer import Regularizer
from . import Averaging, averaged, checked, follow, random_states, restore_random_states, version


class ReSegCallback(Callback):
    """Runs stage 1 before the first training step, saves and restores all losses, and updates the mean teacher.

    It manages every `ReSegWrapper`, `DeepSupervision`, `CutMixConsistency` and `SemiSupervised` that is an attribute of
    the LightningModule when `setup` is called. Their states are in `checkpoint["callbacks"]`, never in the module's
    state_dict. A resumed run does not repeat stage 1. A wrapper whose weight is 0 when training starts gets no stage 1,
    either. Random states are in the checkpoint, too. They are restored if the number of processes is the same.

    The callback calls `update()` of a mean teacher after each optimizer step (with several optimizers, after the last
    one that trains the model). A call of `update()` in the module raises. With `validate_average`, the model has the
    mean teacher's weights during validation, and its own again afterwards, bit for bit. So
    `ModelCheckpoint(monitor=...)` compares mean teachers, and a checkpoint's "state_dict" holds the mean teacher's
    weights. The weights in training are in `checkpoint["callbacks"]`; a resumed run (`ckpt_path=`) continues from
    those. `trainer.test` and `trainer.predict` after `trainer.fit` use the mean teacher as well, unless the module has
    got other weights since.

    The checkpoint's weights load without this library. If the optimizer has the heads' parameters, resuming
    (`trainer.fit(..., ckpt_path=...)`) needs this library. Without it, torch says that a parameter group "doesn't match
    the size of optimizer's group", and the optimizer has to start over.

    Args:
        loader: batches for stage 1; None takes the trainer's training loader, if there is only one.
        validate_average: False validates and saves the model in training, as without this callback.
        **fit_recon: keywords of `ReSegWrapper.fit_recon`, above all `epochs=` or `steps=`.

    Raises:
        ReSegError: the module has none of these losses, or not those of the checkpoint; there are several training
            loaders for stage 1; two mean teachers average one model; `batches` has several epochs; ModelCheckpoint has
            `save_weights_only`, which would save other weights than those that are validated.
    """

    def __init__(self, *, loader: Iterable[Any] | None = None, validate_average: bool = True, **fit_recon: Any) -> None:
        self.loader, self.validate_average, self.fit_recon = loader, validate_average, checked(fit_recon)
        self._found: dict[str, Regularizer] = {}
        self._fits = False
        self._ends: list[Callable[[], None]] = []  # of following
        self._swapped = ExitStack()
        self._swaps: dict[str, Averaging] = {}  # whose weights the models have at the moment
        self._versions: dict[str, int] = {}  # of the models' weights, as training has left them
        self._random: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the losses."""
        found = {name: value for name, value in vars(pl_module).items() if isinstance(value, Regularizer)}
        if not found:
            raise ReSegError(
                f"{type(pl_module).__name__} has no ReSegWrapper, DeepSupervision, CutMixConsistency or SemiSupervised "
                "among its attributes; in its __init__ write self.reseg = ReSegWrapper(self.net), or the like"
            )
        self._fits = stage == "fit"
        if found != self._found:
            self._found, self._versions = found, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move heads and mean teacher to the module's device, before the optimizer's state is restored."""
        for each in self._found.values():
            if not isinstance(each, ReSegWrapper):  # which may have no teacher yet, and moves it itself
                each.to(pl_module.device, pl_module.dtype)
        models = [id(each.model) for each in self._averages().values()]
        if len(set(models)) < len(models):
            raise ReSegError("two mean teachers average the same model; keep one, or pass validate_average=False")
        if models and any(
            isinstance(each, ModelCheckpoint) and each.save_weights_only for each in trainer.checkpoint_callbacks
        ):
            raise ReSegError(
                "ModelCheckpoint(save_weights_only=True) would save the weights in training, but the mean teacher's "
                "weights are validated: leave out save_weights_only, or pass ReSegCallback(validate_average=False)"
            )
        if self._random is not None:  # before the loaders' iterators are made
            restore_random_states(self._random)
            if hasattr(trainer.fit_loop, "is_resuming"):
                self._random = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states again: before Lightning 2.5.5 a resumed run makes the loaders' iterators twice."""
        if self._random is not None:
            restore_random_states(self._random)
            self._random = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A run that resumes within an epoch starts no epoch before this."""
        self._random = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stage 1, unless the checkpoint had the teacher."""
        if isinstance(trainer.train_dataloader, batches) and trainer.max_epochs != 1:
            raise ReSegError(
                "batches(steps=) is a whole run, so a second epoch would have no step, and a resumed run would start "
                "over: pass max_epochs=1"
            )
        for each in self._found.values():
            if isinstance(each, ReSegWrapper) and each.weight != 0 and not each.ready:
                loader: Any = trainer.train_dataloader if self.loader is None else self.loader
                if self.loader is None and isinstance(loader, (Mapping, list, tuple)):  # a CombinedLoader's, too
                    raise ReSegError(
                        "the trainer has several training loaders, and stage 1 needs the one with images and labels: "
                        "pass ReSegCallback(loader=...)"
                    )
                if getattr(loader, "_iterator", None) is not None:
                    # with persistent workers or a state, it has one iterator, and the trainer has started it
                    loader = copy.copy(loader)
                    vars(loader)["_iterator"] = None
                each.fit_recon(loader, **{"progress": trainer.progress_bar_callback is not None, **self.fit_recon})
            if isinstance(each, Averaging):
                self._ends.append(follow(each, trainer.optimizers, type(self).__name__))
        self._note()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model the mean teacher's weights."""
        for name, left in self._versions.items():
            # after training the module may have got the weights of a checkpoint, which are to be tested then
            if self._fits or left == version(self._averages()[name].model):
                self._swaps[name] = self._averages()[name]
        self._swap_in()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its own weights again."""
        if self._swaps:
            self._swap_out()
            self._note()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its own weights, and leave `update()` to the module."""
        self._swap_out()
        self._end()
        self._note()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave `update()` to the module."""
        self._end()
        self._note()

    def state_dict(self) -> dict[str, Any]:
        """The losses' states, except teachers that are not trained yet; the weights in training; random states."""
        swaps = self._swap_out()
        trained = {name: self._averages()[name].model.state_dict() for name in self._versions}
        if swaps:  # saved while it validates
            trained, self._swaps = copy.deepcopy(trained), swaps
            self._swap_in()
        return {
            "losses": {
                name: each.state_dict()
                for name, each in self._found.items()
                if not isinstance(each, ReSegWrapper) or each.ready
            },
            "trained": trained,
            "random": random_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every loss and, if training continues, the model's weights in training."""
        check_entries(state_dict, {"losses": dict, "trained": dict, "random": list}, "this state of a ReSegCallback")
        for name, state in state_dict["losses"].items():
            if name not in self._found:
                raise ReSegError(
                    f"the checkpoint has a state for self.{name}, but the module has {list(self._found)}. To continue "
                    "without it, load only the weights (checkpoint['state_dict']), because the optimizer's state may "
                    "hold its parameters, too"
                )
            self._found[name].load_state_dict(state)
        if self._fits:  # to test a checkpoint, the model has the weights already that are to be tested
            for name, weights in state_dict["trained"].items():
                self._found[name].model.load_state_dict(weights)
            self._random = state_dict["random"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the mean teacher's weights into the checkpoint's "state_dict"."""
        average = {
            id(mine): theirs.detach()
            for each in map(self._averages().__getitem__, self._versions)
            for what in ("parameters", "buffers")
            for mine, theirs in zip(getattr(each.model, what)(), getattr(each.average, what)())
        }
        weights = checkpoint["state_dict"]
        for name, value in pl_module.state_dict(keep_vars=True).items():
            if name in weights and id(value) in average:
                weights[name] = average[id(value)]

    def _averages(self) -> dict[str, Averaging]:
        """The mean teachers that are validated."""
        found = {name: each for name, each in self._found.items() if isinstance(each, Averaging)}
        return found if self.validate_average else {}

    def _note(self) -> None:
        self._versions = {name: version(each.model) for name, each in self._averages().items()}

    def _swap_in(self) -> None:
        for each in self._swaps.values():
            self._swapped.enter_context(averaged(each))

    def _swap_out(self) -> dict[str, Averaging]:
        """Give the models their own weights; returns the losses whose averages were in them."""
        self._swapped.close()
        swaps, self._swaps = self._swaps, {}
        return swaps

    def _end(self) -> None:
        for end in self._ends:
            end()
        self._ends = []
