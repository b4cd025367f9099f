"""`/openapi.json`: FastAPI's document of the routes, and what it cannot know: keys, our headers, errors."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipeline.serving.access import OPEN
from pipeline.serving.release_headers import MIN_RELEASE_HEADER, ROUTE_HEADER

DESCRIPTION = (
    "An OpenAI-compatible endpoint over a language model that is kept current by edits. Beside OpenAI's routes: edits, "
    "releases, and why an answer was given."
)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "one sentence: what happened and what to do"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
FAILED = {
    "description": "400 bad request, 401 no valid key, 403 key without the scope, 404, 405, 409 release not in use or "
    "published meanwhile, 413 body too large, 422 no edit accepted, 429 too many requests, 503 try again (409, 429 and "
    "503 with Retry-After)",
    "content": {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/Error"},
            "example": {
                "error": {
                    "message": "The prompt is empty.",
                    "type": "invalid_request_error",
                    "param": "prompt",
                    "code": None,
                }
            },
        }
    },
}
MIN_RELEASE = {
    "name": MIN_RELEASE_HEADER,
    "in": "header",
    "description": "wait until this release (or a newer one) is in use; 409 when that takes too long",
    "schema": {"type": "integer", "minimum": 0},
}
ROUTE = {
    "name": ROUTE_HEADER,
    "in": "header",
    "description": "`off` asks the unedited model",
    "schema": {"enum": ["auto", "off"], "default": "auto"},
}
HEADERS = {
    "/v1/chat/completions": [MIN_RELEASE, ROUTE],
    "/v1/completions": [MIN_RELEASE, ROUTE],
    "/v1/explain": [MIN_RELEASE],
}


def documented(app: FastAPI) -> FastAPI:
    """The app, with our document behind `/openapi.json`. All routes must be there by now."""
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=_version(), description=DESCRIPTION, routes=app.routes)
        components = document.setdefault("components", {})
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schemas = components.setdefault("schemas", {})
        schemas["Error"] = ERROR
        for ours in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which is never answered here
            schemas.pop(ours, None)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = FAILED
                if path in HEADERS:
                    operation["parameters"] = [*operation.get("parameters", []), *HEADERS[path]]
                if path not in OPEN:
                    operation["security"] = [{}, {"key": []}]  # without serve.keys_file no key is asked for
        app.openapi_schema = document
    return app.openapi_schema


def _version() -> str:
    try:
        return version("wiseline")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0"
