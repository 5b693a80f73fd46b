"""Two gloo processes: even and uneven batches, join(), one file name, one rank with a bad label."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from . import pairs
from .verdict import Tally, show

PATIENCE = 3 * pairs.SECONDS  # gloo gives up before


def run(tally: Tally, names: Iterable[str] | None = None) -> None:
    """Every scenario in two fresh processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", pairs.__name__])
    for name in names or (*pairs.TOGETHER, *pairs.APART):
        with tempfile.TemporaryDirectory() as folder:
            both = [context.Process(target=pairs.life, args=(name, rank, folder)) for rank in range(pairs.RANKS)]
            for process in both:
                process.start()
            for process in both:
                process.join(PATIENCE)
            hangs = [process for process in both if process.is_alive()]
            for process in hangs:
                os.kill(process.pid, signal.SIGKILL)  # pyright: ignore
                process.join()
            kind, what = _verdict(name, Path(folder), bool(hangs), [process.exitcode for process in both])
        show(f"processes: {name}: {kind} {what[:300]}")
        tally.add("processes", name, kind, what, f"benchmarks.hostile.pairs.life({name!r}, rank, folder) on two ranks")


def _verdict(name: str, folder: Path, hangs: bool, codes: list[int | None]) -> tuple[str, str]:
    if hangs:
        return "unclear", "it hangs"
    outcomes: list[tuple[str, str]] = []
    for rank, code in enumerate(codes):
        path = folder / f"outcome{rank}.pt"
        outcomes.append(torch.load(path) if path.exists() else ("unclear", f"rank {rank} ended with {code}"))
    kinds = [kind for kind, _ in outcomes]
    for worst in ("silent", "unclear"):
        if worst in kinds:
            return worst, outcomes[kinds.index(worst)][1]
    if "clear" in kinds and name in pairs.MUST_SERVE:
        return "unclear", f"refused what is right: {outcomes[kinds.index('clear')][1]}"
    if "clear" in kinds:
        return "clear", ""
    if "gone" in kinds:
        return "unclear", outcomes[kinds.index("gone")][1]
    return ("silent", "it was not refused") if name in pairs.MUST_REFUSE else ("right", "")
