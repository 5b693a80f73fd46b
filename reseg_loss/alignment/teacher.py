"""The teacher: a network that turns label maps into images and is frozen once it is trained."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..common.dryrun import preserved_rng
from ..common.labels import LabelEncoding, plain_label
from ..common.outputs import common_activation, in_evaluation, select_output, trained_ending
from ..errors import ReSegError
from ..recording.copying import copy_model, is_sharded
from .image_range import ImageMap

logger = logging.getLogger("reseg_loss")

POWER_ITERATIONS = 15  # as many as torch's spectral_norm makes for its first weight


class Teacher(nn.Module):
    """A network from a label map to a reconstructed image: a body between two optional 1x1 convolutions.

    Args:
        body: the network; it is called unchanged.
        encoding: how labels become its input.
        in_channels: the body's input channels. If they differ from `encoding.channels`, a convolution comes before it.
        out_channels: the body's output channels. If they differ from `image_channels`, a convolution comes after it.
        image_channels: channels of the image.
        output: path to the image-sized tensor in the body's output; None finds it (`select_output`).
        bounded: the body ends in an activation, so it needs the convolution after it to reach every image value.

    Attributes:
        image_map: the map that stage 1 applied to the images before comparing them with the teacher's output; None if
            there was none. `ReSegWrapper.reconstruct` undoes it, a call of the teacher does not.
    """

    def __init__(
        self,
        body: nn.Module,
        encoding: LabelEncoding,
        *,
        in_channels: int,
        out_channels: int,
        image_channels: int,
        output: Sequence[int | str] | None = None,
        bounded: bool = False,
    ) -> None:
        super().__init__()
        conv = nn.Conv2d if encoding.dims == 2 else nn.Conv3d
        like = next((p for p in body.parameters() if p.is_floating_point()), torch.zeros(()))
        kwargs: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.encoding, self.output, self.frozen = encoding, output, False
        self.in_channels, self.out_channels, self.image_channels = in_channels, out_channels, image_channels
        same_in, same_out = in_channels == encoding.channels, out_channels == image_channels and not bounded
        self.before = nn.Identity() if same_in else conv(encoding.channels, in_channels, 1, **kwargs)
        self.body = body
        self.after = nn.Identity() if same_out else conv(out_channels, image_channels, 1, **kwargs)
        # follows .to(), for a body without parameters
        self.register_buffer("_like", torch.zeros(0, **kwargs), persistent=False)
        self.image_map: ImageMap | None = None
        self._ends_as_trained = False  # not known yet
        # masks of -inf and the like, which are no sign of a lost training
        self._infinite_from_start = frozenset(_not_finite(self.named_buffers()))

    def forward(self, label: Any) -> Tensor:
        """(B, image channels, *spatial) from a label in any form that `LabelEncoding` takes."""
        return self.decode(self._encoded(label))

    def _encoded(self, label: Any) -> Tensor:
        label = plain_label(label)
        if label.ndim not in (self.encoding.dims + 1, self.encoding.dims + 2):
            raise ReSegError(f"a label of shape {tuple(label.shape)} is no batch of {self.encoding.dims}D label maps")
        self.encoding.check_shape(label, (len(label), self.image_channels, *label.shape[-self.encoding.dims :]))
        return self.encoding.encode(label.to(self.reference.device, non_blocking=True))[0]

    def decode(self, encoded: Tensor) -> Tensor:
        """The image from an encoded label, (B, encoding.channels, *spatial)."""
        output = self.body(self.before(encoded.to(self.reference.dtype)))
        return self.after(select_output(output, encoded.shape[0], tuple(encoded.shape[2:]), self.output))

    def refuse_activation_in_evaluation(self, label: Any) -> None:
        """Raise a ReSegError if the body ends in an activation in evaluation, but not in training."""
        if self._ends_as_trained:
            return
        encoded = self._encoded(label)
        given = self.before(encoded.to(self.reference.dtype))
        evaluated = common_activation(in_evaluation(self.body, given), tuple(encoded.shape[2:]))
        trained, _ = trained_ending(self.body, given, evaluated)
        if evaluated != trained:
            raise ReSegError(
                f"in evaluation mode the teacher ends in a {evaluated}, which stage 1 did not train it with, so its "
                "picture would not be an image; let the model return logits in evaluation as well to look at it"
            )
        self._ends_as_trained = True

    def run(self, encoded: Tensor) -> None:
        """Only the body's forward, for the hooks that read its features."""
        self.body(self.before(encoded.to(self.reference.dtype)))

    def to_channels_last(self, last: bool = True) -> None:
        """Store the weights of convolutions with channels last, or back; their outputs then have the same order."""
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for parameter in self.parameters():
            if parameter.ndim in formats:
                form = formats[parameter.ndim] if last else torch.contiguous_format
                parameter.data = parameter.data.contiguous(memory_format=form)

    @property
    def reference(self) -> Tensor:
        """A tensor with the body's device and dtype."""
        for parameter in self.parameters():  # no next(): torch 2.6 cannot compile it
            if parameter.is_floating_point():
                return parameter
        return self.get_buffer("_like")

    def made_of(self) -> tuple[list[Any], ...]:
        """All modules, the keys of their hooks, and the addresses of all parameters and buffers.

        Names are left out, because they take twice as long and this runs in every step.
        """
        modules, hooks, addresses = [*self.modules()], [], []
        for module in modules:
            hooks += (*module._forward_pre_hooks, *module._forward_hooks)
            for held in (module._parameters, module._buffers):
                if held:
                    addresses += [tensor.data_ptr() for tensor in held.values() if tensor is not None]
        return modules, hooks, addresses

    def check_finite(self, when: str, state: Mapping[str, Any] | None = None) -> None:
        """Raise a ReSegError if a parameter or buffer holds NaN or infinite values. It waits for the device.

        Buffers that held such values when the teacher was built do not count. `when` is for the message. If a `state`
        is given, it is checked instead of the teacher.
        """
        tensors = (*self.named_parameters(), *self.named_buffers()) if state is None else state.items()
        names = _not_finite((name, tensor) for name, tensor in tensors if isinstance(tensor, Tensor))
        lost = [name for name in names if name not in self._infinite_from_start]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ReSegError(
                f"{', '.join(lost[:3])}{more} of the teacher: NaN or infinite values {when}. Lower the learning rate "
                "(optimizer=), or scale the images to about unit range (standardize_image=True). This teacher cannot "
                "be used, and was neither saved nor frozen: build a new ReSegWrapper"
            )

    def freeze(self) -> Teacher:
        """Evaluation mode and no gradients from now on, whatever `train()` says. Returns self.

        This also stops the observers of quantization-aware training, which keep running in evaluation mode.
        """
        self.frozen = True
        self.requires_grad_(False)
        for module in self.modules():
            if callable(stop := getattr(module, "disable_observer", None)):
                stop()
        for parameter in self.parameters():
            parameter.grad = None
        return self.eval()

    @contextmanager
    def unmoved(self, known: list[tuple[nn.Module, str]] | None = None) -> Iterator[list[tuple[nn.Module, str]]]:
        """Restore the buffers that some modules (counters, observers) change even in evaluation mode.

        Yields a list that afterwards holds these buffers as (module, name). Pass the list of an earlier forward as
        `known` to skip the comparison of all other buffers.
        """
        asked = [(module, name) for module in self.modules() for name in module._buffers] if known is None else known
        before = [(m, name, held, held.clone()) for m, name in asked if (held := m._buffers.get(name)) is not None]
        moved: list[tuple[nn.Module, str]] = []
        try:
            yield moved
        finally:
            for module, name, held, value in before:
                if known is not None or _changed(module._buffers.get(name), value):
                    module._buffers[name] = held.copy_(value)
                    moved.append((module, name))

    def train(self, mode: bool = True) -> Teacher:
        """Like `nn.Module.train`, but a frozen teacher stays in evaluation mode, so its statistics cannot drift."""
        return super().train(mode and not self.frozen)


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with NaN or infinite values; waits for each device once."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() or tensor.is_complex():
            # formats of 8 bits know few operators
            tensor = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
            by_device.setdefault(tensor.device, []).append((name, tensor.isfinite().all()))
    return [
        name
        for entries in by_device.values()
        for (name, _), finite in zip(entries, torch.stack([finite for _, finite in entries]).tolist())
        if not finite
    ]


