"""Learning from unlabelled images: against the same written out slowly, and by the rules of the other parts."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IGNORED, Evaluated, UNet, WritesIntoItsInput, batch, through_file
from models import ignoring as task_loss
from torch import Tensor, nn

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper
from reseg_loss.mixing import (
    boxes,
    mix,
    perturb_intensities,
    pixels_per_class,
    predicted,
    pseudo_label,
    ramp_up,
    random_intensities,
    sure_label,
)


def made(model: nn.Module | None = None, **kwargs: Any) -> tuple[nn.Module, CutMixConsistency]:
    """A threshold of which a new model is sure of about half."""
    model = UNet() if model is None else model
    return model, CutMixConsistency(
        model, **{"rampup_steps": None, "ignore_index": IGNORED, "threshold": 0.4, **kwargs}
    )


def supervised(model: nn.Module, dims: int = 2, **kwargs: Any) -> DeepSupervision:
    return DeepSupervision(model, batch(dims=dims)[0], **{"ignore_index": IGNORED, **kwargs})


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- the functions, against loops


def slow_boxes(u: Tensor, spatial: tuple[int, ...]) -> Tensor:
    inside = torch.zeros(len(u), *spatial, dtype=torch.bool)
    for b in range(len(u)):
        side = 0.25 + 0.25 * u[b, 0].item()
        for at in torch.cartesian_prod(*(torch.arange(n) for n in spatial)).tolist():
            starts = [(1 - side) * x for x in u[b, 1:].tolist()]
            centres = [(i + 0.5) / n for i, n in zip(at, spatial)]
            inside[(b, *at)] = all(first <= c < first + side for first, c in zip(starts, centres))
    return inside


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(0, 1000))
def test_boxes_are_those_of_a_loop_over_pixels(spatial, seed):
    u = torch.rand(3, 1 + len(spatial), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(boxes(u, spatial), slow_boxes(u, tuple(spatial)))


@pytest.mark.parametrize("spatial", [(100, 60), (40, 20, 60)])
def test_boxes_cover_a_quarter_to_a_half_of_every_side_and_come_everywhere(spatial):
    box = boxes(torch.rand(2000, 1 + len(spatial), generator=torch.Generator().manual_seed(0)), spatial)
    count = torch.ones(len(box), dtype=torch.long)
    for axis, n in enumerate(spatial):
        side = box.movedim(1 + axis, 1).flatten(2).any(2)
        length = side.sum(1)
        assert length.min() >= n / 4 - 1
        assert length.max() <= n / 2 + 1
        assert side[:, 0].any()
        assert side[:, -1].any()
        count = count * length
    assert torch.equal(box.flatten(1).sum(1), count), "a box has no holes"


def test_mix_takes_the_box_from_the_sample_before_in_images_and_labels_alike():
    torch.manual_seed(0)
    image, label, box = torch.randn(3, 2, 4, 5), torch.randint(0, 9, (3, 4, 5)), torch.rand(3, 4, 5) < 0.5
    mixed, labels = mix(image, box), mix(label, box)
    for b in range(3):
        for i in range(4):
            for j in range(5):
                source = b - 1 if box[b, i, j] else b  # of the first the last
                assert torch.equal(mixed[b, :, i, j], image[source, :, i, j])
                assert labels[b, i, j] == label[source, i, j]
    assert torch.equal(mix(label[:, None], box)[:, 0], labels)


@pytest.mark.parametrize("dims", [2, 3])
def test_intensities_are_changed_in_every_channels_own_range(dims):
    torch.manual_seed(0)
    image = 500 * torch.randn(3, 2, *[4] * dims) - 1000
    image[:, 1] *= 1e-3
    u, noise = torch.rand(3, 3), torch.randn_like(image)
    found = perturb_intensities(image, u, noise)
    for b in range(3):
        gamma = 0.7 * 2 ** u[b, 0].item()
        for c in range(2):
            x = image[b, c].double()
            low, high = x.min().item(), x.max().item()
            unit = ((x - low) / (high - low)).clamp(min=1e-4) ** gamma
            unit = unit * (0.8 + 0.4 * u[b, 1].item()) + 0.2 * u[b, 2].item() - 0.1 + 0.1 * noise[b, c]
            assert torch.allclose(found[b, c].double(), low + (high - low) * unit, rtol=1e-4, atol=1e-3 * (high - low))
    assert found.dtype == image.dtype
    assert perturb_intensities(image.bfloat16(), u, noise).dtype == torch.bfloat16


def test_intensities_from_0_to_1_are_changed_as_in_the_benchmarks_augmentation():
    from benchmarks.evidence.batches import toned

    torch.manual_seed(0)
    image, u, noise = torch.rand(2, 1, 8, 8), torch.rand(2, 3), torch.randn(2, 1, 8, 8)
    image[:, :, 0, 0], image[:, :, 0, 1] = 0, 1
    tone = torch.stack([0.7 * 2 ** u[:, 0], 0.8 + 0.4 * u[:, 1], 0.2 * u[:, 2] - 0.1], 1)
    assert torch.allclose(perturb_intensities(image, u, noise), toned(image, tone) + 0.1 * noise, atol=1e-6)


def test_a_constant_channel_stays():
    image = torch.full((2, 1, 4, 4), -3.5)
    assert torch.equal(perturb_intensities(image, torch.rand(2, 3), torch.randn_like(image)), image)
    torch.manual_seed(0)
    assert not torch.equal(random_intensities(batch()[0]), random_intensities(batch()[0]))


def test_pseudo_labels_are_the_sure_classes_of_a_loop():
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 3, 4, 4)
    logits[0, 1, 0, 0] = math.nan
    found = pseudo_label(logits, 0.8, IGNORED)
    for b in range(2):
        for i in range(4):
            for j in range(4):
                p = logits[b, :, i, j].double().softmax(0).tolist()
                assert found[b, i, j] == (p.index(max(p)) if max(p) >= 0.8 else IGNORED)
    assert found.dtype == torch.int64
    assert 0 < (found == IGNORED).sum() < found.numel()
    assert pseudo_label(torch.zeros(1, 2, 1, 1), 0.5, IGNORED).item() == 0, "the threshold itself is sure"


def test_predictions_are_without_gradients():
    _, confidence = predicted(torch.randn(2, 3, 4, 4, requires_grad=True))
    assert not confidence.requires_grad


def test_pseudo_labels_of_one_channel_are_binary():
    logits = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0, math.nan]).view(1, 1, 2, 3)
    found = pseudo_label(logits, 0.95, -1)
    assert found.shape == logits.shape
    assert found.flatten().tolist() == [0, -1, -1, -1, 1, -1]


@pytest.mark.parametrize(("channels", "overlapping"), [(3, True), (1, True), (1, False), (3, False)])
@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 2)])
def test_classes_and_their_pixels_are_those_of_a_loop(channels, overlapping, spatial):
    torch.manual_seed(0)
    logits = torch.randn(2, channels, *spatial)
    label, confidence = predicted(logits, overlapping=overlapping)
    binary = overlapping or channels == 1
    assert label.shape == confidence.shape == (2, *((channels,) if binary else ()), *spatial)
    count = [0] * (channels if overlapping else max(channels, 2))
    for at in torch.cartesian_prod(*(torch.arange(n) for n in label.shape)).tolist():
        if binary:
            p = 1 / (1 + math.exp(-logits[tuple(at)].item()))
            found, sure = int(p >= 0.5), max(p, 1 - p)
        else:
            each = logits[(at[0], slice(None), *at[1:])].double().softmax(0).tolist()
            found, sure = each.index(max(each)), max(each)
        assert label[tuple(at)] == found
        assert confidence[tuple(at)].item() == pytest.approx(sure, rel=1e-6)
        if overlapping:
            count[at[1]] += found
        else:
            count[found] += 1
    assert pixels_per_class(label, len(count), overlapping=overlapping).tolist() == count
    assert torch.equal(sure_label(label, confidence, 0.6, 9), pseudo_label(logits, 0.6, 9, overlapping=overlapping))


def test_pixels_of_many_classes():
    label = torch.randint(0, 40, (2, 9, 9))
    label[0] = IGNORED
    assert pixels_per_class(label, 37).tolist() == [(label == c).sum().item() for c in range(37)]


def test_the_ramp():
    assert ramp_up(0, 8) == pytest.approx(math.exp(-5))
    assert ramp_up(4, 8) == pytest.approx(math.exp(-1.25))
    assert ramp_up(8, 8) == ramp_up(100, 8) == ramp_up(0, None) == 1


# --- the loss


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("with_deep", [False, True])
def test_training_is_that_of_a_plain_loop(dims, with_deep):
    """Loss, gradients, average and ramp of several steps, all of it written out."""
    torch.manual_seed(0)
    model = UNet(dims=dims)
    byhand = copy.deepcopy(model)
    teacher = copy.deepcopy(model)
    deep = supervised(model, dims) if with_deep else None
    heads = {} if deep is None else {name: copy.deepcopy(head) for name, head in deep.heads.items()}
    _, mixed = made(model, deep=deep, rampup_steps=3, weight=2.0, ema_decay=0.9)
    ours = torch.optim.SGD([*model.parameters(), *(deep.parameters() if deep else [])], 0.1)
    mixed.reset()  # the first loss would do it, but after a labelled forward, which batch normalisation counts
    theirs = torch.optim.SGD([*byhand.parameters(), *(p for h in heads.values() for p in h.parameters())], 0.1)

    def plain(image: Tensor, label: Tensor) -> Tensor:
        features: list[Tensor] = []
        handles = [part.register_forward_hook(lambda m, a, out: features.append(out)) for part in byhand.decoder[:2]]
        total = task_loss(byhand(image), label) if (label != IGNORED).any() else 0 * byhand(image).sum()
        for handle in handles:
            handle.remove()
        for head, x in zip(heads.values(), reversed(features)):
            small = F.interpolate(label[:, None].float(), x.shape[2:], mode="nearest")[:, 0].long()
            if (small != IGNORED).any():
                total = total + task_loss(head(x), small)
        return total

    for step in range(4):
        (image, label), (unlabelled, _) = batch(n=3, dims=dims, seed=step), batch(n=3, dims=dims, seed=10 + step)
        torch.manual_seed(step)
        loss = task_loss(model(image), label)
        if deep is not None:
            loss = loss + deep.loss(label, task_loss)
        loss = loss + mixed.loss(unlabelled, task_loss)
        ours.zero_grad()
        loss.backward()
        ours.step()
        mixed.update()

        torch.manual_seed(step)
        expected = plain(image, label)
        with torch.no_grad():
            p, found = teacher(unlabelled).softmax(1).max(1)
        box = slow_boxes(torch.rand(3, 1 + dims), tuple(image.shape[2:]))
        seen, target = unlabelled.clone(), torch.where(p >= 0.4, found, IGNORED)
        target = torch.where(box, target.roll(1, 0), target)
        for b in range(3):
            seen[b, 0][box[b]] = unlabelled[b - 1, 0][box[b]]
        seen = perturb_intensities(seen, torch.rand(3, 3), torch.randn_like(seen))
        expected = expected + 2 * math.exp(-5 * (1 - min(step / 3, 1)) ** 2) * plain(seen, target)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), byhand.parameters()):
                slow.copy_(0.9 * slow + 0.1 * fast)
        assert 0 < mixed.stats()["sure"] < 1
    for mine, its in ((model, byhand), (mixed.average, teacher)):
        for (name, a), b in zip(mine.state_dict().items(), its.state_dict().values()):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


def test_image_and_pseudo_label_are_exchanged_at_the_same_places():
    """A model whose logits are a function of the pixel alone, in which the label of a mixed image is known."""

    class Pixel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], 1) * self.scale

    torch.manual_seed(0)
    images = 10 * torch.randn(4, 1, 16, 16)
    got = []

    def remember(logits: Tensor, label: Tensor) -> Tensor:
        got.append((logits.detach(), label))
        return task_loss(logits, label)

    _, mixed = made(Pixel(), threshold=0.95, perturb=None)
    mixed.loss(images, remember)
    _, (logits, label) = got  # the first call asks whether pixels that do not count are left out
    assert torch.equal(label, pseudo_label(logits, 0.95, IGNORED))
    changed = (logits[:, :1] != images).any(1)
    assert torch.equal(logits[:, :1][changed[:, None]], images.roll(1, 0)[changed[:, None]])
    assert all(16 <= count <= 81 for count in changed.sum((1, 2)))


@pytest.mark.parametrize("with_deep", [False, True])
def test_where_nothing_is_sure_the_loss_and_gradients_are_0(with_deep):
    model = UNet()
    deep = supervised(model) if with_deep else None
    _, mixed = made(model, deep=deep, threshold=1.0)
    loss = mixed.loss(batch()[0], task_loss)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters())
    stats = mixed.stats()
    assert {name: value for name, value in stats.items() if "/" not in name} == {"loss": 0, "weight": 1, "sure": 0}
    assert all(value == 0 or math.isnan(value) for name, value in stats.items() if name.startswith("sure/"))


def test_ignored_pixels_have_no_gradient():
    _, mixed = made()
    got = []

    def remember(logits: Tensor, label: Tensor) -> Tensor:
        logits.retain_grad()
        got.append((logits, label))
        return task_loss(logits, label)

    mixed.loss(batch()[0], remember).backward()
    _, (logits, label) = got
    assert torch.equal(logits.grad.abs().sum(1) == 0, label == IGNORED)
    assert 0 < (label == IGNORED).sum() < label.numel()
    assert all(p.grad is None for p in mixed.average.parameters())


def test_a_binary_model_of_one_channel():
    def binary(logits: Tensor, label: Tensor) -> Tensor:
        counts = (label != IGNORED).float()
        return (
            F.binary_cross_entropy_with_logits(logits, label.clamp(max=1).float(), reduction="none") * counts
        ).mean()

    model = UNet(classes=1)
    deep = DeepSupervision(model, num_classes=1, example_input=batch()[0], ignore_index=IGNORED)
    _, mixed = made(model, deep=deep, threshold=0.55)
    loss = mixed.loss(batch()[0], binary)
    loss.backward()
    assert loss.item() > 0
    assert model.head.weight.grad.any()


class Wrapped(UNet):
    """Gives its logits in the form that `form` makes of them."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(super().forward(x))


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda y: {"out": y}, None),
        (lambda y: [y, y[..., ::2, ::2]], None),
        (lambda y: torch.stack([y, 0 * y], 1), None),
        (lambda y: (0 * y, {"logits": y}), (1, "logits")),
        (lambda y: {"features": 0 * y, "logits": y}, "logits"),
    ],
)
def test_logits_are_found_in_dicts_and_lists(form, output):
    values = []
    for make, path in ((lambda y: y, None), (form, output)):
        torch.manual_seed(0)
        _, mixed = made(Wrapped(make), output=path)
        values.append(mixed.loss(batch()[0], task_loss))
    assert values[0] > 0
    assert torch.equal(*values)


