"""The door: who may come in, for what, and how often. Asked before the body of a request is read."""

from contextlib import ExitStack
from pathlib import Path

from fastapi import Request
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.config import ServeSection
from pipeline.errors import ConfigError
from pipeline.serving.api_errors import ApiError, error_response
from pipeline.serving.drain import Drain
from pipeline.serving.key_limits import KeyLimits
from pipeline.serving.keys import Key, KeyRing, read_keys
from pipeline.serving.keys import Scope as KeyScope
from pipeline.serving.same_origin import is_loopback

# Load balancers, clients' generators and a browser that opens the console have no key yet, and learn nothing from these
# that needs one.
OPEN = frozenset({"/healthz", "/openapi.json", "/console"})
KEY = "wiseline.key"  # where a request keeps it


class Access:
    """ASGI middleware. `keys` None: whoever reaches the port may do everything."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing | None, drain: Drain) -> None:
        self._app, self._keys, self._drain = app, keys, drain
        self._limits = KeyLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        with ExitStack() as inside:
            try:
                inside.enter_context(self._drain.running())
                if self._keys is not None:
                    key = self._key(self._keys, scope)
                    inside.enter_context(self._limits.running(key))
                    scope[KEY] = key
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _key(self, keys: KeyRing, scope: Scope) -> Key:
        kind, _, secret = HTTPConnection(scope).headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise ApiError(401, "Send an API key as 'Authorization: Bearer <key>'.", code="missing_api_key")
        try:
            key = keys.find(secret.strip())
        except ConfigError:
            raise ApiError(
                503, "The endpoint cannot read its API keys.", code="keys_unreadable", retry_after=5
            ) from None
        if key is None:
            raise ApiError(401, "This API key is not valid here, or was revoked.", code="invalid_api_key")
        needed = needed_scope(scope["method"], scope["path"])
        if needed not in key.scopes:
            raise ApiError(403, f"This API key lacks the scope '{needed}'.", code="missing_scope")
        return key


def needed_scope(method: str, path: str) -> KeyScope:
    if path == "/v1/edits" or path.startswith("/v1/edits/"):
        return "edit"
    if path.startswith("/v1/releases") and method not in ("GET", "HEAD"):
        return "admin"
    return "infer"


def key_name(http: Request) -> str | None:
    """Who sent the request; None where the endpoint asks for no keys."""
    key: Key | None = http.scope.get(KEY)
    return None if key is None else key.name


def refuse_open_door(section: ServeSection, *, host: str) -> None:
    """Raises ConfigError where other machines could reach an endpoint that asks for no keys."""
    if section.keys_file is not None:
        read_keys(Path(section.keys_file))
    elif not is_loopback(host):
        raise ConfigError(
            f"An endpoint at {host} can be reached from other machines and asks for no keys; make one with "
            "`wiseline keys create` and name the file in serve.keys_file, or bind 127.0.0.1."
        )
