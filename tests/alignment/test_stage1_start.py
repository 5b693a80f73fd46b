"""What the first step of stage 1 sees: the images' range, the batches' form, checkpointing without gradients."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from models import UNet, batch, loader, recording_of, saved
from torch import nn
from torch.utils.checkpoint import checkpoint

from reseg_loss import ReconLoss, ReSegError, ReSegWrapper, TapError
from reseg_loss.alignment.image_range import ImageMap, far_from_unit

untrained = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")


def fit(data: Any, model: nn.Module | None = None, *, ignore_index: int | None = None, **kwargs: Any) -> ReSegWrapper:
    torch.manual_seed(1)
    reseg = ReSegWrapper(model or UNet(), ignore_index=ignore_index)
    reseg.fit_recon(data, progress=False, **{"epochs": 1, **kwargs})
    return reseg


def scaled(image: torch.Tensor) -> torch.Tensor:
    return image * 300 - 500


@untrained
def test_labels_are_looked_at_in_every_step_where_that_is_free():
    good, bad = batch(), batch()
    bad[1][0, 0, 0] = 255
    with pytest.raises(ReSegError, match="255"):
        fit([good] * 120 + [bad])


def test_an_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(ReSegError, match=r"step\(\) of its optimizer without arguments, and LBFGS's needs some"):
        fit([batch()], optimizer=torch.optim.LBFGS)


def test_taps_without_parameters_must_be_trained_too():
    class First(nn.Module):
        """Its first output of the image's size is that of an auxiliary head of the encoder."""

        def __init__(self) -> None:
            super().__init__()
            self.net = UNet()
            self.acts = nn.ModuleList([nn.ReLU() for _ in range(7)])
            self.auxiliary = nn.Conv2d(4, 3, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            net, skips = self.net, []
            for i, block in enumerate(net.encoder):
                x = self.acts[i](block(net.pool(x) if i else x))
                skips.append(x)
            first = self.auxiliary(skips[0])
            x = self.acts[3](net.bottleneck(net.pool(x)))
            for i, (up, block) in enumerate(zip(net.up, net.decoder)):
                x = self.acts[4 + i](block(torch.cat([up(x), skips.pop()], 1)))
            return first, net.head(x)

    reseg = ReSegWrapper(First(), example_input=batch()[0])
    assert any("acts" in str(tap) for tap in reseg.extractor.taps)
    with pytest.raises(ReSegError, match=r"stage 1 would not train acts\.\d"):
        reseg.fit_recon([batch()], epochs=1, progress=False)


# --- the images' range


@untrained
def test_images_far_from_unit_range_are_told_of_by_a_warning_and_in_the_log(caplog):
    image, label = batch()
    with pytest.warns(UserWarning, match=r"far from unit range: .*\(standardize_image=True\)") as found:
        fit([(scaled(image), label)])
    assert found[0].filename == __file__
    assert "far from unit range" in caplog.text
    assert caplog.records[0].name == "reseg_loss"
    assert caplog.records[0].levelno == logging.WARNING


@untrained
def test_unit_range_and_ignored_pixels_are_not_told_of():
    image, label = batch()  # a warning would be an error
    fit([(image, label)])
    fit([((image - image.mean()) / image.std(), label)])
    label[:, :4], image[:, :, :4] = 255, 1e6
    fit([(image, label)], ignore_index=255)


def test_how_far_is_far():
    image = torch.zeros(2, 2, 4, 4)
    image[:, 1] = 10.0
    assert far_from_unit(image, None) is None
    image[:, 1] = -10.1
    assert far_from_unit(image, None) == pytest.approx(10.1)
    valid = torch.zeros(2, 1, 4, 4)
    assert far_from_unit(image, valid) is None
    valid[0, 0, 0, 0] = 1
    assert far_from_unit(image, valid) == pytest.approx(10.1)


def test_the_map_is_that_of_the_valid_pixels_and_can_be_undone():
    image = torch.randn(3, 2, 5, 4) * torch.tensor([3.0, 400.0]).view(2, 1, 1) - 70
    valid = (torch.rand(3, 1, 5, 4) > 0.3).float()
    image[(valid == 0).expand_as(image)] = float("nan")
    image_map = ImageMap.of(image, valid)
    for channel in range(2):
        values = image[:, channel][valid[:, 0] > 0].double()
        mean = values.sum() / values.numel()
        assert image_map.mean[channel] == pytest.approx(mean.item())
        assert image_map.std[channel] == pytest.approx(((values - mean).square().sum() / values.numel()).sqrt().item())
    constant = ImageMap.of(torch.full((1, 1, 2, 2), 7.0), None)
    assert (constant.mean, constant.std) == ((7.0,), (1.0,))
    mean, std = image_map.tensors(2, torch.device("cpu"))
    back = image_map.undo((image - mean) / std)
    assert torch.allclose(back, image, equal_nan=True)
    assert image_map.undo(torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16)).dtype is torch.float32
    with pytest.raises(ReSegError, match="every pixel of the first batch is ignored"):
        ImageMap.of(image, valid * 0)
    with pytest.raises(ReSegError, match="NaN or infinite pixels"):
        ImageMap.of(image, None)


