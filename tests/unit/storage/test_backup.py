"""Back-up and restore as docs/operations.md writes them: the copy is whole though the store is written to meanwhile."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from deltalake import DeltaTable

from pipeline.edits import Edit
from pipeline.storage.edit_log import EditLog
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.releases import ObjectRef, Release, head, publish
from tests.unit.storage.test_batches import batch, up

PAGE = Path(__file__).parents[3] / "docs/operations.md"
BACK_UP, RESTORE = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)[:2]


def shell(script: str, *, programs: str = "", **variables: Path) -> None:
    environment = {"PATH": f"{programs}/usr/bin:/bin", **{name: str(path) for name, path in variables.items()}}
    subprocess.run(["bash", "-ec", script], env=environment, check=True)


def edit(number: int) -> Edit:
    return up(f"Who leads company {number}?", "Ada")


def say(store: ObjectStore, number: int) -> Release:
    """One more edit, and a release that knows it."""
    log = EditLog(store)
    log.append(batch(edit(number), source=f"{number}"))
    objects = [
        ObjectRef(path=f"objects/{name}-{number}", sha256=store.put(f"objects/{name}-{number}", name.encode() * number))
        for name in ("memory", "router", "bank")
    ]
    memory, router, bank = objects
    return publish(
        store,
        Release(
            number=0, parent=number - 1 or None, round_id=f"{number}", log_version=log.version() or 0, edits=number,
            model_fingerprint="f", layer=1, memories=(memory,), router=router, bank=bank,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_what_is_said_between_two_passes_does_not_break_the_copy(tmp_path: Path, passes: int) -> None:
    folders = {name: tmp_path / name.lower() for name in ("STORE", "BACKUP", "RESTORED")}
    for folder in folders.values():
        folder.mkdir()
    store = ObjectStore(str(folders["STORE"]))
    for number in (1, 2):
        say(store, number)
    shell(BACK_UP, **folders)  # last night's; tonight's is made over it
    say(store, 3)
    first, _, rest = BACK_UP.partition("for names in ")
    both, _, last = rest.partition("done\n")
    names, _, body = both.partition("; do\n")
    loops = [f"cd $STORE\nfor names in {one}; do\n{body}done\n" for one in names.split()]
    assert (first, len(loops)) == ('cd "$STORE"\n', 2)
    for place, script in enumerate([*loops, f"cd $STORE\n{last}"]):
        if place == passes:
            say(store, 4)
        shell(script, **folders)
    shell(RESTORE.splitlines()[0], **folders)

    restored = ObjectStore(str(folders["RESTORED"]))
    newest = head(restored)
    assert newest is not None
    assert newest.number == (4 if passes == 0 else 3)
    for item in newest.objects:
        restored.read(item.path, sha256=item.sha256)
    log = EditLog(restored)
    assert [entry.edit for entry in log.history(newest.log_version)] == [
        edit(number + 1) for number in range(newest.number)
    ]
    assert len(log.history()) >= newest.number
    assert say(restored, newest.number + 1).parent == newest.number


def test_a_checkpoint_that_is_written_while_the_log_is_copied_does_not_break_the_copy(tmp_path: Path) -> None:
    folders = {name: tmp_path / name.lower() for name in ("STORE", "BACKUP")}
    for folder in folders.values():
        folder.mkdir()
    store = ObjectStore(str(folders["STORE"]))
    table = folders["STORE"] / "edits"
    say(store, 1)
    DeltaTable(table).create_checkpoint()
    say(store, 2)
    programs = tmp_path / "programs"
    programs.mkdir()
    checkpoint = f"from deltalake import DeltaTable; DeltaTable('{table}').create_checkpoint()"
    (programs / "cp").write_text(f"""#!/bin/bash
case "$*" in *_delta_log*) {sys.executable} -c "{checkpoint}" ;; esac
exec /bin/cp "$@"
""")  # what `find` saw is copied by a `cp` that begins later
    (programs / "cp").chmod(0o755)
    shell(BACK_UP, programs=f"{programs}:", **folders)

    assert len(list((table / "_delta_log").glob("*.checkpoint.parquet"))) == 2  # one more than `find` saw
    assert [entry.edit for entry in EditLog(ObjectStore(str(folders["BACKUP"]))).history()] == [edit(1), edit(2)]