def test_weights():
    model, mixed = made(rampup_steps=2, weight=3.0)
    image, _ = batch()

    def one(logits: Tensor, label: Tensor) -> Tensor:
        return 1 + 0 * logits.sum()

    expected = [3 * math.exp(-5), 3 * math.exp(-1.25), 3.0, 3.0]
    assert [mixed.loss(image, one).item() for _ in range(4)] == pytest.approx(expected)
    assert mixed.loss(image, one, weight=0.25).item() == 0.25
    weight = torch.tensor(0.5)
    assert mixed.loss(image, one, weight=weight).item() == 0.5
    assert mixed.stats()["weight"] == 0.5
    assert mixed.calls == 6
    state = copy.deepcopy(model.state_dict())
    mixed.weight = 0
    zero = mixed.loss(image, one)
    zero.backward()
    assert zero.item() == 0
    assert mixed.calls == 6
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values())), "nothing has run"


def test_both_run_in_the_callers_autocast():
    dtypes = []

    class Noting(UNet):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            dtypes.append(out.dtype)
            return out

    model, mixed = made(Noting())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed.loss(batch()[0], task_loss)
    assert dtypes == [torch.bfloat16] * 2
    loss.backward()
    assert model.head.weight.grad.any()


def test_a_wrapper_of_the_model_runs_if_it_is_given():
    ran = []

    def note(images: Tensor) -> Any:
        ran.append(images.shape)
        return model(images)

    model, mixed = made()
    mixed.loss(batch()[0], task_loss, forward=note)
    assert ran == [(2, 1, 16, 16)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_a_compiled_model_and_mean_teacher_give_the_same():
    torch._dynamo.reset()
    image, label = batch()
    values = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = UNet()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        deep = supervised(model)
        _, mixed = made(run, deep=deep)
        if compiled:
            mixed.compile(partial(torch.compile, backend="aot_eager"))
        assert type(mixed.average) is UNet
        for _ in range(2):
            model.zero_grad()
            deep.heads.zero_grad()
            loss = task_loss(run(image), label) + deep.loss(label, task_loss)
            loss = loss + mixed.loss(image, task_loss)
            loss.backward()
            mixed.update()
        values.append(torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in model.parameters())]))
    torch._dynamo.reset()
    assert torch.allclose(*values, rtol=1e-4, atol=1e-6)


