"""What stays word for word, and what the four losses have in common: they are asked the same, and answer alike."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, Optional, get_type_hints

import pytest
import torch
from models import IGNORED, UNet, batch, ignoring, loader, ready, saved
from torch import Tensor, nn

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper, SemiSupervised, Settings
from reseg_loss.regularizer import Regularizer


class Kind(NamedTuple):
    """How one of the losses is made for a model, and called in a step; the modules that it has beside the model.

    `with_labelled`: it is the whole loss of a step, of which the weight is a factor of a part, and which is the loss of
    the labelled images at weight 0. The others are added to that, and are 0 at weight 0.
    """

    make: Callable[..., Any]
    call: Callable[[Any, nn.Module], Tensor]
    beside: str
    trains: bool = False  # something beside the model
    with_labelled: bool = False


def aligning(model: nn.Module, **kwargs: Any) -> ReSegWrapper:
    reseg = ReSegWrapper(model, batch()[0], **kwargs)
    reseg.freeze_teacher()
    return reseg


def aligned(reseg: ReSegWrapper, model: nn.Module) -> Tensor:
    image, label = batch()
    model(image)
    return reseg.alignment_loss(label)


def supervising(model: nn.Module, **kwargs: Any) -> DeepSupervision:
    return DeepSupervision(model, batch()[0], ignore_index=IGNORED, **kwargs)


def supervised(ds: DeepSupervision, model: nn.Module) -> Tensor:
    image, label = batch()
    model(image)
    return ds.loss(label, ignoring)


def mixing(model: nn.Module, **kwargs: Any) -> CutMixConsistency:
    return CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED, threshold=0, **kwargs)


def mixed(consistency: CutMixConsistency, model: nn.Module) -> Tensor:
    return consistency.loss(batch()[0], ignoring)


def semi_supervising(model: nn.Module, **kwargs: Any) -> SemiSupervised:
    return SemiSupervised(model, batch()[0], rampup_steps=None, threshold=0, **kwargs)


def semi_supervised(semi: SemiSupervised, model: nn.Module) -> Tensor:
    return semi.loss(*batch(), batch(seed=1)[0])


KINDS = {
    "ReSegWrapper": Kind(aligning, aligned, "teacher"),
    "DeepSupervision": Kind(supervising, supervised, "heads", trains=True),
    "CutMixConsistency": Kind(mixing, mixed, "average"),
    "SemiSupervised": Kind(semi_supervising, semi_supervised, "average", trains=True, with_labelled=True),
}
of_all = pytest.mark.parametrize("name", KINDS)


def made(name: str, **kwargs: Any) -> tuple[UNet, Any, Callable[[], Tensor]]:
    """A model, the loss for it, and a step's call."""
    model, kind = UNet(), KINDS[name]
    loss = kind.make(model, **kwargs)
    return model, loss, lambda: kind.call(loss, model)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ReSegError) as error:
        call()
    return str(error.value)


# --- word for word


@pytest.mark.filterwarnings("ignore:the teacher's reconstruction loss")
def test_these_lines_stay():
    scope = {"model": UNet(), "loader": loader(1)}
    exec("from reseg_loss import FeatureExtractor, ReconLoss, CrossAlignmentLoss, ReSegWrapper", scope)
    history = eval("ReSegWrapper(model).fit_recon(loader, epochs=50)", scope)  # the first batch is the example
    assert len(history) == 50
    model, reseg = ready()
    image, label = batch()
    model(image)
    loss = eval("reseg.alignment_loss(label)", {"reseg": reseg, "label": label})
    assert loss > 0


def test_every_setting_is_a_named_and_typed_keyword_of_the_wrapper():
    parameters = inspect.signature(ReSegWrapper).parameters
    hints, settings = get_type_hints(ReSegWrapper.__init__), get_type_hints(Settings)
    for field in fields(Settings):
        parameter = parameters[field.name]
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, None), field.name
        assert hints[field.name] == Optional[settings[field.name]], field.name  # noqa: UP045 - of a type in a variable
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())


# --- alike


@of_all
def test_the_weight_is_read_set_and_refused(name):
    model, loss, call = made(name, weight=1)
    assert isinstance(loss, Regularizer)
    assert loss.model is model
    assert (loss.weight, type(loss.weight)) == (1.0, float)
    for wrong in (-1, float("nan"), float("inf"), "1", None):
        assert f"weight={wrong!r}" in refusal(lambda wrong=wrong: setattr(loss, "weight", wrong))
        assert loss.weight == 1.0
        if wrong is not None:
            assert f"weight={wrong!r}" in refusal(lambda wrong=wrong: made(name, weight=wrong))
    torch.manual_seed(1)
    whole = call()
    assert whole > 0
    stats = loss.stats()
    always = stats["labelled"] + stats["labelled/deep"] if KINDS[name].with_labelled else 0.0
    loss.weight = 0.5
    torch.manual_seed(1)
    assert call().item() == pytest.approx(always + (whole.item() - always) / 2, rel=1e-4)
    assert whole > always
    assert loss.weight == saved(loss)["weight"] == loss.stats()["weight"] == 0.5


