"""`POST /v1/explain`: what is answered, why, and what the main memory would have said."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config import Config
from pipeline.serving import examples
from pipeline.serving.answers import MODEL_NAME, Answer, Answerer
from pipeline.serving.carry_on import RELEASE_HEADER
from pipeline.serving.engine import Engine
from pipeline.serving.openai_api import ChatRequest, CompletionRequest, Message, Text
from pipeline.serving.release_follower import ReleaseFollower
from pipeline.serving.release_headers import ROUTE_HEADER, wait_for_release


class ExplainRequest(BaseModel):
    """A text to continue, or a conversation; the answers are greedy."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"prompt": "What is the capital of Kazakhstan?"}]}
    )

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def one_question(self) -> "ExplainRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("name either a prompt or messages")
        return self

    def asked(self) -> ChatRequest | CompletionRequest:
        fields: dict[str, Any] = {"model": MODEL_NAME, "explain": True, "max_tokens": self.max_tokens}
        if self.prompt is not None:
            return CompletionRequest.model_validate(fields | {"prompt": self.prompt})
        assert self.messages is not None
        turns = [turn.model_dump() for turn in self.messages]
        return ChatRequest.model_validate(fields | {"messages": turns})


def explain_routes(config: Config, engine: Engine, follower: ReleaseFollower, answerer: Answerer) -> APIRouter:
    routes = APIRouter(tags=["wiseline"])

    @routes.post(
        "/v1/explain", summary="Why this answer, and what it would be without edits", responses=examples.EXPLAIN
    )
    async def explain(body: ExplainRequest, http: Request) -> Response:
        await wait_for_release(http, engine, follower, seconds=config.serve.min_release_seconds)
        now = await answerer.begin(body.asked())
        try:
            unedited = await answerer.begin(body.asked(), routed=False)
            try:
                said, would_have_said = await asyncio.gather(_choice(now), _choice(unedited))
            finally:
                unedited.job.cancel()
        finally:
            now.job.cancel()
        why = now.about[0]["why"]
        explained = {
            "object": "wiseline.explanation",
            "release": now.release,
            "route": now.routes[0],
            **{name: why[name] for name in ("memory", "similarity", "score", "threshold", "nearest_edits")},
            "answer": said,
            "main_memory": would_have_said,
        }
        return JSONResponse(explained, headers={RELEASE_HEADER: str(now.release), ROUTE_HEADER: now.routes[0]})

    return routes


async def _choice(answer: Answer) -> dict[str, Any]:
    choice = (await answer.complete())["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return {"text": text, "finish_reason": choice["finish_reason"]}
