"""Few labels: bad images, labels, outputs and losses in `SemiSupervised`, its parts and the task losses."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false
# wrong types are what is tried

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import oracle
from .api import BinaryCrossEntropyDiceLoss, CrossEntropyDiceLoss, ReSegError, SemiSupervised
from .bad_steps import BAD_LABELS
from .bad_values import (
    BAD_EXAMPLES,
    BAD_MODELS,
    INF,
    NAN,
    OwnError,
    failing,
    forward,
    inference,
    no_grad,
    raising,
    true,
)
from .subjects import (
    CLASSES,
    IGNORED,
    batch,
    check_semi,
    followed,
    ignoring,
    mixing,
    net,
    semi_supervised,
    supervised,
    task_loss,
)
from .verdict import ANYTHING, NEVER, OF_PYTHON, Attempt, WrongError, plainly

IMAGES = batch(4)[0]
BAD_IMAGES: dict[str, Any] = {
    "None": None,
    "a string": "images",
    "a number": 1.0,
    "an empty list": [],
    "a dict": {"image": IMAGES},
    "a NumPy array": IMAGES.numpy(),
    "integers": IMAGES.long(),
    "complex": IMAGES.to(torch.complex64),
    "no image": IMAGES[:0],
    "no channel": IMAGES[:, 0],
    "other channels": IMAGES.expand(-1, 3, -1, -1),
    "float64": IMAGES.double(),
    "fp16": IMAGES.half(),
    "a NaN pixel": IMAGES.clone().index_fill_(3, torch.tensor([3]), NAN),
    "an inf pixel": IMAGES.clone().index_fill_(3, torch.tensor([3]), INF),
    "another size": IMAGES[..., :16],
    "3D": batch(4, dims=3)[0],
    "sparse": IMAGES.to_sparse(),
    "on meta": IMAGES.to("meta"),
}


def a_loss(semi: SemiSupervised, label: Any = None, images: Any = IMAGES, image: Any = None, **options: Any) -> Any:
    x, y = batch()
    return semi.loss(x if image is None else image, y if label is None else label, images, **options)


def halves(model: Any, semi: SemiSupervised, label: Any = None, images: Any = IMAGES, image: Any = None) -> Any:
    first, target = batch()
    x, y = semi.mix(first if image is None else image, target if label is None else label, images)
    return semi.loss_of(model(x), y)


def _then_right(use: Callable[[Any, SemiSupervised], Any], **options: Any) -> dict[str, Any]:
    """An attempt's `run`, and `after` it a legal step."""
    made: dict[str, Any] = {}

    def run() -> Any:
        made["both"] = semi_supervised(**options)
        return use(*made["both"])

    return {"run": run, "after": lambda: check_semi(*made["both"]) is not None}


# --- steps


