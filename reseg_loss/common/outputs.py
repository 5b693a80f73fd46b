"""The tensor of the image's size in what a model returns, and what made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ReSegError
from .dryrun import call, dry_run, image_of, private_copy, tensors

ACTIVATIONS = {
    "SigmoidBackward0": "sigmoid",
    "LogSigmoidBackward0": "log-sigmoid",
    "SoftmaxBackward0": "softmax",
    "LogSoftmaxBackward0": "log-softmax",
}
MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "sigmoid": (nn.Sigmoid,),
    "log-sigmoid": (nn.LogSigmoid,),
    "softmax": (nn.Softmax, nn.Softmax2d),
    "log-softmax": (nn.LogSoftmax,),
}
# what may stand between an activation and the output and leaves its values as they are
PASSING = {f"{name}Backward0" for name in ("ToCopy", "Clone", "Slice", "Select", "View", "Alias", "Unsqueeze")}


def select_output(output: Any, batch: int, spatial: tuple[int, ...], path: Sequence[int | str] | None = None) -> Tensor:
    """The tensor (B, C, *spatial) in what a model returns: the first float tensor of the image's size, or at `path`.

    A stack (B, S, C, *spatial) of deep supervision outputs stands for its element 0. An index is for models that return
    several tensors; where one returns the image-sized tensor alone, in evaluation say, it is that tensor.

    Raises:
        ReSegError: there is none.
    """
    for key in path or ():
        if isinstance(key, int) and _is_image(output, batch, spatial):
            break
        try:
            output = output[key] if not isinstance(key, str) or hasattr(output, "keys") else getattr(output, key)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ReSegError(f"output={path}: there is no {key!r} in a {type(output).__name__}") from error
    found = list(tensors(output))
    for _, tensor in found:
        if _is_image(tensor, batch, spatial):
            return tensor
        if tensor.ndim == len(spatial) + 3 and _is_image(tensor[:, 0], batch, spatial):
            return tensor[:, 0]
    shapes = ", ".join(f"{''.join(f'[{k}]' for k in keys)} {tuple(t.shape)}" for keys, t in found) or "no tensor"
    raise ReSegError(
        f"no float output of the image's size {spatial} among {shapes.strip()}; pass output= with the path to it "
        "(an index, a key or a tuple of them), or a model that returns one"
    )


def _is_image(value: Any, batch: int, spatial: tuple[int, ...]) -> bool:
    """Whether a value is a float tensor (B, C, *spatial)."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != len(spatial) + 2:
        return False
    return value.shape[0] == batch and tuple(value.shape[2:]) == spatial


def activation_of(output: Tensor) -> str | None:
    """The activation to probabilities that an output ends in; None without one, or without a history that tells."""
    made_by = output.grad_fn
    while made_by is not None and made_by.name() in PASSING:
        made_by = made_by.next_functions[0][0]
    return None if made_by is None else ACTIVATIONS.get(made_by.name())


def common_activation(output: Any, spatial: tuple[int, ...]) -> str | None:
    """`activation_of` what a model returns in the image's size; None where any of it ends in none."""
    return of_all(activation_of(tensor) for _, tensor in tensors(output) if tuple(tensor.shape[2:]) == spatial)


def of_all(activations: Iterable[str | None]) -> str | None:
    """The activation that outputs end in, the first one's; None where any of them ends in none, and without outputs."""
    found = list(activations)
    return found[0] if found and None not in found else None


def trained_activation(model: nn.Module, example_input: Any, evaluated: str | None) -> str | None:
    """`common_activation` of a model in training; None for one that has it (`evaluated`) in evaluation alone."""
    if evaluated is None:
        return None
    try:
        with dry_run(model), torch.enable_grad():  # the history tells
            for module in model.modules():
                module.training = True
            output = call(model, private_copy(example_input))
        return common_activation(output, tuple(image_of(example_input).shape[2:]))
    except ReSegError:  # an example of one sample may be too small for the statistics of training
        return None


def refuse_probabilities(activation: str | None, what: str, model: nn.Module) -> None:
    """Raise a ReSegError if a model ends in an activation; `what` says who would go wrong with it, and how."""
    if activation is None:
        return
    modules = [name for name, module in model.named_modules() if isinstance(module, MODULES[activation])]
    recipe = f"Where its forward does that, return logits while self.training, and the {activation} of them otherwise"
    if modules:
        recipe = (
            f"If that is its module {modules[-1]!r}, model.set_submodule({modules[-1]!r}, nn.Identity()) takes it out "
            f"and leaves the state_dict keys as they are: apply the {activation} where you predict. {recipe}"
        )
    raise ReSegError(
        f"the model ends in a {activation}, and {what}. {recipe}. Train with a task loss that takes logits: "
        "nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, smp's DiceLoss with from_logits=True, MONAI's with softmax=True or "
        "sigmoid=True"
    )


def as_path(output: int | str | Sequence[int | str] | None) -> tuple[int | str, ...] | None:
    """A path into what a model returns, from one key or several; None stays.

    Raises:
        ReSegError: it is something else.
    """
    if output is None:
        return None
    path: tuple[Any, ...] = tuple(output) if isinstance(output, (list, tuple)) else (output,)
    if not all(isinstance(key, (int, str)) and not isinstance(key, bool) for key in path):
        raise ReSegError(f"output={output!r}; it is an index, a key, or a tuple of them")
    return path
