"""Taps of third-party models: the names one chooses by hand, found; and a bare `ReSegWrapper(model)` trains a step.

Both in one test, since building the model takes as long as either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from tap_names import CASES, quietly, without_u
from torch import Tensor, nn

from reseg_loss import ReSegWrapper, TapError
from reseg_loss.common.outputs import select_output
from reseg_loss.taps import Tap, TapPlan, find_taps, named_modules
from reseg_loss.taps.layouts import to_channels_first

# third-party models warn of their own deprecated calls
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),
    pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss"),  # a step teaches it nothing
]


def all_taps(plan: TapPlan) -> list[Tap]:
    return [tap for level in plan.levels for tap in (level.encoder, level.decoder)] + [plan.bottleneck]


@contextmanager
def hooked(model: nn.Module, taps: list[Tap]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """{tap: (the tensor, a copy of what it held when the hook fired)} of the next forward."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    modules, handles = named_modules(model), []

    def catch(tap: Tap, value: Any, calls: list[int]) -> None:
        calls.append(1)
        if len(calls) == tap.call + 1:
            for key in tap.keys or ((0,) if tap.is_input else ()):
                value = getattr(value, key) if isinstance(key, str) and hasattr(value, key) else value[key]
            caught[str(tap)] = (value, value.clone())

    def hook_for(tap: Tap) -> Any:
        calls: list[int] = []
        if tap.is_input:
            return lambda module, args, kwargs: catch(tap, {**dict(enumerate(args)), **kwargs}, calls)
        return lambda module, args, output: catch(tap, output, calls)

    try:
        for tap in taps:
            module = modules[tap.module]
            register = module.register_forward_pre_hook if tap.is_input else module.register_forward_hook
            handles.append(register(hook_for(tap), **({"with_kwargs": True} if tap.is_input else {})))
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def tensors_of(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for part in output for t in tensors_of(part)]


def check_hooks(model: nn.Module, plan: TapPlan, image: Tensor) -> None:
    """In training: outputs are bit-equal with hooks, each tap is as the plan says, and carries gradient."""
    model.train()
    taps = all_taps(plan)
    torch.manual_seed(1)
    bare = tensors_of(model(image))
    torch.manual_seed(1)
    with hooked(model, taps) as caught:
        outputs = tensors_of(model(image))
    assert len(bare) == len(outputs)
    assert all(torch.equal(a, b) for a, b in zip(bare, outputs))
    for tap in taps:
        tensor, copy = caught[str(tap)]
        assert torch.equal(tensor, copy) or tap.mutated, f"{tap} is overwritten later, and not marked"
        features = to_channels_first(copy, tap.layout, image.shape[2:], tap.stride)
        assert features.shape == (image.shape[0], tap.channels, *tap.spatial)
        assert copy.requires_grad, f"{tap} has no gradient"
    sum(copy.float().square().mean() for _, copy in caught.values()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


def train_a_step(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Stage 1 on one batch, then a step: every selected tap and the model's parameters get a finite gradient."""
    torch.manual_seed(0)
    shape = (max(shape[0], 2), *shape[1:])  # normalisation needs two values a channel
    image, label = torch.randn(shape), torch.randint(0, 2, (shape[0], *shape[2:]))
    model.train().zero_grad()
    keys = list(model.state_dict())
    reseg = ReSegWrapper(model, preset="standardized", weight=1.0)
    reseg.fit_recon([(image, label)], steps=1, progress=False)
    logits = select_output(model(image), shape[0], shape[2:])
    terms = reseg.alignment_terms(label)
    assert len(terms) == 2 * len(reseg.extractor.plan.selected) + 1
    assert all(term.isfinite() and term > 0 for term in terms.values())
    task = logits.square().mean()
    parameters = list(model.parameters())
    alone = torch.autograd.grad(task, parameters, retain_graph=True, allow_unused=True)
    (task + reseg.criterion.combine(terms)).backward()
    assert sum(g is not None for g in alone) > 0.6 * len(parameters)  # UNETR of MONAI 1.5 does not use a third of its
    for parameter, gradient in zip(parameters, alone):
        assert gradient is None or parameter.grad.isfinite().all()
    reseg.remove()
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", CASES)
def test_names_hooks_and_a_step(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, image = case.build(), torch.randn(case.shape)
    plan = find_taps(model, image)
    dims = len(case.shape) - 2
    wanted = {(s,) * dims if isinstance(s, int) else s: taps for s, taps in case.levels.items()}
    assert {level.stride: (str(level.encoder), str(level.decoder)) for level in plan.levels} == wanted
    assert str(plan.bottleneck) == case.bottleneck
    assert [level.stride for level in plan.levels] == list(wanted)
    for level in plan.levels:
        assert level.spatial == level.encoder.spatial == level.decoder.spatial
        assert level.spatial == tuple(size // s for size, s in zip(case.shape[2:], level.stride))
    check_hooks(model, plan, image)
    train_a_step(model, case.shape)


@pytest.mark.parametrize("name", without_u())
def test_models_without_levels_raise(name: str) -> None:
    build, shape = without_u()[name]
    with pytest.raises(TapError, match="Name the taps by hand") as raised:
        find_taps(build(), torch.randn(shape))
    assert "24x24: " in str(raised.value)  # the candidates, by size


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batch_of_any_size(batch: int) -> None:
    """Also where the batch equals the image's or a level's channels."""
    plan = find_taps(CASES["smp Unet resnet18"].build(), torch.randn(batch, 3, 64, 64))
    assert [str(level.encoder) for level in plan.levels] == [
        taps[0] for taps in CASES["smp Unet resnet18"].levels.values()
    ]


def test_stage_is_the_last_block_of_the_level() -> None:
    plan = find_taps(CASES["smp Unet resnet18"].build(), torch.randn(1, 3, 64, 64), encoder="block")
    assert [str(level.encoder) for level in plan.levels][1:] == ["encoder.layer1", "encoder.layer2", "encoder.layer3"]


def test_default_choice() -> None:
    plan = find_taps(CASES["monai BasicUNet 2d"].build(), torch.randn(1, 1, 64, 64))
    assert [max(level.stride) for level in plan.selected] == [2, 4, 8]
    plan = find_taps(CASES["monai BasicUNet 2d"].build(), torch.randn(1, 1, 64, 64), levels=[1, 8])
    assert [max(level.stride) for level in plan.selected] == [1, 8]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", list(smp.encoders.encoders))
def test_every_smp_encoder(encoder: str) -> None:
    model = quietly(smp.Unet, encoder_name=encoder, encoder_weights=None)
    plan = find_taps(model, torch.randn(1, 3, 64, 64))
    assert [max(level.stride) for level in plan.levels][-3:] == [4, 8, 16]
    assert [str(level.decoder) for level in plan.levels][-3:] == [f"decoder.blocks.{i}" for i in (2, 1, 0)]
    channels = [level.encoder.channels for level in plan.levels][-3:]
    assert channels == list(model.encoder.out_channels[2:5])
    assert plan.bottleneck.channels == model.encoder.out_channels[5]
    train_a_step(model, (2, 3, 64, 64))
