"""Random small U-shaped nets, whose taps are known from how they are built."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A net with the taps that its building tells; `layouts` and `sizes` say how each tap's tensor lies."""

    model: nn.Module
    image: Tensor
    encoder: tuple[str, ...]  # finest first, as the decoder
    decoder: tuple[str, ...]
    bottleneck: str
    refused: bool  # it is no U with two levels, so a refusal is right
    collides: bool  # some level has as many channels as some grid has cells
    layouts: dict[str, str]  # first, last, tokens, or tokens last
    sizes: dict[str, Size]


# ------------------------------------------------------------------ layouts

LAYOUTS = ("first", "first", "last", "tokens", "tokens last")  # twice: the common one


def to_map(x: Tensor, layout: str, size: Size) -> Tensor:
    """(B, C, *size) of a tensor in a layout."""
    if layout == "first":
        return x
    if layout == "last":
        return x.movedim(-1, 1)
    return (x.transpose(1, 2) if layout == "tokens" else x).reshape(len(x), -1, *size)


def from_map(x: Tensor, layout: str) -> Tensor:
    if layout == "first":
        return x
    if layout == "last":
        return x.permute(0, *range(2, x.ndim), 1)
    return x.flatten(2).transpose(1, 2) if layout == "tokens" else x.flatten(2)


class Described(nn.Module):
    """Works on features of one layout and size, and remembers which."""

    def __init__(self, layout: str, size: Size) -> None:
        super().__init__()
        self.layout, self.size = layout, size


# ------------------------------------------------------------------ blocks


def conv(dims: int) -> type[nn.Module]:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]


class Convolve(nn.Module):
    def __init__(self, width: int, size: Size, rng: random.Random) -> None:
        super().__init__()
        norm = (nn.BatchNorm2d, nn.InstanceNorm2d) if len(size) == 2 else (nn.BatchNorm3d, nn.InstanceNorm3d)
        self.conv = conv(len(size))(width, width, 3, padding=1)
        self.norm = rng.choice([*norm, lambda c: nn.GroupNorm(2, c), lambda c: nn.Identity()])(width)
        self.act = rng.choice([nn.ReLU, nn.GELU, lambda: nn.LeakyReLU(0.1, inplace=True)])()
        self.residual = rng.random() < 0.4

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        return x + y if self.residual else y


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, size: Size, rng: random.Random) -> None:
        super().__init__()
        self.axes = tuple(range(2, len(size) + 2))
        self.conv, self.gate = conv(len(size))(width, width, 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return x * self.gate(x.mean(self.axes)).sigmoid().reshape(len(x), -1, *[1] * len(self.axes))


class ConvNeXt(nn.Module):
    """Depthwise, then linear layers with channels last."""

    def __init__(self, width: int, size: Size, rng: random.Random) -> None:
        super().__init__()
        self.depthwise = conv(len(size))(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).movedim(1, -1)
        return x + self.mlp(self.norm(y)).movedim(-1, 1)


class ByTokens(nn.Module):
    """Works on (B, N, C), which it makes and unmakes in one of the usual ways."""

    def __init__(self, width: int, size: Size, rng: random.Random) -> None:
        super().__init__()
        self.size, self.way = size, rng.randrange(3)
        self.inner = self.make(width, size, rng)

    def make(self, width: int, size: Size, rng: random.Random) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), rng.choice([nn.GELU(), nn.Identity()]))

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        if self.way == 0:
            return self.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, c, *self.size)
        if self.way == 1:
            y = self.inner(x.reshape(n, c, -1).permute(0, 2, 1).contiguous())
            return y.permute(0, 2, 1).contiguous().view(n, c, *self.size)
        y = self.inner(x.movedim(1, -1).flatten(1, -2))
        return y.unflatten(1, self.size).movedim(-1, 1)


class Perceptron(ByTokens):
    def make(self, width: int, size: Size, rng: random.Random) -> nn.Module:
        hidden = rng.choice([width, 2 * width])
        return Residual(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Transposed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Mixer(ByTokens):
    """A linear layer over tokens."""

    def make(self, width: int, size: Size, rng: random.Random) -> nn.Module:
        cells = math.prod(size)
        return Residual(nn.LayerNorm(width), Transposed(nn.Linear(cells, cells)))


class Convolve1d(ByTokens):
    """A convolution along tokens, with channels first."""

    def make(self, width: int, size: Size, rng: random.Random) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), Transposed(nn.Conv1d(width, width, 3, padding=1)))


