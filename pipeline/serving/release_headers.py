"""Which release a request wants to be answered by, and which one did: the x-wiseline headers."""

import asyncio

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.answers import Origin, number
from pipeline.serving.api_errors import RETRY_AFTER, ApiError
from pipeline.serving.carry_on import ID_HEADER, RELEASE_HEADER, RESUME_HEADER
from pipeline.serving.engine import Engine
from pipeline.serving.release_follower import ReleaseFollower

ROUTE_HEADER, REPLICA_HEADER = "x-wiseline-route", "x-wiseline-replica"
MIN_RELEASE_HEADER = "x-wiseline-min-release"
MOST_DIGITS = 18  # Python refuses to read numbers of thousands
LOOK_AGAIN = 0.02  # seconds; the follower swaps from a thread of its own


class ReleaseHeader:
    """ASGI middleware: every response names a release, errors too: that of its answer, or the one in use; and the
    replica, where there may be several."""

    def __init__(self, app: ASGIApp, engine: Engine, replica: str | None = None) -> None:
        self._app, self._engine, self._replica = app, engine, replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault(RELEASE_HEADER, str(number(self._engine.release)))
                if self._replica:
                    headers[REPLICA_HEADER] = self._replica
            await send(message)

        await self._app(scope, receive, named)


def is_routed(http: Request) -> bool:
    """False where the client asks for the unedited model. Raises ApiError (400) for what is no route."""
    route = http.headers.get(ROUTE_HEADER, "auto")
    if route not in ("auto", "off"):
        raise ApiError(400, f"{ROUTE_HEADER} may be 'auto' or 'off', not '{route}'.", param=ROUTE_HEADER)
    return route == "auto"


async def wait_for_release(http: Request, engine: Engine, follower: ReleaseFollower, *, seconds: float) -> None:
    """Returns once the release that the client demands is in use: it then reads what it knows was published. Where that
    one is another base model's, one that has heard as much of the log stands for it: the model was switched.

    Raises ApiError: 400 for what is no number, 409 when the release is not in use after `seconds`."""
    demanded = http.headers.get(MIN_RELEASE_HEADER)
    if demanded is None:
        return
    if not _is_number(demanded):
        raise ApiError(400, f"{MIN_RELEASE_HEADER} is the number of a release, not '{demanded}'.", MIN_RELEASE_HEADER)
    heard = await run_in_threadpool(follower.log_version_of_anothers, int(demanded))

    def is_reached() -> bool:
        release = engine.release
        if heard is None:
            return number(release) >= int(demanded)
        return release is not None and release.log_version >= heard

    try:
        async with asyncio.timeout(seconds):
            while not is_reached():
                await asyncio.sleep(LOOK_AGAIN)
    except TimeoutError:
        raise ApiError(
            409,
            f"Release {demanded} is not in use after {seconds:g} s; release {number(engine.release)} is.",
            param=MIN_RELEASE_HEADER,
            code="release_not_reached",
            retry_after=RETRY_AFTER,
        ) from None


async def origin_of(http: Request, follower: ReleaseFollower) -> Origin:
    """As `carry_on.py` has named it in the proxy; of its own where nothing stands before this replica.

    Raises ApiError (400) for what it does not write, and WiselineError when the release cannot be had any more."""
    created, _, drawn = http.headers.get(ID_HEADER, "").partition("-")
    resumed = http.headers.get(RESUME_HEADER, "")
    if not drawn:
        return Origin()
    if not _is_number(created) or not _is_number(resumed or "0") or not drawn.isalnum():
        raise ApiError(400, f"{ID_HEADER} and {RESUME_HEADER} are for the endpoint's own use.", param=ID_HEADER)
    if not resumed:
        return Origin(number=drawn, created=int(created))
    release = await run_in_threadpool(follower.release, int(resumed))
    return Origin(number=drawn, created=int(created), release=release)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS
