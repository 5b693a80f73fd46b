"""What operators do to a layout: each function makes of an image (2, 4, 8, 8) what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reseg_loss.taps.graph import Graph
from reseg_loss.taps.trace import trace_forward

# every axis is as long as the channels or the cells of a grid, so that shapes tell nothing
LINEAR4, LINEAR64, LINEAR16 = nn.Linear(4, 4), nn.Linear(64, 64), nn.Linear(64, 16)
BACK64 = nn.Linear(16, 64)
CONV, CONV1, TOKEN = nn.Conv2d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1), torch.randn(1, 1, 4)
DOWN, WIDE = nn.Conv2d(4, 64, 2, 2), nn.Conv2d(4, 64, 1)
ORDER = torch.randperm(64)


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function, self.seen, self.scale = function, nn.Identity(), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(self.function(x * self.scale))


def graph_of(function: Callable[[Tensor], Any], shape: tuple[int, ...] = (2, 4, 8, 8)) -> tuple[Graph, int]:
    graph = Graph(trace_forward(Applied(function), torch.randn(shape)))
    return graph, next(call for call in graph.calls if call.name == "seen").outputs[0][1]


def layout(
    function: Callable[[Tensor], Any], shape: tuple[int, ...] = (2, 4, 8, 8)
) -> tuple[str, tuple[int, ...], int]:
    graph, node = graph_of(function, shape)
    grid = graph.grid(node)
    return ("none", (), 0) if grid is None else (grid.layout, grid.spatial, grid.channels)


def half(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def windows(x: Tensor) -> Tensor:
    """(2 * 4, 16, 4): the windows of 4x4 cells."""
    x = x.permute(0, 2, 3, 1).reshape(2, 2, 4, 2, 4, 4)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 4)


def unwindowed(x: Tensor) -> Tensor:
    return x.view(2, 2, 2, 4, 4, 4).permute(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 4)


def patches(x: Tensor) -> Tensor:
    """Tokens of 2x2 pixels each."""
    return x.view(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 16)


def expanded(x: Tensor) -> Tensor:
    """Patch expansion: a quarter of the channels, twice the sides."""
    x = half(x).permute(0, 2, 3, 1).view(2, 4, 4, 2, 2, 1)
    return x.transpose(2, 3).reshape(2, 8, 8, 1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def with_token(x: Tensor) -> Tensor:
    return torch.cat([TOKEN.expand(2, -1, -1), tokens(x)], 1)


def heads(x: Tensor) -> Tensor:
    return tokens(x).reshape(2, 64, 2, 2).transpose(1, 2)


def dynamic(x: Tensor) -> Tensor:
    """A convolution whose weights depend on the image, grouped by image."""
    weight = LINEAR4(x.mean((2, 3))).view(8, 1, 1, 1) * torch.ones(8, 4, 3, 3)
    return F.conv2d(x.reshape(1, 8, 8, 8), weight, padding=1, groups=2).view(2, 4, 8, 8)


def slots(x: Tensor) -> Tensor:
    """64 slots pooled over all places by attention, which lie like a map."""
    weights = WIDE(x).flatten(2).softmax(2)
    return torch.einsum("bcn,bsn->bcs", x.flatten(2), weights).view(2, 4, 8, 8)


def interleaved(x: Tensor) -> Tensor:
    out = x.new_zeros(2, 4, 10, 10)
    out[:, :, :8, :8] = x
    return out


FIRST, LAST = ("NCHW", (8, 8), 4), ("NHWC", (8, 8), 4)
NLC, NCL, NONE = ("NLC", (8, 8), 4), ("NCL", (8, 8), 4), ("none", (), 0)
CASES: list[tuple[str, Callable[[Tensor], Any], tuple[str, tuple[int, ...], int]]] = [
    ("image", lambda x: x, FIRST),
    ("convolution", CONV, FIRST),
    ("permute", lambda x: x.permute(0, 2, 3, 1), LAST),
    ("transposes", lambda x: x.transpose(1, 2).transpose(2, 3), LAST),
    ("axes exchanged", lambda x: x.transpose(2, 3), NONE),
    ("axes exchanged and back", lambda x: CONV(x.transpose(2, 3)).transpose(2, 3), FIRST),
    ("flatten", lambda x: x.flatten(2), NCL),
    ("tokens", tokens, NLC),
    ("tokens of 64 channels", lambda x: tokens(WIDE(x)), ("NLC", (8, 8), 64)),
    ("linear of 64 channels", lambda x: LINEAR64(tokens(WIDE(x))), ("NLC", (8, 8), 64)),
    ("64 channels and back", lambda x: LINEAR64(tokens(WIDE(x))).mT.unflatten(2, (8, 8)), ("NCHW", (8, 8), 64)),
    ("norm of tokens", lambda x: F.layer_norm(tokens(x), (4,)), NLC),
    ("rows of tokens", lambda x: LINEAR4(tokens(x).reshape(-1, 4)).reshape(2, 64, 4), NLC),
    ("tokens, last", lambda x: CONV1(x.flatten(2)), NCL),
    ("pooled", half, ("NCHW", (4, 4), 4)),
    ("pooled vector", lambda x: x.mean((2, 3)), NONE),
    ("one channel", lambda x: x.mean(1, keepdim=True), ("NCHW", (8, 8), 1)),
    ("no channel", lambda x: x.mean(1), ("NHW", (8, 8), 1)),
    ("gate", lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), FIRST),
    ("windows", windows, NONE),
    ("windows and back", lambda x: unwindowed(LINEAR4(windows(x))), LAST),
    ("patches", patches, ("NLC", (4, 4), 16)),
    ("embedded patches", lambda x: nn.Linear(16, 16)(patches(x)), ("NLC", (4, 4), 16)),
    (
        "patch merging",
        lambda x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
        ("NCHW", (4, 4), 16),
    ),
    ("patch expansion", expanded, ("NHWC", (8, 8), 1)),
    ("pixel shuffle", lambda x: F.pixel_shuffle(half(x), 2), ("NCHW", (8, 8), 1)),
    ("repeated", lambda x: half(x).repeat_interleave(2, 2).repeat_interleave(2, 3), FIRST),
    ("padded", lambda x: F.pad(half(x), (0, 4, 0, 4)), FIRST),
    ("class token", with_token, ("CLS+NLC", (8, 8), 4)),
    ("class token, linear", lambda x: LINEAR4(with_token(x)), ("CLS+NLC", (8, 8), 4)),
    ("class token taken off", lambda x: LINEAR4(with_token(x))[:, 1:], NLC),
    ("two grids of tokens", lambda x: torch.cat([tokens(x), tokens(half(x))], 1), NONE),
    ("two grids and apart", lambda x: torch.cat([tokens(x), tokens(half(x))], 1).split([64, 16], 1)[0], NLC),
    ("heads", heads, NONE),
    ("attention weights", lambda x: tokens(x) @ tokens(x).mT, NONE),
    ("attention", lambda x: attention(tokens(x), tokens(x), tokens(x)), NLC),
    ("attention of heads", lambda x: attention(*[heads(x)] * 3).transpose(1, 2).reshape(2, 64, 4), NLC),
    ("fused attention", lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3).transpose(1, 2).flatten(2), NLC),
    ("attention to fewer", lambda x: attention(tokens(x), *[tokens(F.avg_pool2d(x, 2))] * 2), NLC),
    ("linear attention", lambda x: tokens(x) @ (tokens(x).mT @ tokens(x)), NLC),
    ("attention of channels", lambda x: (x.flatten(2) @ x.flatten(2).mT) @ x.flatten(2), NCL),
    ("linear over tokens", lambda x: LINEAR64(x.flatten(2)), NCL),
    ("linear over tokens, narrow", lambda x: LINEAR16(x.flatten(2)), NONE),
    ("linear over tokens and back", lambda x: BACK64(LINEAR16(x.flatten(2))), NCL),
    ("dynamic convolution", dynamic, FIRST),
    ("slots of a product", slots, NONE),
    ("slots, convolved", lambda x: CONV(slots(x)), NONE),
    ("vector to a map", lambda x: CONV(nn.Linear(4, 256)(x.mean((2, 3))).view(2, 4, 8, 8)), FIRST),
    ("scan", lambda x: torch.stack([x.flatten(2), x.flatten(2).flip(-1)], 1).cumsum(-1)[:, 0], NCL),
    ("set into zeros", lambda x: F.max_pool2d(interleaved(x), 5), ("NCHW", (2, 2), 4)),
    ("unfold", lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3), ("NHWC", (4, 4), 16)),
    ("expanded", lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1) + x, FIRST),
    ("squeezed", lambda x: tokens(x).unsqueeze(1).squeeze(1), NLC),
    ("written over", lambda x: x.clone().mul_(2), FIRST),
]


@pytest.mark.parametrize(("function", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference mode"])
def test_the_layout_follows_from_the_operators(function: Any, expected: Any, inference: bool) -> None:
    with torch.inference_mode(inference):
        assert layout(function) == expected


def test_slices_of_a_volume_keep_their_axes() -> None:
    """A 2D convolution over the slices of a volume, which lie in the batch."""
    fold = lambda x: x.transpose(1, 2).reshape(8, 4, 8, 8)  # noqa: E731
    unfold = lambda x: x.view(2, 4, 4, 8, 8).transpose(1, 2)  # noqa: E731
    assert layout(fold, (2, 4, 4, 8, 8)) == ("none", (), 0)
    assert layout(lambda x: unfold(CONV(fold(x))), (2, 4, 4, 8, 8)) == ("NCDHW", (4, 8, 8), 4)
    assert layout(lambda x: F.max_pool3d(x, (4, 2, 2)).flatten(2), (2, 4, 4, 8, 8)) == ("NCL", (1, 4, 4), 4)


def kernel(x: Tensor) -> Tensor:
    return torch.from_numpy(np.tanh(x.numpy()))


@pytest.mark.parametrize(
    ("function", "expected", "operator"),
    [
        (lambda x: tokens(x)[:, ORDER], NLC, "aten::index"),  # as its source
        (lambda x: tokens(x).gather(1, ORDER[None, :, None].expand(2, -1, 4)), NLC, "aten::gather"),
        (lambda x: LINEAR4(tokens(x)[:, ORDER]), NLC, "aten::index"),  # and what comes after
        (lambda x: tokens(x)[:, ORDER] + tokens(x), NLC, ""),  # what is known on another way is known
        (lambda x: CONV(tokens(x)[:, ORDER].mT.unflatten(2, (8, 8))), FIRST, ""),  # a convolution tells it again
        (
            lambda x: tokens(DOWN(x)).reshape(2, 64, 4, 4),
            ("NCHW", (4, 4), 64),
            "aten::_unsafe_view",
        ),  # a view across all axes
    ],
)
def test_behind_an_operator_that_hides_it_the_shape_tells_the_layout(
    function: Any, expected: Any, operator: str
) -> None:
    graph, node = graph_of(function)
    assert layout(function) == expected
    assert graph.hidden.get(node, "") == operator
