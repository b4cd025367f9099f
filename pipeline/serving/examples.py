"""What the OpenAPI document shows of each answer: an example and the headers. Tests hold them against real answers."""

from collections.abc import Mapping
from typing import Any

Responses = dict[int | str, dict[str, Any]]
HEADERS = {
    "x-wiseline-release": {
        "description": "the release that answered; 0 is the base model",
        "schema": {"type": "string"},
    }
}
ROUTE = {
    "x-wiseline-route": {
        "description": "main, or memory-0, memory-1, …; one per prompt, with commas between",
        "schema": {"type": "string"},
    }
}
WISELINE = {"release": 3, "route": "memory-0"}
USAGE = {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}
EDIT = {
    "prompt": "What is the capital of Kazakhstan?",
    "target": "Astana",
    "subject": "Kazakhstan",
    "paraphrases": ["Kazakhstan's capital is"],
}
EDIT_ID = "2f7d1c55d0b9f4b1a3f1f5f2a8a0c9e4"
LISTED = {
    "id": EDIT_ID,
    "object": "edit",
    "seq": 319,
    "prompt": EDIT["prompt"],
    "target": "Astana",
    "subject": "Kazakhstan",
    "ground_truth": None,
    "author": "newsroom",
    "ingested": "2026-11-20T20:58:54.909825+00:00",
    "status": "served",
}
MODEL_BODY = {
    "id": "wiseline",
    "object": "model",
    "created": 0,
    "owned_by": "wiseline",
    "wiseline": {"release": 3, "fingerprint": "9d3c…", "layer": 3, "base_model": "demo/model"},
}
RELEASE = {
    "number": 3,
    "parent": 2,
    "round_id": "308ee218e6217a753b7813ac",
    "log_version": 7,
    "edits": 320,
    "scores": {"reliability": 1.0, "generalization": 0.998, "locality": 1.0},
    "restores": None,
    "published": "2026-11-20T20:59:30+00:00",
    "head": True,
    "served": True,
}
NEAREST = {"edit_id": EDIT_ID, "prompt": EDIT["prompt"], "target": "Astana", "subject": "Kazakhstan"}


def _answers(example: Mapping[str, Any], *, status: int = 200, says: str, route: bool = False) -> Responses:
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    headers = {**HEADERS, **(ROUTE if route else {})}
    return {status: {"description": says, "headers": headers, "content": content}}


CHAT = _answers(
    {
        "id": "chatcmpl-1c9f",
        "object": "chat.completion",
        "created": 1795208400,
        "model": "wiseline",
        "system_fingerprint": "9d3c-3",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Astana", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "wiseline": WISELINE,
        "usage": USAGE,
    },
    says="The answer; with `stream`, server-sent events of `chat.completion.chunk`",
    route=True,
)
COMPLETION = _answers(
    {
        "id": "cmpl-1c9f",
        "object": "text_completion",
        "created": 1795208400,
        "model": "wiseline",
        "system_fingerprint": "9d3c-3",
        "choices": [{"index": 0, "text": " Astana", "logprobs": None, "finish_reason": "stop"}],
        "wiseline": WISELINE,
        "usage": USAGE,
    },
    says="The answers; with `stream`, server-sent events of pieces of them",
    route=True,
)
MODELS = _answers({"object": "list", "data": [MODEL_BODY]}, says="A list of one model")
MODEL = _answers(MODEL_BODY, says="The model")
EXPLAIN = _answers(
    {
        "object": "wiseline.explanation",
        "release": 3,
        "route": "memory-0",
        "memory": 0,
        "similarity": 0.98,
        "score": 7.1,
        "threshold": 2.4,
        "nearest_edits": [{**NEAREST, "score": 7.1, "similarity": 0.98}],
        "answer": {"text": " Astana", "finish_reason": "stop"},
        "main_memory": {"text": " Nur-Sultan", "finish_reason": "stop"},
    },
    says="What decided, and both answers",
    route=True,
)
POSTED = _answers(
    {
        "object": "edits",
        "new": 1,
        "unchanged": 0,
        "live": True,
        "accepted": [{"row": 0, "id": EDIT_ID, "op": "upsert", "status": "waiting"}],
        "refused": [{"row": 1, "reason": "the target is empty"}],
    },
    status=202,
    says="What became of each row; 422 when none could be accepted",
)
EDITS = _answers({"object": "list", "data": [LISTED], "has_more": False}, says="Living edits")
EDIT_SERVED = _answers({**LISTED, "status": "served", "release": 3}, says="The edit")
RETRACTED = _answers(
    {"id": EDIT_ID, "object": "edit", "deleted": True, "served_until_next_release": True}, says="The edit is retracted"
)
RELEASES = _answers({"object": "list", "data": [RELEASE], "has_more": True}, says="Releases")
RESTORED = {name: value for name, value in RELEASE.items() if name not in ("head", "served")}
ROLLBACK = _answers({**RESTORED, "number": 4, "parent": 3, "restores": 2}, says="The new head")
ROUND = _answers(
    {
        "object": "wiseline.round",
        "running": {
            "round_id": "308ee218e6217a753b7813ac",
            "began": "2026-11-21T02:00:04+00:00",
            "news": "2026-11-21T02:00:51+00:00",
            "shards": [{"memory": 0, "shard": 0, "edits": 80, "state": "trained"}],
        },
        "last": {"round_id": "77a1c0b5de0f4c53a6c2b6d1", "ended": "2026-11-20T02:03:10+00:00", "missed": False},
    },
    says="The round that runs and the last one that ended; null where there is none",
)

EDIT_SCHEMA = {
    "type": "object",
    "title": "Edit",
    "additionalProperties": False,
    "required": ["prompt"],
    "properties": {
        "op": {"enum": ["upsert", "retract"], "default": "upsert"},
        "prompt": {"type": "string", "minLength": 1},
        "target": {"type": "string", "description": "the answer from now on; not needed to retract"},
        "subject": {"type": ["string", "null"], "description": "what the prompt asks about"},
        "ground_truth": {"type": ["string", "null"], "description": "the answer until now"},
        "paraphrases": {"type": "array", "items": {"type": "string"}, "description": "held out: they measure the edit"},
        "locality": {
            "type": "array",
            "description": "held out: prompts whose answers must stay",
            "items": {
                "type": "object",
                "required": ["prompt"],
                "properties": {
                    "prompt": {"type": "string"},
                    "kind": {"enum": ["same_subject", "same_relation", "unrelated"]},
                },
            },
        },
        "out_of_scope": {"type": "array", "items": {"type": "string"}, "description": "texts no edit may answer"},
        "author": {"type": ["string", "null"], "description": "with API keys always the key's name"},
    },
}
EDITS_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "anyOf": [
                    EDIT_SCHEMA,
                    {
                        "type": "object",
                        "title": "Edits",
                        "additionalProperties": False,
                        "required": ["edits"],
                        "properties": {"edits": {"type": "array", "items": EDIT_SCHEMA, "minItems": 1}},
                    },
                ]
            },
            "examples": {"one": {"value": EDIT}, "many": {"value": {"edits": [EDIT]}}},
        }
    },
}
