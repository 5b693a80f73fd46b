"""The wrapper's interface: settings, states, label and model forms, components, stats, own teachers."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from models import UNet, batch, ready, saved, task_loss
from torch import Tensor, nn

from reseg_loss import PRESETS, CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper, TapError
from reseg_loss.alignment.teacher import redraw
from reseg_loss.common.outputs import select_output
from reseg_loss.functional import gradient_norms


def test_presets_and_overrides():
    image, _ = batch()
    assert (PRESETS["paper"].weight, PRESETS["paper"].alpha, PRESETS["paper"].beta) == (0.035, 0.6, 0.4)
    reseg = ReSegWrapper(UNet(), example_input=image, preset="standardized", weight=0.1, bottleneck=0.0)
    assert (reseg.weight, reseg.criterion.normalize, reseg.criterion.bottleneck, reseg.criterion.divisor) == (
        0.1,
        "batch",
        0.0,
        3.0,
    )
    with pytest.raises(TypeError, match="wieght"):
        ReSegWrapper(UNet(), wieght=0.1)
    with pytest.raises(ReSegError, match="Did you mean 'standardized'"):
        ReSegWrapper(UNet(), preset="standardised")
    with pytest.raises(ReSegError, match="label_input='hot'"):
        ReSegWrapper(UNet(), label_input="hot")
    with pytest.raises(ReSegError, match="weight=-1"):
        ReSegWrapper(UNet(), weight=-1)


def test_the_weight_may_change_between_steps():
    model, reseg = ready(weight=0.035)
    image, label = batch()
    model(image)
    one = reseg.alignment_loss(label)
    reseg.weight = 0.07
    model(image)
    assert torch.allclose(reseg.alignment_loss(label), 2 * one, rtol=1e-4)
    reseg.weight = 0
    model(image)
    zero = reseg.alignment_loss(label)
    assert zero.item() == 0
    zero.backward()
    (task_loss(model(image), label) + reseg.alignment_loss(label)).backward()
    reseg.weight = 0.035
    with pytest.raises(ReSegError, match="no training forward"):
        reseg.alignment_loss(label)


def test_components_and_stats():
    model, reseg = ready(weight=0.035)
    image, label = batch()
    model(image)
    terms = reseg.alignment_terms(label)
    model(image)
    total = reseg.alignment_loss(label)
    assert torch.allclose(reseg.weight * reseg.criterion.combine(terms), total)
    stats = reseg.stats()
    assert stats["alignment"] == pytest.approx(total.item() / 0.035, rel=1e-5)
    assert set(stats) == {*terms, "alignment", "weight"}
    assert all(isinstance(v, float) for v in stats.values())


def test_gradient_norms_are_those_of_separate_backward_passes():
    model, reseg = ready(weight=0.5)
    image, label = batch()
    loss = task_loss(model(image), label)
    terms = reseg.alignment_terms(label)
    parts = {"task": loss, "bottleneck": reseg.weight * reseg.criterion.combine({"bottleneck": terms["bottleneck"]})}
    norms = gradient_norms(model.parameters(), parts)
    (loss + reseg.weight * reseg.criterion.combine(terms)).backward()  # the measurement leaves the graph usable

    def norm(value: Tensor) -> float:
        model.zero_grad()
        value.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()

    task = norm(task_loss(model(image), label))
    reseg.extractor.forget()
    model(image)
    bottleneck = norm(0.5 / 3 * reseg.alignment_terms(label)["bottleneck"])
    assert norms["task"].item() == pytest.approx(task, rel=1e-4)
    assert norms["bottleneck"].item() == pytest.approx(bottleneck, rel=1e-4)


def test_before_the_teacher_is_ready_the_three_ways_are_named():
    model = UNet()
    image, label = batch()
    reseg = ReSegWrapper(model)
    model(image)
    with pytest.raises(ReSegError, match=r"example_input=.*fit_recon"):
        reseg.alignment_loss(label)
    reseg = ReSegWrapper(model, example_input=image)
    model(image)
    with pytest.raises(ReSegError, match=r"fit_recon.*load_state_dict.*freeze_teacher"):
        reseg.alignment_loss(label)


@pytest.mark.parametrize("kwargs", [{}, {"preset": "standardized", "levels": [2], "bottleneck": 2}])
def test_a_state_restores_everything_without_example_or_stage_1(kwargs):
    image, label = batch()
    model, reseg = ready(**kwargs)
    reseg.weight = 0.2
    model(image)
    expected = reseg.alignment_loss(label)
    state = saved(reseg)
    reseg.remove()
    fresh = ReSegWrapper(model)
    fresh.load_state_dict(state)
    model(image)
    assert torch.equal(fresh.alignment_loss(label), expected)
    assert (fresh.calls, fresh.weight) == (2, 0.2)
    assert fresh.settings.to_dict() == {**reseg.settings.to_dict(), "weight": 0.2}
    assert saved(fresh).keys() == state.keys()
    assert str(fresh.extractor.plan) == str(reseg.extractor.plan)


def test_loading_into_a_wrapper_that_knows_its_taps_keeps_hooks_and_parameters():
    _, reseg = ready()
    state = saved(reseg)
    _, other = ready()
    parameters, extractor = list(other.teacher.parameters()), other.extractor
    other.load_state_dict(state)
    assert all(a is b for a, b in zip(parameters, other.teacher.parameters()))
    assert other.extractor is extractor
    mine, theirs = reseg.teacher.state_dict(), other.teacher.state_dict()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_state_before_the_teacher_exists_and_one_of_a_trainable_teacher():
    image, _ = batch()
    early = ReSegWrapper(UNet(), weight=0.5)
    fresh = ReSegWrapper(UNet())
    fresh.load_state_dict(saved(early))
    assert fresh.weight == 0.5
    training = ReSegWrapper(UNet(), example_input=image)
    fresh.load_state_dict(saved(training))
    assert not fresh.ready, "a run that was killed in stage 1 must not go on with half a teacher"
    fresh.freeze_teacher()
    with pytest.raises(ReSegError, match="before the end of stage 1, but stage 1 is over here"):
        fresh.load_state_dict(saved(training))
    with pytest.raises(ReSegError, match=r"not the state_dict\(\)"):
        fresh.load_state_dict({})


def test_a_state_of_another_model_names_the_missing_tap():
    _, reseg = ready()
    with pytest.raises(TapError, match="has no module"):
        ReSegWrapper(nn.Sequential(nn.Conv2d(1, 3, 1))).load_state_dict(reseg.state_dict())


class Returning(UNet):
    """A U-Net that returns its logits in another form."""

    form = "tuple"

    def forward(self, x):
        y, small = super().forward(x), self.pool(self.encoder[0](x))
        forms = {
            "tuple": lambda: (y, small),
            "features first": lambda: {"features": small, "out": y},
            "stack": lambda: torch.stack([y, 2 * y], 1),
            "two of the image's size": lambda: [x, y],
        }
        return forms[self.form]()


@pytest.mark.parametrize(
    ("form", "kwargs"),
    [("tuple", {}), ("features first", {}), ("stack", {}), ("two of the image's size", {"output": 1}),
     ("features first", {"output": "out"})],
)  # fmt: skip
def test_models_with_other_outputs(form, kwargs):
    model = Returning()
    model.form = form
    image, label = batch()
    model, reseg = ready(model, **kwargs)
    assert reseg.teacher.encoding.num_classes == 3
    model(image)
    assert reseg.alignment_loss(label) > 0
    assert reseg.reconstruct(label).shape == image.shape


def test_a_model_without_an_image_sized_output_is_refused():
    with pytest.raises(
        ReSegError, match=r"no float tensor of the image's size \(8, 8\) for 2 images, only \[0\] \(2, 3, 4, 4\)"
    ):
        select_output([torch.zeros(2, 3, 4, 4)], 2, (8, 8))
    with pytest.raises(ReSegError, match="output="):
        select_output({"mask": torch.zeros(2, 3, 8, 8, dtype=torch.long)}, 2, (8, 8))


@pytest.mark.parametrize("label_input", ["index", "onehot"])
@pytest.mark.parametrize("classes", [1, 3])
def test_label_forms_agree(label_input, classes):
    image, _ = batch()
    label = batch(classes=max(2, classes))[1]
    model, reseg = ready(UNet(classes=classes), label_input=label_input)
    forms = [label, label.unsqueeze(1), label.float(), label.to(torch.uint8), [label, label[:, ::2, ::2]]]
    if classes > 1:
        forms.append(torch.nn.functional.one_hot(label, classes).movedim(-1, 1))
    values = []
    for form in forms:
        model(image)
        values.append(reseg.alignment_loss(form).item())
    # one-hot labels of torch lie with channels last in memory, where convolutions round otherwise
    assert values == pytest.approx([values[0]] * len(values), rel=1e-5)


def test_labels_are_checked_at_every_call_and_values_at_the_first():
    model, reseg = ready()
    image, label = batch()
    model(image)
    with pytest.raises(ReSegError, match="ignore_index="):
        reseg.alignment_loss(label + 7)
    model(image)
    reseg.alignment_loss(label)
    model(image)
    with pytest.raises(ReSegError, match="does not fit an image"):
        reseg.alignment_loss(label[:1])
    model(image)
    reseg.alignment_loss(label)  # the refused call left nothing behind


def test_unequal_channels_need_no_parameters():
    class Wide(UNet):
        """The decoder's widths differ from the encoder's."""

        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleList(
                nn.Sequential(nn.Conv2d(2 * c, c + 3, 3, padding=1), nn.ReLU()) for c in (16, 8, 4)
            )
            self.up = nn.ModuleList(nn.ConvTranspose2d(a, c, 2, 2) for a, c in ((32, 16), (19, 8), (11, 4)))
            self.head = nn.Conv2d(7, 3, 1)

    model, reseg = ready(Wide())
    image, label = batch()
    values = []
    for _ in range(2):
        model(image)
        values.append(reseg.alignment_loss(label))
    assert list(reseg.parameters()) == []
    assert torch.equal(values[0], values[1])
    values[0].backward()
    assert model.decoder[1][0].weight.grad.any()


class Narrow(UNet):
    """A teacher of the user's: encoded label in, image out, half as wide."""

    def __init__(self, channels: int = 3):
        super().__init__(in_channels=channels, classes=5, width=2)


