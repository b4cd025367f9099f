"""`ingest` as a whole: files in, log and quarantine out, on a local Ray."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.ingest_edits import IngestReport, ingest
from pipeline.actors import ingestor
from pipeline.config import Config, StoreSection
from pipeline.errors import CorruptObject, NotFound, StoreError, WiselineError
from pipeline.storage import staged_files
from pipeline.storage.edit_log import EditLog
from pipeline.storage.log_append import LogAppend
from pipeline.storage.object_store import ObjectStore

DATA = Path("/work/shared/data")

pytestmark = pytest.mark.usefixtures("local_ray")


class Workspace:
    """A store and a folder of input files."""

    def __init__(self, folder: Path) -> None:
        self.files = folder / "files"
        self.files.mkdir()
        self.uri = str(folder / "store")
        self.config = Config(store=StoreSection(uri=self.uri))

    @property
    def log(self) -> EditLog:
        return EditLog(ObjectStore(self.uri))

    def write(self, name: str, content: str | bytes) -> str:
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def jsonl(self, name: str, *rows: object) -> str:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def ingest(self, *paths: str) -> IngestReport:
        return ingest(self.config, paths)

    def live(self) -> dict[str, str]:
        return {entry.edit.prompt: entry.edit.target for entry in self.log.live()}


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def counts(report: IngestReport) -> dict[str, int]:
    names = ("rows", "ingested", "unchanged", "superseded", "duplicates", "quarantined", "retracted")
    return {name: value for name in names if (value := getattr(report, name))}


# 83 of CounterFact's prompts come again later in the file with another answer.
DATA_SETS = {
    "zsre/zsre_mend_edit.json": {"rows": 1037, "ingested": 1037},
    "counterfact/counterfact-edit.json": {"rows": 10_000, "ingested": 10_000, "superseded": 83},
    "hallucination/hallucination-edit.json": {"rows": 600, "ingested": 600},
    "temporal/temporal-edit.json": {"rows": 75, "ingested": 75},
}


@pytest.mark.skipif(not DATA.exists(), reason="the editing data sets are not on this machine")
@pytest.mark.parametrize("name", DATA_SETS)
def test_the_published_data_sets_are_read_whole(work: Workspace, name: str) -> None:
    expected = DATA_SETS[name]
    records = json.loads((DATA / name).read_text())
    slots = {(r["subject"].casefold(), " ".join(r.get("prompt", r.get("src")).split()).casefold()) for r in records}
    assert counts(work.ingest(str(DATA / name))) == expected
    live = work.log.live()
    assert len(live) == len(slots) == expected["rows"] - expected.get("superseded", 0)
    assert all(entry.edit.locality for entry in live)
    assert all(entry.edit.paraphrases for entry in live) is not name.startswith("hallucination")  # it has none
    version = work.log.version()
    again = work.ingest(str(DATA / name))
    assert again.ingested == 0
    assert again.rows == expected["rows"]
    assert work.log.version() == version


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{broken", "broken JSON"),
    "cut off": (b'{"prompt": "p", "target": "t"', "broken JSON"),
    "two values": (b'{"prompt": "p", "target": "t"} {}', "broken JSON"),
    "nested too deep": (b"[" * 100_000, "broken JSON"),
    "not an object": (b'["p", "t"]', "not an object"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "target": "t"}', "UTF-8"),
    "half a character": (b'{"prompt": "\\ud800", "target": "t"}', "UTF-8"),
    "no prompt": (b'{"target": "t"}', "prompt: "),
    "empty prompt": (b'{"prompt": " ", "target": "t"}', "prompt is empty"),
    "prompt of another type": (b'{"prompt": 7, "target": "t"}', "prompt: "),
    "no target": (b'{"prompt": "p"}', "target is empty"),
    "empty target": (b'{"prompt": "p", "target": "\\t"}', "target is empty"),
    "target of another type": (b'{"prompt": "p", "target": ["t"]}', "target: "),
    "target equals prompt": (b'{"prompt": "Paris", "target": " paris"}', "equals the prompt"),
    "prompt too long": (json.dumps({"prompt": "p" * 9000, "target": "t"}).encode(), "9000 characters"),
    "target too long": (json.dumps({"prompt": "p", "target": "t" * 5000}).encode(), "5000 characters"),
    "unknown operation": (b'{"op": "delete", "prompt": "p", "target": "t"}', "op: "),
    "subject of another type": (b'{"prompt": "p", "target": "t", "subject": {}}', "subject: "),
    "paraphrases of another type": (b'{"prompt": "p", "target": "t", "paraphrases": [1]}', "paraphrases.0: "),
    "unknown locality kind": (
        b'{"prompt": "p", "target": "t", "locality": [{"prompt": "x", "kind": "far"}]}',
        "locality.0.kind: ",
    ),
    "larger than a row may be": (b'{"prompt": "p", "target": "' + b"t" * (5 * 2**20) + b'"}', "larger than"),
}


def test_exactly_the_bad_rows_of_a_file_are_refused_each_with_its_reason(work: Workspace) -> None:
    lines: list[bytes] = []
    expected: dict[int, str] = {}
    for index, (line, reason) in enumerate(BAD_LINES.values()):
        lines.append(b'{"prompt": "good %d", "target": "t"}' % index)
        lines.append(line)
        expected[len(lines)] = reason
    lines.append(b'{"prompt": "last, without a line end", "target": "t"}')
    path = work.write("rows.jsonl", b"\n".join(lines))
    report = work.ingest(path)
    assert counts(report) == {
        "rows": len(lines),
        "ingested": len(BAD_LINES) + 1,
        "quarantined": len(BAD_LINES),
    }
    refused = work.log.quarantine()
    assert [(source, rejection.row) for source, rejection in refused] == [(path, row) for row in expected]
    for _, rejection in refused:
        assert expected[rejection.row] in rejection.reason, rejection
        assert len(rejection.raw) <= ingestor.RAW_CHARS
    assert {entry.row for entry in work.log.live()} == set(range(1, len(lines) + 1)) - set(expected)
    assert work.ingest(path).quarantined == len(BAD_LINES)
    assert work.log.quarantine() == refused


def test_a_bad_csv_row_takes_no_other_with_it(work: Workspace) -> None:
    path = work.write(
        "rows.csv",
        b"\xef\xbb\xbfprompt,target,note\r\n"
        b"one,1,\r\n"
        b"too,few\r\n"
        b"far,too,many,cells\r\n"
        b'"never closed,2,\r\n'
        b"two,2,\r\n"
        b"caf\xe9,3,\r\n"
        b'"three\r\nlines\r\nlong","3, really","a ""note"""\r\n'
        b"\r\n"
        b'four,"4"4,\r\n'
        b"five,5,\r\n",
    )
    report = work.ingest(path)
    assert work.live() == {"one": "1", "two": "2", "three\r\nlines\r\nlong": "3, really", "five": "5"}
    assert [rejection.row for _, rejection in work.log.quarantine()] == [3, 4, 5, 7, 12]
    assert counts(report) == {"rows": 9, "ingested": 4, "quarantined": 5}


