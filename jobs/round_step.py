"""`wiseline round --step …`: one step of a round, for workflow engines. Each is safe to repeat."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import typer

from jobs.options import print_json
from jobs.round_progress import RoundProgress
from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.rounds import Observe, evaluate_step, merge_step, plan_step, publish_step, train_step

STEPS = ("plan", "train", "merge", "evaluate", "publish")


def take_step(
    settings: Config, step: str | None, round_id: str | None, shards: Sequence[int] | None, *, json_line: bool
) -> None:
    """`plan` prints one line of JSON, the others what they did. Raises ConfigError for options that do not go together,
    and what the step raises."""
    check_options(step, round_id, shards)
    if round_id is None:
        with _shown(settings) as progress:
            planned, numbers, stands = plan_step(settings, observe=progress)
        release = None if stands is None else stands.number
        typer.echo(json.dumps({"round": planned, "shards": numbers, "stands": release}))
        return
    with _shown(settings) as progress:
        match step:
            case "train":
                trained = train_step(settings, round_id, shards, observe=progress)
                said = f"Trained shards: {', '.join(map(str, trained))}" if trained else "These shards are trained."
            case "merge":
                count = merge_step(settings, round_id, observe=progress)
                said = f"Merged memories: {count}" if count else "All memories are merged."
            case "evaluate":
                now = evaluate_step(settings, round_id, observe=progress)
                said = "The candidate passed its gate." if now else "The candidate is evaluated already."
            case _:
                result = publish_step(settings, round_id, observe=progress)
                number = result.release.number
                said = f"Release {number} published." if result.published else f"Release {number} stands."
    typer.echo(said)
    if json_line:
        print_json({"round": round_id, "step": step, "said": said})


def _shown(settings: Config) -> AbstractContextManager[Observe]:
    """What the step does, as lines for people; nothing where the log says it as JSON."""
    return nullcontext(lambda event: None) if settings.observe.logs == "json" else RoundProgress()


def check_options(step: str | None, round_id: str | None, shards: Sequence[int] | None) -> None:
    if step not in STEPS:
        given = "is missing" if step is None else f"{step!r} is unknown"
        raise ConfigError(f"--step {given}; it is one of {', '.join(STEPS)}.")
    if step == "plan" and round_id is not None:
        raise ConfigError("--step plan takes no --round: it names one.")
    if step != "plan" and round_id is None:
        raise ConfigError(f"--step {step} needs --round, the id that `wiseline round --step plan` printed.")
    if shards is not None and step != "train":
        raise ConfigError("--shard goes with --step train alone.")
