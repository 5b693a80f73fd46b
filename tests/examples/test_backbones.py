"""TransUNet, Swin-UNet and VM-UNet: their public keys, their arithmetic, and the loaders of pretrained files.

The references below read a state_dict by the public keys and share no code with the models: functional torch for
TransUNet, and loops over windows, patches and scan positions for the other two.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from test_scan import sequential
from timm.layers import GroupNormAct, StdConv2d
from timm.models.resnetv2 import Bottleneck
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn

from examples.backbones.patches import PatchExpand
from examples.backbones.pretrained import Loaded, load_swin_unet, load_transunet, load_vm_unet
from examples.backbones.swin_unet import SwinUNet
from examples.backbones.transunet import Block, TransUNet, Unit
from examples.backbones.vm_unet import SS2D, VMUNet, cross_merge, cross_scan
from reseg_loss import find_taps

State = dict[str, Tensor]


def small_transunet(num_classes: int = 3, **kwargs: Any) -> TransUNet:
    sizes = {"width": 32, "units": (2, 1, 2), "dim": 24, "depth": 2, "heads": 3, "mlp": 40, "decoder": (24, 16, 12, 8)}
    return TransUNet(num_classes, **{"image_size": 64, **sizes, **kwargs})


def small_swin_unet(num_classes: int = 3, **kwargs: Any) -> SwinUNet:
    return SwinUNet(num_classes, **{"image_size": 64, "width": 12, "heads": (1, 2, 3, 4), "window": 4, **kwargs})


def small_vm_unet(num_classes: int = 3, **kwargs: Any) -> VMUNet:
    return VMUNet(num_classes, **{"width": 8, "depths": (1, 2, 1, 1), "depths_up": (1, 1, 2, 1), "state": 3, **kwargs})


SMALL: dict[str, Callable[..., nn.Module]] = {
    "TransUNet": small_transunet,
    "SwinUNet": small_swin_unet,
    "VMUNet": small_vm_unet,
}


def image(channels: int = 3, size: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """No parameter and no statistic left at zero or one, where an error of wiring would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "attn_mask" not in name and "A_logs" not in name:
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                value += (noise.abs() if "running_var" in name else noise) * (0.3 if value.dim() == 1 else 0.1)
    return model


def agrees(model: nn.Module, reference: Callable[[State, Tensor], Tensor], x: Tensor, tolerance: float) -> None:
    """In fp64 within the tolerance, in fp32 within twice the error that the reference makes there (of all pixels)."""
    model = model.double().eval()
    with torch.no_grad():
        expected = reference(model.state_dict(), x.double())
        torch.testing.assert_close(model(x.double()), expected, rtol=tolerance, atol=tolerance)
        model, x = model.float(), x.float()
        error = (model(x) - expected).norm()
        assert error <= 2 * (reference(model.state_dict(), x) - expected).norm()
        assert error < 1e-4 * expected.norm()  # neither is near only because both are far


# Keys and sizes

# Parameters, keys, and the SHA-256 of the sorted lines "key shape", as in "output.weight 9x96x1x1" and "scalar" for a
# tensor without axes, joined by newlines: the state_dict of the public implementation at 9 classes and 224x224.
PUBLIC = [
    (TransUNet, 105_277_081, 409, "a84d6c43cc886b23a77be9fdc914716b211189ab13b43de63ea6eee80d8707be"),
    (SwinUNet, 27_168_900, 238, "00f4f288a06b4e908c0b8d786f592b6a1ec36cc23d31902514d37aa9e5c52c46"),
    (VMUNet, 27_427_761, 222, "5449b064387cf12006e6517d1a033bdffbb73d3ca082dac0e7c71418c1eabf57"),
]


@pytest.mark.parametrize(("build", "parameters", "keys", "digest"), PUBLIC, ids=lambda v: getattr(v, "__name__", ""))
def test_the_default_has_the_keys_and_shapes_of_the_public_state_dict(build, parameters, keys, digest):
    with torch.device("meta"):
        model = build(9)
    lines = sorted(f"{key} {'x'.join(map(str, v.shape)) or 'scalar'}" for key, v in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(lines) == keys
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


FEATURES: dict[type[nn.Module], dict[str, tuple[int, ...]]] = {
    TransUNet: {
        "transformer.embeddings.hybrid_model.root": (64, 112, 112),
        "transformer.embeddings.hybrid_model.body.block1": (256, 55, 55),
        "transformer.embeddings.hybrid_model.body.block2": (512, 28, 28),
        "transformer.embeddings.hybrid_model.body.block3": (1024, 14, 14),
        "transformer.encoder": (196, 768),
        "decoder.conv_more": (512, 14, 14),
        "decoder.blocks.0": (256, 28, 28),
        "decoder.blocks.1": (128, 56, 56),
        "decoder.blocks.2": (64, 112, 112),
        "decoder.blocks.3": (16, 224, 224),
    },
    SwinUNet: {
        "patch_embed": (3136, 96),
        "layers.0": (784, 192),
        "layers.1": (196, 384),
        "layers.2": (49, 768),
        "norm": (49, 768),
        "layers_up.1.blocks.1": (196, 384),
        "layers_up.2.blocks.1": (784, 192),
        "layers_up.3": (3136, 96),
    },
    VMUNet: {
        "vmunet.patch_embed": (56, 56, 96),
        "vmunet.layers.0": (28, 28, 192),
        "vmunet.layers.1": (14, 14, 384),
        "vmunet.layers.2": (7, 7, 768),
        "vmunet.layers.3": (7, 7, 768),
        "vmunet.layers_up.0": (7, 7, 768),
        "vmunet.layers_up.1": (14, 14, 384),
        "vmunet.layers_up.2": (28, 28, 192),
        "vmunet.layers_up.3": (56, 56, 96),
    },
}


@pytest.mark.parametrize("build", FEATURES, ids=lambda c: c.__name__)
def test_features_at_224_have_the_published_shapes(build):
    model, found = build(9).eval(), {}
    for name in FEATURES[build]:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.update({name: tuple(output.shape[1:])})
        )
    with torch.no_grad():
        logits = model(image(1, 224, batch=1))
    assert logits.shape == (1, 9, 224, 224)
    assert logits.isfinite().all()
    assert found == FEATURES[build]


