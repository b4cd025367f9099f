"""`wiseline ask`: one question to the endpoint, or to the model itself with --offline."""

import asyncio
import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Annotated, Any

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from jobs.serve import url_of
from pipeline.config import Config, load_config
from pipeline.errors import EndpointError

KEY_VARIABLE = "WISELINE_API_KEY"
TIMEOUT_SECONDS = 600  # a long answer of a large model on CPU


def ask_command(
    question: Annotated[str, typer.Argument(help="The prompt.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat/--plain", help="Ask as a chat message, or continue the text.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Load the model here; no endpoint, no Ray.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say which edit was nearest, and how near.")] = False,
    url: Annotated[str | None, typer.Option("--url", help="The endpoint (default: serve.host and serve.port).")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Ask the endpoint one question.

    Prints the answer, and which release and memory gave it. An endpoint that asks for a key
    gets the one in WISELINE_API_KEY.
    """
    settings = load_config(config, overrides=set_ or ())
    body: dict[str, Any] = {"model": "wiseline", "explain": explain}
    body |= {"messages": [{"role": "user", "content": question}]} if chat else {"prompt": question}
    if offline:
        response = _ask_here(settings, body)
    else:
        response = ask_endpoint(url or url_of(settings.serve, settings.serve.port), body)
    choice = response["choices"][0]
    answer = (choice["message"]["content"] if chat else choice["text"]).strip()
    typer.echo(answer)
    typer.secho(_origin(response["wiseline"]), err=True, dim=True)
    if json_line:
        print_json({"answer": answer, "finish_reason": choice["finish_reason"], **response["wiseline"]})


def ask_endpoint(url: str, body: dict[str, Any]) -> dict[str, Any]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    address = url.rstrip("/").removesuffix("/v1") + path
    if not address.startswith(("http://", "https://")):
        raise EndpointError(f"{url} is not the address of an endpoint; it begins with http:// or https://.")
    headers = {"content-type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise EndpointError(_refusal(url, error)) from None
    except (OSError, ValueError, HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise EndpointError(
            f"No endpoint answers at {url} ({reason}); start one with `wiseline serve`, or ask with --offline."
        ) from None
    if not isinstance(answer, dict) or "wiseline" not in answer:
        raise EndpointError(f"What answers at {url} is not a wiseline endpoint; check --url.")
    return answer


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{url} answers {error.code} {error.reason}; is it a wiseline endpoint?"


def _ask_here(config: Config, body: dict[str, Any]) -> dict[str, Any]:
    """What the endpoint would answer, by the same engine, without Ray and without a port."""
    from pipeline.models.base_model import load_base_model
    from pipeline.models.loaded_release import load_release, newest_for
    from pipeline.models.side_memories import MemoryCache
    from pipeline.serving.answers import Answerer
    from pipeline.serving.engine import Engine
    from pipeline.serving.openai_api import ChatRequest, CompletionRequest
    from pipeline.storage.object_store import open_store

    store = open_store(config.store)
    engine = Engine(load_base_model(config.model), config.serve)
    release = newest_for(store, engine.base)
    if release is not None:
        memories = MemoryCache(engine.base, device_gib=config.serve.device_memory_gib)
        engine.swap(load_release(store, release, engine.base, memories=memories))
    request = (ChatRequest if "messages" in body else CompletionRequest).model_validate(body)

    async def answer() -> dict[str, Any]:
        return await (await Answerer(config, engine).begin(request)).complete()

    engine.start()
    try:
        return asyncio.run(answer())
    finally:
        engine.close()


def _origin(wiseline: dict[str, Any]) -> str:
    """Who answered and, if that was asked, why."""
    release = f"release {wiseline['release']}" if wiseline["release"] else "the base model, before any release"
    said = f"{release}, {wiseline['route']}"
    why = wiseline.get("why")
    if why is None:
        return said
    if why["nearest_edit"] is None:
        return f"{said}; there is no edit to compare with"
    edit, sign = why["nearest_edit"], ">" if why["memory"] is not None else "≤"
    return (
        f"{said}\n"
        f"score {why['score']:.3f} {sign} threshold {why['threshold']:.3f}, similarity {why['similarity']:.3f}\n"
        f"nearest edit {edit['edit_id']}: {edit['prompt']} → {edit['target']}"
    )
