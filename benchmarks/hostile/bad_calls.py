"""The equations with bad tensors, the small methods in bad situations, and the frameworks' glue."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false
# wrong types are what is tried

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reseg_loss.integrations import random_states
from reseg_loss.integrations.lightning import ReSegCallback
from reseg_loss.integrations.monai import DeepSupervisionHandler, ReSegHandler

from . import oracle
from .api import (
    CrossAlignmentLoss,
    DeepSupervision,
    Features,
    ReconLoss,
    ReSegError,
    ReSegWrapper,
    Teacher,
    functional,
    teacher_parts,
)
from .bad_states import pairs
from .bad_steps import BAD_LABELS
from .bad_values import NAN, NO_NUMBERS, a_step, failing, forward, inference, no_grad, raising, true
from .oracle import Seen
from .subjects import (
    CLASSES,
    Net,
    aligned,
    batch,
    check_alignment,
    check_mixing,
    check_supervision,
    followed,
    mixing,
    net,
    semi_supervised,
    supervised,
    task_loss,
)
from .verdict import NEVER, OF_PYTHON, Attempt, WrongError, plainly


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- the equations

X, Y = drawn(2, 4, 8, 8), drawn(2, 4, 8, 8, seed=1)
BAD_PAIRS: dict[str, tuple[Any, Any]] = {
    "other batches": (X, Y[:1]), "other channels": (X, Y[:, :1]), "other sizes": (X, Y[..., :1]),
    "another rank": (X, Y[0]), "integers": (X, Y.long()), "both integers": (X.long(), Y.long()),
    "complex": (X, Y.to(torch.complex64)), "bool": (X, Y > 0), "None": (X, None), "a list": (X, [1.0]),
    "a number": (X, 1.0), "NumPy": (X, Y.numpy()), "a string": ("x", Y), "empty": (X[:0], Y[:0]),
}  # fmt: skip
BAD_VALID: dict[str, Any] = {
    "without a channel": torch.ones(2, 8, 8), "of all channels": torch.ones(2, 4, 8, 8),
    "another size": torch.ones(2, 1, 4, 4), "another batch": torch.ones(1, 1, 8, 8), "a number": 1.0,
    "a string": "valid", "a list": [1], "NaN": torch.full((2, 1, 8, 8), NAN), "above 1": 2 * torch.ones(2, 1, 8, 8),
}  # fmt: skip


def _term(a: Tensor, b: Tensor, valid: Tensor | None = None, normalize: str | None = None) -> Tensor:
    return oracle.term(a.double(), b.double(), normalize == "batch", valid)


def _recon(a: Tensor, b: Tensor, valid: Tensor | None = None) -> Tensor:
    d = a.double() - b.double()
    w = torch.ones_like(d) if valid is None else valid.double().expand_as(d)
    return 0.6 * (w * d**2).sum() / w.sum() + 0.4 * (w * d.abs()).sum() / w.sum()


def equations() -> Iterator[Attempt]:
    pair_functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "functional.recon_loss": (functional.recon_loss, _recon),
        "functional.alignment_term": (functional.alignment_term, _term),
        "ReconLoss.forward": (ReconLoss(), _recon),
        "CrossAlignmentLoss.forward": (_of_pair, lambda a, b, v=None: 7 * _term(a, b, v) / 3),
    }
    half = (torch.arange(8) < 4).float().expand(2, 1, 8, 8)
    for name, (ours, reference) in pair_functions.items():
        for title, pair in BAD_PAIRS.items():
            right = _nan_of_nothing if title == "empty" else None
            if name == "CrossAlignmentLoss.forward" and title in ("integers", "bool", "other channels"):
                right = _as(reference, pair)  # a feature is cast, and channels are mapped, as documented
            yield Attempt(name, title, lambda f=ours, p=pair: f(*p), right)
        for title, valid in BAD_VALID.items():
            if (name, title) == ("CrossAlignmentLoss.forward", "another size"):
                continue  # of the image's size it is right
            # weights outside of 0 to 1 are weights all the same
            right = true if title in ("above 1", "NaN") else None
            yield Attempt(name, f"valid {title}", lambda f=ours, v=valid: f(X, Y, v), right)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            for valid in (None, half):
                yield Attempt(
                    name,
                    f"right in {dtype}, valid {valid is not None}",
                    lambda f=ours, r=reference, d=dtype, v=valid: _agree(f, r, d, v),
                    true,
                    NEVER,
                )
    for value in ("instance", 1, True, [], 0.5):
        yield Attempt(
            "functional.alignment_term",
            f"normalize={value!r}",
            lambda v=value: functional.alignment_term(X, Y, normalize=v),
        )
    for title, (first, second) in BAD_PAIRS.items():
        if title in ("other batches", "other channels", "other sizes", "another rank"):
            continue
        x = first if isinstance(first, str) else second
        yield Attempt(
            "functional.standardize",
            title,
            lambda v=x: functional.standardize(v),
            _nan_of_nothing if title == "empty" else None,
        )
        yield Attempt(
            "functional.project",
            title,
            lambda v=x: functional.project(v, torch.eye(4)),
            (lambda y: y.shape[0] == 0) if title == "empty" else None,
        )
    for title, valid in BAD_VALID.items():
        if title not in ("above 1", "NaN"):
            yield Attempt("functional.standardize", f"valid {title}", lambda v=valid: functional.standardize(X, v))
            yield Attempt(
                "functional.valid_fraction",
                title,
                lambda v=valid: functional.valid_fraction(v, (2, 2)),
                _fraction if title in ("another size", "another batch", "of all channels") else None,
            )
    for value in (None, 3, (-1, 2), (2,), (2.5, 2), (16, 16)):
        yield Attempt(
            "functional.valid_fraction",
            f"spatial={value!r}",
            lambda v=value: functional.valid_fraction(torch.ones(2, 1, 8, 8), v),
            (lambda y: bool((y == 1).all())) if value == (16, 16) else None,
        )
    matrices = {
        "a vector": torch.ones(4), "other channels": torch.ones(3, 5), "three axes": torch.ones(1, 4, 4),
        "integers": torch.ones(4, 4, dtype=torch.int64), "a string": "m", "None": None, "a list": [[1.0]],
    }  # fmt: skip
    for title, matrix in matrices.items():
        yield Attempt("functional.project", f"matrix {title}", lambda m=matrix: functional.project(X, m))
    p = nn.Parameter(torch.ones(3))
    norms: dict[str, tuple[Any, Any]] = {
        "None": (None, {"a": p.sum()}), "a string": ("p", {"a": p.sum()}),
        "a tensor that is none": ([1.0], {"a": p.sum()}), "losses None": ([p], None),
        "losses a list": ([p], [p.sum()]), "losses a tensor": ([p], p.sum()), "a number": ([p], {"a": 1.0}),
        "None inside": ([p], {"a": None}), "a vector": ([p], {"a": 2 * p}),
    }  # fmt: skip
    for title, arguments in norms.items():
        yield Attempt("functional.gradient_norms", title, lambda a=arguments: functional.gradient_norms(*a))
    yield Attempt("functional.gradient_norms", "right", _norms, true, NEVER)
    for shape in ((2, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 5)):
        yield Attempt("functional.project", f"right for {shape}", lambda s=shape: _projected(s), true, NEVER)
    for arguments in (
        (-1, 4), (4, -1), ("4", 4), (4, None), (4.5, 4), (4, 4, "0"), (4, 4, None), (4, 4, 1.5), ([4], 4),
    ):  # fmt: skip
        yield Attempt("functional.semi_orthogonal", f"{arguments}", lambda a=arguments: functional.semi_orthogonal(*a))
    for rows, columns in ((4, 4), (3, 7), (7, 3)):
        yield Attempt(
            "functional.semi_orthogonal",
            f"right {rows}x{columns}",
            lambda r=rows, c=columns: oracle.near(
                functional.semi_orthogonal(r, c, 5), oracle.orthonormal(r, c, 5), "the map"
            ),
            true,
            NEVER,
        )
    for title, eps in NO_NUMBERS.items():
        if title not in ("inf",):
            yield Attempt("functional.standardize", f"eps {title}", lambda e=eps: functional.standardize(X, eps=e))
    for name in ("alpha", "beta"):
        for title, value in NO_NUMBERS.items():
            yield Attempt("ReconLoss", f"{name} {title}", lambda n=name, v=value: ReconLoss(**{n: v}))


def _as(reference: Callable[..., Any], pair: tuple[Any, Any]) -> Callable[[Any], Any]:
    return lambda found: oracle.near(found, reference(*(x.float() for x in pair)), "the value", 1e-5)


def _nan_of_nothing(value: Tensor) -> bool:
    """Of no element a mean is NaN, as torch's; and nothing stays nothing."""
    return bool(value.isnan().all()) or value.numel() == 0


