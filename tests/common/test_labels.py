"""Label forms, the teacher's input, the valid mask, and what is refused."""

from __future__ import annotations

import pytest
import torch

from reseg_loss import ReSegError
from reseg_loss.common.inputs import unpack_batch
from reseg_loss.common.labels import LabelEncoding, has_value, plain_label

INDEX = torch.tensor([[[0, 1], [2, 255]]])  # (1, 2, 2)
IMAGE = (1, 1, 2, 2)


def one_hot(index: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.stack([index == c for c in range(classes)], 1)


@pytest.mark.parametrize(
    "label",
    [
        INDEX,
        INDEX.unsqueeze(1),
        INDEX.to(torch.uint8),
        INDEX.float(),
        torch.where(INDEX.unsqueeze(1) == 255, 255, one_hot(INDEX, 3).long()),
    ],
)
@pytest.mark.parametrize("mode", ["index", "onehot"])
def test_every_form_gives_the_same_input_and_mask(label, mode):
    encoding = LabelEncoding(mode, 3, 2, ignore_index=255)
    encoding.check_shape(label, IMAGE)
    encoding.check_values(label)
    encoded, valid = encoding.encode(label)
    expected = torch.tensor([[[[0.0, 1], [2, 0]]]])
    if mode == "onehot":
        expected = torch.tensor([[[[1.0, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]]])
    assert torch.equal(encoded, expected)
    assert torch.equal(valid, torch.tensor([[[[1.0, 1], [1, 0]]]]))
    assert encoded.shape[1] == encoding.channels


def test_binary_and_multi_label():
    binary = LabelEncoding("onehot", 1, 2)
    mask = torch.tensor([[[0, 1], [1, 0]]])
    for label in (mask, mask.bool(), mask.unsqueeze(1).float()):
        binary.check_values(label)
        assert torch.equal(binary.encode(label)[0], mask.unsqueeze(1).float())
    with pytest.raises(ReSegError, match="from 0 to 1"):
        binary.check_values(2 * mask)
    regions = torch.tensor([[[[1, 1], [0, 0]], [[0, 1], [0, 0]]]], dtype=torch.bool)
    multi = LabelEncoding("onehot", 2, 2)
    multi.check_values(regions)
    assert torch.equal(multi.encode(regions)[0], regions.float())
    assert multi.encode(regions)[1] is None
    with pytest.raises(ReSegError, match="label_input='onehot'"):
        LabelEncoding("index", 2, 2).check_values(regions)


def test_3d():
    label = torch.randint(0, 3, (2, 3, 4, 5))
    encoding = LabelEncoding("onehot", 3, 3)
    encoding.check_shape(label, (2, 1, 3, 4, 5))
    assert torch.equal(encoding.encode(label)[0], one_hot(label, 3).float())
    assert torch.equal(encoding.encode(label.unsqueeze(1))[0], one_hot(label, 3).float())


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 2, 2), (1, 4, 2, 2), (2, 2), (1, 2, 2, 1)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ReSegError, match="does not fit an image of shape"):
        LabelEncoding("index", 3, 2).check_shape(torch.zeros(shape), IMAGE)


@pytest.mark.parametrize(("value", "ignore"), [(3, None), (-1, None), (0.5, None), (255, None), (255, -1)])
def test_values_that_are_no_classes_are_refused(value, ignore):
    label = torch.zeros(1, 2, 2)
    label[0, 0, 0] = value
    with pytest.raises(ReSegError, match="ignore_index="):
        LabelEncoding("index", 3, 2, ignore).check_values(label)


def test_lists_and_batches():
    assert plain_label([INDEX, INDEX[:, ::2]]) is INDEX
    with pytest.raises(ReSegError, match="ndarray"):
        plain_label(INDEX.numpy())
    for batch in ((1, 2), [1, 2], {"image": 1, "label": 2}, {"data": 1, "target": 2}):
        assert unpack_batch(batch) == (1, 2)
    with pytest.raises(ReSegError, match="keys"):
        unpack_batch({"img": 1, "seg": 2})
    with pytest.raises(ReSegError, match="tuple of 3"):
        unpack_batch((1, 2, 3))


@pytest.mark.parametrize(
    "bad", [None, 1, "label", [], [1], {"label": INDEX}, INDEX.to(torch.complex64), INDEX.to_sparse(), INDEX.to("meta")]
)
@pytest.mark.parametrize("what", ["a label", "an image"])
def test_what_is_no_dense_tensor_of_real_numbers_is_no_label(what, bad):
    with pytest.raises(ReSegError, match=f"^{what} must be a dense tensor of real numbers"):
        plain_label(bad, what)


@pytest.mark.parametrize("mode", ["index", "onehot"])
def test_unsigned_labels_are_read_as_others(mode):
    encoding = LabelEncoding(mode, 3, 2, ignore_index=255)
    encoding.check_values(INDEX.to(torch.uint16))
    for ours, expected in zip(encoding.encode(INDEX.to(torch.uint16)), encoding.encode(INDEX)):
        assert torch.equal(ours, expected)


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.float16,
          torch.bfloat16, torch.float32, torch.float64]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_a_dtype_cannot_hold_is_nowhere_in_the_label(dtype):
    largest = {torch.bool: 1, torch.int8: 127, torch.uint8: 255, torch.float16: 2048}.get(dtype, 2**14)
    label = torch.tensor([0, 1, 2, 127, 128, 255, 256, 2048, 2**14]).clamp(max=largest).to(dtype)
    numbers = [int(number) for number in label.double().tolist()]
    for value in (-(2**40), -129, -100, -1, 0, 1, 127, 128, 255, 256, 257, 511, 2049, 2**14, 2**24 + 1, 2**40):
        assert has_value(label, value).tolist() == [number == value for number in numbers]


@pytest.mark.parametrize(
    ("dtype", "ignore"), [(torch.uint8, 256), (torch.uint8, -100), (torch.int8, 256), (torch.bool, 255)]
)
@pytest.mark.parametrize("mode", ["index", "onehot"])
def test_an_ignored_value_out_of_the_dtypes_range_ignores_no_class(dtype, ignore, mode):
    label = torch.tensor([[[0, 1], [1, 0]]]).to(dtype)
    encoding = LabelEncoding(mode, 2, 2, ignore_index=ignore)
    encoding.check_values(label)
    encoded, valid = encoding.encode(label)
    assert valid is not None
    assert bool((valid == 1).all())
    assert torch.equal(encoded, LabelEncoding(mode, 2, 2).encode(label)[0])


def test_a_value_that_wraps_to_the_ignored_one_is_refused():
    label = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)  # which equals -1 for torch
    with pytest.raises(ReSegError, match="255"):
        LabelEncoding("index", 2, 2, ignore_index=-1).check_values(label)
