"""Captured forwards of the teacher: when a graph is recorded, replayed or dropped. Graphs themselves need a GPU."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import UNet, batch, ready
from torch import Tensor

from reseg_loss import Features, ReSegError, ReSegWrapper
from reseg_loss.alignment import capture, terms
from reseg_loss.alignment.settings import Settings

FP32, BF16 = (False, torch.float32), (True, torch.bfloat16)


def flat(features: Features) -> list[Tensor]:
    return [*features.encoder, *features.decoder, features.bottleneck]


class Graphs:
    """In the place of CUDA graphs: every replay writes to the same memory, and autograd does not see it."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.error: Exception | None = None
        self.replays: list[weakref.ref[Any]] = []

    def __call__(self, forward: Callable[[Tensor], Features], encoded: Tensor) -> Callable[[Tensor], Features]:
        if self.error is not None:
            raise self.error
        self.recorded += 1
        features = forward(encoded.clone())

        def replay(encoded: Tensor) -> Features:
            self.replayed += 1
            for old, new in zip(flat(features), flat(forward(encoded))):
                old.data.copy_(new)
            return features

        self.replays.append(weakref.ref(replay))
        return replay

    def alive(self) -> int:
        return sum(replay() is not None for replay in self.replays)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    graphs = Graphs()
    monkeypatch.setattr(capture, "capture_forward", graphs)
    monkeypatch.setattr(capture, "serves", lambda device: True)
    return graphs


def forward(x: Tensor) -> Features:
    return Features((2 * x,), (x + 1,), x.square())


def step(model: UNet, reseg: ReSegWrapper, n: int = 2, seed: int = 0) -> list[Tensor]:
    """The loss, and its gradients."""
    image, label = batch(n, seed=seed)
    model.zero_grad()
    model(image)
    loss = reseg.alignment_loss(label)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# --- the graphs of one teacher


def test_a_kind_of_input_is_recorded_once_and_what_the_forward_is_made_of_counts(graphs):
    captured = capture.Captured()
    x = torch.arange(4.0).view(1, 1, 2, 2)
    for made_of, autocast, value, recorded in [
        ("a", FP32, x, 1),
        ("a", FP32, -x, 1),
        ("a", BF16, x, 2),
        ("a", FP32, x.double(), 3),
        ("a", FP32, x.expand(2, -1, -1, -1), 4),
        ("a", BF16, 3 * x, 4),
        ("b", FP32, x, 5),
        ("a", FP32, x, 6),  # what was recorded of an earlier one is gone
    ]:
        found = captured(forward, value, made_of, autocast)
        assert graphs.recorded == recorded
        assert same(flat(found), flat(forward(value)))
    assert graphs.replayed == 8


def test_other_kinds_of_input_than_the_first_few_run_as_they_are_and_that_is_said_once(graphs, caplog):
    captured = capture.Captured()
    inputs = [torch.full((1, 1, 2, n), float(n)) for n in range(1, capture.LIMIT + 3)]
    with caplog.at_level(logging.INFO, "reseg_loss"):
        for _ in range(2):
            for x in inputs:
                assert same(flat(captured(forward, x, None, FP32)), flat(forward(x)))
    assert graphs.recorded == capture.LIMIT
    assert graphs.replayed == 2 * capture.LIMIT
    assert len(caplog.records) == 1


def test_a_forward_that_cannot_be_captured_runs_as_it_is_with_one_warning(graphs, caplog):
    captured = capture.Captured()
    x = torch.ones(1, 1, 2, 2)
    captured(forward, x, None, FP32)
    graphs.error = RuntimeError("operation not permitted when stream is capturing")
    for value in (x.expand(2, -1, -1, -1), x, x.expand(2, -1, -1, -1)):
        assert same(flat(captured(forward, value, None, FP32)), flat(forward(value)))
    assert graphs.replayed == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "not permitted" in caplog.text


def test_running_out_of_memory_is_no_reason_to_run_as_it_is(graphs):
    captured = capture.Captured()
    hidden = RuntimeError("operation failed due to a previous error during capture")
    hidden.__context__ = torch.OutOfMemoryError("out of memory")
    for error in (torch.OutOfMemoryError("out of memory"), hidden):
        graphs.error = error
        with pytest.raises(type(error), match=str(error)):
            captured(forward, torch.ones(1, 1, 2, 2), None, FP32)
    graphs.error = None
    captured(forward, torch.ones(1, 1, 2, 2), None, FP32)
    assert graphs.replayed == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_no_graphs(graphs, copied):
    captured = capture.Captured()
    x = torch.ones(1, 1, 2, 2)
    captured(forward, x, None, FP32)
    copied(captured)(forward, x, None, FP32)
    assert graphs.recorded == 2


