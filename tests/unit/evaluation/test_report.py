"""The report page: well formed, harmless whatever an edit says, and complete in every empty case."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.evaluation.report import FOLDED_SHARDS, SHOWN_CHARS, SHOWN_FAILURES, SHOWN_TOO_LONG, render_html
from pipeline.evaluation.report_plots import MOST_LINES, loss_plot, score_plot

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Fails on a tag that is not closed in order; keeps the tags and the text of the body."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def count(self, tag: str, shade: str = "") -> int:
        return sum(name == tag and shade in (attrs.get("class") or "") for name, attrs in self.tags)


def shard(index: int, *, reused: bool = False, last: float = 0.02) -> dict[str, Any]:
    return {
        "memory": index // 4,
        "shard": index % 4,
        "digest": f"{index:024x}",
        "edits": 25,
        "reused": reused,
        "steps": None if reused else 30,
        "holding": None if reused else 124,
        "wordings": None if reused else 125,
        "loss": [] if reused else [(5, 4.0 + index), (20, 0.5), (30, last)],
    }


def failure(
    prompt: str = "The capital of Qern is", *, kind: str = "reliability", answer: str = "Ost"
) -> dict[str, Any]:
    return {"kind": kind, "edit_id": "e1", "prompt": prompt, "expected": "Vell", "answer": answer, "routed": True}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "round_id": "3f9ab20c11de",
        "log_version": 7,
        "parent": 3,
        "model": {"path": "demo/model", "fingerprint": "9f9f9f", "layer": 5},
        "config": Config().model_dump(mode="json"),
        "edits": 100,
        "too_long": [],
        "memories": 1,
        "shards": [shard(index, reused=index == 0) for index in range(4)],
        "seconds": {"plan": 0.5, "train": 60.0, "merge": 2.0, "evaluate": 9.0, "publish": 0.5},
        "routing": {
            "threshold": 1.5,
            "positive_scores": [4.0, 5.0, 6.0, 1.0],
            "negative_scores": {"sibling": [-4.0, -3.0], "swapped": [-1.0, 2.0]},
        },
        "measured": {
            "edits": 100,
            "reliability": 0.99,
            "reliability_chat": 0.91,
            "generalization": 0.93,
            "locality": 0.97,
            "locality_by_kind": {"same_subject": 0.94, "unrelated": 1.0},
            "routed": {"reliability": 0.995, "locality.same_subject": 0.05},
            "failures": (),
        },
        "thresholds": {"reliability": 0.9, "generalization": 0.8, "locality": 0.9},
        "outcome": "published",
        "release": 4,
    }


def test_a_published_round_shows_its_scores_and_its_work(report: dict[str, Any]) -> None:
    report["config"]["training"]["learning_rate"] = 0.0125
    page = Page(render_html(report))
    for said in ("Release 4 published", "It follows release 3", "0.990 met", "0.930 met", "Locality: same subject"):
        assert said in page.text
    assert "missed" not in page.text
    assert re.search(r"Shards trained3\s*Shards reused1", page.text)
    assert re.search(r"Seconds in all72\.0", page.text)
    assert "9f9f9f" in page.text
    assert "learning_rate: 0.0125" in page.text


def test_the_page_needs_no_network_and_no_script(report: dict[str, Any]) -> None:
    html = render_html(report)
    assert not {tag for tag, _ in Page(html).tags} & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", html)


def test_a_failed_gate_says_what_missed_and_what_stands(report: dict[str, Any]) -> None:
    report["measured"]["reliability"] = 0.845
    report["outcome"] = "gate failed"
    report["missed"] = ["reliability 0.845 is below round.min_reliability 0.9", "reliability: 'The capital …'"]
    del report["release"]
    page = Page(render_html(report))
    assert "Gate failed, nothing published" in page.text
    assert "Reliability 0.845 is below the threshold 0.9." in page.text
    assert "Release 3 stands." in page.text
    assert "0.845 missed" in page.text


def test_before_the_first_release_nothing_stands(report: dict[str, Any]) -> None:
    report["parent"] = None
    assert "It is the first release." in render_html(report)
    report["outcome"] = "gate failed"
    assert "There is no release yet." in render_html(report)


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</bdi></td>", "$title"]
)
def test_text_of_others_stays_text(report: dict[str, Any], hostile: str) -> None:
    harmless = Page(
        render_html(report | {"too_long": ["x"], "measured": report["measured"] | {"failures": [failure()]}})
    )
    report["measured"]["failures"] = [
        failure(hostile, kind=f"locality.{hostile}", answer=hostile) | {"expected": hostile}
    ]
    report["measured"]["locality_by_kind"] = {"same_subject": 0.94, hostile: 1.0}
    report["too_long"] = [hostile]
    report["model"]["path"] = hostile
    page = Page(render_html(report))
    assert page.text.count(hostile) >= 6
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]


def test_failures_are_capped_counted_and_cut(report: dict[str, Any]) -> None:
    long = "word " * 1000
    report["measured"]["failures"] = [failure(long, answer=" ")] * (SHOWN_FAILURES + 30)
    report["too_long"] = [long] * (SHOWN_TOO_LONG + 3)
    page = Page(render_html(report))
    assert sum(attrs.get("data-label") == "Prompt" for _, attrs in page.tags) == SHOWN_FAILURES
    assert f"reliability {SHOWN_FAILURES + 30}." in page.text
    assert f"The first {SHOWN_FAILURES} are shown" in page.text
    assert "and 3 more" in page.text
    assert "(nothing)" in page.text
    assert long[: SHOWN_CHARS + 1] not in page.text


def test_what_was_not_asked_is_not_judged(report: dict[str, Any]) -> None:
    report["measured"] |= {"generalization": None, "locality": None, "reliability_chat": None, "locality_by_kind": {}}
    report["routing"]["negative_scores"] = {}
    page = Page(render_html(report))
    assert page.text.count("not asked") == 3
    assert re.findall(r"[\d.]+ met", page.text) == ["0.990 met"]
    assert "There were no prompts out of scope." in page.text
    assert "Every question was answered as it should be." in page.text


def test_a_round_that_reused_every_shard_has_no_loss_plot(report: dict[str, Any]) -> None:
    report["shards"] = [shard(index, reused=True) for index in range(4)]
    page = Page(render_html(report))
    assert "there is no curve" in page.text
    assert page.count("figure") == 1
    assert page.text.count("reused") >= 4


def test_many_shards_fold_their_table(report: dict[str, Any]) -> None:
    def unfolded() -> bool:
        return any(tag == "details" and "open" in attrs for tag, attrs in Page(render_html(report)).tags)

    assert unfolded()
    report["shards"] = [shard(index) for index in range(FOLDED_SHARDS + 1)]
    assert not unfolded()


def test_every_plot_has_a_title_and_says_in_words_what_it_shows(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("role") == "img"]
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert len(plots) == 2
    for plot in plots:
        assert set(str(plot["aria-labelledby"]).split()) <= ids
    assert "out of scope, swapped: 50.0% of 2 above the threshold." in page.text


def test_few_shards_are_lines_and_many_are_a_band() -> None:
    curves = {f"shard {index}": [(5, 4.0), (10 + index, 0.1)] for index in range(200)}
    few = Page(loss_plot(dict(list(curves.items())[:MOST_LINES]), stop_loss=0.05))
    many = Page(loss_plot(curves, stop_loss=0.05))
    assert few.count("polyline") == MOST_LINES
    assert few.count("polygon") == 0
    assert many.count("polyline") == many.count("polygon") == 1
    assert "shard 7" in few.text
    assert "shard 7" not in many.text


def test_the_band_holds_the_middle_of_the_shards() -> None:
    """Nine shards at 1 and one each far above and below: the band is flat at 1."""
    curves = {f"shard {index}": [(1, loss), (10, loss)] for index, loss in enumerate([1e-3, *[1.0] * 19, 1e3])}
    band = re.search(r'<polygon class="band s0" points="([^"]+)"', loss_plot(curves, stop_loss=0.05))
    assert band
    assert len({point.split(",")[1] for point in band[1].split()}) == 1


@pytest.mark.parametrize("curve", [[(1, 0.0)], [(1, 0.05)], [(1, 9e5), (400, 0.0)]])
def test_any_loss_can_be_drawn(curve: list[tuple[int, float]]) -> None:
    drawn = loss_plot({"memory 0, shard 0": curve}, stop_loss=0.05)
    Page(drawn)
    assert not re.search(r"nan|inf\b", drawn)
    heights = [float(height) for height in re.findall(r'cy="([-\d.]+)"', drawn)]
    assert heights
    assert all(0 <= height <= 190 for height in heights)


@pytest.mark.parametrize("scores", [[], [1.5], [1.5, 1.5], [-1e4, 1e4], [-math.inf, 0.0]])
def test_any_score_can_be_drawn(scores: list[float]) -> None:
    drawn = score_plot(scores, {"sibling": scores}, threshold=1.5)
    Page(drawn)
    assert not re.search(r'="[^"]*(nan|inf)\b', drawn)
    assert 'class="threshold"' in drawn


def test_a_larger_score_lies_further_right_and_the_threshold_between() -> None:
    drawn = score_plot([5.0], {"sibling": [-5.0]}, threshold=0.0)
    above, below = (float(x) for x in re.findall(r'<rect class="bar s\d" x="([\d.]+)"', drawn))
    line = re.search(r'class="threshold" x1="([\d.]+)"', drawn)
    assert line
    assert below < float(line[1]) < above


def test_what_polishing_did_is_told_over_all_memories_and_older_reports_have_none(
    report: dict[str, Any],
) -> None:
    memories = [{"memory": 0, "steps": 9, "wordings": 1000, "held_merged": 400, "held_polished": 990}] * 2
    page = render_html(report | {"polish": memories})
    assert "800 of 2,000" in page
    assert "1,980 of 2,000" in page
    assert "as merged" not in render_html({key: value for key, value in report.items() if key != "polish"})
