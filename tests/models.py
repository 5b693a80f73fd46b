"""Small U-shaped models that the tests train, and what they are trained with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reseg_loss import ReSegWrapper
from reseg_loss.recording.hooks import Recorder, Recording


def block(
    cin: int, cout: int, dims: int = 2, norm: Callable[[int], nn.Module] | None = None, inplace: bool = False
) -> nn.Sequential:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    batch_norm = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
    return nn.Sequential(conv(cin, cout, 3, padding=1), (norm or batch_norm)(cout), nn.ReLU(inplace=inplace))


class UNet(nn.Module):
    """A U-Net with levels of strides 1, 2, 4 (as many as `depth`) and a bottleneck below them."""

    taps: ClassVar = {
        "encoder": ["encoder.0", "encoder.1", "encoder.2"],
        "decoder": ["decoder.2", "decoder.1", "decoder.0"],
        "bottleneck": "bottleneck",
    }

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 3,
        width: int = 4,
        dims: int = 2,
        norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        depth: int = 3,
    ) -> None:
        super().__init__()
        widths = [width << level for level in range(depth)]
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
        self.encoder = nn.ModuleList([block(a, b, dims, norm) for a, b in zip([in_channels, *widths], widths)])
        self.bottleneck = block(widths[-1], 2 * widths[-1], dims, norm)
        self.up = nn.ModuleList([up(2 * b, b, 2, 2) for b in reversed(widths)])
        self.decoder = nn.ModuleList([block(2 * b, b, dims, norm) for b in reversed(widths)])
        self.dropout = nn.Dropout(dropout)
        self.head = conv(width, classes, 1)

    def forward(self, x: Tensor) -> Any:
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
            x = self.pool(x)
        x = self.dropout(self.bottleneck(x))
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips)):
            x = decode(torch.cat([up(x), skip], 1))
        return self.head(x)


class Evaluated(UNet):
    """Logits in training, and probabilities in evaluation."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        if self.training:
            return logits
        return logits.softmax(1) if logits.shape[1] > 1 else logits.sigmoid()


class WritesIntoItsInput(UNet):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(1))


def task_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label)


IGNORED = 255


def ignoring(logits: Tensor, label: Tensor) -> Tensor:
    """`task_loss` that leaves pixels out."""
    return F.cross_entropy(logits.float(), label, ignore_index=IGNORED)


def batch(
    n: int = 2, size: int = 16, channels: int = 1, classes: int = 3, dims: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (n, *[size] * dims), generator=generator)
    image = label.unsqueeze(1).float() + 0.1 * torch.randn(n, channels, *[size] * dims, generator=generator)
    return image, label


def loader(batches: int = 4, **kwargs: Any) -> torch.utils.data.DataLoader:
    image, label = batch(n=2 * batches, **kwargs)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(image, label), batch_size=2, shuffle=True)


def ready(model: Any = UNet, image: Tensor | None = None, **kwargs: Any) -> tuple[Any, ReSegWrapper]:
    """A model in training (or what makes one) and a wrapper with an untrained, frozen teacher, always the same."""
    torch.manual_seed(0)
    model = model if isinstance(model, nn.Module) else model()
    torch.manual_seed(1)
    reseg = ReSegWrapper(model, batch()[0] if image is None else image, **{"weight": 1.0, **kwargs})
    reseg.freeze_teacher()
    return model, reseg


def recording_of(model: nn.Module) -> Recording:
    """What the hooks of the model's first extractor write to."""
    hooks = model._forward_pre_hooks.values()
    return next(hook.recording for hook in hooks if isinstance(hook, Recorder) and hook.recording is not None)


def tensors_in(holder: Any) -> list[Tensor]:
    """What it holds at any depth, but for the tensors of modules."""
    if isinstance(holder, Tensor):
        return [holder]
    if isinstance(holder, Mapping):
        parts: Iterable[Any] = holder.values()
    elif isinstance(holder, (list, tuple)):
        parts = holder
    elif isinstance(holder, (nn.Module, type)) or not hasattr(holder, "__dict__"):
        parts = ()
    else:
        parts = vars(holder).values()
    return [tensor for part in parts for tensor in tensors_in(part)]


def through_file(value: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def saved(holder: Any) -> dict[str, Any]:
    """The state through a file that may hold tensors and plain values only."""
    return through_file(holder.state_dict())


class PadsInside:
    """Beside a network among the bases: it pads to multiples of 16, and crops."""

    def forward(self, x: Tensor) -> Any:
        height, width = x.shape[2:]
        return super().forward(F.pad(x, (0, -width % 16, 0, -height % 16)))[..., :height, :width]  # pyright: ignore


class Threshold(nn.Module):
    """A segmenter that needs no training: class 1 where the image is above one half."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        assert not self.training
        return torch.cat([0.5 - image, image - 0.5], 1) * self.scale


def inplace(model: nn.Module, flag: bool = True) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = flag
    return model
