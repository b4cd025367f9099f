"""One tiny model for all serving tests, and the app over it, with real engine, follower and store."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from pipeline.config import Config, load_config
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.serving.app import build_app
from pipeline.serving.engine import Engine
from pipeline.serving.release_follower import ReleaseFollower
from pipeline.storage.object_store import ObjectStore, open_store
from tests.tiny_world import save_model


@dataclass
class Endpoint:
    config: Config
    base: BaseModel
    store: ObjectStore
    engine: Engine
    follower: ReleaseFollower
    client: TestClient


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def base(model_folder: Path) -> BaseModel:
    return load_base_model(load_config(overrides=[f"model.path={model_folder}"]).model)


@pytest.fixture
def start(base: BaseModel, model_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Endpoint]]:
    """Starts an endpoint; keywords are `serve` settings. The follower polls so rarely that tests call `follow()`."""
    with ExitStack() as running:

        def start(**serve: object) -> Endpoint:
            settings = {"poll_seconds": 3600, "host": "testserver", **serve}  # the name that TestClient calls it by
            config = load_config(
                overrides=[
                    f"model.path={model_folder}",
                    f"store.uri={tmp_path / 'store'}",
                    *(f"serve.{key}={value}" for key, value in settings.items()),
                ]
            )
            store = open_store(config.store)
            engine = Engine(base, config.serve)
            follower = ReleaseFollower(store, base, engine.swap, poll_seconds=config.serve.poll_seconds)
            app = build_app(config, engine, follower)
            client = running.enter_context(TestClient(app, raise_server_exceptions=False))
            return Endpoint(config, base, store, engine, follower, client)

        yield start


@pytest.fixture
def endpoint(start: Callable[..., Endpoint]) -> Endpoint:
    return start()


@dataclass
class Gate:
    """Stops the model before its next forward until `open`; `reached` says that a forward is waiting (or failing)."""

    reached: threading.Event
    opened: threading.Event
    failures: list[BaseException]
    forwards: int = 0

    def open(self) -> None:
        self.opened.set()


@pytest.fixture
def gate(base: BaseModel) -> Iterator[Gate]:
    """The real model with a gate before it: closed at first, and raising what `failures` holds, one per forward."""
    gate = Gate(threading.Event(), threading.Event(), [])

    def before_forward(*_: object) -> None:
        gate.forwards += 1
        gate.reached.set()
        assert gate.opened.wait(30)
        if gate.failures:
            raise gate.failures.pop(0)

    hook = base.model.register_forward_pre_hook(before_forward)
    yield gate
    gate.open()
    hook.remove()