def _of_pair(a: Any, b: Any, valid: Any = None) -> Tensor:
    return CrossAlignmentLoss()(Features((a, a, a), (a, a, a), a), Features((b, b, b), (b, b, b), b), valid)


def _agree(ours: Any, reference: Any, dtype: torch.dtype, valid: Tensor | None) -> None:
    a, b = X.to(dtype).requires_grad_(), Y.to(dtype)
    mine, theirs = ours(a, b, valid), reference(a, b, valid)
    oracle.near(mine, theirs, "the value", 1e-5)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}.get(dtype, 1e-6)
    oracle.near(oracle.gradients(mine, [a]), oracle.gradients(theirs, [a]), "the gradient", tolerance)


def _fraction(value: Tensor) -> bool:
    return bool((value == 1).all())


def _norms() -> None:
    p, frozen = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1), requires_grad=False)
    losses = {"a": (p**2).sum() / 2, "b": torch.ones(()), "c": 0 * frozen.sum() + p[0]}
    found = functional.gradient_norms([p, frozen], losses)
    if [float(found[name]) for name in "abc"] != [5.0, 0.0, 1.0]:
        raise WrongError(f"the norms are {found}")


def _projected(shape: tuple[int, ...]) -> None:
    x, m = drawn(*shape), drawn(3, 4, seed=2)
    oracle.near(functional.project(x, m), torch.einsum("dc,bc...->bd...", m, x), "the projection")


