"""Ten bad inputs, and more, for every public method: refused with a sentence, or right all the same."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from typing import Any

from reseg_loss.integrations import lightning, monai

from . import api, bad_calls, bad_semi, bad_states, bad_steps, bad_values
from .api import functional
from .verdict import Attempt

FEWEST = 10  # of every public method


def attempts() -> list[Attempt]:
    """All of them."""
    parts = (bad_values, bad_steps, bad_semi, bad_states, bad_calls)
    sections = [section for part in parts for section in part.SECTIONS]
    return [attempt for section in sections for attempt in section()]


def uncovered(found: Iterable[Attempt]) -> dict[str, int]:
    """{public method: number of attempts} where they are fewer than ten."""
    counts = Counter(attempt.target for attempt in found)
    return {name: counts[name] for name in public_methods() if counts[name] < FEWEST}


def public_methods() -> list[str]:
    """Class.method of everything public, properties too; functions by their name."""
    found = [f"functional.{name}" for name, value in vars(functional).items() if _is_ours(name, value)]
    exported = [getattr(api, name) for name in api.__all__ if name not in ("PACKAGE", "functional", "teacher_parts")]
    for each in (*exported, lightning.ReSegCallback, monai.ReSegHandler, monai.DeepSupervisionHandler):
        if inspect.isfunction(each):
            found.append(each.__name__)
        elif inspect.isclass(each) and not issubclass(each, (Exception, tuple)):
            found.append(each.__name__)
            ours = [vars(c) for c in each.__mro__ if c.__module__.startswith(api.PACKAGE)]
            methods = {name: None for c in ours for name, value in c.items() if _is_method(name, value)}
            found += [f"{each.__name__}.{name}" for name in methods]
    return found


def _is_ours(name: str, value: Any) -> bool:
    return (
        inspect.isfunction(value) and not name.startswith(("_", "check_")) and value.__module__ == functional.__name__
    )


def _is_method(name: str, value: Any) -> bool:
    public = not name.startswith("_") and name != "extra_repr"
    return public and (isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value))
