"""Ideas about a teacher of label maps: damages, the teacher that restores them, and what the student makes of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates, uniform_filter
from test_accuracy import Watch, feed_of, plan_of, run
from torch import Tensor, nn

from benchmarks import accuracy
from benchmarks.accuracy_report import report, select
from benchmarks.evidence.damage import damaged, ellipse, grown, moved, position, rectangle, replaced
from benchmarks.evidence.harness import Machine, Settings, Stage1, Stage2
from benchmarks.evidence.label_teacher import (
    RESTORED,
    Aligning,
    Cleaned,
    Cleaning,
    Distilling,
    LabelTeacher,
    Seen,
    distillation,
    idea_of,
)
from benchmarks.evidence.results import read_lines
from benchmarks.evidence.variants import CATALOGUE, DS_EQUAL, Variant
from reseg_loss import CutMixConsistency, consistency
from reseg_loss.alignment import wrapper
from reseg_loss.common import inputs
from reseg_loss.mixing import mix, predicted

SETTINGS = Settings(steps=3, stage1_steps=2, batch=2, size=32, width=2)
QUICK = replace(SETTINGS, stage_1="as stage 2", optimizer="adamw", lr=0.01, width=8, stage1_steps=150)
CUTMIX: dict[str, Any] = {"deep": DS_EQUAL, "unlabelled": "cutmix", "unlabelled_deep": True}
STANDARDIZED = {"preset": "standardized"}
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("cleans", **CUTMIX, label_teacher={"does": "cleans"}),
        Variant("cleans, image, mean", **CUTMIX, label_teacher={"does": "cleans", "image": True, "taken": "mean"}),
        Variant("aligns", **CUTMIX, reseg=STANDARDIZED, label_teacher={"does": "aligns"}),
        Variant("aligns all", **CUTMIX, reseg=STANDARDIZED, label_teacher={"does": "aligns", "labelled": True}),
        Variant("distils", deep=DS_EQUAL, label_teacher={"does": "distils", "temperature": 2.0}),
    )
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ACDC in the form of the real one: rings whose brightness is that of their class."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    patient, phase, position = (a.ravel() for a in np.meshgrid(range(1, 101), [0, 1], [0, 1], indexing="ij"))
    labels = maps(len(patient), 32).numpy().astype(np.uint8)
    images = (60 * labels + rng.integers(0, 20, labels.shape)).astype(np.uint8)
    np.savez(folder / "acdc.npz", images=images, labels=labels, patient=patient, phase=phase, slice=position)
    return folder


# --- damages


def maps(count: int, side: int = 48) -> Tensor:
    """Rings of classes 3, 2, 1 from the inside, a little off the centre."""
    y, x = np.mgrid[:side, :side]
    centre = np.random.default_rng(0).integers(side // 2 - 5, side // 2 + 6, (2, count, 1, 1))
    radius = np.hypot(y - centre[0], x - centre[1])
    return torch.from_numpy(sum((radius < side * r).astype(np.int64) for r in (0.3, 0.2, 0.1)))


def test_damaged_maps_are_maps_and_few_are_whole():
    label = maps(400)
    torch.manual_seed(0)
    first, second = damaged(label, 4), damaged(label, 4)
    torch.manual_seed(0)
    assert torch.equal(first, damaged(label, 4))
    assert not torch.equal(first, second)
    assert (first.shape, first.dtype, set(first.unique().tolist())) == (label.shape, torch.int64, {0, 1, 2, 3})
    changed = (first != label).flatten(1).float().mean(1)
    assert 0.01 < (changed == 0).float().mean() < 0.2
    assert 0.02 < changed.mean() < 0.2
    for c in range(1, 4):
        ours, theirs = first == c, label == c
        dsc = 2 * (ours & theirs).sum((1, 2)) / (ours.sum((1, 2)) + theirs.sum((1, 2)))
        assert 0.5 < dsc.mean() < 0.9
        assert (dsc == 0).any(), "some lack a class"
    assert set(damaged(maps(50).clamp(max=1), 2).unique().tolist()) == {0, 1}


def test_borders_move_as_shares_of_squares_say():
    label = maps(6)
    offsets = 0.2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    ours = grown(label, offsets, 2)[:, 4:-4, 4:-4]
    for each, add, after in zip(label.numpy(), offsets.numpy(), ours.numpy()):
        shares = [uniform_filter((each == c).astype(float), 5) + add[c] for c in range(4)]
        assert (np.argmax(shares, 0)[4:-4, 4:-4] == after).mean() > 0.999, "but for ties"
    larger = grown(label, torch.tensor([[0.0, 0.4, 0.0, 0.0]]).expand(6, 4), 2)
    assert ((larger == 1).sum((1, 2)) > (label == 1).sum((1, 2))).all()


def test_a_field_moves_what_is_at_its_end():
    label = maps(3, 32)
    assert torch.equal(moved(label, torch.zeros(3, 2, 4, 4)), label)
    shift = torch.zeros(3, 2, 4, 4)
    shift[:, 0] = 3 / 32  # from three columns to the right
    assert torch.equal(moved(label, shift)[:, :, :-3], label[:, :, 3:])
    field = 0.05 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(field, (32, 32), mode="bicubic", align_corners=True).numpy() * 32
    for each, (across, down), after in zip(label.numpy(), smooth, moved(label, field).numpy()):
        y, x = np.mgrid[:32, :32]
        assert (map_coordinates(each, [y + down, x + across], order=0) == after).mean() > 0.99


def test_blobs_boxes_and_what_is_replaced():
    label = maps(4, 32)
    centre, radii = torch.tensor([[3, 4], [16, 20], [31, 0], [10, 10]]), torch.tensor([[4.0, 7.5]] * 4)
    y, x = np.mgrid[:32, :32]
    for (row, column), round_, square in zip(
        centre.tolist(), ellipse(label, centre, radii), rectangle(label, centre, radii)
    ):
        assert (round_.numpy() == (((y - row) / 4) ** 2 + ((x - column) / 7.5) ** 2 <= 1)).all()
        assert (square.numpy() == ((abs(y - row) <= 4) & (abs(x - column) <= 7.5))).all()
    inside, gone, instead = torch.rand(4, 32, 32) < 0.5, torch.tensor([1, 2, 3, 1]), torch.tensor([0, 0, 1, 3])
    after = replaced(label, inside, gone, instead)
    for i in range(4):
        hit = inside[i] & (label[i] == gone[i])
        assert hit.any()
        assert torch.equal(after[i] != label[i], hit)
        assert set(after[i][hit].tolist()) == {int(instead[i])}


def test_a_position_is_anywhere_in_a_mask():
    torch.manual_seed(0)
    mask = torch.zeros(300, 8, 6, dtype=torch.bool)
    mask[:200, 2:4, 5] = True
    row, column = position(mask, torch.arange(300).view(-1, 1) < 100).unbind(1)
    assert set(zip(row[100:200].tolist(), column[100:200].tolist())) == {(2, 5), (3, 5)}
    for part in (slice(0, 100), slice(200, 300)):  # anywhere, and of an empty mask
        assert len(set(zip(row[part].tolist(), column[part].tolist()))) > 30


# --- the ideas


def test_an_idea_is_read_and_what_does_not_fit_is_refused():
    assert idea_of(None) is None
    assert idea_of({"does": "cleans", "taken": "mean"}) == Cleaning(taken="mean")
    assert idea_of({"does": "distils"}) == Distilling()
    for options, message in (
        ({}, "does=None; it is one of cleans, aligns, distils"),
        ({"does": "aligns", "image": True}, "'aligns' has no such option"),
        ({"does": "cleans", "taken": "both"}, "taken='both'; it is"),
    ):
        with pytest.raises(ValueError, match=message):
            Variant("x", **CUTMIX, label_teacher=options)
    for changes, message in (
        ({"unlabelled": None, "unlabelled_deep": False}, "needs unlabelled='cutmix', and no mixing"),
        ({"mixing": {}}, "needs unlabelled='cutmix', and no mixing"),
        ({"reseg": STANDARDIZED}, "'aligns' needs reseg, and no other"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(VARIANTS["cleans"], **changes)
    kinds = [variant.stage_1 for variant in VARIANTS.values()]
    assert kinds == [(RESTORED, "label"), *[(RESTORED, "label and image")], *[("index", "image")] * 2, kinds[1]]
    assert all(replace(variant, teacher="untrained").stage_1 is None for variant in VARIANTS.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_idea_trains_and_is_another_training_than_without(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.evidence.harness.SURE", 0.0)  # so few steps make nothing sure
    variant, out = VARIANTS[name], tmp_path / "results.jsonl"
    variants = (
        variant,
        replace(variant, name="without", label_teacher=None, reseg=None),
        replace(variant, name="untrained", teacher="untrained"),
    )
    assert run(plan_of(seeds=(0,), variants=variants, settings=replace(SETTINGS, steps=6, stage1_steps=6)), folder, out)
    lines = read_lines(out)
    assert not [line["error"] for line in lines if "error" in line]
    assert [line["stage_1_loss"] is None for line in lines] == [False, True, True]
    assert all(math.isfinite(line["task_loss"]) for line in lines)
    if name != "cleans, image, mean":  # after so few steps no cleaner turns the mean
        assert lines[0]["task_loss"] != lines[1]["task_loss"] != lines[2]["task_loss"]
    assert ("test, mean teacher" in lines[0]["scores"]) == (variant.unlabelled is not None)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_step_of_an_idea_waits_for_the_device(name, acdc, monkeypatch):
    for module in (inputs, wrapper, consistency):  # the CPU stands for a GPU
        monkeypatch.setattr(module, "readable", lambda device, first=False: False)
    variant, feed = VARIANTS[name], feed_of(acdc)
    step = Stage2(variant.step, SETTINGS, 4, feed, Machine.make())
    with Watch():
        loss, _ = step.losses()
        loss.backward()
        if step.mixed is not None:
            step.mixed.update()
    assert variant.stage_1 is not None
    stage = Stage1(variant.stage_1, SETTINGS, 4, feed, Machine.make())
    with Watch():
        loss, _ = stage.losses()
        loss.backward()


def test_the_teacher_learns_to_restore(acdc):
    feed = feed_of(acdc, QUICK.stage1_steps)
    for sees in ("label", "label and image"):
        stage = Stage1((RESTORED, sees), QUICK, 4, feed, Machine.make())
        weights, loss = stage.fit(0)
        assert loss < 0.3 * float(stage.loop.losses[:5].mean())
        teacher = LabelTeacher(4, QUICK.width, sees).eval()
        teacher.load_state_dict(weights)
        image, label, _ = feed.batch_of(feed.labelled, torch.tensor([3]))
        image, label = image.repeat(20, 1, 1, 1), label.repeat(20, 1, 1)
        seen = damaged(label, 4)
        assert (teacher(seen, image).argmax(1) != label).sum() < (seen != label).sum()
        with_other_image = teacher(seen, image.flip(0) + 0.2)
        assert torch.equal(with_other_image, teacher(seen, image)) == (sees == "label")


def test_the_same_seed_gives_the_same_damages(acdc):
    stage = Stage1((RESTORED, "label"), SETTINGS, 4, feed_of(acdc), Machine.make())
    assert stage.fit(0)[1] == stage.fit(0)[1] != stage.fit(1)[1]


def test_a_teachers_weights_are_of_the_seed_and_kept_by_a_run(acdc):
    one, two = LabelTeacher(4, 2, "label"), LabelTeacher(4, 2, "label")
    one.redraw(3), two.redraw(3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    two.redraw(4)
    assert not torch.equal(one.body.head.weight, two.body.head.weight)
    step = Stage2(VARIANTS["cleans"].step, SETTINGS, 4, feed_of(acdc), Machine.make())
    step.feed.load(np.arange(4), np.arange(4, 8), 0)
    step.train(VARIANTS["cleans"], 0, one.state_dict())
    assert step.label_teacher is not None
    assert not step.label_teacher.body.training
    for name, value in step.label_teacher.state_dict().items():
        assert torch.equal(value, one.state_dict()[name]), "frozen, statistics and all"
    step.train(VARIANTS["cleans"], 4, None)
    for name, value in step.label_teacher.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), "untrained"
    with pytest.raises(ValueError, match="for slices, not for volumes"):
        Stage1((RESTORED, "label"), replace(SETTINGS, model="unet_3d"), 4, feed_of(acdc), Machine.make())


class Constant(nn.Module):
    """Sure of class 1 everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, label: Tensor, image: Tensor) -> Tensor:
        self.seen.append(label)
        return torch.tensor([0.0, 9.0, 0.0]).view(1, 3, 1, 1).expand(len(label), 3, *label.shape[1:])