# --- the mean teacher


def test_the_users_model_is_left_alone():
    torch.manual_seed(0)
    model = UNet()
    image, label = batch()
    keys, expected, before = list(model.state_dict()), model(image), hooks(model)
    deep = supervised(model)
    attached = hooks(model)
    _, mixed = made(model, deep=deep)
    assert hooks(model) == attached, "it has no hooks of its own"
    model.mixed = mixed  # as in a LightningModule
    assert list(model.state_dict()) == keys
    assert torch.equal(model(image), expected)
    deep.loss(label, task_loss)
    mixed.loss(image, task_loss)
    deep.remove()
    assert hooks(model) == before == 0
    del model.mixed
    assert not {id(p) for p in mixed.average.parameters()} & {id(p) for p in model.parameters()}


def test_the_mean_teacher_has_the_users_hooks_and_none_of_ours():
    model = UNet()
    ran = []
    model.bottleneck.register_forward_hook(lambda m, a, out: ran.append(m))
    reseg = ReSegWrapper(model, example_input=batch()[0])
    reseg.freeze_teacher()
    ran.clear()
    _, mixed = made(model, deep=supervised(model))
    ran.clear()
    assert hooks(mixed.average) == 1
    assert not any(m._forward_hooks_always_called or m._forward_pre_hooks_with_kwargs for m in mixed.average.modules())
    mixed.average(batch()[0])
    assert ran == [mixed.average.bottleneck]


