"""CPU time to find the taps of a model: `python benchmarks/taps.py [--size 224] [--threads 2] [NAME ...]`.

The models are those of the tests, with their small inputs unless a size is given; 2D ones of `--size` must allow it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in (".", "tests")]

from tap_names import CASES  # noqa: E402

from reseg_loss.taps import find_taps  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of model names (default: all)")
    parser.add_argument("--size", type=int, help="side of the image for 2D models (default: that of the tests)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"{'model':<48}{'input':>18}{'forward':>10}{'find':>10}   levels")
    totals = []
    for name, case in CASES.items():
        if options.names and not any(part in name for part in options.names):
            continue
        shape = (*case.shape[:2], options.size, options.size) if options.size and len(case.shape) == 4 else case.shape
        try:
            model, image = case.build().eval(), torch.randn(shape)
            with torch.no_grad():
                forward = min(timed(lambda: model(image)) for _ in range(options.repeats))  # noqa: B023
            find = min(timed(lambda: find_taps(model, image)) for _ in range(options.repeats))  # noqa: B023
        except (RuntimeError, ValueError) as error:  # an image size that the model does not take
            print(f"{name:<48}{'x'.join(map(str, shape)):>18}   {str(error).splitlines()[0]}")
            continue
        levels = len(find_taps(model, image).levels)
        print(f"{name:<48}{'x'.join(map(str, shape)):>18}{forward:>9.3f}s{find:>9.3f}s   {levels}")
        totals.append(find)
    print(f"median {statistics.median(totals):.3f} s, longest {max(totals):.3f} s, {len(totals)} models")


def timed(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
