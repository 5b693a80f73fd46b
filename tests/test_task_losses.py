"""The task losses against slow references and torch's own, their gradients, precision, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.evidence.losses import segmentation_loss
from reseg_loss import DeepSupervision, ReSegError, task_losses
from reseg_loss.task_losses import BinaryCrossEntropyDiceLoss, CrossEntropyDiceLoss

WEIGHTS = (0.5, 2.0, 1.25)
spatials = st.one_of(st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 3)] * 3))
kinds = pytest.mark.parametrize("kind", ["exclusive", "weighted", "binary"])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def batch_of(
    shape: tuple[int, ...], binary: bool = False, ignored: float = 0.3, seed: int = 0, ignore_index: int = 255
) -> tuple[Tensor, Tensor]:
    """Logits in fp64 and a label in int64, a share of which is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    form = shape if binary else (shape[0], *shape[2:])
    label = torch.randint(0, 2 if binary else shape[1], form, generator=generator)
    return logits, label.masked_fill(torch.rand(form, generator=generator) < ignored, ignore_index)


def of(kind: str, ignored: float = 0.3, shape: tuple[int, ...] = (2, 3, 5, 4)) -> tuple[Any, Tensor, Tensor]:
    loss: Callable[[Tensor, Tensor], Tensor] = {
        "exclusive": CrossEntropyDiceLoss(),
        "weighted": CrossEntropyDiceLoss(class_weights=WEIGHTS),
        "binary": BinaryCrossEntropyDiceLoss(),
    }[kind]
    return loss, *batch_of(shape, kind == "binary", ignored)


# --- values ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(2, 4), spatials, st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.booleans())
def test_exclusive_classes_agree_with_the_reference(batch, classes, spatial, ignored, weighted, with_channel):
    logits, label = batch_of((batch, classes, *spatial), ignored=ignored, seed=batch)
    weights = [0.0, 3.0, 1.5, 0.25][:classes] if weighted else None
    expected = reference.cross_entropy_dice(logits.numpy(), label.numpy(), 255, weights)
    actual = CrossEntropyDiceLoss(class_weights=weights)(logits, label.unsqueeze(1) if with_channel else label)
    assert actual.ndim == 0
    assert float(actual) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.integers(1, 3), spatials, st.sampled_from([0.0, 0.4, 1.0]), st.sampled_from([255, -1]))
def test_overlapping_classes_agree_with_the_reference(batch, channels, spatial, ignored, ignore_index):
    shape = (batch, channels, *spatial)
    logits, label = batch_of(shape, binary=True, ignored=ignored, seed=batch, ignore_index=ignore_index)
    expected = reference.binary_cross_entropy_dice(logits.numpy(), label.numpy(), ignore_index)
    loss = BinaryCrossEntropyDiceLoss(ignore_index)
    assert float(loss(logits, label)) == pytest.approx(expected, abs=1e-12)
    if channels == 1:
        assert loss(logits, label.squeeze(1)) == loss(logits, label)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(3, 4, 9, 7), (2, 2, 3, 5, 4)])
def test_it_is_the_loss_of_the_measurements(shape, ignored):
    logits, label = batch_of(shape, ignored=ignored)
    logits = logits.float().requires_grad_()
    values = [loss(logits, label) for loss in (CrossEntropyDiceLoss(), segmentation_loss)]
    ours, theirs = (torch.autograd.grad(value, logits)[0] for value in values)
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_cross_entropy_is_torchs_times_the_share_of_pixels_that_count(weights):
    """Told from Dice, which is bounded, by logits that are very wrong."""
    logits, label = batch_of((2, 3, 6, 6))
    share = (label != 255).double().mean()
    w = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    for scale in (1e3, 1e6):
        torchs = F.cross_entropy(scale * logits, label, w, ignore_index=255) * share
        ours = CrossEntropyDiceLoss(class_weights=weights)(scale * logits, label)
        assert abs(float(2 * ours - torchs)) <= 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.float32])
@kinds
def test_labels_of_every_dtype_mean_the_same(kind, dtype):
    loss, logits, label = of(kind)
    assert loss(logits, label.to(dtype)) == loss(logits, label)


def test_a_bool_label_is_0_and_1():
    logits, label = batch_of((2, 2, 4, 4), ignored=0)
    assert CrossEntropyDiceLoss()(logits, label.bool()) == CrossEntropyDiceLoss()(logits, label)
    logits, label = batch_of((2, 2, 4, 4), binary=True, ignored=0)
    assert BinaryCrossEntropyDiceLoss()(logits, label.bool()) == BinaryCrossEntropyDiceLoss()(logits, label)


