"""Spans in a file, over two processes; nothing where nobody asked for them."""

import json
import os
import subprocess
import sys
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


def run(file: Path, within: dict[str, str]) -> str:
    command = [sys.executable, "-c", PROGRAM, str(file), json.dumps(within)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
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


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        trace_to(str(tmp_path / "file/spans.jsonl"))
    with pytest.raises(ConfigError, match=r"wiseline\[tracing\]"):
        trace_to("http://127.0.0.1:4318/v1/traces")
