"""Stage 1 and everything that is saved: bad loaders, files, states, and their order."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalCall=false
# wrong types are what is tried

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from . import oracle
from .api import DeepSupervision, ReSegError, ReSegWrapper, teacher_parts
from .bad_values import INF, NAN, OwnError, inference, raising, true
from .subjects import (
    IGNORED,
    Net,
    aligned,
    batch,
    check_alignment,
    check_mixing,
    check_semi,
    check_supervision,
    mixing,
    net,
    semi_supervised,
    supervised,
)
from .verdict import ANYTHING, NEVER, Attempt, WrongError

TARGET = "ReSegWrapper.fit_recon"
TEACHES_NOTHING = "ignore:the teacher's reconstruction loss"


def pairs(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [batch(seed=i) for i in range(n)]


def fit(loader: Any = None, reseg: ReSegWrapper | None = None, **options: Any) -> ReSegWrapper:
    reseg = aligned(ready=False)[1] if reseg is None else reseg
    keywords = {"progress": False, **({} if "steps" in options else {"epochs": 2}), **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the teacher's reconstruction loss")
        reseg.fit_recon(pairs() if loader is None else loader, **keywords)
    return reseg


# --- stage 1


def stage_1() -> Iterator[Attempt]:
    yield Attempt(TARGET, "against a loop of our own", _against_own_loop, true, NEVER)
    yield Attempt(TARGET, "ignored pixels against a loop of our own", lambda: _against_own_loop(IGNORED), true, NEVER)
    yield Attempt(TARGET, "what it leaves as it was", _leaves_no_trace, true, NEVER)
    loaders: dict[str, Any] = {
        "None": None, "a number": 3, "a string": "loader", "empty": [], "used up": iter([]),
        "single tensors": [batch()[0]], "triples": [(*batch(), "name")],
        "other keys": [{"img": batch()[0], "seg": batch()[1]}], "None inside": [None],
        "an image alone": [(batch()[0], None)], "swapped": [batch()[::-1]],
        "integer images": [(batch()[0].long(), batch()[1])],
        "complex images": [(batch()[0].to(torch.complex64), batch()[1])],
        "float64 images": [(batch()[0].double(), batch()[1])],
        "other channels": [(batch()[0].expand(-1, 3, -1, -1), batch()[1])],
        "other channels later": [batch(), (batch()[0].expand(-1, 3, -1, -1), batch()[1])],
        "other sizes of label": [(batch()[0], batch()[1][:, ::2, ::2])],
        "label too high": [(batch()[0], batch()[1] + 5)], "label of NaN": [(batch()[0], batch()[1] * NAN)],
        "a NaN image": [(batch()[0] * NAN, batch()[1])],
        "a NaN image last": [*pairs(), (batch()[0] * NAN, batch()[1])],
        "an inf image": [(batch()[0] + INF, batch()[1])], "an empty batch": [batch(0)],
        "an empty batch later": [batch(), batch(0)], "3D later": [batch(), batch(dims=3)],
        "NumPy": [tuple(x.numpy() for x in batch())],
    }  # fmt: skip
    for title, loader in loaders.items():
        # fp64 images train an fp32 teacher as well
        right = true if title == "float64 images" else None
        run = (lambda: fit_none()) if title == "None" else (lambda v=loader: fit(v))
        yield Attempt(TARGET, f"loader {title}", run, right)
    yield Attempt(TARGET, "a raising loader", lambda: fit(_raising_loader()), own=(OwnError,))
    options: dict[str, list[Any]] = {
        "epochs": [0, -1, "2", NAN, 1.5, [2], None], "steps": [0, -1, "2", NAN, [2]],
        "optimizer": ["adam", 3, [], lambda p: None], "scheduler": ["cosine", 3, [], lambda o: None, lambda o: 3],
        "amp": ["bfloat16", True, torch.int8, 16, torch.float64], "checkpoint": [3, [], object(), {}],
    }  # fmt: skip
    for name, values in options.items():
        for value in values:
            yield Attempt(TARGET, f"{name}={_word(value)}", lambda n=name, v=value: fit(**_with(n, v)))
    yield Attempt(
        TARGET, "an optimizer of other parameters", lambda: fit(optimizer=torch.optim.Adam(net().parameters()))
    )
    yield Attempt(TARGET, "epochs and steps", lambda: fit(epochs=1, steps=1))
    yield Attempt(TARGET, "a raising optimizer", lambda: fit(optimizer=raising), own=(OwnError,))
    yield Attempt(TARGET, "a raising schedule", lambda: fit(scheduler=raising), own=(OwnError,))
    yield Attempt(TARGET, "a schedule of the validation loss", lambda: fit(scheduler=_plateau), refusal="schedule|step")
    yield Attempt(TARGET, "twice", lambda: fit(reseg=fit()))
    yield Attempt(TARGET, "in inference mode", lambda: _in_inference(aligned(ready=False)[1]))
    yield Attempt("ReSegWrapper", "in inference mode", lambda: inference(aligned))
    yield Attempt(TARGET, "without gradients", lambda: _no_grad(fit), true)
    yield Attempt(TARGET, "a learning rate of 1e30", lambda: fit(optimizer=lambda p: torch.optim.SGD(p, 1e30)))
    yield Attempt(TARGET, "NaN by the last update", _nan_by_the_last_update)
    yield Attempt(
        TARGET,
        "images of 0 to 255",
        lambda: fit_loudly([(255 * x, y) for x, y in pairs()]),
        refusal="range|scale|standardi",
    )
    yield Attempt(TARGET, "reentrant checkpointing", _reentrant, refusal="reentrant")
    yield from _files()


def fit_none() -> Any:
    return aligned(ready=False)[1].fit_recon(None, epochs=1, progress=False)  # pyright: ignore


def fit_loudly(loader: Any) -> Any:
    return aligned(ready=False)[1].fit_recon(loader, epochs=1, progress=False)


def _with(name: str, value: Any) -> dict[str, Any]:
    if name == "epochs" and value is None:
        return {"epochs": None}
    return {name: value}


def _word(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else type(value).__name__


def _no_grad(run: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return run()


def _raising_loader() -> Iterator[Any]:
    yield batch()
    raise OwnError("the loader's own")


def _plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def _against_own_loop(ignored: int | None = None) -> None:
    """Stage 1 as a plain loop over eqs. 1-3, with Adam."""
    _, reseg = aligned(ready=False, ignore_index=ignored)
    before, body, after = (copy.deepcopy(m).train() for m in teacher_parts(reseg.teacher, Net))
    data = pairs()
    if ignored is not None:
        for _, label in data:
            label[:, :10] = ignored
    optimizer = torch.optim.Adam([*before.parameters(), *body.parameters(), *after.parameters()], 1e-3)
    expected = []
    for _ in range(2):
        losses = []
        for image, label in data:
            index, valid = oracle.index_map(label, ignored)
            d = after(body(before(index.float()))) - image
            w = torch.ones_like(d) if valid is None else valid.expand_as(d).float()
            loss = 0.6 * (w * d**2).sum() / w.sum() + 0.4 * (w * d.abs()).sum() / w.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        expected.append(sum(losses) / len(losses))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = reseg.fit_recon(data, epochs=2, progress=False)
    oracle.near(torch.tensor(history), torch.tensor(expected), "the history of stage 1")
    mine = [p for m in teacher_parts(reseg.teacher, Net) for p in m.parameters()]
    theirs = [p for m in (before, body, after) for p in m.parameters()]
    oracle.near(mine, theirs, "the teacher")


def _leaves_no_trace() -> None:
    model, reseg = aligned(net(norm="batch"), ready=False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fit(DataLoader(TensorDataset(*batch(6)), 2, shuffle=True), reseg)
    oracle.same(dict(model.state_dict()), dict(state), "the model")
    oracle.same(torch.get_rng_state(), random, "the random state")
    if not model.training or reseg.teacher.training or any(p.grad is not None for p in model.parameters()):
        raise WrongError("modes or gradients are others")
    check_alignment(model, reseg)


def _nan_by_the_last_update() -> Any:
    """The loss is finite at every step, the weights are not after the last one."""

    class Last(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            super().step(closure)
            if self.calls == 6:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].fill_(NAN)

    with tempfile.TemporaryDirectory() as folder:
        return fit(optimizer=lambda p: Last(p, 1e-3), checkpoint=Path(folder) / "stage1.pt").ready


def _in_inference(reseg: ReSegWrapper) -> Any:
    return inference(lambda: fit(reseg=reseg))


class _Reentrant(Net):
    """Its encoder runs without gradients in the forward, and again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for e in self.e:
            x = checkpoint(e, x.requires_grad_() if x.is_leaf else x, use_reentrant=True)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.b(x)
        for d, skip in zip(reversed(self.d), reversed(skips)):
            x = d(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


def _reentrant() -> Any:
    """Refused at the first step: stage 1 is long."""
    loader = Counted()
    try:
        fit(loader, ReSegWrapper(net(kind=_Reentrant), example_input=batch()[0]))
    except ReSegError:
        if loader.seen > 2:
            raise WrongError(f"known only after {loader.seen} steps") from None
        raise


class Counted:
    """A loader that knows how many batches were taken of it."""

    def __init__(self) -> None:
        self.seen = 0

    def __iter__(self) -> Iterator[Any]:
        for each in pairs():
            self.seen += 1
            yield each


# --- its file


def _files() -> Iterator[Attempt]:
    contents: dict[str, Callable[[Path], Any]] = {
        "a folder": lambda p: p.mkdir(), "empty": lambda p: p.write_bytes(b""),
        "text": lambda p: p.write_text("hello"), "half": _half, "a bit flipped": _flipped,
        "a tensor": lambda p: torch.save(torch.ones(3), p), "a list": lambda p: torch.save([1], p),
        "a model's state": lambda p: torch.save(net().state_dict(), p),
        "a wrapper's state": lambda p: torch.save(aligned()[1].state_dict(), p),
        "a pickled object": lambda p: torch.save(net(), p),
        "another network's": lambda p: fit(reseg=aligned(net(channels=1, classes=5), ready=False)[1], checkpoint=p),
        "other settings'": lambda p: fit(reseg=aligned(ready=False, alpha=0.5)[1], checkpoint=p),
        "a file with a schedule": lambda p: fit(checkpoint=p, scheduler=_steplr),
        "without its history": lambda p: _without(p, "history"), "without its step": lambda p: _without(p, "step"),
        "without its optimizer": lambda p: _without(p, "optimizer"),
        "without its wrapper": lambda p: _without(p, "wrapper"),
        "without its random states": lambda p: _without(p, "rng"),
        "without its scaler": lambda p: _without(p, "scaler"), "NaN in its teacher": _nan_in_the_file,
    }  # fmt: skip
    for title, make in contents.items():
        yield Attempt(TARGET, f"checkpoint: {title}", lambda m=make: _with_file(m))
    yield Attempt(TARGET, "checkpoint: another class of optimizer", lambda: _resumed({}, {"optimizer": _sgd}))
    yield Attempt(TARGET, "checkpoint: another learning rate", _another_rate, lambda r: r is None)
    yield Attempt(
        TARGET, "checkpoint: another schedule", lambda: _resumed({"scheduler": _steplr}, {"scheduler": _cosine})
    )
    yield Attempt(TARGET, "checkpoint: another amp", lambda: _resumed({}, {"amp": torch.float16, "epochs": 3}), true)
    yield Attempt(TARGET, "checkpoint: finished", lambda: _resumed({}, {}, 0), refusal="finished")
    yield Attempt(TARGET, "checkpoint: goes on to the bit", _goes_on, true, NEVER)
    for title, optimizer, scheduler in (
        ("a NumPy learning rate", lambda p: torch.optim.Adam(p, lr=np.logspace(-4, -2, 3)[1]), None),
        ("a NumPy float32", lambda p: torch.optim.Adam(p, lr=np.float32(1e-3)), None),
        ("a NumPy schedule", None, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: np.cos(t / 9))),
    ):
        yield Attempt(
            TARGET,
            f"checkpoint: {title}",
            lambda o=optimizer, s=scheduler: _reads_back(net(), optimizer=o, scheduler=s),
            true,
        )
    yield Attempt(TARGET, "checkpoint: a model with extra state", lambda: _reads_back(_Extra()), true)
    for title, prepare in _UNWRITABLE.items():
        yield Attempt(TARGET, f"checkpoint: {title}", lambda p=prepare: _unwritable(p))
    yield Attempt(TARGET, "checkpoint: a write that is killed", _killed_write, true, NEVER)


