"""Few labels in one object: equal to the same training written out slowly, and nothing in it to get wrong."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import IGNORED, UNet, batch, ignoring, saved
from test_consistency import slow_boxes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, SemiSupervised, semi
from reseg_loss.mixing import perturb_intensities
from reseg_loss.semi import Targets
from reseg_loss.task_losses import BinaryCrossEntropyDiceLoss, CrossEntropyDiceLoss


def group(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def made(model: nn.Module | None = None, example: Any = None, **kwargs: Any) -> tuple[Any, SemiSupervised]:
    """A threshold of which a new model is sure of about half, in evaluation, too: running statistics are not new."""
    model = UNet() if model is None else model
    example = batch()[0] if example is None else example
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.Module) and inner.training and isinstance(example, Tensor):
        # what does not fit is refused where it is built
        with torch.random.fork_rng(), torch.no_grad(), suppress(RuntimeError):
            for _ in range(20):
                inner(torch.randn_like(torch.cat([example, example])))
    return model, SemiSupervised(model, example, **{"rampup_steps": None, "threshold": 0.4, "joint": True, **kwargs})


def step(seed: int = 0, n: int = 2, others: int = 3, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Labelled images, their labels, and images without."""
    return *batch(n=n, seed=seed, **kwargs), batch(n=others, seed=100 + seed, **kwargs)[0]


def gradients(loss: Tensor, *modules: Any) -> list[Tensor]:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters)]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


# --- against the same written out


def slow_cross_entropy_and_dice(logits: Tensor, label: Tensor) -> Tensor:
    """Half of each, by pixel and class: over all pixels, to which ignored ones add 0, and over those that count."""
    counts = label != IGNORED
    p = logits.softmax(1)
    one_hot = torch.stack([label == c for c in range(logits.shape[1])], 1)
    cross_entropy = -(p.log() * one_hot).sum() / label.numel()
    dice = torch.zeros(())
    for c in range(logits.shape[1]):
        inside, truth = p[:, c][counts], one_hot[:, c][counts].to(p.dtype)
        dice = dice + 1 - (2 * (inside * truth).sum() + 1e-5) / ((inside**2).sum() + truth.sum() + 1e-5)
    return (cross_entropy + dice / logits.shape[1]) / 2


THRESHOLD = {True: 0.44, False: 0.45}  # of which a new model is sure of a part, in evaluation and in training