def one_step(kind: type[CutMixConsistency], **options: Any) -> tuple[CutMixConsistency, Tensor, Tensor]:
    """CutMix around a convolution; images; and the mean teacher's logits of them."""
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 3, padding=1)
    mixed = kind(model, rampup_steps=None, ignore_index=255, perturb=None, **options)
    images = 9 * torch.randn(4, 1, 16, 16)
    return mixed, images, model(images).detach()


@pytest.mark.parametrize("other", [False, True])
def test_pseudo_labels_are_the_cleaners(other):
    cleaner = Constant()
    mixed, images, logits = one_step(Cleaned, cleaner=cleaner, taken="its own", other=other)
    y = mixed.mix(images)
    assert (y.label == 1).all()
    label, _ = predicted(logits)
    assert len(label.unique()) == 3
    assert torch.equal(cleaner.seen[0], label.roll(1, 0) if other else label)


@pytest.mark.parametrize(
    ("name", "taken", "sees"), [("cleans", "its own", False), ("cleans, image, mean", "mean", True)]
)
def test_a_step_cleans_as_its_variant_says(name, taken, sees, acdc):
    for fed in ("label", "other label"):
        step = Stage2(replace(VARIANTS[name], fed=fed).step, SETTINGS, 4, feed_of(acdc), Machine.make())
        assert isinstance(step.mixed, Cleaned)
        assert (step.mixed.taken, step.mixed.other) == (taken, fed == "other label")
        assert step.mixed.cleaner is step.label_teacher
        assert step.label_teacher is not None
        assert step.label_teacher.sees_image == sees
        assert not any(p.requires_grad for p in step.label_teacher.parameters())


