"""The file of stage 1: it can be read back, is known to be writable, and what differs on resuming is said."""

from __future__ import annotations

import collections
import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import UNet, batch, loader
from torch import nn
from torch.optim import lr_scheduler

from reseg_loss import ReSegError, ReSegWrapper
from reseg_loss.common.files import write_atomically
from reseg_loss.common.state import plain_state, unreadable

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")


def fit(path: Any, model: nn.Module | None = None, *, data: Any = None, **kwargs: Any) -> ReSegWrapper:
    torch.manual_seed(1)
    reseg = ReSegWrapper(model or UNet(), example_input=batch()[0])
    reseg.fit_recon(loader() if data is None else data, checkpoint=path, progress=False, **{"epochs": 1, **kwargs})
    return reseg


def sgd(lr: Any = 0.1, **kwargs: Any) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr, **kwargs)


def rates(step_rates: list[float], make: Any) -> Any:
    """A function that makes a schedule, and notes the rate of every step."""

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        optimizer.register_step_pre_hook(lambda *_: step_rates.append(optimizer.param_groups[0]["lr"]))
        return make(optimizer)

    return schedule


class Extra(UNet):
    """A model with a state of its own."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


# --- what is written can be read back


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": sgd(np.logspace(-3, -1, 3)[1])},
        {
            "optimizer": lambda p: torch.optim.Adam(
                p, np.array(1e-3), betas=(np.float64(0.5), 0.9), eps=np.float32(1e-8)
            )
        },
        {"scheduler": lambda o: lr_scheduler.LambdaLR(o, lambda step: np.cos(step / 100))},
        {"scheduler": lambda o: lr_scheduler.MultiStepLR(o, np.array([2, 5]).tolist(), gamma=np.float64(0.5))},
    ],
)
def test_numbers_of_numpy_in_optimizer_and_schedule_are_written_as_plain_ones(tmp_path, options):
    path = tmp_path / "stage1.pt"
    fit(path, **options)
    assert unreadable(torch.load(path, weights_only=True)) is None
    fit(path, epochs=2, **options)
    assert len(torch.load(path, weights_only=True)["history"]) == 2


def test_an_extra_state_of_the_model_is_made_plain_or_refused_before_the_first_step(tmp_path):
    path = tmp_path / "stage1.pt"
    extra = {"count": np.int64(3), "means": np.arange(3.0), "names": np.array(["a", "b"])}
    fit(path, Extra(extra))
    resumed = fit(path, Extra(extra), epochs=2)
    state = resumed.teacher.body.extra
    assert (state["count"], state["means"].tolist(), state["names"]) == (3, [0, 1, 2], ["a", "b"])
    state = resumed.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    ReSegWrapper(Extra(extra)).load_state_dict(torch.load(file, weights_only=True))

    seen: list[int] = []
    other = tmp_path / "other.pt"
    optimizer = lambda p: torch.optim.Adam(p, foreach=False)  # noqa: E731

    def counted(parameters: Any) -> Any:
        made = optimizer(parameters)
        made.register_step_post_hook(lambda *_: seen.append(1))
        return made

    with pytest.raises(
        ReSegError,
        match=r"parts\.teacher\.body\._extra_state\.extra is a collections\.deque, which torch\.load",
    ):
        fit(other, Extra(collections.deque([1])), optimizer=counted)
    assert seen == []
    assert list(tmp_path.iterdir()) == [path]


def test_what_appears_while_training_is_refused_at_the_first_write(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[self.param_groups[0]["params"][0]]["seen"] = collections.deque([1])
            return super().step(closure)

    with pytest.raises(ReSegError, match=r"optimizer\.state\.0\.seen is a collections\.deque"):
        fit(tmp_path / "stage1.pt", optimizer=lambda p: Odd(p, 0.1))
    assert list(tmp_path.iterdir()) == []


def test_the_first_file_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("reseg_loss.alignment.stage1_file.unreadable", lambda value: None)
    with pytest.raises(ReSegError, match="cannot be read back"):
        fit(tmp_path / "stage1.pt", Extra(collections.deque([1])))
    assert list(tmp_path.iterdir()) == []


def test_values_are_made_plain_exactly():
    value = {
        np.int64(1): np.float32(0.5),
        "flag": np.bool_(True),
        "nested": [(np.float64(2), {"x": np.array(3)})],
        "words": np.array(["a"], dtype=object),
        "text": np.str_("b"),
        "long": np.longdouble(0.25),
        "swapped": np.arange(3, dtype=">i4"),
        "kept": torch.ones(2),
    }
    plain = plain_state(value)
    kept = plain.pop("kept")
    assert kept is value["kept"]
    assert plain == {
        1: 0.5,
        "flag": True,
        "nested": [(2.0, {"x": 3})],
        "words": ["a"],
        "text": "b",
        "long": 0.25,
        "swapped": [0, 1, 2],
    }
    assert type(plain["flag"]) is bool
    assert type(plain["long"]) is float
    array = np.arange(6.0)[::-2]
    tensor = plain_state(array)
    assert tensor.tolist() == array.tolist()
    assert tensor.dtype is torch.float64
    array[:] = 0
    assert tensor.tolist() == [5, 3, 1]
    assert unreadable({"a": [1, {"b": range(2)}]}) == "a.1.b is a builtins.range"
    assert unreadable({"a": {range(2): 1}}) == "the key range(0, 2) of a is a builtins.range"
    assert unreadable({"a": collections.Counter([1]), "b": {1, 2}, "c": nn.Parameter(torch.ones(1))}) is None


# --- hyperparameters on resuming


def written_group(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["optimizer"]["param_groups"][0]


def test_a_changed_hyperparameter_wins_and_is_told_of(tmp_path, caplog):
    path = tmp_path / "stage1.pt"
    fit(path, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    fit(path, epochs=2, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    assert not caplog.records
    fit(path, epochs=3, optimizer=lambda p: torch.optim.Adam(p, 1e-3, betas=(0.8, 0.99)), amp=torch.bfloat16)
    for words in (
        "lr 0.01 there, 0.001 here",
        "betas [0.9, 0.999] there, [0.8, 0.99]",
        "amp None there, bfloat16",
    ):
        assert words in caplog.text
    assert (written_group(path)["lr"], written_group(path)["betas"]) == (1e-3, (0.8, 0.99))
    state = torch.load(path, weights_only=True)["optimizer"]["state"][0]
    assert state["step"] == 12, "the moments go on"


def test_what_an_optimizer_changes_itself_goes_on(tmp_path, caplog):
    class Counting(torch.optim.SGD):
        """As those without a schedule: they keep what they have learnt in the groups."""

        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] *= 0.5
            return super().step(closure)

    path = tmp_path / "stage1.pt"
    for epochs in (1, 2):
        fit(path, epochs=epochs, optimizer=lambda p: Counting(p, 1.0))
    assert written_group(path)["lr"] == 0.5**8
    assert not caplog.records


def test_a_lost_stage_1_goes_on_from_its_file_with_a_lower_rate(tmp_path):
    path = tmp_path / "stage1.pt"
    fit(path, optimizer=sgd(0.01))
    with pytest.raises(ReSegError, match="lower the learning rate"):
        fit(path, epochs=2, optimizer=sgd(1e30))
    reseg = fit(path, epochs=2, optimizer=sgd(1e-3))
    assert reseg.ready


SCHEDULES: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR's own
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on_and_follows_a_changed_rate(tmp_path, caplog, name):
    make = SCHEDULES[name]
    whole: dict[float, list[float]] = {}
    for lr in (0.1, 0.05):
        fit(None, epochs=3, optimizer=sgd(lr, momentum=0.9), scheduler=rates(whole.setdefault(lr, []), make))
    path, seen = tmp_path / "stage1.pt", []
    fit(path, epochs=1, optimizer=sgd(0.1, momentum=0.9), scheduler=rates(seen, make))
    fit(path, epochs=2, optimizer=sgd(0.1, momentum=0.9), scheduler=rates(seen, make))
    assert not caplog.records
    fit(path, epochs=3, optimizer=sgd(0.05, momentum=0.9), scheduler=rates(seen, make))
    assert "lr 0.1 there, 0.05 here" in caplog.text
    assert seen == pytest.approx([*whole[0.1][:8], *whole[0.05][8:]], rel=1e-6)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (lambda o: lr_scheduler.StepLR(o, 3, gamma=0.1), "schedule: gamma 0.5 there, 0.1 here"),
        (lambda o: lr_scheduler.ExponentialLR(o, 0.9), "ExponentialLR here"),
    ],
)
def test_another_schedule_wins_and_is_told_of(tmp_path, caplog, then, words):
    path, seen, expected = tmp_path / "stage1.pt", [], []
    fit(None, epochs=2, optimizer=sgd(), scheduler=rates(expected, then))
    fit(path, optimizer=sgd(), scheduler=SCHEDULES["step"])
    fit(path, epochs=2, optimizer=sgd(), scheduler=rates(seen, then))
    assert words in caplog.text
    assert seen == pytest.approx(expected[4:])


def test_another_function_of_a_schedule_is_noticed_by_its_rates(tmp_path, caplog):
    path = tmp_path / "stage1.pt"
    fit(path, optimizer=sgd(), scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step))
    fit(path, epochs=2, optimizer=sgd(), scheduler=lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step))
    assert "learning rate at step 4 0.00625 there, 0.06561 here" in caplog.text
    assert written_group(path)["lr"] == pytest.approx(0.1 * 0.9**8)


def test_what_cannot_go_on_is_refused(tmp_path):
    path = tmp_path / "stage1.pt"
    fit(path, optimizer=sgd())
    with pytest.raises(ReSegError, match=r"the optimizer torch.optim.adam.Adam, .* written with torch.optim.sgd.SGD"):
        fit(path, epochs=2)
    with pytest.raises(ReSegError, match=r"groups have \[1, 1\] parameters, but in its file they have \[\d+\]"):
        fit(path, epochs=2, optimizer=lambda p: torch.optim.SGD([{"params": [next(p)]}, {"params": [next(p)]}], 0.1))


@pytest.mark.parametrize("built", [False, True])
def test_other_taps_than_the_files_are_refused_and_the_same_are_not(tmp_path, built):
    path = tmp_path / "stage1.pt"
    example = batch()[0] if built else None
    other = {**UNet.taps, "bottleneck": "bottleneck.0"}
    for epochs in (1, 2):
        ReSegWrapper(UNet(), example, taps=UNet.taps).fit_recon(
            loader(), epochs=epochs, checkpoint=path, progress=False
        )
    for taps in (other, None):
        with pytest.raises(ReSegError, match="other taps than here"):
            ReSegWrapper(UNet(), example, taps=taps).fit_recon(loader(), epochs=3, checkpoint=path, progress=False)


def test_loss_scaling_can_be_switched_on_and_off_on_resuming(tmp_path, caplog):
    path = tmp_path / "stage1.pt"
    for epochs, amp in enumerate((None, torch.float16, None), 1):
        fit(path, epochs=epochs, amp=amp)
    assert "amp None there, float16 here" in caplog.text
    assert "amp float16 there, None here" in caplog.text


def test_schedules_that_want_a_metric_or_are_none_are_refused():
    for make, words in (
        (lambda o: lr_scheduler.ReduceLROnPlateau(o), r"ReduceLROnPlateau\.step\(\) needs arguments"),
        (lambda o: None, r"returned NoneType, which has no step\(\)"),
    ):
        with pytest.raises(ReSegError, match=words):
            fit(None, scheduler=make)


# --- NaN weights


class Breaking:
    """A loader that breaks a tensor of the teacher at the end of a pass, behind the loss's back."""

    def __init__(self, reseg: ReSegWrapper, name: str, value: float) -> None:
        self.reseg, self.name, self.value, self.inner = reseg, name, value, loader()

    def __iter__(self) -> Any:
        yield from self.inner
        with torch.no_grad():
            self.reseg.teacher.state_dict()[self.name].fill_(self.value)


