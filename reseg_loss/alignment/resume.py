"""What a resumed stage 1 takes from its file and what from this call: a changed setting is used, and logged."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ..common.state import plain
from ..errors import ReSegError
from ..taps import TapPlan
from ..taps.plain import plan_from_dict, same_taps
from .settings import STAGE_1, Settings

_OF_THE_RATE = ("base_lrs", "_last_lr")  # a schedule's entries that follow from the optimizer's learning rate


def choices(optimizer: Optimizer, amp: torch.dtype | None) -> dict[str, Any]:
    """The user's settings, as plain values. Call it before a schedule changes the optimizer's groups."""
    return {
        "optimizer": _name_of(optimizer),
        "groups": plain(_groups(optimizer)),
        "sizes": [len(group["params"]) for group in optimizer.param_groups],
        "amp": plain(amp),
        "schedule": None,  # see `schedule_choices`
    }


def schedule_choices(scheduler: Any, kept: bool) -> dict[str, Any] | None:
    """The same for a schedule that has not advanced yet; None if it is not kept in a file.

    Raises:
        ReSegError: `step()` needs arguments, or the schedule is kept in a file and has no state.
    """
    needed = ("step", "state_dict", "load_state_dict") if kept else ("step",)
    missing = [name for name in needed if not callable(getattr(scheduler, name, None))]
    if missing:
        raise ReSegError(
            f"scheduler= must be a function that returns a schedule; it returned {type(scheduler).__name__}, which has "
            f"no {', '.join(missing)}()"
        )
    if error := missing_arguments(scheduler.step):
        raise ReSegError(
            f"{type(scheduler).__name__}.step() needs arguments ({error}), but stage 1 calls it after every step "
            "without any, because reading a loss or metric would wait for the device. Use a schedule of steps, for "
            "instance torch.optim.lr_scheduler.CosineAnnealingLR"
        ) from error
    return {"class": _name_of(scheduler), "state": plain(scheduler.state_dict())} if kept else None


def missing_arguments(function: Callable[..., Any]) -> TypeError | None:
    """The error of a call without arguments; None if the function needs none."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        return error
    except ValueError:  # of what is written in C there is no signature
        pass
    return None


def refuse_another_stage_1(
    resumed: Mapping[str, Any], file: str, settings: Settings, standardize_image: bool, named: Any, plan: TapPlan | None
) -> None:
    """Raise a ReSegError if the file's stage 1 had other settings, images or taps than this one.

    Args:
        resumed: the file's content: "wrapper" (its state) and "taps" (those that were named, as strings).
        file: its name.
        settings: of this wrapper.
        standardize_image: of this call.
        named: the taps that were named in this wrapper.
        plan: this wrapper's taps, None before they are known.
    """
    state = resumed["wrapper"]
    saved, mine = state["settings"], settings.to_dict()
    other = [f"{name}={saved[name]!r}, here {mine[name]!r}" for name in STAGE_1 if saved[name] != mine[name]]
    standardized = state["parts"]["image_map"] is not None
    if standardized != standardize_image:
        other.append(f"standardize_image={standardized}, here {standardize_image}")
    same = resumed["taps"] == named if plan is None else same_taps(plan, plan_from_dict(state["parts"]["taps"]))
    if not same:
        other.append("other taps than here (print reseg.extractor to see these)")
    if other:
        raise ReSegError(f"{file} is from a stage 1 with {'; '.join(other)}. Pass another file, or remove it")


