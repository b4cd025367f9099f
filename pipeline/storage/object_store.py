"""Immutable objects in a folder or an S3 bucket.

Two ways to write. `put` is for objects whose name says what is in them: writing one twice is fine. `create` is for
commit markers: of all who create one name, one wins and the others learn that they lost.
"""

import functools
import hashlib
import os
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.config import StoreSection
from pipeline.errors import AlreadyExists, ConfigError, CorruptObject, UnsafeStore
from pipeline.storage.local_disk import LocalDisk, local_path
from pipeline.storage.s3_bucket import LARGEST_SINGLE_PUT, READ_TIMEOUT_SECONDS, S3Bucket, resolved_endpoint


class ObjectStore:
    """Objects by relative path below `uri`: a folder, or `s3://bucket/prefix` with keys from the AWS_* variables.

    Every method raises StoreError, or one of its subclasses, with a sentence. Picklable: it carries only its address.
    """

    def __init__(self, uri: str, *, s3_endpoint_url: str | None = None) -> None:
        self.on_s3 = uri.startswith("s3://")
        # Absolute, so that a process with another working folder means the same place.
        self.uri = uri.rstrip("/") if self.on_s3 else str(local_path(uri))
        self.s3_endpoint_url = resolved_endpoint(s3_endpoint_url)
        if self.on_s3 and not uri.removeprefix("s3://").split("/")[0]:
            raise ConfigError(f"{uri} names no bucket; store.uri reads s3://bucket/prefix.")
        self._objects: LocalDisk | S3Bucket
        self._objects = S3Bucket(self.uri, self.s3_endpoint_url) if self.on_s3 else LocalDisk(Path(self.uri))

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(ObjectStore, self.uri, s3_endpoint_url=self.s3_endpoint_url), ()

    def __repr__(self) -> str:
        return f"ObjectStore({self.uri!r})"

    def read(self, path: str, *, sha256: str | None = None) -> bytes:
        """The object's bytes. Raises NotFound, and CorruptObject when `sha256` is given and differs."""
        data = self._objects.read(checked_path(path))
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptObject(f"{path} in {self.uri} differs from its checksum; restore it from a copy or roll back.")
        return data

    def open(self, path: str) -> BinaryIO:
        """The object as a file, for readers that take it piece by piece. Raises NotFound."""
        return self._objects.open(checked_path(path))

    def put(self, path: str, data: bytes) -> str:
        """Store an object named by its content and return its SHA-256; nothing happens where it is already there.

        Raises CorruptObject, and leaves the object as it was, where the name already holds other bytes. After
        OutcomeUnknown the same call is safe to repeat.
        """
        try:
            self._objects.create(checked_path(path), data)
        except AlreadyExists:
            if self.read(path) != data:
                raise CorruptObject(
                    f"{path} in {self.uri} already holds other bytes; it is damaged or two versions of wiseline "
                    "wrote it: remove it and run the same command again."
                ) from None
        return hashlib.sha256(data).hexdigest()

    def create(self, path: str, data: bytes) -> None:
        """Store an object that nobody stored before: of all callers one succeeds, the others get AlreadyExists.

        Sent once and never repeated by itself. After OutcomeUnknown the object is there whole or not at all, and who
        wrote it is unknown: read it before doing anything else.
        """
        if len(data) > LARGEST_SINGLE_PUT:
            raise ValueError(f"{path}: create is for small markers, not for {len(data)} bytes")
        self._objects.create(checked_path(path), data)

    def exists(self, path: str) -> bool:
        return self._objects.exists(checked_path(path))

    def list(self, prefix: str) -> list[str]:
        """Sorted paths of the objects in the folder `prefix` and below; empty where there is no such folder."""
        return self._objects.list(checked_path(prefix))

    def modified(self, path: str) -> datetime:
        """When the object was stored, by the store's clock. Raises NotFound."""
        return self._objects.modified(checked_path(path))

    def remove(self, path: str) -> None:
        """Delete an object that nothing refers to any more; nothing happens where there is none."""
        self._objects.remove(checked_path(path))

    def probe(self) -> None:
        """Check that the store keeps its promise of `create`: of two creations of one name the second must lose.

        Raises UnsafeStore where the second wins, and StoreError where the store cannot be reached or written at all.
        """
        path = f"probe/{uuid.uuid4().hex}"
        self.create(path, b"first")
        try:
            self.create(path, b"second")
        except AlreadyExists:
            return
        finally:
            self.remove(path)
        raise UnsafeStore(
            f"{self.uri} ignores If-None-Match, so two rounds could overwrite each other's release; "
            "use a store with conditional puts (AWS S3, MinIO, Ceph) or a local folder."
        )

    def delta_uri(self, name: str) -> str:
        """Where deltalake finds the table `name`."""
        if self.on_s3:
            return f"{self.uri}/{checked_path(name)}"
        return str(Path(self.uri) / checked_path(name))

    @property
    def delta_options(self) -> dict[str, str]:
        """deltalake's storage options; it reads the keys from the AWS_* variables itself."""
        if not self.on_s3:
            return {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options = {"AWS_REGION": region, "conditional_put": "etag", "timeout": f"{READ_TIMEOUT_SECONDS}s"}
        if self.s3_endpoint_url:
            options["AWS_ENDPOINT_URL"] = self.s3_endpoint_url
            options["AWS_ALLOW_HTTP"] = str(self.s3_endpoint_url.startswith("http://")).lower()
        return options


def open_store(section: StoreSection, *, probe: bool = False) -> ObjectStore:
    """The store that the config names; with `probe` (for jobs that publish) refused where it would overwrite."""
    store = ObjectStore(section.uri, s3_endpoint_url=section.s3_endpoint_url)
    if probe:
        store.probe()
    return store


def checked_path(path: str) -> str:
    """A path that stays inside the store, without a trailing slash. Raises ValueError."""
    if (
        not path
        or path.startswith("/")
        or "\\" in path
        or any(part in ("", ".", "..") for part in path.strip("/").split("/"))
    ):
        raise ValueError(f"{path!r} is not a relative path inside the store")
    return path.rstrip("/")
