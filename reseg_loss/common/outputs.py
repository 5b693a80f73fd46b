"""Find the tensor of the image's size in what a model returns, and the module that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ReSegError
from .dryrun import call, dry_run, image_of, tensors, tracked_copy

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
# operators that may stand between an activation and the output; their results are the values themselves, or lie between
PASSING = (
    *("_to_copy", "clone", "slice", "select", "view", "_unsafe_view", "alias", "detach"),
    *("unsqueeze", "squeeze", "permute", "transpose", "clamp", "clamp_min", "clamp_max"),
    *("upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_trilinear3d"),
)
PASSING_BACKWARD = {f"{name.title().replace('_', '')}Backward{version}" for name in PASSING for version in (0, 1)}


def select_output(output: Any, batch: int, spatial: tuple[int, ...], path: Sequence[int | str] | None = None) -> Tensor:
    """The tensor (B, C, *spatial) in what a model returns: the first float tensor of the image's size, or at `path`.

    From a stack (B, S, C, *spatial) of deep supervision outputs it takes element 0. An index in `path` is for models
    that return several tensors. If the model returns only the image-sized tensor, for instance in evaluation mode, the
    index is ignored.

    Raises:
        ReSegError: there is no such tensor.
    """
    for key in path or ():
        if isinstance(key, int) and _is_image(output, batch, spatial):
            break
        output = _entry(output, key, path)
    found = list(tensors(output))
    for _, tensor in found:
        if _is_image(tensor, batch, spatial):
            return tensor
        if tensor.ndim == len(spatial) + 3 and _is_image(tensor[:, 0], batch, spatial):
            return tensor[:, 0]
    shapes = ", ".join(f"{''.join(f'[{k}]' for k in keys)} {tuple(t.shape)}" for keys, t in found) or "no tensor"
    raise ReSegError(
        f"the model's output has no float tensor of the image's size {spatial} for {batch} images, only "
        f"{shapes.strip()}; pass output= with the path to it (an index, a key or a tuple of them), or use a model that "
        "returns one"
    )


def _entry(output: Any, key: int | str, path: Sequence[int | str] | None) -> Any:
    try:
        return output[key] if not isinstance(key, str) or hasattr(output, "keys") else getattr(output, key)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ReSegError(f"output={path}: there is no {key!r} in a {type(output).__name__}") from error


def full_size(output: Any, batch: int, spatial: tuple[int, ...], path: Sequence[int | str] | None = None) -> Tensor:
    """Like `select_output`; if a model returns only coarser logits, these are resized to the image's size.

    SegFormer's logits, for instance, have a quarter of the image's side. They are interpolated linearly, as in its own
    loss.

    Raises:
        ReSegError: there are none, or several that are coarser.
    """
    try:
        return select_output(output, batch, spatial, path)
    except ReSegError:
        for key in path or ():
            output = _entry(output, key, path)
        coarse = [x for _, x in tensors(output) if len(set(_strides(x, batch, spatial))) == 1]
        if len(coarse) != 1:
            raise
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    return F.interpolate(coarse[0], spatial, mode=mode, align_corners=False)


def coarser_outputs(output: Any, chosen: Tensor) -> list[Tensor]:
    """The outputs for deep supervision that a model returns along with its full-size logits `chosen` (B, C, *spatial).

    These are all tensors with the same number of channels at a coarser size, or the rest of a stack (B, S, C, *spatial)
    whose element 0 is `chosen`. A model that returns only coarse logits has none.
    """
    batch, spatial = len(chosen), tuple(chosen.shape[2:])
    returned = [x for _, x in tensors(output)]
    stacks = [x for x in returned if x.ndim == chosen.ndim + 1 and x[:, 0].shape == chosen.shape]
    if stacks:
        return [*stacks[0].unbind(1)[1:]]
    if not any(_is_image(x, batch, spatial) for x in returned):
        return []
    return [x for x in returned if _strides(x, batch, spatial) and x.shape[1] == chosen.shape[1]]


def _strides(value: Tensor, batch: int, spatial: tuple[int, ...]) -> list[int]:
    """For a float tensor (B, C, *size) coarser than the image, the width of its cells in pixels; else an empty list."""
    size = tuple(value.shape[2:])
    if not value.is_floating_point() or value.ndim != len(spatial) + 2 or len(value) != batch or size == spatial:
        return []
    # whole numbers, so that what a model has cropped is not taken for coarse
    strides = [round(full / max(n, 1)) for n, full in zip(size, spatial)]
    fits = all(s and n in (full // s, -(-full // s)) for n, full, s in zip(size, spatial, strides))
    return strides if fits else []


def _is_image(value: Any, batch: int, spatial: tuple[int, ...]) -> bool:
    """Whether a value is a float tensor (B, C, *spatial)."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim != len(spatial) + 2:
        return False
    return value.shape[0] == batch and tuple(value.shape[2:]) == spatial