# Arithmetic: TransUNet


def reference_transunet(p: State, x: Tensor, units: tuple[int, ...], heads: int) -> Tensor:
    """Logits of a TransUNet in evaluation mode."""

    def conv(x: Tensor, key: str, stride: int = 1) -> Tensor:
        w = p[key + ".weight"]
        mean = w.mean((1, 2, 3), keepdim=True)
        variance = (w - mean).square().mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, (w - mean) / (variance + 1e-5).sqrt(), stride=stride, padding=w.shape[-1] // 2)

    def group_norm(x: Tensor, key: str, groups: int, eps: float) -> Tensor:
        parts = x.reshape(len(x), groups, -1)
        parts = (parts - parts.mean(-1, keepdim=True)) / (parts.var(-1, keepdim=True, correction=0) + eps).sqrt()
        return parts.view_as(x) * p[key + ".weight"][:, None, None] + p[key + ".bias"][:, None, None]

    def unit(x: Tensor, key: str, stride: int) -> Tensor:
        y = group_norm(conv(x, key + "conv1"), key + "gn1", 32, 1e-6).relu()
        y = group_norm(conv(y, key + "conv2", stride), key + "gn2", 32, 1e-6).relu()
        y = group_norm(conv(y, key + "conv3"), key + "gn3", 32, 1e-6)
        if key + "downsample.weight" in p:
            x = conv(x, key + "downsample", stride)
            x = group_norm(x, key + "gn_proj", x.shape[1], 1e-5)
        return (x + y).relu()

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ p[key + ".weight"].T + p[key + ".bias"]

    def layer_norm(x: Tensor, key: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * p[key + ".weight"] + p[key + ".bias"]

    def attention(x: Tensor, key: str) -> Tensor:
        q, k, v = (linear(x, key + name) for name in ("query", "key", "value"))
        outs = []
        for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
            outs.append((a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ c)
        return linear(torch.cat(outs, -1), key + "out")

    def conv_bn_relu(x: Tensor, key: str) -> Tensor:
        statistics = p[key + ".1.running_mean"], p[key + ".1.running_var"]
        x = F.conv2d(x, p[key + ".0.weight"], padding=1)
        return F.batch_norm(x, *statistics, p[key + ".1.weight"], p[key + ".1.bias"]).relu()

    root = "transformer.embeddings.hybrid_model."
    size = x.shape[-1]
    stem = group_norm(conv(x, root + "root.conv", 2), root + "root.gn", 32, 1e-6).relu()
    x, maps = F.max_pool2d(stem, 3, 2, padding=0), []
    for i, count in enumerate(units):
        for j in range(count):
            x = unit(x, f"{root}body.block{i + 1}.unit{j + 1}.", 2 if i > 0 and j == 0 else 1)
        maps.append(x)
    quarter = x.new_zeros(len(x), maps[0].shape[1], size // 4, size // 4)
    quarter[:, :, : maps[0].shape[2], : maps[0].shape[3]] = maps[0]  # zeros right and below

    embeddings = "transformer.embeddings.patch_embeddings."
    x = F.conv2d(x, p[embeddings + "weight"], p[embeddings + "bias"])
    x = torch.stack([x[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], 1)
    x = x + p["transformer.embeddings.position_embeddings"]
    layer = 0
    while f"transformer.encoder.layer.{layer}.ffn.fc1.weight" in p:
        key = f"transformer.encoder.layer.{layer}."
        x = x + attention(layer_norm(x, key + "attention_norm"), key + "attn.")
        hidden = linear(layer_norm(x, key + "ffn_norm"), key + "ffn.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), key + "ffn.fc2")
        layer += 1
    x = layer_norm(x, "transformer.encoder.encoder_norm")

    x = conv_bn_relu(x.mT.reshape(len(x), -1, size // 16, size // 16), "decoder.conv_more")
    for i, skip in enumerate((maps[1], quarter, stem, None)):
        x = F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=True)
        x = x if skip is None else torch.cat([x, skip], 1)
        x = conv_bn_relu(conv_bn_relu(x, f"decoder.blocks.{i}.conv1"), f"decoder.blocks.{i}.conv2")
    return F.conv2d(x, p["segmentation_head.0.weight"], p["segmentation_head.0.bias"], padding=1)


def test_transunet_is_its_reference():
    agrees(perturbed(small_transunet()), partial(reference_transunet, units=(2, 1, 2), heads=3), image(), 1e-9)


def test_transunets_unit_is_timms_bottleneck():
    # the projection's norm differs: 32 groups in timm, one group per channel here
    theirs = Bottleneck(
        128,
        128,
        bottle_ratio=0.25,
        conv_layer=lambda *args, **kwargs: StdConv2d(*args, **kwargs, eps=1e-5),
        norm_layer=lambda *args, **kwargs: GroupNormAct(*args, **kwargs, num_groups=32, eps=1e-6),
    )
    ours = perturbed(Unit(128, 32))
    theirs.load_state_dict({k.replace("gn", "norm"): v for k, v in ours.state_dict().items()})
    x = torch.randn(2, 128, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_transunets_block_is_timms_vit_block():
    ours = perturbed(Block(24, 3, 40, 0.0))
    theirs = ViTBlock(24, 3, mlp_ratio=40 / 24, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            **{f"norm1.{k}": state[f"attention_norm.{k}"] for k in ("weight", "bias")},
            **{f"norm2.{k}": state[f"ffn_norm.{k}"] for k in ("weight", "bias")},
            **{f"mlp.{f}.{k}": state[f"ffn.{f}.{k}"] for f in ("fc1", "fc2") for k in ("weight", "bias")},
            **{f"attn.proj.{k}": state[f"attn.out.{k}"] for k in ("weight", "bias")},
            **{
                f"attn.qkv.{k}": torch.cat([state[f"attn.{n}.{k}"] for n in ("query", "key", "value")])
                for k in ("weight", "bias")
            },
        }
    )
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(ours(x), theirs(x))


# Arithmetic: Swin-UNet


def layer_norm(p: State, key: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[key + ".weight"], p[key + ".bias"], 1e-5)


def shuffled(p: State, key: str, x: Tensor, factor: int) -> Tensor:
    """Patch expansion of a map (B, H, W, C), one output pixel after the other."""
    x = x @ p[key + ".expand.weight"].T
    b, height, width, channels = x.shape
    out = channels // factor**2
    y = x.new_zeros(b, height * factor, width * factor, out)
    for i in range(height * factor):
        for j in range(width * factor):
            place = (i % factor) * factor + j % factor
            y[:, i, j] = x[:, i // factor, j // factor, place * out : (place + 1) * out]
    return layer_norm(p, key + ".norm", y)


def merged(p: State, key: str, x: Tensor) -> Tensor:
    """Patch merging of a map (B, H, W, C)."""
    x = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], -1)
    return layer_norm(p, key + ".norm", x) @ p[key + ".reduction.weight"].T


def patches(p: State, key: str, x: Tensor) -> Tensor:
    x = F.conv2d(x, p[key + ".proj.weight"], p[key + ".proj.bias"], stride=4)
    return layer_norm(p, key + ".norm", x.permute(0, 2, 3, 1))


def swin_block(p: State, key: str, x: Tensor, heads: int, window: int, shifted: bool) -> Tensor:
    """Windows one by one; in a shifted block, a pixel sees those of its window that it also adjoins in the image."""
    size, channels = x.shape[1], x.shape[-1]
    window, shift = (size, 0) if size <= window else (window, window // 2 if shifted else 0)
    y, out = layer_norm(p, key + "norm1", x), torch.zeros_like(x)
    for top in range(0, size, window):
        for left in range(0, size, window):
            # pixels of this window in the map rolled by the shift, as (row, column) before and after the roll
            rolled = [(top + i, left + j) for i in range(window) for j in range(window)]
            pixels = [((i + shift) % size, (j + shift) % size) for i, j in rolled]
            tokens = torch.stack([y[:, i, j] for i, j in pixels], 1)
            q, k, v = (tokens @ p[key + "attn.qkv.weight"].T + p[key + "attn.qkv.bias"]).split(channels, -1)
            result = []
            for head, (a, b, c) in enumerate(zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1))):
                score = a @ b.mT * a.shape[-1] ** -0.5
                for m, (i, j) in enumerate(rolled):
                    for n, (i2, j2) in enumerate(rolled):
                        place = (i - i2 + window - 1) * (2 * window - 1) + (j - j2 + window - 1)
                        score[:, m, n] += p[key + "attn.relative_position_bias_table"][place, head]
                        wraps = [(u + shift >= size) != (w + shift >= size) for u, w in ((i, i2), (j, j2))]
                        score[:, m, n] -= 100.0 * any(wraps)
                result.append(score.softmax(-1) @ c)
            tokens = torch.cat(result, -1) @ p[key + "attn.proj.weight"].T + p[key + "attn.proj.bias"]
            for n, (i, j) in enumerate(pixels):
                out[:, i, j] = tokens[:, n]
    x = x + out
    hidden = F.gelu(layer_norm(p, key + "norm2", x) @ p[key + "mlp.fc1.weight"].T + p[key + "mlp.fc1.bias"])
    return x + hidden @ p[key + "mlp.fc2.weight"].T + p[key + "mlp.fc2.bias"]


def reference_swin_unet(p: State, x: Tensor, heads: tuple[int, ...], window: int) -> Tensor:
    def blocks(x: Tensor, key: str, stage: int) -> Tensor:
        for i in range(2):
            x = swin_block(p, f"{key}.blocks.{i}.", x, heads[stage], window, shifted=i == 1)
        return x

    x, skips = patches(p, "patch_embed", x), []
    for stage in range(4):
        skips.append(x)
        x = blocks(x, f"layers.{stage}", stage)
        x = merged(p, f"layers.{stage}.downsample", x) if stage < 3 else x
    x = shuffled(p, "layers_up.0", layer_norm(p, "norm", x), 2)
    for i in (1, 2, 3):
        x = torch.cat([x, skips[3 - i]], -1) @ p[f"concat_back_dim.{i}.weight"].T + p[f"concat_back_dim.{i}.bias"]
        x = blocks(x, f"layers_up.{i}", 3 - i)
        x = shuffled(p, f"layers_up.{i}.upsample", x, 2) if i < 3 else x
    x = shuffled(p, "up", layer_norm(p, "norm_up", x), 4)
    return (x @ p["output.weight"].flatten(1).T).permute(0, 3, 1, 2)


def test_swin_unet_is_its_reference():
    # maps of 16, 8, 4 and 2 pixels: with shifts, with shifts, one window, and less than one
    reference = partial(reference_swin_unet, heads=(1, 2, 3, 4), window=4)
    agrees(perturbed(small_swin_unet()), reference, image(batch=1), 1e-9)


def test_swin_unets_buffers_are_the_published_ones():
    state = SwinUNet(2, width=12, heads=(1, 1, 1, 1)).state_dict()
    index = state["layers.0.blocks.0.attn.relative_position_index"]
    mask = state["layers_up.1.blocks.1.attn_mask"]
    assert index.dtype == torch.int64
    assert index[0, 0] == index[48, 48] == 84
    assert (index[0, 48], index[48, 0]) == (0, 168)
    assert mask.shape == (4, 49, 49)
    assert sorted(mask.unique().tolist()) == [-100.0, 0.0]
    assert not mask[0].any()
    assert mask[1].ne(0).sum() == 2 * 28 * 21


# Arithmetic: VM-UNet


def ss2d(p: State, key: str, x: Tensor, state: int) -> Tensor:
    """Scan positions are listed, walked one by one, and their outputs put where they came from."""
    height, width = x.shape[1:3]
    x, gate = (x @ p[key + "in_proj.weight"].T).chunk(2, -1)
    x = F.conv2d(x.permute(0, 3, 1, 2), p[key + "conv2d.weight"], p[key + "conv2d.bias"], padding=1, groups=x.shape[-1])
    x = x * x.sigmoid()
    inner = x.shape[1]
    by_row = [(i, j) for i in range(height) for j in range(width)]
    by_column = [(i, j) for j in range(width) for i in range(height)]
    total = torch.zeros_like(x)
    for k, path in enumerate((by_row, by_column, by_row[::-1], by_column[::-1])):
        seen = torch.stack([x[:, :, i, j] for i, j in path], -1)
        dt, b, c = (p[key + "x_proj_weight"][k] @ seen).split([p[key + "dt_projs_weight"].shape[-1], state, state], 1)
        own = slice(k * inner, (k + 1) * inner)
        rates, direct = -p[key + "A_logs"][own].exp(), p[key + "Ds"][own]
        dt = p[key + "dt_projs_weight"][k] @ dt
        y = sequential(seen, dt, rates, b[:, None], c[:, None], direct, p[key + "dt_projs_bias"][k])
        for t, (i, j) in enumerate(path):
            total[:, :, i, j] += y[:, :, t]
    y = layer_norm(p, key + "out_norm", total.permute(0, 2, 3, 1)) * (gate * gate.sigmoid())
    return y @ p[key + "out_proj.weight"].T


def reference_vm_unet(p: State, x: Tensor, depths: tuple[int, ...], depths_up: tuple[int, ...], state: int) -> Tensor:
    p = {key.removeprefix("vmunet."): value for key, value in p.items()}

    def blocks(x: Tensor, key: str, count: int) -> Tensor:
        for i in range(count):
            block = f"{key}.blocks.{i}."
            x = x + ss2d(p, block + "self_attention.", layer_norm(p, block + "ln_1", x), state)
        return x

    x, skips = patches(p, "patch_embed", x), []
    for i, count in enumerate(depths):
        skips.append(x)
        x = blocks(x, f"layers.{i}", count)
        x = merged(p, f"layers.{i}.downsample", x) if i < 3 else x
    x = blocks(x, "layers_up.0", depths_up[0])
    for i in (1, 2, 3):
        x = blocks(shuffled(p, f"layers_up.{i}.upsample", x + skips[4 - i], 2), f"layers_up.{i}", depths_up[i])
    x = shuffled(p, "final_up", x, 4)
    return (x @ p["final_conv.weight"].flatten(1).T + p["final_conv.bias"]).permute(0, 3, 1, 2)


def test_vm_unet_is_its_reference():
    x = torch.cat([image(batch=1), image(batch=1).flip(3)], 3)  # 64 x 128: rows and columns differ
    reference = partial(reference_vm_unet, depths=(1, 2, 1, 1), depths_up=(1, 1, 2, 1), state=3)
    agrees(perturbed(small_vm_unet()), reference, x, 1e-6)  # A_logs are read in fp32


def test_four_scans_and_back_is_four_times_the_map():
    x = torch.randn(2, 3, 4, 5)
    scans = cross_scan(x)
    assert torch.equal(scans[:, 1, :, 1], x[:, :, 1, 0])  # down the first column
    assert torch.equal(scans[:, 3, :, 0], x[:, :, -1, -1])
    torch.testing.assert_close(cross_merge(scans, 4, 5), 4 * x)


def test_patch_expansion_is_its_loop():
    module = perturbed(PatchExpand(6, 2, 3))
    x = torch.randn(1, 2, 3, 6)
    state = {f"up.{key}": value for key, value in module.state_dict().items()}
    torch.testing.assert_close(module(x), shuffled(state, "up", x, 3))


# Initial values


def test_vm_unet_begins_as_published():
    torch.manual_seed(0)
    block = SS2D(64, 16)
    assert torch.equal(block.A_logs, torch.arange(1, 17).float().log().expand(512, 16))
    assert torch.equal(block.Ds, torch.ones(512))
    steps = F.softplus(block.dt_projs_bias).detach()
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.15  # the middle of a log-uniform draw
    model = VMUNet(2, width=32)
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert abs(weights.std() - 0.02) < 1e-3


def test_swin_unet_and_transunet_begin_as_published():
    torch.manual_seed(0)
    swin = small_swin_unet(width=24)
    linears = [m for m in swin.modules() if isinstance(m, nn.Linear)]
    assert abs(torch.cat([m.weight.flatten() for m in linears]).std() - 0.02) < 1e-3
    assert all(m.bias is None or not m.bias.any() for m in linears)
    trans = small_transunet()
    assert not trans.transformer.embeddings.position_embeddings.any()
    assert trans.transformer.encoder.layer[0].ffn.fc1.bias.abs().max() < 1e-4


def test_stochastic_depth_grows_to_the_coarsest_block_and_falls_again():
    def rates(stages: nn.ModuleList) -> list[float]:
        return [b.drop_path.drop_prob for s in stages for b in s.blocks]

    model = VMUNet(2, width=8, state=1).vmunet
    assert rates(model.layers) == pytest.approx([0.2 * i / 7 for i in range(8)])
    assert rates(model.layers_up) == pytest.approx([0.2 * i / 6 for i in range(6, -1, -1)])
    swin = small_swin_unet()
    # of the mirrored encoder stage, and in the same order; timm leaves out a drop path of rate 0
    ups = [[getattr(b.drop_path1, "drop_prob", 0.0) for b in s.blocks] for s in swin.layers_up[1:]]
    downs = [[getattr(b.drop_path1, "drop_prob", 0.0) for b in s.blocks] for s in swin.layers]
    assert downs == [pytest.approx([0.2 * i / 7, 0.2 * (i + 1) / 7]) for i in (0, 2, 4, 6)]
    assert ups == downs[2::-1]


# In use


@pytest.mark.parametrize("name", SMALL)
def test_a_state_dict_with_its_buffers_loads_strictly(name):
    state = perturbed(SMALL[name](), seed=1).state_dict()
    model = SMALL[name]()
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_one_channel_is_repeated_to_three(name):
    model = SMALL[name]().eval()
    x = image(1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(x.repeat(1, 3, 1, 1)))
        assert SMALL[name](5, in_channels=1).eval()(x).shape == (2, 5, 64, 64)
        assert SMALL[name](5, in_channels=4).eval()(image(4)).shape == (2, 5, 64, 64)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_lowers_the_loss_and_every_parameter_has_a_gradient(name):
    torch.manual_seed(0)
    model, x = SMALL[name](), image(1)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", SMALL)
def test_under_bf16_autocast_it_trains_close_to_fp32(name):
    torch.manual_seed(0)
    model, x = SMALL[name]().eval(), image(1)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    logits.float().square().mean().backward()
    assert (logits.detach().float() - expected).norm() < 0.03 * expected.norm()  # bf16 has steps of 2^-8
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "strides"), [("TransUNet", (2, 4, 8)), ("SwinUNet", (4, 8, 16)), ("VMUNet", (4, 8, 16))]
)
def test_the_taps_are_found(name, strides):
    plan = find_taps(SMALL[name](), image(1))
    assert [level.stride for level in plan.levels] == [(s, s) for s in strides]
    assert all(level.selected for level in plan.levels)


def test_the_decoders_feature_is_the_last_block_before_the_expansion():
    levels = find_taps(small_swin_unet(), image(1)).levels
    assert [str(level.encoder) for level in levels] == ["patch_embed", "layers.0", "layers.1"]
    assert [str(level.decoder) for level in levels[1:]] == ["layers_up.2.blocks.1", "layers_up.1.blocks.1"]
    levels = find_taps(small_vm_unet(), image(1)).levels
    assert [str(level.decoder) for level in levels] == [f"vmunet.layers_up.{i}" for i in (3, 2, 1)]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: small_transunet(image_size=100), "image_size=100: TransUNet takes multiples of 16"),
        (lambda: small_transunet(width=48), "width=48: TransUNet's group normalisation takes multiples of 32"),
        (lambda: small_transunet(decoder=(8, 8)), "2 decoder widths: TransUNet's decoder has 4 blocks"),
        (lambda: small_transunet()(image(size=96)), "built for 64x64 images, not .96, 96.; resize them"),
        (lambda: small_swin_unet(image_size=80), "image_size=80: it must be a multiple of 32"),
        (lambda: small_swin_unet(heads=(1, 2)), "4 depths and 2 heads"),
        (lambda: small_vm_unet(depths=(1, 1)), "2 depths and 4 depths_up"),
        (lambda: small_vm_unet()(image(size=48)), "multiples of 32, not .48, 48."),
        (lambda: small_vm_unet(scan="fast")(image()), "backend='fast' is no selective scan"),
    ],
)
def test_what_does_not_fit_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# Pretrained files, made here with the originals' names


