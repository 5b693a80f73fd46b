"""A bare `ReSegWrapper(model)` trains a step of every third-party model, and of every smp encoder."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from tap_names import CASES, quietly
from torch import nn

from reseg_loss import ReSegWrapper
from reseg_loss.common.outputs import select_output

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")


def train_a_step(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Stage 1 on one batch, then a step: every selected tap and the model's parameters get a finite gradient."""
    torch.manual_seed(0)
    shape = (max(shape[0], 2), *shape[1:])  # normalisation needs two values a channel
    image, label = torch.randn(shape), torch.randint(0, 2, (shape[0], *shape[2:]))
    model.train()
    keys = list(model.state_dict())
    reseg = ReSegWrapper(model, preset="standardized", weight=1.0)
    reseg.fit_recon([(image, label)], steps=1, progress=False)
    logits = select_output(model(image), shape[0], shape[2:])
    terms = reseg.alignment_terms(label)
    assert len(terms) == 2 * len(reseg.extractor.plan.selected) + 1
    assert all(term.isfinite() and term > 0 for term in terms.values())
    (logits.square().mean() + reseg.criterion.combine(terms)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 0.8 * len(list(model.parameters()))  # heads of deep supervision may be left out
    assert all(g.isfinite().all() for g in gradients)
    reseg.remove()
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", CASES)
def test_a_step(name):
    case = CASES[name]
    train_a_step(case.build(), case.shape)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", list(smp.encoders.encoders))
def test_a_step_of_every_smp_encoder(encoder):
    train_a_step(quietly(smp.Unet, encoder_name=encoder, encoder_weights=None), (2, 3, 64, 64))
