"""Models that are compiled, or changed after the hooks were set: the same loss and gradients, or a refusal."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from . import oracle
from .api import FeatureExtractor
from .subjects import (
    TRUTH,
    aligned,
    batch,
    block,
    check_alignment,
    check_supervision,
    mixing,
    net,
    supervised,
    task_loss,
)
from .verdict import ANYTHING, NEVER, Attempt, WrongError


def attempts(quick: bool = False) -> Iterator[Attempt]:
    """`quick`: one compiled attempt of each kind."""
    for backend, titles in BACKENDS.items():
        for title in titles[: 1 if quick else None]:
            run = COMPILED[title]
            # where the compiler ran before the hooks there are none in its code
            refusal = ANYTHING if "before the hooks" in title else NEVER
            yield Attempt(f"compile {backend}", title, _fresh(run, backend), right=_done, refusal=refusal)
    for holder in ("alignment_loss", "DeepSupervision.loss", "FeatureExtractor.pop"):
        for title, change in CHANGES.items():
            refusal = NEVER if title in MUST_BE_SERVED else ANYTHING
            yield Attempt(holder, title, _changed(holder, change), right=_done, refusal=refusal)
    for title, run in QUANTIZED.items():
        yield Attempt("quantization", title, run, right=_done)


def _done(value: Any) -> bool:
    return True  # `run` has compared


def _fresh(run: Callable[[str], Any], backend: str) -> Callable[[], Any]:
    def fresh() -> Any:
        torch.compiler.reset()
        try:
            return run(backend)
        finally:
            torch.compiler.reset()

    return fresh


# --- compiled


def _same_gradients(make: Callable[[], tuple[Any, Any]], loss_of: Callable[[Any, Any], Tensor], backend: str) -> None:
    """One backward of the whole loss, compiled and not: the gradients of two equal models."""
    found = []
    for compiled in (False, True):
        model, holder = make()
        forward = torch.compile(model, backend=backend) if compiled else model
        for step in range(2):
            image, label = batch(seed=step)
            for p in (*model.parameters(), *holder.parameters()):
                p.grad = None
            loss = task_loss(forward(image), label) + loss_of(holder, label)
            loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])  # pyright: ignore
    oracle.near(found[1], found[0], "loss and gradients of a compiled model", 1e-3)


def _alignment(backend: str, **options: Any) -> None:
    _same_gradients(lambda: aligned(**options), lambda reseg, label: reseg.alignment_loss(label), backend)


def _against_the_oracle(backend: str) -> None:
    model, reseg = aligned()
    forward = torch.compile(model, backend=backend)
    image, label = batch(seed=7)
    with oracle.watching(model, TRUTH) as seen:  # hooks of ours before the compiler runs
        forward(image)
        student = seen()
    ours = reseg.alignment_loss(label)
    theirs = copy.deepcopy(reseg.teacher).eval()
    body = next(m for m in theirs.modules() if type(m) is type(model))
    with oracle.watching(body, TRUTH) as seen, torch.no_grad():
        body(oracle.index_map(label)[0].float())
        teacher = seen()
    oracle.near(ours, oracle.alignment(student, teacher, standardized=True), "the alignment loss", 1e-3)


def _supervision(backend: str) -> None:
    _same_gradients(supervised, lambda ds, label: ds.loss(label, task_loss), backend)


def _mixing(backend: str) -> None:
    values = []
    for compiled in (False, True):
        model, mixed = mixing()
        forward = torch.compile(model, backend=backend) if compiled else model
        torch.manual_seed(5)
        loss = mixed.loss(batch(4)[0], nn.CrossEntropyLoss(ignore_index=255), forward=forward)
        loss.backward()
        values.append([loss, *(p.grad for p in model.parameters())])
    oracle.near(values[1], values[0], "loss and gradients of a compiled model", 1e-3)


def _weight_changes(backend: str) -> None:
    """0, then 1, then 0, then 1, with the compiled code that was made at 0."""
    model, reseg = aligned(weight=0.0)
    forward = torch.compile(model, backend=backend)
    for weight in (0.0, 1.0, 0.0, 1.0):
        reseg.weight = weight
        image, label = batch(seed=7)
        if weight:
            check_compiled(model, forward, reseg, image, label)
        else:
            forward(image)
            if float(reseg.alignment_loss(label)) != 0:
                raise WrongError("a loss at weight 0")


def check_compiled(model: Any, forward: Callable[[Tensor], Any], reseg: Any, image: Tensor, label: Tensor) -> None:
    """The value of a compiled model's loss is that of the same model as it is."""
    forward(image)
    ours = reseg.alignment_loss(label)
    model(image)
    oracle.near(ours, reseg.alignment_loss(label), "the loss of a compiled model", 1e-3)


