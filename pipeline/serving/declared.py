"""The endpoint as Serve's own config files name it (`import_path` of a RayService): what `wiseline serve`
starts, declared."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.serving.access import refuse_open_door
from pipeline.serving.deployment import application


class EndpointArguments(BaseModel):
    """`args` of the application. `set`: overrides of the config file, `section.key=value`."""

    model_config = ConfigDict(extra="forbid")

    config: Path
    set: tuple[str, ...] = ()


def endpoint(arguments: EndpointArguments) -> Application:
    """The application, with as many replicas as Serve's config says, else `serve.replicas`.

    Serve listens where its own config says, which this cannot see: keys are asked for unless the section's host is
    loopback. Raises ConfigError otherwise, and where `serve.gpus_per_replica` is left to what the cluster has: one that
    scales from nothing has no GPU yet.
    """
    config = load_config(arguments.config, overrides=arguments.set)
    refuse_open_door(config.serve, host=config.serve.host)
    gpus = config.serve.gpus_per_replica
    if gpus == "auto":
        raise ConfigError("Say how many GPUs a replica takes: serve.gpus_per_replica is a number here, 0 for none.")
    return application(config, gpus_per_replica=gpus)