def test_the_corrected_prediction_is_scored_and_the_cleaner_stays_as_it_is(acdc):
    step = Stage2(VARIANTS["cleans"].step, SETTINGS, 4, feed_of(acdc), Machine.make())
    assert step.mixed is not None
    assert step.label_teacher is not None
    step.label_teacher.redraw(5)
    before = copy.deepcopy(step.label_teacher.state_dict())
    images = step.feed.batch_of(step.feed.others, torch.tensor([0]))[0]
    network = step.networks()[", corrected mean teacher"]
    found = step.predict(network, (255 * images[:, 0]).byte(), images.shape[-1])
    with torch.no_grad():
        seen = step.mixed.average.eval()((255 * images).byte().float() / 255).argmax(1)
        assert torch.equal(found, step.label_teacher(seen, images).argmax(1).byte())
    assert not torch.equal(found, seen.byte())
    assert all(torch.equal(value, before[name]) for name, value in step.label_teacher.state_dict().items())
    assert (
        ", corrected mean teacher"
        not in Stage2(VARIANTS["aligns"].step, SETTINGS, 4, feed_of(acdc), Machine.make()).networks()
    )


def test_where_cleaner_and_mean_teacher_differ_nothing_counts():
    mixed, images, logits = one_step(Cleaned, cleaner=Constant(), taken="mean", other=False)
    torch.manual_seed(1)
    y = mixed.mix(images)
    plain, _, _ = one_step(CutMixConsistency)
    torch.manual_seed(1)
    assert torch.equal(plain.mix(images).images, y.images), "the same boxes"
    p = (logits.softmax(1) + Constant()(logits.argmax(1), images).softmax(1)) / 2
    confidence, label = p.max(1)
    expected = torch.where(confidence >= 0.95, label, 255)
    assert (expected[logits.argmax(1) != 1] == 255).all()
    assert set(expected.unique().tolist()) == {1, 255}
    torch.manual_seed(1)
    assert torch.equal(y.label, plain.exchange(images, expected)[1])


