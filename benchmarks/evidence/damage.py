"""Label maps with the mistakes of a network that has seen few patients: borders elsewhere, parts missing, blobs.

All are functions of (B, H, W) int64 maps that read no value back, so that a captured step can hold them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOBS = 3  # of each map, each with a chance
RADIUS = (0.03, 0.15)  # of a blob, as a share of the side
BOX = (0.1, 0.5)  # half a side of the box in which a class is missing, likewise
REACH = 0.03  # how far borders move at most, likewise
GROWTH = 0.2  # added to or taken from a class's share at most
SHIFT = 0.05  # how far parts are moved at most, as a share of the side
COARSE = 4  # points to a side of the field that moves them


@torch.no_grad()
def damaged(label: Tensor, classes: int) -> Tensor:
    """The map with mistakes at random, by torch's default generator; some maps get few, a few none."""
    batch, height, width = label.shape
    device, side = label.device, max(height, width)

    def u(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, device=device)

    def in_some(share: float, label: Tensor, changed: Tensor) -> Tensor:
        return torch.where(u(1, 1) < share, changed, label)

    for _ in range(BLOBS):
        # half of the blobs lie where something is, the others anywhere
        centre = position(label > 0, anywhere=u(1) < 0.5)
        radii = RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** u(2) * side
        value = torch.randint(classes, (batch,), device=device)
        label = in_some(0.3, label, torch.where(ellipse(label, centre, radii), value.view(-1, 1, 1), label))
    gone = torch.randint(1, classes, (batch,), device=device)
    instead = torch.randint(classes, (batch,), device=device) * (u() < 0.5)
    half = (BOX[0] + (BOX[1] - BOX[0]) * u(2)) * side
    half = torch.where(u(1) < 1 / 3, torch.full_like(half, 2 * side), half)  # missing everywhere
    inside = rectangle(label, position(label == gone.view(-1, 1, 1)), half)
    label = in_some(0.35, label, replaced(label, inside, gone, instead))
    reach = max(1, round(REACH * side))
    label = in_some(0.5, label, grown(label, GROWTH * (2 * u(classes) - 1), reach))
    return in_some(0.5, label, moved(label, SHIFT * u(1, 1, 1) * (2 * u(2, COARSE, COARSE) - 1)))


def position(where: Tensor, anywhere: Tensor | None = None) -> Tensor:
    """(B, 2) row and column of a random pixel of each mask (B, H, W); of an empty one, or `anywhere` (B, 1), of all."""
    allowed = where.flatten(1).float() + 1e-6
    if anywhere is not None:
        allowed = torch.where(anywhere, torch.ones_like(allowed), allowed)
    first = (allowed * torch.rand_like(allowed)).argmax(1)  # those outside only where none is inside
    return torch.stack([first // where.shape[2], first % where.shape[2]], 1)


def ellipse(label: Tensor, centre: Tensor, radii: Tensor) -> Tensor:
    """(B, H, W) bool, True in the ellipse of this centre (B, 2) and these radii (B, 2), in pixels."""
    rows, columns = _away(label, centre)
    return (rows / radii[:, 0, None, None]) ** 2 + (columns / radii[:, 1, None, None]) ** 2 <= 1


def rectangle(label: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    """(B, H, W) bool: so far from the centre (B, 2) at most in each axis (B, 2)."""
    rows, columns = _away(label, centre)
    return (rows.abs() <= half[:, 0, None, None]) & (columns.abs() <= half[:, 1, None, None])


def _away(label: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """How far rows (B, H, 1) and columns (B, 1, W) are from the centre (B, 2), in pixels."""
    rows, columns = (torch.arange(n, device=label.device) for n in label.shape[1:])
    return (rows - centre[:, :1])[:, :, None].float(), (columns - centre[:, 1:])[:, None].float()


def replaced(label: Tensor, inside: Tensor, gone: Tensor, instead: Tensor) -> Tensor:
    """With the class `instead` (B) where `gone` (B) was in the mask."""
    return torch.where(inside & (label == gone.view(-1, 1, 1)), instead.view(-1, 1, 1), label)


def grown(label: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """With borders moved by up to `reach` pixels, what lies behind a class that shrinks growing in its place.

    Each class's share of a square around a pixel, plus its offset (B, classes), is compared; thin parts may go.
    """
    classes = torch.arange(offsets.shape[1], device=label.device).view(-1, 1, 1)
    shares = F.avg_pool2d((label[:, None] == classes).float(), 2 * reach + 1, 1, reach, count_include_pad=False)
    return (shares + offsets[:, :, None, None]).argmax(1)


def moved(label: Tensor, field: Tensor) -> Tensor:
    """Bent by a smooth field (B, 2, coarse, coarse) of shares of the side; beyond the edge is 0."""
    identity = torch.eye(2, 3, device=label.device).expand(len(label), 2, 3)
    grid = F.affine_grid(identity, [len(label), 1, *label.shape[1:]], align_corners=False)
    smooth = F.interpolate(2 * field, label.shape[1:], mode="bicubic", align_corners=True)
    bent = grid + smooth.permute(0, 2, 3, 1)
    return F.grid_sample(label[:, None].float(), bent, mode="nearest", align_corners=False)[:, 0].long()
