import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.serving.api_errors import ApiError
from pipeline.serving.key_limits import KeyLimits, TokenBucket
from tests.unit.serving.test_access import a_key


@given(
    size=st.integers(1, 20),
    pauses=st.lists(st.floats(0, 30, allow_nan=False), max_size=60),
)
def test_no_minute_sees_more_than_twice_the_size_and_waiting_as_told_is_enough(size: int, pauses: list[float]) -> None:
    bucket = TokenBucket(size, size, 0.0)
    now, passed = 0.0, []
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        if wait:
            assert wait <= 60 / size + 1e-6
            now += wait + 1e-6
            assert bucket.take(now) == 0
        passed.append(now)
    for start in passed:
        assert sum(start <= moment < start + 60 for moment in passed) <= 2 * size


def test_a_key_may_run_so_many_requests_at_a_time() -> None:
    limits, key, other = KeyLimits(), a_key("a", concurrent=2), a_key("b", concurrent=1)
    with limits.running(key), limits.running(other):
        with limits.running(key):
            with pytest.raises(ApiError) as refused, limits.running(key):
                pass
            assert (refused.value.status, refused.value.retry_after) == (429, 1)
        with limits.running(key):
            pass


def test_a_request_that_fails_gives_its_place_back() -> None:
    limits, key = KeyLimits(), a_key("a", concurrent=1)
    for _ in range(3):
        with pytest.raises(RuntimeError), limits.running(key):
            raise RuntimeError


def test_a_key_may_send_so_many_requests_a_minute() -> None:
    now = [0.0]
    limits, key = KeyLimits(now=lambda: now[0]), a_key("a", per_minute=2)
    for _ in range(2):
        with limits.running(key):
            pass
    with pytest.raises(ApiError) as refused, limits.running(key):
        pass
    assert (refused.value.code, refused.value.headers) == ("rate_limit_exceeded", {"retry-after": "30"})
    now[0] = 30.0
    with limits.running(key):
        pass


def test_a_request_refused_for_concurrency_costs_no_token() -> None:
    limits, key = KeyLimits(now=lambda: 0.0), a_key("a", concurrent=1, per_minute=2)
    with limits.running(key):
        for _ in range(5):
            with pytest.raises(ApiError, match="running"), limits.running(key):
                pass
    with limits.running(key):
        pass
