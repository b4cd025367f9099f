"""One local Ray for the session: two CPUs, a home of its own, no token, no dashboard."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.actors.cluster import start_local

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        # Workers import what the tests import, also from a checkout that is not installed.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "pipeline.serving.carry_on.in_serves_proxy")
        start_local(num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()
