"""A teacher that runs on a part of the batch at a time gives the features of the whole, and holds the part's alone."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import UNet, batch, ready
from torch import Tensor, nn

from examples.backbones.swin_unet import SwinUNet
from reseg_loss import Features, ReSegError, ReSegWrapper, Settings, capture
from reseg_loss.split import in_parts

N = 5
MADE: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "2D": (UNet, {}),
    "3D": (lambda: UNet(dims=3, depth=2, in_channels=2), {"dims": 3, "channels": 2, "size": 8}),
    "tokens": (lambda: SwinUNet(3, image_size=64, width=12, heads=(1, 2, 3, 4), window=2), {"channels": 3, "size": 64}),
}


def made(name: str, **kwargs: Any) -> tuple[ReSegWrapper, Callable[[], tuple[Tensor, Features]]]:
    """A wrapper, and what takes a step of it: the loss with the model's gradients as a vector, and the features."""
    make, sizes = MADE[name]
    image, label = batch(N, **sizes)
    if "ignore_index" in kwargs:
        label[:, :3] = kwargs["ignore_index"]
    torch.manual_seed(0)
    model = make().eval()  # all but itself, so that no dropout draws anew at every step
    model.training = True
    torch.manual_seed(1)
    reseg = ReSegWrapper(model, example_input=image[:2], weight=1.0, **kwargs)
    reseg.freeze_teacher()

    def step() -> tuple[Tensor, Features]:
        reseg._calls = 0  # of which a subset is drawn
        targets, found = reseg._parts.targets, []
        reseg._parts.targets = lambda *args: found.append(targets(*args)) or found[0]
        model.zero_grad()
        model(image)
        loss = reseg.alignment_loss(label)
        loss.backward()
        reseg._parts.targets = targets
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat([loss.detach().view(1), *gradients]), found[0][0]

    return reseg, step


def flat(features: Features) -> list[Tensor]:
    return [*features.encoder, *features.decoder, features.bottleneck]


