"""The hostile trial: `python -m benchmarks.hostile --seed 0 [--part all] [--kills 100] [--nets 2000]`, on the CPU.

Parts: kills (stage 1 and whole loops, killed and resumed), nets (random U-shaped nets against an independent
reference), inputs (ten bad ones and more for every public method), processes (two of them), compile (compiled and
changed models), mutants (of the library's own code: the trial must notice each). Every attempt is

- right: the result is that of an independent computation,
- clear: a ReSegError or a warning says in a sentence what is wrong,
- unclear: another error, from within,
- silent: a wrong result without a word.

The exit status is 1 if anything is unclear or silent, or a public method has fewer than ten attempts.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings

import torch

from . import caught, changes, inputs, kills, nets, processes
from .verdict import Tally, show, tally

PARTS = ("nets", "inputs", "compile", "processes", "kills", "mutants")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--nets", type=int, default=2000)
    options = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # of the processes that it starts
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = Tally()
    for part in PARTS if options.part == "all" else (options.part,):
        started = time.perf_counter()
        run(part, found, options)
        show(f"{part}: {(time.perf_counter() - started) / 60:.1f} minutes")
    print(found.table())
    for finding in found.findings:
        print(finding)
    return 0 if found.clean else 1


def run(part: str, found: Tally, options: argparse.Namespace) -> None:
    """One part into the tally."""
    how = f"python -m benchmarks.hostile --seed {options.seed} --part {part}: {{name}}"
    if part == "nets":
        if nets.build_of_the_tests() is None:
            show("nets: tests/random_nets.py is not here; the trial's own nets instead")
        tally(part, nets.attempts(options.seed, options.nets), found, how)
    elif part == "inputs":
        attempts = inputs.attempts()
        tally(part, attempts, found, how)
        for name, count in inputs.uncovered(attempts).items():
            found.add(part, name, "unclear", f"the trial has {count} attempts for it, not {inputs.FEWEST}", how)
    elif part == "compile":
        tally(part, changes.attempts(), found, how)
    elif part == "processes":
        processes.run(found)
    elif part == "kills":
        kills.run(found, options.seed, options.kills)
    else:
        caught.run(found, options.seed)


if __name__ == "__main__":
    sys.exit(main())
