"""`wiseline submit`: a command of wiseline as a job on a running Ray cluster, through Ray's Jobs API."""

import asyncio
import hashlib
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError, EndpointError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

DASHBOARD = "http://127.0.0.1:8265"
# Of the working folder; what .gitignore names stays out by itself.
LEFT_OUT = [".git", ".venv", ".wiseline"]
POLL_SECONDS = 1.0
TAKEN = "already exists"  # what Ray says of an id
STARTING_SECONDS = 120.0


def submit_command(
    context: typer.Context,
    command: Annotated[
        Literal["round", "evaluate", "ingest"], typer.Argument(help="What runs there.", show_default=False)
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGUMENTS]...", help="What that command takes.", show_default=False)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help=f"Ray's dashboard (default: RAY_API_SERVER_ADDRESS, else {DASHBOARD}).", show_default=False),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="Folder that is sent along; the command runs in the copy.", show_default="this one")
    ] = Path(),
    cpus: Annotated[float, typer.Option(min=0, help="CPUs kept for the command itself, not its workers.")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs kept for it.")] = 0,
    memory_gib: Annotated[float, typer.Option(min=0, help="Memory kept for it.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Also where this store had its round of the day.")] = False,
    wait: Annotated[bool, typer.Option(help="Follow the logs until it ends, and end as it does.")] = True,
) -> None:
    """Run round, evaluate or ingest on a running Ray cluster.

    Options of submit come before the command, the command's own behind it:
    wiseline submit --address http://head:8265 round --set round.min_locality=0.95
    A store has one round a day (in UTC): submitted again, it is followed, or tried again where it failed.
    """
    if not working_dir.is_dir():
        raise ConfigError(f"There is no folder {working_dir} to send along; name another --working-dir.")
    os.chdir(working_dir)  # relative paths mean here what they will mean in the copy
    settings = _config_of(context, command, arguments or [])
    entrypoint = shlex.join(
        # With -m the copy's own wiseline comes first, where the folder has one; else the cluster's. Workers and the
        # store are the cluster's to find: no address of ours, no path that began in this folder.
        ["python", "-m", "jobs.cli", command, *(arguments or []), "--set", "resources.ray_address=null"]
        + ([] if command == "evaluate" else ["--set", f"store.uri={settings.store.uri}"])
    )
    client = connect(address)
    name = submission_id(command, settings, now=datetime.now(UTC), again=again)
    with said_plainly(f"{command} could not be submitted"):
        name, new = (submit_once_a_day if command == "round" and not again else submit)(
            client,
            name,
            entrypoint=entrypoint,
            runtime_env={"working_dir": ".", "excludes": LEFT_OUT},
            metadata={"wiseline": command, "store": settings.store.uri, "submitted_by": os.environ.get("USER", "")},
            entrypoint_num_cpus=cpus,
            entrypoint_num_gpus=gpus,
            entrypoint_memory=int(memory_gib * 2**30),
        )
    said = "Submitted as {}" if new else "This store has its round of today as {}; --again runs another."
    typer.echo(said.format(name), err=True)
    if wait:
        raise typer.Exit(follow(client, name))


def submit_once_a_day(client: "JobSubmissionClient", name: str, **job: Any) -> tuple[str, bool]:
    """The id of the day's job, and whether it is new: it is not where one runs or has succeeded. After one that failed
    or was stopped comes another, `name`-2 and so on."""
    attempt, tried = 1, name
    while True:
        try:
            return submit(client, tried, **job)
        except RuntimeError as error:
            if TAKEN not in str(error):
                raise
        if client.get_job_info(tried).status.value not in ("FAILED", "STOPPED"):
            return tried, False
        attempt += 1
        tried = f"{name}-{attempt}"


def submit(client: "JobSubmissionClient", name: str, **job: Any) -> tuple[str, bool]:
    """A head that has just started has its job server before it has an agent to run jobs: that is waited for."""
    ends = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            client.submit_job(submission_id=name, **job)
            return name, True
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > ends:
                raise
        time.sleep(POLL_SECONDS)


def submission_id(command: str, config: Config, *, now: datetime, again: bool) -> str:
    """Ray takes an id once. A round's is the day's and the store's, so a second scheduler or host of the same night
    gets the first one's job. Other commands may run as often as once a second."""
    store = hashlib.sha256(f"{config.store.s3_endpoint_url} {config.store.uri}".encode()).hexdigest()[:8]
    moment = f"{now:%Y-%m-%d}" if command == "round" and not again else f"{now:%Y-%m-%d-%H%M%S}"
    return f"wiseline-{command}-{store}-{moment}"


def connect(address: str | None) -> "JobSubmissionClient":
    """Raises EndpointError when no job server answers there, or it does not let us in."""
    from ray.job_submission import JobSubmissionClient

    for talker in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(talker).setLevel(logging.WARNING)
    if address is not None:  # Ray would prefer the variables
        for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(variable, None)
    chosen = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DASHBOARD
    if not chosen.startswith(("http://", "https://")):
        raise ConfigError(f"{chosen} is not the address of a dashboard; it begins with http:// (usually port 8265).")
    with said_plainly(f"No job server of Ray answers at {chosen}"):
        return JobSubmissionClient(chosen)


def follow(client: "JobSubmissionClient", name: str) -> int:
    """Prints the job's output as it comes; returns its exit status, or 1 where it never had one."""
    try:
        with said_plainly(f"{name} cannot be followed any more; it goes on by itself"):
            asyncio.run(_print_logs(client, name))
            while not (job := client.get_job_info(name)).status.is_terminal():
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        typer.echo(f"\n{name} goes on; `ray job stop {name}` ends it.", err=True)
        raise
    return _ended(job, name)


async def _print_logs(client: "JobSubmissionClient", name: str) -> None:
    async for lines in client.tail_job_logs(name):
        typer.echo(lines, nl=False)


def _ended(job: "JobDetails", name: str) -> int:
    if job.status.value == "SUCCEEDED":
        return 0
    if job.driver_exit_code is None:  # it never ran, or was stopped
        typer.echo(f"{name}: {job.status.value}: {_reason(job.message or '')}", err=True)
    return job.driver_exit_code or 1


@contextmanager
def said_plainly(what: str) -> Iterator[None]:
    """What the Jobs API raises, as one sentence."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise EndpointError(
            f"{what}: the cluster asks for its token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token."
        ) from error
    except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise EndpointError(f"{what} ({type(error).__name__}); check --address and that the dashboard runs.") from error
    except (RuntimeError, ValueError) as error:
        raise EndpointError(f"{what}: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    if TAKEN in text:
        return "one was submitted within the same second; submit it again."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][:500]


def _config_of(context: typer.Context, command: str, arguments: Sequence[str]) -> Config:
    """The command line is read here as it will be read there, so that a mistake is known before anything is sent."""
    group: Any = context.find_root().command
    parsed: dict[str, Any] = group.commands[command].make_context(command, list(arguments)).params
    return load_config(parsed["config"], overrides=parsed["set_"] or ())
