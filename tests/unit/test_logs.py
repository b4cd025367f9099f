"""What a log line belongs to, as Ray's own JSON shows it."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray._common.formatters import JSONFormatter

from pipeline.logs import about, ids, logger

log = logger("pipeline.test_logs")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(JSONFormatter())
    handler.setLevel(logging.INFO)
    under = logging.getLogger("pipeline.test_logs")
    under.addHandler(handler)
    under.setLevel(logging.INFO)
    yield handler.stream
    under.removeHandler(handler)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_ids_are_those_of_the_blocks_around(written: io.StringIO) -> None:
    with about(round="r1"):
        with about(shard="s1"):
            log.info("%d steps", 7, extra={"loss": 0.5})
            assert ids() == {"round": "r1", "shard": "s1"}
        log.info("merged")
    log.info("alone")
    first, second, third = lines(written)
    assert (first["message"], first["round"], first["shard"], first["loss"]) == ("7 steps", "r1", "s1", 0.5)
    assert second["round"] == "r1" and "shard" not in second
    assert not {"round", "shard"} & third.keys()


async def test_requests_beside_each_other_keep_their_own(written: io.StringIO) -> None:
    async def answer(name: str) -> None:
        with about(request_id=name):
            await asyncio.sleep(0)
            log.info("%s", name)

    await asyncio.gather(*(answer(str(number)) for number in range(5)))
    assert all(line["request_id"] == line["message"] for line in lines(written))


def test_a_block_that_fails_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), about(round="r1"):
        _ = 1 / 0
    assert ids() == {}