def steps() -> Iterator[Attempt]:
    target = "SemiSupervised.loss"
    for title, options in {
        "right": {},
        "two forwards": {"joint": False},
        "without heads": {"deep": None},
    }.items():
        yield Attempt(target, title, lambda o=options: check_semi(*semi_supervised(**o)), true, NEVER)
    for name in (target, "SemiSupervised.mix", "SemiSupervised.loss_of"):
        by_halves = name != target
        for title, options, factor in (
            ("a weight", {"weight": 0.25}, 0.25),
            ("a ramp", {"rampup_steps": 10}, 0.006737946999),
        ):
            yield Attempt(
                name,
                title,
                lambda o=options, f=factor, h=by_halves: check_semi(*semi_supervised(**o), factor=f, halves=h),
                true,
                NEVER,
            )
        yield Attempt(
            name, "weight 0", lambda h=by_halves: check_semi(*semi_supervised(weight=0), halves=h), true, NEVER
        )
        use = halves if by_halves else (lambda model, semi, **o: a_loss(semi, **o))
        for title, bad in BAD_LABELS.items():
            if title in (
                "soft",
                "several classes a pixel",
                "no class a pixel",
                "fractions",
                "255",
                "NaN",
                "inf",
                "negative",
            ):
                continue  # of the task loss, whose words are below
            label = bad(batch()[1])
            if label is None:
                continue
            yield Attempt(name, f"label {title}", **_then_right(lambda m, s, u=use, v=label: u(m, s, label=v)))
        for title, images in BAD_IMAGES.items():
            if images is None:
                continue
            yield Attempt(name, f"unlabelled {title}", **_then_right(lambda m, s, u=use, v=images: u(m, s, images=v)))
            if title not in ("an inf pixel", "another size"):
                few = images[:2] if isinstance(images, Tensor) and images.layout == torch.strided else images
                yield Attempt(name, f"labelled {title}", **_then_right(lambda m, s, u=use, v=few: u(m, s, image=v)))
        yield Attempt(name, "one unlabelled", **_then_right(lambda m, s, u=use: u(m, s, images=IMAGES[:1])))
        for title, spoil in {
            "in evaluation": lambda m, s: m.eval(),
            "after remove": lambda m, s: s.remove(),
        }.items():
            yield Attempt(name, title, lambda u=use, p=spoil: _spoilt(u, p))
        for title, off in (("without gradients", no_grad), ("in inference mode", inference)):
            yield Attempt(name, title, **_then_right(lambda m, s, u=use, o=off: o(lambda: u(m, s))))
    yield Attempt("SemiSupervised.mix", "with two forwards", lambda: halves(*semi_supervised(joint=False)))
    for title, value in {
        "NaN": NAN,
        "negative": -1.0,
        "a string": "1",
        "a vector": torch.ones(2),
        "a list": [1],
    }.items():
        yield Attempt(target, f"weight {title}", **_then_right(lambda m, s, v=value: a_loss(s, weight=v)))
        yield Attempt(
            target,
            f"weight {title}, two forwards",
            **_then_right(lambda m, s, v=value: a_loss(s, weight=v), joint=False),
        )
    for title, run in {
        "of another size": lambda m: lambda x: m(x)[..., :8],
        "of nothing": lambda m: lambda x: None,
        "of no gradient": lambda m: lambda x: m(x).detach(),
        "of a part": lambda m: lambda x: m(x[:2]),
        "twice": lambda m: lambda x: (m(x), m(x))[1],
        "never": lambda m: lambda x: torch.zeros(6, 3, 32, 32),
    }.items():
        yield Attempt(target, f"forward {title}", **_then_right(lambda m, s, r=run: a_loss(s, forward=r(m))))
    yield Attempt(target, "forward raising", lambda: a_loss(semi_supervised()[1], forward=raising), own=(OwnError,))
    yield Attempt(target, "forward no function", lambda: a_loss(semi_supervised()[1], forward=3), own=OF_PYTHON)
    for title, spoil in _BAD_OUTPUTS.items():
        yield Attempt("SemiSupervised.loss_of", title, **_then_right(lambda m, s, f=spoil: _loss_of(m, s, f)))
    for name in ("task_loss", "unlabelled_loss"):
        for title, loss in {
            "of a vector": lambda x, y: F.cross_entropy(x, y, ignore_index=IGNORED, reduction="none"),
            "of nothing": lambda x, y: None,
            "that ignores nothing": lambda x, y: F.cross_entropy(x, y.clamp_max(2)),
            "that fails on 255": F.cross_entropy,
            "of NaN": lambda x, y: x.sum() * NAN,
            "no function": "ce",
            "raising": raising,
            "of a class": nn.CrossEntropyLoss(ignore_index=1),
        }.items():
            yield Attempt(
                "SemiSupervised",
                f"{name} {title}",
                lambda n=name, v=loss: a_loss(semi_supervised(**{n: v})[1]),
                refusal=ANYTHING if title == "of a class" else "loss",
            )


def _spoilt(use: Any, spoil: Callable[[Any, Any], Any]) -> Any:
    model, semi = semi_supervised()
    spoil(model, semi)
    return use(model, semi)


_BAD_OUTPUTS: dict[str, Callable[[Any, Tensor, Any], tuple[Any, Any]]] = {
    "output None": lambda m, x, y: (None, y),
    "output detached": lambda m, x, y: (m(x).detach(), y),
    "output of a part": lambda m, x, y: (m(x[:2]), y),
    "output cropped": lambda m, x, y: (m(x)[..., :8], y),
    "after two forwards": lambda m, x, y: (m(x), y, m(x))[:2],
    "without a forward": lambda m, x, y: (torch.rand(6, 3, 32, 32), y),
    "other classes": lambda m, x, y: (m(x)[:, :2], y),
    "y None": lambda m, x, y: (m(x), None),
    "y a label": lambda m, x, y: (m(x), y.label),
    "y a tuple": lambda m, x, y: (m(x), tuple(y)),
    "y of less": lambda m, x, y: (m(x), y._replace(images=None)),
    "y without a label": lambda m, x, y: (m(x), y._replace(label=None)),
    "y of another label": lambda m, x, y: (m(x), y._replace(label=y.label[:1])),
}


def _loss_of(model: Any, semi: SemiSupervised, spoil: Callable[[Any, Tensor, Any], tuple[Any, Any]]) -> Any:
    x, y = semi.mix(*batch(), IMAGES)
    return semi.loss_of(*spoil(model, x, y))


