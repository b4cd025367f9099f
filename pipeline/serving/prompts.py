"""From what was asked to what the model reads, refusing here what the model could not finish."""

import random
from collections.abc import Sequence
from dataclasses import replace

import jinja2
from transformers import PreTrainedTokenizerBase

from pipeline.config import ServeSection
from pipeline.models.generate import GenerationRequest
from pipeline.models.prompts import chat_prompt_ids, plain_prompt_ids
from pipeline.models.questions import TURN
from pipeline.serving.api_errors import ApiError
from pipeline.serving.openai_api import ChatRequest, CompletionRequest, Message

# OpenAI's newer name for the system role; chat templates know the old one.
TEMPLATE_ROLES = {"developer": "system"}


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[tuple[int, ...], str]:
    """Token ids of the rendered conversation, and the text the router reads: the turns up to the last user message.

    What is asked is in that message. The turns before it only say what its pronouns mean, so a subject mentioned once
    does not draw every later question to its edit.
    """
    if not tokenizer.chat_template:
        raise ApiError(400, "This model has no chat template; send the prompt to /v1/completions.", param="messages")
    turns = [{"role": TEMPLATE_ROLES.get(turn.role, turn.role), "content": turn.content} for turn in messages]
    try:
        prompt_ids = chat_prompt_ids(turns, tokenizer)
    except jinja2.TemplateError as error:
        raise ApiError(400, f"The model's chat template refuses these messages: {error}.", param="messages") from None
    last = max((place for place, turn in enumerate(messages) if turn.role == "user"), default=len(messages) - 1)
    heard = [turn.content for turn in messages[:last] if turn.role in ("user", "assistant")]
    return prompt_ids, TURN.join([*heard, messages[last].content])


def plain_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[tuple[int, ...], str]:
    """Token ids of a prompt exactly as written, and the prompt itself."""
    if not prompt.strip():
        raise ApiError(400, "The prompt is empty.", param="prompt")
    return plain_prompt_ids(prompt, tokenizer), prompt


def generation_request(
    prompt: tuple[tuple[int, ...], str],
    sampling: ChatRequest | CompletionRequest,
    *,
    limits: ServeSection,
    context_tokens: int,
    routed: bool,
) -> GenerationRequest:
    """The request the engine runs. Without a token limit of its own it gets what the context leaves, up to
    `serve.max_new_tokens`. Raises ApiError (400) when prompt and answer do not fit."""
    prompt_ids, text = prompt
    param = "prompt" if isinstance(sampling, CompletionRequest) else "messages"
    left = context_tokens - len(prompt_ids)
    wanted, max_new_tokens = sampling.token_limit, limits.max_new_tokens
    if limits.max_prompt_tokens != "auto" and len(prompt_ids) > limits.max_prompt_tokens:
        message = f"The prompt has {len(prompt_ids)} tokens; this endpoint reads at most {limits.max_prompt_tokens}."
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    if wanted is not None and wanted > max_new_tokens:
        raise ApiError(
            400, f"max_tokens is {wanted}; this endpoint gives at most {max_new_tokens}.", param="max_tokens"
        )
    if left < (wanted or 1):
        answer = f"{wanted} tokens of answer" if wanted else "an answer"
        raise ApiError(
            400,
            f"The prompt has {len(prompt_ids)} tokens; a context of {context_tokens} has no room for {answer}.",
            param=param,
            code="context_length_exceeded",
        )
    return GenerationRequest(
        prompt_ids=prompt_ids,
        text=text,
        max_new_tokens=wanted or min(max_new_tokens, left),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=max(0, sampling.top_k),
        seed=sampling.seed,
        routed=routed,
        logprobs=sampling.alternatives,
    )


def seeded(requests: Sequence[GenerationRequest], number: str) -> list[GenerationRequest]:
    """What has no seed gets one drawn from the response's number."""
    draw = random.Random(number)
    return [
        request if request.seed is not None else replace(request, seed=draw.getrandbits(63)) for request in requests
    ]


def seeded_apart(request: GenerationRequest, answers: int) -> list[GenerationRequest]:
    """`n` requests from one: the first keeps its seed, the others get seeds drawn from it, so all can be repeated."""
    if request.seed is None:
        return [request] * answers
    draw = random.Random(request.seed)
    return [request, *(replace(request, seed=draw.getrandbits(63)) for _ in range(answers - 1))]