def test_it_starts_as_the_model_at_the_first_loss_and_follows_it():
    model, mixed = made(ema_decay=0.75)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)  # other weights are loaded
    mixed.loss(batch()[0], task_loss)
    assert all(torch.equal(a, p) for a, p in zip(mixed.average.parameters(), model.parameters()))
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(2)
    mixed.update()
    for a, s, p in zip(mixed.average.parameters(), start, model.parameters()):
        assert torch.allclose(a, 0.75 * s + 0.25 * p)
    # the labelled images' statistics are the model's alone
    name = "bottleneck.1.running_mean"
    assert not torch.equal(mixed.average.get_buffer(name), model.get_buffer(name))
    address = mixed.average.head.weight.data_ptr()
    mixed.reset()
    assert mixed.calls == 0
    assert mixed.average.head.weight.data_ptr() == address, "in place, for a captured step reads it"
    assert all(torch.equal(a, p) for a, p in zip(mixed.average.state_dict().values(), model.state_dict().values()))


def test_tied_and_frozen_parameters():
    class Tied(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.decoder[0][0].weight.requires_grad_(False)
            self.again = nn.Conv2d(4, 3, 1)
            self.again.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model, mixed = made(Tied(), ema_decay=0.5)
    average = mixed.average
    assert average.again.weight is average.head.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    start, frozen = model.head.weight.detach().clone(), model.decoder[0][0].weight.detach().clone()
    mixed.loss(batch()[0], task_loss).backward()
    optimizer.step()
    mixed.update()
    assert not torch.equal(start, model.head.weight)
    assert torch.allclose(average.head.weight, (start + model.head.weight) / 2), "once, although it has two names"
    assert torch.equal(average.decoder[0][0].weight, frozen)
    assert not any(p.requires_grad for p in average.parameters())


def test_its_modes_are_the_models():
    model, mixed = made()
    model.bottleneck.eval()  # a part whose statistics the user has frozen
    mixed.average.eval()  # and left so after a validation
    mixed.loss(batch()[0], task_loss)
    assert mixed.average.training
    assert not mixed.average.bottleneck[1].training


def step_of(model: nn.Module, deep: DeepSupervision, mixed: CutMixConsistency, optimizer: Any, seed: int) -> Tensor:
    (image, label), (unlabelled, _) = batch(seed=seed), batch(seed=100 + seed)
    with deep.record():
        logits = model(image)
    loss = task_loss(logits, label) + deep.loss(label, task_loss)
    loss = loss + mixed.loss(unlabelled, task_loss)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mixed.update()
    return loss.detach()


def test_a_run_resumes_to_the_bit():
    torch.manual_seed(0)
    model = UNet(dropout=0.3)
    deep = supervised(model)
    _, mixed = made(model, deep=deep, rampup_steps=5, weight=0.5, ema_decay=0.8, output=())
    optimizer = torch.optim.SGD([*model.parameters(), *deep.parameters()], 0.1, momentum=0.9)
    for step in range(2):
        step_of(model, deep, mixed, optimizer, step)
    parts = {"model": model, "deep": deep, "mixed": mixed, "optimizer": optimizer}
    state = through_file({**{k: v.state_dict() for k, v in parts.items()}, "rng": torch.get_rng_state()})
    expected = [step_of(model, deep, mixed, optimizer, step) for step in (2, 3)]

    torch.manual_seed(5)
    model = UNet(dropout=0.3)
    model.load_state_dict(state["model"])
    deep = DeepSupervision(model, num_classes=3, ignore_index=IGNORED)
    mixed = CutMixConsistency(model, deep=deep, rampup_steps=None, ignore_index=IGNORED)
    deep.load_state_dict(state["deep"])
    mixed.load_state_dict(state["mixed"])
    optimizer = torch.optim.SGD([*model.parameters(), *deep.parameters()], 0.1, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])
    assert (mixed.calls, mixed.weight, mixed.ema_decay, mixed.threshold, mixed.rampup_steps) == (2, 0.5, 0.8, 0.4, 5)
    torch.set_rng_state(state["rng"])
    assert torch.equal(torch.stack([step_of(model, deep, mixed, optimizer, s) for s in (2, 3)]), torch.stack(expected))
    with pytest.raises(ReSegError, match="another model"):
        made(UNet(width=2))[1].load_state_dict(state["mixed"])
    with pytest.raises(ReSegError, match="format 7"):
        mixed.load_state_dict({**state["mixed"], "format": 7})


