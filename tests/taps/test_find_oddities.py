"""Small models, each with one way of writing a U-Net that is hard to see through, and what a dry forward leaves."""

from __future__ import annotations

import gc
import itertools
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import PadsInside
from test_find_taps import check_hooks
from torch import Tensor, nn

from reseg_loss import FeatureExtractor, Features, ReSegError, TapError
from reseg_loss.common.dryrun import dry_run
from reseg_loss.taps import Tap, TapPlan, find_taps, named_modules
from reseg_loss.taps.__main__ import main


def conv(cin: int, cout: int, stride: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), act or nn.ReLU())


class Small(nn.Module):
    """Levels of strides 1, 2 and 4, bottleneck at 8. Subclasses override how it is written, not what it computes."""

    def __init__(self, width: int = 4, cin: int = 3, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        w = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList([conv(a, b, act=act()) for a, b in zip([cin, *w], w)])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in itertools.pairwise(w)])
        self.fuse = nn.ModuleList([conv(2 * a, a, act=act()) for a in w[:3]])
        self.head = nn.Conv2d(width, 2, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        x = features.pop()  # the list is edited: tensors must be taken while the hook runs
        for up, fuse in zip(reversed(self.up), reversed(self.fuse)):
            x = fuse(torch.cat([up(x), features.pop()], 1))
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(self.decode(self.encode(x)))


NAMES = [("down.0", "fuse.0"), ("down.1", "fuse.1"), ("down.2", "fuse.2")]


def names(plan: TapPlan) -> list[tuple[str, str]]:
    return [(str(level.encoder), str(level.decoder)) for level in plan.levels]


def found(model: nn.Module, *shape: int) -> TapPlan:
    """The plan, checked with hooks in training."""
    torch.manual_seed(0)
    image = torch.randn(shape or (2, 3, 32, 32))
    plan = find_taps(model, image)
    check_hooks(model, plan, image)
    return plan


def test_plain() -> None:
    plan = found(Small())
    assert names(plan) == NAMES
    assert str(plan.bottleneck) == "down.3"
    assert plan.levels[1].encoder == Tap("down.1", (16, 16), 8, "NCHW", (2, 2))


class EncoderList(nn.Module):
    def __init__(self, small: Small) -> None:
        super().__init__()
        self.small = [small]  # not a submodule: the stages are only reachable through this module's own list
        self.stem = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.small[0].encode(self.stem(x))


class ListReturned(Small):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = EncoderList(self)
        self.down.requires_grad_(True)

    def encode(self, x: Tensor) -> list[Tensor]:
        for i, block in enumerate(self.down):
            x = F.relu(block(self.pool(x) if i else x) * 2)  # functional: only the list has it
            self.__dict__.setdefault("kept", []).append(x)
        return self.__dict__.pop("kept")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(self.encoder(x)))


def test_list_elements_of_an_encoder_whose_list_the_decoder_empties() -> None:
    plan = found(ListReturned())
    assert names(plan) == [("encoder[0]", "fuse.0"), ("encoder[1]", "fuse.1"), ("encoder[2]", "fuse.2")]
    assert str(plan.bottleneck) == "encoder[3]"


@dataclass
class Output:
    features: dict[str, Tensor]


class DictReturned(ListReturned):
    class Wrap(nn.Module):
        def __init__(self, inner: EncoderList) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Output:
            return Output({str(i): f for i, f in enumerate(self.inner.small[0].encode(self.inner.stem(x)))})

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Wrap(self.encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(list(self.encoder(x).features.values())))


def test_dataclass_of_a_dict() -> None:
    model = DictReturned()
    plan = find_taps(model, torch.randn(2, 3, 32, 32))
    assert plan.levels[1].encoder.keys == ("features", "1")
    assert str(plan.levels[1].encoder) == "encoder[features][1]"
    again = find_taps(model, torch.randn(2, 3, 32, 32), taps={"encoder": [str(plan.levels[1].encoder)]})
    assert again == plan


class Functional(Small):
    """Activations in the forward: the skip is no module's output, but modules take it in."""

    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, block in enumerate(self.down):
            x = F.gelu(block[0](self.pool(x) if i else x))
            features.append(x)
        return features


def test_functional_skip_is_the_input_of_what_takes_it() -> None:
    plan = found(Functional())
    assert names(plan) == [("in:pool", "fuse.0"), ("in:pool@1", "fuse.1"), ("in:pool@2", "fuse.2")]
    assert str(plan.bottleneck) == "in:up.2"


class InPlace(Small):
    """The skip is what an in-place ReLU left of the convolution's output."""

    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, block in enumerate(self.down):
            x = block[1](block[0](self.pool(x) if i else x))
            F.relu(x, inplace=True)
            features.append(x)
        return features


def test_in_place_relu_is_the_skip() -> None:
    plan = found(InPlace())
    assert names(plan) == [("in:pool", "fuse.0"), ("in:pool@1", "fuse.1"), ("in:pool@2", "fuse.2")]
    assert not plan.levels[0].encoder.mutated


class Overwriting(Small):
    """Each feature is overwritten once the skip has its own copy."""

    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            features.append(x.clone())
            x.mul_(0.5)
        return features


def test_tap_that_is_overwritten_later_is_marked() -> None:
    plan = found(Overwriting(act=nn.GELU))
    assert names(plan) == NAMES
    assert all(level.encoder.mutated for level in plan.levels)
    assert not any(level.decoder.mutated for level in plan.levels)


class InPlaceDropout(Small):
    """Dropout does nothing in the dry forward, and overwrites in training."""

    def __init__(self) -> None:
        super().__init__(act=nn.GELU)
        self.drop = nn.Dropout(0.5, inplace=True)

    def encode(self, x: Tensor) -> list[Tensor]:
        features = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            features.append(self.drop(x) if i == 1 else x)
        return features


def test_in_place_dropout_counts_as_a_write() -> None:
    plan = found(InPlaceDropout())
    assert names(plan) == [NAMES[0], ("drop", "fuse.1"), NAMES[2]]
    named = find_taps(InPlaceDropout(), torch.randn(2, 3, 32, 32), taps={"encoder": ["down.1"]})
    assert named.levels[1].encoder.mutated


