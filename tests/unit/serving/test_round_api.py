"""`GET /v1/round`: what the store knows, told to many who ask at once."""

from pipeline.serving.round_api import LOOK_EVERY, Remembered, RoundNow
from pipeline.training.round_state import write_plan
from pipeline.training.shard_files import FILES, shard_path
from tests.unit.serving.conftest import Endpoint
from tests.unit.training.test_planning import Edit, plan


def test_no_round_has_run(endpoint: Endpoint) -> None:
    assert endpoint.client.get("/v1/round").json() == {"object": "wiseline.round", "running": None, "last": None}


def test_the_running_round_and_its_shards(endpoint: Endpoint) -> None:
    planned = plan([Edit(prompt=f"question {index}", target="a secret") for index in range(3)])
    write_plan(endpoint.store, planned)
    shards = planned.memories[0].shards
    for name in FILES:
        endpoint.store.put(shard_path(shards[0].digest, name), b"x")
    response = endpoint.client.get("/v1/round")
    running = response.json()["running"]
    assert running["round_id"] == planned.round_id
    assert running["shards"] == [
        {"memory": 0, "shard": index, "edits": 1, "state": "waiting" if index else "trained"} for index in range(3)
    ]
    assert running["began"] <= running["news"]
    assert "secret" not in response.text


def test_a_damaged_plan_is_a_sentence(endpoint: Endpoint) -> None:
    endpoint.store.put("rounds/abc/plan.json", b"{")
    response = endpoint.client.get("/v1/round")
    assert response.status_code == 503
    assert "rounds/abc/plan.json" in response.json()["error"]["message"]


def test_the_store_is_looked_at_once_for_all_who_ask() -> None:
    looks: list[int] = []

    def look() -> RoundNow:
        looks.append(1)
        if len(looks) == 1:
            raise OSError
        return RoundNow(running=None, last=None)

    remembered = Remembered(look, seconds=3600)
    for _ in range(5):
        try:
            assert remembered.get().running is None
        except OSError:
            assert len(looks) == 1, "an error is not remembered"
    assert len(looks) == 2
    assert Remembered(look, seconds=0).get() and len(looks) == 3
    assert LOOK_EVERY < 5
