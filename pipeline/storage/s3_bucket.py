"""An S3 bucket as an object store; the only file that knows fsspec and s3fs.

What s3fs raises becomes one of our errors here, and a definite no is told from an unknown outcome.
"""

import asyncio
import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO

import s3fs
from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
)
from fsspec.asyn import sync

from pipeline.errors import AlreadyExists, NotFound, OutcomeUnknown, StoreError
from pipeline.storage.ranged_file import ranged_file

CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
SLOWEST_UPLOAD = 2**20  # bytes per second
# s3fs sends up to twice its chunk as one part; only a single-part PUT keeps If-None-Match on every server (radosgw
# ignores the condition on CompleteMultipartUpload).
LARGEST_SINGLE_PUT = 64 * 2**20
S3_FAILURES = (OSError, BotoCoreError, ClientError)


class OneTrySession(AIOHTTPSession):  # type: ignore[misc]
    """aiohttp sends a PUT again by itself when the connection breaks before the answer; a creation must not be."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session


class S3Bucket:
    """Objects under `s3://bucket/prefix`."""

    def __init__(self, uri: str, endpoint_url: str | None) -> None:
        self.uri = uri
        self.endpoint_url = endpoint_url

    @functools.cached_property
    def s3(self) -> Any:
        return connect_s3(self.endpoint_url)

    @functools.cached_property
    def s3_once(self) -> Any:
        """Without retries: a second try after a lost answer would meet its own object and take it for a rival's."""
        return connect_s3(self.endpoint_url, attempts=1)

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The object's bytes, or those from `start` up to `end`."""
        with explained(f"{self.uri}/{path}"):
            data: bytes = self.s3.cat_file(f"{self.uri}/{path}", start=start, end=end)
            return data

    def open(self, path: str) -> BinaryIO:
        with explained(f"{self.uri}/{path}"):
            size = int(self.s3.info(f"{self.uri}/{path}")["size"])
        return ranged_file(size, functools.partial(self.read, path))

    def create(self, path: str, data: bytes) -> None:
        uri = f"{self.uri}/{path}"
        single = len(data) <= LARGEST_SINGLE_PUT
        if not single and self.exists(path):
            raise AlreadyExists(f"{path} is already in {self.uri}; what is there stands.")
        with explained(uri, writing=True):
            # Only `put` comes here with more than one part; its name says its content, so overwriting changes nothing.
            s3, mode = (self.s3_once, "create") if single else (self.s3, "overwrite")
            sync(s3.loop, _send, s3, uri, data, mode)

    def exists(self, path: str) -> bool:
        with explained(f"{self.uri}/{path}"):
            try:
                return bool(self.s3.info(f"{self.uri}/{path}")["type"] == "file")
            except FileNotFoundError:
                return False

    def list(self, prefix: str) -> list[str]:
        root = self.uri.removeprefix("s3://")
        with explained(f"{self.uri}/{prefix}"):
            found = self.s3.find(f"{root}/{prefix}")
        return sorted(path.removeprefix(root + "/") for path in found)

    def modified(self, path: str) -> datetime:
        with explained(f"{self.uri}/{path}"):
            moment: datetime = self.s3.modified(f"{self.uri}/{path}")
            return moment

    def remove(self, path: str) -> None:
        with explained(f"{self.uri}/{path}", writing=True), contextlib.suppress(FileNotFoundError):
            self.s3.rm_file(f"{self.uri}/{path}")


async def _send(s3: Any, uri: str, data: bytes, mode: str) -> None:
    # botocore's read timeout does not cover the wait for "100 Continue" before a body: a server that accepts the
    # connection and says nothing would be waited for without end.
    await s3.set_session()
    seconds = READ_TIMEOUT_SECONDS + len(data) / SLOWEST_UPLOAD
    await asyncio.wait_for(s3._pipe_file(uri, data, mode=mode, chunksize=LARGEST_SINGLE_PUT), seconds)


def resolved_endpoint(endpoint_url: str | None) -> str | None:
    """The S3 server that is meant: as configured, else from the variables that the AWS tools read, else AWS (None)."""
    return endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def connect_s3(endpoint_url: str | None, *, attempts: int = 5) -> Any:
    endpoint_url = resolved_endpoint(endpoint_url)
    settings: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "read_timeout": READ_TIMEOUT_SECONDS,
        "retries": {"total_max_attempts": attempts},
    }
    if attempts == 1:
        settings["http_session_cls"] = OneTrySession
    if endpoint_url:  # not AWS: older servers know neither virtual-hosted buckets nor the newer checksum headers
        settings["s3"] = {"addressing_style": "path"}
        settings["request_checksum_calculation"] = "when_required"
        settings["response_checksum_validation"] = "when_required"
    # Listings are never cached: other processes write to the same bucket.
    s3 = s3fs.S3FileSystem(
        endpoint_url=endpoint_url, config_kwargs=settings, use_listings_cache=False, skip_instance_cache=True
    )
    s3.retries = attempts  # s3fs repeats on its own, above botocore
    return s3


@contextlib.contextmanager
def explained(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what s3fs raises into one of our errors, telling a definite no from an unknown outcome."""
    try:
        yield
    except S3_FAILURES as error:
        raise _sentence(error, uri, writing=writing) from error


def _sentence(error: Exception, uri: str, *, writing: bool) -> StoreError:
    answer = _answer(error)
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode") if answer else None
    said = " ".join(str(answer or error).split()) or type(error).__name__
    # s3fs: FileExistsError where the server names the failed condition (moto), else OSError(EINVAL) (radosgw).
    if status == 412 or isinstance(error, FileExistsError):
        return AlreadyExists(f"{uri} is already there; what is there stands.")
    if isinstance(error, FileNotFoundError):
        return NotFound(f"There is no {uri} ({said}); check the bucket and the path.")
    if isinstance(error, PermissionError | NoCredentialsError):
        return StoreError(f"{uri}: access was refused ({said}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return StoreError(f"{uri} cannot be reached ({said}); check store.s3_endpoint_url and the network.")
    if status is None or status >= 500:
        if writing:
            return OutcomeUnknown(
                f"The store went silent while {uri} was written, which may or may not have happened ({said}); "
                "run the same command again."
            )
        return StoreError(f"{uri} cannot be read ({said}); run the same command again once the store answers.")
    return StoreError(f"{uri}: the store refused the request ({said}).")


def _answer(error: BaseException | None) -> Any:
    """The server's answer behind an s3fs exception; None where none came."""
    while error is not None and not isinstance(error, ClientError):
        error = error.__cause__
    return error