@pytest.mark.parametrize("named", [False, True])
def test_a_teacher_of_the_users(named):
    image, label = batch()
    own = Narrow()
    taps = {
        "encoder": ["encoder.1", "encoder.2"], "decoder": ["decoder.1", "decoder.0"], "bottleneck": "bottleneck"
    }  # fmt: skip
    model, reseg = ready(teacher=own, label_input="onehot", teacher_taps=taps if named else None)
    assert reseg.teacher.body is own
    assert reseg.reconstruct(label).shape == image.shape  # a 1x1 convolution from 5 channels
    model(image)
    expected = reseg.alignment_loss(label)
    state = saved(reseg)
    reseg.remove()
    with pytest.raises(ReSegError, match="teacher="):
        ReSegWrapper(model).load_state_dict(state)
    fresh = ReSegWrapper(model, teacher=Narrow())
    fresh.load_state_dict(state)
    model(image)
    assert torch.equal(fresh.alignment_loss(label), expected)


def test_a_model_with_more_inputs_needs_a_teacher_of_its_own():
    class Conditioned(UNet):
        def forward(self, x, condition):
            return super().forward(x) * condition.view(-1, 1, 1, 1)

    image, label = batch()
    example = {"x": image, "condition": torch.ones(2)}
    with pytest.raises(ReSegError, match="teacher="):
        ReSegWrapper(Conditioned(), example_input=example)
    model = Conditioned()
    reseg = ReSegWrapper(model, example_input=example, teacher=Narrow(1))
    reseg.freeze_teacher()
    model(image, torch.ones(2))
    assert reseg.alignment_loss(label) > 0