@kinds
def test_memory_order_and_subclasses_do_not_matter(kind):
    class Named(Tensor):
        pass

    loss, logits, label = of(kind)
    expected = loss(logits, label)
    for x in (logits.contiguous(memory_format=torch.channels_last), torch.stack([logits, logits], -1)[..., 0]):
        torch.testing.assert_close(loss(x, label), expected)
    value = loss(logits.as_subclass(Named), label.as_subclass(Named))
    assert type(value) is Tensor
    assert value == expected


# --- what does not count ---------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ignored_pixels_have_no_gradient_and_no_influence(kind, dtype):
    loss, logits, label = of(kind, shape=(2, 3, 8, 6))
    ignored = label == 255 if kind == "binary" else (label == 255).unsqueeze(1).expand(logits.shape)
    logits = logits.to(dtype).requires_grad_()
    value = loss(logits, label)
    value.backward()
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).all()
    for other in (100.0, torch.nan, -torch.inf):
        leaf = logits.detach().masked_fill(ignored, other).requires_grad_()
        again = loss(leaf, label)
        again.backward()
        assert again == value
        assert torch.equal(leaf.grad, logits.grad)


@kinds
def test_the_value_that_is_ignored_is_the_one_that_was_said(kind):
    loss, logits, label = of(kind)
    expected = loss(logits, label)
    other = copy.copy(loss)
    other.ignore_index = -1
    assert other(logits, torch.where(label == 255, -1, label)) == expected


@kinds
def test_where_nothing_counts_the_loss_is_0_with_a_gradient_of_0(kind):
    loss, logits, label = of(kind, ignored=1.0)
    logits.requires_grad_()
    value = loss(logits, label)
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


def test_a_class_of_weight_0_has_no_part():
    logits, label = batch_of((2, 2, 4, 4))
    only = torch.where(label == 1, 255, label)  # of class 0 alone
    logits.requires_grad_()
    value = CrossEntropyDiceLoss(class_weights=(0, 1))(logits, only)
    value.backward()
    p = logits.softmax(1)[:, 1][only == 0]
    assert value.item() == pytest.approx(0.5 * (1 - 1e-5 / (p.square().sum().item() + 1e-5)))
    assert logits.grad.isfinite().all()


def test_few_sure_pixels_weigh_little():
    """Twice the pixels of which half are ignored: half the cross-entropy."""
    logits, label = batch_of((1, 3, 6, 6), ignored=0)
    dice = CrossEntropyDiceLoss()(50 * logits, label) * 2 - F.cross_entropy(50 * logits, label)
    padded = torch.cat([label, torch.full_like(label, 255)])
    half = CrossEntropyDiceLoss()(50 * logits.repeat(2, 1, 1, 1), padded) * 2 - dice
    assert float(half) == pytest.approx(float(F.cross_entropy(50 * logits, label)) / 2)


# --- gradients and precision -----------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (2, 3, 2, 3, 2)])
def test_gradients(kind, ignored, shape):
    loss, logits, label = of(kind, ignored, shape)
    assert torch.autograd.gradcheck(lambda x: 3 * loss(x, label), logits.requires_grad_())


def naive(kind: str, logits: Tensor, label: Tensor) -> Tensor:
    """The plain formula, in the dtype of the logits."""
    counts = label != 255
    if kind == "binary":
        positive, p = (label == 1).to(logits.dtype), logits.sigmoid()
        nll = torch.where(counts, F.binary_cross_entropy_with_logits(logits, positive, reduction="none"), 0)
        cross_entropy, w, p = nll.sum() / label.numel(), torch.ones(logits.shape[1]), torch.where(counts, p, 0)
    else:
        w = torch.tensor(WEIGHTS if kind == "weighted" else (1.0,) * logits.shape[1]).to(logits.dtype)
        cross_entropy = F.cross_entropy(logits, label, w, ignore_index=255) * counts.sum() / label.numel()
        positive = F.one_hot(label.masked_fill(~counts, 3), 4)[..., :3].movedim(-1, 1).to(logits.dtype)
        p = torch.where(counts.unsqueeze(1), logits.softmax(1), 0)
    axes = (0, *range(2, logits.ndim))
    sizes = p.square().sum(axes) + positive.square().sum(axes)
    dice = 1 - (2 * (p * positive).sum(axes) + 1e-5) / (sizes + 1e-5)
    return 0.5 * cross_entropy + 0.5 * (w * dice).sum() / w.sum()


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_within_twice_the_naive_error(kind, dtype):
    loss, logits, label = of(kind, shape=(3, 3, 31, 17))
    results = {}
    for name, function in {
        "exact": lambda x: naive(kind, x.double(), label),
        "naive": lambda x: naive(kind, x.to(dtype), label),
        "ours": lambda x: loss(x.to(dtype), label),
    }.items():
        leaf = logits.to(dtype).double().requires_grad_()
        value = function(leaf)
        value.backward()
        results[name] = (value.detach().double(), leaf.grad)
    for i in (0, 1):
        error = (results["ours"][i] - results["exact"][i]).abs().max()
        assert error <= 2 * (results["naive"][i] - results["exact"][i]).abs().max()


