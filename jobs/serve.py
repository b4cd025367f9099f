"""`wiseline serve`: the endpoint, on the Ray that the config names, until it is told to stop."""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import Config, ServeSection, load_config
from pipeline.errors import EndpointError, WiselineError

PATIENCE = 10  # seconds beside serve.drain_seconds, for the replicas to be asked
PROXY_SECONDS = 120

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus


def serve_command(config: ConfigOption = None, set_: SetOption = None, json_line: JsonOption = False) -> None:
    """Serve the newest release and follow new ones.

    OpenAI-compatible, at serve.host and serve.port. Runs until Ctrl-C or SIGTERM, and then ends
    the endpoint it started. Before there is a release, the base model answers. SIGUSR1 makes it read
    the config again and serve that, another base model for one, without a pause.
    """
    settings = load_config(config, overrides=set_ or ())
    heard: SimpleQueue[int] = SimpleQueue()  # may be written to by a signal handler
    typer.echo(f"Loading {settings.model.path} …")
    signal.signal(signal.SIGUSR1, lambda number, _: heard.put(number))  # also heard while the model loads
    with running_endpoint(settings) as url:
        _when_stopped(lambda number, _: heard.put(number))
        typer.echo(f"Serving {settings.model.path} at {url}/v1; Ctrl-C stops it.")
        typer.echo(f'Ask it: wiseline ask --url {url} "…", or in a browser: {url}/console')
        if json_line:
            print_json({"url": url})
        while heard.get() == signal.SIGUSR1:
            typer.echo("Reading the config again …")
            _when_stopped(signal.default_int_handler)  # a switch that waits for room may wait for ever
            try:
                settings = switch_endpoint(settings, load_config(config, overrides=set_ or ()))
                typer.echo(f"Serving {settings.model.path} now.")
            except WiselineError as error:
                typer.echo(f"{error} {settings.model.path} is served as before.", err=True)
            _when_stopped(lambda number, _: heard.put(number))
        _when_stopped(signal.default_int_handler)  # asked a second time, it does not wait for running answers


