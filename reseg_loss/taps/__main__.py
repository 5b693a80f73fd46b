"""Print the levels of a model: `python -m reseg_loss.taps MODULE:FACTORY [NAME=VALUE ...] --shape 1,3,224,224`."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ReSegError, did_you_mean
from . import find_taps


def main(arguments: list[str] | None = None) -> int:
    """Build a model, find its taps and print them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m reseg_loss.taps", description=__doc__)
    parser.add_argument("factory", help="MODULE:FACTORY, a class or a function that returns the model")
    parser.add_argument("keywords", nargs="*", metavar="NAME=VALUE", help="its arguments, such as num_classes=3")
    parser.add_argument("--shape", default="1,3,224,224", help="shape of the example input (default: %(default)s)")
    parser.add_argument("--levels", help="strides to select, such as 2,4,8 (default: the library's own choice)")
    parser.add_argument("--encoder", choices=("skip", "block"), default="skip", help="which encoder feature to tap")
    options = parser.parse_intermixed_args(arguments)
    try:
        levels = _integers(options.levels, "--levels") if options.levels else None
        shape = _integers(options.shape, "--shape")
        model = _built(_factory(options.factory), options.factory, dict(map(_keyword, options.keywords)))
    except _UsageError as error:
        parser.error(str(error))
    try:
        plan = find_taps(model, torch.zeros(shape), levels=levels, encoder=options.encoder)
    except ReSegError as error:
        print(error, file=sys.stderr)
        return 1
    print(plan.draw(options.factory))
    return 0


class _UsageError(Exception):
    """The command was called in a way that cannot work."""


def _integers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise _UsageError(f"{option} {text}: expected whole numbers >= 1, separated by commas, such as 1,3,224,224")
    return numbers


def _keyword(text: str) -> tuple[str, Any]:
    """A name and its value: a Python literal, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise _UsageError(f"{text!r} is not an argument of the model: write NAME=VALUE, such as num_classes=3")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _factory(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    if not module or not name:
        raise _UsageError(f"{text!r} is not of the form MODULE:FACTORY")
    sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module != missing and not module.startswith(f"{missing}."):
            raise _UsageError(f"{module} needs the module {missing!r}, which is not installed") from None
        raise _UsageError(
            f"there is no module {missing!r}, neither in {os.getcwd()} nor among the installed packages"
        ) from None
    if not hasattr(imported, name):
        raise _UsageError(f"{module} has no {name!r}.{did_you_mean(name, vars(imported))}")
    return getattr(imported, name)


def _built(factory: Callable[..., Any], text: str, keywords: dict[str, Any]) -> nn.Module:
    if not callable(factory):
        raise _UsageError(f"{text} is {type(factory).__name__}, not a class or a function that returns a model")
    try:
        inspect.signature(factory).bind(**keywords)
    except TypeError as error:
        raise _UsageError(
            f"{text} cannot be called with these arguments: {error}. It takes {inspect.signature(factory)}; pass "
            "arguments as NAME=VALUE"
        ) from None
    except ValueError:
        pass  # a callable that does not show its signature
    model = factory(**keywords)
    if not isinstance(model, nn.Module):
        raise _UsageError(f"{text} returned {type(model).__name__}, not a torch.nn.Module")
    return model


if __name__ == "__main__":
    sys.exit(main())