@pytest.mark.parametrize("name", ["body.encoder.0.0.weight", "body.encoder.0.1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_and_statistics_that_are_not_finite_are_neither_saved_nor_frozen(tmp_path, name, value):
    for path in (tmp_path / "stage1.pt", None):
        reseg = ReSegWrapper(UNet(), example_input=batch()[0])
        with pytest.raises(ReSegError, match=rf"{name} of the teacher: NaN or infinite values"):
            reseg.fit_recon(Breaking(reseg, name, value), epochs=1, checkpoint=path, progress=False)
        assert not reseg.ready
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ReSegError, match="neither saved nor frozen"):
        reseg.freeze_teacher()


def test_a_last_update_that_loses_the_teacher_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "stage1.pt"
    fit(path, optimizer=sgd(0.01))
    before = path.read_bytes()
    with pytest.raises(ReSegError, match="NaN or infinite values after 5 steps"):
        fit(path, data=[batch()], epochs=2, optimizer=sgd(1e30, weight_decay=1e30))
    assert path.read_bytes() == before


def test_masks_of_infinities_are_no_sign_of_a_lost_teacher(tmp_path):
    model = UNet()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
    fit(tmp_path / "stage1.pt", model)


# --- writing


def test_a_file_that_cannot_be_written_is_known_before_the_first_batch(tmp_path, monkeypatch):
    class Untouched:
        def __iter__(self) -> Any:
            raise AssertionError("a batch was asked for")

    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "stage1.pt", "cannot be written"),
        (tmp_path / ("n" * 250), "cannot be written"),
        (tmp_path / ("n" * 300), "cannot be written"),
        (io.BytesIO(), "must be the path of a file, got BytesIO"),
        ("/dev/null", "is a device"),
    ):
        with pytest.raises(ReSegError, match=words):
            fit(path, data=Untouched())

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ReSegError, match=r"cannot be written \(PermissionError: Permission denied\)"):
        fit(tmp_path / "stage1.pt", data=Untouched())


