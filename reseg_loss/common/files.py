"""Files that are always complete, whoever writes them and whenever the writer is killed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import ReSegError

STALE_SECONDS = 3600  # a partial file of this age is a killed run's: nobody writes that long


def write_atomically(
    state: dict[str, Any], path: str | os.PathLike[str], prove: Callable[[Path], None] | None = None
) -> None:
    """torch.save that leaves either the old or the new file, whenever it is killed, and whoever else writes it.

    The content goes to a temporary file in the same folder first, named after the process and a random number. It is
    removed if writing fails. Temporary files that killed runs left are removed after an hour.

    Args:
        state: what is saved.
        path: the file; a link is followed.
        prove: if given, it checks the new file before that replaces the old one; what it raises is passed on.

    Raises:
        ReSegError: the folder or the file cannot be written, or the disk is full.
    """
    try:
        with _partial(path) as (target, partial):
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if prove is not None:
                prove(partial)
            os.replace(partial, target)
    except Exception as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__cause__ or reason.__context__  # torch raises one of its own where a disk is full
        if reason is None:
            raise
        kept = "the previous file is kept" if os.path.exists(path) else "there was no file before"
        raise ReSegError(f"{path} could not be written ({told(reason)}); {kept}") from error


def try_writing(path: Path) -> None:
    """Raise a ReSegError unless a file can be written here."""
    try:
        with _partial(path):
            pass
    except OSError as error:
        raise ReSegError(
            f"checkpoint={str(path)!r} cannot be written ({told(error)}); name a file in a writable folder"
        ) from error


@contextlib.contextmanager
def _partial(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """The file, with links followed, and a new temporary file next to it, which is gone afterwards."""
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(b"\0")
        _remove_stale(target, partial.stat().st_mtime)
        yield target, partial
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _remove_stale(target: Path, now: float) -> None:
    """Remove this file's temporary files from killed runs; `now` is the file system's time, not this machine's."""
    name = re.compile(re.escape(target.name) + r"\.\d+-[0-9a-f]{8}\.partial")
    with contextlib.suppress(OSError):  # a folder may be written and not listed
        for entry in os.scandir(target.parent):
            if name.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # another run was faster, or it is another user's
                    if now - entry.stat().st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)


def told(error: OSError) -> str:
    """The system's error message."""
    return f"{type(error).__name__}: {error.strerror or error}"


def first_line(error: BaseException) -> str:
    """The type that torch refused to unpickle, if that is the error; else the error's first line."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return refused[1]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}"