def copy_for_teacher(model: nn.Module, init: Literal["random", "copy"]) -> nn.Module:
    """A trainable copy of the model, of the same class, with its own weights ("random") or the model's ("copy").

    Random weights are drawn by every module's own `reset_parameters`, in a fork of the current random state. Parameters
    of modules without it (position embeddings, for instance) keep the model's values; one log line names them.

    Raises:
        ReSegError: the model is sharded, has lazy parameters, or cannot be copied.
    """
    refuse_sharded(model)
    body = copy_model(model, "the teacher", "pass teacher=")
    for parameter in body.parameters():
        if parameter.is_floating_point():  # what is frozen in the student must still be learnt here
            parameter.requires_grad_(True)
    body.train()
    if init == "random":
        kept = redraw(body)
        if kept:
            logger.info(
                "the teacher keeps the model's values of %s: no reset_parameters() initialises them", ", ".join(kept)
            )
    return body


def redraw(model: nn.Module) -> list[str]:
    """Draw new weights in all modules that have `reset_parameters`; returns the names of the unchanged parameters."""
    versions = {name: p._version for name, p in model.named_parameters()}
    with preserved_rng(), torch.no_grad():
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset) and not inspect.signature(reset).parameters:
                made = [*getattr(module, "parametrizations", ())]
                with parametrize.cached():  # a parametrized weight is computed anew at every access otherwise
                    reset()
                    for name in made:
                        setattr(module, name, getattr(module, name))
                for _ in range(POWER_ITERATIONS):
                    for name in made:
                        getattr(module, name)
                _redraw_hooked(module)
    return [name for name, p in model.named_parameters() if p._version == versions[name]]


