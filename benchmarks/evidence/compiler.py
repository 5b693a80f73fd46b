"""What torch is told before models are compiled that share their code and differ in their hooks."""

from __future__ import annotations

import torch


def compiler_settings() -> dict[str, int | bool]:
    """Of torch._dynamo.config, by the names that this torch has for them."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    # by default the code of a model without hooks would serve the others too, and eager mode take over after a few
    return {limit: 128, f"accumulated_{limit}": 1024, "skip_nnmodule_hook_guards": False}


def set_up() -> None:
    """Set these, and have cudnn choose the fastest algorithms, for the whole process."""
    for name, value in compiler_settings().items():
        setattr(torch._dynamo.config, name, value)
    torch.backends.cudnn.benchmark = True
