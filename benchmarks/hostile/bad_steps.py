"""Bad labels, images and orders of calls in the losses, and odd ones that are right."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false
# wrong types are what is tried

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import oracle
from .api import CutMixConsistency, DeepSupervision, ReSegWrapper, teacher_parts
from .bad_values import BAD_MODELS, INF, NAN, OwnError, a_step, failing, forward, inference, no_grad, raising, true
from .subjects import (
    CLASSES,
    IGNORED,
    SIZE,
    TRUTH,
    Net,
    aligned,
    batch,
    check_alignment,
    check_mixing,
    check_supervision,
    followed,
    ignoring,
    mixing,
    net,
    supervised,
    task_loss,
)
from .verdict import ANYTHING, NEVER, OF_PYTHON, Attempt, WrongError


def _label_forms() -> dict[str, tuple[Callable[[Tensor], Any], dict[str, Any], float | None]]:
    """{title: (the label as passed, settings, the value that is ignored)}; all of them are right."""

    def onehot(label: Tensor) -> Tensor:
        return F.one_hot(label, CLASSES).movedim(-1, 1)

    return {
        "int64": (lambda x: x, {}, None),
        "int32": (lambda x: x.int(), {}, None),
        "uint8": (lambda x: x.byte(), {}, None),
        "int8": (lambda x: x.char(), {}, None),
        "uint16": (lambda x: x.to(torch.uint16), {}, None),
        "float": (lambda x: x.float(), {}, None),
        "double": (lambda x: x.double(), {}, None),
        "half": (lambda x: x.half(), {}, None),
        "bfloat16": (lambda x: x.bfloat16(), {}, None),
        "with a channel": (lambda x: x.unsqueeze(1), {}, None),
        "one-hot": (onehot, {}, None),
        "one-hot float": (lambda x: onehot(x).float(), {}, None),
        "one-hot bool": (lambda x: onehot(x).bool(), {}, None),
        "of a list": (lambda x: [x, x[:, ::2, ::2]], {}, None),
        "of a tuple": (lambda x: (x,), {}, None),
        "not contiguous": (lambda x: x.mT.contiguous().mT, {}, None),
        "a parameter": (lambda x: nn.Parameter(x.float()), {}, None),
        "ignored 255": (lambda x: x, {"ignore_index": 255}, 255),
        "ignored 255 in uint8": (lambda x: x.byte(), {"ignore_index": 255}, 255),
        "ignored 255 in float": (lambda x: x.float(), {"ignore_index": 255}, 255),
        "ignored -1": (lambda x: x, {"ignore_index": -1}, -1),
        "ignored 0": (lambda x: x, {"ignore_index": 0}, 0),
        "ignored 255, none there": (lambda x: x, {"ignore_index": 255}, None),
        "ignored as NumPy's": (lambda x: x, {"ignore_index": np.int64(255)}, 255),
    }


BAD_LABELS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None, "a number": lambda x: 1, "a string": lambda x: "label",
    "a list of numbers": lambda x: [1, 2], "an empty list": lambda x: [], "a dict": lambda x: {"label": x},
    "a NumPy array": lambda x: x.numpy(), "another batch": lambda x: x[:1],
    "a larger batch": lambda x: torch.cat([x, x]), "empty": lambda x: x[:0], "another size": lambda x: x[:, ::2, ::2],
    "transposed size": lambda x: x[:, :16], "no batch": lambda x: x[0], "five axes": lambda x: x[:, None, None],
    "other classes": lambda x: F.one_hot(x, 5).movedim(-1, 1), "channels last": lambda x: F.one_hot(x, CLASSES),
    "too high": lambda x: x + 1, "negative": lambda x: x - 1, "255": lambda x: torch.where(x == 0, 255, x),
    "fractions": lambda x: x * 0.5, "NaN": lambda x: torch.full_like(x, NAN, dtype=torch.float32),
    "inf": lambda x: torch.where(x == 0, INF, x.float()), "complex": lambda x: x.to(torch.complex64),
    "several classes a pixel": lambda x: torch.ones(2, CLASSES, SIZE, SIZE),
    "no class a pixel": lambda x: torch.zeros(2, CLASSES, SIZE, SIZE),
    "soft": lambda x: torch.full((2, CLASSES, SIZE, SIZE), 1 / 3),
}  # fmt: skip


def alignment() -> Iterator[Attempt]:
    target = "ReSegWrapper.alignment_loss"
    for title, (form, settings, ignored) in _label_forms().items():
        for preset in ("paper", "standardized"):
            yield Attempt(
                target,
                f"label {title}, {preset}",
                lambda f=form, s=settings, i=ignored, p=preset: check_alignment(
                    *aligned(preset=p, **s), form=f, ignored=i, standardized=p == "standardized"
                ),
                right=true,
                refusal=NEVER,
            )
    for title, bad in BAD_LABELS.items():
        yield Attempt(target, f"label {title}", *_then_right(lambda b=bad: aligned(), bad))
    yield Attempt(
        target,
        "ignore_index=256 with uint8 labels",
        lambda: check_alignment(*aligned(ignore_index=256), form=lambda x: x.byte()),
        right=true,
    )
    for title, values, options in (
        ("encoder to decoder", [0.5] * 3 + [1.0] * 4, {"encoder_to_decoder": 0.5}),
        ("decoder to encoder", [1.0] * 3 + [0.0] * 3 + [1.0], {"decoder_to_encoder": 0.0}),
        ("bottleneck", [1.0] * 6 + [0.25], {"bottleneck": 0.25}),
    ):
        yield Attempt(
            target,
            f"the weight of {title}",
            lambda o=options, v=values: check_alignment(*aligned(preset="paper", **o), standardized=False, weights=v),
            right=true,
            refusal=NEVER,
        )
    yield Attempt(
        target,
        "divisor and weight",
        lambda: check_alignment(*aligned(divisor=2.0, weight=0.035), divisor=2.0, factor=0.035),
        right=true,
        refusal=NEVER,
    )
    yield Attempt(target, "every", _every, right=true, refusal=NEVER)
    yield Attempt("ReSegWrapper.alignment_terms", "right", _terms, right=true, refusal=NEVER)
    yield Attempt(target, "3D", lambda: check_alignment(*aligned(net(dims=3))), right=true, refusal=NEVER)
    yield Attempt(
        target,
        "fp64",
        lambda: check_alignment(
            *aligned(net().double(), example_input=batch()[0].double()),
            image=batch(seed=7)[0].double(),
            label=batch(seed=7)[1],
            tolerance=1e-9,
        ),
        right=true,
        refusal=NEVER,
    )
    yield Attempt(target, "one image", _one_image, right=true, refusal=NEVER)
    yield Attempt(target, "a size of 44", lambda: _of_size(44), right=true, refusal=NEVER)
    yield Attempt(target, "three channels", _three_channels, right=true, refusal=NEVER)
    yield Attempt(target, "one-hot input", _onehot_input, right=true, refusal=NEVER)
    yield Attempt(target, "record() around one of two forwards", _recorded, right=true, refusal=NEVER)
    yield Attempt(target, "a later forward of other images", _stale, right=true, refusal=NEVER)
    yield Attempt(target, "a part of the net in no_grad", _part_without_gradients, right=true)
    for value in (NAN, INF):  # as of every loss of torch's, which shows it
        yield Attempt(target, f"a pixel of {value}", lambda v=value: _not_finite(v), lambda x: not bool(x.isfinite()))
    for title, use in _BAD_STEPS.items():
        yield Attempt(target, title, lambda u=use: _refused_step(u))


def _then_right(make: Callable[[], Any], bad: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """run, right, refusal, own, after of an attempt with a bad label."""
    holder: dict[str, Any] = {}

    def run() -> Any:
        holder["made"] = model, reseg = make()
        image, label = batch()
        model(image)
        return reseg.alignment_loss(bad(label))

    return run, None, ANYTHING, (), lambda: check_alignment(*holder["made"]) is not None


def _every() -> None:
    model, reseg = aligned(preset="paper", every=3)
    for call in range(4):
        if call % 3 == 0:
            check_alignment(model, reseg, standardized=False, factor=3.0)
        else:
            value = a_step(model, reseg)
            if float(value) != 0:
                raise WrongError("a loss at a call that is skipped")
            value.backward()


def _terms() -> None:
    model, reseg = aligned(every=2, weight=0.3, divisor=2.0)
    image, label = batch(seed=7)
    model(image)
    ours = reseg.criterion.combine(reseg.alignment_terms(label))
    oracle.near(ours, check_alignment(*aligned(divisor=2.0), divisor=2.0), "the combined terms")


def _one_image() -> Any:
    image, label = batch(1)
    return check_alignment(*aligned(), image=image, label=label)


def _of_size(size: int) -> Any:
    image, label = batch(size=size)
    return check_alignment(*aligned(), image=image, label=label)


def _three_channels() -> Any:
    model = net(channels=3)
    image, label = batch(channels=3)
    return check_alignment(*aligned(model, example_input=image), image=image, label=label)


def _onehot_input() -> None:
    model, reseg = aligned(label_input="onehot")
    image, label = batch(seed=7)
    with oracle.watching(model, TRUTH) as seen:
        model(image)
        student = seen()
    ours = reseg.alignment_loss(label)
    before, body, _ = teacher_parts(reseg.teacher, Net)
    encoded = torch.stack([label == c for c in range(CLASSES)], 1).float()
    with oracle.watching(body, TRUTH) as seen, torch.no_grad():
        body(before(encoded))
        teacher = seen()
    oracle.near(ours, oracle.alignment(student, teacher, standardized=True), "the alignment loss")


def _recorded() -> None:
    """The features are those of the forward inside `record()`, not of one before or after it."""
    model, reseg = aligned()
    forward(model)

    def among_others(x: Tensor) -> None:
        with reseg.record():
            model(x)

    check_alignment(model, reseg, forward=among_others)
    image, label = batch(seed=7)
    with reseg.record():
        model(image)
    model(batch(seed=3)[0])
    ours = reseg.alignment_loss(label)
    oracle.near(ours, check_alignment(*aligned(), image=image, label=label), "the loss of the recorded forward")


def _stale() -> None:
    """The features are the last forward's, at the weights of now."""
    model, reseg = aligned()
    for step in range(3):
        image, label = batch(seed=20 + step)
        check_alignment(model, reseg, image=image, label=label)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)