@kinds
def test_a_large_volume_in_half_precision_is_summed_in_fp32(kind):
    loss, logits, label = of(kind, shape=(1, 3, 512, 512))
    value = loss(logits.half(), label)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(loss(logits.half().double(), label)), rel=1e-5)


@kinds
def test_autocast_changes_nothing(kind):
    loss, logits, label = of(kind)
    expected = loss(logits.bfloat16(), label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(logits.bfloat16(), label) == expected


# --- what is refused -------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("value", [3, 7, -1, 254])
def test_other_values_of_a_label_are_named(kind, value):
    loss, logits, label = of(kind)
    loss(logits, label)
    label[0, 0, 0] = value
    with pytest.raises(ReSegError, match=rf"label has values \[{value}\.0\]"):
        loss(logits, label)


@pytest.mark.parametrize("value", [0.5, torch.nan])
@kinds
def test_values_of_a_float_label_are_whole(kind, value):
    loss, logits, label = of(kind)
    label = label.double()
    label[0, 0, 0] = value
    with pytest.raises(ReSegError, match=rf"label has values \[{value}[],]"):
        loss(logits, label)


@kinds
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own making
def test_where_values_may_not_be_read_other_values_give_nan(kind):
    loss, logits, label = of(kind)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaf = logits.clone().requires_grad_()
    value = compiled(leaf, label)
    value.backward()
    torch.testing.assert_close(value, loss(logits, label))
    (gradient,) = torch.autograd.grad(loss(x := logits.clone().requires_grad_(), label), x)
    torch.testing.assert_close(leaf.grad, gradient)
    wrong = label.clone()
    wrong[0, 0, 0] = 7
    leaf = logits.clone().requires_grad_()
    value = compiled(leaf, wrong)
    value.backward()
    assert value.isnan()
    assert leaf.grad.isnan().any()
    with pytest.raises(ReSegError, match="values"):  # the compiled calls have not passed for a look at the values
        loss(logits, wrong)


@pytest.mark.parametrize("ignore_index", [0, 2])
def test_a_class_cannot_be_ignored(ignore_index):
    logits, label = batch_of((2, 3, 4, 4), ignored=0)
    with pytest.raises(ReSegError, match=f"ignore_index={ignore_index} is one of the 3 classes"):
        CrossEntropyDiceLoss(ignore_index)(logits, label)
    with pytest.raises(ReSegError, match="ignore_index=1 is a normal value of this label"):
        BinaryCrossEntropyDiceLoss(1)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((2, 3, 4, 4), r"it must be \(2, 4, 4\) or \(2, 1, 4, 4\)"),
        ((2, 4, 5), r"label of shape \(2, 4, 5\)"),
        ((1, 4, 4), "does not fit"),
        ((4, 4), "does not fit"),
    ],
)
def test_labels_of_other_shapes_are_never_broadcast(shape, told):
    logits, _ = batch_of((2, 3, 4, 4))
    with pytest.raises(ReSegError, match=told):
        CrossEntropyDiceLoss()(logits, torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(("channels", "form"), [(3, (2, 4, 4)), (3, (2, 1, 4, 4)), (1, (2, 3, 4, 4)), (1, (1, 4, 4))])
def test_binary_labels_of_other_shapes_are_never_broadcast(channels, form):
    logits, _ = batch_of((2, channels, 4, 4))
    with pytest.raises(ReSegError, match=rf"must be \(2, {channels}, 4, 4\)"):
        BinaryCrossEntropyDiceLoss()(logits, torch.zeros(form))


@pytest.mark.parametrize("loss", [CrossEntropyDiceLoss(), BinaryCrossEntropyDiceLoss()])
def test_what_is_no_batch_is_named(loss):
    logits, label = batch_of((2, 2, 4, 4), binary=True)
    for wrong in (logits.long(), [logits], logits[0, 0], None):
        with pytest.raises(ReSegError, match="logits must be a dense floating point tensor"):
            loss(wrong, label)
    with pytest.raises(ReSegError, match="the batch is empty"):
        loss(logits[:0], label[:0])
    with pytest.raises(ReSegError, match="a label must be a dense tensor"):
        loss(logits, None)


def test_one_channel_is_referred_to_the_other_loss():
    logits, label = batch_of((2, 1, 4, 4))
    with pytest.raises(ReSegError, match="use BinaryCrossEntropyDiceLoss"):
        CrossEntropyDiceLoss()(logits, label)


@pytest.mark.parametrize("weights", [(1, -1), (0, 0), (), (1, float("nan")), 3, "ab"])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ReSegError, match="class_weights"):
        CrossEntropyDiceLoss(class_weights=weights)


