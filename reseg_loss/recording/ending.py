"""The logits of a model that ends in a sigmoid or softmax module: the input of that module."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..common.inputs import readable
from ..common.outputs import is_activation
from ..errors import ReSegError, outline
from .hooks import Recorder, is_of_a_step


class Ending:
    """A hook on the module that makes a model's output. The output stays as it is.

    Args:
        model: the model, without wrappers.
        path: of the module in it.
        grad: True records forwards with gradients, False those without (of a mean teacher).

    Raises:
        ReSegError: there is no such module, or it is not a sigmoid or softmax.
    """

    def __init__(self, model: nn.Module, path: str, *, grad: bool = True) -> None:
        module = dict(model.named_modules()).get(path)
        if module is None:
            raise ReSegError(f"{type(model).__name__} has no module {path!r}, whose input would be the logits")
        if not is_activation(module):
            raise ReSegError(
                f"{path!r} is a {type(module).__name__}; the path after 'in:' in output= must be that of the sigmoid "
                "or softmax module that the model ends in"
            )
        self.path, self._hook, self._looked = path, _Keep(grad), False
        self._hook.active = True
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)
        self._finalizer = weakref.finalize(self, self._handle.remove)

    def logits(self, output: Tensor) -> Tensor:
        """The module's input in the forward that made the model's `output`. Each forward can be asked for once.

        Raises:
            ReSegError: the module did not run in training since the last call, or its output is not `output`.
        """
        kept, several = self._hook.kept, self._hook.several
        self.forget()
        if kept is None:
            raise ReSegError(
                f"the module {self.path!r}, whose input is the logits, did not run in training since the last call. "
                "In a compiled model it must be hooked before the first call: build this loss before that. A copy of a "
                "model has no hooks: build a new loss for it"
            )
        taken, made = kept
        if made is not output and several:
            raise ReSegError(
                f"several training forwards have run the module {self.path!r}, whose input is the logits, since the "
                "last call: compute the loss of each forward before the next one"
            )
        if made is not output and not self._same(made, output):
            raise ReSegError(
                f"the model's output, {outline(output)}, is not the output of its module {self.path!r}, "
                f"{outline(made)}, whose input is the logits. Pass output= with the path to the logits"
            )
        if not isinstance(taken, Tensor) or taken.shape != output.shape:
            raise ReSegError(
                f"the module {self.path!r} got {outline(taken)} and returned {outline(output)}: its input is not logits"
            )
        return taken

    def forget(self) -> None:
        """Drop what was kept."""
        self._hook.kept, self._hook.several = None, False

    def remove(self) -> None:
        """Remove the hook. May be called twice."""
        self._handle.remove()
        self._hook.active = False
        self.forget()

    def _same(self, made: Any, output: Tensor) -> bool:
        """Whether a tensor has the output's values: a wrapper may return a new one (DistributedDataParallel does)."""
        if not isinstance(made, Tensor) or made.shape != output.shape:
            return False
        if not readable(output.device, first=not self._looked):
            return True
        self._looked = True
        return bool(((made == output) | (made != made)).all())  # NaN is told of elsewhere


class _Keep(Recorder):
    """Keeps its module's input and output in training."""

    def __init__(self, grad: bool = True) -> None:
        super().__init__()
        self.grad, self.active = grad, False  # not in a copy of the model
        self.kept: tuple[Any, Any] | None = None
        self.several = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        of_step = module.training or not self.grad  # a mean teacher may predict in evaluation
        if self.active and of_step and torch.is_grad_enabled() is self.grad and is_of_a_step():
            self.several = self.kept is not None
            self.kept = (next(iter((*args, *kwargs.values())), None), output)