def test_the_copy_has_its_own_weights_from_the_current_random_state():
    image, _ = batch()

    def teacher(seed: int, **kwargs) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = UNet()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        reseg = ReSegWrapper(model, example_input=image, **kwargs)
        assert torch.equal(torch.get_rng_state(), state)
        body = reseg.teacher.body
        assert type(body) is UNet
        assert all(p.requires_grad for p in body.parameters())
        same = all(torch.equal(a, b) for a, b in zip(body.parameters(), model.parameters()))
        return {"same": same, **body.state_dict()}

    one, again, other, given = teacher(1), teacher(1), teacher(2), teacher(1, teacher_init="copy")
    assert torch.equal(one["head.weight"], again["head.weight"])
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not one["same"]
    assert given["same"]


def test_what_the_copy_keeps_is_named_once(caplog):
    class Positioned(UNet):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 32, 1, 1))

        def forward(self, x):
            return super().forward(x) + 0 * self.position.sum()

    with caplog.at_level(logging.INFO, logger="reseg_loss"):
        ReSegWrapper(Positioned(), example_input=batch()[0])
    assert [r.getMessage() for r in caplog.records if "keeps" in r.getMessage()] == [
        "the teacher keeps the model's values of position: no reset_parameters() initialises them"
    ]


def test_to_moves_the_teacher():
    _, reseg = ready()
    assert reseg.to(torch.float64) is reseg
    assert {p.dtype for p in reseg.teacher.parameters()} == {torch.float64}


