"""Published nets with tokens, at sizes where channels are as many as the cells of a grid: taps chosen by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from published_nets import H2Former, MedFormer, ukan, unext_s
from test_find_taps import check_hooks
from torch import Tensor, nn

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


class NormedTokens(nn.Module):
    """A U-Net whose decoder normalises its features as tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        block = lambda cin, cout: nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1), nn.ReLU())  # noqa: E731
        self.e0, self.e1, self.e2 = block(3, width // 2), block(width // 2, width), block(width, 2 * width)
        self.d1, self.d0 = block(3 * width, width), block(width + width // 2, width // 2)
        self.norm, self.head = nn.LayerNorm(width), nn.Conv2d(width // 2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.e0(x)
        b = self.e1(F.max_pool2d(a, 2))
        d = self.d1(torch.cat([b, F.interpolate(self.e2(F.max_pool2d(b, 2)), scale_factor=2)], 1))
        d = self.norm(d.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(d.shape)
        return self.head(self.d0(torch.cat([a, F.interpolate(d, scale_factor=2)], 1)))


@pytest.mark.parametrize("width", [16, 48, 64, 256])  # of which all but 48 are the cells of a grid of some size
@pytest.mark.parametrize("side", [32, 64, 128])
def test_widths_that_are_the_cells_of_a_grid_change_nothing(width: int, side: int) -> None:
    plan = find_taps(NormedTokens(width), torch.randn(2, 3, side, side))
    assert [(str(level.encoder), str(level.decoder)) for level in plan.levels] == [("e0", "d0"), ("e1", "norm")]
    assert plan.levels[1].decoder.layout == "NLC"
    assert str(plan.bottleneck) == "e2"


@pytest.mark.slow
@pytest.mark.parametrize("side", [256, 512])
def test_u_kan_of_its_own_widths(side: int) -> None:
    plan = find_taps(ukan(256), torch.randn(1, 3, side, side))
    assert [str(level.decoder) for level in plan.levels][2:] == ["decoder4", "dnorm4", "dnorm3"]