def _stepwise(prepare: Callable[[Any, ReSegWrapper], Any], label: bool = True) -> Callable[[Any, ReSegWrapper], Any]:
    def use(model: Any, reseg: ReSegWrapper) -> Any:
        prepare(model, reseg)
        return reseg.alignment_loss(batch()[1])

    return use


_BAD_STEPS: dict[str, Callable[[Any, ReSegWrapper], Any]] = {
    "no forward": _stepwise(lambda m, r: None),
    "two forwards": _stepwise(lambda m, r: forward(m, 2)),
    "a forward in evaluation": _stepwise(lambda m, r: (m.eval(), forward(m))),
    "a forward in evaluation, then training": _stepwise(lambda m, r: (m.eval(), forward(m), m.train())),
    "a forward without gradients": _stepwise(lambda m, r: no_grad(lambda: forward(m))),
    "a forward in inference mode": _stepwise(lambda m, r: inference(lambda: forward(m))),
    "all of it in inference mode": lambda m, r: inference(lambda: a_step(m, r)),
    "model.forward": _stepwise(lambda m, r: m.forward(batch()[0])),
    "twice of one forward": lambda m, r: (a_step(m, r), r.alignment_loss(batch()[1])),
    "after remove": _stepwise(lambda m, r: (r.remove(), forward(m))),
    "a failed forward": _stepwise(failing),
    "an empty batch": lambda m, r: (m(batch(0)[0]), r.alignment_loss(batch(0)[1])),
    "another batch's label": lambda m, r: (forward(m), r.alignment_loss(batch(3)[1])),
    "a copy's forward": _stepwise(lambda m, r: forward(copy.deepcopy(m))),
    "reentrant checkpointing of all": _stepwise(
        lambda m, r: checkpoint(m, batch()[0].requires_grad_(), use_reentrant=True)
    ),
    "a forward within backward": lambda m, r: _within_backward(m, r),
}