def activation_of(output: Tensor) -> str | None:
    """The activation to probabilities that an output ends in; None if there is none, or no autograd history."""
    made_by = output.grad_fn
    while made_by is not None and made_by.name() in PASSING_BACKWARD:
        made_by = made_by.next_functions[0][0]
    return None if made_by is None else ACTIVATIONS.get(made_by.name())


def sums_to_one(output: Tensor) -> bool:
    """Whether the channels of an output are probabilities, however they were made. Reading it waits for the device."""
    x = output.detach().float()
    return x.shape[1] > 1 and bool(((x >= 0).all() & ((x.sum(1) - 1).abs() < 1e-2).all()).item())


def ending_of(output: Tensor) -> str | None:
    """`activation_of` an output; "softmax" if it is probabilities, however made. Reading it waits for the device."""
    activation = activation_of(output)
    return "softmax" if activation is None and sums_to_one(output) else activation


def all_sum_to_one(output: Any, spatial: tuple[int, ...]) -> bool:
    """Whether all full-size outputs of a model are probabilities, however they were made."""
    found = [x for _, x in tensors(output) if tuple(x.shape[2:]) == spatial]
    return bool(found) and all(map(sums_to_one, found))


def common_activation(output: Any, spatial: tuple[int, ...]) -> str | None:
    """`activation_of` the full-size outputs of a model; None if any of them ends in none."""
    return of_all(activation_of(tensor) for _, tensor in tensors(output) if tuple(tensor.shape[2:]) == spatial)


def of_all(activations: Iterable[str | None]) -> str | None:
    """The activation that outputs end in (that of the first); None if any ends in none, or if there are no outputs."""
    found = list(activations)
    return found[0] if found and None not in found else None


class Ran(NamedTuple):
    """One forward in training mode: its images, its output, and the output of each sigmoid and softmax by path."""

    image: Tensor
    output: Any
    made: dict[str, Any]

    def module_of(self, tensor: Tensor) -> str | None:
        """The path of the sigmoid or softmax module that returned a tensor; None if none did."""
        return next((name for name, given in self.made.items() if given is tensor), None)


def in_training(model: nn.Module, example_input: Any) -> Ran:
    """A forward of a model in training mode, with autograd history. A single image is doubled, for batch statistics.

    Raises:
        ReSegError: the model fails on the example.
    """
    made: dict[str, Any] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, out: made.update({name: out})

    if isinstance(example_input, Tensor) and example_input.ndim and len(example_input) == 1:
        example_input = torch.cat([example_input, example_input])
    with dry_run(model), torch.enable_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            module.training = True
            if is_activation(module):
                stack.callback(module.register_forward_hook(note(name)).remove)
        output = call(model, tracked_copy(example_input))
    return Ran(image_of(example_input), output, made)


def in_evaluation(model: nn.Module, example_input: Any) -> Any:
    """What a model returns in evaluation mode, with autograd history.

    Raises:
        ReSegError: the model fails on the example.
    """
    with dry_run(model), torch.enable_grad():
        return call(model, tracked_copy(example_input))


def trained_ending(model: nn.Module, example_input: Any, evaluated: str | None) -> tuple[str | None, str | None]:
    """The activation that a model ends in during training, and the path of its module if it is a module.

    `evaluated` is the activation in evaluation mode; a model may apply it only there.

    Raises:
        ReSegError: the model fails on the example in training mode.
    """
    if evaluated is None:
        return None, None
    ran = in_training(model, example_input)
    spatial = tuple(ran.image.shape[2:])
    activation = common_activation(ran.output, spatial)
    if activation is None:
        return "softmax" if all_sum_to_one(ran.output, spatial) else None, None
    return activation, ran.module_of(select_output(ran.output, len(ran.image), spatial))