class Shared(Small):
    """One block runs at every level of the encoder, one at every level of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.down = nn.ModuleList()
        self.block, self.merge = conv(4, 4), conv(8, 4)
        self.up = self.fuse = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        features = [self.block(self.stem(x))]
        for _ in range(3):
            features.append(self.block(self.pool(features[-1])))
        x = features.pop()
        while features:
            x = self.merge(torch.cat([F.interpolate(x, scale_factor=2.0), features.pop()], 1))
        return self.head(x)


def test_shared_modules_have_a_call_index() -> None:
    plan = found(Shared())
    assert names(plan) == [("block", "merge@2"), ("block@1", "merge@1"), ("block@2", "merge")]
    assert str(plan.bottleneck) == "block@3"


class Gated(Small):
    """Attention gates: the skip joins multiplied by a map computed from the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.ModuleList([nn.Conv2d(2 * c, 1, 1) for c in (4, 8, 16)])

    def decode(self, features: list[Tensor]) -> Tensor:
        x = features.pop()
        for up, fuse, gate in zip(reversed(self.up), reversed(self.fuse), reversed(self.gate)):
            x, skip = up(x), features.pop()
            x = fuse(torch.cat([x, skip * gate(torch.cat([x, skip], 1)).sigmoid()], 1))
        return x


def test_attention_gates_are_undone() -> None:
    assert names(found(Gated())) == NAMES


class Reducing(Small):
    """Attention in the bottleneck, whose keys and values are of half the size (as in MiT and PVT)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.reduce = nn.Linear(32, 32), nn.Linear(32, 64), nn.Conv2d(32, 32, 2, 2)

    def encode(self, x: Tensor) -> list[Tensor]:
        features = super().encode(x)
        x = features[-1]
        k, v = self.kv(self.reduce(x).flatten(2).mT).chunk(2, -1)
        attended = (self.q(x.flatten(2).mT) @ k.mT).softmax(-1) @ v
        features[-1] = x + attended.mT.reshape(x.shape)
        return features


def test_keys_and_values_of_half_the_size_are_no_level() -> None:
    plan = found(Reducing())
    assert names(plan) == NAMES


class Numpy(torch.autograd.Function):
    """A kernel that torch cannot see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Numpy.apply(x)  # pyright: ignore[reportReturnType]


def test_opaque_kernels_are_bridged() -> None:
    plan = found(Small(act=Opaque))
    assert names(plan) == NAMES
    assert str(plan.bottleneck) == "down.3"
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith(
        "layout inferred from the shape, because a kernel before it hides what it does: down.0 (NCHW), fuse.0 (NCHW)"
    )


def test_a_layout_that_is_given_is_not_told_by_shape() -> None:
    named = {
        "encoder": [Tap("down.0", layout="NCHW"), Tap("down.1", layout="NCHW")],
        "decoder": [Tap("fuse.0", layout="NCHW"), "fuse.1"],
        "bottleneck": Tap("down.3", layout="NCHW"),
    }
    plan = find_taps(Small(act=Opaque), torch.randn(2, 3, 32, 32), taps=named)
    assert plan.notes == (
        "layout inferred from the shape, because a kernel before it hides what it does: fuse.1 (NCHW). "
        "If a layout is wrong, pass the right one: Tap(..., layout=...)",
    )


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class TwoEncoders(Small):
    """Of two modalities: the sums of both encoders' features are the skips."""

    def __init__(self, modules: bool) -> None:
        super().__init__()
        self.other = nn.ModuleList([conv(a, b) for a, b in ((3, 4), (4, 8), (8, 16), (16, 32))])
        self.add = nn.ModuleList([Add() for _ in self.down]) if modules else [torch.add] * 4

    def encode(self, x: Tensor) -> list[Tensor]:
        y, features = x.flip(1), []
        for i, (block, other, add) in enumerate(zip(self.down, self.other, self.add)):
            x, y = block(self.pool(x) if i else x), other(self.pool(y) if i else y)
            features.append(add(x, y))
        return features


def test_of_two_encoders_the_sum_is_the_skip() -> None:
    plan = found(TwoEncoders(modules=True))
    assert names(plan) == [(f"add.{i}", f"fuse.{i}") for i in range(3)]
    assert str(plan.bottleneck) == "add.3"
    assert plan.notes == ()


def test_of_two_encoders_whose_sum_no_hook_sees_one_is_tapped_and_the_plan_says_so() -> None:
    plan = found(TwoEncoders(modules=False))
    assert names(plan) == NAMES
    assert str(plan.bottleneck) == "in:up.2"
    said = "level 16x16: the skip combines several encoder features, and no hook can see it; down.1 is one of them"
    assert said in plan.notes


class Adapted(Small):
    """Skips go through a block of their own, which keeps their width."""

    def __init__(self) -> None:
        super().__init__()
        self.adapt = nn.ModuleList([nn.Sequential(nn.Conv2d(c, c, 1), nn.ReLU()) for c in (4, 8, 16)])

    def encode(self, x: Tensor) -> list[Tensor]:
        features = super().encode(x)
        return [*[adapt(f) for adapt, f in zip(self.adapt, features)], features[3]]


def test_what_a_skip_carries_is_tapped_behind_its_adapter_and_the_stage_before() -> None:
    assert names(found(Adapted())) == [(f"adapt.{i}", f"fuse.{i}") for i in range(3)]
    assert names(find_taps(Adapted(), torch.randn(2, 3, 32, 32), encoder="block")) == NAMES