class Plain:
    """Semi-supervised training by hand, of a copy of the model and of the heads."""

    def __init__(self, model: UNet, heads: nn.ModuleDict, task_loss: Callable[[Tensor, Tensor], Tensor], joint: bool):
        self.model, self.teacher, self.heads = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(heads)
        for copied in (self.model, self.teacher):
            for module in copied.modules():  # ours
                module._forward_hooks.clear(), module._forward_pre_hooks.clear()
        self.task_loss, self.joint = task_loss, joint
        self.threshold = THRESHOLD[joint]

    def outputs(self, image: Tensor) -> list[Tensor]:
        """Of the model and its heads, the finest first."""
        features: list[Tensor] = []
        parts = self.model.decoder[:2]
        handles = [part.register_forward_hook(lambda m, a, out: features.append(out)) for part in parts]
        logits = self.model(image)
        for handle in handles:
            handle.remove()
        return [logits, self.heads["decoder_1"](features[1]), self.heads["decoder_2"](features[0])]

    def of(self, outputs: list[Tensor], label: Tensor) -> Tensor:
        total = torch.zeros(())
        for x in outputs:
            small = F.interpolate(label[:, None].double(), x.shape[2:], mode="nearest")[:, 0].long()
            if (small != IGNORED).any():
                total = total + self.task_loss(x, small)
        return total

    def loss(self, image: Tensor, label: Tensor, others: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        self.teacher.train(not self.joint)
        with torch.no_grad():
            p, found = self.teacher(others).float().softmax(1).max(1)
        target = torch.where(p >= self.threshold, found, IGNORED)
        box = slow_boxes(torch.rand(len(others), others.ndim - 1), tuple(image.shape[2:]))
        seen, mixed = others.clone(), target.clone()
        for b in range(len(others)):
            seen[b, :, box[b]] = others[b - 1][:, box[b]]
            mixed[b, box[b]] = target[b - 1, box[b]]
        seen = perturb_intensities(seen, torch.rand(len(others), 3), torch.randn_like(seen))
        if self.joint:
            both = self.outputs(torch.cat([image, seen]))
            first, second = [x[: len(image)] for x in both], [x[len(image) :] for x in both]
        else:
            first, second = self.outputs(image), self.outputs(seen)
        labelled, unlabelled = self.of(first, label), self.of(second, mixed)
        return labelled + factor * unlabelled, labelled, unlabelled

    def update(self, decay: float) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.model.parameters()):
                slow.copy_(decay * slow + (1 - decay) * fast)
            for slow, fast in zip(self.teacher.buffers(), self.model.buffers()) if self.joint else ():
                slow.copy_(decay * slow + (1 - decay) * fast if slow.is_floating_point() else fast)


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits, label, ignore_index=IGNORED)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("task_loss", "dims"), [(None, 2), (cross_entropy, 3)])
def test_training_is_that_of_a_plain_loop(joint, task_loss, dims):
    """Loss, weights, heads, mean teacher and ramp of a dozen steps in fp64, labels with pixels that do not count."""
    torch.manual_seed(0)
    model = UNet(dims=dims, width=2).double()
    settings: dict[str, Any] = {"rampup_steps": 6, "weight": 2.0, "ema_decay": 0.9, "threshold": THRESHOLD[joint]}
    _, ours = made(model, batch(dims=dims)[0].double(), task_loss=task_loss, joint=joint, **settings)
    assert list(ours.deep.heads) == ["decoder_1", "decoder_2"]
    plain = Plain(model, ours.deep.heads, task_loss or slow_cross_entropy_and_dice, joint)
    mine = torch.optim.SGD([*model.parameters(), *ours.parameters()], 0.05, momentum=0.9)
    theirs = torch.optim.SGD([*plain.model.parameters(), *plain.heads.parameters()], 0.05, momentum=0.9)
    sure: list[float] = []
    for count in range(12):
        image, label, others = step(count, dims=dims, size=16 if dims == 2 else 8)
        image, others = image.double(), others.double()
        label[:, :3] = IGNORED
        torch.manual_seed(count)
        loss = ours.loss(image, label, others)
        torch.manual_seed(count)
        factor = 2 * math.exp(-5 * (1 - min(count / 6, 1)) ** 2)
        expected, labelled, unlabelled = plain.loss(image, label, others, factor)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        for optimizer, value in ((mine, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        ours.update()
        plain.update(0.9)
        stats = ours.stats()
        assert stats["labelled"] + stats["labelled/deep"] == pytest.approx(labelled.item())
        assert stats["unlabelled"] + stats["unlabelled/deep"] == pytest.approx(unlabelled.item())
        assert stats["weight"] == pytest.approx(factor)
        sure.append(stats["sure"])
    assert 0 < min(sure) < 1
    pairs = ((model, plain.model), (ours.average, plain.teacher), (ours.deep.heads, plain.heads))
    for mine, theirs in pairs:
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("deep", ["auto", None])
def test_without_batch_statistics_one_forward_has_the_gradient_of_two(deep):
    found = []
    for joint in (True, False):
        torch.manual_seed(0)
        model, ours = made(UNet(norm=group).double(), batch()[0].double(), joint=joint, deep=deep)
        image, label, others = step()
        torch.manual_seed(1)
        loss = ours.loss(image.double(), label, others.double())
        found.append(torch.cat([loss.view(1), flat(gradients(loss, model, ours))]))
        assert bool(list(ours.parameters())) is (deep == "auto")
    assert found[0].count_nonzero() > 100
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)


def test_with_batch_statistics_they_differ():
    values = []
    for joint in (True, False):
        torch.manual_seed(0)
        _, ours = made(joint=joint)
        torch.manual_seed(1)
        values.append(ours.loss(*step()))
    assert not torch.allclose(*values, rtol=1e-3)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_model_with_batch_statistics_runs_twice_unless_told(norm):
    model = UNet(norm=norm)
    assert [made(model, joint=joint)[1].joint for joint in (None, True, False)] == [
        norm is not nn.BatchNorm2d,
        True,
        False,
    ]


@pytest.mark.parametrize("joint", [True, False])
def test_the_model_runs_once_a_step_or_twice(joint):
    model, ours = made(joint=joint)
    ran = []
    model.register_forward_hook(lambda m, args, out: ran.append(len(args[0])))
    ours.loss(*step()).backward()
    assert ran == ([5] if joint else [2, 3])


def test_mix_and_loss_of_are_loss_in_two_halves():
    values = []
    for halves in (False, True):
        torch.manual_seed(0)
        model, ours = made()
        for seed in range(3):
            torch.manual_seed(seed)
            if halves:
                x, y = ours.mix(*step(seed))
                assert torch.equal(x[:2], step(seed)[0]), "labelled images stay as they are"
                loss = ours.loss_of(model(x), y)
            else:
                loss = ours.loss(*step(seed))
            ours.update()
        values.append(flat([loss.view(1), *gradients(loss, model, ours)]))
        assert ours.calls == 3
    assert torch.equal(*values)


def test_forward_runs_instead_of_the_model():
    model, ours = made()
    ran = []
    ours.loss(*step(), forward=lambda x: (ran.append(len(x)), model(x))[1])
    assert ran == [5]


def test_the_weight_of_a_call_replaces_ramp_and_weight():
    torch.manual_seed(0)
    _, ours = made(rampup_steps=100, weight=3.0)

    def call(**kwargs: Any) -> Tensor:
        torch.manual_seed(1)
        return ours.loss(*step(), **kwargs).detach()

    for weight in (0.5, torch.tensor(0.5)):
        value, stats = call(weight=weight), ours.stats()
        total = stats["labelled"] + stats["labelled/deep"] + 0.5 * (stats["unlabelled"] + stats["unlabelled/deep"])
        assert value.item() == pytest.approx(total)
        assert stats["weight"] == 0.5
    for wrong in (-1, math.nan, "1", torch.ones(2), torch.tensor(math.nan)):
        with pytest.raises(ReSegError, match="weight="):
            call(weight=wrong)
    assert ours.calls == 2
    ours.weight = 0
    with pytest.raises(ReSegError, match="weight="):
        call(weight=math.nan)


# --- at weight 0


@pytest.mark.parametrize("joint", [True, False])
def test_at_weight_0_it_is_the_labelled_loss_alone(joint):
    torch.manual_seed(0)
    model = UNet(dropout=0.2)
    _, ours = made(model, weight=0, joint=joint, task_loss=ignoring, threshold=0)
    optimizer = torch.optim.SGD([*model.parameters(), *ours.parameters()], 0.1)
    for seed in range(3):
        image, label, _ = step(seed)
        before = torch.get_rng_state()
        expected = ignoring(model(image), label) + ours.deep.loss(label, ignoring)
        buffers = [b.clone() for b in model.buffers()]
        torch.set_rng_state(before)
        loss = ours.loss(image, label, None)
        assert torch.equal(loss, expected)
        del buffers
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.update()
        same = [torch.equal(a, b) for a, b in zip(ours.average.buffers(), model.buffers(), strict=True)]
        assert any(same) if joint else all(same)  # averages of running statistics, or these themselves
    assert ours.calls == 0
    assert ours.stats().keys() == {"weight", "labelled", "labelled/deep"}
    assert not torch.equal(ours.average.head.weight, model.head.weight)
    if joint:
        x, y = ours.mix(image, label, "nothing")
        assert x is image
        assert torch.equal(ours.loss_of(model(x), y), ours.loss(image, label, None)) is False  # dropout
    ours.weight = 1
    ours.loss(*step())
    assert ours.calls == 1
    assert ours.stats()["sure"] > 0


# --- the coarser levels


class Stacked(UNet):
    """A model with deep supervision of its own, in a form of `give`."""

    def __init__(self, give: Callable[[list[Tensor]], Any], dims: int = 2, norm: Any = None) -> None:
        super().__init__(dims=dims, norm=norm)
        self.give = give
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.side = nn.ModuleList([conv(8, 3, 1), conv(16, 3, 1)])

    def forward(self, x: Tensor) -> Any:
        features: list[Tensor] = []
        handles = [p.register_forward_hook(lambda m, a, out: features.append(out)) for p in self.decoder[:2]]
        y = super().forward(x)
        for handle in handles:
            handle.remove()
        if not self.training:
            return y
        return self.give([y, self.side[0](features[1]), self.side[1](features[0])])


def own(kind: str) -> tuple[nn.Module, Tensor]:
    """A small model of a library whose deep supervision is on, and an example."""
    from monai.networks.nets import DynUNet, MedNeXt, SegResNetDS

    torch.manual_seed(0)
    if kind == "DynUNet":
        options: dict[str, Any] = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2, 2, 2]}
        net = DynUNet(2, 1, 3, filters=[4, 4, 8, 8], deep_supervision=True, deep_supr_num=2, **options)
        return net, torch.randn(2, 1, 16, 16)
    if kind == "SegResNetDS":
        shape: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 3}
        net = SegResNetDS(**shape, init_filters=8, blocks_down=(1, 1, 1), dsdepth=3)
        return net, torch.randn(2, 1, 16, 16)
    net = MedNeXt(
        spatial_dims=2, init_filters=4, in_channels=1, out_channels=3, encoder_expansion_ratio=[2] * 4,
        decoder_expansion_ratio=[2] * 4, bottleneck_expansion_ratio=2, kernel_size=3, deep_supervision=True,
        blocks_down=[1] * 4, blocks_bottleneck=1, blocks_up=[1] * 4,
    )  # fmt: skip
    return net, torch.randn(2, 1, 32, 32)


