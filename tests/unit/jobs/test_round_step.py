"""What a step says while it runs: lines for people, or the log's alone."""

from pathlib import Path
from typing import Literal

import pytest

from jobs import round_step
from pipeline.config import load_config
from pipeline.round_diary import PhaseStarted
from pipeline.rounds import Observe


@pytest.mark.parametrize("logs", ["text", "json"])
@pytest.mark.parametrize("round_id", [None, "0a"])
def test_where_the_log_is_json_nothing_else_is_drawn(
    logs: Literal["text", "json"],
    round_id: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def step(*_: object, observe: Observe) -> tuple[str, list[int], None]:
        observe(PhaseStarted("plan", "reading the edit log"))
        return "0a", [0], None

    monkeypatch.setattr(round_step, "plan_step", step)
    monkeypatch.setattr(round_step, "merge_step", lambda *_, observe: step(observe=observe)[1][0])
    settings = load_config(overrides=[f"store.uri={tmp_path}", f"observe.logs={logs}"])
    round_step.take_step(settings, "plan" if round_id is None else "merge", round_id, None, json_line=False)
    said = capsys.readouterr()
    assert said.out
    assert ("reading the edit log" in said.err) == (logs == "text")
    assert bool(said.err) == (logs == "text")
