"""Files that users name on the command line, local or on S3, for reading."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import NotFound, StoreError
from pipeline.storage.local_disk import local_path
from pipeline.storage.s3_bucket import connect_s3, explained

BUFFER_BYTES = 2**20


@contextlib.contextmanager
def open_source(uri: str, *, s3_endpoint_url: str | None = None) -> Iterator[BinaryIO]:
    """A user's file for reading, local or `s3://`. Raises NotFound or StoreError, also while it is being read."""
    if uri.startswith("s3://"):
        with explained(uri), connect_s3(s3_endpoint_url).open(uri, "rb") as file:
            yield io.BufferedReader(file, BUFFER_BYTES)  # s3fs has no readline with a limit
        return
    try:
        with local_path(uri).open("rb") as file:
            yield file
    except FileNotFoundError:
        raise NotFound(f"There is no file {uri}.") from None
    except OSError as error:
        raise StoreError(f"{uri} cannot be read: {error.strerror or error}.") from error


def find_sources(uri: str, *, s3_endpoint_url: str | None = None) -> list[str]:
    """Files that a user's path names, sorted: the file itself, everything in a folder, or what a pattern matches.

    Local files come back as absolute paths, files on S3 as `s3://` addresses. Hidden ones (`.x`, `_x`) are left out of
    folders. Raises NotFound where nothing is found.
    """
    found = _find_on_s3(uri, s3_endpoint_url) if uri.startswith("s3://") else _find_on_disk(local_path(uri))
    if not found:
        raise NotFound(f"There is no file or folder {uri}, or nothing in it; check the path.")
    return found


def _find_on_disk(path: Path) -> list[str]:
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file())
        return sorted(str(file) for file in below if not _hidden(file.relative_to(path).as_posix()))
    if path.exists():
        return [str(path)]
    # A file that is really called "a[1].json" was found above; only what does not exist is read as a pattern.
    pattern = str(path.relative_to(path.anchor))
    return sorted(str(file) for file in Path(path.anchor).glob(pattern) if file.is_file())


def _find_on_s3(uri: str, s3_endpoint_url: str | None) -> list[str]:
    s3 = connect_s3(s3_endpoint_url)
    with explained(uri):
        bucket_and_key = uri.removeprefix("s3://").rstrip("/")
        if any(sign in bucket_and_key for sign in "*?["):
            return sorted(f"s3://{path}" for path in s3.glob(uri))
        found = s3.find(bucket_and_key)
        below = (
            path for path in found if path == bucket_and_key or not _hidden(path.removeprefix(bucket_and_key + "/"))
        )
        return sorted(f"s3://{path}" for path in below)


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))