@untrained
def test_the_loss_is_that_of_standardized_images():
    image, label = batch()
    data = [(scaled(image), label)] * 3
    torch.manual_seed(1)
    reseg = ReSegWrapper(UNet(), example_input=image)
    teacher = copy.deepcopy(reseg.teacher)
    sgd = lambda p: torch.optim.SGD(p, 0.1)  # noqa: E731
    history = reseg.fit_recon(data, epochs=1, optimizer=sgd, standardize_image=True, progress=False)
    target = scaled(image)
    target = (target - target.mean()) / target.std(correction=0)
    optimizer, losses = sgd(teacher.parameters()), []
    for _ in data:
        value = ReconLoss()(teacher(label), target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert history[0] == pytest.approx(sum(losses) / 3, rel=1e-5)


@untrained
def test_the_map_stays_that_of_the_first_batch_on_resuming_and_may_not_be_left_out(tmp_path):
    image, label = batch(8)
    path = tmp_path / "stage1.pt"
    options: dict[str, Any] = {"checkpoint": path, "standardize_image": True}
    fit([(scaled(image), label)], epochs=1, **options)
    reseg = fit([(image, label)], epochs=2, **options)
    assert reseg.teacher.image_map is not None
    assert reseg.teacher.image_map.mean[0] == pytest.approx(scaled(image).mean().item())
    with pytest.raises(ReSegError, match=r"standardize_image=True, here False"):
        fit([(scaled(image), label)], epochs=3, checkpoint=path)
    fit([(image, label)], checkpoint=tmp_path / "other.pt")
    with pytest.raises(ReSegError, match=r"standardize_image=False, here True"):
        fit([(image, label)], epochs=3, checkpoint=tmp_path / "other.pt", standardize_image=True)


@untrained
def test_a_standardized_teacher_paints_in_the_images_units_also_from_a_state():
    image, label = batch(8)
    adam = lambda p: torch.optim.Adam(p, 1e-2)  # noqa: E731
    reseg = fit([(scaled(image), label)], epochs=150, optimizer=adam, standardize_image=True)
    error = (reseg.reconstruct(label) - scaled(image)).abs().mean()
    assert error < 0.3 * scaled(image).std()
    other = ReSegWrapper(UNet())
    other.load_state_dict(saved(reseg))
    assert torch.equal(other.reconstruct(label), reseg.reconstruct(label))
    plain = ReSegWrapper(UNet(), example_input=image)
    plain.load_state_dict(saved(fit([(image, label)], epochs=12, optimizer=adam)))
    assert plain.teacher.image_map is None


# --- batches


@untrained
def test_a_function_turns_any_batch_into_image_and_label():
    image, label = batch()
    for item, unpack in (
        ({"img": image, "seg": label}, lambda b: (b["img"], b["seg"])),
        ((image, label, ["name"]), lambda b: (b[0], b[1])),
        ({"nested": {"x": image, "y": [label]}}, lambda b: [b["nested"]["x"], b["nested"]["y"]]),
    ):
        assert fit([item], batch=unpack).ready
        with pytest.raises(ReSegError, match=r"fit_recon\(batch=\.\.\.\)"):
            fit([item])
    with pytest.raises(ReSegError, match=r"batch= must return \(image, label\); it returned Tensor"):
        fit([(image, label)], batch=lambda b: b[0])
    with pytest.raises(ReSegError, match=r"a label must be a dense tensor.* got a str"):
        fit([(image, label)], batch=lambda b: (b[0], "label"))
    with pytest.raises(ReSegError, match="batch= must be a function"):
        fit([(image, label)], batch=4)


@untrained
def test_empty_batches_and_images_in_another_precision():
    image, label = batch()
    with pytest.raises(ReSegError, match=r"the batch is empty: its image has shape \(0, 1, 16, 16\)"):
        fit([(image, label), (image[:0], label[:0])])
    assert fit([(image.double(), label)]).ready  # the loss is fp64, the teacher as the model
    with pytest.raises(ReSegError, match=r"torch\.float64, on cpu; its parameters are torch\.float32"):
        ReSegWrapper(UNet(), example_input=image.double())


# --- checkpointing without gradients


class Checkpointed(UNet):
    """Its blocks run in activation checkpointing while it trains, as MedNeXt's do with outside_block."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.dummy = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> Any:
        def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return module(x)
            outer = lambda x, dummy: module(x)  # noqa: E731
            return checkpoint(outer, x, self.dummy, use_reentrant=self.reentrant)

        skips = []
        for encode in self.encoder:
            x = run(encode, x)
            skips.append(x)
            x = self.pool(x)
        x = run(self.bottleneck, x)
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips)):
            x = run(decode, torch.cat([up(x), skip], 1))
        return self.head(x)


@untrained
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_known_at_the_first_step():
    steps: list[int] = []

    def adam(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters)
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        return optimizer

    with pytest.raises(TapError, match="use_reentrant=False"):
        fit(loader(), Checkpointed(reentrant=True), optimizer=adam)
    assert steps == []
    reseg = fit(loader(), Checkpointed(reentrant=False), optimizer=adam)
    assert len(steps) == 4
    assert not recording_of(reseg.teacher.body).enabled
    image, label = batch()
    reseg.model(image)
    assert reseg.alignment_loss(label) > 0


@untrained
def test_a_teacher_of_the_users_may_checkpoint_as_it_likes():
    torch.manual_seed(1)
    own = Checkpointed(reentrant=True)
    own.encoder[0][0].register_forward_pre_hook(lambda module, args: None)
    reseg = ReSegWrapper(UNet(), example_input=batch()[0], teacher=own)
    reseg.fit_recon(loader(), epochs=1, progress=False)
    assert reseg.ready