@pytest.mark.parametrize(("kind", "levels"), [("DynUNet", 2), ("SegResNetDS", 1), ("MedNeXt", 4)])
def test_deep_supervision_of_the_models_own_is_used(kind, levels):
    model, image = own(kind)
    _, ours = made(model, image, task_loss=ignoring)
    assert (ours.deep, list(ours.parameters()), "outputs" in repr(ours)) == (None, [], True)
    label = torch.randint(0, 3, (2, *image.shape[2:]))
    x, y = ours.mix(image, label, torch.randn(3, *image.shape[1:]))
    returned = model(x)
    loss = ours.loss_of(returned, y)
    outputs = list(returned.unbind(1)) if isinstance(returned, Tensor) else list(returned)
    assert len(outputs) == 1 + levels
    expected = torch.zeros(())
    for part, target in ((slice(2), label), (slice(2, 5), y.mixed.label)):
        for output in outputs:
            small = F.interpolate(target[:, None].float(), output.shape[2:], mode="nearest")[:, 0].long()
            if (small != IGNORED).any():
                expected = expected + ignoring(output[part], small)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert ours.stats()["labelled/deep"] > 0


@pytest.mark.parametrize("output", [None, 0, "out", ("out",)])
def test_coarser_outputs_are_found_by_whatever_names_the_finest(output):
    give = (lambda y: y) if output in (None, 0) else (lambda y: {"out": y[0], "more": y[1:]})
    model, ours = made(Stacked(give), output=output)
    assert "outputs" in repr(ours)
    ours.loss(*step()).backward()
    assert all(p.grad.any() for p in model.side.parameters())


def test_coarser_outputs_that_are_gone_are_missed():
    model, ours = made(Stacked(lambda y: y))
    model.give = lambda y: y[0]
    with pytest.raises(ReSegError, match="coarser outputs"):
        ours.loss(*step())


class Flat(nn.Module):
    """No U: two convolutions at the image's size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("make", [Flat, lambda: UNet(depth=1)])
def test_a_model_without_levels_trains_without_heads_and_says_so_once(make):
    model = make()
    with pytest.warns(UserWarning, match="no heads of deep supervision") as caught:
        _, ours = made(model)
    assert [w.filename for w in caught] == [__file__]
    assert (ours.deep, list(ours.parameters())) == (None, [])
    ours.loss(*step()).backward()
    assert ours.stats()["labelled/deep"] == 0
    made(model, deep=None)[1].loss(*step())  # without a word


def test_building_leaves_what_others_have_recorded():
    model = EndsIn(nn.Softmax(1))
    image, label, others = step()
    ds = DeepSupervision(model, image, ignore_index=IGNORED)
    _, first = made(model, deep=None)
    x, y = first.mix(image, label, others)
    out = model(x)
    made(model)
    ds.loss(torch.cat([label, y.mixed.label]), negative_log)
    first.loss_of(out, y)
    model(image)  # of the new one's building they know nothing
    ds.loss(label, negative_log)


def test_deep_may_be_none_or_yours():
    model = Stacked(lambda y: y)
    _, ours = made(model, deep=None, task_loss=ignoring)
    ours.loss(*step()).backward()
    assert all(p.grad is None for p in model.side.parameters())
    model = UNet()
    ds = DeepSupervision(model, batch()[0], ignore_index=IGNORED, level_weights=[1, 0.5], weight=0.3)
    _, ours = made(model, deep=ds, task_loss=ignoring, weight=0)
    assert ours.deep is ds
    assert [id(p) for p in ours.parameters()] == [id(p) for p in ds.parameters()]
    image, label, _ = step()
    expected = ignoring(model(image), label) + ds.loss(label, ignoring)
    assert torch.equal(ours.loss(image, label, None), expected)
    ds.weight = 0
    assert torch.equal(ours.loss(image, label, None), ignoring(model(image), label))
    with pytest.raises(ReSegError, match="belongs to another model"):
        made(UNet(), deep=ds)
    with pytest.raises(ReSegError, match=r"ignore_index=None.*build DeepSupervision\(..., ignore_index=255\)"):
        made(model, deep=DeepSupervision(model, batch()[0]))
    with pytest.raises(ReSegError, match=r"has 3 channels, the heads of deep supervision have 2"):
        made(model, deep=DeepSupervision(model, batch()[0], num_classes=2, ignore_index=IGNORED))
    with pytest.raises(ReSegError, match="taps are not known"):
        made(model, deep=DeepSupervision(model, ignore_index=IGNORED))
    unbound = SemiSupervised(model, rampup_steps=None, deep=DeepSupervision(model, ignore_index=IGNORED))
    unbound.remove()
    for wrong in ("heads", True, nn.Identity()):
        with pytest.raises(ReSegError, match="it is 'auto', None or a DeepSupervision"):
            made(model, deep=wrong)


# --- what building does to a model


class Counting(UNet):
    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__(dropout=0.5)
        self.end, self.ran = end or nn.Identity(), torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        forwards.append(self.training)
        return self.end(super().forward(x))


forwards: list[bool] = []


@pytest.mark.parametrize(("end", "most"), [(None, 2), (nn.Softmax(1), 3)])
@pytest.mark.parametrize("n", [1, 2])
def test_building_runs_the_model_twice_and_leaves_it_as_it_was(end, most, n):
    torch.manual_seed(0)
    model = Counting(end)
    model.bottleneck.eval()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes, keys = [m.training for m in model.modules()], list(model.state_dict())
    image = batch(n=n)[0]
    forwards.clear()
    ours = SemiSupervised(model, image, rampup_steps=None)
    assert 1 <= len(forwards) <= most
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert list(model.state_dict()) == keys
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    ours.remove()
    ours.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ReSegError, match="hooks were removed"):
        ours.loss(*step())


# --- models that end in probabilities


def negative_log(probabilities: Tensor, label: Tensor) -> Tensor:
    """A user's loss of probabilities."""
    assert (probabilities >= 0).all(), "logits"
    assert torch.allclose(probabilities.sum(1), torch.ones(()), atol=1e-5)
    return F.nll_loss((probabilities + 1e-7).log(), label, ignore_index=IGNORED)


