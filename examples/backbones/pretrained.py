"""Loaders for the public ImageNet weights that TransUNet, Swin-UNet and VM-UNet start from.

Each prints what it filled, which entries of the file it did not use and why, and what keeps its initial values. A file
that matches nothing is an error: it is the wrong file, or the wrong model.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .swin_unet import SwinUNet
from .transunet import TransUNet
from .vm_unet import VMUNet


@dataclass(frozen=True)
class Loaded:
    """What a loader did.

    Attributes:
        source: the file, and the model it went into.
        filled: {key of the model: entry of the file}.
        unused: {entry of the file: why it, or one of its copies, went nowhere}.
        initial: keys of the model that the file did not fill.
    """

    source: str
    filled: dict[str, str]
    unused: dict[str, str]
    initial: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.filled) + len(self.initial)
        lines = [f"{self.source}: {len(self.filled)} of {total} tensors filled"]
        lines += [f"  filled {part}: {count}" for part, count in _by_part(self.filled).items()]
        lines += [f"  not used {entry}: {why}" for entry, why in self.unused.items()]
        lines += [f"  keeps its initial values {part}: {count}" for part, count in _by_part(self.initial).items()]
        return "\n".join(lines)


def load_transunet(model: TransUNet, path: str | Path) -> Loaded:
    """Fill ResNet and ViT from `R50+ViT-B_16.npz` (ViT, ImageNet-21k); the decoder is not in it.

    Raises:
        ValueError: the file holds no arrays, or nothing in it fits the model.
    """
    tokens = model.transformer.embeddings.position_embeddings.shape[1]
    entries: dict[str, tuple[Tensor, list[str]]] = {}
    with np.load(path) as file:
        for name in file.files:
            if not isinstance(file[name], np.ndarray):  # another zip archive, such as a torch checkpoint
                raise ValueError(f"{path} is no npz file of arrays: its entry {name!r} is none")
            array = torch.from_numpy(np.asarray(file[name], dtype=np.float32))
            key, convert = _vit_key(name)
            array = _positions(array, tokens) if key == _POSITIONS else convert(array)
            entries[name] = (array, [key] if key else [])
    return _fill(model, path, entries)


def load_swin_unet(model: SwinUNet, path: str | Path) -> Loaded:
    """Fill the encoder from `swin_tiny_patch4_window7_224.pth`, and the decoder's blocks from the mirrored stages.

    Raises:
        ValueError: the file holds no tensors, or nothing in it fits the model.
    """
    return _fill(model, path, _mirrored(_tensors(path), len(model.layers), ""))


def load_vm_unet(model: VMUNet, path: str | Path) -> Loaded:
    """Fill the encoder from a VMamba checkpoint (tiny or small), and the decoder's blocks from the mirrored stages.

    Raises:
        ValueError: the file holds no tensors, or nothing in it fits the model.
    """
    return _fill(model, path, _mirrored(_tensors(path), len(model.vmunet.layers), "vmunet."))


def _fill(model: nn.Module, path: str | Path, entries: Mapping[str, tuple[Tensor, list[str]]]) -> Loaded:
    """Copy {entry: (tensor, keys of the model it is for)} where the key exists and the shape agrees."""
    state = model.state_dict()
    tensors, filled, unused = {}, {}, {}
    for name, (tensor, keys) in entries.items():
        known = [key for key in keys if key in state]
        for key in known:
            if tensor.shape == state[key].shape:
                tensors[key], filled[key] = tensor, name
            else:
                unused[name] = f"shape {_size(tensor)}, but {key} has {_size(state[key])}"
        if not known:
            unused[name] = "the model has no such parameter"
    source = f"{Path(path).name} into {type(model).__name__}"
    if not filled:
        reasons = [f"  {name}: {why}" for name, why in list(unused.items())[:5]] or ["  the file is empty"]
        raise ValueError("\n".join([f"{source}: nothing in the file fits the model, nothing was loaded", *reasons]))
    model.load_state_dict(tensors, strict=False)
    loaded = Loaded(source, filled, unused, tuple(key for key in state if key not in filled))
    print(loaded)
    return loaded


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _by_part(keys: Iterable[str]) -> Counter[str]:
    """How many keys each part of the model has, a part being a path up to its first number: `layers.0`."""
    return Counter(_part(key) for key in keys)


def _part(key: str) -> str:
    names = key.split(".")[:-1]
    numbered = (depth for depth, name in enumerate(names, 1) if name[-1].isdigit())
    return ".".join(names[: next(numbered, len(names))]) or key


# Swin-UNet and VM-UNet


def _tensors(path: str | Path) -> dict[str, Tensor]:
    """The entry `model` of a torch checkpoint, or the checkpoint itself if it is a state_dict."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and unpickling that can run any code. If you trust its source, save its "
            f"weights alone once: torch.save({{'model': torch.load({str(path)!r}, weights_only=False)['model']}}, ...)"
        ) from error
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name, neither at its top nor in an entry 'model'")
    return tensors


