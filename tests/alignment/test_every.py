"""Aligning less: calls that are left out, and that a run with them resumes; the teacher's early end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import UNet, batch, ready, recording_of, saved, task_loss, tensors_in
from torch import Tensor, nn

from reseg_loss import FeatureExtractor, ReSegError, ReSegWrapper, Settings


def losses(model: nn.Module, reseg: ReSegWrapper, calls: int, n: int = 6, first: int = 0) -> list[float]:
    values = []
    for seed in range(first, first + calls):
        image, label = batch(n, seed=seed)
        model(image)
        values.append(reseg.alignment_loss(label).item())
    return values


# --- every


def test_every_kth_call_has_k_times_the_weight_and_the_others_are_zero_and_record_nothing():
    expected = losses(*ready(), 7)
    model, reseg = ready(every=3)
    for seed, value in enumerate(expected):
        image, label = batch(6, seed=seed)
        output = model(image)
        held = reseg.extractor.waiting
        loss = reseg.alignment_loss(label)
        assert held is (seed % 3 == 0)
        assert loss.item() == pytest.approx(3 * value if held else 0.0, rel=1e-6)
        (task_loss(output, label) + loss).backward()
    assert reseg.calls == 7


def test_components_of_a_call_that_is_left_out_are_none_and_of_others_unweighted():
    model, reseg = ready(every=2)
    image, label = batch()
    model(image)
    assert len(reseg.alignment_terms(label)) == 5
    model(image)
    terms = reseg.alignment_terms(label)
    assert terms == {}
    assert reseg.criterion.combine(terms) == 0


def test_at_weight_0_calls_are_not_counted_so_the_cycle_waits():
    model, reseg = ready(every=2)
    losses(model, reseg, 1)
    reseg.weight = 0
    losses(model, reseg, 3)
    reseg.weight = 1.0
    assert [value > 0 for value in losses(model, reseg, 3)] == [False, True, False]


@pytest.mark.parametrize("kwargs", [{"every": 3}, {"every": 2, "preset": "standardized"}])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(kwargs):
    expected = losses(*ready(**kwargs), 9)
    model, reseg = ready(**kwargs)
    before = losses(model, reseg, 4)
    state = saved(reseg)
    reseg.remove()
    fresh = ReSegWrapper(model)
    fresh.load_state_dict(state)
    assert [*before, *losses(model, fresh, 5, first=4)] == expected
    assert fresh.settings == reseg.settings


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.0}, "every=2.0"),
        ({"every": True}, "every=True"),
        ({"teacher_dtype": torch.float64}, "teacher_dtype=torch.float64"),
        ({"teacher_dtype": "half"}, "teacher_dtype='half'"),
        ({"compile_teacher": "yes"}, "compile_teacher='yes'"),
    ],
)
def test_bad_values_are_refused(kwargs, message):
    with pytest.raises(ReSegError, match=message):
        ReSegWrapper(UNet(), **kwargs)


def test_run_time_settings_may_differ_from_the_states_and_keep_what_is_built():
    _, reseg = ready(every=2, teacher_dtype=torch.bfloat16)
    state = saved(reseg)
    _, other = ready()
    teacher = other.teacher
    other.load_state_dict(state)
    assert other.teacher is teacher
    assert (other.settings.every, other.settings.lower) == (2, torch.bfloat16)


# --- the teacher


def test_the_teacher_ends_after_its_last_tap_with_the_features_of_a_whole_forward():
    model, reseg = ready()
    body, ran = reseg.teacher.body, []
    for name, module in body.named_modules():
        module.register_forward_hook(lambda m, a, output, name=name: ran.append(name))
    closed = []
    body.register_forward_hook(lambda m, a, output: closed.append(output), always_call=True)
    image, label = batch()
    model(image)
    loss = reseg.alignment_loss(label)
    assert "decoder.1.2" in ran
    assert not {"head", "decoder.2", "up.2", ""} & set(ran)
    assert closed == [None]  # other hooks that are always called still are
    ran.clear()
    with reseg.extractor.record():
        model(image)
    encoded = reseg.teacher.encoding.encode(label)[0]
    with torch.no_grad(), FeatureExtractor(body, taps=reseg.extractor.plan, when="always") as features:
        reseg.teacher.decode(encoded)
        whole = features.pop()
    assert "head" in ran
    expected = reseg.criterion(reseg.extractor.pop(), whole)
    assert torch.equal(loss, expected)
    assert reseg.reconstruct(label).shape == image.shape


def test_gradients_autocast_and_recording_are_as_before_after_the_early_end():
    model, reseg = ready()
    image, label = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(image)
        reseg.alignment_loss(label)
        assert torch.is_grad_enabled()
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    recording = recording_of(reseg.teacher.body)
    assert not tensors_in(recording)
    with torch.no_grad():
        assert reseg.teacher(label).shape == image.shape  # whole
    assert not tensors_in(recording)


class Swallowing(UNet):
    """A model that catches what its parts raise, and goes on."""

    def forward(self, x: Tensor) -> Any:
        try:
            return super().forward(x)
        except Exception:
            return self.head(torch.zeros(len(x), 4, *x.shape[2:]))


def test_a_model_that_catches_exceptions_gives_the_same_features():
    expected = losses(*ready(), 2)
    torch.manual_seed(0)
    model = Swallowing()
    torch.manual_seed(1)
    reseg = ReSegWrapper(model, example_input=batch()[0], weight=1.0)
    reseg.freeze_teacher()
    assert losses(model, reseg, 2) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_teacher_dtype_lowers_the_teacher_alone(dtype):
    model, reseg = ready(teacher_dtype=dtype)
    found: list[torch.dtype] = []
    reseg.teacher.body.bottleneck[0].register_forward_hook(lambda module, args, output: found.append(output.dtype))
    image, label = batch()
    assert model(image).dtype == torch.float32
    loss = reseg.alignment_loss(label)
    assert found == [torch.bfloat16]
    assert loss.dtype == torch.float32
    model(image)
    assert loss.item() == pytest.approx(losses(*ready(), 1, n=2)[0], rel=2e-2)
    assert {p.dtype for p in reseg.teacher.parameters()} == {torch.float32}


def test_a_teacher_with_channels_last_and_back_computes_the_same():
    _, reseg = ready()
    label = batch()[1]
    expected = reseg.reconstruct(label)
    parameters = list(reseg.teacher.parameters())
    weight = reseg.teacher.body.encoder[1][0].weight
    for last in (True, False):
        reseg.teacher.to_channels_last(last)
        assert weight.is_contiguous(memory_format=torch.channels_last) is last
        assert torch.allclose(reseg.reconstruct(label), expected, atol=1e-6)
    assert all(a is b for a, b in zip(parameters, reseg.teacher.parameters()))


def test_settings_are_plain_values_in_a_state():
    values = Settings(teacher_dtype=torch.float16).to_dict()
    assert values["teacher_dtype"] == "float16"
    assert Settings(**values).lower is torch.float16