class EndsIn(UNet):
    def __init__(self, end: nn.Module, classes: int = 3, form: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__(classes=classes)
        self.end, self.form = end, form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.end(super().forward(x)))


def ended(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "smp":
        import segmentation_models_pytorch as smp

        options: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (8, 8, 4), "activation": "softmax2d"}
        return smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3, **options)
    return nn.Sequential(UNet(), nn.Softmax(1)) if kind == "sequential" else EndsIn(nn.Softmax(1))


@pytest.mark.parametrize("kind", ["smp", "sequential", "module"])
@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_model_that_ends_in_a_module_our_losses_take_what_that_takes(kind, compiled):
    """The loss is that of the same model without its last module."""
    torch._dynamo.reset()
    values = []
    for bare in (True, False):
        model = ended(kind)
        if bare and kind == "smp":
            model.segmentation_head[2] = nn.Identity()
        elif bare:
            model = model[0] if isinstance(model, nn.Sequential) else model
            if isinstance(model, EndsIn):
                model.end = nn.Identity()
        torch.manual_seed(3)
        run = torch.compile(model, backend="eager") if compiled and not bare else model
        _, ours = made(run, batch(size=32)[0])
        assert ours.deep is not None
        for seed in range(2):
            torch.manual_seed(4)
            loss = ours.loss(*step(seed, size=32))
            ours.update()
        values.append(flat([loss.view(1), *gradients(loss, model, ours)]))
    torch._dynamo.reset()
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["smp", "sequential", "module"])
@pytest.mark.parametrize("joint", [True, False])
def test_a_users_loss_gets_the_output_and_the_heads_pass_the_same(kind, joint):
    model = ended(kind)
    _, ours = made(model, batch(size=32)[0], task_loss=negative_log, unlabelled_loss=negative_log, joint=joint)
    shapes = []

    def noted(x: Tensor, label: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[2:]))
        return negative_log(x, label)

    ours.task_loss = noted
    ours.loss(*step(size=32)).backward()
    assert shapes[0] == (32, 32)
    assert len(shapes) == 1 + len(ours.deep.heads)
    assert all(p.grad.any() for p in ours.parameters())


def test_one_channel_that_ends_in_a_sigmoid():
    def binary(p: Tensor, label: Tensor) -> Tensor:
        assert ((p >= 0) & (p <= 1)).all(), "logits"
        counts = label != IGNORED
        return (F.binary_cross_entropy(p, label.clamp(max=1).float(), reduction="none") * counts).mean()

    image, label, others = step()
    label = (label > 0).long()[:, None]
    for loss in (None, binary):
        model, ours = made(EndsIn(nn.Sigmoid(), 1), task_loss=loss, threshold=0.52)
        ours.loss(image, label, others).backward()
        assert model.head.weight.grad.any()
        assert ours.stats()["unlabelled"] > 0


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_classes_that_exclude_each_other_cannot_overlap(end):
    model = EndsIn(end)
    alone = partial(CutMixConsistency, rampup_steps=None, ignore_index=IGNORED, output="in:end")
    for build in (made, alone):
        with pytest.raises(ReSegError, match="overlapping=True, but the model ends in the softmax module 'end'"):
            build(model, overlapping=True)
    made(EndsIn(nn.Sigmoid()), overlapping=True)


def test_classes_that_may_overlap_are_not_taken_for_others():
    model = EndsIn(nn.Sigmoid())
    said = "sigmoid module 'end' with 3 channels, so its classes may overlap: pass overlapping=True"
    with pytest.raises(ReSegError, match=said):
        made(model)
    alone = CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED, output="in:end")
    with pytest.raises(ReSegError, match=said):
        alone.loss(batch()[0], nn.CrossEntropyLoss(ignore_index=IGNORED))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("output", [None, ()])
def test_probabilities_that_no_module_makes_are_refused_with_the_recipe(compiled, output):
    class Functional(UNet):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).softmax(1)

    model = Functional()
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(ReSegError, match=r"ends in a softmax.*return the logits while self\.training"):
        made(run, output=output)


def test_deep_supervision_alone_passes_what_a_model_ends_in():
    image, label, _ = step()
    values = []
    for kind in ("module", "bare"):
        torch.manual_seed(0)
        model = ended("module")
        if kind == "bare":
            model.end = nn.Identity()
        torch.manual_seed(1)
        ds = DeepSupervision(model, image)
        assert ds.ending == ("end" if kind == "module" else None)
        model(image)
        loss = F.cross_entropy if kind == "bare" else lambda p, target: F.nll_loss(p.log(), target)
        values.append(ds.loss(label, loss))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("output", [None, "in:end"])
def test_probabilities_beside_logits_serve_the_heads_as_well(output):
    """Two outputs of the image's size, of which the first ends in the module."""
    _, ours = made(EndsIn(nn.Softmax(1), form=lambda p: (p, p.log())), output=output, task_loss=negative_log)
    ours.loss(*step()).backward()
    assert ours.consistency.ending == "end"


def test_a_wrong_module_named_by_hand_is_refused():
    for wrong, message in (
        ("in:nothing", "sigmoid or softmax module 'nothing', but from 'end'"),
        ("in:head", "sigmoid or softmax module 'head'"),
        (3.5, "output=3.5"),
    ):
        with pytest.raises(ReSegError, match=message):
            made(EndsIn(nn.Softmax(1)), output=wrong)[1].loss(*step())


# --- sizes of the output


class Quarter(UNet):
    """Logits of a quarter of the side, as SegFormer's."""

    def __init__(self, end: Callable[[Tensor], Any] = lambda y: {"logits": y}) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(F.avg_pool2d(super().forward(x), 4))


