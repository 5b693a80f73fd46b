"""Deep supervision: equal to a hand-written one bit for bit, and by the same rules as the wrapper."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PadsInside, UNet, batch, saved, task_loss
from torch import Tensor, nn

from reseg_loss import DeepSupervision, FeatureExtractor, ReSegError, ReSegWrapper
from reseg_loss.supervision import nearest


def supervised(model: nn.Module | None = None, **kwargs) -> tuple[nn.Module, DeepSupervision]:
    model = model or UNet()
    return model, DeepSupervision(model, batch()[0], **kwargs)


class DeeplySupervised(UNet):
    """A U-Net with heads at strides 2 and 4 written into its forward."""

    def __init__(self, plain: UNet, heads: nn.ModuleDict):
        super().__init__()
        self.load_state_dict(plain.state_dict())
        self.heads = nn.ModuleList([copy.deepcopy(heads["decoder_1"]), copy.deepcopy(heads["decoder_2"])])

    def forward(self, x: Tensor) -> list[Tensor]:
        e1 = self.encoder[0](x)
        e2 = self.encoder[1](self.pool(e1))
        e4 = self.encoder[2](self.pool(e2))
        d4 = self.decoder[0](torch.cat([self.up[0](self.bottleneck(self.pool(e4))), e4], 1))
        d2 = self.decoder[1](torch.cat([self.up[1](d4), e2], 1))
        d1 = self.decoder[2](torch.cat([self.up[2](d2), e1], 1))
        return [self.head(d1), self.heads[0](d2), self.heads[1](d4)]


def test_it_agrees_with_a_hand_written_deep_supervision_bit_for_bit():
    torch.manual_seed(0)
    model, ds = supervised()
    byhand = DeeplySupervised(model, ds.heads)
    ours = torch.optim.Adam([*model.parameters(), *ds.parameters()], 1e-2)
    theirs = torch.optim.Adam(byhand.parameters(), 1e-2)
    for step in range(5):
        image, label = batch(seed=step)
        loss = task_loss(model(image), label) + ds.loss(label, task_loss)
        outputs = byhand(image)
        small = [F.interpolate(label[:, None].float(), o.shape[2:], mode="nearest")[:, 0].long() for o in outputs[1:]]
        side = task_loss(outputs[1], small[0]) + task_loss(outputs[2], small[1])
        expected = task_loss(outputs[0], label) + side
        assert torch.equal(loss, expected)
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    state = byhand.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(ds.heads["decoder_2"].weight, byhand.heads[1].weight)


def test_the_models_keys_and_outputs_stay_and_remove_leaves_it_bare():
    torch.manual_seed(0)
    model = UNet()
    image, label = batch()
    keys, expected = list(model.state_dict()), model(image)
    model, ds = supervised(model)
    assert torch.equal(model(image), expected)
    ds.loss(label, task_loss)
    assert list(model.state_dict()) == keys
    ds.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(image)
    with pytest.raises(ReSegError, match="hooks were removed"):
        ds.loss(label, task_loss)
    late = DeepSupervision(model, num_classes=3)
    late.remove()
    late.load_state_dict(ds.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.bool]))
def test_nearest_labels_are_those_of_interpolate_in_any_form_and_dtype(h, w, dtype):
    label = torch.randint(0, 2, (2, 9, 9)).to(dtype)
    expected = F.interpolate(label[:, None].float(), (h, w), mode="nearest")
    for form, values in ((label, expected[:, 0]), (label[:, None], expected)):
        small = nearest(form, (h, w))
        assert small.dtype == dtype
        assert torch.equal(small.float(), values)


def test_task_loss_gets_the_label_in_the_form_it_came_in():
    image, label = batch()
    label[:, :3] = 255
    one_hot = F.one_hot(label.clamp_max(2), 3).movedim(-1, 1)
    for form in (label, label[:, None], label[:, None].float(), label.byte(), one_hot, [label, None]):
        model, ds = supervised()
        got = []

        def remember(logits: Tensor, small: Tensor, got: list = got) -> Tensor:
            got.append((logits.shape, small))
            return logits.sum() * 0

        model(image)
        ds.loss(form, remember)
        plain = form[0] if isinstance(form, list) else form
        assert [tuple(s) for s, _ in got] == [(2, 3, 8, 8), (2, 3, 4, 4)]
        assert all(small.dtype == plain.dtype and small.ndim == plain.ndim for _, small in got)
        assert all(torch.equal(small, plain[..., ::r, ::r]) for (_, small), r in zip(got, (2, 4)))


def test_weights():
    model, ds = supervised(level_weights=[1.0, 0.5])
    assert list(ds.heads) == ["decoder_1", "decoder_2"]
    assert [ds.weight_of(name) for name in ds.heads] == [1.0, 0.5]
    image, label = batch()
    for weight in (1.0, 0.25):
        ds.weight = weight
        model(image)
        value = ds.loss(label, lambda logits, target: logits.new_ones(()) + 0 * logits.sum())
        assert value.item() == pytest.approx(1.5 * weight)
    ds.weight = 0
    zero = ds.loss(label, task_loss)
    zero.backward()
    assert zero.item() == 0


@pytest.mark.parametrize("weights", [{2: 1.0, 4: 0.5}, {1.0, 0.5}], ids=["dict", "set"])
def test_weights_without_an_order_are_refused(weights):
    with pytest.raises(ReSegError, match="pass one weight for each level, the finest first"):
        supervised(level_weights=weights)


def test_probabilities_that_no_softmax_ends_in_are_refused():
    class Masked(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1) * torch.ones_like(x)

    with pytest.raises(ReSegError, match="ends in a softmax, and your task loss takes probabilities"):
        DeepSupervision(Masked(), batch()[0])


def test_gradients_of_the_heads_that_were_not_cleared_are_told_of_once():
    model, ds = supervised()
    image, label = batch()

    def step(clear: Any) -> None:
        clear.zero_grad()
        model(image)
        ds.loss(label, task_loss).backward()

    both = torch.optim.SGD([*model.parameters(), *ds.parameters()], 0.1)
    for _ in range(2):
        step(both)
    model(image)
    ds.loss(label, task_loss).backward()  # accumulated
    with pytest.warns(UserWarning, match="the heads still have the gradients of an earlier step"):
        step(model)
    step(model)


def test_weight_zero_equals_the_run_without():
    runs = []
    for supervised in (True, False):
        torch.manual_seed(1)
        model = UNet(dropout=0.3)
        ds = DeepSupervision(model, batch()[0]) if supervised else None
        if ds is not None:
            ds.weight = 0
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            image, label = batch(seed=step)
            loss = task_loss(model(image), label)
            if ds is not None:
                loss = loss + ds.loss(label, task_loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values()))


def test_a_state_resumes_without_an_example_and_keeps_parameters_where_it_fits():
    model, ds = supervised(level_weights=[1.0, 0.5])
    image, label = batch()
    model(image)
    ds.loss(label, task_loss)
    state = saved(ds)
    model(image)
    expected = ds.loss(label, task_loss)
    ds.remove()
    fresh = DeepSupervision(model, num_classes=3)
    fresh.load_state_dict(state)
    model(image)
    assert torch.equal(fresh.loss(label, task_loss), expected)
    before = list(fresh.parameters())
    fresh.load_state_dict(state)
    assert all(a is b for a, b in zip(before, fresh.parameters()))
    fresh = DeepSupervision(UNet())  # the state tells the classes
    fresh.load_state_dict(state)
    assert fresh.num_classes == 3
    with pytest.raises(ReSegError, match="3 classes, not 4"):
        DeepSupervision(UNet(), num_classes=4).load_state_dict(state)


def test_a_state_holds_the_default_weights_so_that_a_change_of_them_leaves_it_as_it_was():
    _, ds = supervised()
    assert saved(ds)["level_weights"] == [1.0, 1.0]
    _, other = supervised(level_weights=[1.0, 0.5])
    ds.load_state_dict(saved(other))
    assert [ds.weight_of(name) for name in ds.heads] == [1.0, 0.5]


def test_it_works_beside_the_wrapper_in_3d_and_under_autocast():
    image, label = batch(dims=3, size=16)
    model = UNet(dims=3)
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    ds = DeepSupervision(model, image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(image)
    side = ds.loss(label, lambda x, y: F.cross_entropy(x.float(), y) if x.dtype == torch.bfloat16 else 1 / 0)
    (task_loss(logits, label) + reseg.alignment_loss(label) + side).backward()
    assert all(p.grad is not None for p in ds.parameters())
    assert model.encoder[0][0].weight.grad is not None


def test_the_rules_of_the_extractor_hold():
    model, ds = supervised()
    image, label = batch()
    with pytest.raises(ReSegError, match="no training forward"):
        ds.loss(label, task_loss)
    model(image)
    model(image)
    with pytest.raises(ReSegError, match="several training forwards"):
        ds.loss(label, task_loss)
    model(image)
    with ds.record():
        model(image)
    model(image)
    ds.loss(label, task_loss)
    model(image)
    with pytest.raises(ReSegError, match="does not fit an image"):
        ds.loss(label[:1], task_loss)
    model(image)
    with pytest.raises(ReSegError, match="must return a scalar"):
        ds.loss(label, lambda logits, target: F.cross_entropy(logits, target, reduction="none"))
    model(image)
    with pytest.raises(ReSegError, match="task_loss returned tuple; it must return a scalar"):
        ds.loss(label, lambda logits, target: (task_loss(logits, target), {}))  # pyright: ignore[reportArgumentType]
    model.eval()
    with pytest.raises(ReSegError, match="evaluation"):
        ds.loss(label, task_loss)


def test_heads_that_no_optimizer_knows_are_warned_about_once():
    model, ds = supervised(UNet(width=2))
    image, label = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(120):
            model(image)
            ds.loss(label, task_loss).backward()
    assert len(caught) == 1
    assert "ds.parameters()" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"level_weights": [1.0]}, "1 weights for 2 levels"),
        ({"level_weights": [-1.0, 1.0]}, "level_weights"),
    ],
)
def test_bad_choices_are_refused(kwargs, message):
    with pytest.raises(ReSegError, match=message):
        supervised(**kwargs)
    with pytest.raises(ReSegError, match="example_input="):
        DeepSupervision(UNet(), num_classes=3).parameters()
    with pytest.raises(ReSegError, match="example_input="):
        DeepSupervision(UNet(), num_classes=3, taps=batch()[0])  # pyright: ignore[reportArgumentType]


def test_only_the_features_that_are_supervised_are_recorded():
    (image, _), model = batch(), UNet()
    with FeatureExtractor(model, example_input=image) as everything:
        plan, decoder = everything.plan, FeatureExtractor(model, taps=everything.plan, decoder_only=True)
        with decoder:
            model(image)
            every, some = everything.pop(), decoder.pop()
    assert all(torch.equal(a, b) for a, b in zip(some.decoder, every.decoder, strict=True))
    assert (some.encoder, some.bottleneck.numel()) == ((), 0)
    model, ds = supervised()
    hooked = [name for name, module in model.named_modules() if name and module._forward_hooks]
    assert len(hooked) == len(ds.extractor.taps) == len(plan.selected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16])
def test_a_level_that_is_all_ignored_is_left_out(dtype):
    image, label = batch()
    label[:] = 255
    label[0, 5, 5] = 1  # no nearest neighbour of a coarser grid
    model, ds = supervised(ignore_index=255)
    task = lambda x, y: F.cross_entropy(x, y.long(), ignore_index=255)  # noqa: E731
    loss = task(model(image), label) + ds.loss(label.to(dtype), task)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not any(p.grad.any() for p in ds.parameters())
    label[0, 4, 4] = 2
    model(image)
    assert ds.loss(label.to(dtype), task).item() > 0


def test_a_forward_that_enters_autocast_itself_is_seen_as_such():
    class Entering(UNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    image, label = batch()
    model = Entering()
    reseg = ReSegWrapper(model, example_input=image)
    reseg.freeze_teacher()
    ds = DeepSupervision(model, image)
    model(image)
    assert reseg.extractor.take().autocast == (True, torch.bfloat16)
    ds.extractor.forget()
    model(image)
    (reseg.alignment_loss(label) + ds.loss(label, task_loss)).backward()


class PaddingUNet(PadsInside, UNet):
    """A U-Net for images of any size."""


def test_a_label_is_not_stretched_over_what_a_model_pads_inside():
    model, ds = supervised(PaddingUNet())
    image, label = batch(size=48)
    model(image[..., :45, :46])  # to 48: less than two cells
    ds.loss(label[..., :45, :46], task_loss)
    model(image[..., :36, :48])  # from 36 to 48: six cells of stride 2
    with pytest.raises(ReSegError, match=r"stride \(2, 2\) have size \(24, 24\) .* \(36, 48\).*Pad image and label"):
        ds.loss(label[..., :36, :48], task_loss)


def test_stats_are_the_parts_of_the_loss():
    image, label = batch()
    model = UNet()
    ds = DeepSupervision(model, image, level_weights=[1.0, 0.5, 0.25][: len(UNet.taps["decoder"]) - 1])
    ds.weight = 0.5
    assert ds.stats() == {"weight": 0.5}
    seen: list[float] = []

    def noted(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        value = task_loss(logits, target)
        seen.append(float(value.detach()))
        return value

    model(image)
    loss = float(ds.loss(label, noted).detach())
    stats = ds.stats()
    assert [stats["decoder_1"], stats["decoder_2"]] == pytest.approx(seen)
    assert [stats["weighted/decoder_1"], stats["weighted/decoder_2"]] == pytest.approx([seen[0] / 2, seen[1] / 4])
    assert stats["weighted/decoder_1"] + stats["weighted/decoder_2"] == pytest.approx(loss)
    assert stats["loss"] * stats["weight"] == pytest.approx(loss)
    assert stats["weight"] == 0.5
    assert len(stats) == 6
    ds.weight = 0
    model(image)
    ds.loss(label, task_loss)
    assert ds.stats() == {"weight": 0.0}


def test_an_ignored_value_that_the_labels_dtype_cannot_hold_leaves_no_level_out():
    def loss(logits: Tensor, label: Tensor) -> Tensor:
        return task_loss(logits, label.long())

    image, label = batch()
    model, ds = supervised(ignore_index=256)  # which wraps to 0
    values = []
    for dtype in (torch.int64, torch.uint8):
        model(image)
        values.append(ds.loss(torch.zeros_like(label, dtype=dtype), loss))
    assert torch.equal(*values)
    assert values[0] > 0
