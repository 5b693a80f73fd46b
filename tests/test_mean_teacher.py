"""The mean teacher by itself; what it does in a training, the tests of the losses that hold one say."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from models import UNet, WritesIntoItsInput, batch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from reseg_loss import ReSegError
from reseg_loss.mean_teacher import MeanTeacher

IMAGE = batch()[0]


def test_it_averages_parameters_and_keeps_buffers():
    model = UNet()
    teacher = MeanTeacher(model, 0.75)
    with torch.no_grad():
        model.head.weight.add_(1)  # before the start: it becomes the model
    teacher.update()
    assert torch.equal(teacher.network.head.weight, model.head.weight)
    average = model.head.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model.head.weight.add_(1)
            model.bottleneck[1].running_mean.add_(1)
        teacher.update()
        average = 0.75 * average + 0.25 * model.head.weight.detach()
        torch.testing.assert_close(teacher.network.head.weight.detach(), average)
    assert not torch.equal(teacher.network.bottleneck[1].running_mean, model.bottleneck[1].running_mean)
    teacher.update(buffers=True)
    assert torch.equal(teacher.network.bottleneck[1].running_mean, model.bottleneck[1].running_mean)
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_it_predicts_in_the_models_modes_without_gradients():
    torch.manual_seed(0)
    model = UNet(dropout=0.5)
    teacher = MeanTeacher(model, 0.9)
    teacher.start()
    model.bottleneck.eval()
    byhand = copy.deepcopy(model)
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = teacher.predict(IMAGE)
        torch.manual_seed(seed)
        assert torch.equal(found, byhand(IMAGE))
        assert not found.requires_grad
    pairs = zip(teacher.network.buffers(), byhand.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "statistics of its own"


def test_complex_parameters_are_averaged_and_parts_may_be_compiled():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64))
    teacher = MeanTeacher(model, 0.75)
    teacher.start()
    model[0] = torch.compile(model[0], backend="eager")
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(4)
    teacher.update()
    for a, b in zip(teacher.network.parameters(), before, strict=True):
        torch.testing.assert_close(a.detach(), b + 1)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ValueError, KeyError])
def test_whatever_it_fails_by_is_said_of_the_images(error):
    class Fussy(UNet):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] != 16:
                raise error("my size is 16")
            return super().forward(x)

    teacher = MeanTeacher(Fussy(), 0.9)
    teacher.predict(IMAGE)
    with pytest.raises(ReSegError, match=rf"failed on unlabelled images of shape .*{error.__name__}: .*my size is 16"):
        teacher.predict(IMAGE[..., :8, :8])


@pytest.mark.parametrize("how", ["plain", "torch.compile", "model.compile"])
def test_it_is_compiled_where_the_model_is(how):
    torch._dynamo.reset()
    model, backend = UNet(), CompileCounterWithBackend("eager")
    run = torch.compile(model, backend=backend) if how == "torch.compile" else model
    if how == "model.compile":
        model.compile(backend=backend)
    teacher = MeanTeacher(run, 0.9)  # pyright: ignore
    if how == "model.compile":  # torch does not tell its backend
        teacher.compile(partial(torch.compile, backend=backend))
    teacher.start()
    with torch.no_grad():
        assert torch.allclose(teacher.predict(IMAGE), model(IMAGE) if how == "plain" else copy.deepcopy(model)(IMAGE))
    assert (backend.frame_count > 0) is (how != "plain")
    assert type(teacher.network) is UNet
    assert list(teacher.network.state_dict()) == list(model.state_dict())
    with pytest.raises(ReSegError, match="compiler= must be"):
        teacher.compile("eager")  # pyright: ignore


def test_tied_weights_are_averaged_once_and_stay_tied():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    model[1].weight = model[0].weight
    teacher = MeanTeacher(model, 0.75)
    teacher.start()
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    teacher.update()
    assert teacher.network[0].weight is teacher.network[1].weight
    torch.testing.assert_close(teacher.network[0].weight, before + 0.25)
    model[1].weight = nn.Parameter(before)
    with pytest.raises(ReSegError, match="parameters have changed"):
        teacher.update()


def test_a_model_that_has_changed_is_refused():
    model = UNet()
    teacher = MeanTeacher(model, 0.9)
    teacher.start()
    model.head = nn.Conv2d(4, 5, 1)
    for use in (teacher.update, teacher.reset):
        with pytest.raises(ReSegError, match="parameters have changed"):
            use()
    model.head = nn.Identity()
    with pytest.raises(ReSegError, match="modules have changed"):
        teacher.predict(IMAGE)
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    teacher = MeanTeacher(model, 0.9)
    teacher.start()
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)  # another parameter of the same shape
    with pytest.raises(ReSegError, match="parameters have changed"):
        teacher.update()
    model = UNet()
    teacher = MeanTeacher(model, 0.9)
    teacher.start()
    model.double()
    with pytest.raises(ReSegError, match=r"to\(torch.float64\)"):
        teacher.update()


def test_a_model_that_writes_into_the_images_is_refused():
    """Its mixed images would be normalized twice."""
    teacher = MeanTeacher(WritesIntoItsInput(), 0.9)
    with pytest.raises(ReSegError, match=r"writes into its images .*new tensor instead"):
        teacher.predict(IMAGE.clone())
    teacher = MeanTeacher(UNet(), 0.9)
    with torch.inference_mode():
        images = IMAGE.clone()
    assert torch.equal(teacher.predict(images), teacher.predict(IMAGE))


def test_a_model_with_modules_of_torch_fx_has_a_mean_teacher():
    """Each copy of such a module has a class of its own."""
    model = UNet()
    model.bottleneck = torch.fx.symbolic_trace(model.bottleneck)
    teacher = MeanTeacher(model, 0.0)
    assert type(teacher.network.bottleneck) is not type(model.bottleneck)
    teacher.start()
    with torch.no_grad():
        model.bottleneck.get_parameter("0.weight").add_(1)
    teacher.update()
    assert torch.equal(teacher.predict(IMAGE), model(IMAGE))
    model.bottleneck = nn.Sequential(*UNet().bottleneck)
    with pytest.raises(ReSegError, match="have changed"):
        teacher.predict(IMAGE)
