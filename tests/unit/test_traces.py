"""Spans in a file, over two processes; nothing where nobody asked for them."""

import gzip
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.traces import here, span, trace_to

PROGRAM = """
import json, sys
from pipeline.traces import here, past, span, trace_to
trace_to(sys.argv[1])
within = json.loads(sys.argv[2])
if within:
    with span("shard", within=within, shard="s1"):
        past("fit", seconds=0.5, steps=7)
else:
    with span("round", round="r1"), span("train"):
        print(json.dumps(here()))
"""


def run(where: Path | str, within: dict[str, str]) -> str:
    command = [sys.executable, "-c", PROGRAM, str(where), json.dumps(within)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_trace_goes_on_in_another_process(tmp_path: Path) -> None:
    file = tmp_path / "deep/spans.jsonl"
    run(file, json.loads(run(file, {})))
    spans: dict[str, Any] = {one["name"]: one for one in map(json.loads, file.read_text().splitlines())}
    assert set(spans) == {"round", "train", "shard", "fit"}
    assert len({one["context"]["trace_id"] for one in spans.values()}) == 1
    assert spans["round"]["parent_id"] is None
    for child, parent in (("train", "round"), ("shard", "train"), ("fit", "shard")):
        assert spans[child]["parent_id"] == spans[parent]["context"]["span_id"]
    assert spans["fit"]["attributes"] == {"steps": 7}
    assert spans["fit"]["start_time"] < spans["shard"]["start_time"]  # half a second before it ended


def test_nothing_is_kept_without_a_place_for_it() -> None:
    with span("round"):
        assert here() == {}


def test_a_collector_gets_them(tmp_path: Path) -> None:
    """One that speaks OTLP, and nothing else of a collector."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append((self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run(f"http://127.0.0.1:{server.server_port}/v1/traces", {})
        server.shutdown()
    spans = []
    for path, body in got:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            assert "wiseline" in {one.value.string_value for one in resource.resource.attributes}
            spans += [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(spans) == ["round", "train"]


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        trace_to(str(tmp_path / "file/spans.jsonl"))
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"wiseline\[tracing\]"):
        trace_to("http://127.0.0.1:4318/v1/traces")