class SelfGated(Small):
    """Each skip is multiplied by a map that a module makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.ModuleList([nn.Sequential(nn.Conv2d(c, 1, 1), nn.Sigmoid()) for c in (4, 8, 16)])

    def encode(self, x: Tensor) -> list[Tensor]:
        features = super().encode(x)
        return [*[gate(f) * f for gate, f in zip(self.gate, features)], features[3]]


def test_a_gate_is_no_adapter() -> None:
    assert names(found(SelfGated())) == NAMES


class Reduced(Small):
    """A bare 1x1 convolution narrows each feature before it is interpolated, as wide as the next level."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Conv2d(2 * c, c, 1) for c in (4, 8, 16)])

    def decode(self, features: list[Tensor]) -> Tensor:
        x = features.pop()
        for up, fuse in zip(reversed(self.up), reversed(self.fuse)):
            x = fuse(torch.cat([F.interpolate(up(x), scale_factor=2), features.pop()], 1))
        return x


def test_a_reduction_before_an_interpolation_is_a_part_of_going_up() -> None:
    plan = found(Reduced())
    assert names(plan) == NAMES
    assert str(plan.bottleneck) == "down.3"


class OnlyReduced(Reduced):
    """Nothing but the reduction is computed at a level after the merge."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in ((4, 16), (8, 32), (16, 32))])
        self.fuse, self.head = nn.ModuleList([nn.Identity() for _ in range(3)]), nn.Conv2d(8, 2, 1)


def test_a_reduction_is_the_decoders_feature_where_nothing_else_is_computed() -> None:
    assert names(found(OnlyReduced())) == [("down.1", "up.0"), ("down.2", "up.1")]


class Outputs(Small):
    """Deep supervision: a dict with outputs at several levels."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Conv2d(c, 2, 1) for c in (4, 8, 16)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.encode(x)
        x, outputs = features.pop(), []
        for up, fuse, head in zip(reversed(self.up), reversed(self.fuse), reversed(self.heads)):
            x = fuse(torch.cat([up(x), features.pop()], 1))
            outputs.append(head(x))
        return outputs[::-1]


def test_deep_supervision() -> None:
    assert names(found(Outputs())) == NAMES


class Bilinear(Small):
    """Bilinear upsampling and a narrower decoder: channels differ at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Upsample(scale_factor=2, mode="bilinear") for _ in range(3)])
        w = [4, 8, 16, 32]
        self.fuse = nn.ModuleList([conv(w[i] + (w[i] if i < 2 else w[3]), max(4, w[i] // 2)) for i in range(3)])
        self.fuse[1] = conv(8 + 8, 4)
        self.fuse[0] = conv(4 + 4, 6)
        self.head = nn.Conv2d(6, 2, 1)


def test_unequal_channels() -> None:
    plan = found(Bilinear())
    assert names(plan) == NAMES
    assert [(level.encoder.channels, level.decoder.channels) for level in plan.levels] == [(4, 6), (8, 4), (16, 8)]


class Lateral(Small):
    """The skip is projected to the decoder's channels and added."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(c, 12, 1) for c in (4, 8, 16)])
        self.top, self.fuse = nn.Conv2d(32, 12, 1), nn.ModuleList([conv(12, 12) for _ in range(3)])
        self.up, self.head = nn.ModuleList([nn.Upsample(scale_factor=2) for _ in range(3)]), nn.Conv2d(12, 2, 1)

    def decode(self, features: list[Tensor]) -> Tensor:
        x = self.top(features.pop())
        for up, fuse, lateral in zip(reversed(self.up), reversed(self.fuse), reversed(self.lateral)):
            x = fuse(up(x) + lateral(features.pop()))
        return x


def test_a_projection_is_what_the_skip_carries() -> None:
    assert names(found(Lateral())) == [(f"lateral.{i}", f"fuse.{i}") for i in range(3)]


def test_the_head_is_no_decoder_feature() -> None:
    model = Small()
    model.head = nn.Conv2d(4, 4, 1)  # as many classes as the finest level has channels
    assert names(found(model)) == NAMES


class Wider(Small):
    """The decoder is one channel wider than the encoder at every level."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.ModuleList([conv(2 * c, c + 1) for c in (4, 8, 16)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in ((4, 9), (8, 17), (16, 32))])
        self.head = nn.Conv2d(5, 2, 1)


def test_decoder_of_other_channels() -> None:
    assert names(found(Wider())) == NAMES


class NoMerge(Small):
    """Concatenated last: no module returns anything at a level after the merge but the one that leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.ModuleList()
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in ((4, 16), (8, 32), (16, 32))])
        self.head = nn.Conv2d(8, 2, 1)

    def decode(self, features: list[Tensor]) -> Tensor:
        x = features.pop()
        for up in reversed(self.up):
            x = torch.cat([up(x), features.pop()], 1)
        return x


def test_merge_without_a_block_after_it_taps_before_it() -> None:
    assert names(found(NoMerge())) == [("down.0", "up.0"), ("down.1", "up.1"), ("down.2", "up.2")]


def test_uneven_grid_in_2d() -> None:
    model = Small()
    model.pool = nn.MaxPool2d((1, 2))
    model.up = nn.ModuleList([nn.ConvTranspose2d(2 * c, c, (1, 2), (1, 2)) for c in (4, 8, 16)])
    plan = found(model, 2, 3, 16, 64)
    assert names(plan) == NAMES
    assert [level.stride for level in plan.levels] == [(1, 1), (1, 2), (1, 4)]


class Padded(Small):
    """Sizes that are no multiple of the strides: the decoder pads to the skip's size."""

    def decode(self, features: list[Tensor]) -> Tensor:
        x = features.pop()
        for up, fuse in zip(reversed(self.up), reversed(self.fuse)):
            x, skip = up(x), features.pop()
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = fuse(torch.cat([x, skip], 1))
        return x


def test_odd_sizes() -> None:
    plan = found(Padded(), 2, 3, 45, 51)
    assert names(plan) == NAMES
    assert [level.spatial for level in plan.levels] == [(45, 51), (22, 25), (11, 12)]
    assert [level.stride for level in plan.levels] == [(1, 1), (2, 2), (4, 4)]


# ------------------------------------------------------------------ tokens


class Block(nn.Module):
    """A residual MLP that mixes neighbours along the last but one axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) + x.roll(1, -2)


class Merge(nn.Module):
    """Patch merging of (B, H, W, C), or of (B, L, C) on a square grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.ndim == 3
        if tokens:
            side = round(x.shape[1] ** 0.5)
            x = x.view(x.shape[0], side, side, -1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x.flatten(1, 2) if tokens else x))