def test_the_alignments_label_is_the_prediction_of_the_mixed_images():
    mixed, images, logits = one_step(Seen)
    assert isinstance(mixed, Seen)
    torch.manual_seed(2)
    y = mixed.mix(images)
    taken = mixed.taken()
    sure = y.label != 255
    assert not sure.all()
    assert torch.equal(y.label[sure], taken[sure])
    assert set(taken.unique().tolist()) == {0, 1, 2}
    plain, _, _ = one_step(CutMixConsistency)
    torch.manual_seed(2)
    again = plain.mix(images)
    assert torch.equal(again.images, y.images)
    assert torch.equal(again.label, y.label)
    torch.manual_seed(2)
    assert torch.equal(plain.exchange(images, logits.argmax(1))[1], taken)
    with pytest.raises(AssertionError):
        mixed.taken()
    assert mix(taken, sure).shape == taken.shape


@pytest.mark.parametrize("fed", ["label", "other label"])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_alignment_sees_the_prediction_and_where_asked_the_label(labelled, fed, acdc, monkeypatch):
    variant = VARIANTS["aligns all" if labelled else "aligns"]
    assert variant.idea == Aligning(labelled)
    step = Stage2(replace(variant, fed=fed).step, SETTINGS, 4, feed_of(acdc), Machine.make())
    step.feed.load(np.arange(4), np.arange(4, 8), 0)
    assert step.reseg is not None
    assert isinstance(step.mixed, Seen)
    shown, align, taken = [], step.reseg.alignment_loss, step.mixed.taken
    predictions, images = [], []
    step.model.register_forward_pre_hook(lambda module, args: images.append(args[0].detach()))
    monkeypatch.setattr(step.reseg, "alignment_loss", lambda label: shown.append(label) or align(label))
    monkeypatch.setattr(step.mixed, "taken", lambda: predictions.append(taken()) or predictions[-1])
    step.loop.clock.zero_()
    step.ramp.fill_(0.5)
    step.aligned.fill_(1.0)
    loss, task = step.losses()
    image, label, _ = step.feed.batch_of(step.feed.labelled, step.loop.clock)
    expected = [*([label] if labelled else []), *predictions]
    assert len(shown) == len(expected) == 1 + labelled
    for ours, theirs in zip(shown, expected):
        assert torch.equal(ours, theirs.roll(1, 0) if fed == "other label" else theirs)
    assert len(images) == 2, "a forward of the labelled images and one of the mixed ones"
    assert torch.equal(images[0], image)
    assert loss > task


