"""Third-party models with the taps one chooses by hand: the skip, the decoder block's output, the deepest feature.

Read from the models' sources. Widths and inputs are small; weights are random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import segmentation_models_pytorch as smp
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from monai.networks import nets
from torch import nn


class Case(NamedTuple):
    """A model, the shape of its input, and its taps: {stride: (encoder, decoder)}, finest first, and the bottleneck."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    levels: dict[int | tuple[int, ...], tuple[str, str]]
    bottleneck: str


def quietly(build: Callable[..., nn.Module], *args: object, **kwargs: object) -> nn.Module:
    """Third parties warn of deprecated torch while they build."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build(*args, **kwargs)


# smp: the features that the encoders return, at strides 2, 4, 8, 16, 32; None where the encoder has none
ENCODERS: dict[str, tuple[str | None, ...]] = {
    "resnet18": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "resnet50": ("relu", "layer1", "layer2", "layer3", "layer4"),
    "efficientnet-b0": ("_swish", "_blocks.2", "_blocks.4", "_blocks.8", "_blocks.15"),
    "mobilenet_v2": ("features.1", "features.3", "features.6", "features.13", "features.18"),
    "vgg11_bn": ("features.6", "features.13", "features.20", "features.27", "features.28"),
    "densenet121": (
        *("features.relu0", "features.transition1.relu", "features.transition2.relu", "features.transition3.relu"),
        "features.norm5",
    ),
    "mobileone_s0": ("stage0", "stage1", "stage2", "stage3", "stage4"),
    # reshaped by functional code on the way out: elements of the list that the encoder returns
    "mit_b0": (None, "[2]", "[3]", "[4]", "[5]"),
    "tu-swin_tiny_patch4_window7_224": (None, "[2]", "[3]", "[4]", "[5]"),
    "tu-resnet18": ("model.act1", "model.layer1", "model.layer2", "model.layer3", "model.layer4"),
    "tu-convnext_atto": (None, "model.stages_0", "model.stages_1", "model.stages_2", "model.stages_3"),
    "tu-efficientnet_b0": ("model.blocks.0", "model.blocks.1", "model.blocks.2", "model.blocks.4", "model.blocks.6"),
}
WIDE_AT_4 = {"resnet50", "vgg11_bn", "densenet121"}  # 256 channels at stride 4, as FPN's pyramid
CONVOLUTIONAL = ("resnet18", "efficientnet-b0", "mobilenet_v2", "tu-resnet18", "tu-efficientnet_b0")
SMP = {
    "Unet": (*ENCODERS,),
    "UnetPlusPlus": (*CONVOLUTIONAL, "densenet121"),
    "MAnet": (*CONVOLUTIONAL, "mit_b0", "tu-convnext_atto"),
    "Linknet": (*CONVOLUTIONAL, "vgg11_bn", "resnet50"),
    "FPN": (*CONVOLUTIONAL, "vgg11_bn", "resnet50", "mit_b0", "tu-convnext_atto"),
    "PAN": (*CONVOLUTIONAL, "tu-convnext_atto"),
    "UPerNet": (*CONVOLUTIONAL, "resnet50", "tu-convnext_atto"),
}


def smp_case(arch: str, encoder: str) -> Case:
    names = [None if name is None else "encoder" + ("" if name[0] == "[" else ".") + name for name in ENCODERS[encoder]]
    *skips, deepest = names
    strides = [2, 4, 8, 16]
    decoders = {
        "Unet": ["blocks.3", "blocks.2", "blocks.1", "blocks.0"],
        # x_0_k is the last of the nodes at its resolution
        "UnetPlusPlus": ["blocks.x_0_3", "blocks.x_0_2", "blocks.x_0_1", "blocks.x_0_0"],
        "MAnet": ["blocks.3", "blocks.2", "blocks.1", "blocks.0"],
        "Linknet": ["blocks.3", "blocks.2", "blocks.1", "blocks.0"],
        # at stride 4 the pyramid's sum, if as wide as the encoder, else what all levels are merged to
        "FPN": [None, "p2" if encoder in WIDE_AT_4 else "", "p3", "p4"],
        "PAN": [None, "", "gau2", None],  # output stride 16: gau3 is at the bottleneck's level
        "UPerNet": [None, "", "fpn_lateral_blocks.1", "fpn_lateral_blocks.0"],
    }[arch]
    bottleneck = {
        "Unet": "decoder.center" if encoder.startswith("vgg") else deepest,
        "MAnet": "decoder.center",
        "FPN": "decoder.p5",
        "PAN": "decoder.gau3",
        "UPerNet": "decoder.psp",
    }.get(arch, deepest)
    levels = {
        stride: (skip, f"decoder.{block}" if block else "decoder")
        for stride, skip, block in zip(strides, skips, decoders)
        if skip is not None and block is not None
    }
    size = 224 if "swin" in encoder else 128 if arch in ("PAN", "UPerNet") else 64
    return Case(
        lambda: quietly(getattr(smp, arch), encoder_name=encoder, encoder_weights=None, classes=2),
        (2, 3, size, size),
        levels,
        bottleneck,
    )


def monai_cases(dims: int) -> dict[str, Case]:
    size = 64 if dims == 2 else 32
    shape = (2, 1, *[size] * dims)
    four = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
    sub = "model.1.submodule"
    dyn = {"kernel_size": [3] * 4, "strides": [1, 2, 2, 2], "upsample_kernel_size": [2] * 3, "filters": [8, 16, 32, 64]}
    # the layer recurses: it returns what its upsampling block makes of the skip and the level below
    skip_layers = ["skip_layers", "skip_layers.next_layer", "skip_layers.next_layer.next_layer"]
    dyn_levels = dict(zip((1, 2, 4), zip(("input_block", "downsamples.0", "downsamples.1"), skip_layers)))
    swin = (2, 1, 64, 64) if dims == 2 else (1, 1, 64, 64, 32)
    return {
        # skips are concatenated last: the decoder's feature is the submodule's output, before the concatenation
        "UNet": Case(
            lambda: nets.UNet(dims, 1, 2, **four),
            shape,
            {2: ("model.0", sub), 4: (f"{sub}.0", f"{sub}.1.submodule")},
            f"{sub}.1.submodule.1.submodule",
        ),
        "UNet, residual": Case(
            lambda: nets.UNet(dims, 1, 2, **four, num_res_units=2),
            shape,
            {2: ("model.0", sub), 4: (f"{sub}.0", f"{sub}.1.submodule")},
            f"{sub}.1.submodule.1.submodule",
        ),
        "BasicUNet": Case(
            lambda: nets.BasicUNet(dims, 1, 2, features=(8, 8, 16, 32, 64, 8)),
            shape,
            {
                1: ("conv_0", "upcat_1"),
                2: ("down_1", "upcat_2"),
                4: ("down_2", "upcat_3"),
                8: ("down_3", "upcat_4"),
            },
            "down_4",
        ),
        "BasicUNetPlusPlus": Case(
            lambda: nets.BasicUNetPlusPlus(dims, 1, 2, features=(8, 8, 16, 32, 64, 8)),
            shape,
            {
                1: ("conv_0_0", "upcat_0_4"),
                2: ("conv_1_0", "upcat_1_3"),
                4: ("conv_2_0", "upcat_2_2"),
                8: ("conv_3_0", "upcat_3_1"),
            },
            "conv_4_0",
        ),
        "AttentionUnet": Case(
            lambda: nets.AttentionUnet(dims, 1, 2, **four),
            shape,
            {
                1: ("model.0", "model.1"),
                2: (f"{sub}.0", f"{sub}"),
                4: (f"{sub}.1.submodule.0", f"{sub}.1.submodule"),
            },
            f"{sub}.1.submodule.1.submodule",
        ),
        "DynUNet": Case(lambda: nets.DynUNet(dims, 1, 2, **dyn), shape, dyn_levels, "bottleneck"),
        "DynUNet, deep supervision": Case(
            lambda: nets.DynUNet(dims, 1, 2, **dyn, deep_supervision=True, deep_supr_num=1, res_block=True),
            shape,
            dyn_levels,
            "bottleneck",
        ),
        "SegResNet": Case(
            lambda: nets.SegResNet(dims, 8, 1, 2),
            shape,
            {s: (f"down_layers.{i}", f"up_layers.{2 - i}") for i, s in enumerate((1, 2, 4))},
            "down_layers.3",
        ),
        "SegResNetDS": Case(
            lambda: nets.SegResNetDS(dims, 8, 1, 2, blocks_down=(1, 2, 2, 2)),
            shape,
            {s: (f"encoder.layers.{i}.blocks", f"up_layers.{2 - i}.blocks") for i, s in enumerate((1, 2, 4))},
            "encoder.layers.3.blocks",
        ),
        "UNETR": Case(
            lambda: nets.UNETR(
                1, 2, img_size=size, spatial_dims=dims, feature_size=8, hidden_size=48, mlp_dim=96, num_heads=4
            ),
            shape,
            {s: (f"encoder{i}", f"decoder{i + 1}") for i, s in enumerate((1, 2, 4, 8), 1)},
            "vit.norm",
        ),
        "SwinUNETR": Case(
            lambda: nets.SwinUNETR(1, 2, spatial_dims=dims, feature_size=12, depths=(1,) * 4, num_heads=(2,) * 4),
            swin,
            {
                **{s: (f"encoder{i}", f"decoder{i}") for i, s in enumerate((1, 2, 4, 8), 1)},
                16: ("swinViT[3]", "decoder5"),  # the one skip that no convolution follows
            },
            "encoder10",
        ),
        "VNet": Case(
            lambda: nets.VNet(dims, 1, 2),
            shape,
            {
                1: ("in_tr", "up_tr32"),
                2: ("down_tr32", "up_tr64"),
                4: ("down_tr64", "up_tr128"),
                8: ("down_tr128", "up_tr256"),
            },
            "down_tr256",
        ),
    }


def nnunet_case(
    kind: type[nn.Module], dims: int, strides: list[object], kernels: list[object], shape: tuple[int, ...]
) -> Case:
    n = len(strides)
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    features = [8, 16, 32, 32, 32][:n]
    steps = [(s,) * dims if isinstance(s, int) else tuple(s) for s in strides]
    total = [tuple(int(v) for v in steps[0])]
    for step in steps[1:]:
        total.append(tuple(a * b for a, b in zip(total[-1], step)))
    deep = {"deep_supervision": True} if kind is PlainConvUNet else {}
    return Case(
        lambda: kind(
            *(1, n, features, conv, kernels, strides, [2] * n, 3, [1] * (n - 1), True, norm, {"affine": True}),
            *(None, None, nn.LeakyReLU, {"inplace": True}),
            **deep,
        ),
        shape,
        {total[i]: (f"encoder.stages.{i}", f"decoder.stages.{n - 2 - i}") for i in range(n - 1)},
        f"encoder.stages.{n - 1}",
    )


THIN = (1, 3, 3)
CASES: dict[str, Case] = {
    **{f"smp {arch} {encoder}": smp_case(arch, encoder) for arch, encoders in SMP.items() for encoder in encoders},
    **{f"monai {name} {dims}d": case for dims in (2, 3) for name, case in monai_cases(dims).items()},
    "monai DynUNet anisotropic": Case(
        lambda: nets.DynUNet(
            *(3, 1, 2, [THIN, (3, 3, 3), 3, 3], [1, (1, 2, 2), 2, 2], [(1, 2, 2), 2, 2]), filters=[8, 16, 32, 64]
        ),
        (2, 1, 16, 64, 64),
        {
            1: ("input_block", "skip_layers"),
            (1, 2, 2): ("downsamples.0", "skip_layers.next_layer"),
            (2, 4, 4): ("downsamples.1", "skip_layers.next_layer.next_layer"),
        },
        "bottleneck",
    ),
    **{
        f"nnU-Net {kind.__name__} {name}": nnunet_case(kind, *arguments)
        for kind in (PlainConvUNet, ResidualEncoderUNet)
        for name, arguments in {
            "2d": (2, [1, 2, 2, 2], [3] * 4, (2, 1, 64, 64)),
            "3d": (3, [1, 2, 2, 2], [3] * 4, (2, 1, 32, 32, 32)),
            "anisotropic": (3, [1, (1, 2, 2), 2, 2], [THIN, 3, 3, 3], (2, 1, 16, 64, 64)),
            "very anisotropic": (3, [1, (1, 2, 2), (1, 2, 2), 2, 2], [THIN, THIN, 3, 3, 3], (2, 1, 8, 64, 64)),
        }.items()
    },
}


def without_u() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Models that go up at most once, or never: finding nothing is right."""
    import torchvision

    shape = (2, 3, 96, 96)
    vision = torchvision.models
    return {
        **{
            f"smp {arch} {encoder}": (
                lambda arch=arch, encoder=encoder: quietly(
                    getattr(smp, arch), encoder_name=encoder, encoder_weights=None, classes=2
                ),
                shape,
            )
            for arch, encoder in (
                ("DeepLabV3Plus", "resnet18"),
                ("DeepLabV3Plus", "mobilenet_v2"),
                ("DeepLabV3", "resnet18"),
                ("PSPNet", "resnet18"),
                ("Segformer", "mit_b0"),
                ("Segformer", "resnet18"),
            )
        },
        "torchvision FCN": (
            lambda: vision.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=2),
            shape,
        ),
        "torchvision ResNet": (lambda: vision.resnet18(weights=None), shape),
    }
