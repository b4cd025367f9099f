"""A stored object as a file that is read piece by piece, ahead of its reader."""

import io
from collections.abc import Callable
from typing import Any

READ_AHEAD = 4 * 2**20  # bytes; on S3 one request


def ranged_file(size: int, read: Callable[[int, int], bytes]) -> io.BufferedReader:
    """A file of `size` bytes, of which `read` gets those from its first argument up to its second."""
    return io.BufferedReader(_Ranges(size, read), buffer_size=READ_AHEAD)


class _Ranges(io.RawIOBase):
    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._place = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        data = self._read(self._place, end) if end > self._place else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
