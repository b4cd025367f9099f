"""A folder as an object store: objects appear whole or not at all, and never change once they are there."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import AlreadyExists, ConfigError, NotFound, StoreError, UnsafeStore

# A crash between writing and linking leaves such a file behind; no listing shows it.
UNFINISHED = ".unfinished-"


def local_path(uri: str) -> Path:
    """Absolute path of a folder or file that is not on S3. Raises ConfigError for any other kind of address."""
    scheme, separator, rest = uri.partition("://")
    if separator and scheme != "file":
        raise ConfigError(f"{uri} is neither a path nor an s3:// address; wiseline reads and writes only these two.")
    return Path(rest if separator else uri).expanduser().absolute()


class LocalDisk:
    """Objects as files under `root`, which is made by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def read(self, path: str) -> bytes:
        with self._explained(path):
            return (self.root / path).read_bytes()

    def open(self, path: str) -> BinaryIO:
        with self._explained(path):
            return (self.root / path).open("rb")

    def create(self, path: str, data: bytes) -> None:
        """Write a file beside the place and link it there: the link is what at most one writer gets."""
        final = self.root / path
        unfinished = final.with_name(UNFINISHED + uuid.uuid4().hex)
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.link(unfinished, final)
            _sync_folder(final.parent)
        except FileExistsError:
            raise AlreadyExists(f"{path} is already in {self}; what is there stands.") from None
        except OSError as error:
            if unfinished.exists() and not _links(final.parent):
                raise UnsafeStore(
                    f"{self} is on a file system without hard links; choose another store.uri."
                ) from error
            raise StoreError(f"{final} cannot be written: {error.strerror}.") from error
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def list(self, prefix: str) -> list[str]:
        found = (self.root / prefix).rglob("*")
        files = (path for path in found if path.is_file() and not path.name.startswith(UNFINISHED))
        return sorted(path.relative_to(self.root).as_posix() for path in files)

    def modified(self, path: str) -> datetime:
        try:
            return datetime.fromtimestamp((self.root / path).stat().st_mtime, UTC)
        except OSError:
            raise NotFound(f"There is no object {path} in {self}.") from None

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"There is no object {path} in {self}.") from None
        except OSError as error:
            raise StoreError(f"{self.root / path} cannot be read: {error.strerror}.") from error


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut, not only the bytes behind it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _links(folder: Path) -> bool:
    """Whether the file system under `folder` can link at all (some network file systems cannot)."""
    first, second = (folder / (UNFINISHED + uuid.uuid4().hex) for _ in range(2))
    try:
        first.touch()
        os.link(first, second)
    except OSError:
        return False
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)
    return True