class Expand(nn.Module):
    """Patch expansion by `factor`, to `width` channels."""

    def __init__(self, cin: int, width: int, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.expand, self.norm = nn.Linear(cin, factor**2 * width, bias=False), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        f, tokens = self.factor, x.ndim == 3
        x = self.expand(x)
        if tokens:
            side = round(x.shape[1] ** 0.5)
            x = x.view(x.shape[0], side, side, -1)
        b, h, w, c = x.shape
        x = x.view(b, h, w, f, f, c // f**2).transpose(2, 3).reshape(b, h * f, w * f, c // f**2)
        return self.norm(x.flatten(1, 2) if tokens else x)


class Stage(nn.Module):
    """Two blocks, and a change of resolution at the start or at the end."""

    def __init__(self, width: int, before: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.upsample_first, self.blocks = before, nn.ModuleList([Block(width), Block(width)])
        self.resample = after

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample_first is not None:
            x = self.upsample_first(x)
        for block in self.blocks:
            x = block(x)
        return x if self.resample is None else self.resample(x)


class PatchEmbed(nn.Module):
    def __init__(self, width: int, tokens: bool) -> None:
        super().__init__()
        self.tokens, self.proj, self.norm = tokens, nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).permute(0, 2, 3, 1)
        return self.norm(x.flatten(1, 2) if self.tokens else x)


class SwinUNetLike(nn.Module):
    """Tokens (B, L, C); the skip of a stage is its input; decoder stages expand at their end."""

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        w = [width * 2**i for i in range(depth)]
        self.patch_embed = PatchEmbed(width, tokens=True)
        self.pos_drop = nn.Dropout(0.0)
        self.layers = nn.ModuleList([Stage(c, after=Merge(c) if c != w[-1] else None) for c in w])
        self.norm = nn.LayerNorm(w[-1])
        self.layers_up = nn.ModuleList([Expand(w[-1], w[-2])])
        self.concat_back_dim = nn.ModuleList([nn.Identity()])
        for c in reversed(w[:-1]):
            self.layers_up.append(Stage(c, after=Expand(c, c // 2) if c != width else None))
            self.concat_back_dim.append(nn.Linear(2 * c, c))
        self.norm_up, self.up = nn.LayerNorm(width), Expand(width, width, 4)
        self.output = nn.Conv2d(width, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        x, skips = self.pos_drop(self.patch_embed(x)), []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        x = self.layers_up[0](self.norm(x))
        for i in range(1, len(self.layers_up)):
            x = self.layers_up[i](self.concat_back_dim[i](torch.cat([x, skips[-1 - i]], -1)))
        x = self.up(self.norm_up(x))
        return self.output(x.view(x.shape[0], side, side, -1).permute(0, 3, 1, 2))


def test_swin_unet_like() -> None:
    plan = found(SwinUNetLike(), 2, 3, 64, 64)
    assert [level.stride for level in plan.selected] == [(4, 4), (8, 8), (16, 16)]
    # the skip is the stage's input; the decoder's own feature is the last block, before the expansion
    assert names(plan) == [
        ("patch_embed", "norm_up"),
        ("layers.0", "layers_up.2.blocks.1"),
        ("layers.1", "layers_up.1.blocks.1"),
    ]
    assert str(plan.bottleneck) == "norm"
    assert {tap.layout for level in plan.levels for tap in (level.encoder, level.decoder)} == {"NLC"}
    assert all(level.encoder.channels == level.decoder.channels for level in plan.levels)


def test_stage_of_swin_unet_like() -> None:
    plan = find_taps(SwinUNetLike(), torch.randn(1, 3, 64, 64), encoder="block")
    assert [str(level.encoder) for level in plan.levels] == [f"layers.{i}.blocks.1" for i in range(3)]


class VMUNetLike(nn.Module):
    """(B, H, W, C); the skip of a stage is its input, added; decoder stages expand at their start."""

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        w = [width * 2**i for i in range(depth)]
        self.patch_embed = PatchEmbed(width, tokens=False)
        self.layers = nn.ModuleList([Stage(c, after=Merge(c) if c != w[-1] else None) for c in w])
        self.layers_up = nn.ModuleList([Stage(w[-1])])
        for c in reversed(w[:-1]):
            self.layers_up.append(Stage(c, before=Expand(2 * c, c)))
        self.final_up, self.final_conv = Expand(width, width // 4, 4), nn.Conv2d(width // 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.patch_embed(x), []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        x = self.layers_up[0](x)
        for i in range(1, len(self.layers_up)):
            x = self.layers_up[i](x + skips[-i])
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


def test_vm_unet_like() -> None:
    plan = found(VMUNetLike(), 2, 3, 64, 64)
    assert [level.stride for level in plan.selected] == [(4, 4), (8, 8), (16, 16)]
    # stride 4 has no skip (the embedding is never added), so its tap is the encoder's last block there
    assert names(plan) == [
        ("layers.0.blocks.1", "layers_up.3"),
        ("layers.0", "layers_up.2"),
        ("layers.1", "layers_up.1"),
    ]
    assert str(plan.bottleneck) in ("layers_up.0", "in:layers_up.1")
    assert {tap.layout for level in plan.levels for tap in (level.encoder, level.decoder)} == {"NHWC"}


class ViT(nn.Module):
    """Tokens with a class token in front."""

    def __init__(self, cin: int, width: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(cin, width, 1)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, tokens + 1, width))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)] * 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Hybrid(nn.Module):
    """A stem, a max pool without padding (55 cells of 56) and stages; the skips are zero-padded to the image's grid."""

    def __init__(self) -> None:
        super().__init__()
        self.root = conv(3, 8, 2)
        self.body = nn.ModuleList([conv(8, 16), conv(16, 32, 2), conv(32, 64, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = [self.root(x)]
        y = F.max_pool2d(features[0], 3, 2)
        for i, stage in enumerate(self.body[:-1]):
            y = stage(y)
            missing = x.shape[-1] // 4 // 2**i - y.shape[-1]
            features.append(F.pad(y, (0, missing, 0, missing)) if missing else y)
        return self.body[2](y), features[::-1]


class TransUNetLike(nn.Module):
    """Convolutions, then a transformer, then a decoder with one level more than there are skips."""

    def __init__(self, side: int = 14) -> None:
        super().__init__()
        self.hybrid = Hybrid()
        self.transformer = ViT(64, 48, side * side)
        self.conv_more = conv(48, 64)
        self.blocks = nn.ModuleList([conv(64 + 32, 24), conv(24 + 16, 12), conv(12 + 8, 8), conv(8, 8)])
        self.segmentation_head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, features = self.hybrid(x)
        y = self.transformer(y)[:, 1:].transpose(1, 2)
        side = round(y.shape[2] ** 0.5)
        y = self.conv_more(y.unflatten(2, (side, side)))
        for i, block in enumerate(self.blocks):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            y = block(torch.cat([y, features[i]], 1) if i < 3 else y)
        return self.segmentation_head(y)


def test_transunet_like() -> None:
    plan = found(TransUNetLike(), 2, 3, 224, 224)
    assert [level.stride for level in plan.selected] == [(2, 2), (4, 4), (8, 8)]
    assert names(plan) == [("hybrid.root", "blocks.2"), ("hybrid[1][1]", "blocks.1"), ("hybrid.body.1", "blocks.0")]
    assert plan.levels[1].spatial == (56, 56)
    assert (str(plan.bottleneck), plan.bottleneck.spatial) == ("conv_more", (14, 14))


class TokensAtTheBottom(Small):
    """The deepest feature is tokens after a class token, tapped where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = ViT(32, 32, 16)

    def decode(self, features: list[Tensor]) -> Tensor:
        tokens = self.vit(features.pop())
        features.append(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
        return super().decode(features)


def test_class_token() -> None:
    plan = found(TokensAtTheBottom())
    assert names(plan) == NAMES
    assert str(plan.bottleneck) == "vit"
    assert (plan.bottleneck.layout, plan.bottleneck.spatial) == ("CLS+NLC", (4, 4))


# ------------------------------------------------------------------ inputs, types, wrappers


class Conditioned(Small):
    """A diffusion-like model: the forward takes a time step, a mask nobody uses, and a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 32), nn.SiLU())

    def forward(self, image: Tensor, time: Tensor, *, mask: Tensor | None = None, double: bool = False) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        features = self.encode(image)
        features[-1] = features[-1] + self.embed(time)[:, :, None, None]
        return self.head(self.decode(features)) * (2 if double else 1)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_more_inputs_than_the_image(kind: str) -> None:
    image, time = torch.randn(2, 3, 32, 32), torch.randn(2, 4)
    inputs: Any = (image, time) if kind == "tuple" else {"time": time, "image": image, "mask": None, "double": True}
    plan = find_taps(Conditioned(), inputs)
    assert names(plan) == NAMES
    assert plan.bottleneck.spatial == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    assert names(find_taps(Small().to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype))) == NAMES


@pytest.mark.parametrize("batch", [1, 3, 4, 8])
def test_batches_that_look_like_channels(batch: int) -> None:
    assert names(find_taps(Small(), torch.randn(batch, 3, 32, 32))) == NAMES
    assert names(find_taps(VMUNetLike(), torch.randn(batch, 3, 64, 64)))[1:] == [
        ("layers.0", "layers_up.2"),
        ("layers.1", "layers_up.1"),
    ]


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_contexts(context: Callable[[], Any]) -> None:
    model = Small()
    with context():
        assert names(find_taps(model, torch.randn(2, 3, 32, 32))) == NAMES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype: torch.dtype) -> None:
    model, image = Small().to("cuda", dtype), torch.randn(2, 3, 32, 32, device="cuda", dtype=dtype)
    model(image)
    torch.cuda.synchronize()
    state, held = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    plan = find_taps(model, image)
    assert names(plan) == NAMES
    assert torch.equal(torch.cuda.get_rng_state(), state)
    gc.collect()
    assert torch.cuda.memory_allocated() == held


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_prefix_of_wrappers_is_dropped() -> None:
    model = Wrapper(Small())
    assert names(find_taps(model, torch.randn(2, 3, 32, 32))) == NAMES
    assert named_modules(model)["down.0"] is model.module.down[0]  # pyright: ignore
    plan = find_taps(model, torch.randn(2, 3, 32, 32), taps={"bottleneck": "module.down.3"})
    assert str(plan.bottleneck) == "down.3"


def test_compiled_submodules() -> None:
    model = Small()
    inner = model.down[1]
    model.down[1] = torch.compile(model.down[1], backend="eager")  # pyright: ignore
    model.fuse[0].compile(backend="eager")
    plan = find_taps(model, torch.randn(2, 3, 32, 32))
    assert names(plan) == NAMES
    assert named_modules(model)["down.1"] is model.down[1] is not inner
    assert named_modules(model)["down.1.0"] is inner[0]  # pyright: ignore
    plan = find_taps(model, torch.randn(2, 3, 32, 32), taps={"encoder": ["down._orig_mod.1"]})
    assert names(plan) == NAMES


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_scripted_submodules_are_seen_through() -> None:
    model = Small()
    model.down[1] = torch.jit.script(model.down[1])
    plan = find_taps(model, torch.randn(2, 3, 32, 32))
    assert names(plan) == [NAMES[0], ("in:pool@1", "fuse.1"), NAMES[2]]
    assert model.down[1].training


def test_user_hooks_are_kept_and_obeyed() -> None:
    model, calls = Small(), []
    model.down[0].register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    assert names(find_taps(model, torch.randn(2, 3, 32, 32))) == NAMES
    assert calls == [1]


# ------------------------------------------------------------------ no trace


class Tracing(Small):
    """Leaves traces wherever a forward can."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.counter, self.cache, self.last = 0, {}, None
        self.log: list[int] = []
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3).eval()

    def train(self, mode: bool = True) -> Tracing:
        assert mode, "switches parts for good"
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        torch.rand(1), random.random(), np.random.rand()
        self.steps += 1
        self.counter += 1
        self.last = self.cache["x"] = x
        self.log.append(1)
        self.register_buffer("late", torch.ones(1))
        self.extra = nn.Linear(1, 1)
        with torch.no_grad():
            self.head.weight.mul_(0.5)
            self.head.bias.data = self.head.bias.data + 1
        self.fuse[0].training = True
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = True
        torch.set_autocast_enabled("cpu", True)
        torch.set_grad_enabled(True)
        out = super().forward(self.frozen(x))
        if getattr(self, "fails", False):
            raise RuntimeError("a bug of the model")
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_the_dry_forward_leaves_no_trace(fails: bool) -> None:
    model, image = Tracing(), torch.randn(2, 3, 32, 32)
    model.fails = fails
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    backup, attributes = image.clone(), set(model.__dict__)
    rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    if fails:
        with pytest.raises(ReSegError, match=r"fails on the example.*a bug of the model"):
            find_taps(model, image)
    else:
        assert [level.stride for level in find_taps(model, image).levels] == [(1, 1), (2, 2), (4, 4)]

    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.frozen.training
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert (model.counter, model.cache, model.last, model.log) == (0, {}, None, [])
    assert set(model.__dict__) == attributes
    assert torch.equal(image, backup)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert np.array_equal(np.random.get_state()[1], rng[2])
    assert torch.get_default_dtype() is torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_a_graph_from_before_can_still_be_differentiated() -> None:
    model, image = Small(), torch.randn(2, 3, 32, 32)
    loss = model(image).sum()
    find_taps(model, image)
    loss.backward()  # would raise, had a parameter been written to
    assert model.down[0][0].weight.grad is not None


def test_weights_cast_in_the_dry_forward_are_not_cached() -> None:
    model, image = Small(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        find_taps(model, image)
        model(image).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_of_the_forward_is_kept_alive() -> None:
    model, seen = Small(), []
    model.down[0].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    gone = []
    model.head.register_forward_hook(lambda module, args, output: gone.append(seen[0]() is None))
    find_taps(model, torch.randn(2, 3, 32, 32))
    gc.collect()
    assert gone == [True]  # already while the recording goes on: the list was emptied by the decoder
    assert seen[0]() is None


def test_lazy_parameters_are_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ReSegError, match="run one forward"), dry_run(model):
        pass


# ------------------------------------------------------------------ errors


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_scripted_models_are_refused() -> None:
    with pytest.raises(ReSegError, match="pass the Python module"):
        find_taps(torch.jit.script(conv(3, 4)), torch.randn(2, 3, 32, 32))


def test_no_image() -> None:
    with pytest.raises(ReSegError, match=r"no float image .* got \(2, 3\)"):
        find_taps(Small(), torch.randn(2, 3))


class Twice(Small):
    """The same U-Net runs on its own output."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return super().forward(F.pad(x, (0, 0, 0, 0, 0, 1)))


def test_two_descents_are_refused() -> None:
    with pytest.raises(TapError, match="goes down again after going up") as raised:
        find_taps(Twice(), torch.randn(2, 3, 32, 32))
    assert "32x32: down.0" in str(raised.value)


def test_of_two_u_nets_the_last_is_found() -> None:
    plan = found(nn.Sequential(Small(), nn.Conv2d(2, 3, 1), Small()))
    assert names(plan) == [(f"2.{encoder}", f"2.{decoder}") for encoder, decoder in NAMES]


def test_input_too_small() -> None:
    with pytest.raises(TapError, match="too small: a feature map shrinks to a single cell"):
        find_taps(Small(), torch.randn(2, 3, 8, 8))


class OneLevel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 8, 2), conv(12, 4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.a(x)
        return self.head(self.c(torch.cat([F.interpolate(self.b(skip), scale_factor=2), skip], 1)))


class Tuples(Small):
    """Blocks that return their feature beside something else, in a net that only goes down and, once, up."""

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int) -> None:
            super().__init__()
            self.conv = conv(cin, cout, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return F.relu(self.conv(x) + 1), None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(3, 4), self.Block(4, 8), self.Block(8, 16)])
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        for block in self.blocks:
            x, _ = block(x)
        return F.interpolate(self.head(x), size)


def test_the_list_in_an_error_shows_elements_of_tuples_and_the_error_what_still_works() -> None:
    with pytest.raises(TapError) as raised:
        find_taps(Tuples(), torch.randn(2, 3, 32, 32))
    message = str(raised.value)
    assert "16x16: blocks.0[0]\n" in message
    assert "8x8: blocks.1[0]\n" in message
    assert "CutMixConsistency needs no taps if deep= is left out" in message


def test_one_level_is_not_enough_and_the_error_shows_it() -> None:
    with pytest.raises(TapError) as raised:
        find_taps(OneLevel(), torch.randn(2, 3, 32, 32))
    message = str(raised.value)
    assert "two levels" in message
    assert "(32, 32): a and c" in message
    assert "16x16: b" in message
    named = {"encoder": ["a"], "decoder": ["c"], "bottleneck": "b"}
    assert names(find_taps(OneLevel(), torch.randn(2, 3, 32, 32), taps=named)) == [("a", "c")]


# ------------------------------------------------------------------ naming by hand

IMAGE = (2, 3, 32, 32)


def test_all_named() -> None:
    taps = {"encoder": ["down.1", Tap("down.2")], "decoder": ["fuse.1", "fuse.2"], "bottleneck": "down.3"}
    plan = find_taps(Small(), torch.randn(IMAGE), taps=taps)
    assert names(plan) == NAMES[1:]
    assert plan.levels[0].encoder == Tap("down.1", (16, 16), 8, "NCHW", (2, 2))
    assert plan.bottleneck == Tap("down.3", (4, 4), 32, "NCHW", (8, 8))
    assert all(level.selected for level in plan.levels)


def test_some_named_and_the_rest_found() -> None:
    plan = find_taps(Small(), torch.randn(IMAGE), taps={"encoder": ["down.1.0"], "bottleneck": "down.3.0"})
    assert names(plan) == [NAMES[0], ("down.1.0", "fuse.1"), NAMES[2]]
    assert str(plan.bottleneck) == "down.3.0"
    plan = find_taps(Small(), torch.randn(IMAGE), taps={"decoder": ["in:head"]})
    assert names(plan) == [("down.0", "in:head"), *NAMES[1:]]
    pairs = {"encoder": ["down.0", "down.2"], "decoder": ["fuse.0", "fuse.2"]}
    plan = find_taps(Small(), torch.randn(IMAGE), taps=pairs)
    assert (names(plan), str(plan.bottleneck)) == ([NAMES[0], NAMES[2]], "down.3")


def test_keys_from_the_end_and_calls() -> None:
    plan = find_taps(ListReturned(), torch.randn(IMAGE), taps={"bottleneck": "encoder[-1]", "encoder": ["in:pool@1"]})
    assert str(plan.bottleneck) == "encoder[3]"
    assert names(plan)[1] == ("in:pool@1", "fuse.1")


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ({"encoder": ["down.7"]}, r"no module 'down.7'.* Did you mean .*'down"),
        ({"encoder": ["down"]}, "never calls 'down' itself, only modules inside it"),
        ({"encoder": ["pool@3"]}, r"a forward calls 'pool' 3 time\(s\)"),
        ({"encoder": ["down.0[1]"]}, r"'down.0' returns  \(2, 4, 32, 32\); choose"),
        ({"encoder": ["down.0", "down.0.0"]}, "both have size"),
        ({"encoder": ["down.3"]}, r"has size \(4, 4\), but no decoder feature of that size was found"),
        ({"encoder": ["down.0", "down.1"], "decoder": ["fuse.0"]}, "2 encoder taps and 1 decoder taps"),
        (
            {"encoder": ["down.0"], "decoder": ["fuse.1"]},
            r"down.0 has size \(32, 32\) and decoder tap fuse.1 has size \(16, 16\)",
        ),
        (
            {"encoder": ["fuse.1"], "decoder": ["down.1"]},
            r"encoder tap fuse.1 is not computed before decoder tap down.1; name what",
        ),
        ({"encoder": ["fuse.1"]}, "encoder tap fuse.1 is not computed before decoder tap fuse.1"),
        ({"bottleneck": "head"}, "bottleneck tap head is not computed before any decoder tap; name the deepest"),
        ({"encodr": ["down.0"]}, "encodr"),
        ({"bottleneck": "in down"}, "no module 'in down'"),
        *(({"bottleneck": bad}, "is not a tap: write") for bad in ("down.3]", 3, None, [None])),
    ],
)
def test_wrong_names(taps: dict[str, Any], message: str) -> None:
    with pytest.raises(TapError, match=message):
        find_taps(Small(), torch.randn(IMAGE), taps=taps)


