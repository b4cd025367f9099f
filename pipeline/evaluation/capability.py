"""Capability retention: lm-evaluation-harness tasks, asked of the unedited model and of the release.

The standard set (HellaSwag, ARC, MMLU, …) comes from the hub; a task may also be given as a config of the harness, with
a data set on this disk. Both models are asked through the same adapter, so they differ in nothing but the release.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, WiselineError
from pipeline.models.base_model import BaseModel
from pipeline.models.loaded_release import LoadedRelease

STANDARD_TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "mmlu", "wikitext")

Scores = dict[str, dict[str, float]]
"""Task -> metric -> value, named as the harness names them; a filter other than none follows after a comma."""


@dataclass(frozen=True)
class Capability:
    unedited: Scores
    edited: Scores
    sequences: int  # asked of the release; a question of four choices is four
    routed: int  # of them, those a side memory answered


def capability(
    base: BaseModel,
    release: LoadedRelease,
    tasks: Sequence[str | Mapping[str, Any]] = STANDARD_TASKS,
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 16,
) -> Capability:
    """Run `tasks` (names, or configs of the harness). `shots`: few-shot examples, by default each task's own; `limit`:
    at most so many questions per task.

    Raises ConfigError when the harness is not installed, and in its own words when it cannot run a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from pipeline.evaluation.lm_eval_adapter import RoutedLM
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Capability tasks need lm-evaluation-harness ({error.name} is missing); pip install 'wiseline[lm-eval]'."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # Its own tasks are thousands of files; they are read only where one is asked for by its name.
    manager = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    unknown = [task for task in tasks if isinstance(task, str) and task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"lm-evaluation-harness has no task {unknown[0]!r}; `lm_eval ls tasks` lists what it has.")

    def run(model: RoutedLM) -> Scores:
        try:
            results = simple_evaluate(
                model=model,
                tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=manager,
            )
        except WiselineError:
            raise
        except Exception as error:  # a task is a program of its user's: what it raises can be anything
            said = " ".join(str(error).split()) or "it gives no reason"
            raise ConfigError(
                f"A task cannot be run ({type(error).__name__}: {said}); check it and its data."
            ) from error
        return {task: _numbers(values) for task, values in results["results"].items()}

    unedited = run(RoutedLM(base, None, batch=batch))
    edited = run(model := RoutedLM(base, release, batch=batch))
    return Capability(
        unedited=unedited,
        edited=edited,
        sequences=len(model.decisions),
        routed=sum(decision.memory is not None for decision in model.decisions),
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    }
