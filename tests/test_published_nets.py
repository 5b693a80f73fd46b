"""Published nets with tokens, at sizes where channels are as many as the cells of a grid: taps chosen by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from published_nets import H2Former, MedFormer, ukan, unext_s
from test_find_taps import check_hooks
from torch import nn

from reseg_loss.taps import find_taps

# skips are pooled and rectified by functional code; where there are tokens, the decoder's last feature is its norm
TOKEN_UNET = {
    4: ("in:encoder3", "decoder4"),
    8: ("in:patch_embed3", "dnorm4"),
    16: ("norm3", "dnorm3"),
}
SWIN = {2 << i: (f"swin_layers.{i}", f"decode.{i}") for i in range(3)}
# the blocks return tuples, of which the semantic maps, of a size of their own, are no part of the U
MED = {
    1: ("inc", "up4.conv_blocks"),
    2: ("down1.conv_blocks", "up3.conv_blocks"),
    4: ("down2[0]", "up2[0]"),
    8: ("down3[0]", "up1[0]"),
}
# name: the net, the image's side, its levels, and the bottleneck
NETS: dict[str, tuple[Callable[[], nn.Module], int, dict[int, tuple[str, str]], str]] = {
    # of an eighth of its widths and a quarter or less of its sizes: 16 tokens and 16 channels, as 256 and 256
    "U-KAN, as at 256": (lambda: ukan(16), 64, TOKEN_UNET, "decoder1"),
    "U-KAN, as at 512": (lambda: ukan(16), 128, TOKEN_UNET, "decoder1"),
    "U-KAN, a quarter": (lambda: ukan(64), 128, TOKEN_UNET, "decoder1"),
    "UNeXt-S at 64": (unext_s, 64, TOKEN_UNET, "decoder1"),
    "UNeXt-S at 224": (unext_s, 224, TOKEN_UNET, "decoder1"),
    "UNeXt-S at 256": (unext_s, 256, TOKEN_UNET, "decoder1"),
    "H2Former, as at 256": (H2Former, 64, SWIN, "swin_layers.3"),
    "MedFormer, maps as large as the bottleneck": (MedFormer, 64, MED, "down4[0]"),
    "MedFormer, maps smaller": (MedFormer, 128, MED, "down4[0]"),
    "MedFormer, maps of no stride": (lambda: MedFormer(8), 96, MED, "down4[0]"),
}


@pytest.mark.parametrize("name", NETS)
def test_taps_of_a_published_net(name: str) -> None:
    build, side, levels, bottleneck = NETS[name]
    torch.manual_seed(0)
    model, image = build(), torch.randn(2, 3, side, side)
    plan = find_taps(model, image)
    found = {max(level.stride): (str(level.encoder), str(level.decoder)) for level in plan.levels}
    assert {stride: found.get(stride) for stride in levels} == levels
    assert str(plan.bottleneck) == bottleneck
    check_hooks(model, plan, image)


@pytest.mark.slow
@pytest.mark.parametrize("side", [256, 512])
def test_u_kan_of_its_own_widths(side: int) -> None:
    plan = find_taps(ukan(256), torch.randn(1, 3, side, side))
    assert [str(level.decoder) for level in plan.levels][2:] == ["decoder4", "dnorm4", "dnorm3"]
