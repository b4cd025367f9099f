"""The contract suite over a real S3 server; `store` comes from the conftest here."""

from tests.contract.test_object_store import *  # noqa: F403
