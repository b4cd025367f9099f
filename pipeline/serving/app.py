"""The HTTP side of the endpoint: routes, headers, and what each failure looks like to a client. No Ray in here."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from pipeline.config import Config
from pipeline.serving.answers import MODEL_NAME, Answer, Answerer, number
from pipeline.serving.body_limit import BodyLimit
from pipeline.serving.engine import Engine, EngineStopped, GenerationFailed, QueueFull
from pipeline.serving.openai_api import ApiError, ChatRequest, CompletionRequest, invalid_request
from pipeline.serving.release_follower import ReleaseFollower

RELEASE_HEADER, ROUTE_HEADER = "x-wiseline-release", "x-wiseline-route"
RETRY_AFTER = 1  # seconds; a batch of short answers takes about as long


def build_app(config: Config, engine: Engine, follower: ReleaseFollower) -> FastAPI:
    """The endpoint over a loaded model. Engine and follower start and stop with the app."""
    answerer = Answerer(config, engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        follower.follow()
        engine.start()
        follower.start()
        yield
        follower.close()
        engine.close()

    app = FastAPI(title="wiseline", lifespan=lifespan)
    app.add_middleware(BodyLimit)
    _answer_errors_in_openais_shape(app, engine)

    async def respond(body: ChatRequest | CompletionRequest, http: Request) -> Response:
        answer = await answerer.begin(body, routed=_routed(http))
        headers = {RELEASE_HEADER: str(answer.release), ROUTE_HEADER: ", ".join(answer.routes)}
        if body.stream:
            events = _events(answer, include_usage=body.include_usage)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        try:
            return JSONResponse(await answer.complete(), headers=headers)
        finally:  # also when the client has gone and this task is cancelled
            answer.job.cancel()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await respond(body, http)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await respond(body, http)

    def model() -> dict[str, Any]:
        about = _identity(engine) | {"base_model": config.model.path}
        return {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "wiseline", "wiseline": about}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]}, headers=_release_header(engine))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        answerer.check_model(name)
        return JSONResponse(model(), headers=_release_header(engine))

    @app.get("/healthz")
    async def healthz() -> Response:
        status = "ok" if engine.alive else "the engine has stopped"
        body = {"status": status, **_identity(engine)}
        body["follower"] = {"alive": follower.alive, "error": follower.state.error}
        return JSONResponse(body, status_code=200 if engine.alive else 503, headers=_release_header(engine))

    return app


def _routed(http: Request) -> bool:
    route = http.headers.get(ROUTE_HEADER, "auto")
    if route not in ("auto", "off"):
        raise ApiError(400, f"{ROUTE_HEADER} may be 'auto' or 'off', not '{route}'.", param=ROUTE_HEADER)
    return route == "auto"


async def _events(answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of one answer. A failure half-way is an event too: the status line has long been sent."""
    try:
        async for chunk in answer.chunks(include_usage=include_usage):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except (GenerationFailed, EngineStopped) as error:
        yield _event(_api_error(error).body)
    finally:  # reached early when the client has gone
        answer.job.cancel()


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _identity(engine: Engine) -> dict[str, Any]:
    return {"release": number(engine.release), "fingerprint": engine.base.fingerprint, "layer": engine.base.layer}


def _release_header(engine: Engine) -> dict[str, str]:
    return {RELEASE_HEADER: str(number(engine.release))}


def _answer_errors_in_openais_shape(app: FastAPI, engine: Engine) -> None:
    async def answer(_: Request, error: Exception) -> Response:
        known = _api_error(error)
        headers = {**known.headers, **_release_header(engine)}
        return JSONResponse(known.body, status_code=known.status, headers=headers)

    ours = (ApiError, QueueFull, EngineStopped, GenerationFailed)
    for kind in (*ours, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _api_error(error: Exception) -> ApiError:
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
        case _:
            return ApiError(500, "The endpoint made a mistake; its log says which. It is safe to ask again.")
