"""How far a long file has been read, on the terminal of who waits for it."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

LONG = 64 << 20
"""Bytes from which on a file is worth a bar."""


class Bar:
    """An open file that draws on standard error how much of it has been read, where that is a terminal.

    >>> import io
    >>> Bar(io.BytesIO(b"abc"), 3).read(2)
    b'ab'
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._done, self._shown = file, size, 0, -1
        self._draws = size >= LONG and sys.stderr.isatty()

    def read(self, size: int = -1) -> bytes:
        """Read on, and draw each new hundredth."""
        data = self._file.read(size)
        self._done += len(data)
        part = self._done * 100 // max(self._size, 1)
        if self._draws and part != self._shown:
            self._shown = part
            filled = part * 40 // 100
            end = "\r\033[K" if not data or part >= 100 else ""
            print(f"\r[{'#' * filled}{' ' * (40 - filled)}] {part:3} %{end}", end="", file=sys.stderr, flush=True)
        return data


def opened(path: str) -> tuple[BinaryIO, Bar]:
    """Open a file with a bar; close the first of the two when done.

    Raises:
        OSError: the file cannot be opened.
    """
    file = open(path, "rb")
    return file, Bar(file, os.fstat(file.fileno()).st_size)