def is_activation(module: nn.Module) -> bool:
    """Whether a module is a sigmoid or softmax."""
    return isinstance(module, tuple(chain(*MODULES.values())))


def refuse_other_ending(model: nn.Module, ending: str | None, channels: int | None, *, overlapping: bool) -> None:
    """Raise a ReSegError if classes overlap, but the model ends in a softmax module, or the other way round.

    Args:
        model: ends in the module `ending`, or in none if that is None.
        ending: the module's name.
        channels: of the model's output; None if not known yet. One channel is a binary model, which has a sigmoid.
        overlapping: as the loss was told.
    """
    module = None if ending is None else model.get_submodule(ending)
    if overlapping and isinstance(module, (*MODULES["softmax"], *MODULES["log-softmax"])):
        raise ReSegError(
            f"overlapping=True, but the model ends in the softmax module {ending!r}, whose classes exclude each other: "
            "let it end in a sigmoid or in logits, or leave out overlapping"
        )
    if not overlapping and (channels or 1) > 1 and isinstance(module, (*MODULES["sigmoid"], *MODULES["log-sigmoid"])):
        raise ReSegError(
            f"the model ends in the sigmoid module {ending!r} with {channels} channels, so its classes may overlap: "
            f"pass overlapping=True and labels (B, {channels}, *spatial), or let it end in a softmax or in logits"
        )


def loss_of_logits(
    task_loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, ending: str | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A task loss as a function of logits: they first go through the sigmoid or softmax at `ending`, unless it is None.

    The module's hooks do not run. A softmax without an axis runs over the channels.

    Raises:
        ReSegError: the task loss is not a function.
    """
    if not callable(task_loss):
        raise ReSegError(f"task_loss must be a function of logits and label, got {type(task_loss).__name__}")
    if ending is None:
        return task_loss
    module = model.get_submodule(ending)
    dim = getattr(module, "dim", None)
    axis = 1 if dim is None else dim
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sigmoid": torch.sigmoid,
        "log-sigmoid": F.logsigmoid,
        "softmax": lambda x: x.softmax(axis),
        "log-softmax": lambda x: x.log_softmax(axis),
    }
    activate = next(functions[name] for name, kinds in MODULES.items() if isinstance(module, kinds))
    return lambda logits, label: task_loss(activate(logits), label)


def refuse_probabilities(activation: str | None, what: str, model: nn.Module) -> None:
    """Raise a ReSegError if a model ends in an activation; `what` says why that is a problem."""
    if activation is None:
        return
    modules = [name for name, module in model.named_modules() if isinstance(module, MODULES[activation])]
    recipe = (
        f"If its forward applies the {activation}, return the logits while self.training, and the {activation} of them "
        "otherwise"
    )
    if modules:
        recipe = (
            f"If it comes from its module {modules[-1]!r}, model.set_submodule({modules[-1]!r}, nn.Identity()) removes "
            f"it and leaves the state_dict keys as they are: then apply the {activation} where you predict. {recipe}"
        )
    raise ReSegError(
        f"the model ends in a {activation}, and {what}. {recipe}. Train with a task loss that takes logits: "
        "nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, smp's DiceLoss with from_logits=True, MONAI's with softmax=True or "
        "sigmoid=True"
    )


def ending_named(output: Any) -> str | None:
    """The module's path if `output` has the form "in:path"; None for a path into what the model returns."""
    return output.removeprefix("in:") if isinstance(output, str) and output.startswith("in:") else None


def as_path(output: int | str | Sequence[int | str] | None) -> tuple[int | str, ...] | None:
    """A path into what a model returns, from one key or several; None stays None.

    Raises:
        ReSegError: `output` has another form.
    """
    if output is None:
        return None
    path: tuple[Any, ...] = tuple(output) if isinstance(output, (list, tuple)) else (output,)
    if not all(isinstance(key, (int, str)) and not isinstance(key, bool) for key in path):
        raise ReSegError(f"output={output!r}; it must be an index, a key, or a tuple of them")
    return path