def test_a_state_that_does_not_fit_changes_nothing():
    _, mixed = made()
    before = copy.deepcopy(mixed.average.state_dict())
    with pytest.raises(ReSegError, match="another model"):
        mixed.load_state_dict(made(UNet(classes=4))[1].state_dict())
    assert all(torch.equal(v, before[k]) for k, v in mixed.average.state_dict().items())


def test_seeds_fix_the_run():
    values = []
    for _ in range(2):
        torch.manual_seed(3)
        _, mixed = made()
        values.append(mixed.loss(batch()[0], task_loss))
    assert torch.equal(*values)
    torch.manual_seed(4)
    assert not torch.equal(made()[1].loss(batch()[0], task_loss), values[0])


# --- beside the other parts


def test_the_wrapper_and_deep_supervision_see_their_own_forwards():
    """The alignment and the deep losses of a step with unlabelled images are those of the same step without."""
    image, label = batch()
    values = []
    for unlabelled in (False, True):
        torch.manual_seed(0)
        model = UNet()
        reseg = ReSegWrapper(model, example_input=image, weight=1.0)
        reseg.freeze_teacher()
        deep = supervised(model)
        _, mixed = made(model, deep=deep)
        found = []
        for seed in range(2):
            with reseg.record(), deep.record():
                model(image)
            found.append(deep.loss(label, task_loss))
            if unlabelled and seed == 0:
                mixed.loss(batch(seed=7)[0], task_loss)  # before the alignment,
            found.append(reseg.alignment_loss(label))
            if unlabelled and seed == 1:
                mixed.loss(batch(seed=8)[0], task_loss)  # or after it
        with reseg.record(), deep.record():
            model(image)
        found += [deep.loss(label, task_loss), reseg.alignment_loss(label)]
        values.append(torch.stack(found))
    assert torch.equal(*values)