def test_a_finished_stage_1_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    path = tmp_path / "stage1.pt"
    fit(path)
    monkeypatch.setattr("reseg_loss.alignment.stage1_file.try_writing", lambda path: pytest.fail("it was tried"))
    assert fit(path).ready


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    """With a real limit on the size of files, which torch's writer meets in the middle."""
    script = """
        import resource, signal, sys
        import torch
        from reseg_loss import ReSegError
        from reseg_loss.alignment.stage1_file import write_atomically
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        write_atomically({"a": 1}, sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            write_atomically({"a": torch.zeros(100_000)}, sys.argv[1])
        except ReSegError as error:
            print(error)
    """
    path = tmp_path / "stage1.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} could not be written (OSError: File too large); the previous file is kept\n"
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_a_link_is_followed(tmp_path):
    real, link = tmp_path / "real.pt", tmp_path / "link.pt"
    link.symlink_to(real)
    write_atomically({"a": 1}, link)
    assert link.is_symlink()
    assert torch.load(real, weights_only=True) == {"a": 1}


def test_a_folder_that_cannot_be_listed_can_be_written(tmp_path, monkeypatch):
    def refused(path: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.scandir", refused)
    fit(tmp_path / "stage1.pt")


def test_what_killed_runs_left_goes_after_an_hour(tmp_path):
    path = tmp_path / "stage1.pt"
    names = ("stage1.pt.17-0123abcd.partial", "stage1.pt.18-0123abcd.partial", "stage1.pt.mine.partial")
    for name in names:
        (tmp_path / name).write_text("")
    for name in names[1:]:
        os.utime(tmp_path / name, (0, 0))
    write_atomically({"a": 1}, path)
    assert {p.name for p in tmp_path.iterdir()} == {"stage1.pt", names[0], names[2]}


def test_processes_with_one_name_never_corrupt_each_other(tmp_path):
    script = """
        import sys
        import torch
        from reseg_loss.alignment.stage1_file import write_atomically
        for i in range(40):
            write_atomically({"who": int(sys.argv[2]), "a": torch.full((50_000,), float(i))}, sys.argv[1])
    """
    path = tmp_path / "stage1.pt"
    write_atomically({"who": 2, "a": torch.zeros(50_000)}, path)
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    processes = [subprocess.Popen([*command, str(who)]) for who in range(2)]
    reads = 0
    try:
        while any(process.poll() is None for process in processes):
            state = torch.load(path, weights_only=True)
            assert state["a"].unique().numel() == 1
            reads += 1
        assert [process.returncode for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert reads > 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    script = """
        import os, signal, sys
        import torch
        from reseg_loss.common import files
        files.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        files.write_atomically({"a": torch.zeros(10)}, sys.argv[1])
    """
    path = tmp_path / "stage1.pt"
    write_atomically({"a": 1}, path)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)])
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"a": 1}
    assert len(list(tmp_path.glob("stage1.pt.*.partial"))) == 1


def test_a_file_of_another_version_is_told_from_others(tmp_path):
    path = tmp_path / "stage1.pt"
    fit(path)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": 0}, path)
    with pytest.raises(ReSegError, match="by another version of this library"):
        fit(path)
    torch.save({"a": np.float64(1)}, path)
    with pytest.raises(
        ReSegError,
        match=r"not a file of stage 1, and stage 1 would overwrite it: it holds more than plain values .*numpy",
    ):
        fit(path)


@pytest.mark.parametrize("missing", ["optimizer", "scaler", "rng", "constants"])
def test_a_file_that_lacks_an_entry_is_refused(missing, tmp_path):
    path = tmp_path / "stage1.pt"
    fit(path)
    torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != missing}, path)
    with pytest.raises(ReSegError, match=f"has no '{missing}'; it is incomplete"):
        fit(path, epochs=2)
