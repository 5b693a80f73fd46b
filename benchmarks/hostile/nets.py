"""Random U-shaped nets: features, loss and gradients against plain hooks on the modules that the building tells."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import oracle
from .api import FeatureExtractor, ReSegWrapper, TapError, teacher_parts
from .oracle import Seen, Truth
from .subjects import TokenNet, batch, net
from .verdict import NEVER, Attempt, WrongError

TESTS = Path(__file__).parents[2] / "tests"


@dataclass(frozen=True)
class Case:
    """A net and where its features are, as tests/random_nets.py builds them, too."""

    model: nn.Module
    image: Tensor
    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    bottleneck: str
    layouts: dict[str, str]
    sizes: dict[str, tuple[int, ...]]
    refused: bool = False


def attempts(seed: int, nets: int) -> Iterator[Attempt]:
    """The nets of tests/random_nets.py; of a checkout that lacks it a few of the trial's own."""
    if build_of_the_tests() is None:
        yield from attempts_on_own()
        return
    for number in range(seed, seed + nets):
        yield Attempt("a random net", f"seed {number}", lambda n=number: check(n), _true, NEVER)


def build_of_the_tests() -> Any:
    if not (TESTS / "random_nets.py").exists():
        return None
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.import_module("random_nets").build


def _true(value: Any) -> bool:
    return True


def check(seed: int) -> None:
    """One net. Raises a WrongError, or what the library raises where it should not."""
    build = build_of_the_tests()
    check_case(own(seed) if build is None else build(seed), seed)


def check_case(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    case.model.train()
    if case.refused:
        _must_be_refused(case)
        return
    truth = _truth(case)
    twin, keys = copy.deepcopy(case.model), list(case.model.state_dict())
    _compare_features(case, truth)
    _compare_loss(case, truth, "paper" if seed % 2 else "standardized")
    if keys != list(case.model.state_dict()):
        raise WrongError("the model has other keys")
    state = torch.get_rng_state()
    expected = twin(case.image)
    torch.set_rng_state(state)
    oracle.same(_first(case.model(case.image)), _first(expected), "the model's output with hooks")


def _must_be_refused(case: Case) -> None:
    try:
        FeatureExtractor(case.model, example_input=case.image)
    except TapError:
        return
    raise WrongError("it is no U, and was not refused")


def _truth(case: Case) -> Truth:
    """The levels that the default choice takes: the three finest below the image's size."""
    image = case.image.shape[2:]
    strides = {name: max(round(f / n) for f, n in zip(image, case.sizes[name])) for name in case.encoder}
    levels = list(zip(case.encoder, case.decoder))
    below = [pair for pair in levels if strides[pair[0]] > 1]
    full = [pair for pair in levels if strides[pair[0]] == 1]
    chosen = below[:3] if len(below) > 1 else (full + below)[:3]

    def reading(path: str, x: Tensor) -> Tensor:
        layout, size = case.layouts[path], case.sizes[path]
        if layout == "first":
            return x
        if layout == "last":
            return x.movedim(-1, 1)
        return (x.transpose(1, 2) if layout == "tokens" else x).reshape(len(x), -1, *size)

    return Truth(tuple(e for e, _ in chosen), tuple(d for _, d in chosen), case.bottleneck, reading)


def _compare_features(case: Case, truth: Truth) -> None:
    with (
        FeatureExtractor(case.model, example_input=case.image) as extractor,
        oracle.watching(case.model, truth) as seen,
    ):
        case.model(case.image)
        expected, found = seen().all, extractor.pop()
    oracle.same([*found.encoder, *found.decoder, found.bottleneck], expected, "the features")


def _compare_loss(case: Case, truth: Truth, preset: str, within: float = 1e-3) -> None:
    model, image = case.model, case.image
    label = torch.randint(0, 2, (len(image), *image.shape[2:]))
    reseg = ReSegWrapper(model, example_input=image, preset=preset, weight=0.5)
    try:
        reseg.freeze_teacher()
        with oracle.watching(model, truth) as seen:
            model(image)
            student = seen()
        ours = reseg.alignment_loss(label)
        before, body, _ = teacher_parts(reseg.teacher, type(model))
        trial = copy.deepcopy(body).eval()
        with oracle.watching(trial, truth) as seen, torch.no_grad():
            trial(before(oracle.index_map(label)[0].to(image.dtype)))
            teacher = seen()

        def loss_of(features: Seen) -> Tensor:
            return 0.5 * oracle.alignment(features, teacher, standardized=preset == "standardized")

        reference = loss_of(student)
        oracle.near(ours, reference, "the alignment loss")
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = oracle.gradients(ours, parameters)
        try:
            oracle.near(found, oracle.gradients(reference, parameters), "the gradient", within)
        except WrongError:
            try:
                # torch's own: of one image the backward of InstanceNorm2d is wrong for a gradient with channels last
                oracle.near(found, _in_order(loss_of, student, parameters), "the gradient", within)
            except WrongError:
                if image.dtype == torch.float64:
                    raise
                # where a channel hardly varies, fp32 itself is off by more, ours and the reference's: fp64 tells
                double = replace(case, model=copy.deepcopy(model).double(), image=image.double())
                _compare_loss(double, truth, preset, 1e-9)
    finally:
        reseg.remove()


def _in_order(loss_of: Callable[[Seen], Tensor], student: Seen, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The same gradients, handed to the model in the memory order of its features."""
    leaves = [f.detach().requires_grad_() for f in student.all]
    n = len(student.encoder)
    loss = loss_of(Seen(leaves[:n], leaves[n:-1], leaves[-1]))
    handed = [torch.empty_like(f).copy_(g) for f, g in zip(leaves, oracle.gradients(loss, leaves))]
    found = torch.autograd.grad(student.all, parameters, handed, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


OWN = 5


def own(seed: int) -> Case:
    """The trial's own nets, where there are no others."""
    dims, tokens = (3 if seed % OWN == 2 else 2), seed % OWN > 2
    model = (
        net(seed, kind=TokenNet, last=seed % OWN == 4)
        if tokens
        else net(seed, dims=dims, norm="batch" if seed % 2 else "group")
    )
    encoder = tuple(f"e.{i}" for i in range(4))
    decoder = ("d.0", "norms.0", "norms.1", "d.3") if tokens else tuple(f"d.{i}" for i in range(4))
    sizes = {name: (32 >> i,) * dims for names in (encoder, decoder) for i, name in enumerate(names)}
    as_read = "last" if seed % OWN == 4 else "tokens"
    layouts = {name: as_read if name.startswith("norms") else "first" for name in (*sizes, "b")}
    return Case(model, batch(seed=seed, dims=dims)[0], encoder, decoder, "b", layouts, {**sizes, "b": (2,) * dims})


def attempts_on_own() -> Iterator[Attempt]:
    for number in range(OWN):
        yield Attempt("a net", f"number {number}", lambda n=number: check_case(own(n), n), _true, NEVER)