def _mirrored(state: Mapping[str, Tensor], stages: int, prefix: str) -> dict[str, tuple[Tensor, list[str]]]:
    """Each entry for the key of the same name and, from encoder stage i, for decoder stage `stages - 1 - i`."""
    entries = {}
    for name, tensor in state.items():
        keys = [prefix + name]
        if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
            keys.append(f"{prefix}layers_up.{stages - 1 - int(match[1])}.{match[2]}")
        entries[name] = (tensor, keys)
    return entries


# TransUNet: JAX kernels are (height, width, in, out) for convolutions and (in, out), heads split, for linear layers


def _conv(kernel: Tensor) -> Tensor:
    return kernel.permute(3, 2, 0, 1)


def _linear(kernel: Tensor) -> Tensor:
    return kernel.reshape(kernel.shape[0], -1).t()


def _linear_out(kernel: Tensor) -> Tensor:
    return kernel.reshape(-1, kernel.shape[-1]).t()


def _same(x: Tensor) -> Tensor:
    return x


_POSITIONS = "transformer.embeddings.position_embeddings"
_RESNET = "transformer.embeddings.hybrid_model"
_LAYER = r"Transformer/encoderblock_(\d+)"
_VIT: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    (r"conv_root/kernel", f"{_RESNET}.root.conv.weight", _conv),
    (r"gn_root/(scale|bias)", rf"{_RESNET}.root.gn.\1", torch.flatten),
    (r"(block\d+)/(unit\d+)/(conv\d)/kernel", rf"{_RESNET}.body.\1.\2.\3.weight", _conv),
    (r"(block\d+)/(unit\d+)/conv_proj/kernel", rf"{_RESNET}.body.\1.\2.downsample.weight", _conv),
    (r"(block\d+)/(unit\d+)/(gn\d|gn_proj)/(scale|bias)", rf"{_RESNET}.body.\1.\2.\3.\4", torch.flatten),
    (r"embedding/kernel", "transformer.embeddings.patch_embeddings.weight", _conv),
    (r"embedding/bias", "transformer.embeddings.patch_embeddings.bias", _same),
    (r"Transformer/posembed_input/pos_embedding", _POSITIONS, _same),
    (r"Transformer/encoder_norm/(scale|bias)", r"transformer.encoder.encoder_norm.\1", _same),
    (rf"{_LAYER}/LayerNorm_0/(scale|bias)", r"transformer.encoder.layer.\1.attention_norm.\2", _same),
    (rf"{_LAYER}/LayerNorm_2/(scale|bias)", r"transformer.encoder.layer.\1.ffn_norm.\2", _same),
    (
        rf"{_LAYER}/MultiHeadDotProductAttention_1/(query|key|value)/kernel",
        r"transformer.encoder.layer.\1.attn.\2.weight",
        _linear,
    ),
    (
        rf"{_LAYER}/MultiHeadDotProductAttention_1/out/kernel",
        r"transformer.encoder.layer.\1.attn.out.weight",
        _linear_out,
    ),
    (
        rf"{_LAYER}/MultiHeadDotProductAttention_1/(query|key|value|out)/bias",
        r"transformer.encoder.layer.\1.attn.\2.bias",
        torch.flatten,
    ),
    (rf"{_LAYER}/MlpBlock_3/Dense_0/kernel", r"transformer.encoder.layer.\1.ffn.fc1.weight", _linear),
    (rf"{_LAYER}/MlpBlock_3/Dense_0/bias", r"transformer.encoder.layer.\1.ffn.fc1.bias", _same),
    (rf"{_LAYER}/MlpBlock_3/Dense_1/kernel", r"transformer.encoder.layer.\1.ffn.fc2.weight", _linear),
    (rf"{_LAYER}/MlpBlock_3/Dense_1/bias", r"transformer.encoder.layer.\1.ffn.fc2.bias", _same),
]


def _vit_key(name: str) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """The model's key for an entry of the npz file, and what brings the entry into its layout."""
    for pattern, key, convert in _VIT:
        if match := re.fullmatch(pattern, name):
            return re.sub(r"\.scale$", ".weight", match.expand(key)), convert
    return None, _same


def _positions(embedding: Tensor, tokens: int) -> Tensor:
    """(1, 1 + n, C) or (1, n, C) to (1, tokens, C): without the class token, the square grid resized if need be."""
    if math.isqrt(embedding.shape[1]) ** 2 != embedding.shape[1]:
        embedding = embedding[:, 1:]
    have, want = math.isqrt(embedding.shape[1]), math.isqrt(tokens)
    if have == want:
        return embedding
    grid = embedding.unflatten(1, (have, have)).permute(0, 3, 1, 2)
    # corners on corners, as published
    return F.interpolate(grid, (want, want), mode="bilinear", align_corners=True).flatten(2).mT