class Attention(nn.Module):
    def __init__(self, width: int, way: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.way = nn.Linear(width, 3 * width), nn.Linear(width, width), way

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, c = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.way == 0:
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == 1:
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        else:  # linear attention
            y = q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, c))


class Attend(ByTokens):
    def make(self, width: int, size: Size, rng: random.Random) -> nn.Module:
        if math.prod(size) <= 256 and rng.random() < 0.3:
            return nn.TransformerEncoderLayer(width, 2, width, 0.0, batch_first=True)
        way = rng.randrange(3) if math.prod(size) <= 256 else 2
        return Residual(nn.LayerNorm(width), Attention(width, way))


class Windows(nn.Module):
    """Attention within windows, which may be shifted; channels last."""

    def __init__(self, width: int, size: Size, rng: random.Random) -> None:
        super().__init__()
        self.window = tuple(rng.choice([w for w in (1, 2, 4) if side % w == 0]) for side in size)
        self.shift = rng.random() < 0.5
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, rng.randrange(3))

    def forward(self, x: Tensor) -> Tensor:
        dims, c = x.ndim - 2, x.shape[1]
        y = self.norm(x.movedim(1, -1))
        if self.shift:
            y = y.roll([-1] * dims, list(range(1, dims + 1)))
        size = y.shape[1:-1]
        split = [part for side, w in zip(size, self.window) for part in (side // w, w)]
        outer, inner = range(1, 2 * dims, 2), range(2, 2 * dims + 1, 2)
        y = y.view(len(x), *split, c).permute(0, *outer, *inner, 2 * dims + 1)
        windows = self.attention(y.reshape(-1, math.prod(self.window), c))
        back = [axis for pair in zip(range(1, dims + 1), range(dims + 1, 2 * dims + 1)) for axis in pair]
        y = windows.view(len(x), *split[::2], *self.window, c).permute(0, *back, 2 * dims + 1)
        y = y.reshape(len(x), *size, c)
        return x + (y.roll([1] * dims, list(range(1, dims + 1))) if self.shift else y).movedim(-1, 1)


class Scan(nn.Module):
    """A running mean along tokens, forward and backward, as state space models scan; also with axes exchanged."""

    def __init__(self, width: int, size: Size, rng: random.Random) -> None:
        super().__init__()
        self.conv, self.exchange = conv(len(size))(width, width, 1), rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        y = (x.transpose(-2, -1) if self.exchange else x).contiguous()
        tokens = y.flatten(2)
        y = torch.stack([tokens, tokens.flip(-1)], 1).cumsum(-1) / tokens.shape[-1]
        y = (y[:, 0] + y[:, 1].flip(-1)).view(*(x.transpose(-2, -1) if self.exchange else x).shape)
        return x + (y.transpose(-2, -1) if self.exchange else y)


class Reordered(ByTokens):
    """Tokens in an order that an index gives, and back: an operator that hides where they lie."""

    def make(self, width: int, size: Size, rng: random.Random) -> nn.Module:
        return Permuted(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)), math.prod(size))


class Permuted(nn.Module):
    def __init__(self, inner: nn.Module, tokens: int) -> None:
        super().__init__()
        self.inner, self.order = inner, nn.Buffer(torch.randperm(tokens), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x[:, self.order])[:, self.order.argsort()]


BLOCKS: tuple[Callable[[int, Size, random.Random], nn.Module], ...] = (
    *(
        Convolve,
        Convolve,
        SqueezeExcite,
        ConvNeXt,
        ByTokens,
        Perceptron,
        Mixer,
        Convolve1d,
        Attend,
        Windows,
        Scan,
        Reordered,
    ),
)


class Stage(Described):
    """Blocks at one level, the last of which the stage returns in its layout; in a pair, if it is `paired`."""

    def __init__(self, width: int, layout: str, size: Size, rng: random.Random, paired: bool = False) -> None:
        super().__init__(layout, size)
        self.paired = paired
        choices = [b for b in BLOCKS if not (b is Mixer and math.prod(size) > 256)]
        self.blocks = nn.ModuleList([rng.choice(choices)(width, size, rng) for _ in range(rng.randint(1, 2))])
        self.norm = nn.LayerNorm(width) if layout in ("last", "tokens") and rng.random() < 0.5 else None

    def forward(self, x: Tensor) -> Any:
        x = to_map(x, self.layout, self.size)
        for block in self.blocks:
            x = block(x)
        x = from_map(x, self.layout)
        x = x if self.norm is None else self.norm(x)
        return (1 * x, None) if self.paired else x