def test_after_remove_the_model_is_bare_and_the_wrapper_says_so():
    model, reseg = ready()
    image, label = batch()
    reseg.remove()
    reseg.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(image)
    with pytest.raises(ReSegError, match="hooks were removed"):
        reseg.alignment_loss(label)


def test_levels_that_are_named_are_all_used_full_resolution_included():
    image, _ = batch()
    model = UNet()
    reseg = ReSegWrapper(model, image, taps=UNet.taps)
    assert [level.stride for level in reseg.extractor.plan.selected] == [(1, 1), (2, 2), (4, 4)]
    lazy = ReSegWrapper(model, taps=UNet.taps)
    lazy.load_state_dict(reseg.state_dict())
    assert lazy.extractor.plan.selected == reseg.extractor.plan.selected
    only = ReSegWrapper(model, image, taps={k: v for k, v in UNet.taps.items() if k != "bottleneck"}, levels=[2])
    assert [level.stride for level in only.extractor.plan.selected] == [(2, 2)]
    assert str(only.extractor.bottleneck) == "bottleneck"


def test_a_state_that_does_not_fit_leaves_the_wrapper_as_it_was():
    model, reseg = ready()
    image, label = batch()
    teacher, settings = reseg.teacher, reseg.settings
    other = saved(ready(UNet(width=6), preset="standardized")[1])
    more = saved(ready(UNet(classes=5), preset="standardized")[1])
    missing = saved(reseg)
    missing["settings"]["normalize"] = "batch"
    missing["parts"]["taps"]["bottleneck"]["tap"] = "bottom"
    for state in (other, more, missing):
        with pytest.raises(ReSegError, match=r"another model|no module 'bottom'"):
            reseg.load_state_dict(state)
        assert reseg.teacher is teacher
        assert reseg.settings == settings
        model(image)
        assert reseg.alignment_loss(label) > 0


def test_a_state_found_with_images_of_another_size_keeps_hooks_and_parameters():
    _, reseg = ready()
    _, other = ready(image=batch(size=32)[0])
    parameters, extractor = list(other.teacher.parameters()), other.extractor
    other.load_state_dict(saved(reseg))
    assert all(a is b for a, b in zip(parameters, other.teacher.parameters()))
    assert other.extractor is extractor


