"""What a model's output ends in, and what follows from it for teacher, heads and pseudo-labels."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import IGNORED, UNet, batch, ignoring, saved, task_loss, through_file
from torch import Tensor, nn

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper
from reseg_loss.common.outputs import (
    activation_of,
    coarser_outputs,
    full_size,
    in_training,
    loss_of_logits,
    trained_ending,
)


class EndsIn(UNet):
    """A U-Net whose output is an activation's."""

    def __init__(self, activation: str = "sigmoid", classes: int = 1) -> None:
        super().__init__(classes=classes)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.sigmoid() if self.activation == "sigmoid" else getattr(logits, self.activation)(1)


class Both(EndsIn):
    """Probabilities, and logits after them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = UNet.forward(self, x)
        return {"probability": logits.softmax(1), "logits": logits}


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (torch.sigmoid, "sigmoid"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x.log_softmax(1).double(), "log-softmax"),
        (lambda x: torch.stack([x, x.softmax(1)])[:, 1:], None),
        (lambda x: x.softmax(1)[:, :, 1:], "softmax"),
        (F.logsigmoid, "log-sigmoid"),
        (lambda x: F.interpolate(x.softmax(1), scale_factor=2.0, mode="bilinear"), "softmax"),
        (lambda x: F.interpolate(x.sigmoid(), scale_factor=2.0), "sigmoid"),
        (lambda x: x.movedim(1, -1).softmax(-1).movedim(-1, 1), "softmax"),
        (lambda x: x.transpose(1, 3).softmax(-1).transpose(1, 3).clamp(1e-6, 1), "softmax"),
        (lambda x: x[:, :1].sigmoid().squeeze(1).clamp_min(1e-6)[:, None], "sigmoid"),
        (lambda x: x, None),
        (lambda x: 2 * x.sigmoid(), None),
        (lambda x: x.sigmoid().detach(), None),
    ],
)
def test_an_activation_is_known_by_what_made_the_output(end, name):
    assert activation_of(end(nn.Conv2d(1, 3, 1)(torch.randn(2, 1, 4, 4)))) == name


@pytest.mark.parametrize(
    "end",
    [
        lambda x: x.sigmoid().clamp(1e-6, 1),
        lambda x: x.sigmoid().clamp_(1e-6, 1),
        lambda x: x.movedim(1, -1).sigmoid().movedim(-1, 1),
    ],
)
def test_what_changes_no_probability_hides_none_from_deep_supervision(end):
    class Ending(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return end(super().forward(x))

    with pytest.raises(ReSegError, match="ends in a sigmoid"):
        DeepSupervision(Ending(), batch()[0])


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_probabilities_that_are_interpolated_are_probabilities(mode):
    class Resized(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(super().forward(x).softmax(1), x.shape[2:], mode=mode)

    with pytest.raises(ReSegError, match="ends in a softmax"):
        DeepSupervision(Resized(), batch()[0])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "log_softmax"])
def test_deep_supervision_refuses_a_loss_of_probabilities(activation):
    image, _ = batch()
    model, name = EndsIn(activation, 3), activation.replace("_", "-")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ReSegError, match=f"ends in a {name}, and your task loss takes probabilities"):
        DeepSupervision(model, image)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_an_activation_in_evaluation_alone_does_not_matter():
    class Late(UNet):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return logits if self.training else logits.softmax(1)

    image, label = batch()
    model = Late()
    ds = DeepSupervision(model, image)
    task_loss(model(image), label)
    assert ds.loss(label, task_loss) > 0


def test_a_model_that_returns_logits_too_is_served():
    image, label = batch()
    model = Both(classes=3)
    ds = DeepSupervision(model, image)
    task_loss(model(image)["logits"], label)
    assert ds.loss(label, task_loss) > 0


def test_pseudo_labels_of_probabilities_are_refused_and_output_names_the_logits():
    image, _ = batch()
    mixed = CutMixConsistency(Both(classes=3), rampup_steps=None, ignore_index=IGNORED)
    with pytest.raises(ReSegError, match=r"ends in a softmax, and pseudo-labels are made from logits \(.*output="):
        mixed.loss(image, ignoring)
    mixed = CutMixConsistency(Both(classes=3), rampup_steps=None, ignore_index=IGNORED, output="logits")
    mixed.loss(image, ignoring)


def test_pseudo_labels_of_numbers_that_sum_to_one_are_refused():
    class Normalized(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(1).exp() * 1.0

    mixed = CutMixConsistency(Normalized(), rampup_steps=None, ignore_index=IGNORED)
    with pytest.raises(ReSegError, match="ends in a softmax, and pseudo-labels are made from logits"):
        mixed.loss(batch()[0], ignoring)


def test_a_teacher_of_a_model_that_ends_in_a_sigmoid_can_paint_any_image():
    image, label = batch(classes=2)
    image = 5 * image - 3  # beyond 0 and 1
    reseg = ReSegWrapper(EndsIn(), example_input=image)
    assert isinstance(reseg.teacher.after, nn.Conv2d)
    adam = partial(torch.optim.Adam, lr=1e-2)
    reseg.fit_recon([(image, label)], steps=300, optimizer=adam, progress=False)
    picture = reseg.reconstruct(label)
    assert picture.min() < -1
    assert picture.max() > 1

    other = ReSegWrapper(EndsIn())
    other.load_state_dict(saved(reseg))
    assert torch.equal(other.reconstruct(label), picture)


def test_without_an_activation_the_teachers_output_is_the_image():
    reseg = ReSegWrapper(UNet(classes=1), example_input=batch()[0])
    assert isinstance(reseg.teacher.after, nn.Identity)


class Holding(UNet):
    """A model that holds what is made for it, as a LightningModule that is the network itself does."""

    def __init__(self) -> None:
        super().__init__()
        self.ds = DeepSupervision(self, batch()[0])
        self.reseg = ReSegWrapper(self, example_input=batch()[0])


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
@pytest.mark.parametrize("copied", [copy.deepcopy, partial(through_file, weights_only=False)])
def test_a_model_that_holds_its_own_losses_trains_and_is_copied(copied):
    image, label = batch()
    model = Holding()
    model.reseg.fit_recon([(image, label)], steps=1, progress=False)
    mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED)
    other = copied(model)
    assert torch.equal(other.eval()(image), model.eval()(image))
    assert torch.equal(mixed.average.eval()(image), model(image))

    for each in (model.train(), other.train()):
        if each is other:
            each(image)
            with pytest.raises(ReSegError, match=r"call attach\(\) of this extractor"):
                each.ds.loss(label, task_loss)
            each.ds.extractor.attach()
            each.reseg.extractor.attach()
        loss = task_loss(each(image), label)
        (loss + each.ds.loss(label, task_loss) + each.reseg.alignment_loss(label)).backward()
        assert all(p.grad is not None for p in each.parameters())


@pytest.mark.parametrize("kind", ["module", "forward"])
def test_the_recipe_for_a_model_that_ends_in_an_activation_works(kind):
    class Ends(UNet):
        def __init__(self) -> None:
            super().__init__()
            self.end = nn.ModuleList([nn.Softmax(1)]) if kind == "module" else nn.ModuleList()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)  # what is no tensor of the module's own is not served
            return self.end[0](y).clone() if kind == "module" else y.softmax(1)

    model = Ends()
    keys = list(model.state_dict())
    with pytest.raises(ReSegError, match=r"return the logits while self\.training") as error:
        DeepSupervision(model, batch()[0])
    recipe = "model.set_submodule('end.0', nn.Identity())"
    assert (recipe in str(error.value)) == (kind == "module")
    if kind == "module":
        eval(recipe)
        DeepSupervision(model, batch()[0])
        assert list(model.state_dict()) == keys


# --- sizes


def of(*sizes: tuple[int, ...], channels: int = 3) -> list[Tensor]:
    return [torch.randn(2, channels, *size) for size in sizes]


def test_coarse_logits_alone_are_brought_to_the_images_size():
    for size, spatial, mode in (((4, 6), (16, 24), "bilinear"), ((4, 4, 2), (16, 16, 8), "trilinear")):
        (x,) = of(size)
        full = F.interpolate(x, spatial, mode=mode, align_corners=False)
        for output in (x, {"logits": x}, [torch.zeros(2), x]):
            assert torch.equal(full_size(output, 2, spatial), full)
        assert torch.equal(full_size({"a": {"b": x}}, 2, spatial, ("a", "b")), full)
    (x,) = of((8, 8))
    for odd in ((15, 15), (16, 16)):  # padded inside: 8 cells of 2 cover 15 pixels, too
        assert full_size(x, 2, odd).shape[2:] == odd
    fine, coarse = of((16, 16), (4, 4))
    assert full_size([coarse, fine], 2, (16, 16)) is fine


@pytest.mark.parametrize(
    "output",
    [
        of((13, 16)),  # cropped
        of((12, 12)),
        of((8, 4)),  # of another stride in each axis
        of((8, 8), (4, 4)),  # which?
        of((32, 32)),
        torch.randn(3, 3, 8, 8),  # of another batch
        torch.ones(2, 3, 8, 8, dtype=torch.long),
        None,
    ],
)
def test_a_size_that_does_not_tell_is_refused(output):
    with pytest.raises(ReSegError, match=r"no float tensor of the image's size \(16, 16\) for 2 images, only"):
        full_size(output, 2, (16, 16))


def test_coarser_outputs_are_those_of_as_many_channels():
    fine, half, quarter, flat = of((16, 16), (8, 8), (4, 4), (16, 8))
    (other,) = of((8, 8), channels=5)
    found = coarser_outputs({"a": [fine, half, other], "b": (quarter, torch.zeros(2), flat)}, fine)
    assert [id(x) for x in found] == [id(half), id(quarter), id(flat)]
    assert coarser_outputs([fine, fine.clone(), half[:1]], fine) == []
    assert coarser_outputs(quarter, full_size(quarter, 2, (16, 16))) == []
    stack = torch.stack([fine, 2 * fine, 3 * fine], 1)
    assert all(
        torch.equal(x, y) for x, y in zip(coarser_outputs(stack, stack[:, 0]), (2 * fine, 3 * fine), strict=True)
    )


# --- a forward in training


def test_one_image_is_enough_for_the_statistics_of_training():
    class Small(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.end(super().forward(F.avg_pool2d(x, 2)))  # 1 x 1 in its bottleneck

    model = Small()
    model.end = nn.Softmax(1)
    image = batch()[0]
    before = copy.deepcopy(model.state_dict())
    ran = in_training(model, image[:1])
    assert len(ran.image) == len(ran.output) == 2
    assert list(ran.made) == ["end"]
    assert ran.made["end"] is ran.output
    assert ran.output.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert trained_ending(model, image[:1], "softmax") == (None, None)  # of a coarse output alone it says nothing
    with pytest.raises(ReSegError, match="fails on the example"):
        trained_ending(model, (image[:1],), "softmax")


@pytest.mark.parametrize(
    ("module", "same"),
    [
        (nn.Sigmoid(), torch.sigmoid),
        (nn.LogSigmoid(), F.logsigmoid),
        (nn.Softmax(1), lambda x: x.softmax(1)),
        (nn.Softmax(-1), lambda x: x.softmax(-1)),
        (nn.Softmax(), lambda x: x.softmax(1)),
        (nn.Softmax2d(), lambda x: x.softmax(1)),
        (nn.LogSoftmax(1), lambda x: x.log_softmax(1)),
    ],
)
def test_a_loss_of_probabilities_is_made_one_of_logits(module, same):
    model = nn.Sequential(nn.Identity(), module)
    ran = []
    module.register_forward_hook(lambda *_: ran.append(1))
    logits, label = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        assert y is label
        return x.square().mean()

    assert torch.equal(loss_of_logits(mean, model, "1")(logits, label), mean(same(logits), label))
    assert loss_of_logits(mean, model, None) is mean
    assert not ran
    with pytest.raises(ReSegError, match="task_loss must be a function"):
        loss_of_logits(3, model, "1")  # pyright: ignore