def _sizes_change(backend: str) -> None:
    model, reseg = aligned()
    forward = torch.compile(model, backend=backend)
    for size, n in ((32, 2), (48, 2), (32, 3)):
        check_compiled(model, forward, reseg, *batch(n, size=size))


def _modes_change(backend: str) -> None:
    model, reseg = aligned()
    forward = torch.compile(model, backend=backend)
    for step in range(3):
        check_compiled(model, forward, reseg, *batch(seed=step))
        model.eval()
        with torch.no_grad():
            forward(batch(seed=9)[0])
        model.train()
    reseg.remove()
    oracle.near(forward(batch()[0]), model(batch()[0]), "the output after remove()", 1e-4)


def _every(backend: str) -> None:
    model, reseg = aligned(every=2)
    forward = torch.compile(model, backend=backend)
    values = []
    for _ in range(4):
        image, label = batch(seed=7)
        forward(image)
        values.append(float(reseg.alignment_loss(label)))
    if values[1] or values[3] or not values[0] or abs(values[0] - values[2]) > 1e-3 * values[0]:
        raise WrongError(f"every=2 gave {values}")


def _late_hooks(backend: str) -> None:
    model = net()
    forward = torch.compile(model, backend=backend)
    forward(batch()[0])
    _, reseg = aligned(model)
    image, label = batch(seed=7)
    check_compiled(model, forward, reseg, image, label)


def _another_without_hooks(backend: str) -> None:
    torch.compile(net(5), backend=backend)(batch()[0])
    model, reseg = aligned()
    check_compiled(model, torch.compile(model, backend=backend), reseg, *batch(seed=7))


def _in_place_compile(backend: str) -> None:
    model, reseg = aligned()
    plain = [float(_step(model, reseg)) for _ in range(2)]
    model.compile(backend=backend)
    for value in plain:
        oracle.near(float(_step(model, reseg)), value, "the loss after model.compile()", 1e-3)


def _step(model: Any, reseg: Any) -> Tensor:
    image, label = batch(seed=7)
    model(image)
    return reseg.alignment_loss(label)


COMPILED: dict[str, Callable[[str], Any]] = {
    "standardized": _alignment, "paper": lambda backend: _alignment(backend, preset="paper"),
    "against the oracle": _against_the_oracle, "deep supervision": _supervision, "unlabelled images": _mixing,
    "weights change": _weight_changes, "sizes change": _sizes_change, "modes change": _modes_change, "every=2": _every,
    "compiled and run before the hooks": _late_hooks,
    "another of the class ran before the hooks": _another_without_hooks,
    "model.compile() after the hooks": _in_place_compile,
}  # fmt: skip

# the last two take long
BACKENDS = {
    "eager": list(COMPILED),
    "aot_eager": ["standardized", "deep supervision", "unlabelled images"],
    "inductor": ["standardized", "deep supervision"] if shutil.which("g++") else [],
}


# --- changed after the hooks were set