# --- what it is built of


def built() -> Iterator[Attempt]:
    settings: dict[str, list[Any]] = {
        "rampup_steps": [0, -1, "10", NAN, [10]],
        "weight": [NAN, -1, "1", None, INF],
        "threshold": [-0.1, 1.1, NAN, "0.9", None],
        "ema_decay": [1.0, -0.1, NAN, "0.9", None, 2],
        "perturb": ["no", 1, [], lambda x: None, lambda x: x[:1]],
        "joint": [1, 0.5, "yes"],
        "overlapping": [1, None],
        "output": ["nothing", 1.5, object(), ("a",), "in:nothing", "in:head", "in:", True],
        "deep": ["deep", 1, True, [], net()],
    }
    for name, values in settings.items():
        for value in values:
            title = f"{name}={value!r}" if len(repr(value)) < 40 else f"{name}={type(value).__name__}"
            yield Attempt("SemiSupervised", title, lambda n=name, v=value: a_loss(semi_supervised(**{n: v})[1]))
    for title, example in BAD_EXAMPLES.items():
        if title != "too small":
            yield Attempt(
                "SemiSupervised", f"example {title}", lambda e=example: a_loss(semi_supervised(example_input=e)[1])
            )
    for title, make in BAD_MODELS.items():
        own = (OwnError,) if title == "raising" else () if isinstance(make(), nn.Module) else OF_PYTHON
        if title != "None":  # which is the trial's own default
            yield Attempt("SemiSupervised", f"model {title}", lambda m=make: semi_supervised(m()), own=own)
    yield Attempt("SemiSupervised", "deep of another model", lambda: semi_supervised(deep=supervised()[1]))
    yield Attempt("SemiSupervised", "deep that ignores nothing", _heads_that_ignore_nothing)
    situations: dict[str, Callable[[Any, Any], Any]] = {
        "fresh": lambda m, s: None,
        "after a forward": lambda m, s: forward(m),
        "after two": lambda m, s: forward(m, 2),
        "after a failed forward": failing,
        "in evaluation": lambda m, s: m.eval(),
        "at weight 0": lambda m, s: setattr(s, "weight", 0),
        "twice": lambda m, s: None,
        "in inference mode": lambda m, s: None,
        "without gradients": lambda m, s: None,
        "after remove": lambda m, s: s.remove(),
        "after load": lambda m, s: s.load_state_dict(s.state_dict()),
    }
    members = (
        "average",
        "calls",
        "consistency",
        "deep",
        "model",
        "overlapping",
        "parameters",
        "record",
        "remove",
        "reset",
        "stats",
        "update",
    )
    for member in members:
        for title, prepare in situations.items():
            yield Attempt(
                f"SemiSupervised.{member}", title, lambda n=member, t=title, p=prepare: _use(n, t, p), right=true
            )


def _heads_that_ignore_nothing() -> Any:
    model, ds = supervised()
    return semi_supervised(model, deep=ds)


def _use(name: str, title: str, prepare: Callable[[Any, Any], Any]) -> None:
    """Whatever was called when: a legal step is right afterwards, and so is the mean teacher."""
    model, semi = semi_supervised()
    prepare(model, semi)

    def once() -> None:
        value = getattr(semi, name)
        if name == "record":
            with value():
                pass
        elif callable(value) and not isinstance(value, nn.Module):
            value()

    error: Exception | None = None
    try:
        if title == "twice":
            once()
        (inference if title == "in inference mode" else no_grad if title == "without gradients" else lambda f: f())(
            once
        )
    except ReSegError as refused:
        error = refused
    model.train()
    semi.weight = 1.0
    if name == "remove" or title == "after remove":
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            raise WrongError("remove() leaves hooks on the model")
        try:
            a_loss(semi)
        except ReSegError:
            pass
        else:
            raise WrongError("a loss without hooks")
    else:
        assert semi.deep is not None
        semi.deep.extractor.forget()
        check_semi(model, semi)
        before = {n: p.detach().double() for n, p in model.named_parameters()}
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05)
        semi.update()
        oracle.near(list(semi.average.parameters()), list(followed(before, model, 0.99).values()), "the mean teacher")
    if error is not None:
        raise error


# --- the halves of the other two


