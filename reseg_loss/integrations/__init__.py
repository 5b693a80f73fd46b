"""Glue for frameworks that own the training loop, each module importing its own: see README.md beside this file."""

from __future__ import annotations

import inspect
from typing import Any

from ..alignment.wrapper import ReSegWrapper


def checked(fit_recon: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `ReSegWrapper.fit_recon`; a TypeError now for one that it has not, and not where stage 1 starts."""
    inspect.signature(ReSegWrapper.fit_recon).bind(None, None, **fit_recon)
    return fit_recon
