"""The logits of a model that ends in a sigmoid or softmax module: what that module took in."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from ..errors import ReSegError, outline
from .hooks import Recorder


class Ending:
    """A hook on the module that a model's output comes out of. The output stays as it is.

    Args:
        model: the model, without wrappers.
        path: of the module in it.

    Raises:
        ReSegError: there is no such module.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        try:
            self.module = model.get_submodule(path)
        except AttributeError as error:
            raise ReSegError(f"{type(model).__name__} has no module {path!r}, whose input the logits are") from error
        self.path, self._hook = path, _Keep()
        self._hook.active = True
        self._handle = self.module.register_forward_hook(self._hook)
        self._finalizer = weakref.finalize(self, self._handle.remove)

    def logits(self, output: Tensor) -> Tensor:
        """What the module took in when it made the model's `output`, once.

        Raises:
            ReSegError: the module did not run in training since the last call, or made something else.
        """
        kept, self._hook.kept = self._hook.kept, None
        if kept is None:
            raise ReSegError(
                f"the module {self.path!r}, whose input the logits are, did not run in training since the last call; "
                "in a compiled model it must be hooked before the first call: build this before"
            )
        taken, made = kept
        # a wrapper may hand on another tensor of these values (DistributedDataParallel does)
        if made.shape != output.shape or taken.shape != output.shape:
            raise ReSegError(
                f"the model's output is {outline(output)}, and its module {self.path!r}, whose input the logits are, "
                f"made {outline(made)} of {outline(taken)}; pass output= with the path to the logits"
            )
        return taken

    def remove(self) -> None:
        """Take the hook off. May be called twice."""
        self._handle.remove()
        self._hook.active, self._hook.kept = False, None


class _Keep(Recorder):
    """Keeps what its module took in and gave back in training."""

    def __init__(self, recording: None = None) -> None:
        super().__init__(recording)
        self.active = False  # not in a copy of the model
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.active and module.training:
            self.kept = (args[0], output)
