"""Hugging Face's Trainer with unlabelled images in addition to the labelled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import Trainer

from ..common.batches import Rounds, unlabelled_image
from ..common.distributed import gathered, rank, world_size
from ..errors import ReSegError
from ..semi import SemiSupervised
from . import averaged, follow, version

FILE = "semi.pt"  # in a checkpoint's folder, in addition to what the Trainer saves there


class SemiSupervisedTrainer(Trainer):
    """A Trainer whose steps also have a batch of unlabelled images.

    The loss is that of `SemiSupervised`; a loss that the model itself returns is not used. The heads' parameters are
    added to the optimizer that the Trainer makes; `max_grad_norm` clips the model's gradients alone. The mean teacher
    follows after each optimizer step. `evaluate`, `predict`, `save_model`, `load_best_model_at_end` and the
    "model.safetensors" of checkpoints all use the mean teacher. Everything else that a resumed run needs, including the
    weights in training, is in a file "semi.pt" in the checkpoint's folder. If the number of processes has changed, the
    unlabelled images start over.

    Args:
        *args: as for `transformers.Trainer`.
        semi: a `SemiSupervised` built for the Trainer's model.
        unlabelled: a loader of image batches: tensors (B, C, *spatial), tuples or lists whose element 0 is one, or
            dicts with the model's main input ("pixel_values"), "image" or "data". It is repeated without end. With
            several processes, give it a DistributedSampler.
        **kwargs: as for `transformers.Trainer`.

    Raises:
        ReSegError: `semi` was built for another model; an argument cannot be followed; a batch has another form.
    """

    def __init__(self, *args: Any, semi: SemiSupervised, unlabelled: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(semi, SemiSupervised):
            raise ReSegError(f"semi= must be a SemiSupervised, got {type(semi).__name__}")
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ReSegError(
                "compute_loss_func= and label_smoothing_factor do not reach the loss of SemiSupervised: pass "
                "SemiSupervised(..., task_loss=) instead"
            )
        if self.args.save_only_model and self.args.load_best_model_at_end:
            raise ReSegError("load_best_model_at_end needs all of a checkpoint: leave out save_only_model")
        if semi.model is not self.model:
            raise ReSegError("semi= was built for another model than the Trainer's; build both with the same model")
        self.semi = semi
        self.model_accepts_loss_kwargs = False  # so that the loss is divided where gradients are accumulated
        self._unlabelled = Rounds(unlabelled, "unlabelled")
        self._end: Callable[[], None] = lambda: None
        self._left: int | None = None  # version of the weights, as training has left them; None while it runs
        self._began = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.train`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end()
            self._left = version(self.semi.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Like `Trainer.create_optimizer`, with the heads. An optimizer that was passed must have them already."""
        self._end()  # where the Trainer begins anew with a smaller batch
        self.semi.to(self.args.device)
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        heads = list(self.semi.parameters())
        if made and heads:
            optimizer.add_param_group({"params": heads, "weight_decay": self.args.weight_decay})
        inner = getattr(optimizer, "optimizer", optimizer)  # of an earlier train(), within Accelerate's
        self._end = follow(self.semi, [inner], type(self).__name__)
        self._began, self._left = True, None
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training, the loss of labelled and unlabelled images; otherwise the model's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        name = str(getattr(self.semi.model, "main_input_name", "pixel_values"))
        if set(inputs) != {name, "labels"}:
            raise ReSegError(f"a training batch has {sorted(inputs)}; it must have exactly {[name, 'labels']}")
        if all(p.grad is None for p in self.semi.model.parameters()):  # the Trainer clears the model's gradients alone
            for p in self.semi.parameters():
                p.grad = None
        returned: list[Any] = []

        def forward(x: Tensor) -> Any:
            returned.append(model(**{name: x}))
            return returned[-1]

        loss = self.semi.loss(inputs[name], inputs["labels"], self._next(name), forward=forward)
        return (loss, returned[0]) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Like `Trainer.evaluation_loop`, with the mean teacher."""
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Like `Trainer.save_model`, with the mean teacher."""
        with self._averaged():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "semi": self.semi.state_dict(),
            "trained": self.semi.model.state_dict(),
            "unlabelled": gathered(self._unlabelled.state()),
        }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = self._loaded(checkpoint)
        self.semi.model.load_state_dict(state["trained"])
        self.semi.load_state_dict(state["semi"])
        if len(state["unlabelled"]) == world_size():
            self._unlabelled = self._unlabelled.resumed(state["unlabelled"][rank()])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.semi.load_state_dict(self._loaded(str(self.state.best_model_checkpoint))["semi"])
        # the file of weights may have other names for them (SegFormer's, in transformers 5)
        self.semi.model.load_state_dict(self.semi.average.state_dict())

    def _loaded(self, checkpoint: str) -> dict[str, Any]:
        file = Path(checkpoint) / FILE
        if not file.exists():
            raise ReSegError(f"{checkpoint} has no {FILE}; it is not a complete checkpoint of a {type(self).__name__}")
        return torch.load(file, map_location="cpu", weights_only=True)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The mean teacher's weights in the model, unless it was never trained here or has got other weights since."""
        if not self._began or self._left not in (None, version(self.semi.model)):
            yield
            return
        with averaged(self.semi):
            yield
        if self._left is not None:
            self._left = version(self.semi.model)

    def _next(self, name: str) -> Tensor:
        batch = self._unlabelled.next_batch()
        return unlabelled_image(batch[name] if isinstance(batch, Mapping) and name in batch else batch)
