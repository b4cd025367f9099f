"""docs/serving.md, run as it is written: its Python and shell blocks, in their order, against a real endpoint."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs.serve import running_endpoint
from pipeline.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXPECTED = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"  # what the page calls the endpoint; here it has another port


@dataclass
class Reader:
    """Somebody who types the page's blocks, one after another."""

    url: str
    folder: Path
    environment: dict[str, str]
    names: dict[str, Any]

    def run(self, language: str, block: str) -> str:
        block = block.replace(ADDRESS, self.url)
        if language == "bash":
            return self._shell(block)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, "docs/serving.md", "exec"), self.names)
        return said.getvalue()

    def _shell(self, block: str) -> str:
        command = f'set -e\nwiseline() {{ "{sys.executable}" -m jobs.cli "$@"; }}\n{block}'
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture
def reader(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    (tmp_path / "ray_config.yaml").write_text(
        f"model:\n  path: {ROOT / 'demo' / 'model'}\nstore:\n  uri: store\n"
        "serve:\n  keys_file: keys.json\n  port: 0\n  poll_seconds: 0.2\n"
    )
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    reader = Reader("", tmp_path, environment, {})
    made = reader.run("bash", "wiseline keys create me --scope infer --scope edit --scope admin --json\n")
    environment["WISELINE_API_KEY"] = json.loads(made.splitlines()[-1])["key"]
    monkeypatch.setenv("WISELINE_API_KEY", environment["WISELINE_API_KEY"])
    with running_endpoint(load_config()) as url:
        reader.url = url
        yield reader


@pytest.mark.timeout(900)
def test_every_example_does_what_the_page_says(reader: Reader) -> None:
    blocks = BLOCK.findall(PAGE)
    assert {language for language, _ in blocks} == {"python", "bash"}
    checked = 0
    for language, block in blocks:
        said = reader.run(language, block)
        if language == "python":
            lines = iter(said.splitlines())
            for expected in EXPECTED.findall(block):
                assert expected in lines, f"{block}\nprints {said!r}, not {expected!r}"
                checked += 1
    assert checked == len(EXPECTED.findall(PAGE)) > 15


def test_the_page_has_no_example_that_is_not_run() -> None:
    fences = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    assert [fence for fence in fences if fence] == ["console"] + [language for language, _ in BLOCK.findall(PAGE)]