def test_the_deep_heads_learn_the_pseudo_label():
    model = UNet()
    deep = supervised(model)
    _, mixed = made(model, deep=deep)
    got = []

    def remember(logits: Tensor, label: Tensor) -> Tensor:
        got.append(label)
        return task_loss(logits, label)

    mixed.loss(batch()[0], remember).backward()
    _, half, quarter, full = got
    assert torch.equal(half, full[:, ::2, ::2])
    assert torch.equal(quarter, full[:, ::4, ::4])
    assert all(p.grad.any() for p in deep.parameters())


def test_a_labelled_forward_that_waits_is_not_mixed_up():
    model = UNet()
    deep = supervised(model)
    _, mixed = made(model, deep=deep)
    image, label = batch()
    model(image)
    with pytest.raises(ReSegError, match=r"deep.loss\(label, task_loss\) before"):
        mixed.loss(image, task_loss)
    deep.loss(label, task_loss)  # still there
    with pytest.raises(ReSegError, match="ZeroDivisionError"):
        mixed.loss(image, lambda logits, label: 1 / 0)
    with pytest.raises(ReSegError, match="no float tensor"):
        mixed.loss(image, task_loss, forward=lambda x: model(x)[..., :4])  # after the features were recorded
    with pytest.raises(ReSegError, match="no training forward"):
        deep.loss(label, task_loss)