def go_on(
    optimizer: Optimizer, scheduler: Any, scaler: torch.amp.GradScaler, resumed: dict[str, Any], mine: dict[str, Any]
) -> list[str]:
    """Bring optimizer, schedule and loss scaling to where the file's were; returns the settings that differ.

    A hyperparameter of the optimizer that was set differently in this call takes the new value. All others take the
    file's value, which training may have changed. If the learning rate or the schedule was set differently, the new
    schedule is advanced from its beginning to the file's step.

    Args:
        optimizer: the optimizer of this call, with its schedule.
        scheduler: its schedule, not advanced yet, or None.
        scaler: of this call.
        resumed: the file's content: "optimizer", "scheduler", "scaler" (states), "choices" (at that time) and "step".
        mine: this call's choices.

    Raises:
        ReSegError: the optimizer is of another class, has other groups, or only one of the two has a schedule.
    """
    theirs = resumed["choices"]
    _check_same_kind(theirs, mine)
    changes = [f"amp {theirs['amp']} there, {mine['amp']} here"] if theirs["amp"] != mine["amp"] else []
    changed: list[set[str]] = []
    for i, (old, new) in enumerate(zip(theirs["groups"], mine["groups"])):
        changed.append({key for key in old.keys() & new.keys() if old[key] != new[key]})
        where = f" of group {i}" if len(mine["groups"]) > 1 else ""
        changes += [f"{key}{where} {old[key]!r} there, {new[key]!r} here" for key in sorted(changed[-1])]
    differing = _differing(theirs["schedule"], mine["schedule"])
    if scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects steps of the optimizer between; these were before
            for _ in range(resumed["step"]):
                scheduler.step()
    advanced = copy.deepcopy(_groups(optimizer))
    optimizer.load_state_dict(resumed["optimizer"])
    if scaler.is_enabled() and resumed["scaler"]:  # it is empty where there was no scaling
        scaler.load_state_dict(resumed["scaler"])
    if scheduler is not None and not differing and not any(changed):
        pairs = zip(optimizer.param_groups, advanced)
        rates = [(float(loaded["lr"]), float(ours["lr"])) for loaded, ours in pairs if "lr" in ours]
        if all(math.isclose(there, here, rel_tol=1e-6) for there, here in rates):
            scheduler.load_state_dict(resumed["scheduler"])
        else:  # the functions in a schedule cannot be compared
            there, here = rates[0]
            differing = [f"learning rate at step {resumed['step']} {there:.6g} there, {here:.6g} here"]
    if scheduler is not None and (differing or any(changed)):
        for keys, ours, chosen in zip(changed, advanced, mine["groups"]):
            # what the schedule made or changed, and the rate, which may be back where it was
            keys |= {key for key in ours if key == "lr" or key not in chosen or plain(ours[key]) != chosen[key]}
    for group, ours, keys in zip(optimizer.param_groups, advanced, changed):
        group.update({key: ours[key] for key in keys})
    return changes + [f"schedule: {text}" for text in differing]


def _check_same_kind(theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    otherwise = "Pass the same, name another file, or remove the file to start over"
    if theirs["optimizer"] != mine["optimizer"]:
        raise ReSegError(
            f"stage 1 is resumed with the optimizer {mine['optimizer']}, but its file was written with "
            f"{theirs['optimizer']}, whose state it cannot use. {otherwise}"
        )
    if theirs["sizes"] != mine["sizes"]:
        raise ReSegError(
            f"stage 1 is resumed with an optimizer whose groups have {mine['sizes']} parameters, but in its file they "
            f"have {theirs['sizes']}. {otherwise}"
        )
    if (theirs["schedule"] is None) != (mine["schedule"] is None):
        one, other = ("without", "with") if mine["schedule"] is None else ("with", "without")
        raise ReSegError(f"stage 1 is resumed {one} scheduler=, but its file was written {other} one. {otherwise}")


def _differing(theirs: dict[str, Any] | None, mine: dict[str, Any] | None) -> list[str]:
    """The settings in which two schedules differ, except for entries that follow from the learning rate."""
    if theirs is None or mine is None:
        return []
    if theirs["class"] != mine["class"]:
        return [f"{theirs['class']} there, {mine['class']} here"]
    old, new = theirs["state"], mine["state"]
    keys = sorted(key for key in old.keys() | new.keys() if key not in _OF_THE_RATE and old.get(key) != new.get(key))
    return [f"{key} {_short(old.get(key))} there, {_short(new.get(key))} here" for key in keys]


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name_of(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
