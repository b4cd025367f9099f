"""The stores that one behaviour suite runs over: a folder and a simulated S3. The real S3 is in tests/integration."""

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from pipeline.storage.object_store import ObjectStore
from pipeline.storage.s3_bucket import connect_s3

BUCKET = "contract"


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """moto looks whether an object exists and then stores it; one request at a time makes that one step, as on S3."""
    simulation, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        with turn:
            return list(simulation(environ, start_response))

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()


@pytest.fixture
def moto_store(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "contract")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "contract")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3 = connect_s3(moto_endpoint)
    if not s3.exists(BUCKET):
        s3.mkdir(BUCKET)
    return ObjectStore(f"s3://{BUCKET}/{uuid.uuid4().hex}", s3_endpoint_url=moto_endpoint)


@pytest.fixture(params=["folder", "moto"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "folder":
        return ObjectStore(str(tmp_path / "store"))
    simulated: ObjectStore = request.getfixturevalue("moto_store")
    return simulated