def _redraw_hooked(module: nn.Module) -> None:
    """Set the parameters so that a forward pre-hook that computes the weight from them gives the drawn weight."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            drawn = getattr(module, hook.name)
            module.get_parameter(f"{hook.name}_g").copy_(torch.norm_except_dim(drawn, 2, hook.dim))
            module.get_parameter(f"{hook.name}_v").copy_(drawn)
        elif isinstance(hook, SpectralNorm):
            module.get_parameter(f"{hook.name}_orig").copy_(getattr(module, hook.name))
            for _ in range(POWER_ITERATIONS):
                hook.compute_weight(module, do_power_iteration=True)
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name  # noqa: SLF001 - pruning has no other
            module.get_parameter(f"{name}_orig").copy_(getattr(module, name))


def input_channels(module: nn.Module, default: int) -> int:
    """The number of input channels of a module, taken from its first convolution."""
    convolutions = (m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    return next((m.in_channels for m in convolutions), default)


def refuse_sharded(model: nn.Module) -> None:
    """Raise a ReSegError if the model is sharded."""
    if is_sharded(model):
        raise ReSegError(
            "the model is sharded already; build ReSegWrapper (with example_input=) before fully_shard, or pass "
            "teacher="
        )


def _changed(now: Tensor | None, before: Tensor) -> bool:
    """Whether a buffer's values have changed. A buffer whose shape has changed is a cache, and does not count."""
    if now is None or now.shape != before.shape or now.dtype != before.dtype:
        return False
    return not bool(((now == before) | ((now != now) & (before != before))).all())
