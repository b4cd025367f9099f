"""API keys: a JSON file that holds what each key may do, and of the key itself nothing but its SHA-256.

A key is 256 random bits, so a plain hash is enough: there is nothing to guess. The key is shown once, when it is made.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from pipeline.errors import ConfigError, NotFound

Scope = Literal["infer", "edit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "wl-"


class Key(BaseModel):
    """`id` is the beginning of the hash, so it gives nothing away. None of the limits: as much as there is room for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    scopes: tuple[Scope, ...]
    sha256: str
    created: datetime
    concurrent: PositiveInt | None = None  # requests at the same time, in one replica
    per_minute: PositiveInt | None = None  # requests, in one replica


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Raises ConfigError where there is no such file, or it is not one of keys."""
    try:
        return _File.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); `wiseline keys create` makes it.") from None
    except ValidationError:
        raise ConfigError(f"{path} is not a file of keys; restore it, or remove it and make new ones.") from None


def create_key(
    path: Path,
    *,
    name: str,
    scopes: Sequence[Scope],
    concurrent: int | None = None,
    per_minute: int | None = None,
) -> tuple[Key, str]:
    """A new key in the file, which is made where there is none, and what the client has to send."""
    secret = PREFIX + secrets.token_urlsafe(32)
    digest = _digest(secret)
    ordered = tuple(scope for scope in SCOPES if scope in scopes)
    key = Key(
        id=digest[:12],
        name=name,
        scopes=ordered,
        sha256=digest,
        created=datetime.now(UTC),
        concurrent=concurrent,
        per_minute=per_minute,
    )
    with _written(path) as keys:
        keys.append(key)
    return key, secret


def revoke_key(path: Path, key_id: str) -> Key:
    """Take a key out of the file; endpoints refuse it from the next request on. Raises NotFound."""
    with _written(path) as keys:
        found = [key for key in keys if key.id == key_id]
        if not found:
            raise NotFound(f"{path} has no key {key_id}; `wiseline keys list` shows the ids.")
        keys.remove(found[0])
    return found[0]


class KeyRing:
    """The keys of one file, read again whenever the file changes, so that a revoked key stops working at once."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._stamp: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def find(self, secret: str) -> Key | None:
        """The key that was sent, if it is one. Raises ConfigError while the file cannot be read: then nobody enters."""
        self._refresh()
        digest = _digest(secret)
        found = None
        for key in self._keys:  # all of them, in constant time each: how long it takes tells nothing
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _refresh(self) -> None:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            self._stamp = None
            read_keys(self._path)  # says what is wrong
            return
        if stamp != self._stamp:
            self._keys, self._stamp = read_keys(self._path), stamp


@contextmanager
def _written(path: Path) -> Iterator[list[Key]]:
    """The keys, to be changed in place; then the file is replaced as a whole. One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_keys(path)) if path.exists() else []
        yield keys
        text = json.dumps(_File(keys=tuple(keys)).model_dump(mode="json"), indent=1) + "\n"
        descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # readable for its owner alone
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
