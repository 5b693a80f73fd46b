"""Print the U of a model: `python -m reseg_loss.taps MODULE:FACTORY --shape 1,3,224,224`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import torch

from ..errors import ReSegError, did_you_mean
from . import find_taps


def main(arguments: list[str] | None = None) -> int:
    """Build a model, find its taps, print them; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m reseg_loss.taps", description=__doc__)
    parser.add_argument("factory", help="MODULE:FACTORY, a callable without arguments that returns the model")
    parser.add_argument("--shape", default="1,3,224,224", help="shape of the example input (default: %(default)s)")
    parser.add_argument("--levels", help="strides to select, such as 2,4,8 (default: the library's own choice)")
    parser.add_argument("--encoder", choices=("skip", "stage"), default="skip", help="which encoder feature to tap")
    options = parser.parse_args(arguments)
    module, _, factory = options.factory.partition(":")
    if not factory:
        parser.error(f"{options.factory!r} is not of the form MODULE:FACTORY")
    sys.path.insert(0, os.getcwd())
    imported = importlib.import_module(module)
    if not hasattr(imported, factory):
        parser.error(f"{module} has no {factory!r}.{did_you_mean(factory, vars(imported))}")
    model = getattr(imported, factory)()
    levels = [int(stride) for stride in options.levels.split(",")] if options.levels else None
    example = torch.zeros(*map(int, options.shape.split(",")))
    try:
        plan = find_taps(model, example, levels=levels, encoder=options.encoder)
    except ReSegError as error:
        print(error, file=sys.stderr)
        return 1
    print(plan.draw(options.factory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
