"""Tests in processes of their own. None has a deadline: how long they take is the machine's affair."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def environment(**more: str) -> dict[str, str]:
    """This process's, with its own places to import from, and one thread."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **more}


def run(*command: str | Path, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """A command that must end well, and what it printed."""
    done = subprocess.run(command, env=environment(**more), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done


def two_processes(script: str, folder: Path, **more: str) -> None:
    """Run `script RANK FOLDER` for ranks 0 and 1, which must end well. Where one fails the other would wait for it."""
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with open(log, "wb") as out:
            command = [sys.executable, script, str(rank), str(folder)]
            processes.append(subprocess.Popen(command, env=environment(**more), stdout=out, stderr=out))
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
