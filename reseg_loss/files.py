"""Files that are always whole, and the one of stage 1: written, tried beforehand, read back."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import plain_state
from .errors import ReSegError
from .processes import rank, world_size

FORMAT = 2  # of the file of stage 1
STALE_SECONDS = 3600  # a partial file of this age is a killed run's: nobody writes that long
_READABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size, torch.device, Tensor)
_T = TypeVar("_T")


class Stage1File:
    """The file that an unfinished stage 1 goes on from. Under torch.distributed rank 0 alone reads and writes it.

    Args:
        path: where it is; folders that are missing are made.

    Raises:
        ReSegError: this is no path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(path)
        except TypeError as error:
            raise ReSegError(f"checkpoint= is the path of a file, got {type(path).__name__}") from error
        self._proven = False

    def read(self) -> dict[str, Any] | None:
        """What `write` wrote, on every rank; None without a file.

        Raises:
            ReSegError: the file is damaged, or holds something else than a stage 1.
        """
        return on_rank_0(lambda: _read(self.path))

    def check(self) -> None:
        """Raise a ReSegError, on every rank, unless a file can be written here. It leaves no trace but the folder."""
        on_rank_0(lambda: _try_writing(self.path))

    def rehearse(self, state: dict[str, Any]) -> None:
        """Raise a ReSegError, on every rank, if a file with these entries could not be read back."""

        def make_plain() -> None:
            self._plain(state)

        on_rank_0(make_plain)

    def write(self, state: dict[str, Any]) -> None:
        """Write on rank 0; NumPy's numbers become Python's, its arrays tensors. The first file is read back.

        Raises:
            ReSegError: it cannot be written, or could not be read back. The file is then as it was.
        """
        if rank() == 0:
            write_atomically(self._plain(state), self.path, None if self._proven else _prove)
            self._proven = True

    def _plain(self, state: dict[str, Any]) -> dict[str, Any]:
        plain = plain_state({"format": FORMAT, **state})
        wrong = unreadable(plain)
        if wrong:
            raise ReSegError(
                f"stage 1 cannot be kept in {self.path}: {wrong}, which torch.load(weights_only=True) does not read, "
                "so that no run could go on from it. Make it a number, a string, a tensor, or a list, tuple or dict of "
                "such, or leave checkpoint= out"
            )
        return plain


def on_rank_0(action: Callable[[], _T]) -> _T:
    """What `action` gives on rank 0, on every rank; so too a ReSegError that it raises, for the others wait."""
    outcome: list[Any] = [None, None]
    failure: ReSegError | None = None
    if rank() == 0:
        try:
            outcome[0] = action()
        except ReSegError as error:
            failure, outcome[1] = error, str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise failure or ReSegError(outcome[1])
    return outcome[0]


def write_atomically(
    state: dict[str, Any], path: str | os.PathLike[str], prove: Callable[[Path], None] | None = None
) -> None:
    """torch.save that leaves either the old or the new file, whenever it is killed, and whoever else writes it.

    What is written goes into a file of its own in the same folder first, named after the process and a random number,
    which is removed if writing fails. Those that killed runs left are removed after an hour.

    Args:
        state: what is saved.
        path: the file; a link is followed.
        prove: given, looks at the new file before it takes the place of the old; what it raises goes on.

    Raises:
        ReSegError: the folder or the file cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if prove is not None:
            prove(partial)
        _remove_stale(target, partial.stat().st_mtime)
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = _system_error(error)
        if reason is None or not isinstance(error, Exception):
            raise
        kept = "the file that was there is kept" if os.path.exists(target) else "there was none before"
        raise ReSegError(f"{path} could not be written ({_told(reason)}); {kept}") from error


def unreadable(value: Any, where: str = "") -> str | None:
    """The first entry, as "path is a type", that torch.load(weights_only=True) would not read; None if it reads all."""
    kind = type(value)
    if kind in _READABLE or kind is nn.Parameter:
        return None
    if kind in (dict, OrderedDict):
        entries = [(f"the key {key!r}" + (f" of {where}" if where else ""), key) for key in value]
        entries += [(f"{where}.{key}" if where else str(key), entry) for key, entry in value.items()]
    elif kind in (list, tuple):
        entries = [(f"{where}.{i}", entry) for i, entry in enumerate(value)]
    else:
        return None if _survives(value) else f"{where} is a {kind.__module__}.{kind.__qualname__}"
    return next((wrong for name, entry in entries if (wrong := unreadable(entry, name))), None)


def _survives(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of pickling or unpickling any type there is
        return False
    return True


def _prove(partial: Path) -> None:
    try:
        torch.load(partial, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ReSegError(
            f"what stage 1 wrote to {partial} cannot be read back ({_first_line(error)}), and was removed. A file that "
            "was there before is kept. Leave checkpoint= out"
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    if not os.path.exists(path):  # where a folder may not be searched, Path's own raises
        return None
    otherwise = "Name another file, or remove it to start stage 1 anew"
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise ReSegError(f"checkpoint={str(path)!r} is {kind}; name a file")
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ReSegError(f"{path} cannot be read ({_told(error)})") from error
    if not head or (head == b"PK\x03\x04" and not _is_whole(path)):
        what = "is damaged: its end is missing or its bytes have changed" if head else "is empty"
        raise ReSegError(f"{path} {what}, so that stage 1 cannot go on from it. {otherwise}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file of another kind, one of many
        raise ReSegError(
            f"{path} is no file of stage 1, which would overwrite it: it holds more than plain values and tensors "
            f"({_first_line(error)}). {otherwise}"
        ) from error
    what = "other entries" if isinstance(state, dict) else f"a {type(state).__name__}"
    if not (isinstance(state, dict) and state.keys() >= {"wrapper", "history", "step"}):
        raise ReSegError(f"{path} is no file of stage 1, which would overwrite it: it holds {what}. {otherwise}")
    if state.get("format") != FORMAT:
        raise ReSegError(f"{path} is of a stage 1 of another version of this library. {otherwise}")
    return state


def _is_whole(path: Path) -> bool:
    """Whether every part of a zip file, as torch writes them, has the bytes that it was written with."""
    if not zipfile.is_zipfile(path):
        return False
    if not torch.serialization.get_crc32_options():  # then files have no sums to compare with
        return True
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _try_writing(path: Path) -> None:
    target = Path(os.path.realpath(path))
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(b"\0")
        _remove_stale(target, partial.stat().st_mtime)
    except OSError as error:
        raise ReSegError(
            f"checkpoint={str(path)!r} cannot be written ({_told(error)}); name a file in a folder that can"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def _remove_stale(target: Path, now: float) -> None:
    """Remove what killed runs left of this file; `now` is the file system's time, which may not be this machine's."""
    name = re.compile(re.escape(target.name) + r"\.\d+-[0-9a-f]{8}\.partial")
    with contextlib.suppress(OSError):  # a folder may be written and not listed
        for entry in os.scandir(target.parent):
            if name.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # another run was faster, or it is another user's
                    if now - entry.stat().st_mtime > STALE_SECONDS:
                        os.unlink(entry.path)


def _system_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: torch raises one of its own while it handles that of a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _told(error: OSError) -> str:
    return f"{type(error).__name__}: {error.strerror or error}"


def _first_line(error: BaseException) -> str:
    """The type that torch refused to unpickle, if that is the error, or what the error says."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return refused[1]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'without a message'}"