def _part_without_gradients() -> Any:
    """What ran without gradients gets none; the value is right."""
    model, reseg = aligned()
    inner = model.e[1].forward
    model.e[1].forward = lambda x: no_grad(lambda: inner(x))
    return check_alignment(model, reseg)


def _not_finite(value: float) -> Any:
    model, reseg = aligned()
    image, label = batch()
    image[0, 0, 3, 3] = value
    model(image)
    return reseg.alignment_loss(label)


def _within_backward(model: Any, reseg: ReSegWrapper) -> Any:
    x = torch.ones(2, requires_grad=True)

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore
            with torch.enable_grad():
                model(batch()[0])
            return g

    Inside.apply(x).sum().backward()  # pyright: ignore
    return reseg.alignment_loss(batch()[1])


def _refused_step(use: Callable[[Any, ReSegWrapper], Any]) -> Any:
    return use(*aligned())


# --- deep supervision


def supervision() -> Iterator[Attempt]:
    target = "DeepSupervision.loss"
    forms = {
        "int64": lambda x: x, "int32": lambda x: x.int(), "uint8": lambda x: x.byte(), "int16": lambda x: x.short(),
        "of a list": lambda x: [x, x], "not contiguous": lambda x: x.mT.contiguous().mT,
    }  # fmt: skip
    for title, form in forms.items():
        yield Attempt(target, f"label {title}", lambda f=form: check_supervision(*supervised(), form=f), true, NEVER)
    yield Attempt(
        target,
        "ignored 255",
        lambda: check_supervision(*supervised(ignore_index=IGNORED), ignored=IGNORED),
        true,
        NEVER,
    )
    yield Attempt(
        target,
        "weights",
        lambda: check_supervision(*supervised(level_weights=[1.0, 0.5, 0.0]), weights=(1.0, 0.5, 0.0)),
        true,
        NEVER,
    )
    yield Attempt(target, "all ignored", _all_ignored, true, NEVER)
    yield Attempt(target, "a size of 44", lambda: check_supervision(*supervised(), size=44), true, NEVER)
    for title, bad in BAD_LABELS.items():
        if title in ("too high", "negative", "255", "fractions", "NaN", "inf", "several classes a pixel", "soft"):
            continue  # label values are the task loss's affair
        if title == "no class a pixel":
            continue
        yield Attempt(target, f"label {title}", *_supervision_then_right(bad))
    for title, use in _BAD_SUPERVISION.items():
        yield Attempt(target, title, lambda u=use: u(*supervised()))
    losses: dict[str, Any] = {
        "None": None, "a string": "ce", "a vector": lambda x, y: F.cross_entropy(x, y, reduction="none"),
        "a number": lambda x, y: 1.0, "nothing": lambda x, y: None,
    }  # fmt: skip
    for title, loss in losses.items():
        yield Attempt(target, f"task_loss {title}", lambda v=loss: _supervision_with(v))
    yield Attempt(target, "task_loss raising", lambda: _supervision_with(raising), own=(OwnError,))
    settings: dict[str, list[Any]] = {
        "num_classes": [0, -1, "3", 1.5, NAN, [3], True], "levels": [2, [], [3], "2"],
        "level_weights": [[1.0], [1.0, -1.0, 1.0], [NAN, 1.0, 1.0], "abc", 1.0, ["1", "1", "1"], []],
        "ignore_index": ["255", NAN, 1.5, [255], object()], "taps": ["e.1", {"decoders": []}, 3],
        "example_input": ["image", 3, torch.zeros(2, SIZE, SIZE)],
    }  # fmt: skip
    for name, values in settings.items():
        for value in values:
            yield Attempt("DeepSupervision", f"{name}={_word(value)}", lambda n=name, v=value: _built_heads(n, v))