# --- in the wrapper


def test_on_cpu_it_changes_nothing():
    expected, found = (step(*ready(capture_teacher=on)) for on in (False, True))
    assert same(found, expected)


@pytest.mark.parametrize("kwargs", [{}, {"preset": "standardized"}, {"ignore_index": 2},
                                    {"every": 2}, {"label_input": "onehot"}])  # fmt: skip
def test_replays_give_the_loss_and_gradients_of_the_forward(graphs, kwargs):
    steps = []
    for on in (False, True):
        model, reseg = ready(capture_teacher=on, **kwargs)
        steps.append([step(model, reseg, n, seed) for seed, n in enumerate((4, 4, 2, 4))])
    assert all(same(a, b) for a, b in zip(*steps))
    assert graphs.recorded == 2


def test_other_weights_are_followed_and_a_moved_teacher_is_recorded_anew(graphs):
    model, reseg = ready(capture_teacher=True)
    plain = ReSegWrapper(model, example_input=batch()[0], weight=1.0)
    plain.load_state_dict({**reseg.state_dict(), "settings": plain.state_dict()["settings"]})

    def agree() -> bool:
        image, label = batch()
        model(image)
        return torch.equal(reseg.alignment_loss(label), plain.alignment_loss(label))

    assert agree()
    state = plain.state_dict()
    state["parts"]["teacher"] = {name: t * 2 if t.is_floating_point() else t for name, t in
                                 state["parts"]["teacher"].items()}  # fmt: skip
    for loaded in (reseg, plain):
        loaded.load_state_dict({**state, "settings": loaded.state_dict()["settings"]})
    assert agree()
    assert graphs.recorded == 1
    for moved in (reseg, plain):
        moved.teacher.double().float()
    assert agree()
    assert graphs.recorded == 2


def test_backward_after_the_next_loss_is_refused_and_before_it_accumulates(graphs):
    model, reseg = ready(capture_teacher=True)
    (image, label), (other, other_label) = batch(seed=0), batch(seed=1)
    step(model, reseg)
    model(image)
    first = reseg.alignment_loss(label)
    model(other)
    second = reseg.alignment_loss(other_label)
    second.backward()
    with pytest.raises(ReSegError, match="call backward before it") as caught:
        first.backward()
    assert "inplace operation" in str(caught.value.__cause__)
    a, b = (step(model, reseg, seed=seed)[1:] for seed in (0, 1))
    model.zero_grad()
    for x, y in ((image, label), (other, other_label)):
        model(x)
        reseg.alignment_loss(y).backward()
    assert same([p.grad for p in model.parameters() if p.grad is not None], [x + y for x, y in zip(a, b)])


def test_other_errors_of_backward_stay_as_they_are():
    s = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = terms.alignment_terms([(s, torch.randn(2, 3, 4, 4))])[0]
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_removing_frees_the_graphs_and_a_copy_of_the_wrapper_records_its_own(graphs):
    model, reseg = ready(capture_teacher=True)
    expected = step(model, reseg)
    other_model, other = copy.deepcopy((model, reseg))
    assert same(step(other_model, other), expected)
    assert graphs.recorded == 2
    assert graphs.alive() == 2
    reseg.remove()
    assert graphs.alive() == 1


def test_the_setting_is_part_of_the_state_and_may_be_changed_by_one(graphs):
    model, reseg = ready(capture_teacher=True)
    state, teacher = reseg.state_dict(), reseg.teacher
    assert state["settings"]["capture_teacher"] is True
    assert Settings(**state["settings"]).capture_teacher
    state["settings"]["capture_teacher"] = False
    reseg.load_state_dict(state)
    assert reseg.settings.capture_teacher is False
    assert reseg.teacher is teacher
    step(model, reseg)
    assert graphs.recorded == 0
    with pytest.raises(ReSegError, match="capture_teacher"):
        ReSegWrapper(model, capture_teacher="yes")