def test_logits_of_a_quarter_of_the_side_are_interpolated():
    torch.manual_seed(0)
    model, ours = made(Quarter(), task_loss=ignoring, deep=None)
    image, label, others = step()
    x, y = ours.mix(image, label, others)
    logits = model(x)
    loss = ours.loss_of(logits, y)
    full = F.interpolate(logits["logits"], (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(loss, ignoring(full[:2], label) + ignoring(full[2:], y.mixed.label))
    assert y.mixed.label.shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda y: F.interpolate(y, 13), "no float tensor"),  # a cropped output is not taken for a coarse one
        (lambda y: [y, F.interpolate(y, 8)], "no float tensor"),  # which of them?
        (lambda y: y.softmax(1), "ends in a softmax"),
        (lambda y: y[:1], "no float tensor"),
    ],
)
def test_outputs_that_do_not_tell_their_size_are_refused(end, message):
    with pytest.raises(ReSegError, match=message):
        made(Quarter(end), deep=None)[1].loss(*step())


# --- one channel, and classes that overlap


def slow_binary(logits: Tensor, label: Tensor) -> Tensor:
    """Half binary cross-entropy, half Dice, of every channel."""
    label = label.view_as(logits)
    counts, p = label != IGNORED, logits.double().sigmoid()
    total = torch.zeros((), dtype=torch.float64)
    for k in range(logits.shape[1]):
        inside, truth = p[:, k][counts[:, k]], (label[:, k][counts[:, k]] == 1).double()
        right = truth * inside.log() + (1 - truth) * (1 - inside).log()
        dice = 1 - (2 * (inside * truth).sum() + 1e-5) / ((inside**2).sum() + truth.sum() + 1e-5)
        total = total - right.sum() / label.numel() / 2 + dice / 2 / logits.shape[1]
    return total


@pytest.mark.parametrize(("overlapping", "channels"), [(True, 3), (True, 1), (False, 1)])
@pytest.mark.parametrize("others", [2, 3])
def test_sigmoids_are_sure_channel_by_channel(overlapping, channels, others):
    torch.manual_seed(0)
    model, ours = made(UNet(classes=channels), overlapping=overlapping, threshold=0.55, perturb=None, deep=None)
    image, _, unlabelled = step(others=others)
    label = torch.randint(0, 2, (2, channels, 16, 16))
    label[0, 0, :2] = IGNORED
    teacher = copy.deepcopy(model).eval()
    torch.manual_seed(1)
    x, y = ours.mix(image, label, unlabelled)
    torch.manual_seed(1)
    box = slow_boxes(torch.rand(others, 3), (16, 16))
    with torch.no_grad():
        p = teacher(unlabelled).sigmoid()
    target = torch.full_like(p, IGNORED, dtype=torch.long)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in p.shape)).tolist():
        b, rest = at[0], tuple(at[1:])
        value = p[(b - 1 if box[(b, *rest[1:])] else b, *rest)].item()
        target[tuple(at)] = 1 if value >= 0.55 else 0 if value <= 0.45 else IGNORED
    assert torch.equal(y.mixed.label, target)
    assert 0 < (target == IGNORED).sum() < target.numel()
    logits = model(x)
    loss = ours.loss_of(logits, y)
    expected = slow_binary(logits[:2], label) + slow_binary(logits[2:], target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    stats = ours.stats()
    for c in range(channels if overlapping else 2):
        taken = (p[:, c] >= 0.5) if overlapping else (p[:, 0] >= 0.5) == bool(c)
        sure = taken & (p[:, c if overlapping else 0].sub(0.5).abs() >= 0.05)
        share = sure.sum().item() / taken.sum().item() if taken.any() else math.nan
        assert stats[f"sure/{c}"] == pytest.approx(share, nan_ok=True)


# --- the value that does not count


class Ignoring(nn.Module):
    def __init__(self, ignore_index: Any) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits, label, ignore_index=self.ignore_index)


def smp_dice() -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.losses.DiceLoss("multiclass", ignore_index=7)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (nn.CrossEntropyLoss, -100),
        (smp_dice, 7),
        (lambda: Ignoring(9), 9),
        (lambda: ignoring, 255),
        (lambda: None, 255),
    ],
)
def test_pixels_that_are_not_sure_have_the_losss_own_value(make, value):
    _, ours = made(task_loss=make())
    _, y = ours.mix(*step())
    assert (y.mixed.label == value).any()
    assert ours.deep.ignore_index == value
    assert f"ignore_index={value}" in repr(ours)
    ours.loss(*step()).backward()
    assert 0 < ours.stats()["sure"] < 1


@pytest.mark.filterwarnings("ignore")  # of monai's losses on single channels
def test_a_loss_that_leaves_nothing_out_needs_another_beside_it():
    from monai.losses import DiceCELoss

    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    _, ours = made(task_loss=lambda logits, label: loss(logits, label[:, None]))
    with pytest.raises(ReSegError, match=r"must ignore the label value 255.*unlabelled_loss="):
        ours.loss(*step())
    _, ours = made(task_loss=loss, unlabelled_loss=nn.CrossEntropyLoss())
    image, label, others = step()
    ours.loss(image, label[:, None], others).backward()
    assert ours.stats()["unlabelled"] > 0


def test_the_loss_that_fails_is_named():
    def broken(logits: Tensor, label: Tensor) -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ReSegError, match=r"unlabelled_loss failed on .*mine"):
        made(unlabelled_loss=broken)[1].loss(*step())
    with pytest.raises(ReSegError, match=r"task_loss failed on labelled images.*mine"):
        made(task_loss=broken)[1].loss(*step())
    for name in ("task_loss", "unlabelled_loss"):
        with pytest.raises(ReSegError, match=f"{name} must be a function"):
            made(**{name: "dice"})


def test_two_values_and_classes_are_refused():
    with pytest.raises(ReSegError, match="'task_loss': -100, 'unlabelled_loss': 9"):
        made(task_loss=nn.CrossEntropyLoss(), unlabelled_loss=Ignoring(9))
    with pytest.raises(ReSegError, match="different label values"):
        made(unlabelled_loss=Ignoring(9))  # ours leaves 255 out
    for value in (0, 2):
        with pytest.raises(ReSegError, match=f"ignore_index={value} is one of the model's 3 classes"):
            made(task_loss=nn.CrossEntropyLoss(ignore_index=value))  # at weight 0 no pseudo-label would tell
    with pytest.raises(ReSegError, match=r"ignore_index=1 is a normal value of this label \(0 or 1\)"):
        made(task_loss=Ignoring(1), overlapping=True)
    with pytest.raises(ReSegError, match=r"255 is one of the model's 300 classes.*for instance 300"):
        made(UNet(classes=300))