def test_key_of_a_list_is_needed() -> None:
    with pytest.raises(TapError, match=r"'encoder' returns \[0\] \(2, 4, 32, 32\), \[1\] \(2, 8, 16, 16\)"):
        find_taps(ListReturned(), torch.randn(IMAGE), taps={"encoder": ["encoder"]})


def test_not_a_feature_map() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    with pytest.raises(TapError, match=r"shape \(2, 5\) is not a feature map"):
        find_taps(model, torch.randn(IMAGE), taps={"bottleneck": "1"})


def test_wrong_level_and_wrong_kind() -> None:
    with pytest.raises(TapError, match="no level has stride 3"):
        find_taps(Small(), torch.randn(IMAGE), levels=[3])
    with pytest.raises(TapError, match="'skip' or 'block'"):
        find_taps(Small(), torch.randn(IMAGE), encoder="both")  # pyright: ignore


@pytest.mark.parametrize("model", [None, Small, "net", [nn.Identity()]])
def test_no_model(model: Any) -> None:
    with pytest.raises(ReSegError, match=r"expected an nn\.Module, got a"):
        find_taps(model, torch.randn(IMAGE))


@pytest.mark.parametrize(
    "example",
    [torch.randn(2, 5, 32, 32), torch.randn(2, 3, 32, 32, device="meta"), torch.randn(IMAGE).half(),
     [torch.randn(IMAGE), torch.zeros(2)]],
)  # fmt: skip
def test_an_example_on_which_the_model_fails_is_said_to_be_the_cause(example: Any) -> None:
    with pytest.raises(ReSegError, match="the model fails on the example") as caught:
        find_taps(Small(), example)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("bad", [None, 3, 1.5, ["a"]])