class Twice(nn.Module):
    """A layer around another, as adapters are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (2 * self.inner(x)).sin() + 0.5


class Adapter(nn.Module):
    """A low rank beside a convolution."""

    def __init__(self, inner: nn.Conv2d) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Conv2d(inner.in_channels, 2, 1)
        self.up = nn.Conv2d(2, inner.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Patched(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sin()


def _wrap(name: str) -> Callable[[Any], None]:
    def wrap(model: Any) -> None:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Twice(model.get_submodule(name)))

    return wrap


def _adapt(model: Any) -> None:
    for side in (model.e, model.d):
        for layers in side:
            layers[0] = Adapter(layers[0])


def _replace_block(model: Any) -> None:
    model.e[2] = block(model.e[2][0].in_channels, model.e[2][0].out_channels, 2, "group")


def _replace_list(model: Any) -> None:
    model.d = nn.ModuleList([copy.deepcopy(d) for d in model.d])


def _later_hook(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(lambda m, a, out: (2 * out).sin())


def _later_pre_hook(model: Any) -> None:
    model.d[1].register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))


def _first_hook(model: Any) -> None:
    model.d[1].register_forward_hook(lambda m, a, out: (2 * out).sin(), prepend=True)


def _kwarg_hook(model: Any) -> None:
    model.e[1].register_forward_hook(lambda m, a, k, out: (2 * out).sin(), with_kwargs=True)


def _always_hook(model: Any) -> None:
    model.e[1].register_forward_hook(lambda m, a, out: (2 * out).sin(), always_call=True)


def _global_class(model: Any) -> None:
    model.d[2].__class__ = Patched


def _patched_forward(model: Any) -> None:
    inner = model.d[2].forward
    model.d[2].forward = lambda x: inner(x).sin()


def _weight_norm(model: Any) -> None:
    for layers in (model.e[1], model.d[1]):
        parametrizations.weight_norm(layers[0])


def _in_place_after(model: Any) -> None:
    """Somebody overwrites a tapped tensor later in the forward, which the example's forward did not."""
    model.d[1].register_forward_pre_hook(lambda m, a: (a[0].mul_(2),))
    model.d[2].register_forward_hook(lambda m, a, out: None)


def _new_weights(model: Any) -> None:
    model.load_state_dict(net(4).state_dict())


def _frozen_encoder(model: Any) -> None:
    model.e.requires_grad_(False)


def _another_dtype(model: Any) -> None:
    model.to(torch.float64).to(torch.float32)


def _deeper(model: Any) -> None:
    model.b = nn.Sequential(model.b, nn.Conv2d(16, 16, 1))


def _inserted(model: Any) -> None:
    model.d[1].append(nn.Conv2d(8, 8, 1))


def _root_hook(model: Any) -> None:
    model.register_forward_hook(lambda m, a, out: out * 2)


def _image_hook(model: Any) -> None:
    model.register_forward_pre_hook(lambda m, a: (a[0] - a[0].mean(),))


def _deleted_hook(model: Any) -> None:
    model.d[1]._forward_hooks.clear()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing changed": lambda model: None, "a decoder's block wrapped": _wrap("d.1"),
    "an encoder's block wrapped": _wrap("e.2"), "the bottleneck wrapped": _wrap("b"),
    "adapters inside the blocks": _adapt, "a block replaced": _replace_block,
    "the decoder's list replaced": _replace_list, "a later hook changes an encoder's output": _later_hook("e.1"),
    "a later hook changes a decoder's output": _later_hook("d.3"),
    "a later hook changes the bottleneck's output": _later_hook("b"), "a later hook changes an input": _later_pre_hook,
    "a hook before ours changes an output": _first_hook, "a later hook with keywords changes an output": _kwarg_hook,
    "a later hook that is always called": _always_hook, "the class of a block replaced": _global_class,
    "the forward of a block replaced": _patched_forward, "weight norm on a tapped block's layers": _weight_norm,
    "a tapped tensor overwritten later": _in_place_after, "other weights loaded": _new_weights,
    "the encoder frozen": _frozen_encoder, "to another dtype and back": _another_dtype,
    "layers after the bottleneck, in its place": _deeper, "a layer appended to a tapped block": _inserted,
    "a hook on the model changes its output": _root_hook, "a hook on the model changes its image": _image_hook,
    "our hook deleted": _deleted_hook,
}  # fmt: skip
MUST_BE_SERVED = ("nothing changed", "adapters inside the blocks", "other weights loaded", "the encoder frozen")


def _changed(holder: str, change: Callable[[Any], Any]) -> Callable[[], Any]:
    def run() -> Any:
        model = net()
        if holder == "alignment_loss":
            _, reseg = aligned(model)
            _, body = model, copy.deepcopy(reseg.teacher)
            change(model)
            return _check_changed(model, reseg, body)
        if holder == "DeepSupervision.loss":
            _, ds = supervised(model)
            change(model)
            return check_supervision(model, ds)
        extractor = FeatureExtractor(model, example_input=batch()[0]).attach()
        change(model)
        with oracle.watching(model, TRUTH) as seen:  # hooks behind the change's
            model(batch()[0])
            expected = seen()
        found = extractor.pop()
        return oracle.same([*found.encoder, *found.decoder, found.bottleneck], expected.all, "the features")

    return run


