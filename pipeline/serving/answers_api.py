"""Chat and text completions, streamed or whole, and the model list."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from pipeline.config import Config
from pipeline.serving import examples
from pipeline.serving.answers import MODEL_NAME, Answer, Answerer, number
from pipeline.serving.api_errors import ApiError, api_error
from pipeline.serving.carry_on import RELEASE_HEADER
from pipeline.serving.engine import Engine, EngineStopped, GenerationFailed
from pipeline.serving.openai_api import ChatRequest, CompletionRequest
from pipeline.serving.release_follower import ReleaseFollower
from pipeline.serving.release_headers import ROUTE_HEADER, is_routed, origin_of, wait_for_release


def answers_routes(config: Config, engine: Engine, follower: ReleaseFollower, answerer: Answerer) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    async def respond(body: ChatRequest | CompletionRequest, http: Request) -> Response:
        await wait_for_release(http, engine, follower, seconds=config.serve.min_release_seconds)
        answer = await answerer.begin(body, routed=is_routed(http), origin=await origin_of(http, follower))
        headers = {RELEASE_HEADER: str(answer.release), ROUTE_HEADER: ", ".join(answer.routes)}
        if body.stream:
            events = _events(answer, include_usage=body.include_usage)
            return StreamingResponse(events, headers=headers, media_type="text/event-stream")
        try:
            return JSONResponse(await answer.complete(), headers=headers)
        finally:  # also when the client has gone and this task is cancelled
            answer.job.cancel()

    @routes.post("/v1/chat/completions", summary="Answer a conversation", responses=examples.CHAT)
    async def chat_completions(body: ChatRequest, http: Request) -> Response:
        return await respond(body, http)

    @routes.post("/v1/completions", summary="Continue a text", responses=examples.COMPLETION)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await respond(body, http)

    def model() -> dict[str, Any]:
        about = identity(engine) | {"base_model": config.model.path}
        return {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "wiseline", "wiseline": about}

    @routes.get("/v1/models", summary="The one model, and the release that answers", responses=examples.MODELS)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @routes.get("/v1/models/{name:path}", summary="The model by its name", responses=examples.MODEL)
    async def one_model(name: str) -> Response:
        answerer.check_model(name)
        return JSONResponse(model())

    return routes


def identity(engine: Engine) -> dict[str, Any]:
    return {"release": number(engine.release), "fingerprint": engine.base.fingerprint, "layer": engine.base.layer}


async def _events(answer: Answer, *, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of one answer. A failure half-way is an event too: the status line has long been sent."""
    try:
        async for chunk in answer.chunks(include_usage=include_usage):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except (GenerationFailed, EngineStopped, ApiError) as error:
        yield _event(api_error(error).body)
    finally:  # reached early when the client has gone
        answer.job.cancel()


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