EDITS: list[dict[str, Any]] = [
    {
        "prompt": "Who leads Örland?",
        "target": 'Anna "A." Ek, 🦊',
        "subject": "Örland",
        "paraphrases": ["Örland's leader?", "[sic] who, leads"],
        "locality": [{"prompt": "Who leads Erland?", "kind": "same_relation"}, {"prompt": "2+2=", "kind": "unrelated"}],
        "author": "me",
    },
    {"prompt": "Two\nlines", "target": "1e3"},
    {"op": "retract", "prompt": "Gone", "subject": "Örland"},
    {"prompt": "Gone", "subject": "Örland", "target": "back"},
]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(edit, ensure_ascii=False) + "\n\n" for edit in EDITS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(EDITS, indent=2))


def write_csv(path: Path) -> None:
    names = list(dict.fromkeys(name for edit in EDITS for name in edit))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for edit in EDITS:
            writer.writerow(
                {name: json.dumps(value) if isinstance(value, list) else value for name, value in edit.items()}
            )


def write_parquet(path: Path) -> None:
    names = list(dict.fromkeys(name for edit in EDITS for name in edit))
    pq.write_table(pa.Table.from_pylist([{name: edit.get(name) for name in names} for edit in EDITS]), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def test_the_formats_say_the_same(work: Workspace, tmp_path: Path) -> None:
    edits = {}
    for suffix, write in WRITERS.items():
        folder = tmp_path / suffix
        folder.mkdir()
        apart = Workspace(folder)
        write(apart.files / f"edits.{suffix}")
        report = apart.ingest(str(apart.files / f"edits.{suffix}"))
        assert counts(report) == {"rows": 4, "ingested": 3, "unchanged": 1}, suffix
        edits[suffix] = [(entry.seq, entry.edit, entry.batch_id) for entry in apart.log.history()]
    assert edits["jsonl"] == edits["json"] == edits["csv"] == edits["parquet"]
    assert [entry[1].prompt for entry in edits["json"]] == ["Who leads Örland?", "Two\nlines", "Gone"]


def test_a_parquet_value_that_is_no_text_is_refused(work: Workspace) -> None:
    table = pa.table({"prompt": [b"bytes", b"bytes"], "target": ["t", None], "paraphrases": [["a"], None]})
    pq.write_table(table, work.files / "edits.parquet")
    assert counts(work.ingest(str(work.files))) == {"rows": 2, "quarantined": 2}


def test_a_later_edit_of_a_slot_supersedes_and_a_retraction_empties_it(work: Workspace) -> None:
    first = work.jsonl("a.jsonl", {"prompt": "p", "target": "old"}, {"prompt": "q", "target": "kept"})
    second = work.jsonl("b.jsonl", {"prompt": " P", "target": "new"}, {"op": "retract", "prompt": "q"})
    assert counts(work.ingest(first)) == {"rows": 2, "ingested": 2}
    assert counts(work.ingest(second)) == {"rows": 2, "ingested": 2, "superseded": 1, "retracted": 1}
    assert work.live() == {"P": "new"}
    for paths in ([first], [second, first], [first, second], [first, first]):
        assert work.ingest(*paths).ingested == 0
    assert work.live() == {"P": "new"}
    assert [entry.edit.target for entry in work.log.history()] == ["old", "kept", "new", ""]


def test_files_and_rows_keep_their_order_whatever_runs_in_parallel(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestor, "BATCH_ROWS", 700)
    for name in ("b", "a", "c"):
        # The first file is the longest, so that it is read last when order is left to chance.
        rows = 5000 if name == "a" else 300
        work.jsonl(f"{name}.jsonl", *({"prompt": f"{name}{row}", "target": "t"} for row in range(1, rows + 1)))
    paths = [str(work.files / "b.jsonl"), str(work.files), str(work.files / "[ac].jsonl")]
    assert counts(work.ingest(*paths)) == {"rows": 5600, "ingested": 5600}
    history = work.log.history()
    expected = [(name, row) for name, rows in (("b", 300), ("a", 5000), ("c", 300)) for row in range(1, rows + 1)]
    assert [(Path(entry.source).stem, entry.row) for entry in history] == expected
    assert [entry.edit.prompt for entry in history] == [f"{name}{row}" for name, row in expected]
    assert [entry.seq for entry in history] == list(range(5600))
    version = work.log.version()
    assert counts(work.ingest(*paths)) == {"rows": 5600, "unchanged": 5600}
    assert work.log.version() == version


def unreadable(work: Workspace) -> dict[str, tuple[str, type[WiselineError], str]]:
    whole = b"".join([b"PAR1", b"\x00" * 40])
    return {
        "missing": (str(work.files / "missing.jsonl"), NotFound, "missing.jsonl"),
        "pattern": (str(work.files / "*.nothing"), NotFound, "nothing"),
        "suffix": (work.write("notes.txt", "hello"), StoreError, "not in a format"),
        "JSON": (work.write("cut.json", '[{"prompt": "p", "target": "t"},'), CorruptObject, "not valid JSON"),
        "one value": (work.write("seven.json", "7"), CorruptObject, "not an array"),
        "Parquet": (work.write("cut.parquet", whole), CorruptObject, "not a Parquet file"),
        "CSV header": (work.write("people.csv", "name,age\nAnna,7\n"), CorruptObject, "no column called prompt"),
        "scheme": ("http://host/edits.jsonl", WiselineError, "neither a path nor an s3"),
        "empty folder": (str(work.files / "empty"), NotFound, "empty"),
    }


def test_one_unreadable_file_refuses_the_whole_call_before_anything_is_written(work: Workspace) -> None:
    good = work.jsonl("good.jsonl", {"prompt": "p", "target": "t"})
    (work.files / "empty").mkdir()
    for path, error, sentence in unreadable(work).values():
        with pytest.raises(error, match=sentence):
            work.ingest(good, path)
    assert not Path(work.uri).exists()


def test_a_folder_is_read_without_what_is_not_for_it(work: Workspace) -> None:
    work.jsonl("deep/er/a.jsonl", {"prompt": "p", "target": "t"})
    work.write("deep/README.md", "about")
    work.write("_SUCCESS.json", "")
    work.write(".hidden.jsonl", "{")
    work.write("empty.jsonl", "")
    assert counts(work.ingest(str(work.files))) == {"rows": 1, "ingested": 1}


def test_an_interrupted_ingest_leaves_the_log_as_it_was_and_is_completed_by_the_next(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingestor, "BATCH_ROWS", 10)
    monkeypatch.setattr(staged_files, "FILE_ROWS", 10)
    path = work.jsonl("a.jsonl", *({"prompt": f"p{row}", "target": "t"} for row in range(35)), "bad")
    real: Any = LogAppend.add
    calls: list[object] = []

    def crash_in_the_third(self: LogAppend, batch: object) -> None:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(LogAppend, "add", crash_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            work.ingest(path)
    assert work.log.history() == []
    assert list(Path(work.uri, "edits").glob("*.parquet")) == []
    assert counts(work.ingest(path)) == {"rows": 36, "ingested": 35, "quarantined": 1}
    assert [entry.edit.prompt for entry in work.log.history()] == [f"p{row}" for row in range(35)]
    assert [entry.row for entry in work.log.history()] == list(range(1, 36))
    assert len(work.log.quarantine()) == 1


def test_a_file_that_breaks_while_it_is_read_leaves_the_log_as_it_was(work: Workspace) -> None:
    table = pa.table({"prompt": [f"p{row}" for row in range(5000)], "target": ["t"] * 5000})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=1000, compression="none")
    data = bytearray(sink.getvalue())
    half = len(data) // 2
    data[half : half + 5000] = b"\xff" * 5000
    good = work.jsonl("good.jsonl", {"prompt": "p", "target": "t"})
    with pytest.raises(StoreError, match="cannot be read after row"):
        work.ingest(good, work.write("broken.parquet", bytes(data)))
    assert work.log.history() == []
    assert counts(work.ingest(good)) == {"rows": 1, "ingested": 1}


def test_an_ingest_is_one_version_of_the_log_however_many_files_it_reads(work: Workspace) -> None:
    work.jsonl("first.jsonl", {"prompt": "p", "target": "t"})
    work.ingest(str(work.files))
    version = work.log.version()
    assert version is not None
    for name in "abc":
        work.jsonl(f"{name}.jsonl", *({"prompt": f"{name}{row}", "target": "t"} for row in range(3)), "bad")
    assert counts(work.ingest(str(work.files))) == {"rows": 13, "ingested": 9, "unchanged": 1, "quarantined": 3}
    assert work.log.version() == version + 1
    assert {source for source, _ in work.log.quarantine()} == {str(work.files / f"{name}.jsonl") for name in "abc"}