def _check_changed(model: Any, reseg: Any, before: nn.Module) -> Tensor:
    """The student's features are what stands at the paths now, the teacher's what it was before."""
    image, label = batch(seed=7)
    with oracle.watching(model, TRUTH) as seen:
        model(image)
        student = seen()
    ours = reseg.alignment_loss(label)
    body = next(m for m in before.modules() if type(m) is type(model)).eval()
    with oracle.watching(body, TRUTH) as seen, torch.no_grad():
        body(oracle.index_map(label)[0].float())
        teacher = seen()
    reference = oracle.alignment(student, teacher, standardized=True)
    oracle.near(ours, reference, "the alignment loss")
    parameters = [p for p in model.parameters() if p.requires_grad]
    oracle.near(oracle.gradients(ours, parameters), oracle.gradients(reference, parameters), "the gradient", 1e-3)
    return ours


# --- quantization


def _quantized(model: Any) -> Any:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    for layers in (model.e[1], model.d[1]):
        layers.append(FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8))
    return model


def _qat_teacher() -> None:
    model, reseg = aligned(_quantized(net()), teacher_init="copy")
    before = [b.clone() for b in reseg.teacher.buffers()]
    for step in range(3):
        image, label = batch(seed=step)
        model(image)
        reseg.alignment_loss(3 * label.clamp_max(0) + label)
    oracle.same(list(reseg.teacher.buffers()), before, "the frozen teacher's observers")


def _qat_reconstruct() -> None:
    _, reseg = aligned(_quantized(net()))
    before = [b.clone() for b in reseg.teacher.buffers()]
    reseg.reconstruct(batch()[1])
    oracle.same(list(reseg.teacher.buffers()), before, "the frozen teacher's observers")


def _qat_example() -> None:
    model = _quantized(net())
    before = [b.clone() for b in model.buffers()]
    aligned(model)
    oracle.same(list(model.buffers()), before, "the model's observers, which saw an example")


def _qat_mixing() -> None:
    _, mixed = mixing(_quantized(net()))
    mixed.loss(batch(4)[0], nn.CrossEntropyLoss(ignore_index=255))
    mixed.update()


def _statistics_of_the_teacher() -> None:
    model, reseg = aligned(net(norm="batch"))
    before = [b.clone() for b in reseg.teacher.buffers()]
    for module in (model, reseg.teacher):
        module.train()
    for step in range(2):
        image, label = batch(seed=step)
        model(image)
        reseg.alignment_loss(label)
    oracle.same(list(reseg.teacher.buffers()), before, "the frozen teacher's statistics")


def _copied() -> None:
    """A copy's forward leaves nothing in the original's recording."""
    model, reseg = aligned()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    twin(batch(seed=1)[0])
    check_alignment(model, reseg)
    if list(twin.state_dict()) != list(model.state_dict()):
        raise WrongError("other keys")


def _untouched() -> None:
    """With hooks and without: the same outputs, keys, modes and random numbers."""
    model, twin = net(dropout=0.5, norm="batch"), net(dropout=0.5, norm="batch")
    keys = list(model.state_dict())
    state = torch.get_rng_state()
    aligned(model)
    torch.set_rng_state(state)
    first = model(batch()[0])
    torch.set_rng_state(state)
    oracle.same(first, twin(batch()[0]), "the output")
    oracle.same(dict(model.state_dict()), dict(twin.state_dict()), "the model's state")
    if keys != list(model.state_dict()):
        raise WrongError("other keys")


QUANTIZED: dict[str, Callable[[], Any]] = {
    "observers of the frozen teacher": _qat_teacher, "observers and reconstruct": _qat_reconstruct,
    "observers and the example's forward": _qat_example, "observers and unlabelled images": _qat_mixing,
    "batch statistics of the frozen teacher": _statistics_of_the_teacher, "a copied model": _copied,
    "an untouched model": _untouched,
}  # fmt: skip