def test_distillation_is_the_divergence_at_its_temperature():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 4, 5, requires_grad=True), 3 * torch.randn(2, 3, 4, 5)
    value = distillation(ours, theirs, 2.0)
    p, q = ((x.detach().double() / 2).softmax(1) for x in (theirs, ours))
    assert float(value.detach()) == pytest.approx(4 * float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert float(distillation(theirs, theirs, 1.0)) == pytest.approx(0, abs=1e-6)
    value.backward()
    assert ours.grad is not None
    assert torch.allclose(ours.grad, ((q - p) * 2 / 40).float(), atol=1e-6)


@pytest.mark.parametrize("fed", ["label", "other label"])
def test_the_student_learns_the_teachers_logits(fed, acdc):
    """The loss of a step is the task loss plus the divergence, by hand."""
    variant = replace(VARIANTS["distils"], fed=fed)
    feed = feed_of(acdc)
    step = Stage2(replace(variant, deep=None).step, SETTINGS, 4, feed, Machine.make())
    plain = Stage2(CATALOGUE["bare"].step, SETTINGS, 4, feed, Machine.make())
    assert step.label_teacher is not None
    step.model.load_state_dict(plain.model.state_dict())
    for each in (step, plain):
        each.loop.clock.zero_()
    torch.manual_seed(5)
    loss, task = step.losses()
    torch.manual_seed(5)
    image, label, _ = feed.batch_of(feed.labelled, step.loop.clock)
    taught = step.label_teacher(damaged(label.roll(1, 0) if fed == "other label" else label, 4), image)
    expected = distillation(step.model(image), taught, 2.0)
    assert torch.allclose(loss, task + expected)
    assert torch.allclose(task, plain.losses()[0])
    assert expected > 0.01


def test_a_saved_run_of_an_idea_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    settings = replace(SETTINGS, steps=7, stage1_steps=5)
    plan = plan_of(seeds=(0,), variants=(VARIANTS["cleans, image, mean"],), settings=settings)
    assert run(plan, folder, tmp_path / "whole.jsonl")
    monkeypatch.setattr("benchmarks.evidence.harness.TO_LOOK", 2)
    out, attempts = tmp_path / "parts.jsonl", 0
    while not read_lines(out):
        looks = iter([0.0])  # at the second look of an attempt the time is up
        fake = SimpleNamespace(monotonic=lambda looks=looks: next(looks, math.inf))
        monkeypatch.setattr("benchmarks.evidence.harness.time", fake)
        accuracy.run_plan(plan, folder, out, Machine.make(), {}, accuracy.time.monotonic() + 1e6, tmp_path / "kept")
        attempts += 1
        assert attempts < 12
    assert attempts > 2
    (whole,), (parts,) = read_lines(tmp_path / "whole.jsonl"), read_lines(out)
    for what in ("task_loss", "stage_1_loss", "scores", "key"):
        assert parts[what] == whole[what], what


def test_the_report_says_what_an_idea_took_stage_1_included():
    cleans, distils = VARIANTS["cleans, image, mean"], VARIANTS["distils"]  # which share a stage 1
    longer = replace(CATALOGUE["ds equal"], name="as long", longer=1.5)
    plan = plan_of(seeds=(0, 1, 2), variants=(longer, cleans, distils), settings=replace(SETTINGS, steps=1000))
    ms, lines = {longer.name: 10.0, cleans.name: 30.0, distils.name: 20.0}, []
    for seed, variant in plan.runs():
        stage_1 = [9.0, 4.0, 5.0][seed] if variant == cleans else 0.001
        score = {"classes": ["lv"], "dsc": [0.5], "hd95": [1.0], "mean_dsc": 0.5, "mean_hd95": 1.0}
        line = {"key": plan.key(seed, variant, 32), "stored": 32, "seed": seed, "scores": {"test": score}}
        lines.append({**line, "ms_per_step": ms[variant.name] + seed, "seconds": {"stage_1": stage_1}})
    text = report(select(plan, lines[:-1], "test"))
    assert "| as long | 1500 | 11.0 | 16.5 | 0.0 | 16.5 |" in text
    assert f"| {cleans.name} | 1000 | 31.0 | 31.0 | 5.0 | 36.0 |" in text
    assert "| distils | 1000 | 20.5 | 20.5 | 5.0 | 25.5 |" in text
    assert "ms a step" not in report(select(replace(plan, variants=(longer,)), lines, "test"))
