"""What is logged and traced while a request is answered belongs to it."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.logs import about
from pipeline.traces import span

HEADER, TRACE_HEADER = "x-request-id", "traceparent"


class RequestId:
    """ASGI middleware. Serve's proxy takes the client's x-request-id, or draws one, hands it on, and writes it into the
    response; without Serve there is none."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = headers.get(HEADER, "")
        within = {TRACE_HEADER: headers[TRACE_HEADER]} if TRACE_HEADER in headers else None
        with about(request_id=name), span("request", within=within, request_id=name, path=scope["path"]):
            await self._app(scope, receive, send)