def alignment_loss_module() -> Iterator[Attempt]:
    name = "CrossAlignmentLoss"
    for keyword in ("encoder_to_decoder", "decoder_to_encoder", "bottleneck", "divisor"):
        for title, value in NO_NUMBERS.items():
            yield Attempt(name, f"{keyword} {title}", lambda k=keyword, v=value: CrossAlignmentLoss(**{k: v}))
    yield Attempt(name, "no weight at all", lambda: CrossAlignmentLoss(0, 0, 0))
    for value in ("0", None, 1.5, [0], NAN):
        yield Attempt(name, f"seed={value!r}", lambda v=value: CrossAlignmentLoss(seed=v))
    loss = CrossAlignmentLoss(3.0, 0.5)
    for term in (
        "", "nothing", "encoder", "encoder_to_decoder_-1", "encoder_to_decoder_0", "decoder_to_encoder_x", None, 3,
        "bottleneck_1", "encoder_to_decoder",
    ):  # fmt: skip
        yield Attempt(f"{name}.term_weight", repr(term), lambda t=term: loss.term_weight(t))
    one = torch.ones(())
    terms: dict[str, Any] = {
        "None": None, "a list": [1.0], "a string": "bottleneck", "an unknown term": {"nothing": one},
        "a number": {"bottleneck": 1.0}, "a vector": {"bottleneck": torch.ones(2)},
        "None inside": {"bottleneck": None}, "a string inside": {"bottleneck": "1"},
        "a level 0": {"encoder_to_decoder_0": one}, "a tensor": one,
    }  # fmt: skip
    for title, value in terms.items():
        yield Attempt(f"{name}.combine", title, lambda v=value: loss.combine(v))
    yield Attempt(
        f"{name}.combine", "right", lambda: float(loss.combine({"encoder_to_decoder_3": one})), lambda x: x == 1, NEVER
    )
    features = Features((X,) * 3, (X,) * 3, X)
    for title, bad in {
        "None": None, "a tensor": X, "fewer levels": Features((X,) * 2, (X,) * 2, X), "a dict": {"encoder": [X]},
        "one side shorter": Features((X,) * 3, (X,) * 2, X), "no bottleneck": Features((X,) * 3, (X,) * 3, None),
    }.items():  # fmt: skip
        yield Attempt(f"{name}.forward", f"teacher {title}", lambda b=bad: CrossAlignmentLoss()(features, b))
        yield Attempt(f"{name}.forward", f"student {title}", lambda b=bad: CrossAlignmentLoss()(b, features))
        yield Attempt(f"{name}.terms", f"teacher {title}", lambda b=bad: CrossAlignmentLoss().terms(features, b))
        yield Attempt(f"{name}.terms", f"student {title}", lambda b=bad: CrossAlignmentLoss().terms(b, features))
    yield Attempt(f"{name}.forward", "crossed", _crossed, true, NEVER)


