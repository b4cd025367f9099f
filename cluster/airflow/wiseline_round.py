"""The nightly round as an Airflow DAG: every step is a command, and every shard a task of its own.

Copy it into the DAGs' folder. Workers need the wiseline environment (not Airflow's own), the config file, and the
store's AWS_* variables; WISELINE and WISELINE_CONFIG say where. Each task starts a Ray of its own where it runs; with
RAY_ADDRESS set all of them work on that cluster. Every step may be repeated, so tasks are simply retried or cleared.
"""

import json
import os
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG, task

WISELINE = os.environ.get("WISELINE", "/opt/wiseline/.venv/bin/wiseline")
CONFIG = os.environ.get("WISELINE_CONFIG", "/etc/wiseline/ray_config.yaml")


def command(step: str) -> str:
    return f"{WISELINE} round --config {CONFIG} --step {step}"


with DAG(
    dag_id="wiseline_round",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,  # a round answers for all that was said before it
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10), "execution_timeout": timedelta(hours=6)},
):
    plan = BashOperator(task_id="plan", bash_command=command("plan"), output_processor=json.loads)

    @task
    def shards(planned: dict[str, Any]) -> list[dict[str, str]]:
        """A task each; none where all are trained."""
        return [{"ROUND": planned["round"], "SHARD": str(number)} for number in planned["shards"]]

    train = BashOperator.partial(
        task_id="train",
        bash_command=f"{command('train')} --round $ROUND --shard $SHARD",
        append_env=True,
    ).expand(env=shards(plan.output))

    last = train
    for step in ("merge", "evaluate", "publish"):
        following = BashOperator(
            task_id=step,
            bash_command=f"{command(step)} --round $ROUND",
            env={"ROUND": "{{ ti.xcom_pull(task_ids='plan')['round'] }}"},
            append_env=True,
            trigger_rule="none_failed",  # where no shard is to be trained, `train` is skipped
        )
        last >> following
        last = following