@of_all
def test_calls_count_those_at_a_weight(name):
    _, loss, call = made(name)
    assert loss.calls == 0
    call()
    assert loss.calls == 1
    loss.weight = 0
    zero = call()
    zero.backward()
    stats = loss.stats()
    assert (loss.calls, stats.pop("weight")) == (1, 0)
    if KINDS[name].with_labelled:
        assert zero.item() == pytest.approx(stats.pop("labelled") + stats.pop("labelled/deep"))
    else:
        assert zero.item() == 0
    assert not stats
    loss.weight = 1
    assert call() > 0
    assert loss.calls == saved(loss)["calls"] == 2


@of_all
def test_what_it_trains_is_beside_the_model(name):
    model = UNet()
    keys, own = list(model.state_dict()), {id(p) for p in model.parameters()}
    loss = KINDS[name].make(model)
    trained = list(loss.parameters())
    assert bool(trained) is KINDS[name].trains
    assert own.isdisjoint(id(p) for p in trained)
    assert list(model.state_dict()) == keys


@of_all
def test_a_forward_is_marked_by_record(name):
    model, loss, call = made(name)
    if name in ("CutMixConsistency", "SemiSupervised"):  # run their forwards themselves
        with loss.record():
            assert call() > 0
        return
    image, label = batch()
    expected = call()
    with loss.record():
        model(image)
    model(image + 1)
    again = loss.alignment_loss(label) if name == "ReSegWrapper" else loss.loss(label, ignoring)
    assert torch.allclose(again, expected, rtol=1e-4)
    assert loss.calls == 2


@of_all
@pytest.mark.parametrize("weight", [1, 0])
def test_remove_may_be_called_twice_and_calls_say_so_then(name, weight):
    model, loss, call = made(name, weight=weight)
    loss.remove()
    loss.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert refusal(call) == f"the hooks were removed; build a new {name}"
    assert loss.calls == 0


@of_all
def test_to_moves_what_is_beside_the_model_and_returns_self(name):
    model, loss, _ = made(name)
    assert loss.to(torch.float64) is loss
    assert {p.dtype for p in getattr(loss, KINDS[name].beside).parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@of_all
def test_stats_are_numbers_with_the_weight_among_them(name):
    _, loss, call = made(name, weight=0.25)
    assert loss.stats() == {"weight": 0.25}
    call()
    stats = loss.stats()
    assert stats["weight"] == 0.25
    assert len(stats) > 1
    assert all(type(value) is float for value in stats.values())


@of_all
def test_a_state_names_its_kind_and_format_and_comes_back(name):
    model, loss, call = made(name, weight=0.25)
    call()
    state = saved(loss)
    assert (state["kind"], state["format"], state["weight"], state["calls"]) == (name, 1, 0.25, 1)
    other = KINDS[name].make(copy.deepcopy(model))
    other.load_state_dict(state)
    assert (other.weight, other.calls) == (0.25, 1)
    again = saved(other)
    assert again.keys() == state.keys()
    assert repr(other) == repr(loss)
    mine, theirs = (getattr(each, KINDS[name].beside).state_dict() for each in (loss, other))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@of_all
def test_a_subclass_has_the_states_of_its_class(name):
    _, loss, _ = made(name)
    loss.__class__ = type("Mine", (type(loss),), {"__module__": "mine"})
    assert loss.state_dict()["kind"] == name


@of_all
def test_repr_tells_class_model_weight_and_calls(name):
    _, loss, call = made(name, weight=0.25)
    call()
    assert repr(loss).startswith(f"{name}(UNet, weight=0.25, calls=1, ")


def evaluation(model: nn.Module, loss: Any, call: Callable[[], Any]) -> str:
    model.eval()
    return refusal(call)


def without_gradients(model: nn.Module, loss: Any, call: Callable[[], Any]) -> str:
    with torch.no_grad():
        return refusal(call)


def in_inference_mode(model: nn.Module, loss: Any, call: Callable[[], Any]) -> str:
    with torch.inference_mode():
        return refusal(call)


def removed(model: nn.Module, loss: Any, call: Callable[[], Any]) -> str:
    loss.remove()
    return refusal(call)


@pytest.mark.parametrize("misuse", [evaluation, without_gradients, in_inference_mode, removed])
def test_a_misuse_is_told_of_in_the_same_words(misuse):
    said = {misuse(*made(name)).replace(name, "it") for name in KINDS}
    assert len(said) == 1, said
