"""The file of keys: what it keeps, what it never keeps, and how the ring notices a change."""

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, NotFound
from pipeline.serving.keys import KeyRing, create_key, read_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "private" / "keys.json"


def test_a_key_is_found_by_what_was_shown_and_the_file_does_not_hold_it(file: Path) -> None:
    key, secret = create_key(file, name="newsroom", scopes=["edit", "infer"], per_minute=60)
    assert KeyRing(file).find(secret) == key
    assert (key.name, key.scopes, key.per_minute, key.concurrent) == ("newsroom", ("infer", "edit"), 60, None)
    assert secret not in file.read_text()
    assert secret.removeprefix("wl-") not in file.read_text()
    assert hashlib.sha256(secret.encode()).hexdigest() == key.sha256
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_is_almost_a_key_is_none(file: Path) -> None:
    key, secret = create_key(file, name="a", scopes=["infer"])
    other = create_key(file, name="b", scopes=["infer"])[1]
    ring = KeyRing(file)
    for wrong in ("", secret[:-1], secret + "x", secret.lower(), key.sha256, key.id, "wl-é\udcff"):
        assert ring.find(wrong) is None
    assert ring.find(other) != key


def test_a_revoked_key_stops_working_at_once_and_others_go_on(file: Path) -> None:
    first, first_secret = create_key(file, name="a", scopes=["infer"])
    second, second_secret = create_key(file, name="b", scopes=["infer"])
    ring = KeyRing(file)
    assert ring.find(first_secret) == first
    assert revoke_key(file, first.id) == first
    assert ring.find(first_secret) is None
    assert ring.find(second_secret) == second
    with pytest.raises(NotFound, match="wiseline keys list"):
        revoke_key(file, first.id)


def test_keys_made_at_the_same_time_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda name: create_key(file, name=str(name), scopes=["infer"])[0], range(16)))
    assert {key.id for key in read_keys(file)} == {key.id for key in made}


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"keys": [{"id": "x"}]}', b'{"keys": [], "more": 1}', b"\xff"])
def test_while_the_file_cannot_be_read_nobody_enters(file: Path, content: bytes | None) -> None:
    _, secret = create_key(file, name="a", scopes=["infer"])
    ring = KeyRing(file)
    assert ring.find(secret)
    good = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"keys\.json"):
            ring.find(secret)
    file.write_bytes(good)
    assert ring.find(secret)


def test_the_file_says_who_and_when(file: Path) -> None:
    create_key(file, name="newsroom", scopes=["admin"])
    [key] = json.loads(file.read_text())["keys"]
    assert set(key) == {"id", "name", "scopes", "sha256", "created", "concurrent", "per_minute"}
