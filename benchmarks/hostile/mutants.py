"""Mutants of the library's own code: each one place changed at run time, which the trial must notice."""

from __future__ import annotations
import __future__

import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from .api import PACKAGE


class StaleError(Exception):
    """A mutant whose place is no longer in the code: write it anew."""


@dataclass(frozen=True)
class Mutant:
    """One change of one function.

    Attributes:
        name: what is wrong with it.
        places: (function, old, new) of the change, the first that applies counts; a function by its qualified name,
            wherever in the package it is, `old` exactly once in its source.
    """

    name: str
    places: tuple[tuple[str, str, str], ...]

    def apply(self) -> Callable[[], None]:
        """Change the code, in all places that hold the function; gives what changes it back."""
        tried = []
        for name, old, new in self.places:
            for function in functions(name):
                source = textwrap.dedent(inspect.getsource(function))
                if source.count(old) == 1:
                    code = function.__code__
                    function.__code__ = _compiled(function, source.replace(old, new))
                    return lambda function=function, code=code: setattr(function, "__code__", code)
                tried.append(f"{name} has {old!r} {source.count(old)} times")
            tried.append(f"looked for {name}")
        raise StaleError(f"mutant {self.name!r} does not apply: {'; '.join(tried)}")

    @contextmanager
    def applied(self) -> Iterator[None]:
        undo = self.apply()
        try:
            yield
        finally:
            undo()


def functions(name: str) -> list[FunctionType]:
    """The package's functions of a qualified name, without their decorators."""
    found: dict[int, FunctionType] = {}
    for module in _modules():
        value: Any = module
        for part in name.split("."):
            value = vars(value).get(part) if hasattr(value, "__dict__") else None
            if value is None:
                break
        value = getattr(value, "fget", value)
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            found[id(value)] = value
    return list(found.values())


def by_name(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.name == name)


def _modules() -> Iterator[Any]:
    package = importlib.import_module(PACKAGE)
    yield package
    for info in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        if not info.name.endswith("__main__") and ".nnunet" not in info.name:
            yield importlib.import_module(info.name)


def _compiled(function: FunctionType, source: str) -> CodeType:
    """The code of a function's changed source; its decorators stay with the original, which keeps them."""
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(("def ", "async def ")))
    text = "\n".join(lines[first:])
    names: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(text, f"<mutant of {function.__qualname__}>", "exec", flags, dont_inherit=True), {}, names)
    (made,) = names.values()
    if made.__code__.co_freevars != function.__code__.co_freevars:
        raise StaleError(f"{function.__qualname__} holds names of an outer function; change another place")
    return made.__code__


def _one(name: str, function: str, old: str, new: str, *others: tuple[str, str, str]) -> Mutant:
    return Mutant(name, ((function, old, new), *others))