def _when_stopped(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


@contextmanager
def running_endpoint(config: Config) -> Iterator[str]:
    """The endpoint's address, once it answers; the endpoint is gone when the block ends, however it ends.

    Raises EndpointError when the port is taken or no replica starts, with the reason in the sentence, and ConfigError
    where other machines could reach an endpoint that asks for no keys.
    """
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    from pipeline.actors.cluster import connect
    from pipeline.actors.live_trainer import stop_live_trainer
    from pipeline.serving.access import refuse_open_door
    from pipeline.serving.deployment import APP_NAME

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    section = config.serve
    refuse_open_door(section, host=section.host)
    ours = not ray.is_initialized()
    alone = ours and not (config.resources.ray_address or os.environ.get("RAY_ADDRESS"))
    known = alone and section.port != 0
    port = free_port(section) if known else section.port  # before Ray: a taken port is told at once
    connect(config.resources, logs=config.observe.logs)
    serve_was_there = not alone and bool(serve.status().proxies)
    try:
        if serve_was_there:  # it listens where it was told to, not where our config says
            refuse_open_door(section, host=_get_global_client().http_config.host or "0.0.0.0")
        else:
            if not known:  # any free one is chosen late, or Ray's own processes may take it
                port = free_port(section)
            listen(section.host, port)
        config = _decided(config)
        try:
            _deploy(config)
            _teach_live(config)
            yield url_of(section, port)
            _drain(section)  # not after an error: it cannot wait
        finally:
            stop_live_trainer()
            serve.delete(APP_NAME)
    finally:
        if not alone and not serve_was_there:  # a Ray of our own takes Serve with it
            serve.shutdown()
        if ours:
            ray.shutdown()


def listen(host: str, port: int) -> None:
    """Starts Serve, and returns when its proxy listens. Raises EndpointError where it never does.

    A proxy that is not up in time Serve kills, which `serve.start` tells as an error; the next one has more time."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.schema import ProxyStatus

    try:
        serve.start(http_options={"host": host, "port": port})
    except TimeoutError:
        pass
    except RayError as error:
        if "killed by `ray.kill`" not in str(error):
            raise EndpointError(f"Ray Serve's proxy does not start: {str(error).strip().splitlines()[-1]}") from error
    until = time.monotonic() + PROXY_SECONDS
    while set(serve.status().proxies.values()) != {ProxyStatus.HEALTHY}:
        if time.monotonic() > until:
            raise EndpointError(
                f"Ray Serve's proxy did not listen at {host}:{port} within {PROXY_SECONDS} seconds; run the same "
                "command again when less else runs here, and see Ray's logs for the reason."
            )
        time.sleep(0.2)


def switch_endpoint(serving: Config, wanted: Config) -> Config:
    """In the block of `running_endpoint`: serve what `wanted` says, in place of `serving`, whose replicas answer until
    the new ones do. It listens where it did. Needs room for a replica beside the others. Returns what is served.

    Raises ConfigError, and EndpointError when no new replica starts: another model needs a round first. What was served
    is then served again.
    """
    from ray.serve.context import _get_global_client

    from pipeline.serving.access import refuse_open_door

    section = wanted.serve.model_copy(update={"host": serving.serve.host, "port": serving.serve.port})
    refuse_open_door(section, host=_get_global_client().http_config.host or "0.0.0.0")
    wanted = _decided(wanted.model_copy(update={"serve": section}))
    try:
        _deploy(wanted)
    except EndpointError:
        _deploy(_decided(serving))
        raise
    _teach_live(wanted)
    return wanted


def _teach_live(config: Config) -> None:
    from pipeline.actors.live_trainer import start_live_trainer, stop_live_trainer

    if config.serve.live_edits:
        start_live_trainer(config)
    else:
        stop_live_trainer()  # one that an endpoint left behind on this cluster


def _decided(config: Config) -> Config:
    """With `serve.live_edits` either true or false. A GPU is not taken for the whole day unless somebody says so."""
    import ray

    wanted = config.serve.live_edits
    if wanted == "auto":
        wanted = config.teaches_live and not ray.cluster_resources().get("GPU")
    return config.model_copy(update={"serve": config.serve.model_copy(update={"live_edits": wanted})})


def _deploy(config: Config) -> None:
    import ray
    from ray import serve

    from pipeline.serving.deployment import APP_NAME, application

    wanted = config.serve.gpus_per_replica
    gpus = wanted if wanted != "auto" else 1.0 if ray.cluster_resources().get("GPU") else 0.0
    try:
        serve.run(application(config, gpus_per_replica=gpus), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise EndpointError(_why_not_started(serve.status(), APP_NAME, error)) from None


def _drain(section: ServeSection) -> None:
    """Every replica ends the answers that have begun; new requests get a 503 instead of a connection that breaks."""
    from ray import serve

    from pipeline.serving.deployment import APP_NAME

    replicas = serve.get_deployment_handle(APP_NAME, APP_NAME)
    try:
        finished = replicas.broadcast("drain").results(timeout_s=section.drain_seconds + PATIENCE)
    except Exception as error:  # a replica that died has no answers left to end
        typer.echo(f"Not every replica could end its answers ({type(error).__name__}).", err=True)
        return
    if not all(finished):
        typer.echo(f"Answers that took longer than {section.drain_seconds:g} s were cut.", err=True)


def url_of(section: ServeSection, port: int) -> str:
    """Where a client on this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(section.host, section.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_port(section: ServeSection) -> int:
    """`serve.port`, or any free one for 0. Raises EndpointError when it is taken, before Ray Serve half starts."""
    try:
        with socket.create_server((section.host, section.port), family=_family(section.host)) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise EndpointError(
            f"Port {section.port} on {section.host} cannot be used ({reason}); stop what listens there or "
            f"choose another port: --set serve.port={section.port + 1}"
        ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _why_not_started(status: "ServeStatus", name: str, error: Exception) -> str:
    """The replica's own sentence out of Serve's report, which is a traceback in text form."""
    messages = [str(error)]
    if name in status.applications:
        messages += [deployment.message for deployment in status.applications[name].deployments.values()]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    reasons = [line.partition(": ")[2] for line in lines if line.startswith("pipeline.errors.")]
    return reasons[-1] if reasons else f"The endpoint did not start: {' '.join(messages[0].split())[:500]}"