def batches_seen(module: nn.Module) -> list[int]:
    """Filled with the number of samples of every input from now on."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def agree(reseg: ReSegWrapper, step: Callable[[], tuple[Tensor, Features]], sizes: dict[int, list[int]]) -> None:
    """With parts of at most so many samples the step is that of the whole batch, and the teacher sees these sizes."""
    settings = reseg.settings
    expected, features = step()
    for most, parts in sizes.items():
        reseg.settings = settings.override({"teacher_batch": most})
        seen = batches_seen(reseg.teacher.body)
        found, mine = step()
        assert seen == parts
        torch.testing.assert_close(flat(mine), flat(features))
        assert [x.stride() for x in flat(mine)] == [x.stride() for x in flat(features)]
        torch.testing.assert_close(found, expected)
    reseg.settings = settings


ALL = {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 5: [5], 100: [5]}


@pytest.mark.parametrize("preset", ["paper", "standardized"])
@pytest.mark.parametrize("name", list(MADE))
def test_features_loss_and_gradients_are_those_of_the_whole_batch(name, preset):
    agree(*made(name, preset=preset), ALL)


@pytest.mark.parametrize("kwargs", [{"ignore_index": 255}, {"label_input": "onehot"}, {"projection": "linear"},
                                    {"teacher_dtype": torch.bfloat16}])  # fmt: skip
def test_they_are_so_with_other_settings(kwargs):
    agree(*made("2D", **kwargs), ALL)


def test_the_part_of_a_batch_that_is_aligned_is_divided_again():
    agree(*made("2D", subset=3), {1: [1, 1, 1], 2: [2, 1], 3: [3]})


@pytest.mark.parametrize("name", ["2D", "3D"])
def test_channels_that_are_last_stay_last(name):
    reseg, step = made(name)
    reseg.teacher.to_channels_last()
    agree(reseg, step, {2: [2, 2, 1], 3: [3, 2]})  # of one sample alone torch's 3D convolution puts channels first
    reseg.settings = reseg.settings.override({"teacher_batch": 2})
    last = torch.channels_last if name == "2D" else torch.channels_last_3d
    assert all(x.is_contiguous(memory_format=last) for x in flat(step()[1])[1:])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_folded_teacher_in_autocast_runs_in_parts(low):
    image, label = batch(N)
    losses = []
    for most in (None, 1, 2):
        model, reseg = ready(fold_teacher=True, teacher_batch=most)
        model.eval()
        model.training = True
        with torch.autocast("cpu", dtype=low):
            model(image)
            losses.append(reseg.alignment_loss(label))
            seen = batches_seen(reseg._parts.targets._folded[1])
            model(image)
            assert reseg.alignment_loss(label) == losses[-1]
            assert seen == ([N] if most is None else ALL[most])
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-2, atol=0)


def test_a_compiled_teacher_runs_in_parts(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda run: lambda x: seen.append(len(x)) or run(x))
    reseg, step = made("2D", compile_teacher=True)
    agree(reseg, step, {2: [2, 2, 1]})
    assert seen == [5, 2, 2, 1]


def test_a_captured_teachers_graph_has_all_parts_and_another_size_is_recorded_anew(monkeypatch):
    made_of: list[list[int]] = []  # of every graph the sizes of its parts

    def recorded(forward: Callable[[Tensor], Features], encoded: Tensor) -> Callable[[Tensor], Features]:
        before = len(seen)
        features = forward(encoded)
        made_of.append(seen[before:])
        return lambda encoded: features

    monkeypatch.setattr(capture, "recorded", recorded)
    monkeypatch.setattr(capture, "serves", lambda device: True)
    reseg, step = made("2D")
    expected, _ = step()
    seen = batches_seen(reseg.teacher.body)
    for most in (2, 2, 3, None):
        reseg.settings = reseg.settings.override({"capture_teacher": True, "teacher_batch": most})
        torch.testing.assert_close(step()[0], expected)
    assert made_of == [[2, 2, 1], [3, 2], [5]]


def test_nothing_of_a_part_is_held_while_the_next_runs():
    reseg, step = made("2D", teacher_batch=2)
    alive: list[list[bool]] = []
    held: list[weakref.ref[Tensor]] = []
    body = reseg.teacher.body
    body.register_forward_pre_hook(lambda module, args: alive.append([x() is not None for x in held]))
    for module in body.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, output: held.append(weakref.ref(output)))
    step()
    assert [len(x) for x in alive] == [0, len(held) // 3, 2 * len(held) // 3]
    assert not any(x for part in alive for x in part)


def test_sizes_differ_by_one_at_most_and_features_take_no_more_memory_than_they_fill():
    sizes: list[int] = []

    def forward(x: Tensor) -> Features:
        sizes.append(len(x))
        return Features((2 * x,), (x.expand(-1, 3, -1, -1),), x[:, :, ::2])

    for n, most, expected in ((24, 10, [8, 8, 8]), (7, 5, [4, 3]), (9, 4, [3, 3, 3]), (4, 4, [4]), (0, 2, [0])):
        x = torch.randn(n, 1, 4, 4)
        sizes.clear()
        found = in_parts(forward, x, most)
        assert sizes == expected
        assert all(torch.equal(a, b) for a, b in zip(flat(found), flat(forward(x))))
        if len(expected) > 1:
            assert all(f.untyped_storage().nbytes() == f.numel() * 4 for f in flat(found))


@pytest.mark.parametrize("broken", [lambda x: x.mean(0, keepdim=True), lambda x: torch.cat([x, x])])
def test_a_feature_of_another_number_of_samples_is_refused(broken):
    with pytest.raises(ReSegError, match=r"shape \(.*for 2 samples; leave teacher_batch out"):
        in_parts(lambda x: Features((x,), (x,), broken(x)), torch.randn(4, 1, 2, 2), 2)


# --- as a setting


@pytest.mark.parametrize("value", [0, -1, True, False, 2.0, "2"])
def test_bad_values_are_refused(value):
    with pytest.raises(ReSegError, match=f"teacher_batch={value!r}; it is a whole number of samples"):
        ReSegWrapper(UNet(), teacher_batch=value)


def saved(reseg: ReSegWrapper) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(reseg.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_it_is_part_of_the_state_and_changes_nothing_that_is_built():
    state = saved(ready(teacher_batch=2)[1])
    assert Settings(**state["settings"]).teacher_batch == 2
    model, reseg = ready()
    teacher, extractor = reseg.teacher, reseg.extractor
    reseg.load_state_dict(state)
    assert (reseg.teacher, reseg.extractor, reseg.settings.teacher_batch) == (teacher, extractor, 2)
    image, label = batch(4)
    seen = batches_seen(reseg.teacher.body)
    model(image)
    reseg.alignment_loss(label)
    assert seen == [2, 2]
    del state["settings"]["teacher_batch"]  # of an older version
    reseg.load_state_dict(state)
    assert (reseg.teacher, reseg.settings.teacher_batch) == (teacher, None)


def without_statistics(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


def test_a_teacher_that_takes_statistics_from_the_batch_is_refused():
    image = batch()[0]
    torch.manual_seed(0)
    model = UNet(norm=without_statistics)
    with pytest.raises(ReSegError, match=r"teacher_batch=2 .*encoder\.0\.1, .*track_running_stats"):
        ReSegWrapper(model, example_input=image, teacher_batch=2)
    assert not any(m._forward_hooks for m in model.modules())
    ReSegWrapper(UNet(norm=nn.InstanceNorm2d), example_input=image, teacher_batch=2)  # of every sample by itself
    reseg = ReSegWrapper(model, example_input=image)
    state = reseg.state_dict()
    other = copy.deepcopy(state)
    other["settings"]["teacher_batch"] = 2
    other["parts"]["teacher"] = {name: t * 2 for name, t in other["parts"]["teacher"].items()}
    for wrapper in (reseg, ReSegWrapper(model)):
        with pytest.raises(ReSegError, match="teacher_batch=2"):
            wrapper.load_state_dict(other)
        assert wrapper.settings.teacher_batch is None
    assert all(torch.equal(t, state["parts"]["teacher"][name]) for name, t in reseg.teacher.state_dict().items())
