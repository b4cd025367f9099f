"""`wiseline capability`: what a release did to the model elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import load_config
from pipeline.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from pipeline.evaluation.capability import Capability


def capability_command(
    text: Annotated[
        Path | None, typer.Option(help="File of ordinary text, a text per line.", show_default=False)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of lm-evaluation-harness, `standard` for the usual set, or a .yaml file; may be repeated.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most N questions per task.", min=1, show_default="all")] = None,
    shots: Annotated[int | None, typer.Option(help="Few-shot examples.", min=0, show_default="each task's own")] = None,
    release: Annotated[int | None, typer.Option(help="Number of the release.", min=1, show_default="newest")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Measure what a release did to the model elsewhere.

    On ordinary text: the share of tokens for which it chooses another one than the unedited model. On tasks of
    lm-evaluation-harness: the scores of both.
    """
    if text is None and not task:
        raise ConfigError("There is nothing to measure on; give --text FILE, --task NAME, or both.")
    texts, tasks = _texts(text) if text else [], [wanted for name in task or () for wanted in _task(name)]
    settings = load_config(config, overrides=set_ or ())

    from pipeline.evaluation.capability import capability
    from pipeline.evaluation.ordinary_text import changed_argmax
    from pipeline.models.base_model import identify, load_base_model
    from pipeline.models.loaded_release import load_release, newest_for
    from pipeline.storage.object_store import open_store
    from pipeline.storage.releases import read_release

    store = open_store(settings.store)
    published = newest_for(store, identify(settings.model)) if release is None else read_release(store, release)
    if published is None:
        raise NotFound(f"Nothing is published in {store.uri} yet; run `wiseline ingest` and `wiseline round`.")
    base = load_base_model(settings.model)
    loaded = load_release(store, published, base)
    result: dict[str, Any] = {"release": published.number}
    if texts:
        ordinary = changed_argmax(base, loaded, texts)
        result["text"] = asdict(ordinary) | {
            "routed_share": ordinary.routed_share,
            "changed_share": ordinary.changed_share,
        }
        typer.echo(
            f"Ordinary text: {ordinary.changed:,} of {ordinary.tokens:,} tokens changed; "
            f"a side memory answered {ordinary.routed:,} of {ordinary.texts:,} texts."
        )
    if tasks:
        scores = capability(base, loaded, tasks, shots=shots, limit=limit)
        result["tasks"] = asdict(scores)
        _print_scores(scores)
    if json_line:
        print_json(result)


def _texts(file: Path) -> list[str]:
    try:
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise NotFound(f"{file} cannot be read as text ({reason}); give a UTF-8 file with a text per line.") from None
    if not texts:
        raise NotFound(f"{file} has no text in it; give a file with a text per line.")
    return texts


def _task(name: str) -> Sequence[str | Mapping[str, Any]]:
    from pipeline.evaluation.capability import STANDARD_TASKS

    if name == "standard":
        return STANDARD_TASKS
    if not name.endswith((".yaml", ".yml")):
        return [name]
    try:
        task = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{name} cannot be read as a task ({' '.join(str(error).split())}); give plain YAML."
        ) from None
    if not isinstance(task, dict) or "task" not in task:
        raise ConfigError(f"{name} is no task of lm-evaluation-harness; it is a mapping with a `task` name at least.")
    return [task]


def _print_scores(scores: "Capability") -> None:
    table = Table("task", "metric", "unedited", "edited", box=None, pad_edge=False)
    for task, metrics in scores.unedited.items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4f}", f"{scores.edited[task][metric]:.4f}")
    Console(markup=False).print(table)
    typer.echo(f"A side memory answered {scores.routed:,} of {scores.sequences:,} sequences.")