def test_a_tap_is_named_by_a_string(bad: Any) -> None:
    for make in (Tap.parse, Tap):
        with pytest.raises(TapError):
            make(bad)


# ------------------------------------------------------------------ command line


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test_find_oddities:Small", "--shape", "1,3,32,32", "--levels", "1,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "test_find_oddities:Small"
    assert [line[0] for line in lines[2:5]] == ["*", " ", "*"]
    assert "down.1 (8)" in lines[3]
    assert "fuse.1 (8)" in lines[3]
    assert main(["test_find_oddities:OneLevel", "--shape", "1,3,32,32"]) == 1
    assert "Name the taps by hand" in capsys.readouterr().err
    assert main(["test_find_oddities:Small", "--shape", "1,1,32,32", "width=6", "cin=1"]) == 0
    assert "down.1 (12)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_module:Small"], "there is no module 'no_such_module'"),
        (["test_find_oddities"], "not of the form MODULE:FACTORY"),
        (["test_find_oddities:Smal"], "has no 'Smal'. Did you mean 'Small'"),
        (
            ["test_find_oddities:conv"],
            "cannot be called with these arguments: missing a required argument: 'cin'. It takes (cin: ",
        ),
        (["test_find_oddities:Small", "wide=3"], "unexpected keyword argument 'wide'. It takes (width: "),
        (["test_find_oddities:Small", "3"], "'3' is not an argument of the model: write NAME=VALUE"),
        (["test_find_oddities:Small", "--shape", "1x3x32x32"], "--shape 1x3x32x32: expected whole numbers"),
        (["test_find_oddities:Small", "--shape=1,-3,32,32"], "--shape 1,-3,32,32: expected whole numbers >= 1"),
        (["test_find_oddities:NAMES"], "is list, not a class or a function"),
        (["test_find_oddities:Output", "features=1"], "returned Output, not a torch.nn.Module"),
    ],
)
def test_a_wrong_command_is_told_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


