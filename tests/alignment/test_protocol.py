"""The whole two-stage protocol against a hand-written loop that shares nothing with the package but the model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from models import UNet, batch, task_loss
from torch import Tensor, nn

from reseg_loss import ReSegWrapper


def features_of(model: UNet, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's forward written out, with the features of strides 2 and 4 and the bottleneck."""
    e1 = model.encoder[0](x)
    e2 = model.encoder[1](model.pool(e1))
    e4 = model.encoder[2](model.pool(e2))
    bottleneck = model.bottleneck(model.pool(e4))
    d4 = model.decoder[0](torch.cat([model.up[0](bottleneck), e4], 1))
    d2 = model.decoder[1](torch.cat([model.up[1](d4), e2], 1))
    d1 = model.decoder[2](torch.cat([model.up[2](d2), e1], 1))
    return model.head(d1), {"e1": e1, "e2": e2, "e4": e4, "b": bottleneck, "d4": d4, "d2": d2, "d1": d1}


def standardized(f: Tensor) -> Tensor:
    mean = f.mean((0, 2, 3), keepdim=True)
    return (f - mean) / ((f - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()


def by_hand(
    model: UNet, teacher: nn.Module, batches: list[tuple[Tensor, Tensor]], levels: tuple[int, ...], normalize: bool
) -> list[float]:
    """Stage 1 on the batches, then stage 2 on the same; `teacher` has body and after, as the wrapper made them."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
    teacher.train()
    for image, label in batches:
        x = teacher.after(features_of(teacher.body, label.unsqueeze(1).double())[0])
        loss = 0.6 * ((x - image) ** 2).mean() + 0.4 * (x - image).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    teacher.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for image, label in batches:
        logits, s = features_of(model, image)
        with torch.no_grad():
            _, t = features_of(teacher.body, label.unsqueeze(1).double())
        if normalize:
            s, t = ({k: standardized(f) for k, f in side.items()} for side in (s, t))
        aligned = ((s["b"] - t["b"]) ** 2).mean()
        for stride in levels:
            aligned = aligned + ((t[f"e{stride}"] - s[f"d{stride}"]) ** 2).mean()
            aligned = aligned + ((t[f"d{stride}"] - s[f"e{stride}"]) ** 2).mean()
        losses.append(aligned.item() / 3)
        loss = F.cross_entropy(logits, label) + 0.035 * aligned / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
@pytest.mark.parametrize(("preset", "levels"), [("paper", (1, 2, 4)), ("paper", (2, 4)), ("standardized", (2, 4))])
def test_both_stages_agree_with_the_hand_written_loop(preset, levels):
    torch.manual_seed(0)
    model = UNet().double()
    batches = [(image.double(), label) for image, label in (batch(seed=i) for i in range(6))]
    reseg = ReSegWrapper(model, example_input=batches[0][0], preset=preset, levels=levels)
    copied, teacher = copy.deepcopy(model), copy.deepcopy(reseg.teacher)
    expected = by_hand(copied, teacher, batches, levels, normalize=preset == "standardized")

    reseg.fit_recon(batches, epochs=1, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    actual = []
    for image, label in batches:
        loss = F.cross_entropy(model(image), label) + reseg.alignment_loss(label)
        actual.append(reseg.stats()["alignment"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert actual == pytest.approx(expected, rel=1e-9)
    for ours, theirs in ((reseg.teacher, teacher), (model, copied)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), name


def test_one_alignment_loss_agrees_with_the_numpy_reference_with_a_mask():
    torch.manual_seed(1)
    model = UNet()
    image, label = batch(seed=3)
    label[0, 3:9, 2:11] = 255
    reseg = ReSegWrapper(model, example_input=image, ignore_index=255, preset="standardized", weight=2.0)
    reseg.freeze_teacher()
    model(image)
    actual = reseg.alignment_loss(label).item()
    sides = []
    valid = (label != 255).unsqueeze(1)
    encoded = torch.where(valid, label.unsqueeze(1), 0).float()
    for net, x in ((model, image), (reseg.teacher.body, encoded)):
        f = {k: v.detach().double().numpy() for k, v in features_of(net, x)[1].items()}
        sides.append(([f["e2"], f["e4"]], [f["d2"], f["d4"]], f["b"]))
    expected = 2 * reference.alignment(*sides, valid.numpy().astype(np.float64), normalize=True)
    assert actual == pytest.approx(expected, rel=1e-5)


def test_training_with_the_alignment_moves_features_towards_the_teacher():
    torch.manual_seed(2)
    model = UNet()
    image, label = batch()
    reseg = ReSegWrapper(model, example_input=image, weight=1.0, preset="standardized")
    reseg.freeze_teacher()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    for _ in range(30):
        loss = task_loss(model(image), label) + reseg.alignment_loss(label)
        values.append(reseg.stats()["alignment"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]