MUTANTS = (
    _one(
        "teacher encoder against student encoder",
        "pair_terms",
        "(*student.decoder, *student.encoder, student.bottleneck)",
        "(*student.encoder, *student.decoder, student.bottleneck)",
    ),
    _one(
        "levels in the wrong order",
        "pair_terms",
        "*teacher.encoder, *teacher.decoder",
        "*teacher.encoder[::-1], *teacher.decoder",
    ),
    _one("divided by 2 instead of 3", "CrossAlignmentLoss.combine", ".sum() / self.divisor", ".sum() / 2"),
    _one(
        "a term's weight ignored",
        "CrossAlignmentLoss.term_weight",
        "return getattr(self, kind)",
        "return 1.0",
    ),
    _one(
        "the weight ignored",
        "ReSegWrapper.alignment_loss",
        "self._weight * self._settings.every * total",
        "self._settings.every * total",
    ),
    _one(
        "every without its factor",
        "ReSegWrapper.alignment_loss",
        "self._weight * self._settings.every * total",
        "self._weight * total",
    ),
    _one("the gradient of half a term", "gradient", "(2 / s.numel())", "(1 / s.numel())"),
    _one("the gradient ignores the variance", "values", "RF.EPS * a**4 + cov * a**3 * b, a * b", "a * b, a * b"),
    _one(
        "standardized by the unbiased variance",
        "values",
        "var_s, var_t = x.mul_(x).mean(axes) - off_s**2",
        "var_s, var_t = x.mul_(x).mean(axes) * 1.1 - off_s**2",
    ),
    _one(
        "a stale feature",
        "Recording.finish",
        "self.done = finished",
        "self.done = self.kept = getattr(self, 'kept', finished)",
    ),
    _one(
        "the first of two forwards counts", "Recording.finish", "if self.several or self.done is not None:", "if False:"
    ),
    _one("a forgotten no_grad", "ReSegWrapper.reconstruct", "torch.no_grad(), ", ""),
    _one("the teacher is not frozen", "Teacher.freeze", "self.requires_grad_(False)", "pass"),
    _one("the frozen teacher's statistics drift", "Teacher.freeze", "return self.eval()", "return self"),
    _one("tokens transposed", "to_channels_first", 'if layout != "NCL":', 'if layout == "NCL":'),
    _one("channels last read as first", "to_channels_first", "return x.movedim(-1, 1)", "return x"),
    _one("another fixed map", "semi_orthogonal", "torch.randn(shape", "torch.rand(shape"),
    _one(
        "ignored pixels count",
        "LabelEncoding.encode",
        "return torch.where(valid, encoded, 0.0), valid.float()",
        "return torch.where(valid, encoded, 0.0), torch.ones_like(valid.float())",
    ),
    _one("ignored pixels reach the teacher", "LabelEncoding.encode", "torch.where(valid, encoded, 0.0)", "encoded"),
    _one(
        "alpha and beta exchanged",
        "ReconLoss.forward",
        "alpha=self.alpha, beta=self.beta",
        "alpha=self.beta, beta=self.alpha",
    ),
    _one("L1 without its absolute value", "recon_loss", "difference.abs()", "difference"),
    _one("the mean teacher's decay inverted", "MeanTeacher.update", "1 - self.decay)", "self.decay)"),
    _one("the threshold ignored", "sure_label", "confidence >= threshold", "confidence >= 0"),
    _one("the label is not mixed", "CutMixConsistency.exchange", "mix(label, box)", "label"),
    _one(
        "the unlabelled loss dropped", "SemiSupervised._sum", "return total + factor *", "return total + 0 * factor *"
    ),
    _one(
        "the unlabelled loss without its ramp",
        "CutMixConsistency.factor",
        "self._weight * ramp_up(",
        "self._weight * (lambda *_: 1.0)(",
    ),
    _one(
        "labelled and mixed images swapped",
        "SemiSupervised.mix",
        "torch.cat([image, mixed.images])",
        "torch.cat([mixed.images, image])",
    ),
    _one(
        "the parts of an output swapped",
        "SemiSupervised.loss_of",
        "len(images) - len(mixed.images), len(mixed.images)]",
        "len(mixed.images), len(images) - len(mixed.images)]",
    ),
    _one(
        "unsure pixels count",
        "CutMixConsistency.mix",
        "label = sure_label(label, confidence, self.threshold, self.ignore_index)",
        "pass",
    ),
    _one(
        "the coarser levels of unlabelled images dropped",
        "SemiSupervised._sum",
        "factor * (main + levels)",
        "factor * main",
    ),
    _one(
        "coarser levels learn another part's label",
        "HeadOutputs.split",
        "value.split(sizes) for value",
        "value.flip(0).split(sizes) for value",
    ),
    _one("gradients flow into the mean teacher", "MeanTeacher.__init__", ".requires_grad_(False)", ""),
    _one(
        "deep supervision counts ignored levels",
        "coarse_loss",
        "counts * value_of(",
        "value_of(",
    ),
    _one(
        "deep supervision shifts the label",
        "nearest",
        "torch.arange(n, device=label.device) * full // n",
        "((torch.arange(n, device=label.device) + 1) * full // n - 1)",
    ),
    _one(
        "deep supervision takes the last pixel",
        "nearest",
        "slice(None, None, full // n)",
        "slice(full // n - 1, None, full // n)",
    ),
    _one(
        "a level's weight ignored",
        "DeepSupervision.weight_of",
        "return 1.0 if self.level_weights is None else",
        "return 1.0 if True else",
    ),
    _one("hooks stay after remove()", "FeatureExtractor.remove", "handle.remove()", "pass"),
    _one(
        "a file is not written atomically",
        "write_atomically",
        "(target, partial):",
        "(target, _):\n            partial = target",
    ),
    _one("a file is not brought to the disk", "write_atomically", "os.fsync(file.fileno())", "pass"),
    _one("a resumed stage 1 forgets its random state", "fit", 'restore_rng(resumed["rng"])', "pass"),
    _one("a resumed stage 1 forgets its optimizer", "go_on", 'optimizer.load_state_dict(resumed["optimizer"])', "pass"),
    _one("the counter is not saved", "Regularizer.load_state_dict", 'weight, state["calls"]', "weight, 0"),
    _one(
        "the heads are not loaded", "DeepSupervision._load", 'state["heads"]', "undistributed(heads).heads.state_dict()"
    ),
    _one("NaN weights are saved and frozen", "Teacher.check_finite", "if lost:", "if False:"),
    _one("random states are not put back", "ReSegWrapper.fit_recon", "with preserved_rng():", "if True:"),
)
