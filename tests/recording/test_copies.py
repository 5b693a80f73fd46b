"""Copies of the user's model: what they draw anew, what they leave behind, and which models have none."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from models import UNet, batch, ignoring
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from reseg_loss import CutMixConsistency, ReSegError, ReSegWrapper
from reseg_loss.recording.copying import copy_model


def old_weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it, models still have it
        return nn.utils.weight_norm(conv)


def pruned(conv: nn.Module) -> nn.Module:
    return prune.random_unstructured(conv, "weight", 0.5)


NORMS = {
    "old spectral norm": nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": old_weight_norm,
    "weight norm": parametrizations.weight_norm,
    "pruned": pruned,
}


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_teacher_has_nothing_of_the_models_weights_however_they_are_made(norm):
    torch.manual_seed(0)
    model = UNet()
    for parameter in model.parameters():
        parameter.data.mul_(50)
    for block in (*model.encoder, model.bottleneck, *model.decoder):
        NORMS[norm](block[0])
    for _ in range(30):  # in training: what the norms hold belongs to the model's weights then
        model(batch()[0])
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    reseg = ReSegWrapper(model, example_input=batch()[0])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())
    body = reseg.teacher.body
    assert not any(torch.equal(p, q) for p, q in zip(body.parameters(), model.parameters()) if p.ndim > 1)
    plain = UNet()  # drawn as torch draws it
    body.eval()
    body(batch()[0])
    for block, like in zip((*body.encoder, *body.decoder), (*plain.encoder, *plain.decoder)):
        weight, norm_of = block[0].weight.detach().flatten(1), like[0].weight.detach()
        if "spectral" in norm:
            assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, rel=0.05)
        else:
            assert weight.abs().max() <= norm_of.abs().max() * 1.05


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["random", "copy"])
def test_what_modules_hold_of_a_training_forward_is_copied_without_its_graph(norm, init):
    class Holding(UNet):
        """Keeps its heads' outputs, as DynUNet does."""

        heads: ClassVar[Any] = None

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.heads, self.last = [y[:, :1]], {"x": (y,)}
            return y

    image, label = batch()
    model = Holding()
    NORMS[norm](model.encoder[1][0])
    model(image).sum().backward()
    reseg = ReSegWrapper(model, example_input=image, teacher_init=init)
    mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=255)
    assert model.heads[0].requires_grad
    assert torch.equal(reseg.teacher.body.heads[0], model.heads[0])
    assert not reseg.teacher.body.heads[0].requires_grad
    assert torch.equal(mixed.average.eval()(image), model.eval()(image))
    reseg.freeze_teacher()
    model.train()(image)
    assert reseg.alignment_loss(label) > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_scripted_part_is_refused_by_its_name():
    model = UNet()
    model.bottleneck = torch.jit.script(model.bottleneck)
    for built in (
        lambda: ReSegWrapper(model, example_input=batch()[0]),
        lambda: CutMixConsistency(model, rampup_steps=None, ignore_index=255),
    ):
        with pytest.raises(ReSegError, match="bottleneck is a scripted module, which cannot be copied"):
            built()


def test_a_model_that_cannot_be_copied_is_told_which_part_and_the_cures():
    class Opaque:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    model = UNet()
    model.encoder[1].cache = Opaque(model(batch()[0]))
    with pytest.raises(ReSegError, match=r"encoder\.1\.cache cannot .*with torch\.no_grad\(\): model\(image\)"):
        ReSegWrapper(model, example_input=batch()[0])
    with torch.no_grad():
        model.encoder[1].cache = Opaque(model(batch()[0]))
    ReSegWrapper(model, example_input=batch()[0])


class WithAFunction(UNet):
    """Its bottleneck runs in a function that is an attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
        if how == "a lambda":
            self.prepare = lambda x: self.before(x)
        elif how == "compiled":
            self.prepare = torch.compile(self._prepare, backend="eager")
        elif how == "in a partial":
            run = partial(WithAFunction._prepare, self)
            self.prepare = lambda x: run(x)
        else:
            self.prepare = {"a method": self._prepare, "a module": self.before, "of nothing": lambda x: x + 1}[how]

    def _prepare(self, x: Tensor) -> Tensor:
        return self.before(x)

    def forward(self, x: Tensor) -> Any:
        return super().forward(self.prepare(x))


@pytest.mark.parametrize("how", ["a lambda", "compiled", "in a partial"])
def test_a_copy_whose_function_would_run_the_models_own_layers_is_refused_where_it_runs(how):
    """Stage 1 would train the model's layers, and the mean teacher would be half the model."""
    image, label = batch()
    model = WithAFunction(how)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    told = "function that runs its own layers as an attribute, 'prepare'"
    with pytest.raises(ReSegError, match=told):
        CutMixConsistency(model, rampup_steps=None, ignore_index=255).loss(image, ignoring)
    reseg = ReSegWrapper(model, example_input=image)
    with pytest.raises(ReSegError, match=told):
        reseg.fit_recon([(image, label)], steps=1, progress=False)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(image)  # the model itself runs as ever


@pytest.mark.parametrize("how", ["a method", "a module", "of nothing"])
def test_a_copy_whose_function_runs_its_own_layers_or_none_is_a_copy(how):
    model = WithAFunction(how).eval()
    copied = copy_model(model, "a test", "do not")
    with torch.no_grad():
        before = copied(batch()[0])
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(batch()[0]), before)