def test_a_state_of_another_weight_or_with_lists_for_tuples_keeps_hooks_and_parameters():
    _, reseg = ready(levels=(2, 4))
    reseg.weight = 0.2
    _, other = ready(levels=(2, 4))
    extractor, teacher = other.extractor, other.teacher
    other.load_state_dict(saved(reseg))
    assert (other.extractor, other.teacher, other.weight) == (extractor, teacher, 0.2)
    other.load_state_dict(ReSegWrapper(UNet(), levels=[2, 4]).state_dict())
    assert other.teacher is teacher  # a state from before there was a teacher takes none away


def test_a_state_that_does_not_fit_changes_nothing():
    image, label = batch()
    model, reseg = ready()
    model(image)
    expected = reseg.alignment_loss(label)
    _, other = ready(UNet(classes=4))  # the same taps, another head
    with pytest.raises(ReSegError, match="another model"):
        reseg.load_state_dict(saved(other))
    model(image)
    assert torch.equal(reseg.alignment_loss(label), expected)


def test_a_state_brings_the_taps_of_the_users_teacher():
    image, label = batch()
    kinds = {"encoder": ["encoder.1", "encoder.2"], "decoder": ["decoder.1", "decoder.0"], "bottleneck": ["bottleneck"]}
    convolutions = {kind: [f"{name}.0" for name in names] for kind, names in kinds.items()}
    own = Narrow(1)
    model, reseg = ready(teacher=own, teacher_taps=convolutions)
    model(image)
    expected = reseg.alignment_loss(label)
    state = saved(reseg)
    reseg.remove()
    _, other = ready(model, teacher=own, teacher_taps=kinds)
    other.load_state_dict(state)
    model(image)
    assert torch.equal(other.alignment_loss(label), expected)


def test_a_state_that_comes_after_remove_sets_no_hooks():
    model = UNet()
    reseg = ReSegWrapper(model)
    reseg.remove()
    reseg.load_state_dict(saved(ready()[1]))
    assert reseg.ready
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ReSegError, match="hooks were removed"):
        reseg.alignment_loss(batch()[1])


def test_label_values_are_checked_anew_under_the_settings_of_a_state():
    image, label = batch()
    label[0, 0, 0] = 255
    model, reseg = ready(ignore_index=255)
    model(image)
    reseg.alignment_loss(label)
    reseg.load_state_dict(saved(ready()[1]))
    model(image)
    with pytest.raises(ReSegError, match="ignore_index="):
        reseg.alignment_loss(label)


def test_a_copy_of_model_and_wrapper_runs_its_own_compiled_teacher(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run: compiled.append(run) or (lambda x: run(x)))
    image, label = batch()
    model, reseg = ready(compile_teacher=True)
    model(image)
    expected = reseg.alignment_loss(label)
    for through in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other_model, other = through((model, reseg))
        other_model(image)
        assert torch.equal(other.alignment_loss(label), expected)
    assert len(compiled) == 3


def test_a_model_whose_forward_was_replaced_is_refused():
    model = UNet()
    inner = model.forward
    model.forward = lambda x: inner(x)
    with pytest.raises(ReSegError, match=r"model\.forward = "):
        ReSegWrapper(model, example_input=batch()[0])


def test_one_hot_labels_cannot_ignore_a_class():
    image, label = batch()
    one_hot = torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
    model, reseg = ready(ignore_index=0, label_input="onehot")
    model(image)
    with pytest.raises(ReSegError, match="would ignore classes"):
        reseg.alignment_loss(one_hot)


def test_gradient_norms_of_a_frozen_encoder_are_zero_where_nothing_trains():
    model, reseg = ready(weight=1.0)
    for part in (model.encoder, model.bottleneck):
        part.requires_grad_(False)
    image, label = batch()
    model(image)
    norms = gradient_norms(model.parameters(), reseg.alignment_terms(label))
    assert norms["bottleneck"] == norms["decoder_to_encoder_1"] == 0
    assert norms["encoder_to_decoder_1"] > 0
    reseg.weight = 0
    model(image)
    assert reseg.criterion.combine(reseg.alignment_terms(label)) == 0
    assert reseg.stats() == {"weight": 0.0}


