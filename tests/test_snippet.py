"""The lines that `SemiSupervised` shows, as they are pasted, around models from where people take them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import segmentation_models_pytorch as smp
import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from torch import nn
from transformers.models.segformer import SegformerConfig, SegformerForSemanticSegmentation

from reseg_loss import SemiSupervised

LINES = inspect.cleandoc(re.findall(r"```python\n(.*?)```", SemiSupervised.__doc__ or "", re.DOTALL)[0])


def dynunet_3d() -> nn.Module:
    return DynUNet(3, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[4, 8, 8, 8])


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    return SegformerForSemanticSegmentation(
        SegformerConfig(num_channels=1, num_labels=3, decoder_hidden_size=16, **sizes)  # pyright: ignore
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "smp": (lambda: smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=3), 2),
    "timm": (lambda: smp.Unet("tu-mobilenetv3_small_050", encoder_weights=None, in_channels=1, classes=3), 2),
    "MONAI": (lambda: BasicUNet(2, 1, 3, (8, 8, 8, 8, 8, 8)), 2),
    "MONAI, 3D": (dynunet_3d, 3),
    "Hugging Face": (segformer, 2),
}


@pytest.mark.filterwarnings("ignore:no heads of deep supervision")  # SegFormer is no U
@pytest.mark.parametrize("name", MODELS)
def test_the_lines_run_as_pasted(name, tmp_path, monkeypatch):
    make, dims = MODELS[name]
    torch.manual_seed(0)
    size = [64] * dims if dims == 2 else [16] * dims
    image, label = torch.randn(2, 1, *size), torch.randint(0, 3, (2, *size))
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scope = {
        "torch": torch, "model": model, "image": image,
        "train_loader": [(image, label)], "unlabelled_loader": [torch.randn(3, 1, *size)],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    exec(LINES.replace("10_000", "3").replace("2000", "2, threshold=0.34"), scope)
    assert scope["semi"].stats()["unlabelled"] > 0
    kept = torch.load("model.pt", weights_only=True)
    assert kept.keys() == before.keys()
    assert any(not torch.equal(kept[key], value) for key, value in before.items())
    make().load_state_dict(kept)
