"""States of the three losses: each names its kind, and one that does not fit is told of and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import IGNORED, UNet, batch, ready, saved
from torch.utils._pytree import tree_leaves

from reseg_loss import CutMixConsistency, DeepSupervision, ReSegError, ReSegWrapper


def wrapper(model: UNet | None = None) -> ReSegWrapper:
    if model is None:
        return ready()[1]
    reseg = ReSegWrapper(model, example_input=batch()[0])
    reseg.freeze_teacher()
    return reseg


def supervision(model: UNet | None = None) -> DeepSupervision:
    return DeepSupervision(model or UNet(), batch()[0], ignore_index=IGNORED)


def consistency(model: UNet | None = None) -> CutMixConsistency:
    return CutMixConsistency(model or UNet(), rampup_steps=7, ignore_index=IGNORED, output=(0, "logits"))


MAKERS: list[Callable[..., Any]] = [wrapper, supervision, consistency]
of_all = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
MODULES = {"teacher", "heads", "average"}


def same(a: Any, b: Any) -> bool:
    first, second = tree_leaves(a), tree_leaves(b)
    return len(first) == len(second) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(first, second)
    )


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def places(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry, but for what lies in a module's own state."""
    for key in state if isinstance(state, dict) else range(len(state)):
        yield (*path, key)
        if isinstance(state[key], (dict, list)) and key not in MODULES:
            yield from places(state[key], (*path, key))


def changed(state: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    holder: Any = state
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return state


def refused(holder: Any, state: Any) -> str:
    """The sentence, once it is seen that nothing has changed, not even while the error is held."""
    before, model = saved(holder), holder.model
    counted, hooked = dict(vars(holder)), hooks(model)
    with pytest.raises(ReSegError) as error:
        holder.load_state_dict(state)
    assert same(saved(holder), before)
    assert hooks(model) == hooked
    assert {k: v for k, v in vars(holder).items() if isinstance(v, (int, float, str, list, tuple))} == {
        k: v for k, v in counted.items() if isinstance(v, (int, float, str, list, tuple))
    }
    return str(error.value)


@of_all
def test_a_state_lacking_any_entry_changes_nothing_and_names_it(make):
    holder = make()
    state = saved(make(UNet()))
    lacking = [path for path in places(state) if isinstance(path[-1], str)]
    assert len(lacking) > 8
    for path in lacking:
        message = refused(holder, changed(state, path, lambda holder, key: holder.pop(key)))
        assert repr(path[-1]) in message or path in (("format",), ("kind",)), (path, message)


@of_all
def test_a_state_with_a_value_of_another_type_changes_nothing_and_names_it(make):
    holder = make()
    state = saved(make(UNet()))

    class Odd:
        def __repr__(self) -> str:
            return "Odd()"

    for path in places(state):
        message = refused(holder, changed(state, path, lambda holder, key: holder.__setitem__(key, Odd())))
        assert "Odd" in message, (path, message)


@of_all
def test_numbers_that_cannot_be_are_refused(make):
    holder = make()
    state = saved(holder)
    settings = () if "settings" not in state else ("settings",)
    for value in (float("nan"), -1.0, "1", None, True):
        message = refused(holder, changed(state, (*settings, "weight"), lambda h, k, v=value: h.__setitem__(k, v)))
        assert "weight" in message
    for value in (True, -1):
        assert "calls" in refused(holder, changed(state, ("calls",), lambda h, k, v=value: h.__setitem__(k, v)))


@of_all
def test_a_state_with_an_entry_too_many_is_refused(make):
    holder = make()
    state = saved(make(UNet()))
    assert "'momentum', which is unknown here" in refused(holder, {**state, "momentum": 1})
    deeper = [path for path in places(state) if path[-1] in ("settings", "parts", "taps")]
    for path in deeper:
        state_with = changed(state, path, lambda h, k: h[k].__setitem__("momentum", 1))
        assert "'momentum', which is unknown here" in refused(holder, state_with)


@of_all
@pytest.mark.parametrize("other", MAKERS, ids=lambda make: make.__name__)
def test_states_of_each_other_are_told_apart(make, other):
    holder, state = make(), saved(other(UNet()))
    names = {each: type(each()).__name__ for each in MAKERS}
    if make is other:
        holder.load_state_dict(state)
        return
    assert refused(holder, state) == f"this state is of a {names[other]}, but it is loaded into a {names[make]}"


@of_all
def test_what_is_no_state_of_ours_is_named(make):
    holder = make()
    assert "is it the model's?" in refused(holder, UNet().state_dict())
    assert "but a NoneType" in refused(holder, None)
    assert "but a list" in refused(holder, [saved(holder)])
    assert "format 7" in refused(holder, {**saved(holder), "format": 7})
    state = {k: v for k, v in saved(holder).items() if k != "kind"}
    assert "does not name its kind" in refused(holder, state)


@of_all
def test_a_state_of_another_model_changes_nothing(make):
    assert "another model" in refused(make(), saved(make(UNet(width=6))))


def test_a_module_that_fails_by_itself_while_it_loads_changes_nothing():
    class Own(torch.nn.Module):
        def get_extra_state(self) -> int:
            return 1

        def set_extra_state(self, state: int) -> None:
            raise KeyError("mine")

    def make() -> CutMixConsistency:
        model = UNet()
        model.own = Own()
        return consistency(model)

    mixed, other = make(), make()
    before = copy.deepcopy(dict(mixed.average.named_parameters()))
    Own.set_extra_state = lambda self, state: None if state == 1 else {}["mine"]
    state = saved(other)
    state["average"]["own._extra_state"] = 2
    with pytest.raises(ReSegError, match="another model"):
        mixed.load_state_dict(state)
    assert all(torch.equal(p, before[name]) for name, p in mixed.average.named_parameters())


def test_a_task_loss_is_asked_again_under_the_ignore_index_of_a_state():
    def leaves_255_out(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, label, ignore_index=IGNORED)

    model = UNet()
    mixed = CutMixConsistency(model, rampup_steps=None, ignore_index=IGNORED)
    mixed.loss(batch()[0], leaves_255_out)
    mixed.load_state_dict(saved(CutMixConsistency(UNet(), rampup_steps=None, ignore_index=-1)))
    with pytest.raises(ReSegError, match="it must ignore the label value -1"):
        mixed.loss(batch()[0], leaves_255_out)