def test_what_cannot_work_is_refused_at_once():
    image, _ = batch()
    model = UNet()
    for kwargs, message in (
        ({"taps": image}, "example_input="),
        ({"taps": {"encoder": ["nope"]}}, "no module 'nope'"),
        ({"divisor": -1}, "divisor"),
        ({"weight": "a"}, "weight='a'"),
        ({"teacher": model}, "shares parameters with it"),
        ({"teacher": nn.Sequential(model.encoder[0], nn.Conv2d(4, 1, 1))}, "shares parameters with it"),
        ({"example_input": ({"image": image},)}, "not just an image"),
        ({"example_input": (image, 1.0)}, "not just an image"),
        ({"example_input": image, "output": "mask"}, "'mask'"),
        ({"encoder_to_decoder": [1.0, 0.5]}, r"encoder_to_decoder=\[1.0, 0.5\]; it must be a finite number"),
    ):
        with pytest.raises(ReSegError, match=message):
            ReSegWrapper(model, **kwargs)
    _, reseg = ready()
    with pytest.raises(ReSegError, match="no batch of 2D label maps"):
        reseg.reconstruct(torch.zeros(16, 16, dtype=torch.long))
    reseg.weight = np.float32(0.5)
    assert reseg.weight == 0.5


def test_a_teacher_of_the_users_with_other_input_channels_gets_a_convolution_before_it():
    image, label = batch()
    model, reseg = ready(teacher=Narrow(3))  # index input has one channel
    assert reseg.teacher.before.weight.shape == (3, 1, 1, 1)
    model(image)
    assert reseg.alignment_loss(label) > 0


def test_parameters_that_reset_parameters_does_not_reach_are_named():
    class Odd(nn.Linear):
        def reset_parameters(self, std=None):
            super().reset_parameters()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it, models still have it
        normed = nn.utils.weight_norm(nn.Conv2d(1, 1, 1))
    assert redraw(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(1, 1, 1))) == []
    assert redraw(nn.Sequential(normed, Odd(2, 2))) == ["1.weight", "1.bias"]


def test_a_teacher_of_the_users_that_another_module_puts_in_training_stays_in_evaluation():
    image, label = batch()
    own = UNet(classes=1)
    model, reseg = ready(teacher=own)
    model(image)
    expected = reseg.alignment_loss(label)
    own.train()  # as the train() of a module that holds model and teacher does
    before = own.encoder[0][1].running_mean.clone()
    model(image)
    assert torch.equal(reseg.alignment_loss(label), expected)
    assert torch.equal(own.encoder[0][1].running_mean, before)


class Auxiliary(UNet):
    """Returns a number beside the logits."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"auxiliary": logits.mean(), "out": logits}


def test_a_number_before_the_logits_is_passed_over():
    image, label = batch()
    model = Auxiliary()
    reseg = ReSegWrapper(model, example_input=image)
    assert reseg.teacher.encoding.num_classes == 3
    reseg.freeze_teacher()
    model(image)
    assert reseg.alignment_loss(label) > 0


def test_numbers_of_numpy_go_into_states_as_plain_ones():
    np = pytest.importorskip("numpy")
    whole, part = np.int64(7), np.float64(0.9)
    reseg = ReSegWrapper(UNet(), example_input=batch()[0], ignore_index=whole, weight=part, every=2, alpha=part)
    ds = DeepSupervision(
        UNet(), num_classes=np.int64(3), example_input=batch()[0], ignore_index=whole, level_weights=[part] * 2
    )
    mixed = CutMixConsistency(
        UNet(), rampup_steps=whole, ignore_index=whole, threshold=part, ema_decay=part, weight=part
    )
    for each in (reseg, ds, mixed):
        assert saved(each)