def _word(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else type(value).__name__


def _built_heads(name: str, value: Any) -> Any:
    model = net()
    keywords = {"num_classes": CLASSES, "example_input": batch()[0], name: value}
    ds = DeepSupervision(model, **keywords)
    forward(model)
    return ds.loss(batch()[1], ignoring if ds.num_classes > 2 else lambda x, y: x.sum())


def _all_ignored() -> None:
    model, ds = supervised(ignore_index=IGNORED)
    forward(model)
    loss = ds.loss(torch.full_like(batch()[1], IGNORED), ignoring)
    loss.backward()
    if float(loss) != 0:
        raise WrongError(f"the loss of no pixel is {float(loss)}")


def _supervision_then_right(bad: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    holder: dict[str, Any] = {}

    def run() -> Any:
        holder["made"] = model, ds = supervised()
        forward(model)
        return ds.loss(bad(batch()[1]), task_loss)

    # the task loss is asked in the end: what it does not take is its own error
    return run, None, ANYTHING, (), lambda: check_supervision(*holder["made"]) is not None


def _supervision_with(loss: Any) -> Any:
    model, ds = supervised()
    forward(model)
    return ds.loss(batch()[1], loss)


def _heads_step(prepare: Callable[[Any, DeepSupervision], Any]) -> Callable[[Any, DeepSupervision], Any]:
    return lambda model, ds: (prepare(model, ds), ds.loss(batch()[1], task_loss))[1]


_BAD_SUPERVISION: dict[str, Callable[[Any, DeepSupervision], Any]] = {
    "no forward": _heads_step(lambda m, d: None), "two forwards": _heads_step(lambda m, d: forward(m, 2)),
    "in evaluation": _heads_step(lambda m, d: (m.eval(), forward(m))),
    "without gradients": _heads_step(lambda m, d: no_grad(lambda: forward(m))),
    "in inference mode": _heads_step(lambda m, d: inference(lambda: forward(m))),
    "after remove": _heads_step(lambda m, d: (d.remove(), forward(m))), "a failed forward": _heads_step(failing),
    "another batch's label": lambda m, d: (forward(m), d.loss(batch(3)[1], task_loss)),
    "an empty batch": lambda m, d: (m(batch(0)[0]), d.loss(batch(0)[1], task_loss)),
    "before an example": lambda m, d: DeepSupervision(m, num_classes=CLASSES).loss(batch()[1], task_loss),
}  # fmt: skip


# --- unlabelled images


def unlabelled() -> Iterator[Attempt]:
    target = "CutMixConsistency.loss"
    yield Attempt(target, "right", lambda: check_mixing(*mixing()), true, NEVER)
    yield Attempt(target, "threshold", lambda: check_mixing(*mixing(threshold=0.37), threshold=0.37), true, NEVER)
    yield Attempt(target, "nothing sure", lambda: check_mixing(*mixing(threshold=1.0), threshold=1.0), true, NEVER)
    yield Attempt(target, "weight", lambda: check_mixing(*mixing(weight=0.25), factor=0.25), true, NEVER)
    yield Attempt(target, "a ramp", lambda: check_mixing(*mixing(rampup_steps=10), factor=np.exp(-5.0)), true, NEVER)
    yield Attempt(target, "as taught", _taught, true, NEVER)
    yield Attempt(target, "batch statistics", lambda: check_mixing(*mixing(net(norm="batch"))), true, NEVER)
    images = batch(4)[0]
    bad: dict[str, Any] = {
        "None": None, "a string": "images", "a number": 1.0, "an empty list": [], "a dict": {"image": images},
        "a NumPy array": images.numpy(), "integers": images.long(), "complex": images.to(torch.complex64),
        "one image": images[:1], "no image": images[:0], "no channel": images[:, 0],
        "other channels": images.expand(-1, 3, -1, -1), "float64": images.double(), "fp16": images.half(),
        "a NaN pixel": images.clone().index_fill_(3, torch.tensor([3]), NAN),
        "an inf pixel": images.clone().index_fill_(3, torch.tensor([3]), INF), "too small": images[..., :2, :2],
        "3D": batch(2, dims=3)[0],
    }  # fmt: skip
    for title, value in bad.items():
        yield Attempt(target, f"images {title}", *_mixing_then_right(value), **_blamed(title))
    for title, use in _BAD_MIXING.items():
        own = (OwnError,) if "raising" in title else OF_PYTHON if title == "forward no function" else ()
        yield Attempt(target, title, lambda u=use: u(*mixing()), own=own)
    settings: dict[str, list[Any]] = {
        "rampup_steps": [0, -1, "10", NAN, [10]], "ignore_index": ["255", 1.5, None, NAN, [255], 0, 2],
        "weight": [NAN, -1, "1", None, INF], "threshold": [-0.1, 1.1, NAN, "0.9", None, [0.9]],
        "ema_decay": [1.0, -0.1, NAN, "0.9", None, [0.9], 2],
        "perturb": ["no", 1, [], nn.Conv2d(1, 2, 1), lambda x: None, lambda x: x[:1]],
        "output": ["nothing", 1.5, object(), ("a",)], "deep": ["deep", 1, [], net()],
    }  # fmt: skip
    for name, values in settings.items():
        for value in values:
            own = OF_PYTHON if name == "perturb" else ()
            yield Attempt(
                "CutMixConsistency", f"{name}={_word(value)}", lambda n=name, v=value: _built_mixing(n, v), own=own
            )
    yield Attempt("CutMixConsistency", "deep of another model", lambda: _built_mixing("deep", supervised()[1]))
    yield Attempt("CutMixConsistency", "half weights", lambda: mixing(net().half()))
    for name in ("None", "a class", "a string", "DataParallel", "lazy", "a list"):
        yield Attempt("CutMixConsistency", f"model {name}", lambda m=BAD_MODELS[name]: _mixing_of(m()))
    yield Attempt("CutMixConsistency", "a model with a sigmoid", _sigmoid)


def _blamed(title: str) -> dict[str, Any]:
    return {"refusal": "image"} if "pixel" in title else {}


def _mixing_then_right(images: Any) -> tuple[Any, ...]:
    holder: dict[str, Any] = {}

    def run() -> Any:
        holder["made"] = _, mixed = mixing()
        return mixed.loss(images, ignoring)

    return run, None


def _taught() -> None:
    """After updates the mean teacher is the average that it must be, and what it predicts is learnt."""
    model, mixed = mixing(ema_decay=0.9)
    check_mixing(model, mixed)
    average = {n: p.detach().double() for n, p in model.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        mixed.update()
        average = followed(average, model, 0.9)
    oracle.near(list(mixed.average.parameters()), list(average.values()), "the mean teacher")
    expected = copy.deepcopy(model)
    for name, p in expected.named_parameters():
        p.data.copy_(average[name])
    check_mixing(model, mixed, average=expected)


def _built_mixing(name: str, value: Any) -> Any:
    _, mixed = mixing(**{name: value})
    return mixed.loss(batch(4)[0], ignoring)


def _mixing_of(model: Any) -> Any:
    return CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED)


def _sigmoid() -> Any:
    model = net()
    model.head = nn.Sequential(model.head, nn.Sigmoid())
    return mixing(model)[1].loss(batch(4)[0], ignoring)


_IMAGES = batch(4)[0]
_BAD_MIXING: dict[str, Callable[[Any, CutMixConsistency], Any]] = {
    "in evaluation": lambda m, c: (m.eval(), c.loss(_IMAGES, ignoring)),
    "a loss that ignores nothing": lambda m, c: c.loss(_IMAGES, lambda x, y: F.cross_entropy(x, y.clamp_max(2))),
    "a loss that fails on 255": lambda m, c: c.loss(_IMAGES, F.cross_entropy),
    "a loss that is no function": lambda m, c: c.loss(_IMAGES, "ce"),  # pyright: ignore
    "a loss of nothing": lambda m, c: c.loss(_IMAGES, lambda x, y: None),  # pyright: ignore
    "a loss of a vector": lambda m, c: c.loss(
        _IMAGES, lambda x, y: F.cross_entropy(x, y, ignore_index=IGNORED, reduction="none")
    ),
    "weight NaN": lambda m, c: c.loss(_IMAGES, ignoring, weight=NAN),
    "weight negative": lambda m, c: c.loss(_IMAGES, ignoring, weight=-1.0),
    "weight a string": lambda m, c: c.loss(_IMAGES, ignoring, weight="1"),  # pyright: ignore
    "weight a vector": lambda m, c: c.loss(_IMAGES, ignoring, weight=torch.ones(2)),
    "forward of another size": lambda m, c: c.loss(_IMAGES, ignoring, forward=lambda x: m(x)[..., :8]),
    "forward of nothing": lambda m, c: c.loss(_IMAGES, ignoring, forward=lambda x: None),
    "forward no function": lambda m, c: c.loss(_IMAGES, ignoring, forward=3),  # pyright: ignore
    "forward raising": lambda m, c: c.loss(_IMAGES, ignoring, forward=raising),
    "in inference mode": lambda m, c: inference(lambda: c.loss(_IMAGES, ignoring)),
    "a changed model": lambda m, c: (m.head.register_parameter("more", nn.Parameter(torch.ones(1))), c.update()),
    "a model without its head": lambda m, c: (setattr(m, "head", nn.Conv2d(4, 5, 1)), c.update()),
}


SECTIONS: list[Callable[[], Iterator[Attempt]]] = [alignment, supervision, unlabelled]