def parts() -> Iterator[Attempt]:
    labels = {title: bad(batch(4)[1]) for title, bad in BAD_LABELS.items()}
    values = (
        "too high",
        "negative",
        "255",
        "fractions",
        "NaN",
        "inf",
        "soft",
        "several classes a pixel",
        "no class a pixel",
    )
    for value in (None, 3, 1.5, "inductor", True, [torch.compile], {}, (), IMAGES, object()):
        yield Attempt("CutMixConsistency.compile", repr(value)[:30], lambda v=value: mixing()[1].compile(v))
    for title, images in BAD_IMAGES.items():
        if title in ("another size", "fp16"):
            continue  # right, and the model's affair
        yield Attempt("CutMixConsistency.mix", title, lambda v=images: mixing()[1].mix(v))
        if title not in ("an inf pixel", "a NaN pixel", "other channels", "float64", "3D"):
            yield Attempt(
                "CutMixConsistency.exchange", f"images {title}", lambda v=images: mixing()[1].exchange(v, batch(4)[1])
            )
    for title, label in labels.items():
        if title not in values and title not in (
            "another batch",
            "a larger batch",
            "transposed size",
            "five axes",
            "other classes",
        ):
            yield Attempt(
                "CutMixConsistency.exchange", f"label {title}", lambda v=label: mixing()[1].exchange(IMAGES, v)
            )
    for value in (-1.0, NAN, INF, "1", [1.0], torch.ones(2), torch.tensor(NAN), {}, object(), 1j):
        yield Attempt("CutMixConsistency.factor_of", repr(value), lambda v=value: mixing()[1].factor_of(v))
    for title, spoil in _BAD_SELECTIONS.items():
        yield Attempt("CutMixConsistency.select", title, lambda f=spoil: _selected(f))
    for title, spoil in _BAD_VALUES.items():
        own = (OwnError,) if "raising" in title else ()
        yield Attempt("CutMixConsistency.value", title, lambda f=spoil: _valued(f), own=own)
    for name, by in (
        ("outputs", lambda d, y: d.outputs()),
        ("loss_of", lambda d, y: d.loss_of(d.outputs(), y, task_loss)),
    ):
        for title, prepare in {
            "no forward": lambda m, d: None,
            "two forwards": lambda m, d: forward(m, 2),
            "a failed forward": failing,
            "in evaluation": lambda m, d: (m.eval(), forward(m)),
            "after remove": lambda m, d: (d.remove(), forward(m)),
            "without gradients": lambda m, d: no_grad(lambda: forward(m)),
            "at weight 0": lambda m, d: (setattr(d, "weight", 0), forward(m)),
            "in inference mode": lambda m, d: inference(lambda: forward(m)),
            "of another dtype": lambda m, d: (d.to(torch.float64), forward(m)),
            "asked twice": lambda m, d: (forward(m), d.outputs()),
        }.items():
            yield Attempt(f"DeepSupervision.{name}", title, lambda p=prepare, b=by: _of_heads(p, b))
    for title, label in {title: bad(batch()[1]) for title, bad in BAD_LABELS.items()}.items():
        if title not in values:
            yield Attempt(
                "DeepSupervision.loss_of",
                f"label {title}",
                lambda v=label: _of_heads(lambda m, d: forward(m), lambda d, y: d.loss_of(d.outputs(), v, task_loss)),
            )
    for value in (None, "outputs", [], {}, torch.ones(2)):
        yield Attempt(
            "DeepSupervision.loss_of",
            f"outputs {value!r}",
            lambda v=value: supervised()[1].loss_of(v, batch()[1], task_loss),
        )


_BAD_SELECTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "None": lambda m, x: None,
    "a string": lambda m, x: "logits",
    "a number": lambda m, x: 1.0,
    "an empty list": lambda m, x: [],
    "a dict of nothing": lambda m, x: {"out": None},
    "integers": lambda m, x: m(x).argmax(1),
    "detached": lambda m, x: m(x).detach(),
    "without gradients": lambda m, x: no_grad(lambda: m(x)),
    "cropped": lambda m, x: m(x)[..., :9],
    "of a part": lambda m, x: m(x[:1]),
    "NaN": lambda m, x: m(x) * NAN,
    "probabilities": lambda m, x: m(x).softmax(1),
    "without a batch": lambda m, x: m(x)[0],
}
_BAD_VALUES: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "prediction None": lambda p, y: (None, y, ignoring),
    "of a part": lambda p, y: (p[:1], y, ignoring),
    "cropped": lambda p, y: (p[..., :8], y, ignoring),
    "other classes": lambda p, y: (p[:, :2], y, ignoring),
    "of more classes": lambda p, y: (torch.cat([p, p], 1), y, ignoring),
    "y None": lambda p, y: (p, None, ignoring),
    "y a tuple": lambda p, y: (p, tuple(y), ignoring),
    "y a label": lambda p, y: (p, y.label, ignoring),
    "a loss of nothing": lambda p, y: (p, y, lambda a, b: None),
    "no function": lambda p, y: (p, y, "ce"),
    "a loss that ignores nothing": lambda p, y: (p, y, lambda a, b: F.cross_entropy(a, b.clamp_max(2))),
    "a loss raising": lambda p, y: (p, y, raising),
    "a loss of NaN": lambda p, y: (p, y, lambda a, b: a.sum() * NAN),
}


