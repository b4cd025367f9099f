"""Every failure as OpenAI's clients know it: a status, and a body with message, type, param and code."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipeline.errors import AlreadyExists, EndpointError, NotFound, RoundConflict, StoreError
from pipeline.serving.engine import EngineStopped, GenerationFailed, QueueFull

RETRY_AFTER = 1  # seconds; short answers take about as long


class ApiError(EndpointError):
    """An answer that is an error, in OpenAI's shape. `retry_after` (seconds) becomes the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        message = self.message.encode(errors="replace").decode()  # it may quote what the client sent
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def answer_errors_in_openais_shape(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> Response:
        return error_response(error)

    ours = (ApiError, QueueFull, EngineStopped, GenerationFailed, StoreError, RoundConflict)
    for kind in (*ours, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def error_response(error: Exception) -> Response:
    known = api_error(error)
    standard = error.headers if isinstance(error, HTTPException) else None  # such as Allow
    return JSONResponse(known.body, status_code=known.status, headers={**(standard or {}), **known.headers})


def api_error(error: Exception) -> ApiError:
    """What a client is told. What is not its business, or ours to know, stays in the log."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return invalid_request(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after=RETRY_AFTER)
        case EngineStopped():
            return ApiError(503, str(error), code="engine_stopped", retry_after=RETRY_AFTER)
        case GenerationFailed():
            return ApiError(500, str(error), code="generation_failed")
        case NotFound():
            return ApiError(404, str(error), code="not_found")
        case RoundConflict() | AlreadyExists():
            return ApiError(409, str(error), code="conflict", retry_after=RETRY_AFTER)
        case StoreError():
            return ApiError(503, str(error), code="store_unavailable", retry_after=RETRY_AFTER)
        case _:
            return ApiError(500, "The endpoint made a mistake; its log says which. It is safe to ask again.")


def invalid_request(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a request body, as the 400 that OpenAI answers (FastAPI's own answer is a 422)."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "The request body is not valid JSON.")
    where: Sequence[object] = first["loc"][1:]
    param = ".".join(str(part) for part in where) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if param is None and first["type"] != "value_error":
        return ApiError(400, "The request body must be a JSON object, sent with content-type: application/json.")
    if param is None:
        return ApiError(400, f"{message}.")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param)
    return ApiError(400, f"Invalid value for '{param}': {message}.", param=param)
