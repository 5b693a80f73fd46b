"""Lightning: the life cycle of what a LightningModule uses of this library, beside one line in its training_step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..alignment.wrapper import ReSegWrapper
from ..errors import ReSegError
from ..regularizer import Regularizer
from . import checked


class ReSegCallback(Callback):
    """Runs stage 1 before the first training step; keeps teacher, heads and mean teacher in the checkpoint.

    It serves every `ReSegWrapper`, `DeepSupervision` and `CutMixConsistency` that is an attribute of the
    LightningModule when `setup` is called. Their states lie in `checkpoint["callbacks"]`, never in the module's
    state_dict, and a resumed run has no stage 1. A wrapper whose weight is 0 when training starts gets none either.

    The checkpoint's weights load without this library. To resume from one (`trainer.fit(..., ckpt_path=...)`) takes it
    if the optimizer has parameters of the heads: without them torch says that a parameter group
    "doesn't match the size of optimizer's group", and the optimizer has to begin anew.

    Args:
        loader: batches for stage 1; None takes the trainer's training loader, if it is one.
        **fit_recon: of `ReSegWrapper.fit_recon`, `epochs=` or `steps=` above all.

    Raises:
        ReSegError: the module has none of them, or not those of the checkpoint; stage 1 finds several training
            loaders.
    """

    def __init__(self, *, loader: Iterable[Any] | None = None, **fit_recon: Any) -> None:
        self.loader, self.fit_recon = loader, checked(fit_recon)
        self._found: dict[str, Regularizer] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find them."""
        self._found = {name: value for name, value in vars(pl_module).items() if isinstance(value, Regularizer)}
        if not self._found:
            raise ReSegError(
                f"{type(pl_module).__name__} has no ReSegWrapper, DeepSupervision or CutMixConsistency among its "
                "attributes; in its __init__ write self.reseg = ReSegWrapper(self.net)"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring heads and mean teacher to where the module is, before the optimizer's state is restored."""
        for each in self._found.values():
            if not isinstance(each, ReSegWrapper):  # which may have no teacher yet, and moves it itself
                each.to(pl_module.device, pl_module.dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stage 1, unless the checkpoint had the teacher."""
        for each in self._found.values():
            if isinstance(each, ReSegWrapper) and each.weight != 0 and not each.ready:
                loader: Any = trainer.train_dataloader if self.loader is None else self.loader
                if self.loader is None and isinstance(loader, (Mapping, list, tuple)):  # a CombinedLoader's, too
                    raise ReSegError(
                        "the trainer has several training loaders, and stage 1 needs the one of images and labels: "
                        "ReSegCallback(loader=...)"
                    )
                each.fit_recon(loader, **{"progress": trainer.progress_bar_callback is not None, **self.fit_recon})

    def state_dict(self) -> dict[str, Any]:
        """{attribute: its state}, without teachers that are not trained yet."""
        return {
            name: each.state_dict()
            for name, each in self._found.items()
            if not isinstance(each, ReSegWrapper) or each.ready
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every attribute its state back."""
        for name, state in state_dict.items():
            if name not in self._found:
                raise ReSegError(
                    f"the checkpoint has a state for self.{name}, the module has {list(self._found)}. To go on without "
                    "it load the weights alone (checkpoint['state_dict']): the optimizer's state may hold its "
                    "parameters, too"
                )
            self._found[name].load_state_dict(state)