def r50_vit_file(
    path: Path, width: int, units: tuple[int, ...], dim: int, heads: int, mlp: int, depth: int, grid: int
) -> dict[str, np.ndarray]:
    """Names and layouts of `R50+ViT-B_16.npz`, with other sizes; group norms are stored with axes of one."""
    rng = np.random.default_rng(0)
    arrays: dict[str, tuple[int, ...]] = {"conv_root/kernel": (7, 7, 3, width)}
    norms = {"gn_root": width}
    cin = width
    for i, count in enumerate(units):
        mid = width << i
        for j in range(count):
            unit = f"block{i + 1}/unit{j + 1}/"
            arrays[unit + "conv1/kernel"] = (1, 1, cin, mid)
            arrays[unit + "conv2/kernel"] = (3, 3, mid, mid)
            arrays[unit + "conv3/kernel"] = (1, 1, mid, 4 * mid)
            norms |= {unit + "gn1": mid, unit + "gn2": mid, unit + "gn3": 4 * mid}
            if j == 0:
                arrays[unit + "conv_proj/kernel"] = (1, 1, cin, 4 * mid)
                norms[unit + "gn_proj"] = 4 * mid
            cin = 4 * mid
    for name, channels in norms.items():
        arrays |= {f"{name}/{part}": (1, 1, 1, channels) for part in ("scale", "bias")}
    arrays |= {"embedding/kernel": (1, 1, cin, dim), "embedding/bias": (dim,), "cls": (1, 1, dim)}
    arrays |= {"Transformer/posembed_input/pos_embedding": (1, 1 + grid**2, dim)}
    for n in range(depth):
        block = f"Transformer/encoderblock_{n}/"
        for name in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{block}{name}/{part}": (dim,) for part in ("scale", "bias")}
        attention = block + "MultiHeadDotProductAttention_1/"
        for name in ("query", "key", "value"):
            arrays[f"{attention}{name}/kernel"] = (dim, heads, dim // heads)
            arrays[f"{attention}{name}/bias"] = (heads, dim // heads)
        arrays |= {attention + "out/kernel": (heads, dim // heads, dim), attention + "out/bias": (dim,)}
        arrays |= {block + "MlpBlock_3/Dense_0/kernel": (dim, mlp), block + "MlpBlock_3/Dense_0/bias": (mlp,)}
        arrays |= {block + "MlpBlock_3/Dense_1/kernel": (mlp, dim), block + "MlpBlock_3/Dense_1/bias": (dim,)}
    arrays |= {f"Transformer/encoder_norm/{part}": (dim,) for part in ("scale", "bias")}
    arrays |= {"pre_logits/kernel": (dim, dim), "pre_logits/bias": (dim,), "head/kernel": (dim, 7), "head/bias": (7,)}
    file = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in arrays.items()}
    np.savez(path, **file)
    return file


SIZES = {"width": 32, "units": (2, 1, 2), "dim": 24, "heads": 3, "mlp": 40, "depth": 2}


def test_transunet_from_the_vit_file(tmp_path, capsys):
    file = r50_vit_file(tmp_path / "R50+ViT-B_16.npz", grid=4, **SIZES)
    model = small_transunet()
    loaded = load_transunet(model, tmp_path / "R50+ViT-B_16.npz")
    printed = capsys.readouterr().out
    state = model.state_dict()

    # all but the decoder and the head, from all but the classifier
    assert set(loaded.initial) == {key for key in state if not key.startswith("transformer.")}
    assert set(loaded.unused) == {"cls", "pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias"}
    assert "not used head/kernel: the model has no such parameter" in printed
    assert "filled transformer.encoder.layer.1: 16" in printed
    assert "keeps its initial values decoder.blocks.0: 12" in printed
    assert printed == f"{loaded}\n"

    # what the layers compute is what the file's arrays say
    root = "transformer.embeddings.hybrid_model."
    kernel = file["block2/unit1/conv2/kernel"]
    assert state[root + "body.block2.unit1.conv2.weight"][5, 7, 0, 2] == kernel[0, 2, 7, 5]
    np.testing.assert_array_equal(
        state[root + "body.block1.unit1.gn_proj.bias"], file["block1/unit1/gn_proj/bias"].ravel()
    )
    np.testing.assert_array_equal(state[root + "root.gn.weight"], file["gn_root/scale"].ravel())
    x = torch.randn(6, 24)
    names = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    attention = model.transformer.encoder.layer[1].attn
    with torch.no_grad():
        key = np.einsum("ld,dhk->lhk", x.numpy(), file[names + "key/kernel"]) + file[names + "key/bias"]
        np.testing.assert_allclose(attention.key(x).unflatten(1, (3, 8)), key, rtol=1e-4, atol=1e-5)
        heads = x.unflatten(1, (3, 8))
        out = np.einsum("lhk,hkd->ld", heads.numpy(), file[names + "out/kernel"]) + file[names + "out/bias"]
        np.testing.assert_allclose(attention.out(x), out, rtol=1e-4, atol=1e-5)
        names = "Transformer/encoderblock_0/MlpBlock_3/Dense_1/"
        hidden = torch.randn(6, 40)
        expected = hidden.numpy() @ file[names + "kernel"] + file[names + "bias"]
        np.testing.assert_allclose(model.transformer.encoder.layer[0].ffn.fc2(hidden), expected, rtol=1e-4, atol=1e-5)
    position = file["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(state["transformer.embeddings.position_embeddings"], position[:, 1:])


@pytest.mark.parametrize("grid", [7, 3])
def test_transunets_positions_are_resized_as_published(grid, tmp_path):
    file = r50_vit_file(tmp_path / "vit.npz", grid=grid, **SIZES)
    model = small_transunet()
    load_transunet(model, tmp_path / "vit.npz")
    positions = file["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(grid, grid, 24)
    expected = ndimage.zoom(positions, (4 / grid, 4 / grid, 1), order=1).reshape(16, 24)
    found = model.transformer.embeddings.position_embeddings[0].detach()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_has_another_size_is_said_and_left(tmp_path, capsys):
    r50_vit_file(tmp_path / "vit.npz", grid=4, **{**SIZES, "depth": 3})
    model = small_transunet(in_channels=1)
    before = model.transformer.embeddings.hybrid_model.root.conv.weight.clone()
    loaded = load_transunet(model, tmp_path / "vit.npz")
    key = "transformer.embeddings.hybrid_model.root.conv.weight"
    assert loaded.unused["conv_root/kernel"] == f"shape 32x3x7x7, but {key} has 32x1x7x7"
    assert key in loaded.initial
    assert torch.equal(model.get_parameter(key), before)
    assert sum("encoderblock_2" in name for name in loaded.unused) == 16
    assert "conv_root/kernel: shape 32x3x7x7" in capsys.readouterr().out


def swin_file(width: int, heads: tuple[int, ...], window: int, grid: int) -> State:
    """Names of `swin_tiny_patch4_window7_224.pth`: depths 2, 2, 6, 2, buffers and classifier included."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
    }
    norms = {"patch_embed.norm": width, "norm": 8 * width}
    for i, depth in enumerate((2, 2, 6, 2)):
        dim, size = width << i, min(window, grid >> i)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            norms |= {block + "norm1": dim, block + "norm2": dim}
            shapes[block + "attn.relative_position_bias_table"] = ((2 * size - 1) ** 2, heads[i])
            shapes[block + "attn.relative_position_index"] = (size**2, size**2)
            if j % 2 and size < grid >> i:
                shapes[block + "attn_mask"] = ((grid >> i) ** 2 // size**2, size**2, size**2)
            for name, (out, into) in {
                "attn.qkv": (3 * dim, dim),
                "attn.proj": (dim, dim),
                "mlp.fc1": (4 * dim, dim),
                "mlp.fc2": (dim, 4 * dim),
            }.items():
                shapes |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
        if i < 3:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
            norms[f"layers.{i}.downsample.norm"] = 4 * dim
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    shapes |= {"head.weight": (10, 8 * width), "head.bias": (10,)}
    return filled(shapes)


def vmamba_file(width: int, state: int, depths: tuple[int, ...]) -> State:
    """Names of VMamba's checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
    }
    norms = {"patch_embed.norm": width}
    for i, depth in enumerate(depths):
        dim = width << i
        inner, rank = 2 * dim, math.ceil(dim / 16)
        for j in range(depth):
            norms |= {f"layers.{i}.blocks.{j}.ln_1": dim, f"layers.{i}.blocks.{j}.self_attention.out_norm": inner}
            for name, shape in {
                "x_proj_weight": (4, rank + 2 * state, inner),
                "dt_projs_weight": (4, inner, rank),
                "dt_projs_bias": (4, inner),
                "A_logs": (4 * inner, state),
                "Ds": (4 * inner,),
                "in_proj.weight": (2 * inner, dim),
                "conv2d.weight": (inner, 1, 3, 3),
                "conv2d.bias": (inner,),
                "out_proj.weight": (dim, inner),
            }.items():
                shapes[f"layers.{i}.blocks.{j}.self_attention.{name}"] = shape
        if i < 3:
            shapes[f"layers.{i}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
            norms[f"layers.{i}.downsample.norm"] = 4 * dim
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}
    return filled({**shapes, "classifier.head.weight": (10, 8 * width), "classifier.head.bias": (10,)})


def filled(shapes: dict[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_filled(model: nn.Module, file: State, loaded: Loaded, prefix: str) -> None:
    """Every filled tensor holds its entry: the encoder's own, the decoder's of stage 3 - i."""
    state = model.state_dict()
    for key, entry in loaded.filled.items():
        name = key.removeprefix(prefix)
        if name.startswith("layers_up."):
            _, stage, rest = name.split(".", 2)
            name = f"layers.{3 - int(stage)}.{rest}"
        assert entry == name
        assert torch.equal(state[key], file[name].to(state[key].dtype)), key
    assert set(loaded.filled) | set(loaded.initial) == set(state)


def test_swin_unet_from_swin_tiny(tmp_path, capsys):
    file = swin_file(12, (1, 2, 3, 4), 4, 16)
    torch.save({"model": file}, tmp_path / "swin.pth")
    model = small_swin_unet()
    loaded = load_swin_unet(model, tmp_path / "swin.pth")
    assert_filled(model, file, loaded, "")
    # blocks 2 to 5 of the third stage and the classifier have no place; expansions, merges and the head have no source
    assert {name.rpartition("blocks.")[2][:1] if "layers.2" in name else name for name in loaded.unused} == {
        *"2345",
        "head.weight",
        "head.bias",
    }
    assert {".".join(key.split(".")[:1]) for key in loaded.initial if "expand" not in key} == {
        "layers_up",
        "concat_back_dim",
        "norm_up",
        "up",
        "output",
    }
    assert [key for key in loaded.initial if key.startswith("layers_up") and "blocks" in key] == []
    assert "filled layers_up.1: " in capsys.readouterr().out


def test_vm_unet_from_vmamba(tmp_path, capsys):
    file = vmamba_file(8, 3, (2, 2, 5, 2))
    torch.save({"model": file, "epoch": 292}, tmp_path / "vmamba.pth")
    model = small_vm_unet(depths=(2, 2, 2, 2), depths_up=(2, 2, 2, 1))
    loaded = load_vm_unet(model, tmp_path / "vmamba.pth")
    assert_filled(model, file, loaded, "vmunet.")
    left = {key.removeprefix("vmunet.").split(".")[0] for key in loaded.initial if "upsample" not in key}
    assert left == {"final_up", "final_conv"}
    assert loaded.filled["vmunet.layers_up.0.blocks.1.ln_1.weight"] == "layers.3.blocks.1.ln_1.weight"
    assert all("layers.2.blocks." in name or "classifier" in name for name in loaded.unused)
    assert "not used layers.2.blocks.4.ln_1.weight: the model has no such parameter" in capsys.readouterr().out


def test_a_bare_state_dict_is_read_too(tmp_path):
    torch.save(vmamba_file(8, 3, (1, 1, 1, 1)), tmp_path / "vmamba.pth")
    assert load_vm_unet(small_vm_unet(), tmp_path / "vmamba.pth").filled


@pytest.mark.parametrize("name", SMALL)
def test_a_file_that_matches_nothing_is_refused_and_changes_nothing(name, tmp_path):
    load = {"TransUNet": load_transunet, "SwinUNet": load_swin_unet, "VMUNet": load_vm_unet}[name]
    path = tmp_path / "resnet"
    if name == "TransUNet":
        path = tmp_path / "resnet.npz"
        np.savez(path, **{"stem/kernel": np.zeros((7, 7, 3, 64), np.float32)})
    else:
        torch.save({"model": {"stem.weight": torch.zeros(64, 3, 7, 7)}}, path)
    model = SMALL[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=f"into {name}: nothing in the file fits the model, nothing was loaded\n  stem"
    ):
        load(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Config:
    """What training scripts pickle beside the weights."""


def test_files_of_another_kind_are_refused(tmp_path):
    torch.save({"model": vmamba_file(8, 3, (1, 1, 1, 1)), "config": Config()}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="holds more than tensors, and unpickling that can run any code"):
        load_vm_unet(small_vm_unet(), tmp_path / "pickled.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_swin_unet(small_swin_unet(), tmp_path / "empty.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="is no npz file of arrays"):
        load_transunet(small_transunet(), tmp_path / "weights.pth")