def _selected(spoil: Callable[[Any, Tensor], Any]) -> Any:
    model, mixed = mixing()
    return mixed.select(spoil(model, IMAGES), IMAGES)


def _valued(spoil: Callable[[Any, Any], tuple[Any, ...]]) -> Any:
    model, mixed = mixing()
    y = mixed.mix(IMAGES)
    return mixed.value(*spoil(model(y.images), y))


def _of_heads(prepare: Callable[[Any, Any], Any], use: Callable[[Any, Tensor], Any]) -> Any:
    model, ds = supervised()
    prepare(model, ds)
    return use(ds, batch()[1])


# --- task losses


def task_losses() -> Iterator[Attempt]:
    label = batch()[1]
    logits = torch.randn(2, CLASSES, *label.shape[1:], generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(label, CLASSES).movedim(-1, 1)
    losses: dict[str, tuple[Any, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        "CrossEntropyDiceLoss": (CrossEntropyDiceLoss, label, _cross_entropy_and_dice),
        "BinaryCrossEntropyDiceLoss": (BinaryCrossEntropyDiceLoss, one_hot, _binary),
    }
    for name, (made, target, reference) in losses.items():
        target_name = f"{name}.forward"
        yield Attempt(
            target_name, "right", lambda m=made, y=target, r=reference: _agrees(m(), logits, y, r), true, NEVER
        )
        for title, bad in {
            "None": None,
            "a string": "y",
            "a number": 1,
            "NumPy": target.numpy(),
            "another batch": target[:1],
            "another size": target[..., :9],
            "another rank": target[0],
            "too high": target + 7,
            "negative": target - 1,
            "fractions": target * 0.5 + 0.25,
            "NaN": torch.full_like(target, NAN, dtype=torch.float32),
            "complex": target.to(torch.complex64),
            "empty": target[:0],
            "an empty list": [],
        }.items():
            yield Attempt(target_name, f"label {title}", lambda m=made, y=bad: m()(logits, y))
        for title, bad in {
            "None": None,
            "integers": logits.long(),
            "a list": [logits],
            "of a rank": logits[0, 0],
            "sparse": logits.to_sparse(),
            "empty": logits[:0],
        }.items():
            yield Attempt(target_name, f"logits {title}", lambda m=made, x=bad, y=target: m()(x, y))
        wrong: list[Any] = [1.5, "255", None, NAN, True, [255], {}, object(), 1, 0]
        for value in wrong:
            yield Attempt(name, f"ignore_index={value!r}"[:40], lambda m=made, v=value, y=target: m(v)(logits, y))
    for value in ([1, -1, 1], [0, 0, 0], [], [1, NAN, 1], 3, "abc", [1, 2], torch.ones(2, 2), {}, [None] * 3):
        yield Attempt(
            "CrossEntropyDiceLoss",
            f"class_weights={value!r}"[:50],
            lambda v=value: CrossEntropyDiceLoss(255, v)(logits, label),
        )


def _agrees(loss: nn.Module, logits: Tensor, label: Tensor, reference: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = logits.clone().requires_grad_()
    oracle.near(loss(x, label), reference(x, label), "the task loss")
    oracle.near(oracle.gradients(loss(x, label), [x]), oracle.gradients(reference(x, label), [x]), "its gradient", 1e-3)


def _dice(p: Tensor, truth: Tensor) -> Tensor:
    axes = (0, *range(2, p.ndim))
    return (1 - (2 * (p * truth).sum(axes) + 1e-5) / (p.square().sum(axes) + truth.sum(axes) + 1e-5)).mean()


def _cross_entropy_and_dice(logits: Tensor, label: Tensor) -> Tensor:
    p = logits.double().softmax(1)
    truth = torch.stack([label == c for c in range(p.shape[1])], 1).double()
    return 0.5 * oracle.cross_entropy(logits, label) + 0.5 * _dice(p, truth)


def _binary(logits: Tensor, label: Tensor) -> Tensor:
    p, truth = logits.double().sigmoid(), label.double()
    return -0.5 * (truth * p.log() + (1 - truth) * (1 - p).log()).mean() + 0.5 * _dice(p, truth)


SECTIONS: list[Callable[[], Iterator[Attempt]]] = [steps, built, parts, lambda: plainly(task_losses())]
