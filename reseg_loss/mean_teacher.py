"""The mean teacher: a copy of a model whose weights are an average of the model's weights over its training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .common.distributed import broadcast
from .common.dryrun import refuse_lazy, version_of
from .errors import ReSegError, outline
from .recording.copying import compiler_of, copy_model, is_sharded, unwrap

SHARDED = "the model is sharded (fully_shard), but its mean teacher needs whole parameters; use DDP"


class MeanTeacher:
    """An average of a model over its training, which labels images.

    Its parameters average the model's. It becomes equal to the model at the first `start`, so the model may still get
    other weights before that. (Tarvainen and Valpola, NeurIPS 2017.)

    Args:
        model: the model, or its wrapper. If it is compiled, the copy is, too.
        decay: decay of the average, per `update`.
        average_buffers: False predicts with each module in the same mode as the model's. In training mode, batch
            normalisation then uses the statistics of the predicted images and keeps its own running statistics, and
            dropout is on. True predicts in evaluation mode, with an average of the model's buffers. Use True for a
            model whose batches contain other images as well.

    Raises:
        ReSegError: the model cannot be copied, is sharded (`fully_shard`), has lazy parameters, or has parameters in
            less than 32 bits.
    """

    def __init__(self, model: nn.Module, decay: float, *, average_buffers: bool = False) -> None:
        self._model = unwrap(model)
        self.decay, self.average_buffers, self.started = decay, average_buffers, False
        if is_sharded(self._model):
            raise ReSegError(SHARDED)
        refuse_lazy(self._model)
        _refuse_low(self._model)
        copied = copy_model(self._model, "the mean teacher", "leave it as it was until this is built")
        self.network: nn.Module = copied.requires_grad_(False)
        self._run: Callable[[Tensor], Any] | None = None  # compiled
        self._given = model

    def compile(self, compiler: Callable[[Any], Any] = torch.compile) -> None:
        """Compile `predict`, by torch.compile or a function like it; does nothing if it is compiled already."""
        if not callable(compiler):
            raise ReSegError(f"compiler= must be torch.compile or a function like it, got {outline(compiler)}")
        if self._run is not None:
            return
        network = self.network

        # a separate function, because torch remembers sizes per code object, and a model and its copy share theirs: the
        # mean teacher's batch sizes would make the model's batches dynamic, and slow
        def run(images: Tensor) -> Any:
            return network(images)

        self._run = compiler(run)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}  # a copy's would run the original's network

    def start(self) -> None:
        """Become equal to the model, at the first call only."""
        if self.started:
            self._to_model()
        else:
            self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Become equal to the model as it is now, in place; a ReSegError if its parameters or buffers have changed."""
        self._to_model()
        for what in ("parameters", "buffers"):
            self._take_over(what)
        broadcast(self.network)  # DistributedDataParallel may still have to make the ranks' models equal
        self.started = True

    @torch.no_grad()
    def update(self, *, buffers: bool = False) -> None:
        """Follow the model by one step. With `buffers`, copy the model's buffers, for steps in which this did not run.

        Raises:
            ReSegError: the model's parameters are not those it had when this was built.
        """
        self.start()
        pairs = self._pairs("parameters")
        if self.average_buffers:
            pairs += self._pairs("buffers")
        averaged: list[tuple[Tensor, Tensor]] = []
        for a, p in pairs:
            if a.is_floating_point() or a.is_complex():
                averaged.append((a, p))
            else:  # counters
                a.copy_(p)
        torch._foreach_lerp_([a for a, _ in averaged], [p for _, p in averaged], 1 - self.decay)  # pyright: ignore
        if buffers and not self.average_buffers:
            self._take_over("buffers")

    def predict(self, images: Tensor) -> Any:
        """What the network returns for images, without gradients.

        Each module is in the same mode as the model's, so parts that the user keeps in evaluation mode are in
        evaluation mode here, too. With `average_buffers` all modules are in evaluation mode.

        Raises:
            ReSegError: the model's modules are not those it had when this was built, or the network fails on the
                images or writes into them.
        """
        for mine, theirs in self._both("modules"):
            training = theirs.training and not self.average_buffers
            if mine.training != training:
                mine.training = training
        compiler = compiler_of(self._given)
        if compiler is not None:
            self.compile(compiler)
        run = self.network if self._run is None else self._run
        version = version_of(images)
        try:
            with torch.no_grad():
                output = run(images)
        except (torch.OutOfMemoryError, ReSegError):
            raise
        except Exception as error:
            raise ReSegError(
                f"the mean teacher failed on unlabelled images of shape {tuple(images.shape)}, {images.dtype}, on "
                f"{images.device}; they must have the form of the labelled images ({type(error).__name__}: {error})"
            ) from error
        if version_of(images) != version:
            raise ReSegError(
                "the model writes into its images (x.sub_(mean), say), but they are used again after the mean teacher "
                "has predicted them: let its forward make a new tensor instead (x = x - mean)"
            )
        return output

    def _take_over(self, what: str) -> None:
        """Copy the model's "parameters" or "buffers" to the network."""
        for a, p in self._pairs(what):
            a.copy_(p)

    def _pairs(self, what: str) -> list[tuple[Tensor, Tensor]]:
        """The network's "parameters" or "buffers" with the model's, each once.

        Raises:
            ReSegError: names or shapes are not equal, or the model is sharded.
        """
        held, found = f"_{what}", {}
        for mine, theirs in self._both(what):
            own, others = getattr(mine, held), getattr(theirs, held)
            if own.keys() != others.keys():  # a pruned weight has the shape of the weight
                raise self._changed(what)
            for name, a in own.items():
                p = others[name]
                if type(a) is not type(p) or (a is not None and a.shape != p.shape):
                    raise self._changed(what)
                if a is not None and found.setdefault(id(a), (a, p))[1] is not p:
                    raise self._changed(what)
        return [*found.values()]

    def _both(self, what: str) -> Iterator[tuple[nn.Module, nn.Module]]:
        """The network's modules with the model's; a ReSegError that names `what` unless they are of the same types."""
        mine, theirs = _parts(self.network), _parts(self._model)
        kinds = [[*map(type, parts)] for parts in (mine, theirs)]
        # torch.fx makes a class of the same name for each copy
        if kinds[0] != kinds[1] and [*map(_name, kinds[0])] != [*map(_name, kinds[1])]:
            raise self._changed(what)
        return zip(mine, theirs)

    def _changed(self, what: str) -> ReSegError:
        if is_sharded(self._model):
            return ReSegError(SHARDED)
        return ReSegError(
            f"the model's {what} have changed since its mean teacher was made; change the model first, then build this "
            "loss"
        )

    def _to_model(self) -> None:
        """Move to the model's device, which may have changed; a ReSegError if its dtype has changed."""
        mine, theirs = (next(m.parameters(), None) for m in (self.network, self._model))
        if mine is None or theirs is None:
            return
        if mine.device != theirs.device:
            self.network.to(theirs.device)
        if theirs.dtype.itemsize < 4:
            _refuse_low(self._model)
        if mine.dtype != theirs.dtype:
            raise ReSegError(
                f"the model's parameters are {theirs.dtype}, its mean teacher's are {mine.dtype}: the model was moved "
                f"to another dtype, so move the mean teacher, too: call to({theirs.dtype}) of this loss"
            )


def _refuse_low(model: nn.Module) -> None:
    """Raise a ReSegError if parameters are too coarse for an average."""
    low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize < 4}
    if low:
        raise ReSegError(
            f"the model has {', '.join(map(str, low))} parameters, and the small steps of an average are rounded to "
            "nothing in that precision; keep the parameters in float32 and use torch.autocast"
        )


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _parts(model: nn.Module) -> list[nn.Module]:
    """Every module once, except the wrappers of torch.compile. Each step needs them, and `modules()` is slower."""
    found: dict[nn.Module, None] = {}
    left = [model]
    while left:
        module = left.pop()
        if module not in found:
            found[module] = None
            left += [inner for inner in module._modules.values() if inner is not None]
    return [module for module in found if "_orig_mod" not in module._modules]
