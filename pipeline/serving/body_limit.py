"""Request bodies above the limit are refused before they fill the memory."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A prompt of 128k tokens is about half a megabyte, and escaped or in Chinese not more than four times that.
MAX_BODY_BYTES = 4 * 1024 * 1024


class BodyLimit:
    """ASGI middleware: counts what arrives, whatever content-length claims, and answers 413 above MAX_BODY_BYTES."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request body is larger than {MAX_BODY_BYTES} bytes.")
            return message

        await self._app(scope, counted, send)
