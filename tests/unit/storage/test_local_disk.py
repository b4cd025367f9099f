import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import AlreadyExists, ConfigError, UnsafeStore
from pipeline.storage.object_store import ObjectStore

WRITER = """
import sys
from pipeline.storage.object_store import ObjectStore
store = ObjectStore(sys.argv[1])
print("ready", flush=True)
for number in range(10**6):
    store.create(f"objects/{number}", b"x" * 100_000)
"""


def test_a_writer_that_is_killed_leaves_whole_objects_only(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    store, deadline = ObjectStore(str(tmp_path)), time.monotonic() + 60
    while not store.list("objects") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    written = store.list("objects")
    assert written
    assert all(len(store.read(path)) == 100_000 for path in written)
    store.create(f"objects/{len(written)}", b"the next one")


def test_a_half_written_file_is_no_object(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    store.create("folder/whole", b"whole")
    (tmp_path / "folder" / ".unfinished-0123").write_bytes(b"ha")
    assert store.list("folder") == ["folder/whole"]


def test_losing_leaves_no_trace(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    store.create("a", b"first")
    with pytest.raises(AlreadyExists):
        store.create("a", b"second")
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UnsafeStore, match="hard links"):
        ObjectStore(str(tmp_path)).probe()
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize("uri", ["gs://bucket/prefix", "http://host/path", "s3://", "s3:///prefix"])
def test_an_address_that_cannot_be_a_store_is_a_sentence(uri: str) -> None:
    with pytest.raises(ConfigError):
        ObjectStore(uri)


def test_a_store_means_the_same_folder_in_a_process_with_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = ObjectStore("store")
    store.put("a", b"one")
    travelled = pickle.dumps(store)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(travelled).read("a") == b"one"


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path / "store"))
    assert store.list("releases") == []
    assert not store.exists("a")
    assert not (tmp_path / "store").exists()