def _crossed() -> None:
    """Every feature another: whatever is swapped changes the value."""
    sides = []
    for side in range(2):
        f = [drawn(2, 4, 8, 8, seed=10 * side + i) * (i + 1) for i in range(7)]
        sides.append((Features(tuple(f[:3]), tuple(f[3:6]), f[6]), Seen(f[:3], f[3:6], f[6])))
    (student, s), (teacher, t) = sides
    for options, standardized in (({}, False), ({"normalize": "batch"}, True)):
        found = CrossAlignmentLoss(**options)(student, teacher)
        oracle.near(found, oracle.alignment(s, t, standardized=standardized), "eq. 7")
        parts = CrossAlignmentLoss(**options).terms(student, teacher)
        pairs_of = [*zip(s.decoder, t.encoder), *zip(s.encoder, t.decoder), (s.bottleneck, t.bottleneck)]
        names = [*(f"encoder_to_decoder_{i}" for i in (1, 2, 3)), *(f"decoder_to_encoder_{i}" for i in (1, 2, 3))]
        for name, (a, b) in zip([*names, "bottleneck"], pairs_of):
            oracle.near(parts[name], oracle.term(a.double(), b.double(), standardized, None), name)
    # unequal channels: the documented fixed map
    narrow = Features(tuple(x[:, :3] for x in student.encoder), student.decoder, student.bottleneck)
    seen = Seen([x[:, :3] for x in s.encoder], s.decoder, s.bottleneck)
    oracle.near(CrossAlignmentLoss(seed=4)(narrow, teacher), oracle.alignment(seen, t, seed=4), "eq. 7 with a map")


# --- small methods in bad situations

Holder = Any
_WRAPPER: dict[str, Callable[[Any, ReSegWrapper], Any]] = {
    "fresh": lambda m, r: None, "after a forward": lambda m, r: forward(m),
    "after two forwards": lambda m, r: forward(m, 2), "after a failed forward": failing, "after a step": a_step,
    "in evaluation": lambda m, r: m.eval(), "at weight 0": lambda m, r: setattr(r, "weight", 0.0),
    "with every": lambda m, r: None, "twice": lambda m, r: None, "in inference mode": lambda m, r: None,
    "without gradients": lambda m, r: None, "after remove": lambda m, r: r.remove(),
    "after load": lambda m, r: r.load_state_dict(r.state_dict()),
}  # fmt: skip


