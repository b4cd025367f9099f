"""The real S3 server that integration tests run on; skipped where its packages are not there, but never in CI."""

import os
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from pipeline.storage.object_store import ObjectStore
from pipeline.storage.s3_bucket import connect_s3
from tests.integration import radosgw

VARIABLES = {
    "AWS_ACCESS_KEY_ID": radosgw.ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": radosgw.SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


class S3Server(NamedTuple):
    endpoint_url: str
    bucket: str


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One radosgw and one bucket for the session; the AWS_* variables name its keys as long as it runs."""
    ceph = radosgw.Ceph.found()
    if ceph is None:
        missing = "no radosgw: run tests/integration/install_radosgw.sh"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    with (
        radosgw.running(tmp_path_factory.mktemp("radosgw"), ceph) as endpoint_url,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        connect_s3(endpoint_url).mkdir("wiseline")
        yield S3Server(endpoint_url, "wiseline")


@pytest.fixture
def store(s3_server: S3Server) -> ObjectStore:
    return ObjectStore(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}", s3_endpoint_url=s3_server.endpoint_url)