def test_the_default_loss_is_ours():
    for channels, overlapping, kind in ((3, False, CrossEntropyDiceLoss), (3, True, BinaryCrossEntropyDiceLoss)):
        values = []
        for loss in (None, kind()):
            torch.manual_seed(0)
            _, ours = made(UNet(classes=channels), task_loss=loss, overlapping=overlapping)
            image, label, others = step()
            label = F.one_hot(label, 3).movedim(-1, 1) if overlapping else label
            torch.manual_seed(1)
            values.append(ours.loss(image, label, others))
        assert torch.equal(*values)


# --- states


def run_of(ours: SemiSupervised, optimizer: Any, steps: range) -> Tensor:
    losses = []
    for seed in steps:
        loss = ours.loss(*step(seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.update()
        losses.append(loss.detach())
    return torch.stack(losses)


def sgd(model: nn.Module, ours: SemiSupervised) -> torch.optim.Optimizer:
    return torch.optim.SGD([*model.parameters(), *ours.parameters()], 0.05, momentum=0.9)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "heads": lambda: UNet(dropout=0.3),
    "ends in a module": lambda: EndsIn(nn.Softmax(1)),
    "own outputs": lambda: Stacked(lambda y: y),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("with_example", [True, False])
def test_a_run_resumes_to_the_bit(kind, with_example):
    torch.manual_seed(0)
    model, ours = made(MAKERS[kind](), rampup_steps=5, weight=0.5, ema_decay=0.8)
    optimizer = sgd(model, ours)
    run_of(ours, optimizer, range(3))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict())), saved(ours), torch.get_rng_state()
    expected = run_of(ours, optimizer, range(3, 6))

    torch.manual_seed(5)
    model = MAKERS[kind]()
    model.load_state_dict(state[0][0])
    other = SemiSupervised(model, batch()[0] if with_example else None, rampup_steps=None)
    other.load_state_dict(state[1])
    optimizer = sgd(model, other)
    optimizer.load_state_dict(state[0][1])
    assert repr(other) == repr(made(MAKERS[kind](), rampup_steps=5, weight=0.5, ema_decay=0.8)[1]).replace(
        "calls=0", "calls=3"
    )
    torch.set_rng_state(state[2])
    assert torch.equal(run_of(other, optimizer, range(3, 6)), expected)
    assert all(torch.equal(v, saved(ours)["consistency"]["average"][k]) for k, v in other.average.state_dict().items())


def test_a_state_that_does_not_fit_changes_nothing():
    model, ours = made()
    run_of(ours, sgd(model, ours), range(2))
    before = saved(ours)
    good = saved(made(UNet(), rampup_steps=7, joint=False)[1])
    average = {k: v + 1 for k, v in good["consistency"]["average"].items()}
    changed = {**good, "consistency": {**good["consistency"], "average": average}}

    def inside(**entries: Any) -> dict[str, Any]:
        return {**changed, "consistency": {**changed["consistency"], **entries}}

    wrong = {
        "another net": saved(made(UNet(width=2))[1]),
        "other classes": saved(made(UNet(classes=4))[1]),
        "no heads": {**changed, "supervised": "nothing"},
        "heads without a state": {**changed, "deep": None},
        "outputs": {**changed, "supervised": "outputs", "deep": None},
        "unknown levels": {**changed, "supervised": "more"},
        "format": {**changed, "format": 7},
        "an entry": {k: v for k, v in changed.items() if k != "unsure"},
        "a threshold": inside(threshold=7.0),
        "a module": inside(output="in:nothing"),
        "no path": inside(output="in:"),
        "a weight": inside(weight=-1.0),
        "counters": {**changed, "unsure": [1, 2, 3], "labelled": [True]},
        "large numbers": {**changed, "unsure": [2**70] * 3, "labelled": [True] * 3},
        "kind": saved(CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED)),
    }
    for name, state in wrong.items():
        with pytest.raises(ReSegError):
            ours.load_state_dict(state)
        assert_same(saved(ours), before, name)
    ours.load_state_dict(changed)
    assert (ours.joint, ours.consistency.rampup_steps) == (False, 7)


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, where


def test_a_state_is_not_taken_over_what_was_chosen():
    heads, none = saved(made()[1]), saved(made(deep=None)[1])
    with pytest.raises(ReSegError, match="heads"):
        made(deep=None)[1].load_state_dict(heads)
    with pytest.raises(ReSegError, match="nothing"):
        made()[1].load_state_dict(none)
    fresh = SemiSupervised(UNet(), rampup_steps=None, joint=True)
    for use in (lambda: fresh.loss(*step()), lambda: fresh.mix(*step()), fresh.state_dict):
        with pytest.raises(ReSegError, match="pass example_input="):
            use()
    with pytest.raises(ReSegError, match="pass example_input="):
        SemiSupervised(UNet(), rampup_steps=None, deep=None).loss(*step())


def test_after_remove_a_state_sets_no_hooks():
    model, ours = made(EndsIn(nn.Softmax(1)))
    state = saved(ours)
    ours.remove()
    ours.load_state_dict(state)
    fresh = SemiSupervised(model, rampup_steps=None)
    fresh.remove()
    fresh.load_state_dict(state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_reset_begins_anew():
    model, ours = made(rampup_steps=9)
    run_of(ours, sgd(model, ours), range(2))
    assert not torch.equal(ours.average.head.weight, model.head.weight)
    ours.reset()
    assert (ours.calls, ours.consistency.calls) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(ours.average.state_dict().values(), model.state_dict().values()))


# --- warnings