def feature(stage: nn.Module, x: Tensor) -> Tensor:
    x = stage(x)
    return x[0] if isinstance(x, tuple) else x


class ClassToken(Described):
    """Attention with a class token, which leaves the tokens again."""

    def __init__(self, width: int, layout: str, size: Size) -> None:
        super().__init__(layout, size)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, math.prod(size) + 1, width))
        self.block = Residual(nn.LayerNorm(width), Attention(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = to_map(x, self.layout, self.size).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position)[:, 1:]
        return from_map(x.transpose(1, 2).unflatten(2, self.size), self.layout)


# ------------------------------------------------------------------ between levels


class Embed(nn.Module):
    """The image to the first level: a convolution, or patches and a linear layer."""

    def __init__(self, width: int, layout: str, size: Size, step: int, rng: random.Random) -> None:
        super().__init__()
        self.layout, self.size, self.step, dims = layout, size, step, len(size)
        self.patches = step > 1 and rng.random() < 0.4
        channels = 3 * step**dims if self.patches else 3
        self.proj = nn.Linear(channels, width) if self.patches else conv(dims)(channels, width, step, step)

    def forward(self, x: Tensor) -> Tensor:
        if not self.patches:
            return from_map(self.proj(x), self.layout)
        dims = len(self.size)
        x = x.reshape(len(x), 3, *[part for side in self.size for part in (side, self.step)])
        x = x.permute(0, *range(2, 2 * dims + 1, 2), *range(3, 2 * dims + 2, 2), 1)
        x = self.proj(x.reshape(len(x), math.prod(self.size), -1))
        return from_map(x.transpose(1, 2).reshape(len(x), -1, *self.size), self.layout)


class Down(nn.Module):
    """One level down, from features in `layout` to features in `to`."""

    def __init__(
        self, widths: tuple[int, int], layout: str, to: str, sizes: tuple[Size, Size], rng: random.Random
    ) -> None:
        super().__init__()
        self.layout, self.to, self.sizes, dims = layout, to, sizes, len(sizes[0])
        self.step = tuple(fine // coarse for fine, coarse in zip(*sizes))
        self.way, parts = rng.choice(["max", "mean", "strided", "slices"]), math.prod(self.step)
        wide, kernel = widths[0], self.step if self.way == "strided" else (1,) * dims
        if self.way == "slices":
            self.proj = nn.Sequential(nn.LayerNorm(parts * wide), nn.Linear(parts * wide, widths[1]))
        else:
            self.proj = conv(dims)(wide, widths[1], kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        x, dims = to_map(x, self.layout, self.sizes[0]), len(self.step)
        if self.way == "slices":  # patch merging
            x = x.movedim(1, -1)
            starts = torch.cartesian_prod(*[torch.arange(step) for step in self.step]).reshape(-1, dims).tolist()
            picks = [tuple(slice(at, None, step) for at, step in zip(start, self.step)) for start in starts]
            x = self.proj(torch.cat([x[(slice(None), *pick)] for pick in picks], -1))
            return from_map(x.movedim(-1, 1), self.to)
        if self.way != "strided":
            pools = {"max": (F.max_pool2d, F.max_pool3d), "mean": (F.avg_pool2d, F.avg_pool3d)}
            x = pools[self.way][dims - 2](x, self.step)
        return from_map(self.proj(x), self.to)


class Up(nn.Module):
    """One level up."""

    def __init__(
        self, widths: tuple[int, int], layout: str, to: str, sizes: tuple[Size, Size], rng: random.Random
    ) -> None:
        super().__init__()
        self.layout, self.to, self.sizes, dims = layout, to, sizes, len(sizes[0])
        self.step = tuple(fine // coarse for coarse, fine in zip(*sizes))
        self.way = rng.choice(["transposed", "interpolated", "repeated", "expanded"])
        if self.way == "transposed":
            self.proj = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2](*widths, self.step, self.step)
        elif self.way == "expanded":
            self.proj = nn.Linear(widths[0], math.prod(self.step) * widths[1])
        else:
            self.proj = conv(dims)(*widths, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, dims = to_map(x, self.layout, self.sizes[0]), len(self.step)
        if self.way == "expanded":  # patch expansion
            x = self.proj(x.movedim(1, -1))
            x = x.view(*x.shape[:-1], *self.step, x.shape[-1] // math.prod(self.step))
            order = [axis for pair in zip(range(1, dims + 1), range(dims + 1, 2 * dims + 1)) for axis in pair]
            x = x.permute(0, *order, 2 * dims + 1)
            return from_map(x.reshape(len(x), *self.sizes[1], -1).movedim(-1, 1), self.to)
        if self.way == "interpolated":
            x = self.proj(F.interpolate(x, self.sizes[1]))
        elif self.way == "repeated":
            x = self.proj(x)
            for axis, step in enumerate(self.step, 2):
                x = x.repeat_interleave(step, axis)
        else:
            x = self.proj(x)
        return from_map(x, self.to)


class Merge(nn.Module):
    """The decoder's feature, in its layout, with the skip, in the encoder's."""

    def __init__(self, width: int, layout: str, skip: str, size: Size, way: str) -> None:
        super().__init__()
        self.layout, self.skip, self.size, self.way = layout, skip, size, way
        self.gate = conv(len(size))(2 * width, 1, 1) if way == "gated" else None
        self.proj = nn.Identity() if way == "sum" else conv(len(size))(2 * width, width, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x, skip = to_map(x, self.layout, self.size), to_map(skip, self.skip, self.size)
        if self.gate is not None:
            skip = skip * self.gate(torch.cat([x, skip], 1)).sigmoid()
        return from_map(self.proj(x + skip if self.way == "sum" else torch.cat([skip, x], 1)), self.layout)


# ------------------------------------------------------------------ nets


class Net(nn.Module):
    """Levels, each a stage of the encoder and one of the decoder, joined by skips."""

    def __init__(self, widths: list[int], sizes: list[Size], step: int, rng: random.Random) -> None:
        super().__init__()
        depth = len(widths)
        one = rng.choice(LAYOUTS) if rng.random() < 0.5 else None  # in most nets one layout throughout
        down, up = ([one or rng.choice(LAYOUTS) for _ in range(depth)] for _ in range(2))
        self.embed = Embed(widths[0], down[0], sizes[0], step, rng)
        self.paired = rng.random() < 0.15
        self.encoder = nn.ModuleList([Stage(*level, rng, self.paired) for level in zip(widths, down, sizes)])
        pairs = [(i, i + 1) for i in range(depth - 1)]
        self.down = nn.ModuleList(
            [Down((widths[i], widths[j]), down[i], down[j], (sizes[i], sizes[j]), rng) for i, j in pairs]
        )
        self.middle = ClassToken(widths[-1], down[-1], sizes[-1]) if rng.random() < 0.15 else None
        up[-1] = down[-1]
        self.up = nn.ModuleList(
            [self.way_up((widths[j], widths[i]), (up[j], up[i]), (sizes[j], sizes[i]), rng) for i, j in pairs]
        )
        way = rng.choice(["cat", "sum", "gated"])
        self.merge = nn.ModuleList([Merge(widths[i], up[i], down[i], sizes[i], way) for i in range(depth - 1)])
        self.decoder = nn.ModuleList([Stage(widths[i], up[i], sizes[i], rng, self.paired) for i in range(depth - 1)])
        adapts = rng.random() < 0.15  # the skip is what an adapter makes of the encoder's feature
        self.adapter = nn.ModuleList([Stage(widths[i], down[i], sizes[i], rng) for i in range(depth - 1) if adapts])
        dims = len(sizes[0])
        self.heads = nn.ModuleList(
            [conv(dims)(width, 2, 1) for width in widths[: 1 + (depth > 2 and rng.random() < 0.2)]]
        )
        self.scale, self.sizes = step, sizes

    def way_up(
        self, widths: tuple[int, int], layouts: tuple[str, str], sizes: tuple[Size, Size], rng: random.Random
    ) -> nn.Module:
        """A module of its own, or a bare 1x1 convolution before an interpolation in the net's forward."""
        if set(layouts) == {"first"} and rng.random() < 0.3:
            return conv(len(sizes[0]))(*widths, 1)
        return Up(widths, *layouts, sizes, rng)

    def go_up(self, i: int, x: Tensor) -> Tensor:
        return self.up[i](x) if isinstance(self.up[i], Up) else F.interpolate(self.up[i](x), self.sizes[i])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x, skips, outputs = self.embed(x), [], []
        for i, stage in enumerate(self.encoder):
            x = feature(stage, self.down[i - 1](x) if i else x)
            skips.append(self.adapter[i](x) if i < len(self.adapter) else x)
        if self.middle is not None:
            x = self.middle(x)
        for i in reversed(range(len(self.decoder))):
            x = feature(self.decoder[i], self.merge[i](self.go_up(i, x), skips[i]))
            if i < len(self.heads):
                logits = self.heads[i](to_map(x, self.decoder[i].layout, self.decoder[i].size))
                outputs.insert(0, F.interpolate(logits, scale_factor=self.scale) if self.scale > 1 else logits)
        return outputs if len(outputs) > 1 else outputs[0]


class NoDecoder(nn.Module):
    """The encoder of a net, and either one upsampling to the image's size or a classification."""

    def __init__(self, net: Net, width: int, classify: bool, size: Size) -> None:
        super().__init__()
        self.embed, self.encoder, self.down = net.embed, net.encoder, net.down
        self.head, self.classify, self.size = conv(len(size))(width, 2, 1), classify, size

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, stage in enumerate(self.encoder):
            x = feature(stage, self.down[i - 1](x) if i else x)
        x = self.head(to_map(x, self.encoder[-1].layout, self.encoder[-1].size))
        return x.flatten(2).mean(2) if self.classify else F.interpolate(x, self.size)


def build(seed: int) -> Case:
    """The net of a seed: always the same, with the same weights and image."""
    rng = random.Random(seed)
    dims = 3 if rng.random() < 0.25 else 2
    kind = rng.choice(["no decoder", "one level", *["U"] * 14])
    depth = 2 if kind == "one level" else rng.choice([3, 3, 4] if dims == 2 else [3])
    step = rng.choice([1, 1, 2, 4] if dims == 2 else [1, 2])
    finest = [rng.choice([16, 32] if dims == 2 else [8])] * dims
    if rng.random() < 0.3:
        finest[0] *= 2
    sizes = [tuple(side // 2**level for side in finest) for level in range(depth)]
    if dims == 3 and rng.random() < 0.4:  # anisotropic
        sizes = [(finest[0] // 2 ** max(level - 1, 0), *size[1:]) for level, size in enumerate(sizes)]
    image = tuple(side * step for side in finest)
    cells = [math.prod(size) for size in sizes]
    widths = sorted(2 * rng.randint(2, 8) for _ in range(depth))
    if rng.random() < 0.5:
        level = rng.randrange(depth)
        few = sorted(count for count in {*cells, *finest} if count <= 256 and count % 2 == 0)
        widths[level] = rng.choice(few)
        widths[level:] = [max(width, widths[level]) for width in widths[level:]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net(widths, sizes, step, rng)
        model: nn.Module = net
        prefix = ""
        if kind == "no decoder":
            model = NoDecoder(net, widths[-1], rng.random() < 0.5, image)
        elif rng.random() < 0.3:
            model, prefix = nn.Sequential((nn.Conv2d, nn.Conv3d)[dims - 2](3, 3, 1), net), "1."
        x = torch.randn(rng.choice([1, 2, 2, 3, 4, 8]), 3, *image)
    stages = {f"{prefix}encoder.{i}": net.encoder[i] for i in range(depth)}
    stages |= {f"{prefix}decoder.{i}": net.decoder[i] for i in range(depth - 1)}
    if net.paired:
        stages = {f"{path}[0]": stage for path, stage in stages.items()}
    paths = list(stages)
    encoder, bottleneck, decoder = paths[: depth - 1], paths[depth - 1], paths[depth:]
    if net.adapter:
        encoder = [f"{prefix}adapter.{i}" for i in range(depth - 1)]
        stages |= dict(zip(encoder, net.adapter))
    if net.middle is not None:
        bottleneck = f"{prefix}middle"
        stages[bottleneck] = net.middle
    return Case(
        *(model.eval(), x, tuple(encoder), tuple(decoder), bottleneck),
        refused=kind != "U",
        collides=not set(widths).isdisjoint(cells),
        layouts={path: str(stage.layout) for path, stage in stages.items()},
        sizes={path: tuple(stage.size) for path, stage in stages.items()},  # pyright: ignore
    )
