"""Where the bytes of a condition image are: a file, or a member of an uncompressed tar shard.

Nothing is unpacked: a member is read in place, by its offset and size in the shard.
"""

from __future__ import annotations

import errno
import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

# What is wrong with a file itself: not there, a folder, not ours to read, no name for a file.
OWN_FAULTS = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


class ImageError(ValueError):
    """An image that cannot be used; the message is 'name: what came; what is wanted'."""


class PromptError(ValueError):
    """A prompt file that cannot be used; the message is 'file:line: what came; what is wanted'."""


@dataclass(frozen=True, slots=True)
class Source:
    """One condition image.

    name: for messages: "photos/3.png", "shard-0.tar:3.png"; its ending says the format.
    path: the file, or the shard. offset, size: bytes of a member of a shard; size None: a file.
    refused: why it is never opened, such as a link that leaves the dataset; "": it may be.
    """

    name: str
    path: Path
    offset: int = 0
    size: int | None = None
    refused: str = ""

    def open(self) -> BinaryIO:
        """The bytes as a file that can be sought in.

        ImageError: it is refused, there is no such file, it may not be read, or it holds no byte.
        OSError: the disk fails.
        """
        if self.refused:
            raise ImageError(f"{self.name}: {self.refused}")
        try:
            file = self.path.open("rb")
            size = file.seek(0, io.SEEK_END) if self.size is None else self.size
            if size == 0:
                file.close()
                raise ImageError(f"{self.name}: the file is empty (0 bytes); replace it")
            file.seek(0)
        except OSError as error:
            if error.errno not in OWN_FAULTS:
                raise  # the disk's or the network's: another time the file may be there
            raise ImageError(
                f"{self.name}: cannot be read ({error.strerror}); wanted an image file at "
                f"{self.path}: put it there, or take the row out"
            ) from error
        if self.size is None:
            return file
        return cast(BinaryIO, io.BufferedReader(_Member(file, self.offset, self.size)))

    def read(self) -> bytes:
        """All bytes. ImageError as for `open`, and where a shard ends before its member does."""
        with self.open() as file:
            data = _read(file, self)
        if self.size is not None and len(data) != self.size:
            raise ImageError(
                f"{self.name}: the shard ends after {len(data)} of the {self.size} bytes of this "
                "image; copy the shard again"
            )
        return data

    def state(self) -> tuple[int, int] | None:
        """What changes when the file does: its time and size; None where there is none."""
        try:
            stat = self.path.stat()
        except (OSError, ValueError):
            return None
        return stat.st_mtime_ns, stat.st_size

    def sha256(self) -> str:
        """SHA-256 of the bytes, hexadecimal; read again only where the file has changed."""
        state = self.state()
        if state is None:
            return hashlib.sha256(self.read()).hexdigest()  # raises what is wrong
        return _sha256(self, *state)


def _read(file: BinaryIO, source: Source) -> bytes:
    try:
        return file.read()
    except OSError as error:
        raise ImageError(
            f"{source.name}: reading stopped ({error.strerror}); check the disk it lies on"
        ) from error


@lru_cache(maxsize=1 << 16)
def _sha256(source: Source, mtime_ns: int, file_size: int) -> str:
    return hashlib.sha256(source.read()).hexdigest()


class _Member(io.RawIOBase):
    """`size` bytes of `file` from `offset` on, as a file of their own; closes `file`."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
