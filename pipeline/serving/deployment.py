"""The endpoint as a Ray Serve deployment: one replica holds one model, one engine thread and one follower."""

import logging
import time

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from pipeline.config import Config
from pipeline.errors import EndpointError, ModelChanged
from pipeline.models.base_model import load_base_model
from pipeline.models.side_memories import MemoryCache
from pipeline.serving.answers import number
from pipeline.serving.app import build_app
from pipeline.serving.drain import Drain
from pipeline.serving.engine import Engine
from pipeline.serving.release_follower import OTHERS_ALONE, UNREADABLE, ReleaseFollower
from pipeline.serving.standing import Standing
from pipeline.storage.object_store import open_store
from pipeline.traces import trace_to

APP_NAME = "wiseline"
# Room beside the answers themselves for health checks, model lists and the requests that are told to come back later.
SPARE_REQUESTS = 64
# For an idle replica to end after its last answer.
CLOSING_SECONDS = 20
# How soon a replica that died is noticed, and replaced.
HEALTH_CHECK_SECONDS = 2
STORE_PATIENCE = 60  # seconds
# A model that does not load will not load the twentieth time (Serve's default) either.
CONSTRUCTOR_RETRIES = 1


@serve.ingress()
class Endpoint:
    """Loads the base model before it counts as ready; raises (and Serve retries) when the model cannot be loaded."""

    def __init__(self, config: Config) -> None:
        # What engine and follower say belongs into the replica's log, beside what Serve says.
        logging.getLogger("pipeline").handlers = logging.getLogger("ray.serve").handlers
        logging.getLogger("pipeline").setLevel(logging.INFO)
        trace_to(config.observe.traces)
        base = load_base_model(config.model)
        self._config = config
        self._engine = Engine(base, config.serve)
        store = open_store(config.store)
        self._follower = ReleaseFollower(
            store,
            base,
            self._engine.swap,
            poll_seconds=config.serve.poll_seconds,
            memories=MemoryCache(base, device_gib=config.serve.device_memory_gib),
        )
        self._first_look()
        if self._follower.state.error == OTHERS_ALONE:
            raise ModelChanged(f"{config.model.path} would answer without any edit. {OTHERS_ALONE}")
        self._drain = Drain()
        Standing(store, self._engine).start()

    def _first_look(self) -> None:
        """A replica that starts while the store is silent would answer without any edit."""
        until = time.monotonic() + STORE_PATIENCE
        self._follower.follow()
        while (error := self._follower.state.error or "").startswith(UNREADABLE):
            if time.monotonic() >= until:
                raise EndpointError(f"{error} A replica starts when it knows what to answer.")
            time.sleep(1)
            self._follower.follow()

    def __serve_build_asgi_app__(self) -> FastAPI:
        replica = serve.get_replica_context().replica_id.unique_id
        return build_app(self._config, self._engine, self._follower, drain=self._drain, replica=replica)

    async def drain(self) -> bool:
        """Refuse new requests and wait for those that have begun; False when `serve.drain_seconds` were not enough."""
        return await self._drain.finish(seconds=self._config.serve.drain_seconds)

    def release(self) -> int:
        """The number of the release in use; for `broadcast`, which asks every replica."""
        return number(self._engine.release)

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has died; a follower in trouble keeps its release and stays."""
        if not self._engine.alive:
            raise EndpointError("The engine thread of this replica has stopped.")


def application(config: Config, *, gpus_per_replica: float) -> Application:
    """What `serve.run` takes. The engine's own bounded queue refuses first (429), so Serve's queue never fills."""
    section = config.serve
    deployment = serve.deployment(
        Endpoint,
        name=APP_NAME,
        num_replicas=section.replicas,
        max_ongoing_requests=section.max_queued_requests + section.max_batch_requests + SPARE_REQUESTS,
        max_constructor_retry_count=CONSTRUCTOR_RETRIES,
        max_surge_percent=100,  # a deployment in place of this one, of another base model say, comes up beside it first
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=section.drain_seconds + CLOSING_SECONDS,
        logging_config={"encoding": "JSON"} if config.observe.logs == "json" else None,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus_per_replica},
    )
    return deployment.bind(config)