class ChannelsLast(nn.Module):
    """Features with channels last between convolutions of channels first, as in ConvNeXt and Swin."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = [width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.down = nn.ModuleList([nn.Linear(4 * a, b) for a, b in itertools.pairwise(w)])
        self.mix = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1, groups=c) for c in w])
        self.stages = nn.ModuleList([nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU()) for c in w])
        self.up = nn.ModuleList([nn.Linear(b, a) for a, b in itertools.pairwise(w)])
        self.fuse = nn.ModuleList([nn.Sequential(nn.Linear(2 * a, a), nn.GELU()) for a in w[:2]])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x).permute(0, 2, 3, 1), []
        for i, (mix, stage) in enumerate(zip(self.mix, self.stages)):
            x = stage(x + mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
            skips.append(x)
            if i < 2:
                x = self.down[i](torch.cat([x[:, a::2, b::2] for a in (0, 1) for b in (0, 1)], -1))
        for i in (1, 0):
            x = self.up[i](x).repeat_interleave(2, 1).repeat_interleave(2, 2)
            x = self.fuse[i](torch.cat([x, skips[i]], -1))
        return F.interpolate(self.head(x.permute(0, 3, 1, 2)), scale_factor=4)


@pytest.mark.parametrize("width", [6, 8, 16])  # at 32x32 a level of stride 4 has 8x8 cells, at 64x64 16x16
@pytest.mark.parametrize("size", [32, 64])
def test_channels_that_are_as_many_as_the_cells_of_a_side_are_told_from_them(width: int, size: int) -> None:
    plan = found(ChannelsLast(width), 2, 3, size, size)
    taps = [tap for level in plan.levels for tap in (level.encoder, level.decoder)]
    assert {tap.layout for tap in [*taps, plan.bottleneck]} == {"NHWC"}
    assert [tap.channels for tap in taps] == [width, width, 2 * width, 2 * width]


def test_convolutions_of_as_many_channels_as_cells_stay_channels_first() -> None:
    for width in (4, 8, 16):
        plan = found(Small(width))
        assert {tap.layout for level in plan.levels for tap in (level.encoder, level.decoder)} == {"NCHW"}


class Tokens(Small):
    """A transformer at the bottom, of as many tokens as it has channels and the image a side: 64."""

    def __init__(self) -> None:
        super().__init__(8)
        layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        features = super().encode(x)
        last = features[-1]
        tokens = self.transformer(last.flatten(2).transpose(1, 2))
        features[-1] = tokens.transpose(1, 2).unflatten(2, last.shape[2:])
        return features


def test_tokens_as_many_as_channels_and_pixels_of_a_side_are_no_image() -> None:
    plan = found(Tokens(), 2, 3, 64, 64)
    assert names(plan) == NAMES
    assert plan.bottleneck == replace(plan.bottleneck, module="transformer", spatial=(8, 8), channels=64, layout="NLC")


def features_of(model: nn.Module, taps: dict[str, Any], image: Tensor) -> tuple[TapPlan, Features]:
    with FeatureExtractor(model, image, taps=taps) as extractor:
        model(image)
        features = extractor.pop()
        return extractor.plan, features


def test_a_layout_and_a_mark_of_the_users_stay() -> None:
    model, image = ChannelsLast(8), torch.randn(2, 3, 32, 32)
    kept = []
    model.fuse[0].register_forward_hook(lambda module, args, output: kept.append(output))
    named: dict[str, Any] = {
        "encoder": [Tap("stages.0", layout="NHWC", mutated=True), "stages.1"],
        "decoder": [Tap("fuse.0", layout="NHWC"), "fuse.1"],
        "bottleneck": "stages.2",
    }
    plan, features = features_of(model, named, image)
    assert plan.levels[0].encoder.mutated
    assert torch.equal(features.decoder[0], kept[-1].movedim(-1, 1))
    named["bottleneck"] = Tap("stages.2", layout="NLC")
    with pytest.raises(TapError, match="not a feature map in layout NLC"):
        features_of(model, named, image)


class Padding(PadsInside, Small):
    """Its features are those of a larger image."""


def test_a_model_that_pads_inside_is_told_which_example_shows_its_u() -> None:
    with pytest.raises(TapError, match=r"pads inside, show it an example whose sides are multiples of 32"):
        find_taps(Padding(), torch.randn(1, 3, 50, 45))
    assert names(found(Padding(), 2, 3, 64, 64)) == NAMES


class Recursive(nn.Module):
    """Each level holds the next. No hook sees the skip (its ReLU is a function), and channels of a level differ."""

    def __init__(self, c_in: int = 1, c_out: int = 3, width: int = 4, levels: int = 3) -> None:
        super().__init__()
        self.down = nn.Conv2d(c_in, width, 3, padding=1)
        self.inner = Recursive(width, width, 2 * width, levels - 1) if levels else nn.Identity()
        self.up = nn.Conv2d(2 * width, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        x = F.interpolate(self.inner(F.max_pool2d(skip, 2)), scale_factor=2)
        return self.up(torch.cat([skip, x], 1))


def test_a_skip_that_no_hook_sees_joins_features_of_unequal_channels():
    plan = found(Recursive(), 2, 1, 32, 32)
    assert names(plan) == [("inner." * n + "down", "inner." * (n - 1) + "inner") for n in (1, 2, 3)]
    assert [(level.encoder.channels, level.decoder.channels) for level in plan.levels] == [(8, 4), (16, 8), (32, 16)]
