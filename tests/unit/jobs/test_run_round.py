"""What `wiseline round` says at the end; the round itself is a stand-in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.run_round import SHOWN_FAILURES, round_command
from pipeline.config import Config
from pipeline.errors import GateFailed
from pipeline.round_diary import Event, PhaseStarted
from pipeline.rounds import RoundResult
from pipeline.storage.releases import ObjectRef, Release

RELEASE = Release(
    number=4,
    parent=3,
    round_id="3f9a",
    log_version=7,
    model_fingerprint="9f",
    layer=5,
    memories=(),
    router=ObjectRef(path="router", sha256=""),
    bank=ObjectRef(path="bank", sha256=""),
    edits=25,
    scores={"reliability": 0.99, "locality_same_subject": 0.94},
)

EndRound = Callable[[RoundResult | Exception], Result]


@pytest.fixture
def end_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EndRound:
    """Run the command with a round that ends like this, on a store in `tmp_path`."""

    def end(outcome: RoundResult | Exception) -> Result:
        def run_round(config: Config, *, observe: Callable[[Event], None]) -> RoundResult:
            observe(PhaseStarted("plan", "reading the edit log"))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr("pipeline.rounds.run_round", run_round)
        app = typer.Typer()
        app.command()(round_command)
        return CliRunner().invoke(app, ["--set", f"store.uri={tmp_path}", "--json"])

    return end


def test_a_published_round_prints_scores_and_where_the_report_is(end_round: EndRound, tmp_path: Path) -> None:
    report = {"shards": [{"reused": True}, {"reused": False}, {"reused": False}]}
    result = end_round(RoundResult(RELEASE, published=True, report=report, report_path="rounds/3f9a/report.html"))
    assert result.exit_code == 0
    *said, last = result.stdout.splitlines()
    assert any(line.split() == ["locality", "same", "subject", "0.940"] for line in said)
    assert f"Report: {tmp_path}/rounds/3f9a/report.html" in said
    printed = json.loads(last)
    assert printed.pop("seconds") >= 0
    assert printed == {
        "round_id": "3f9a",
        "release": 4,
        "published": True,
        "too_long": 0,
        "scores": RELEASE.scores,
        "shards_trained": 2,
        "shards_reused": 1,
        "report": f"{tmp_path}/rounds/3f9a/report.html",
    }


def test_a_round_with_nothing_to_do_names_the_release_that_stands(
    end_round: EndRound,
) -> None:
    result = end_round(RoundResult(RELEASE, published=False, report={}, report_path=None))
    said, last = result.stdout.splitlines()
    assert said == "Nothing changed since release 4."
    assert json.loads(last)["published"] is False
    assert json.loads(last)["report"] is None


def test_a_failed_gate_prints_the_first_failures_and_goes_on_as_an_error(
    end_round: EndRound,
) -> None:
    failures = tuple(f"reliability: '[red]prompt {index}'" for index in range(SHOWN_FAILURES + 5))
    failed = GateFailed("The candidate was not published.", failures)
    result = end_round(failed)
    assert result.exception is failed
    assert [line.strip() for line in result.stdout.splitlines()] == [
        *failures[:SHOWN_FAILURES],
        "and 5 more, see the report",
    ]
    assert result.stderr.splitlines()[-1].endswith("stopped")