@pytest.mark.parametrize("made", [CrossEntropyDiceLoss, BinaryCrossEntropyDiceLoss])
@pytest.mark.parametrize("value", [1.5, None, "255", True])
def test_ignore_index_is_a_whole_number(made, value):
    with pytest.raises(ReSegError, match="ignore_index="):
        made(value)


def test_there_is_a_weight_for_each_class():
    logits, label = batch_of((2, 3, 4, 4))
    with pytest.raises(ReSegError, match="class_weights has 2 numbers, the logits 3 classes"):
        CrossEntropyDiceLoss(class_weights=(1, 2))(logits, label)


# --- as a module ------------------------------------------------------------------------------------------------------


def test_weights_may_be_a_tensor_or_an_array():
    logits, label = batch_of((2, 3, 4, 4))
    values = [CrossEntropyDiceLoss(class_weights=w)(logits, label) for w in (WEIGHTS, torch.tensor(WEIGHTS))]
    assert values[0] == values[1] == CrossEntropyDiceLoss(class_weights=np.array(WEIGHTS, np.float32))(logits, label)


def test_they_tell_their_settings_and_hold_no_state():
    loss = CrossEntropyDiceLoss(class_weights=WEIGHTS)
    logits, label = batch_of((2, 3, 4, 4))
    value = loss(logits, label)
    assert repr(loss) == "CrossEntropyDiceLoss(ignore_index=255, class_weights=[0.5, 2.0, 1.25])"
    assert repr(task_losses.BinaryCrossEntropyDiceLoss(-1)) == "BinaryCrossEntropyDiceLoss(ignore_index=-1)"
    assert loss.ignore_index == 255
    assert not loss.state_dict()
    assert not [*loss.parameters()]
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert copied(logits, label) == value
    assert loss(logits.float(), label).dtype == torch.float32  # the weights follow


def test_it_serves_deep_supervision():
    from models import UNet, batch

    image, label = batch()
    model = UNet()
    deep = DeepSupervision(model, example_input=image, ignore_index=255)
    label = torch.where(torch.rand(label.shape) < 0.3, 255, label)
    loss = CrossEntropyDiceLoss()
    logits = model(image)
    total = loss(logits, label) + deep.loss(label, loss)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in deep.parameters())


# --- on a GPU -------------------------------------------------------------------------------------------------------


@needs_cuda
@kinds
def test_steps_after_the_first_neither_read_values_nor_break_a_cuda_graph(kind):
    loss, logits, label = of(kind, shape=(2, 3, 16, 16))
    expected, wrong = loss(logits, label), label.clone()
    wrong[0, 0, 0] = 7
    device = torch.device("cuda")
    logits, label = logits.to(device).requires_grad_(), label.to(device)
    with pytest.raises(ReSegError, match="values"):
        type(loss)()(logits, wrong.to(device))
    loss(logits, label).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(logits, label).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        loss(logits, label).backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    logits.grad = None
    with torch.cuda.graph(graph):
        value = loss(logits, label)
        value.backward()
    graph.replay()
    torch.testing.assert_close(value.cpu(), expected)
    gradient = logits.grad.clone()
    label.copy_(wrong)
    graph.replay()
    assert value.isnan()
    label[0, 0, 0] = 1
    graph.replay()
    assert value.isfinite()
    assert gradient.isfinite().all()
    torch.use_deterministic_algorithms(True)
    try:
        loss(logits, label).backward()
    finally:
        torch.use_deterministic_algorithms(False)