def small_methods() -> Iterator[Attempt]:
    for member in (
        "teacher", "extractor", "criterion", "ready", "settings", "model", "calls", "parameters", "freeze_teacher",
        "record", "stats", "remove", "alignment_terms",
    ):  # fmt: skip
        for title, prepare in _WRAPPER.items():
            yield Attempt(
                f"ReSegWrapper.{member}", title, lambda n=member, t=title, p=prepare: _use_wrapper(n, t, p), true
            )
        yield Attempt(f"ReSegWrapper.{member}", "before an example", lambda n=member: _unbuilt(n), true)
    heads = {t: p for t, p in _WRAPPER.items() if t not in ("after a step", "after load", "with every")}
    members = ("extractor", "heads", "num_classes", "model", "calls", "parameters", "record", "remove", "stats")
    for member in (*members, "ending"):
        for title, prepare in heads.items():
            yield Attempt(
                f"DeepSupervision.{member}", title, lambda n=member, t=title, p=prepare: _use_heads(n, t, p), true
            )
        yield Attempt(f"DeepSupervision.{member}", "before an example", lambda n=member: _unbuilt_heads(n), true)
    mixings = ("average", "calls", "factor", "update", "reset", "stats", "model", "parameters", "record", "remove")
    mixings += ("ending", "ema_decay", "rampup_steps", "threshold")
    for member in mixings:
        for title, prepare in heads.items():
            if title != "after remove":
                yield Attempt(
                    f"CutMixConsistency.{member}",
                    title,
                    lambda n=member, t=title, p=prepare: _use_mixing(n, t, p),
                    true,
                )
        yield Attempt(f"CutMixConsistency.{member}", "after a changed model", lambda n=member: _changed_mixing(n), true)
    for member in ("ema_decay", "rampup_steps", "threshold"):
        for value in (-1, 1.5, NAN, float("inf"), "1", [1], object()):
            yield Attempt(
                f"CutMixConsistency.{member}", _word(value), lambda n=member, v=value: setattr(mixing()[1], n, v)
            )
    makers: dict[str, Callable[[], Any]] = {
        "ReSegWrapper": lambda: aligned()[1],
        "DeepSupervision": lambda: supervised()[1],
        "CutMixConsistency": lambda: mixing()[1],
        "SemiSupervised": lambda: semi_supervised()[1],
    }
    for name, make in makers.items():
        for title, value in NO_NUMBERS.items():
            yield Attempt(f"{name}.weight", title, lambda m=make, v=value: setattr(m(), "weight", v))
        for value in ("nowhere", "cuda:99", "xpu", object(), [], (1, 2), {}, "", "float33", -7):
            # torch's own words for what torch refuses, as documented
            yield Attempt(
                f"{name}.to",
                _word(value),
                lambda m=make, v=value: m().to(v),
                own=(RuntimeError, TypeError, AssertionError),
            )
    for value in ("", "nothing", "decoder_9", "decoder_0", "decoder_x", "decoder", None, 3, "encoder_1", "bottleneck"):
        yield Attempt(
            "DeepSupervision.weight_of",
            repr(value),
            lambda v=value: supervised(level_weights=[1.0, 0.5, 0.25])[1].weight_of(v),
        )


