"""Kill -9 at random moments, and just when a file changes; what is resumed must end as if it had not been killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import victims
from .verdict import Tally, show

LIVES = 8  # a training that was killed so often may end


def run(tally: Tally, seed: int, kills: int, mutant: str | None = None) -> int:
    """Kill until there were so many kills; the number of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", victims.__name__])  # so that a life costs no import
    drawn, done, number = random.Random(seed), 0, 0
    while done < kills:
        kind = "loop" if number % 3 == 2 else "stage_1"
        with tempfile.TemporaryDirectory() as folder:
            done += _training(context, tally, kind, seed * 10_000 + number, Path(folder), drawn, kills - done, mutant)
        number += 1
        if number > 20 * kills + 20:
            raise RuntimeError("trainings end before they can be killed; make them longer")
    return done


def _training(
    context: ForkServerContext,
    tally: Tally,
    kind: str,
    seed: int,
    folder: Path,
    drawn: random.Random,
    most: int,
    mutant: str | None,
) -> int:
    """One training without kills and one with them; the number of kills."""
    name, how = f"{kind}, seed {seed}", f"benchmarks.hostile.victims.life({kind!r}, an empty folder, {seed}), killed"
    whole, broken = folder / "whole", folder / "broken"
    for each in (whole, broken):
        each.mkdir()
    process = _start(context, kind, whole, seed, mutant)
    process.join()
    if process.exitcode:
        tally.add("kills", name, "unclear", f"the training that nobody killed ended with {process.exitcode}", how)
        return most
    steps = (whole / victims.PROGRESS).stat().st_size
    killed = 0
    while killed < min(LIVES, most):
        process = _start(context, kind, broken, seed, mutant)
        if not _kill(process, broken, drawn, steps):
            break
        killed += 1
        problem = _damage(broken)
        tally.add("kills", name, "silent" if problem else "right", problem, how)
        if problem:
            return killed
    else:
        process = _start(context, kind, broken, seed, mutant)
    process.join()
    if process.exitcode:
        tally.add("kills", name, "unclear", f"a resumed training ended with {process.exitcode}", how)
        return killed
    problem = _difference(whole / victims.FINAL, broken / victims.FINAL)
    tally.add("kills", f"{name}, end", "silent" if problem else "right", problem, how)
    show(f"kills: {kind:<8} seed {seed}: {killed} kills, {problem or 'equal to the bit'}")
    return killed


def _start(context: ForkServerContext, kind: str, folder: Path, seed: int, mutant: str | None) -> Any:
    process = context.Process(target=victims.life, args=(kind, str(folder), seed, mutant))
    process.start()
    return process


def _kill(process: Any, folder: Path, drawn: random.Random, steps: int) -> bool:
    """Kill at a random mark of progress and a little later, or when the files have changed so often; False: it ended.

    Nothing waits for a time here: a slow machine is killed at the same places.
    """
    progress, aimed = folder / victims.PROGRESS, drawn.random() < 0.4 and not (folder / victims.STATE).exists()
    first = progress.stat().st_size if progress.exists() else 0
    goal = first + drawn.randint(1, max(1, steps // 3))
    changes, wanted, before = 0, drawn.randint(1, 9), _files(folder)
    while process.is_alive():
        if aimed:
            now = _files(folder)
            changes, before = changes + (now != before), now
            if changes >= wanted:
                break
        elif progress.exists() and progress.stat().st_size >= goal:
            later = time.perf_counter() + drawn.uniform(0, 0.01)
            while time.perf_counter() < later:
                pass
            break
        time.sleep(1e-4)  # the victim may need this core
    if not process.is_alive():
        return False
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode == -signal.SIGKILL


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """What the library's files look like, not the progress."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(victims.STAGE_1):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                found.append((entry.name, stat.st_size, stat.st_ino))
    return sorted(found)


def _damage(folder: Path) -> str:
    """What is wrong with the files that are there; empty if nothing."""
    for name in (victims.STAGE_1, victims.STATE):
        path = folder / name
        if path.exists():
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                return f"after a kill {name} cannot be read: {type(error).__name__}: {error}"
    return ""


def _difference(one: Path, other: Path) -> str:
    first, second = (dict(_leaves(torch.load(path, weights_only=True))) for path in (one, other))
    if first.keys() != second.keys():
        return f"other entries: {sorted(first.keys() ^ second.keys())[:5]}"
    for path, a in first.items():
        b = second[path]
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
            return f"{path} is another than without kills"
    return ""


def _leaves(value: Any, path: str = "") -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
