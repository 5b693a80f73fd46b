"""What came of one attempt, and the table of all of them."""

from __future__ import annotations

import logging
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .api import PACKAGE, ReSegError

KINDS = ("right", "clear", "unclear", "silent")
ANYTHING = ""  # a refusal may say anything that is a sentence
NEVER = None  # what is right must not be refused
FEWEST_WORDS = 4  # of a sentence that names the thing and the remedy
# of what no type checker lets through (a string for a module): Python's own words will do, silence will not
OF_PYTHON = (TypeError, AttributeError)


class WrongError(Exception):
    """A result that an independent computation does not agree with."""


@dataclass(frozen=True)
class Attempt:
    """One use of the library and what may come of it.

    Attributes:
        target: the public method, as Class.method.
        title: what is done with it; with `target` the attempt's name.
        run: does it.
        right: looks at what `run` returned and raises WrongError or returns False if that is wrong; None where nothing
            that is returned can be right. `run` may also raise WrongError itself.
        refusal: a pattern that a refusal's message must match; NEVER where it must not be refused.
        own: exceptions that may pass through: of the attempt's own callbacks, of torch where the documentation says
            "as torch's", or OF_PYTHON.
        after: what must still work after a refusal; raises WrongError if it does not.
    """

    target: str
    title: str
    run: Callable[[], Any]
    right: Callable[[Any], Any] | None = None
    refusal: str | None = ANYTHING
    own: tuple[type[BaseException], ...] = ()
    after: Callable[[], Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.target}: {self.title}"


@dataclass(frozen=True)
class Finding:
    part: str
    name: str
    kind: str
    what: str
    how: str

    def __str__(self) -> str:
        return f"[{self.part}] {self.kind.upper()} {self.name}\n    {self.what}\n    again: {self.how}"


@dataclass
class Tally:
    """Counts by part and kind, and what was found."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, part: str, name: str, kind: str, what: str = "", how: str = "") -> None:
        self.counts.setdefault(part, Counter())[kind] += 1
        if kind in ("unclear", "silent"):
            self.findings.append(Finding(part, name, kind, " ".join(what.split())[:600], how))

    @property
    def clean(self) -> bool:
        return not self.findings

    def table(self) -> str:
        rows = [f"{'part':<12}" + "".join(f"{kind:>9}" for kind in KINDS)]
        for part, counts in self.counts.items():
            rows.append(f"{part:<12}" + "".join(f"{counts[kind]:>9}" for kind in KINDS))
        return "\n".join(rows)


def judge(attempt: Attempt) -> tuple[str, str]:
    """(kind, what happened) of an attempt."""
    said: list[str] = []
    handler = _Listener(said)
    logger = logging.getLogger(PACKAGE)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = attempt.run()
            except WrongError as error:
                return "silent", f"a wrong result: {error}"
            except Exception as error:
                return _refused(attempt, error)
            said += [str(warning.message) for warning in caught]
            return _returned(attempt, value, said)
    finally:
        logger.removeHandler(handler)


def plainly(attempts: Iterable[Attempt], *own: type[BaseException]) -> Iterator[Attempt]:
    """The same, which Python's own errors may refuse, and these."""
    return (replace(attempt, own=(*attempt.own, *OF_PYTHON, *own)) for attempt in attempts)


def tally(part: str, attempts: Iterable[Attempt], into: Tally, how: str) -> None:
    """Judge them all; `how` has the attempt's name put in at {name}."""
    for attempt in attempts:
        kind, what = judge(attempt)
        into.add(part, attempt.name, kind, what, how.format(name=attempt.name))


def show(text: str) -> None:
    print(text, flush=True, file=sys.stderr)


def _returned(attempt: Attempt, value: Any, said: list[str]) -> tuple[str, str]:
    if attempt.right is not None:
        try:
            wrong = attempt.right(value) is False
            what = f"a wrong result: {value!r}"
        except WrongError as error:
            wrong, what = True, f"a wrong result: {error}"
        except Exception as error:  # the check itself used what it should not
            return "unclear", f"looking at the result: {_place(error)}"
        if not wrong:
            return "right", ""
    else:
        what = f"accepted without a word, returned {value!r}"
    if attempt.refusal is not None and any(_is_sentence(s) and re.search(attempt.refusal, s, re.I) for s in said):
        return "clear", ""
    return "silent", what


def _refused(attempt: Attempt, error: Exception) -> tuple[str, str]:
    if attempt.refusal is not NEVER and isinstance(error, attempt.own) and not isinstance(error, ReSegError):
        return ("clear" if isinstance(error, OF_PYTHON) else "right", "") if attempt.after is None else _after(attempt)
    if not isinstance(error, ReSegError):
        return ("clear", "") if _of_the_signature(error) else ("unclear", _place(error))
    if attempt.refusal is None:
        return "unclear", f"refused what is right: {error}"
    if not _is_sentence(str(error)) or not re.search(attempt.refusal, str(error), re.I | re.S):
        return "unclear", f"the message does not say {attempt.refusal!r}: {error}"
    return _after(attempt)


def _after(attempt: Attempt) -> tuple[str, str]:
    try:
        if attempt.after is not None and attempt.after() is False:
            raise WrongError("what followed is wrong")
    except WrongError as error:
        return "silent", f"refused, but then: {error}"
    except Exception as error:
        return "unclear", f"refused, but then: {_place(error)}"
    return "clear", ""


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= FEWEST_WORDS


def _of_the_signature(error: Exception) -> bool:
    """Whether Python itself refused the call, for an argument that is missing or unknown: nothing of ours ran."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = any(f"/{PACKAGE}/" in Path(frame.filename).as_posix() for frame in frames)
    return isinstance(error, TypeError) and not inside and "argument" in str(error)


def _place(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"/{PACKAGE}/" in Path(f.filename).as_posix()]
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {str(error)[:300]}{at}"


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
