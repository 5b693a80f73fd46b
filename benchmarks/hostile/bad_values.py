"""Bad models, examples, taps, levels and settings."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false
# wrong types are what is tried

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import api, oracle
from .api import FeatureExtractor, Features, ReSegWrapper, Settings, Tap, find_taps
from .subjects import CLASSES, SIZE, TRUTH, Net, aligned, batch, net
from .verdict import ANYTHING, NEVER, OF_PYTHON, Attempt, WrongError

NAN, INF = math.nan, math.inf


class OwnError(Exception):
    """Raised by callbacks of the attempts: it must pass through as it is."""


# --- words for what is bad

NO_NUMBERS: dict[str, Any] = {
    "None": None, "a string": "much", "NaN": NAN, "inf": INF, "negative": -1.0, "a list": [1.0], "a dict": {},
    "an object": object(), "complex": 1j, "a tensor of two": torch.ones(2),
}  # fmt: skip


def each(values: Mapping[str, Any], skip: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    return ((title, value) for title, value in values.items() if title not in skip)


def raising(*_: Any, **__: Any) -> Any:
    raise OwnError("the attempt's own")


def true(value: Any) -> bool:
    return True


# --- FeatureExtractor and find_taps

BAD_EXAMPLES: dict[str, Any] = {
    "no example": None, "a string": "image", "a number": 3, "an empty dict": {}, "an empty tuple": (),
    "integers": torch.zeros(2, 1, SIZE, SIZE, dtype=torch.int64), "without a channel": torch.zeros(2, SIZE, SIZE),
    "six axes": torch.zeros(2, 1, 1, 1, SIZE, SIZE), "other channels": torch.zeros(2, 5, SIZE, SIZE),
    "too small": torch.zeros(2, 1, 2, 2), "empty batch": torch.zeros(0, 1, SIZE, SIZE),
    "empty space": torch.zeros(2, 1, 0, 0), "3D for a 2D net": torch.zeros(2, 1, 8, SIZE, SIZE),
    "fp16 for an fp32 net": torch.zeros(2, 1, SIZE, SIZE, dtype=torch.float16),
    "float64 for an fp32 net": torch.zeros(2, 1, SIZE, SIZE, dtype=torch.float64),
    "on meta": torch.zeros(2, 1, SIZE, SIZE, device="meta"),
    "complex": torch.zeros(2, 1, SIZE, SIZE, dtype=torch.complex64),
    "a NumPy array": np.zeros((2, 1, SIZE, SIZE), np.float32), "a loader's batch": list(batch()),
}  # fmt: skip
BAD_TAPS: dict[str, Any] = {
    "a string": "e.1", "a list": ["e.1"], "an unknown kind": {"encoders": ["e.1"]},
    "an unknown module": {"encoder": ["e.7"], "decoder": ["d.1"], "bottleneck": "b"},
    "a misspelt module": {"bottleneck": "bb"},
    "no syntax": {"encoder": ["e.1[["], "decoder": ["d.1"], "bottleneck": "b"},
    "a number": {"encoder": [1], "decoder": ["d.1"], "bottleneck": "b"},
    "None inside": {"encoder": [None], "decoder": ["d.1"], "bottleneck": "b"},
    "two bottlenecks": {"bottleneck": ["b", "e.3"]},
    "an empty list": {"encoder": [], "decoder": [], "bottleneck": "b"},
    "other counts": {"encoder": ["e.1", "e.2"], "decoder": ["d.1"], "bottleneck": "b"},
    "other sizes": {"encoder": ["e.1"], "decoder": ["d.2"], "bottleneck": "b"},
    "the wrong way round": {"encoder": ["d.1", "d.2"], "decoder": ["e.1", "e.2"], "bottleneck": "b"},
    "a head as bottleneck": {"encoder": ["e.1"], "decoder": ["d.1"], "bottleneck": "d.1"},
    "a second call": {"encoder": ["e.1@1"], "decoder": ["d.1"], "bottleneck": "b"},
    "a key of a tensor": {"encoder": ["e.1[left]"], "decoder": ["d.1"], "bottleneck": "b"},
    "an element that drops the batch": {"encoder": ["e.1[0]"], "decoder": ["d.1"], "bottleneck": "b"},
    "a container": {"encoder": ["e"], "decoder": ["d.1"], "bottleneck": "b"},
    "another layout": {"encoder": [Tap("e.1", layout="NHWC")], "decoder": ["d.1"], "bottleneck": "b"},
    "an unknown layout": {"encoder": [Tap("e.1", layout="NXYZ")], "decoder": ["d.1"], "bottleneck": "b"},
}  # fmt: skip
BAD_MODELS: dict[str, Callable[[], Any]] = {
    "None": lambda: None, "a class": lambda: Net, "a function": lambda: F.relu, "a string": lambda: "net",
    "DataParallel": lambda: nn.DataParallel(net()),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Conv2d(1, 3, 1))),
    "no U": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, CLASSES, 1)),
    "a classifier": lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Flatten(), nn.Linear(900, CLASSES)),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 3, 1)), "on meta": lambda: net().to("meta"),
    "without skips": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 3, 1), nn.Upsample(scale_factor=2)),
    "empty": lambda: nn.Sequential(), "a list": lambda: [net()], "raising": lambda: _RaisingNet(),
}  # fmt: skip
BAD_LEVELS: dict[str, Any] = {
    "a number": 2, "a string": "2", "a stride that is not there": [3], "negative": [-2], "None inside": [None],
    "a float": [2.0], "NaN": [NAN], "nested wrongly": [[2]], "strings": ["2", "4"], "a dict": {"levels": 2},
}  # fmt: skip


class _RaisingNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise OwnError("the net's own")


def _features_right(model: Any, extractor: FeatureExtractor) -> bool:
    with oracle.watching(model, TRUTH) as seen:
        model(batch()[0])
        expected = seen()
    found = extractor.pop()
    oracle.same([*found.encoder, *found.decoder, found.bottleneck], expected.all, "the features")
    return True


def same_taps(plan: Any) -> None:
    found = [str(level.encoder) for level in plan.selected], [str(level.decoder) for level in plan.selected]
    if found != ([*TRUTH.encoder], [*TRUTH.decoder]) or str(plan.bottleneck) != TRUTH.bottleneck:
        raise WrongError(f"the taps are {found}, {plan.bottleneck}")


def finding() -> Iterator[Attempt]:
    image = batch()[0]
    model = net()
    for title, example in BAD_EXAMPLES.items():
        yield Attempt("find_taps", f"example {title}", lambda e=example: find_taps(net(), e))
        yield Attempt(
            "FeatureExtractor", f"example {title}", lambda e=example: FeatureExtractor(net(), example_input=e)
        )
    for title, taps in BAD_TAPS.items():
        # of a net that has a plan some bad names are all right: a level of other sizes is left out with a note
        yield Attempt("find_taps", f"taps {title}", lambda t=taps: find_taps(net(), image, taps=t))
        yield Attempt("FeatureExtractor", f"taps {title}", lambda t=taps: _pop_of(net(), t, image, image))
    for title, make in BAD_MODELS.items():
        own = (OwnError,) if title == "raising" else () if isinstance(make(), nn.Module) else OF_PYTHON
        right = (lambda plan: same_taps(plan) is None) if title == "DataParallel" else None
        yield Attempt("find_taps", f"model {title}", lambda m=make: find_taps(m(), image), right, own=own)
        yield Attempt(
            "FeatureExtractor", f"model {title}", lambda m=make: FeatureExtractor(m(), example_input=image), own=own
        )
    for title, levels in BAD_LEVELS.items():
        yield Attempt("find_taps", f"levels {title}", lambda v=levels: find_taps(net(), image, levels=v))
        yield Attempt("TapPlan.select", title, lambda v=levels: find_taps(net(), image).select(v))
    for name in ("encoder", "when"):
        for value in ("nonsense", 1, None, [], True):
            yield Attempt(
                "FeatureExtractor",
                f"{name}={value!r}",
                lambda n=name, v=value: FeatureExtractor(net(), example_input=image, **{n: v}),
            )
    for value in ("nonsense", 1, None, [], True):
        yield Attempt("find_taps", f"encoder={value!r}", lambda v=value: find_taps(net(), image, encoder=v))
    yield Attempt("find_taps", "right", lambda: same_taps(find_taps(model, image)), right=true, refusal=NEVER)


def _pop_of(model: nn.Module, taps: Any, image: Tensor, example: Any = None) -> Features:
    with FeatureExtractor(model, example, taps=taps) as extractor:
        model(image)
        return extractor.pop()


# what an extractor, wrapper or the like may be in when a method without arguments is called


def _extractor(attach: bool = True, **options: Any) -> tuple[Any, FeatureExtractor]:
    model = net()
    extractor = FeatureExtractor(model, example_input=batch()[0], **options)
    return model, extractor.attach() if attach else extractor


def forward(model: Any, times: int = 1, n: int = 2) -> Any:
    for _ in range(times - 1):
        model(batch(n)[0])
    return model(batch(n)[0])


def failing(model: Any, *_: Any) -> None:
    handle = model.head.register_forward_hook(raising)
    try:
        model(batch()[0])
    except OwnError:
        pass
    finally:
        handle.remove()


def extractor_methods() -> Iterator[Attempt]:
    """Every method in every situation; afterwards a legal forward must give the right features."""
    situations: dict[str, Callable[[Any, FeatureExtractor], Any]] = {
        "fresh": lambda m, x: None, "after a forward": lambda m, x: forward(m),
        "after two forwards": lambda m, x: forward(m, 2), "after a failed forward": failing,
        "after remove": lambda m, x: x.remove(), "after remove, twice": lambda m, x: (x.remove(), x.remove()),
        "disabled": lambda m, x: setattr(x, "enabled", False), "in evaluation": lambda m, x: m.eval(),
        "after a forward without gradients": lambda m, x: no_grad(lambda: forward(m)),
        "after a forward in inference mode": lambda m, x: inference(lambda: forward(m)),
        "after pop": lambda m, x: (forward(m), x.pop()), "after an empty batch": lambda m, x: forward(m, n=0),
    }  # fmt: skip
    reading = ("plan", "levels", "bottleneck", "enabled", "attached", "waiting", "taps")
    for title, prepare in situations.items():
        for name in (*reading, "attach", "remove", "forget", "record", "recorded", "pop", "take", "features_of"):
            yield Attempt(
                f"FeatureExtractor.{name}",
                title,
                lambda n=name, p=prepare: _use_extractor(n, p),
                right=true,
                refusal=ANYTHING,
            )


def no_grad(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


def inference(run: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return run()


def _use_extractor(name: str, prepare: Callable[[Any, FeatureExtractor], Any]) -> None:
    model, extractor = _extractor()
    prepare(model, extractor)
    waiting = extractor.waiting
    error: Exception | None = None
    try:
        value = getattr(extractor, name)
        if name == "features_of":
            extractor.features_of(lambda: model(batch()[0]))
        elif name == "record":
            with extractor.record():
                forward(model)
        elif callable(value):
            value()
        if name in ("pop", "take") and not waiting:
            raise WrongError("features of no forward")
    except api.ReSegError as refused:
        error = refused
    # whatever it was, a legal use is right
    model.train()
    if not extractor.attached:
        extractor.attach()
    extractor.enabled = True
    extractor.forget()
    _features_right(model, extractor)
    if error is not None:
        raise error


# --- taps and plans


def tap_methods() -> Iterator[Attempt]:
    bad = {
        "empty": "", "open bracket": "a[", "closing first": "a]0[", "no call": "a@", "a negative call": "a@-1",
        "a call that is a word": "a@b", "two calls": "a@1@2", "in: alone": "in:", "nested keys": "a[[0]]",
        "empty key": "a[]", "None": None, "a number": 3, "a tap": Tap("a"), "spaces": "   ",
    }  # fmt: skip
    for title, text in bad.items():
        right = (lambda tap: tap.module == "") if title in ("empty", "in: alone", "spaces") else None
        yield Attempt("Tap.parse", title, lambda t=text: Tap.parse(t), right=right)
    for text in ("a.b", "in:a[1]", "a[x][2]@3", "a[-1]", "in:@1"):
        yield Attempt(
            "Tap.parse", text, lambda t=text: str(Tap.parse(t)), right=lambda s, t=text: s == t, refusal=NEVER
        )
    for name in ("Tap", "Level", "TapPlan", "TapPlan.selected", "TapPlan.draw"):
        yield from _plan_rows(name)


def _plan_rows(name: str) -> Iterator[Attempt]:
    """Plans and their parts are plain values: what is wrong in them must not get through an extractor unseen."""
    plan = find_taps(net(), batch()[0])
    wrong: dict[str, Callable[[Any], Any]] = {
        "an unknown module": lambda p: _edit(p, "encoder", module="nothing"),
        "other channels": lambda p: _edit(p, "decoder", channels=99),
        "another layout": lambda p: _edit(p, "decoder", layout="NHWC"),
        "an unknown layout": lambda p: _edit(p, "encoder", layout="XYZ"),
        "tokens that are none": lambda p: _edit(p, "encoder", layout="NLC"),
        "a call that is none": lambda p: _edit(p, "encoder", call=5),
        "a key that is none": lambda p: _edit(p, "decoder", keys=("a",)),
        "an input that is none": lambda p: _edit(p, "decoder", is_input=True, keys=(3,)),
        "no module": lambda p: _edit(p, "encoder", module=""),
        "a number for a module": lambda p: _edit(p, "encoder", module=3),
    }
    for title, edit in wrong.items():
        yield Attempt(name, title, lambda e=edit: _pop_of(net(), e(plan), batch()[0]))


def _edit(plan: Any, side: str, **changes: Any) -> Any:
    first = next(level for level in plan.levels if level.selected)
    level = replace(first, **{side: replace(getattr(first, side), **changes)})
    return replace(plan, levels=tuple(level if each is first else each for each in plan.levels))


# --- settings


def settings() -> Iterator[Attempt]:
    bad: dict[str, list[Any]] = {
        "weight": [NAN, INF, -1, "1", [1.0], torch.ones(2)],
        "encoder_to_decoder": [NAN, -1, "1", [1.0], {}, torch.ones(3)],
        "decoder_to_encoder": [INF, -1, "1", [1.0], object()], "bottleneck": [NAN, -1, "1", [1.0], torch.ones(2)],
        "divisor": [0, -3, NAN, INF, "3", [3]], "normalize": ["instance", 1, True, [], "Batch"],
        "seed": ["0", 1.5, -(2**70), [0], NAN], "alpha": [NAN, -1, "0.6", INF, [0.6]],
        "beta": [NAN, -1, "0.4", INF, [0.4]], "label_input": ["Index", 1, [], "one-hot"],
        "ignore_index": ["255", 1.5, NAN, [255], object(), INF],
        "output": [1.5, object(), "nothing", ("a", "b"), b"0"], "teacher_init": ["zeros", 1, [], "Copy"],
        "levels": [*BAD_LEVELS.values()], "encoder": ["blocks", 1, [], "Skip"], "every": [0, -1, 1.5, "2", True, NAN],
        "teacher_dtype": [torch.int8, torch.float64, "half", 1, "float32", []], "compile_teacher": ["yes", 2, []],
        "capture_teacher": ["yes", 2, []], "nonsense": [1], "wieght": [1],
    }  # fmt: skip
    for name, values in bad.items():
        for value in values:
            title, keyword = f"{name}={_short(value)}", {name: value}
            yield Attempt("ReSegWrapper", title, lambda k=keyword: _built(**k))
            yield Attempt("Settings", title, lambda k=keyword: _built_of(Settings(**k)))
    for name in ("to_dict", "lower", "output_path"):  # nothing can be wrong in them that was not above
        for value in (None, 0, "a", (0, "a"), [0, 1], 1, "b", ("c",), (1, 2), -1):
            yield Attempt(
                f"Settings.{name}",
                f"output={value!r}",
                lambda n=name, v=value: (v, _read(Settings(output=v), n)),
                right=lambda found, n=name: _setting_right(n, *found),
                refusal=NEVER,
            )


def _read(settings: Settings, name: str) -> Any:
    value = getattr(settings, name)
    return value() if callable(value) else value


def _setting_right(name: str, value: Any, found: Any) -> bool:
    if name == "lower":
        return found is None
    if name == "output_path":
        return found == (None if value is None else (value,) if isinstance(value, (int, str)) else tuple(value))
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    return torch.load(file, weights_only=True) == found


def _built(**options: Any) -> Any:
    """A wrapper, used for a step: what is only refused there is refused late, but not silent."""
    model, reseg = aligned(**options)
    return a_step(model, reseg)


def a_step(model: Any, reseg: ReSegWrapper) -> Tensor:
    image, label = batch()
    model(image)
    return reseg.alignment_loss(label)


def _built_of(settings: Settings) -> Any:
    return _built(**{name: getattr(settings, name) for name in Settings.__dataclass_fields__})


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) < 40 else f"{type(value).__name__}"


SECTIONS: list[Callable[[], Iterable[Attempt]]] = [finding, extractor_methods, tap_methods, settings]
