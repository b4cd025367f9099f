"""The round report in a real browser: it is drawn, it fits, and nothing in it runs."""

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

import pytest

from pipeline.evaluation.report import render_html
from tests.integration.browser import installed_chromium
from tests.tiny_world import save_model

pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).parents[2]
HEIGHT = 3000
HOSTILE = '<script>document.title = "ran"</script><img src=x onerror="document.title = 1">'
SETTINGS = {
    "model.layer": 0,
    "shards.edits_per_shard": 3,
    "shards.density": 0.5,
    "training.stop_loss": 0.5,
    "training.prefixes": 1,
    # The model is a random one; what it says to paraphrases fills the table of failed questions.
    "round.min_reliability": 0,
    "round.min_generalization": 0,
    "round.min_locality": 0,
}
ROUND = """
import sys
from jobs.ingest_edits import ingest
from pipeline.config import load_config
from pipeline.rounds import run_round
config = load_config(overrides=sys.argv[2:])
ingest(config, [sys.argv[1]])
print(f"{config.store.uri}/{run_round(config).report_path}")
"""
MEASURE = """<script>
const box = element => { const {width, height} = element.getBoundingClientRect(); return {width, height}; };
document.title = JSON.stringify({
  window: innerWidth,
  page: document.documentElement.scrollWidth,
  plots: [...document.querySelectorAll("figure > svg")].map(box),
  lines: [...document.querySelectorAll("polyline.line")].map(line => line.getTotalLength()),
  bars: [...document.querySelectorAll("rect.bar, path.bar")].map(box),
});
</script>"""


@dataclass(frozen=True)
class Visit:
    dom: str  # after the page was loaded
    console: list[str]  # whatever the browser complained about
    screenshot: bytes

    @property
    def title(self) -> str:
        found = re.search(r"<title>(.*?)</title>", self.dom, re.DOTALL)
        assert found, self.dom[:500]
        return unescape(found[1])


@pytest.fixture(scope="module")
def chromium() -> str:
    return installed_chromium()


@pytest.fixture(scope="module")
def report_page(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a round that published; report.json lies beside it."""
    folder = tmp_path_factory.mktemp("round")
    save_model(folder / "model", chat=False)
    rows = [
        {
            "prompt": f"Who leads company {name}?",
            "target": "new",
            "subject": f"company {name}",
            "paraphrases": [f"{HOSTILE} company {name}"],
            "locality": [{"prompt": "The capital of France is", "kind": "unrelated"}],
        }
        for name in "abcdef"
    ]
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SETTINGS | {"model.path": folder / "model", "store.uri": folder / "store"}
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", ROUND, str(folder / "edits.jsonl"), *(f"{key}={settings[key]}" for key in settings)],
        cwd=folder,
        env=variables | {"HOME": str(folder), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    return Path(ended.stdout.splitlines()[-1])


def visit(chromium: str, page: Path, folder: Path, *, width: int = 1200) -> Visit:
    picture = folder / "page.png"
    command = [
        chromium,
        "--headless",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},{HEIGHT}",
        f"--screenshot={picture}",
        "--dump-dom",
        page.as_uri(),
    ]
    if os.geteuid() == 0:  # Chromium's sandbox refuses root
        command.insert(1, "--no-sandbox")
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    assert seen.returncode == 0 and picture.exists(), seen.stderr
    return Visit(seen.stdout, [line for line in seen.stderr.splitlines() if "CONSOLE" in line], picture.read_bytes())


def test_the_browser_tells_when_a_page_misbehaves(chromium: str, tmp_path: Path) -> None:
    """What the other tests rely on: markup that was not escaped either runs or is complained about, and both show."""
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><title>harmless</title><body>{HOSTILE}<script>nowhere()</script></body>")
    seen = visit(chromium, page, tmp_path)
    assert seen.title in ("ran", "1")
    assert any("nowhere is not defined" in line for line in seen.console), seen.console
    page.write_text("<!DOCTYPE html><title>empty</title>")
    assert shades(visit(chromium, page, tmp_path).screenshot) < 10


def test_the_report_of_a_round_is_drawn_and_nothing_in_it_runs(
    chromium: str, report_page: Path, tmp_path: Path
) -> None:
    report = json.loads(report_page.with_name("report.json").read_text(encoding="utf-8"))
    seen = visit(chromium, report_page, tmp_path)
    assert seen.console == []
    assert seen.title == f"Release 1 published · wiseline round {report['round_id']}"
    assert re.findall(r"<h1>(.*?)</h1>", seen.dom) == ["Release 1 published"]
    for name in ("reliability", "generalization", "locality"):
        row = re.search(rf"<tr><th[^>]*>{name.capitalize()}<.*?</tr>", seen.dom)
        assert row and f">{report['measured'][name]:.3f} " in row[0], (name, row and row[0])
    plots = re.findall(r'<svg role="img".*?<title[^>]*>(.*?)</title>', seen.dom)
    assert plots == ["Loss per shard", "Routing score in and out of scope"]
    assert escape(HOSTILE, quote=False) in seen.dom, "the failed paraphrases are not on the page"
    assert not re.search(r"<(script|img)\b", seen.dom)
    assert size(seen.screenshot) == (1200, HEIGHT)
    assert shades(seen.screenshot) > 50


@pytest.mark.parametrize("width", [1200, 500])
def test_plots_and_text_fit_the_window(chromium: str, report_page: Path, tmp_path: Path, width: int) -> None:
    """Measured in a copy that may run one script, ours."""
    html = report_page.read_text(encoding="utf-8")
    policy = re.search(r"<meta http-equiv=.Content-Security-Policy.*?>", html)
    assert policy, "the page has no content security policy"
    page = tmp_path / "measured.html"
    page.write_text(html.replace(policy[0], "").replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    measured = json.loads(visit(chromium, page, tmp_path, width=width).title)
    assert measured["window"] == width
    assert measured["page"] <= width, "the page must be scrolled sideways"
    assert len(measured["plots"]) == 2
    assert all(300 < plot["width"] <= width and plot["height"] > 150 for plot in measured["plots"]), measured["plots"]
    assert len(measured["lines"]) == 2 and min(measured["lines"]) > 20, measured["lines"]
    assert sum(bar["width"] > 0 and bar["height"] > 0 for bar in measured["bars"]) >= 2, measured["bars"]


def test_the_report_of_a_missed_gate_says_so_in_the_browser(chromium: str, report_page: Path, tmp_path: Path) -> None:
    report = json.loads(report_page.with_name("report.json").read_text(encoding="utf-8"))
    assert report["measured"]["generalization"] < 1
    missed = {"outcome": "gate failed", "missed": [], "thresholds": report["thresholds"] | {"generalization": 1}}
    page = tmp_path / "report.html"
    page.write_text(render_html(report | missed), encoding="utf-8")
    seen = visit(chromium, page, tmp_path)
    assert seen.console == []
    assert re.findall(r"<h1>(.*?)</h1>", seen.dom) == ["Gate failed, nothing published"]
    assert f"Generalization {report['measured']['generalization']:.3f} is below the threshold 1." in seen.dom


def size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def shades(png: bytes) -> int:
    """Different bytes in the picture's data: few in an empty picture, many where text is drawn."""
    data, at = b"", 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    return len(set(zlib.decompress(data)))