# --- errors


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    "bad",
    [
        nn.CrossEntropyLoss(),  # fails on 255, once the mean teacher is sure of something
        lambda logits, label: F.cross_entropy(logits, label.clamp(max=2)),  # takes it for a class
        lambda logits, label: F.cross_entropy(logits, label, ignore_index=IGNORED) * float("nan"),
        lambda logits, label: torch.zeros(()),
    ],
)
def test_a_loss_that_does_not_leave_the_ignored_pixels_out_is_refused_at_the_first_call(bad, deep):
    model = UNet()
    _, mixed = made(model, deep=supervised(model) if deep else None)
    for _ in range(2):
        with pytest.raises(ReSegError, match="must ignore the label value 255"):
            mixed.loss(batch()[0], bad)
    assert mixed.calls == 0
    mixed.loss(batch()[0], task_loss).backward()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 16, 16), "drop_last=True"),
        (torch.zeros(1, 16, 16), "float tensor"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), "torch.uint8"),
        ({"image": 1}, "dict"),
        (torch.zeros(2, 3, 16, 16), "the form of the labelled images"),
        (torch.zeros(2, 1, 16, 16, 16), "the form of the labelled images"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    with pytest.raises(ReSegError, match=message):
        made()[1].loss(images, task_loss)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ignore_index": None}, "ignore_index=None; it must be a whole number"),
        ({"rampup_steps": 0}, "rampup_steps=0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"overlapping": 1}, "overlapping=1"),
        ({"perturb": "blur"}, "perturb='blur'"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ReSegError, match=message):
        made(**kwargs)


def test_what_cannot_work_is_refused():
    image, _ = batch()
    model = UNet()
    with pytest.raises(ReSegError, match="ignore_index=255"):
        made(model, deep=supervised(model, ignore_index=None))
    with pytest.raises(ReSegError, match="another model"):
        made(UNet(), deep=supervised(model))
    with pytest.raises(ReSegError, match="one of the model's 3 classes"):
        made(ignore_index=2)[1].loss(image, task_loss)
    with pytest.raises(ReSegError, match=r"perturb must return images of the same shape \(2, 1, 16, 16\), got"):
        made(perturb=lambda x: x[..., :8])[1].loss(image, task_loss)
    with pytest.raises(ReSegError, match=r"perturb returned torch\.float64 on cpu for images of torch\.float32"):
        made(perturb=lambda x: x.double())[1].loss(image, task_loss)
    with pytest.raises(ReSegError, match=r"torch.bfloat16 parameters"):
        made(UNet().bfloat16())
    with pytest.raises(ReSegError, match="lazy"):
        made(nn.Sequential(nn.LazyConv2d(3, 1)))
    features = Wrapped(lambda y: (torch.cat([y, y], 1), y))
    _, mixed = made(features, deep=supervised(features, num_classes=3))
    with pytest.raises(ReSegError, match="has 6 channels, the heads of deep supervision have 3"):
        mixed.loss(image, task_loss)
    _, mixed = made(model)
    model.more = nn.Conv2d(1, 1, 1)
    with pytest.raises(ReSegError, match="parameters have changed"):
        mixed.update()
    _, mixed = made(model)
    with pytest.raises(ReSegError, match="evaluation"):
        model.eval(), mixed.loss(image, task_loss)


class Ends(UNet):
    """Ends in a softmax module, and may return its logits beside it."""

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        self.end, self.beside = nn.Softmax(1), beside

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (self.end(logits), logits) if self.beside else self.end(logits)


def of_probabilities(p: Tensor, label: Tensor) -> Tensor:
    return F.nll_loss(p.log(), label, ignore_index=IGNORED)


@pytest.mark.parametrize("with_deep", [False, True])
def test_pseudo_labels_of_a_model_that_ends_in_a_module_are_those_of_its_logits(with_deep):
    values = []
    for kind, output, loss in ((UNet, None, task_loss), (Ends, "in:end", of_probabilities)):
        torch.manual_seed(0)
        model = kind()
        torch.manual_seed(1)
        deep = supervised(model) if with_deep else None
        _, mixed = made(model, deep=deep, output=output)
        assert mixed.ending == (output and "end")
        values.append(mixed.loss(batch()[0], loss))
    torch.testing.assert_close(*values)
    state = through_file(mixed.state_dict())
    other = CutMixConsistency(Ends(), rampup_steps=None, ignore_index=IGNORED)
    other.load_state_dict(state)
    other.loss(batch()[0], of_probabilities)
    for each in (mixed, other):
        each.remove()
        assert not hooks(each.average)
    assert not hooks(other.model)
    other.load_state_dict(state)
    assert not hooks(other.model), "none after remove()"


def test_heads_that_give_logits_to_a_loss_of_probabilities_are_refused():
    model = Ends(beside=True)
    with pytest.raises(ReSegError, match=r"heads of deep supervision pass task_loss logits.*pass output="):
        made(model, deep=supervised(model), output="in:end")
    made(model, deep=supervised(model), output=1)[1].loss(batch()[0], task_loss)
    assert not hooks(Ends())


def test_a_state_with_an_unknown_module_changes_nothing():
    model, mixed = made(Ends(), output="in:end")
    before, set_before = copy.deepcopy(mixed.state_dict()), hooks(model)
    for output in ("in:nothing", "in:head", "in:"):
        average = {name: value + 1 for name, value in before["average"].items()}
        with pytest.raises(ReSegError, match=r"module|sigmoid or softmax"):
            mixed.load_state_dict({**before, "output": output, "average": average})
        with pytest.raises(ReSegError, match="another model"):
            mixed.load_state_dict({**before, "average": {}})
    assert all(torch.equal(v, before["average"][k]) for k, v in mixed.average.state_dict().items())
    assert hooks(model) == set_before == 1
    mixed.loss(batch()[0], of_probabilities)


def test_the_halves_say_what_does_not_fit():
    model, mixed = made()
    images = batch(n=3)[0]
    y = mixed.mix(images)
    for label in (y.label[:1], y.label[:, None, :8], torch.zeros(3), None):
        with pytest.raises(ReSegError, match="label"):
            mixed.exchange(images, label)  # pyright: ignore
    prediction, logits = mixed.select({"out": model(y.images)}, y.images)
    assert prediction is logits
    for wrong in (prediction[:1], prediction[..., :8], None, prediction[:, :2]):
        with pytest.raises(ReSegError, match=r"prediction must fit the mixed images|returned 2 channels"):
            mixed.value(wrong, y, task_loss)  # pyright: ignore
    with pytest.raises(ReSegError, match=r"what mix\(\) returned"):
        mixed.value(prediction, tuple(y), task_loss)  # pyright: ignore
    with pytest.raises(ReSegError, match="has no gradient"):
        mixed.select(prediction.detach(), y.images)
    mixed.value(prediction, y, task_loss).backward()
    assert mixed.calls == 1


@pytest.mark.parametrize("spare", [False, True])
def test_a_forgotten_update_is_warned_about_once(spare):
    """After 20 changes of the parameters, however many calls there are for each; fused steps count, too."""
    model = UNet(width=1)
    if spare:  # the last parameters do not take part
        model.spare = nn.Linear(2, 2)
    model, mixed = made(model)
    image = batch(size=8)[0]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, fused=True)

    def step() -> None:
        mixed.loss(image, task_loss).backward()
        mixed.loss(image, task_loss).backward()
        optimizer.step()

    for _ in range(30):
        mixed.loss(image, task_loss)  # nothing changes
    mixed.update()
    for _ in range(20):
        step()
    with pytest.warns(UserWarning, match=r"20 changes of the parameters without update\(\)") as caught:
        mixed.loss(image, task_loss)
    assert caught[0].filename == __file__
    for _ in range(40):
        step()  # warnings are errors here
    mixed.update()


def test_at_weight_0_the_mean_teacher_has_the_models_statistics():
    model, mixed = made(weight=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        image, label = batch(seed=seed)
        (task_loss(model(image), label) + mixed.loss(image, task_loss)).backward()
        optimizer.step()
        mixed.update()
    pairs = list(zip(mixed.average.buffers(), model.buffers(), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


def test_each_task_loss_is_asked_whether_it_ignores_the_value():
    image, _ = batch()
    _, mixed = made()
    mixed.loss(image, task_loss)
    with pytest.raises(ReSegError, match="it must ignore the label value"):
        mixed.loss(image, nn.CrossEntropyLoss(ignore_index=-1))


@pytest.mark.parametrize("kind", ["function", "module"])
def test_a_task_loss_that_is_made_anew_is_not_asked_at_each_call(kind):
    image, _ = batch()
    _, mixed = made()
    calls = []

    class Counted(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            calls.append(x)
            return task_loss(x, y)

    kept = []  # or the next would have the same place in memory
    for _ in range(20):
        loss = Counted()
        kept.append(loss)
        mixed.loss(image, loss if kind == "module" else lambda x, y, loss=loss: loss(x, y))
    assert len(calls) == 20 + (8 if kind == "module" else 1)


def test_asking_a_task_loss_draws_no_random_numbers():
    def dropped(x: Tensor, y: Tensor) -> Tensor:
        return task_loss(F.dropout(x, 0.5), y)

    image, _ = batch()
    _, mixed = made(perturb=None, ema_decay=0.5)
    values = []
    for _ in range(2):  # the second time nothing is asked
        torch.manual_seed(0)
        values.append(mixed.loss(image, dropped).item())
    assert values[0] == values[1]


def test_a_call_at_weight_0_leaves_the_mean_teacher_the_models_statistics():
    model, mixed = made(average_buffers=False)
    image, _ = batch()
    for step in range(2):
        model(batch(seed=step)[0])
        mixed.loss(image, task_loss, weight=0.0)
        mixed.update()
        for a, b in zip(mixed.average.buffers(), model.buffers(), strict=True):
            assert torch.equal(a, b)
    mixed.loss(image, task_loss)
    mixed.update()
    assert not all(torch.equal(a, b) for a, b in zip(mixed.average.buffers(), model.buffers()))


def test_the_logits_of_a_labelled_forward_are_not_waited_for():
    model = nn.Sequential(UNet(classes=1), nn.Sigmoid())
    _, mixed = made(model, output="in:1", threshold=0.55)

    def copied(x: Tensor) -> Tensor:
        return model(x).clone()  # as DistributedDataParallel may return it

    copied(batch()[0])
    probabilities = partial(_binary, activation=lambda p: p)
    assert mixed.loss(batch()[0], probabilities, forward=copied).isfinite()


def _binary(p: Tensor, label: Tensor, activation: Any = torch.sigmoid) -> Tensor:
    counts = label != IGNORED
    return (F.binary_cross_entropy(activation(p), label.clamp(max=1).float(), reduction="none") * counts).mean()


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("rampup_steps", 7, 0), ("threshold", 0.5, 95), ("ema_decay", 0.5, 1.0)]
)
def test_settings_may_change_and_are_checked(name, good, bad):
    _, mixed = made()
    setattr(mixed, name, good)
    assert getattr(mixed, name) == mixed.state_dict()[name] == good
    with pytest.raises(ReSegError, match=f"{name}={bad}"):
        setattr(mixed, name, bad)
    assert getattr(mixed, name) == good


@pytest.mark.parametrize(("classes", "activation"), [(3, "softmax"), (1, "sigmoid")])
def test_a_mean_teacher_that_returns_probabilities_in_evaluation_is_refused(classes, activation):
    """Its probabilities would be taken for logits: with one channel, all would be foreground."""
    image, _ = batch()
    model, mixed = made(Evaluated(classes=classes), average_buffers=True)
    kept = {name: value.clone() for name, value in mixed.average.state_dict().items()}
    with pytest.raises(ReSegError, match=f"ends in a {activation} in evaluation mode"):
        mixed.mix(image)
    assert all(torch.equal(value, kept[name]) for name, value in mixed.average.state_dict().items())
    assert not any(p.requires_grad for p in mixed.average.parameters())
    _, mixed = made(Evaluated(classes=classes), average_buffers=False)
    mixed.mix(image)  # in training mode
    _, mixed = made(average_buffers=True)
    mixed.mix(image)
    assert model.training


@pytest.mark.parametrize("average_buffers", [False, True])
def test_the_first_images_are_blamed_in_either_mode_of_the_mean_teacher(average_buffers):
    _, mixed = made(average_buffers=average_buffers)
    with pytest.raises(ReSegError, match="the mean teacher failed on unlabelled images"):
        mixed.mix(batch(channels=2)[0])
    _, mixed = made(WritesIntoItsInput(), average_buffers=average_buffers)
    with pytest.raises(ReSegError, match="writes into its images"):
        mixed.mix(batch()[0])


def test_asking_a_task_loss_changes_no_buffer_of_it():
    """Or a resumed run would call it once more."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            self.calls += 1
            return task_loss(logits, label)

    loss = Counts()
    image, _ = batch()
    _, mixed = made()
    for calls in (1, 2):
        mixed.loss(image, loss)
        assert loss.calls == calls