def _sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9)


def _steplr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def _cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def _half(path: Path) -> None:
    fit(checkpoint=path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    fit(checkpoint=path)
    data = bytearray(path.read_bytes())
    for at in range(100, 400):
        data[at] ^= 255
    path.write_bytes(data)


def _without(path: Path, name: str) -> None:
    fit(checkpoint=path)
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != name}, path)


def _nan_in_the_file(path: Path) -> None:
    fit(checkpoint=path)
    state = torch.load(path, weights_only=True)
    for value in state["wrapper"]["parts"]["teacher"].values():
        value.fill_(NAN)
    torch.save(state, path)


def _with_file(make: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        make(path)
        before = path.read_bytes() if path.is_file() else b""
        try:
            return fit(checkpoint=path, epochs=3)
        except ReSegError:
            if path.is_file() and path.read_bytes() != before:
                raise WrongError("a file that was refused was overwritten") from None
            raise


def _resumed(first: dict[str, Any], then: dict[str, Any], more: int = 1) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        fit(checkpoint=path, **first)
        return fit(**{"checkpoint": path, "epochs": 2 + more, **then})


def _another_rate() -> None:
    """A changed learning rate is used, or refused, or said."""

    def at(rate: float) -> Callable[[Any], Any]:
        def make(parameters: Any) -> Any:
            made.append(torch.optim.SGD(parameters, rate))
            return made[-1]

        return make

    made: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        fit(checkpoint=path, optimizer=at(0.01))
        fit(checkpoint=path, optimizer=at(0.001), epochs=3)
    if made[-1].param_groups[0]["lr"] != 0.001:
        raise WrongError(f"the learning rate 0.001 was asked for, {made[-1].param_groups[0]['lr']} was used")


def _goes_on() -> None:
    """Two epochs and two more in another wrapper end as four do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        torch.manual_seed(3)
        data = torch.utils.data.TensorDataset(*batch(6))
        loader = torch.utils.data.DataLoader(data, 2, shuffle=True)
        torch.manual_seed(4)
        whole = fit(loader, epochs=4)
        torch.manual_seed(4)
        fit(loader, epochs=2, checkpoint=path)
        torch.manual_seed(99)
        rest = fit(loader, epochs=4, checkpoint=path)
        oracle.same(dict(rest.teacher.state_dict()), dict(whole.teacher.state_dict()), "the resumed teacher")


class _Extra(Net):
    def get_extra_state(self) -> Any:
        return {"made": Path("somewhere")}

    def set_extra_state(self, state: Any) -> None:
        pass


def _reads_back(model: Any, **options: Any) -> Any:
    """What was written is read; or it is refused before a second epoch is trained."""
    loader = Counted()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        options = {name: value for name, value in options.items() if value is not None}
        try:
            fit(loader, ReSegWrapper(model, example_input=batch()[0]), checkpoint=path, epochs=3, **options)
        except ReSegError:
            if loader.seen > len(pairs()):
                raise WrongError("refused only after the first epoch") from None
            raise
        try:
            fit(pairs(), ReSegWrapper(copy.deepcopy(model)), checkpoint=path, epochs=4, **options)
        except ReSegError as error:
            raise WrongError(f"a file that was written cannot be read: {error}") from error


_UNWRITABLE: dict[str, Callable[[Path], Path | str]] = {
    "in a file": lambda folder: _touched(folder / "file") / "stage1.pt",
    "a folder of that name": lambda folder: _made(folder / "stage1.pt"),
    "no folder may be made": lambda folder: Path("/proc/nothing/stage1.pt"),
    "a name that is too long": lambda folder: folder / ("a" * 300),
    "a zero in the name": lambda folder: str(folder / "a\0b"),
    "an empty name": lambda folder: "",
    "a device": lambda folder: "/dev/full",
}


def _touched(path: Path) -> Path:
    path.touch()
    return path


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _unwritable(prepare: Callable[[Path], Path | str]) -> Any:
    loader = Counted()
    with tempfile.TemporaryDirectory() as folder:
        path = prepare(Path(folder))
        try:
            return fit(loader, checkpoint=path)
        except ReSegError:
            if loader.seen > 1:
                raise WrongError(f"known only after {loader.seen} steps") from None
            raise


class _Killed(BaseException):
    pass


def _killed_write() -> None:
    """The process dies while the second file is written: the first one is there, whole."""
    real, calls = os.fsync, 0

    def dying(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            os.ftruncate(descriptor, 100)
            raise _Killed
        real(descriptor)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stage1.pt"
        fit(checkpoint=path, epochs=1)
        before = path.read_bytes()
        os.fsync = dying
        try:
            fit(checkpoint=path, epochs=5)
            raise WrongError("the file is not brought to the disk before it counts (no fsync)")
        except _Killed:
            pass
        finally:
            os.fsync = real
        after = path.read_bytes()
        if after != before:
            try:
                done = len(torch.load(path, weights_only=True)["history"])
            except Exception as error:
                raise WrongError("a killed write leaves a damaged file") from error
            if done not in (1, 2):
                raise WrongError("another file")


# --- states


def states() -> Iterator[Attempt]:
    makers: dict[str, tuple[Callable[[], tuple[Any, Any]], Callable[[Any, Any], Any]]] = {
        "ReSegWrapper": (aligned, check_alignment),
        "DeepSupervision": (supervised, check_supervision),
        "CutMixConsistency": (mixing, check_mixing),
        "SemiSupervised": (semi_supervised, check_semi),
    }
    for name, (make, check) in makers.items():
        for title, run in _state_attempts(name, make, check, makers).items():
            yield Attempt(f"{name}.load_state_dict", title, *run)
        for title, prepare in _SITUATIONS.items():
            yield Attempt(f"{name}.state_dict", title, lambda m=make, p=prepare, c=check: _round_trip(m, p, c), true)
    yield Attempt("ReSegWrapper.load_state_dict", "of an unfinished stage 1 over a finished", _unfinished)
    yield Attempt("DeepSupervision.load_state_dict", "of other classes", lambda: _other_classes())


_SITUATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "fresh": lambda m, h: None, "after a forward": lambda m, h: m(batch()[0]),
    "after a failed forward": lambda m, h: _forward_fails(m),
    "after remove": lambda m, h: getattr(h, "remove", lambda: None)(),
    "at weight 0": lambda m, h: setattr(h, "weight", 0.0), "in evaluation": lambda m, h: m.eval(),
    "in inference mode": lambda m, h: inference(h.state_dict), "twice": lambda m, h: (h.state_dict(), h.state_dict()),
    "after load": lambda m, h: h.load_state_dict(h.state_dict()),
    "after a forward in evaluation": lambda m, h: (m.eval(), m(batch()[0]), m.train()),
}  # fmt: skip


def _forward_fails(model: Any) -> None:
    with suppress(RuntimeError, ReSegError):
        model(torch.zeros(1))


def _round_trip(make: Callable[[], tuple[Any, Any]], prepare: Any, check: Any) -> None:
    """Through a file with weights_only into a new one, which then steps as it must."""
    model, holder = make()
    check(model, holder)
    with torch.no_grad():  # else they are as they are made
        for tensor in _of_tensors(holder.state_dict()).values():
            tensor.add_(0.01)
    prepare(model, holder)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(holder.state_dict(), Path(folder) / "state.pt")
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    model2, other = make()
    model2.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    oracle.same(_tensors(other.state_dict()), _tensors(state), "what was loaded")
    if other.calls != holder.calls or holder.calls != 1:
        raise WrongError(f"{other.calls} calls, {holder.calls} were saved")
    other.weight = 1.0
    check(model2, other, **({"average": other.average} if hasattr(other, "average") else {}))


def _state_attempts(name: str, make: Any, check: Any, makers: Any) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}

    def refused(change: Callable[[dict[str, Any]], Any]) -> tuple[Any, ...]:
        made: dict[str, Any] = {}

        def run() -> Any:
            made["both"] = _, holder = make()
            state = copy.deepcopy(make()[1].state_dict())
            changed = change(state)
            made["before"] = _tensors(holder.state_dict())
            return holder.load_state_dict(state if changed is None else changed)

        def after() -> Any:
            model, holder = made["both"]
            oracle.same(_tensors(holder.state_dict()), made["before"], "what a refused state left")
            return check(model, holder) is not None

        return run, None, ANYTHING, (), after

    for other, (maker, _) in makers.items():
        if other != name:
            found[f"the state of a {other}"] = refused(lambda s, m=maker: m()[1].state_dict())
    found["the model's state"] = refused(lambda s: net().state_dict())
    found["an optimizer's state"] = refused(lambda s: torch.optim.SGD(net().parameters(), 1.0).state_dict())
    for title, value in (("None", None), ("a list", [1]), ("a string", "state.pt"), ("a number", 3), ("empty", {})):
        found[title] = _junk_state(make, value)
    found["another format"] = refused(lambda s: {**s, "format": 99})
    for key in make()[1].state_dict():
        if key != "parts" and not (name == "ReSegWrapper" and key == "ready"):
            found[f"without {key}"] = refused(lambda s, k=key: {n: v for n, v in s.items() if n != k})
            found[f"{key} of another type"] = refused(lambda s, k=key: {**s, k: object()})
    if name != "DeepSupervision":  # whose heads fit as well
        found["another network's"] = refused(lambda s: make(net(norm="batch"))[1].state_dict())
    found["a tensor of another shape"] = refused(_reshaped)
    found["a tensor missing"] = refused(_less)
    if name == "ReSegWrapper":  # the others' weights are of the user's own training
        found["a NaN tensor"] = refused(_nan_in)
    return found


def _junk_state(make: Any, value: Any) -> tuple[Any, ...]:
    return ((lambda: make()[1].load_state_dict(value)),)


def _of_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The mapping of tensors within a state."""
    for value in state.values():
        if isinstance(value, dict):
            if value and all(isinstance(v, Tensor) for v in value.values()):
                return value
            inner = _of_tensors(value)
            if inner:
                return inner
    return {}


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [t.clone() for t in _of_tensors(state).values()]


def _reshaped(state: dict[str, Any]) -> None:
    tensors = _of_tensors(state)
    tensors[next(iter(tensors))] = torch.zeros(7, 7)


def _less(state: dict[str, Any]) -> None:
    tensors = _of_tensors(state)
    del tensors[next(iter(tensors))]


def _nan_in(state: dict[str, Any]) -> None:
    next(iter(_of_tensors(state).values())).fill_(NAN)


def _unfinished() -> Any:
    return aligned()[1].load_state_dict(aligned(ready=False)[1].state_dict())


def _other_classes() -> Any:
    other = DeepSupervision(net(classes=5), num_classes=5, example_input=batch()[0])
    return supervised()[1].load_state_dict(other.state_dict())


SECTIONS: list[Callable[[], Iterator[Attempt]]] = [stage_1, states]
