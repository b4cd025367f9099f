"""What keeps other people's web pages out of an endpoint that asks for no keys.

Whoever reaches its port may do everything, and a page of any site runs in a browser that reaches it. Two things tell
such a page apart: the name it called the endpoint by (a site can have its own name point at 127.0.0.1: DNS rebinding),
and the Origin that browsers send along with what a page posts. A key does both better: no page knows it.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.serving.api_errors import ApiError, error_response


class SameOrigin:
    """ASGI middleware. `host`: what the endpoint is bound to; it may be called that, or by a name of loopback."""

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._app, self._host = app, host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(HTTPConnection(scope))
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, http: HTTPConnection) -> None:
        called, origin = http.headers.get("host", ""), http.headers.get("origin")
        name = host_name(called)
        if name != self._host and not is_loopback(name):
            message = (
                f"An endpoint that asks for no keys answers to its own address only, such as localhost, not to "
                f"'{name:.100}'; call it so, or set serve.keys_file."
            )
            raise ApiError(403, message, code="foreign_host")
        if origin is not None and origin.lower() not in (f"http://{called}".lower(), f"https://{called}".lower()):
            message = (
                "An endpoint that asks for no keys takes no requests from pages of other sites; set serve.keys_file."
            )
            raise ApiError(403, message, code="foreign_origin")


def host_name(authority: str) -> str:
    """The host of `host:port` or `[address]:port`, without its brackets; empty where that is none."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
