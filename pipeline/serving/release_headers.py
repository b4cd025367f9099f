"""Which release a request wants to be answered by, and which one did: the x-wiseline headers."""

import asyncio

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serving.answers import number
from pipeline.serving.api_errors import RETRY_AFTER, ApiError
from pipeline.serving.engine import Engine

RELEASE_HEADER, ROUTE_HEADER = "x-wiseline-release", "x-wiseline-route"
REPLICA_HEADER = "x-wiseline-replica"
MIN_RELEASE_HEADER = "x-wiseline-min-release"
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


async def wait_for_release(http: Request, engine: Engine, *, seconds: float) -> None:
    """Returns once the release that the client demands is in use: it then reads what it knows was published.

    Raises ApiError: 400 for what is no number, 409 when the release is not in use after `seconds`."""
    demanded = http.headers.get(MIN_RELEASE_HEADER)
    if demanded is None:
        return
    if not demanded.isascii() or not demanded.isdigit():
        raise ApiError(400, f"{MIN_RELEASE_HEADER} is the number of a release, not '{demanded}'.", MIN_RELEASE_HEADER)
    try:
        async with asyncio.timeout(seconds):
            while number(engine.release) < int(demanded):
                await asyncio.sleep(LOOK_AGAIN)
    except TimeoutError:
        raise ApiError(
            409,
            f"Release {demanded} is not in use after {seconds:g} s; release {number(engine.release)} is.",
            param=MIN_RELEASE_HEADER,
            code="release_not_reached",
            retry_after=RETRY_AFTER,
        ) from None
