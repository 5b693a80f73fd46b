"""Layouts: telling them from shapes, and bringing them to channels-first at the current size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reseg_loss import ReSegError
from reseg_loss.taps.layouts import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    Grid,
    grid_of_tokens,
    readings,
    to_channels_first,
)


@pytest.mark.parametrize(
    ("shape", "image", "expected"),
    [
        ((2, 64, 56, 56), (224, 224), Grid((56, 56), 64, "NCHW", (4, 4))),
        ((2, 56, 56, 96), (224, 224), Grid((56, 56), 96, "NHWC", (4, 4))),
        ((2, 3136, 96), (224, 224), Grid((56, 56), 96, "NLC", (4, 4))),
        ((2, 197, 768), (224, 224), Grid((14, 14), 768, "CLS+NLC", (16, 16))),
        ((2, 96, 3136), (224, 224), Grid((56, 56), 96, "NCL", (4, 4))),
        ((1, 16, 8, 32, 32), (8, 64, 64), Grid((8, 32, 32), 16, "NCDHW", (1, 2, 2))),
        ((1, 24, 24, 24, 48), (96, 96, 96), Grid((24, 24, 24), 48, "NDHWC", (4, 4, 4))),
        ((2, 224, 224), (224, 224), Grid((224, 224), 1, "NHW", (1, 1))),
        ((2, 8, 23, 15), (47, 31), Grid((23, 15), 8, "NCHW", (2, 2))),
        ((2, 64, 55, 55), (224, 224), None),  # no whole stride gives 55
        ((3, 64, 56, 56), (224, 224), None),  # another batch
        ((2, 1000), (224, 224), None),
    ],
)
def test_the_likeliest_reading(shape, image, expected):
    assert next(iter(readings(shape, 2 if shape[0] != 1 else 1, image)), None) == expected


def test_learned_token_grids_are_used():
    assert readings((2, 12, 5), 2, (15, 20)) == []
    assert readings((2, 12, 5), 2, (15, 20), {12: (3, 4)}) == [Grid((3, 4), 5, "NLC", (5, 5))]


def test_equal_sides_can_be_read_in_several_ways():
    assert [grid.layout for grid in readings((2, 8, 8, 8), 2, (32, 32))] == ["NCHW", "NHWC"]
    assert [grid.layout for grid in readings((2, 64, 64), 2, (64, 64))] == ["NHW", "NLC", "NCL"]
    assert readings((2, 8, 8, 8), 2, (32, 32))[1] == Grid((8, 8), 8, "NHWC", (4, 4))


@given(st.sampled_from([2, 3]), st.integers(1, 3), st.integers(1, 4), st.data())
def test_every_layout_comes_back_to_the_same_values(dims, batch, channels, data):
    spatial = tuple(data.draw(st.integers(2, 5)) for _ in range(dims))
    image, stride = tuple(4 * s for s in spatial), (4,) * dims
    x = torch.randn(batch, channels, *spatial)
    forms = {
        CHANNELS_FIRST[dims]: x,
        CHANNELS_LAST[dims]: x.movedim(1, -1),
        "NLC": x.flatten(2).transpose(1, 2),
        "CLS+NLC": torch.cat([torch.zeros(batch, 1, channels), x.flatten(2).transpose(1, 2)], 1),
        "NCL": x.flatten(2),
    }
    for layout, form in forms.items():
        assert torch.equal(to_channels_first(form, layout, image, stride), x), layout


def test_tokens_follow_the_current_input_and_refuse_what_is_ambiguous():
    assert grid_of_tokens(58 * 56, (230, 224), (4, 4)) == (58, 56)  # rounded up on one axis
    assert grid_of_tokens(57 * 56, (230, 224), (4, 4)) == (57, 56)
    with pytest.raises(ReSegError, match="pad the images"):
        grid_of_tokens(57 * 56 + 1, (230, 224), (4, 4))
    with pytest.raises(ReSegError, match="pad the images"):
        grid_of_tokens(57 * 58, (230, 230), (4, 4))


def test_wrong_layouts_are_refused():
    with pytest.raises(ReSegError, match="unknown layout 'NWHC'"):
        to_channels_first(torch.zeros(1, 2, 3, 4), "NWHC", (3, 4), (1, 1))
    with pytest.raises(ReSegError, match="is not NLC"):
        to_channels_first(torch.zeros(1, 2, 3, 4), "NLC", (3, 4), (1, 1))
