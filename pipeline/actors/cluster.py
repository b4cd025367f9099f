"""The Ray that jobs run on: a cluster that is named, else a local one that lives as long as the command."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import psutil
import ray
from ray._private import worker as driver

from pipeline.config import ResourcesSection
from pipeline.errors import ConfigError, WiselineError
from pipeline.logs import logger

log = logger(__name__)

Node = TypeVar("Node")

_print_to_stdstream = getattr(driver, "print_to_stdstream", None)  # of Ray 2.60; it has no public name
KNOCK_SECONDS = 10
STARTS, KILL_SECONDS = 3, 10


def connect(resources: ResourcesSection, *, logs: Literal["text", "json"] = "text") -> None:
    """Connect this process to Ray; nothing happens where it already is. With `logs` json this process and all workers
    log as Ray's JSON does; workers to their files in Ray's session folder.

    `resources.ray_address`, else RAY_ADDRESS, names a running cluster; without either a local Ray is started. Raises
    ConfigError when nothing answers at the address, and WiselineError when no local Ray comes up.
    """
    if ray.is_initialized():
        return
    address = resources.ray_address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if logs == "json":
        quiet["logging_config"] = ray.LoggingConfig(encoding="JSON")
    if address:
        _keep_stdout()
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"No Ray cluster answers at {address} ({_first_line(error)}); "
                "check resources.ray_address and RAY_ADDRESS."
            ) from error
        return
    # Since 2.60 ray.init turns token authentication on and writes a token into the home folder; a Ray on loopback that
    # ends with the command needs neither. Whoever set the variable decided otherwise.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Serve's proxy, a worker of this Ray, takes its middleware from the environment alone.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "pipeline.serving.carry_on.in_serves_proxy")
    start_local(**quiet)


def start_local(**settings: Any) -> None:
    """A Ray of this process alone; `settings` are those of `ray.init`. Raises WiselineError where none comes up."""
    _keep_stdout()
    # "local" never joins a Ray that somebody else started on this machine.
    started_in_time(lambda: ray.init(address="local", include_dashboard=False, **settings))


def started_in_time(start: Callable[[], Node]) -> Node:
    """What `start` returns: a node of Ray as processes of this one. Raises WiselineError where it never comes up.

    Ray 2.60 gives a node up whose agents need more than 15 seconds to start, which on a busy machine they do
    (ray-project/ray#65983); the next attempt finds their files read already."""
    late: Exception | None = None
    for attempt in range(STARTS):
        before = psutil.Process().children(recursive=True)
        try:
            return start()
        except Exception as error:  # Ray has no type for it
            if "timed out during startup" not in str(error):
                raise
            late = error
            log.warning("Ray did not start in time, attempt %d of %d.", attempt + 1, STARTS)
            _end([one for one in psutil.Process().children(recursive=True) if one not in before])
    raise WiselineError(
        f"Ray did not start on this machine in {STARTS} attempts; run the same command again when less else runs here, "
        "or name a running cluster in resources.ray_address."
    ) from late


def _end(processes: list[psutil.Process]) -> None:
    """Those of a node that did not come up: Ray itself would leave them beside the next one."""
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(processes, timeout=KILL_SECONDS)


def _keep_stdout() -> None:
    """Standard output is the command's own, which scripts read. What Ray tells by itself (a lost node, a worker that
    died) it would print there, `log_to_driver` or not, and repetitions at its end: it goes to standard error. Calls
    that it makes again are not told: most are those of workers that we have just ended."""
    os.environ.setdefault("RAY_enable_output_error_log_if_still_retry", "0")
    driver.print_to_stdstream = _on_stderr


def _on_stderr(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
    assert _print_to_stdstream  # it is what this one replaced
    _print_to_stdstream(data | {"is_err": True}, *arguments, **options)


def check_room(resources: ResourcesSection) -> None:
    """Raises ConfigError when an actor asks for more than this one machine has; Ray would wait for ever. A cluster is
    not asked: a node with room may still join it."""
    if len(ray.nodes()) > 1 or resources.ray_address or os.environ.get("RAY_ADDRESS"):
        return
    for name in ("cpus_per_trainer", "gpus_per_trainer", "gpus_per_model"):
        wanted = getattr(resources, name)
        there = ray.cluster_resources().get(name[:3].upper(), 0)
        if wanted != "auto" and wanted > there:
            raise ConfigError(
                f"resources.{name} is {wanted:g} and this machine has {there:g}; lower it, or "
                "name a larger cluster in resources.ray_address."
            )


def _knock(address: str) -> None:
    """Raises OSError when nobody listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
