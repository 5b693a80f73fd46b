"""The page's code for few labels, in each framework: killed by the system at some step, it goes on to the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import few_labels_worker as worker
import pytest
import torch
from launch import TORCHRUN, environment

# framework: (what to import, steps before the first checkpoint, steps in all)
FRAMEWORKS = {
    "lightning": ("lightning", 5, 15),
    "lightning_by_steps": ("lightning", 2, 9),
    "monai": ("ignite", 3, 9),
    "huggingface": ("transformers", 2, 9),
    "accelerate": ("accelerate", 2, 9),
    "torchrun": ("torch", 2, 9),
}


def start(framework: str, folder: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [*(TORCHRUN if framework == "torchrun" else [sys.executable]), worker.__file__]
    arguments = [framework, str(folder), str(kill_at)]
    return subprocess.run(
        [*command, *arguments], env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_that_is_killed_at_some_step_goes_on_to_the_same_bits(framework, tmp_path):
    package, first, steps = FRAMEWORKS[framework]
    pytest.importorskip(package)
    kill_at = random.Random(framework).randrange(first + 1, steps + 1)
    killed = start(framework, tmp_path, kill_at)
    if framework == "torchrun":  # tells of a process's end in its log
        assert killed.returncode == 1, killed.stderr[-5000:]
        assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-5000:]
    else:
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-5000:]
    assert not [*tmp_path.glob("cut_*.pt")]
    resumed = start(framework, tmp_path, 0)
    assert resumed.returncode == 0, resumed.stderr[-5000:]
    for rank in range(2 if framework == "torchrun" else 1):
        whole, rest = (load(tmp_path / f"{name}_{rank}.pt") for name in ("whole", "cut"))
        assert len(whole["losses"]) == steps
        assert len(rest["losses"]) < steps, "it went on, and did not begin anew"
        assert rest["losses"] == whole["losses"][-len(rest["losses"]) :]
        for part in ("model", "average"):
            # running statistics of the mean teacher are each process's own
            names = [name for name in whole[part] if rank == 0 or "running" not in name]
            assert all(torch.equal(rest[part][name], whole[part][name]) for name in names), part
        assert all(torch.equal(a, b) for a, b in zip(rest["heads"], whole["heads"], strict=True))
        assert any(value > 0 for value in whole["unlabelled"]), "unlabelled images count"
    if framework == "torchrun":
        zero, one = (load(tmp_path / f"whole_{rank}.pt") for rank in range(2))
        assert zero["losses"] != one["losses"], "each process has a part of the batches"
        for part in ("model", "average"):
            names = [name for name in zero[part] if "running" not in name]
            assert all(torch.equal(zero[part][name], one[part][name]) for name in names), part
        assert all(torch.equal(a, b) for a, b in zip(zero["heads"], one["heads"], strict=True))


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)
