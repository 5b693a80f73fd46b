"""The file of stage 1: tested beforehand, written, and read back."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.distributed import on_rank_0, rank
from ..common.files import first_line, told, try_writing, write_atomically
from ..common.state import check_entries, plain_state, unreadable
from ..errors import ReSegError

FORMAT = 1  # of the file of stage 1
ENTRIES: dict[str, Any] = {  # of it; the wrapper looks at its own state
    "format": int,
    "wrapper": dict,
    "taps": dict,
    "choices": dict,
    "optimizer": dict,
    "scaler": dict,
    "scheduler": (dict, None),
    "history": [float],
    "step": int,
    "constants": [Tensor],
    "rng": {"torch": Tensor, "cuda": [Tensor], "random": tuple, "numpy": (dict, None)},
}


class Stage1File:
    """The file that an unfinished stage 1 resumes from. Under torch.distributed only rank 0 reads and writes it.

    Args:
        path: where it is; missing folders are created.

    Raises:
        ReSegError: this is not a path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self.path = Path(path)
        except TypeError as error:
            raise ReSegError(f"checkpoint= must be the path of a file, got {type(path).__name__}") from error
        if "\0" in str(path):
            raise ReSegError(f"checkpoint={str(path)!r} has a zero byte, which is not allowed in a file name")
        self._proven = False

    def read(self) -> dict[str, Any] | None:
        """What `write` wrote, on every rank; None without a file.

        Raises:
            ReSegError: the file is damaged, or holds something other than a stage 1.
        """
        return on_rank_0(lambda: _read(self.path))

    def check(self) -> None:
        """Raise a ReSegError, on every rank, unless a file can be written here. It leaves no trace but the folder."""
        on_rank_0(lambda: try_writing(self.path))

    def rehearse(self, state: dict[str, Any]) -> None:
        """Raise a ReSegError, on every rank, if a file with these entries could not be read back."""
        on_rank_0(lambda: bool(self._plain(state)))  # the state itself stays on its rank

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
                "so no run could resume from it. Use a number, a string, a tensor, or a list, tuple or dict of these "
                "instead, or leave out checkpoint="
            )
        return plain


def _prove(partial: Path) -> None:
    try:
        torch.load(partial, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ReSegError(
            f"what stage 1 wrote to {partial} cannot be read back ({first_line(error)}), and was removed. The previous "
            "file, if there was one, is kept. Leave out checkpoint="
        ) from error


def _read(path: Path) -> dict[str, Any] | None:
    if not os.path.exists(path):  # where a folder may not be searched, Path's own raises
        return None
    otherwise = "Name another file, or remove it to start stage 1 over"
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a device or a pipe"
        raise ReSegError(f"checkpoint={str(path)!r} is {kind}; name a file")
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise ReSegError(f"{path} cannot be read ({told(error)})") from error
    if not head or (head == b"PK\x03\x04" and not _is_whole(path)):
        what = "is damaged: its end is missing or its bytes have changed" if head else "is empty"
        raise ReSegError(f"{path} {what}, so stage 1 cannot resume from it. {otherwise}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file of another kind, one of many
        raise ReSegError(
            f"{path} is not a file of stage 1, and stage 1 would overwrite it: it holds more than plain values and "
            f"tensors ({first_line(error)}). {otherwise}"
        ) from error
    what = "other entries" if isinstance(state, dict) else f"a {type(state).__name__}"
    if not (isinstance(state, dict) and state.keys() >= {"wrapper", "history", "step"}):
        raise ReSegError(
            f"{path} is not a file of stage 1, and stage 1 would overwrite it: it holds {what}. {otherwise}"
        )
    if state.get("format") != FORMAT:
        raise ReSegError(f"{path} was written by another version of this library. {otherwise}")
    check_entries(state, ENTRIES, f"the file {path}")
    return state


def _is_whole(path: Path) -> bool:
    """Whether every part of a zip file, as torch writes them, still has its original bytes."""
    try:
        with zipfile.ZipFile(path) as file:
            # without the option files have no sums to compare with
            return not torch.serialization.get_crc32_options() or file.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