def _word(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else type(value).__name__


def _call(holder: Any, name: str, title: str) -> Any:
    def once() -> Any:
        value = getattr(holder, name)
        if name == "record":
            with value():
                return None
        if name == "alignment_terms":
            return value(batch()[1])
        return value() if callable(value) and not isinstance(value, nn.Module) else value

    if title == "twice":
        once()
    return (
        inference(once) if title == "in inference mode" else no_grad(once) if title == "without gradients" else once()
    )


def _use_wrapper(name: str, title: str, prepare: Callable[[Any, ReSegWrapper], Any]) -> None:
    """Whatever was called when: a legal step is right afterwards, and after remove() it is refused."""
    model, reseg = aligned(every=2) if title == "with every" else aligned()
    prepare(model, reseg)
    error: Exception | None = None
    try:
        _call(reseg, name, title)
    except ReSegError as refused:
        error = refused
    model.train()
    reseg.weight = 1.0
    if name == "remove" or title == "after remove":
        _hookless(model)
        _must_refuse(lambda: a_step(model, reseg))
    else:
        reseg.extractor.forget()
        check_alignment(model, reseg, factor=2.0 if title == "with every" else 1.0)
    if error is not None:
        raise error


def _hookless(model: nn.Module) -> None:
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        raise WrongError("remove() leaves hooks on the model")


def _must_refuse(run: Callable[[], Any]) -> None:
    try:
        run()
    except ReSegError:
        return
    raise WrongError("a loss without hooks")


def _use_heads(name: str, title: str, prepare: Callable[[Any, Any], Any]) -> None:
    model, ds = supervised()
    prepare(model, ds)
    error: Exception | None = None
    try:
        _call(ds, name, title)
    except ReSegError as refused:
        error = refused
    model.train()
    ds.weight = 1.0
    if name == "remove" or title == "after remove":
        _hookless(model)
        forward(model)
        _must_refuse(lambda: ds.loss(batch()[1], task_loss))
    else:
        ds.extractor.forget()
        check_supervision(model, ds)
    if error is not None:
        raise error


def _use_mixing(name: str, title: str, prepare: Callable[[Any, Any], Any]) -> None:
    """The mean teacher is what it must be after anything: the average of what the model was at every update."""
    model, mixed = mixing()
    prepare(model, mixed)
    _call(mixed, name, title)
    model.train()
    mixed.weight = 1.0
    check_mixing(model, mixed)
    _, before = model, {n: p.detach().double() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    mixed.update()
    oracle.near(list(mixed.average.parameters()), list(followed(before, model, 0.99).values()), "the mean teacher")


def _unbuilt(name: str) -> None:
    model = net()
    reseg = ReSegWrapper(model, preset="standardized")
    _call(reseg, name, "")
    if name == "remove":
        return
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reseg.fit_recon(pairs(), epochs=1, progress=False)
    reseg.weight = 1.0
    check_alignment(model, reseg)


def _unbuilt_heads(name: str) -> None:
    model = net()
    ds = DeepSupervision(model, num_classes=CLASSES)
    _call(ds, name, "")
    if name != "remove":
        ds.load_state_dict(supervised()[1].state_dict())
        check_supervision(model, ds)


def _changed_mixing(name: str) -> None:
    model, mixed = mixing()
    mixed.update()
    model.head = nn.Conv2d(4, 7, 1)
    _call(mixed, name, "")
    if name in ("update", "reset"):
        raise WrongError("a mean teacher of another model")


# --- the teacher

_SITUATIONS_OF_A_TEACHER: dict[str, Callable[[Any], Any]] = {
    "fresh": lambda t: None, "frozen": lambda t: t.freeze(), "frozen twice": lambda t: (t.freeze(), t.freeze()),
    "in evaluation": lambda t: t.eval(), "then train()": lambda t: (t.freeze(), t.train()),
    "then its body's train()": lambda t: (t.freeze(), [m.train() for m in t.modules()]),
    "without gradients": lambda t: t.requires_grad_(False), "in double": lambda t: t.double().float(),
    "copied": lambda t: copy.deepcopy(t), "loaded": lambda t: t.load_state_dict(t.state_dict()),
}  # fmt: skip


def teacher() -> Iterator[Attempt]:
    for title, bad in BAD_LABELS.items():
        if title in ("another batch", "a larger batch", "another size", "transposed size"):
            continue  # a teacher knows no image
        for name, use in (("Teacher.forward", lambda t, x: t(x)), ("ReSegWrapper.reconstruct", None)):
            values = (
                title in ("too high", "negative", "255", "fractions", "NaN", "inf", "complex")
                or "class" in title
                or title == "soft"
            )
            if values and title != "complex":
                continue  # forward looks at no values, as in every step
            run = (
                (lambda b=bad: aligned()[1].reconstruct(b(batch()[1])))
                if use is None
                else (lambda b=bad: aligned()[1].teacher(b(batch()[1])))
            )
            yield Attempt(name, f"label {title}", run, (lambda y: len(y) == 0) if title == "empty" else None)
    yield Attempt("ReSegWrapper.reconstruct", "right", _reconstructed, true, NEVER)
    yield Attempt("ReSegWrapper.reconstruct", "before an example", lambda: ReSegWrapper(net()).reconstruct(batch()[1]))
    members = [name for name in vars(Teacher) if not name.startswith("_") and name != "forward"]
    for member in members:
        for title, prepare in _SITUATIONS_OF_A_TEACHER.items():
            yield Attempt(f"Teacher.{member}", title, lambda n=member, p=prepare: _use_teacher(n, p), true)
    for title in ("body", "encoding", "in_channels", "out_channels", "image_channels"):
        for value in (None, "x"):
            yield Attempt("Teacher", f"{title}={value!r}", lambda n=title, v=value: _made_teacher(n, v), own=OF_PYTHON)


def _made_teacher(name: str, value: Any) -> Any:
    known = aligned()[1].teacher
    keywords: dict[str, Any] = {
        "body": net(), "encoding": known.encoding, "in_channels": 1, "out_channels": CLASSES, "image_channels": 1,
        name: value,
    }  # fmt: skip
    return type(known)(**keywords)


def _reconstructed() -> None:
    reseg = aligned()[1]
    before, body, after = (copy.deepcopy(m).eval() for m in teacher_parts(reseg.teacher, Net))
    with torch.no_grad():
        expected = after(body(before(oracle.index_map(batch()[1])[0].float())))
    oracle.near(reseg.reconstruct(batch()[1]), expected, "the reconstruction")
    unfinished = aligned(ready=False)[1]
    if unfinished.reconstruct(batch()[1]).requires_grad or not unfinished.teacher.training:
        raise WrongError("a reconstruction trains, or leaves the teacher in evaluation")


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that a call must give."""
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _use_teacher(name: str, prepare: Callable[[Any], Any]) -> None:
    model, reseg = aligned(ready=False)
    prepare(reseg.teacher)
    encoded = torch.zeros(2, 1, 32, 32)
    value = getattr(reseg.teacher, name)
    if name in ("decode", "run"):
        value(encoded)
    elif callable(value) and not _required(value):
        made = value()
        _ = list(made) if isinstance(made, Iterator) else made
    reseg.freeze_teacher()
    check_alignment(model, reseg)


# --- frameworks


def frameworks() -> Iterator[Attempt]:
    loaders: dict[str, Any] = {
        "None": None, "a number": 3, "empty": [], "triples": [(*batch(), 1)], "other keys": [{"a": batch()[0]}],
        "single tensors": [batch()[0]], "a string": "loader", "integer images": [(batch()[0].long(), batch()[1])],
        "a bad label": [(batch()[0], batch()[1] + 9)], "NaN": [(batch()[0] * NAN, batch()[1])],
        "a dict": {"a": pairs()},
    }  # fmt: skip
    for title, loader in loaders.items():
        yield Attempt("ReSegCallback.on_train_start", f"loader {title}", lambda v=loader: _lightning(v))
        yield Attempt("ReSegHandler.stage_1", f"loader {title}", lambda v=loader: _monai(v))
    options: list[dict[str, Any]] = [
        {}, {"epochs": 0}, {"epochs": 1, "steps": 1}, {"epoch": 1}, {"epochs": "1"}, {"epochs": 1, "amp": "bf16"},
        {"epochs": 1, "optimizer": "adam"}, {"epochs": 1, "scheduler": 3}, {"steps": -1},
        {"epochs": 1, "checkpoint": []},
    ]  # fmt: skip
    for option in options:
        own = OF_PYTHON if "epoch" in option else ()
        yield Attempt("ReSegCallback", f"{option}", lambda o=option: _lightning(pairs(), o), own=own)
        yield Attempt("ReSegHandler", f"{option}", lambda o=option: _monai(pairs(), o), own=own)
    for title, module in {
        "nothing": {}, "a net": {"net": net()}, "None": {"reseg": None}, "a class": {"reseg": ReSegWrapper},
        "a list of wrappers": {"reseg": [aligned()[1]]}, "a dict": {"reseg": {"a": aligned()[1]}},
        "a string": {"r": "r"}, "a number": {"a": 1}, "a state": {"reseg": aligned()[1].state_dict()},
        "a loss": {"loss": nn.MSELoss()},
    }.items():  # fmt: skip
        for name in ("setup", "on_fit_start", "state_dict"):
            yield Attempt(f"ReSegCallback.{name}", title, lambda m=module, n=name: _set_up(m, n))
    both = {"reseg": aligned()[1], "deep": supervised()[1]}
    whole = {name: each.state_dict() for name, each in both.items()}
    for title, state in {
        "None": None, "a list": [1], "a string": "state", "unknown": {"other": {}}, "less": {"reseg": whole["reseg"]},
        "swapped": {"reseg": whole["deep"], "deep": whole["reseg"]}, "empty states": {"reseg": {}, "deep": {}},
        "a net's": net().state_dict(), "numbers": {"reseg": 1, "deep": 2},
        "None inside": {"reseg": None, "deep": None}, "half": {"deep": {"format": 1}, "reseg": whole["reseg"]},
    }.items():  # fmt: skip
        yield Attempt("ReSegCallback.load_state_dict", title, lambda s=state: _restored(s), own=OF_PYTHON)
        right = true if title == "less" else None
        within = {"losses": state, "trained": {}, "random": random_states()}
        yield Attempt("ReSegCallback.load_state_dict", f"{title} within", lambda s=within: _restored(s), right)
    engines: dict[str, Any] = {
        "None": None, "a string": "engine", "a number": 1, "an object": object(), "a net": net(), "a list": [],
        "a class": Net, "a dict": {}, "a tensor": torch.ones(1), "an evaluator": SimpleNamespace(state=None),
    }  # fmt: skip
    for title, engine in engines.items():
        yield Attempt(
            "ReSegHandler.attach", title, lambda e=engine: ReSegHandler(aligned()[1]).attach(e), own=OF_PYTHON
        )
        yield Attempt(
            "DeepSupervisionHandler.attach",
            title,
            lambda e=engine: DeepSupervisionHandler(supervised()[1]).attach(e),
            own=OF_PYTHON,
        )
    for title, value in {
        "None": None, "a string": "ds", "a number": 1, "a net": net(), "a class": DeepSupervision, "a list": [],
        "a dict": {}, "a wrapper": aligned()[1], "a tensor": torch.ones(1), "a function": raising,
    }.items():  # fmt: skip
        yield Attempt("DeepSupervisionHandler", title, lambda v=value: _supervised_engine(v))


def _lightning(loader: Any, options: dict[str, Any] | None = None) -> Any:
    callback = ReSegCallback(loader=loader, **({"epochs": 1} if options is None else options))
    module: Any = SimpleNamespace(reseg=aligned(ready=False)[1])
    trainer: Any = SimpleNamespace(train_dataloader=None, progress_bar_callback=None)
    callback.setup(trainer, module, "fit")
    return callback.on_train_start(trainer, module)


def _monai(loader: Any, options: dict[str, Any] | None = None) -> Any:
    handler = ReSegHandler(aligned(ready=False)[1], loader=loader, **({"epochs": 1} if options is None else options))
    engine: Any = SimpleNamespace(state=SimpleNamespace(dataloader=None))
    return handler.stage_1(engine)


def _engine() -> Any:
    from ignite.engine import Engine
    from monai.engines.utils import IterationEvents

    engine = Engine(lambda e, b: None)
    engine.register_events(*IterationEvents)
    return engine


def _supervised_engine(value: Any) -> Any:
    handler, engine = DeepSupervisionHandler(value), _engine()
    handler.attach(engine)
    engine.loss_function = nn.CrossEntropyLoss()
    engine.state.output = {"loss": torch.zeros(()), "label": batch()[1]}
    return handler(engine)


def _set_up(attributes: dict[str, Any], name: str) -> Any:
    callback, module = ReSegCallback(epochs=1), SimpleNamespace(**attributes, device="cpu", dtype=torch.float32)
    trainer: Any = SimpleNamespace()
    callback.setup(trainer, module, "fit")  # pyright: ignore
    return callback.state_dict() if name == "state_dict" else callback.on_fit_start(trainer, module)  # pyright: ignore


def _restored(state: Any) -> Any:
    callback, module = ReSegCallback(epochs=1), SimpleNamespace(reseg=aligned()[1], deep=supervised()[1])
    callback.setup(SimpleNamespace(), module, "fit")  # pyright: ignore
    return callback.load_state_dict(state)


SECTIONS: list[Callable[[], Iterator[Attempt]]] = [
    lambda: plainly(equations(), ValueError, RuntimeError),  # pure functions of tensors: torch's words will do, too
    lambda: plainly(alignment_loss_module()),
    small_methods,
    teacher,
    frameworks,
]