def warned(run: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return caught


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("halves", [False, True])
def test_a_forgotten_update_is_warned_about_once(halves, weight):
    model, ours = made(UNet(width=1), deep=None, weight=weight)
    optimizer = sgd(model, ours)

    def run() -> None:
        for seed in range(60):
            optimizer.zero_grad()
            if halves:
                x, y = ours.mix(*step(seed, size=8))
                ours.loss_of(model(x), y).backward()
            else:
                ours.loss(*step(seed, size=8)).backward()
            optimizer.step()

    (caught,) = warned(run)
    assert "20 changes of the parameters without update()" in str(caught.message)
    assert caught.filename == __file__


def test_heads_that_no_optimizer_moves_are_warned_about_once():
    model, ours = made(UNet(width=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def run() -> None:
        for seed in range(120):
            ours.loss(*step(seed, size=8)).backward()
            optimizer.step()
            ours.update()

    (caught,) = warned(run)
    assert "semi.parameters()" in str(caught.message)
    assert caught.filename == __file__


class Never1(nn.Module):
    """A model that is sure of class 0 and of nothing else, however it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([10 + 0 * x, x.clamp(-1, 1), x.clamp(-1, 1)], 1) + self.bias


def test_a_class_without_a_sure_pixel_is_named_once(monkeypatch):
    monkeypatch.setattr(semi, "UNSURE_STEPS", 150)
    _, ours = made(Never1(), rampup_steps=40, deep=None, threshold=0.9)
    image, label, others = step(size=8)
    label = label.clamp(max=1)  # class 2 is in no label

    def run(steps: int) -> Callable[[], None]:
        return lambda: [ours.update() for _ in range(steps) if ours.loss(image, label, others) is not None] and None

    assert not warned(run(40 + 149))
    (caught,) = warned(run(300))
    assert "the labels have class 1, but the mean teacher was not sure" in str(caught.message)
    assert "150 steps after the ramp" in str(caught.message)
    assert caught.filename == __file__
    assert saved(ours)["labelled"] == [True, True, False]


def test_a_mask_of_0_and_255_is_told_of_once():
    _, ours = made(UNet(classes=1), deep=None, threshold=0.55)
    image, label, others = step(size=8)
    mask = (label > 0).byte() * 255

    def run() -> None:
        for _ in range(100):
            ours.loss(image, mask, others)
            ours.update()

    (caught,) = warned(run)
    assert "in 100 steps no label had anything but background, but labels have the value 255" in str(caught.message)
    assert not warned(run)


def test_a_label_with_more_than_the_classes_is_the_task_losses_own():
    image, label, others = step(size=8)
    _, ours = made(deep=None, task_loss=lambda x, y: ignoring(x, y[:, 0] if y.ndim == 4 else y))
    assert ours.loss(image, torch.stack([label, label], 1), others).isfinite()


def test_classes_are_counted_in_labels_of_any_form(monkeypatch):
    image, label, others = step(size=8)
    one_hot = F.one_hot(label.clamp(max=1), 3).movedim(-1, 1)
    for form in (one_hot, one_hot.float(), label.clamp(max=1).byte(), label.clamp(max=1).to(torch.uint16)[:, None]):
        _, ours = made(UNet(width=1), task_loss=lambda x, y: x.sum() * 0, unlabelled_loss=ignoring)
        ours.loss(image, form, others)
        assert saved(ours)["labelled"] == [True, True, False], form.shape


# --- misuse


def refused(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(ReSegError, match=message):
        run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, y, u: (i[0], y, u), "images must be a dense, non-empty float tensor"),
        (lambda i, y, u: (i.long(), y, u), "images must be a dense, non-empty float tensor"),
        (lambda i, y, u: (i[:0], y[:0], u), "non-empty"),
        (lambda i, y, u: (None, y, u), "images must be a dense, non-empty float tensor"),
        (lambda i, y, u: (i * math.nan, y, u), "images of this step hold NaN"),
        (lambda i, y, u: (i, y[:1], u), "does not fit the images"),
        (lambda i, y, u: (i, y[:, :8], u), "does not fit the images"),
        (lambda i, y, u: (i, torch.tensor(3), u), "does not fit the images"),
        (lambda i, y, u: (i, None, u), "a label must be a dense tensor"),
        (lambda i, y, u: (i, y[:, None, None], u), "fit"),
        (lambda i, y, u: (i, y + 5, u), "label has values"),
        (lambda i, y, u: (i, y, u[:1]), "one unlabelled image has no other"),
        (lambda i, y, u: (i, y, u[0]), "unlabelled images must be a dense float tensor"),
        (lambda i, y, u: (i, y, u * math.inf), "unlabelled images of this step hold NaN"),
        (lambda i, y, u: (i, y, None), "unlabelled images must be"),
        (lambda i, y, u: (i, y, u.double()), "joint=False"),
        (lambda i, y, u: (i, y, u[..., :8]), "joint=False"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_next_step_is_right(change, message):
    torch.manual_seed(0)
    _, ours = made()
    first = copy.deepcopy(ours.average.state_dict())
    refused(lambda: ours.loss(*change(*step())), message)
    assert ours.calls == 0
    assert all(torch.equal(v, first[k]) for k, v in ours.average.named_parameters())
    ours.loss(*step()).backward()


def test_sizes_may_differ_in_two_forwards():
    _, ours = made(joint=False)
    image, label, others = step()
    ours.loss(image, label, [others[..., :8], None]).backward()
    refused(lambda: ours.mix(image, label, others), r"runs twice a step.*Call loss\(image, label, unlabelled\)")


def test_steps_that_are_none_are_refused():
    model, ours = made()
    with torch.no_grad():
        refused(lambda: ours.loss(*step()), "gradients are off")
        refused(lambda: ours.mix(*step()), "gradients are off")
    x, y = ours.mix(*step())
    out = model(x)
    with torch.no_grad():
        refused(lambda: ours.loss_of(out, y), "gradients are off")
    model.eval()
    refused(lambda: ours.loss(*step()), "evaluation")
    refused(lambda: ours.loss_of(model(x), y), "evaluation")
    model.train()
    model(x)
    model(x)
    refused(lambda: ours.loss_of(model(x), y), "several training forwards")
    for wrong in (None, step()[1], (x, None, None), y.mixed):
        refused(lambda wrong=wrong: ours.loss_of(model(x), wrong), r"second value that mix\(\) returned")
    refused(lambda: ours.loss_of(model(x[:2]), y), "no float tensor")
    refused(lambda: ours.loss_of(model(x).detach(), y), "no gradient")
    refused(lambda: ours.loss_of(None, y), "no float tensor")
    ours.loss_of(model(x), y).backward()
    assert type(y) is Targets
    ours.remove()
    for use in (lambda: ours.loss(*step()), lambda: ours.mix(*step()), lambda: ours.loss_of(out, y)):
        refused(use, "the hooks were removed; build a new SemiSupervised")


def test_of_several_forwards_a_module_at_the_end_knows_its_own():
    """Its input is kept from the last forward, which must be the one of the output."""
    torch.manual_seed(0)
    model, ours = made(EndsIn(nn.Softmax(1)), deep=None)
    x, y = ours.mix(*step())
    out = model(x)
    model(x + 1)
    refused(lambda: ours.loss_of(out, y), "several")
    expected = ours.loss_of(model(x), y)
    with torch.no_grad():
        model(x + 1)  # leaves nothing
    out = model(x)
    model.eval(), model(x + 1), model.train()
    torch.testing.assert_close(ours.loss_of(out, y), expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rampup_steps": 0}, "rampup_steps=0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"joint": 1}, "joint=1; it is True, False, or None"),
        ({"overlapping": None}, "overlapping=None; it is True or False"),
        ({"perturb": 3}, "perturb=3"),
        ({"example": torch.tensor(1.0)}, "no float image"),
        ({"example": "image"}, "no float image"),
        ({"example": torch.zeros(2, 4, 16, 16)}, "the model fails on the example"),
        ({"model": "net"}, "needs an nn.Module as its model, got str"),
        ({"model": UNet().bfloat16(), "example": torch.zeros(2, 1, 16, 16).bfloat16()}, "bfloat16 parameters"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    refused(lambda: made(**kwargs), message)


# --- as it is used


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("end", [nn.Identity(), nn.Softmax(1)])
@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_compiled_it_gives_the_same(end, how):
    values = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = run = EndsIn(end)
        backend = CompileCounterWithBackend("aot_eager")
        if compiled and how == "model.compile":
            model.compile(backend=backend)
        elif compiled:
            run = torch.compile(model, backend=backend)
        _, ours = made(run)
        assert type(ours.average) is EndsIn
        assert list(ours.average.state_dict()) == list(model.state_dict())
        if how == "model.compile" and compiled:  # torch does not tell its backend
            ours.consistency.compile(partial(torch.compile, backend=backend))
        for seed in range(2):
            torch.manual_seed(seed)
            loss = ours.loss(*step(seed))
            ours.update()
        values.append(flat([loss.view(1), *gradients(loss, model, ours)]))
        assert (backend.frame_count >= 2) is compiled, "model and mean teacher"
    torch._dynamo.reset()
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


def test_blocks_may_be_checkpointed():
    class Checkpointed(EndsIn):
        def forward(self, x: Tensor) -> Any:
            if not self.training:
                return super().forward(x)
            end = self.end

            class Again(nn.Module):
                def forward(self, x: Tensor) -> Tensor:
                    return checkpoint(end, x, use_reentrant=False)  # pyright: ignore

            y = checkpoint(self.encoder[0], x, use_reentrant=False)
            z = UNet.forward(self, x)
            return self.form(Again()(z + 0 * y.mean()))  # pyright: ignore

    values = []
    for kind in (EndsIn, Checkpointed):
        torch.manual_seed(0)
        model, ours = made(kind(nn.Softmax(1)), threshold=0.36, joint=False)
        model.apply(lambda m: setattr(m, "momentum", 0.0) if isinstance(m, nn.BatchNorm2d) else None)
        for seed in range(2):
            torch.manual_seed(seed)
            loss = ours.loss(*step(seed))
            for p in (*model.parameters(), *ours.parameters()):
                p.grad = None
            loss.backward()
            ours.update()
        values.append(flat([loss.detach().view(1), *(p.grad for p in model.parameters())]))
    torch.testing.assert_close(*values)


def test_gradients_may_be_accumulated():
    torch.manual_seed(0)
    model, ours = made(UNet(norm=group))
    optimizer = sgd(model, ours)
    for seed in range(3):
        optimizer.zero_grad()
        for part in range(8):
            (ours.loss(*step(8 * seed + part)) / 8).backward()
        optimizer.step()
        ours.update()
    assert ours.calls == 24


def test_under_autocast():
    model, ours = made()
    seen = []
    model.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours.loss(*step())
    assert (seen, loss.dtype) == ([torch.bfloat16], torch.float32)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in (*model.parameters(), *ours.parameters()) if p.grad is not None)


@pytest.mark.parametrize("end", [None, nn.Softmax(1)])
def test_a_model_may_hold_it_and_be_copied(end):
    model = EndsIn(end or nn.Identity())
    keys = list(model.state_dict())
    _, model.semi = made(model)
    assert list(model.state_dict()) == keys
    model.semi.loss(*step()).backward()
    other = copy.deepcopy(model)
    assert torch.equal(other.eval()(batch()[0]), model.eval()(batch()[0]))
    model.train()
    model.semi.loss(*step()).backward()
    _, another = made(model)  # copies the model again
    another.loss(*step()).backward()


def test_targets_survive_what_frameworks_do_to_batches():
    model, ours = made(task_loss=ignoring)
    x, y = ours.mix(*step())
    moved = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, y)
    out = model(x)
    torch.manual_seed(0)
    expected = ours.loss_of(out, y)
    model(x)
    torch.testing.assert_close(ours.loss_of(out, moved), expected)


def test_lists_and_meta_tensors_are_unwrapped():
    from monai.data.meta_tensor import MetaTensor

    _, ours = made()
    image, label, others = step()
    loss = ours.loss([MetaTensor(image)], [MetaTensor(label), None], (MetaTensor(others),))
    assert type(loss) is Tensor
    loss.backward()


def test_a_task_loss_that_writes_into_its_label_is_refused():
    """The heads would learn the ignored pixels as background."""

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        counts = label != IGNORED
        label[~counts] = 0
        return (F.cross_entropy(logits, label, reduction="none") * counts).mean()

    image, label, unlabelled = step()
    _, semi = made(task_loss=loss)
    with pytest.raises(ReSegError, match="task_loss writes into its label"):
        semi.loss(image, label.index_fill(2, torch.tensor([0]), IGNORED), unlabelled)


def test_a_model_without_gradients_is_refused():
    """As a mean teacher of an earlier training is one."""
    _, semi = made()
    semi.remove()
    _, again = made(semi.average.train())
    with pytest.raises(ReSegError, match="no parameter of the model requires a gradient"):
        again.loss(*step())
    semi.average.requires_grad_(True)
    again.loss(*step()).backward()
    assert all(p.grad is not None for p in semi.average.parameters())


def test_the_heads_parameters_are_not_known_without_an_example():
    semi = SemiSupervised(UNet(), rampup_steps=None)
    with pytest.raises(ReSegError, match="pass example_input="):
        semi.parameters()
