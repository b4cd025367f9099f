"""`/v1/edits`: post, search and retract edits. They go into the log; a live release or the next round makes them
answers."""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from pipeline.config import Config
from pipeline.serving import examples
from pipeline.serving.access import key_name
from pipeline.serving.answers import number
from pipeline.serving.api_errors import ApiError
from pipeline.serving.desk_queue import DeskQueue
from pipeline.serving.edit_desk import EditDesk, Posted, as_json, matches
from pipeline.serving.engine import Engine
from pipeline.serving.release_headers import LOOK_AGAIN
from pipeline.serving.writable import WritableStore
from pipeline.storage.object_store import open_store

MOST_EDITS = 1000  # in one post; more belong into a file, for `wiseline ingest`
Status = Literal["served", "waiting", "failed"]
LONGEST_WAIT = 60.0  # seconds


def edits_routes(config: Config, engine: Engine) -> APIRouter:
    routes = APIRouter(tags=["wiseline"])
    desk = EditDesk(open_store(config.store), WritableStore(config.store), config.edits)
    queue = DeskQueue(desk)

    def status(edit_id: str) -> Status:
        release = engine.release
        if release is None:
            return "waiting"
        return "served" if edit_id in release.entry_of else "failed" if edit_id in release.failed else "waiting"

    def said_of(edit_id: str) -> dict[str, Any] | None:
        """What the log and the release in use say of an edit; None where neither knows it."""
        served = status(edit_id) == "served"
        for entry in desk.living():
            if entry.edit.edit_id == edit_id:
                return {**as_json(entry), "status": status(edit_id), "release": number(engine.release)}
        gone = {"id": edit_id, "object": "edit", "status": "leaving", "release": number(engine.release)}
        return gone if served else None

    @routes.post(
        "/v1/edits",
        status_code=202,
        summary="Add edits",
        responses=examples.POSTED,
        openapi_extra={"requestBody": examples.EDITS_BODY},
    )
    async def post_edits(http: Request) -> Response:
        """One edit, or `{"edits": [...]}`. All that are accepted land in the log as one batch. With `live` true they
        take effect within seconds: `GET /v1/edits/{id}?wait=30` says when. Otherwise with the next round. Posting the
        same again changes nothing."""
        posted = await queue.post(_rows(await _json(http)), author=key_name(http))
        if not posted.accepted:
            raise _all_refused(posted)
        return JSONResponse(_told(posted, status, live=config.serve.live_edits is True), status_code=202)

    @routes.get("/v1/edits", summary="Search the living edits, newest first", responses=examples.EDITS)
    async def search_edits(
        query: Annotated[str, Query(max_length=1000, description="words in subject, prompt or target")] = "",
        status_is: Annotated[Status | None, Query(alias="status")] = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        after: Annotated[int | None, Query(ge=0, description="go on behind the edit with this `seq`")] = None,
    ) -> dict[str, Any]:
        """`status` says whether the release in use holds the edit (`served`), a later one will (`waiting`), or live
        training could not make it hold and the next round will try again (`failed`)."""

        def search() -> list[dict[str, Any]]:
            found = []
            for entry in desk.living():
                one = status(entry.edit.edit_id)
                wanted = (after is None or entry.seq < after) and status_is in (None, one)
                if wanted and matches(entry.edit, query):
                    found.append({**as_json(entry), "status": one})
                if len(found) > limit:
                    break
            return found

        found = await queue.run(search)
        return {"object": "list", "data": found[:limit], "has_more": len(found) > limit}

    @routes.get("/v1/edits/{edit_id}", summary="One edit, and whether it is served", responses=examples.EDIT_SERVED)
    async def one_edit(
        edit_id: Annotated[str, Path(description="as POST names it")],
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT, description="seconds, at most, for a status to pass")] = 0,
    ) -> dict[str, Any]:
        """`status`: `waiting`, `served`, `failed`, or `leaving` for a retracted edit that the release in use still
        holds. With `wait` it answers when `waiting` or `leaving` is over, or when the time is up.

        `release` is the one this replica answers with. Who sends it as `x-wiseline-min-release` reads the edit on every
        replica."""
        until = time.monotonic() + wait
        while True:
            seen = status(edit_id)
            said = await queue.run(lambda: said_of(edit_id))
            if said is None:
                raise ApiError(404, f"No edit has the id {edit_id}; GET /v1/edits lists the living ones.")
            if said["status"] not in ("waiting", "leaving") or time.monotonic() >= until:
                return said
            # Many wait for the same swap: none of them goes to the desk for it.
            while status(edit_id) == seen and time.monotonic() < until:
                await asyncio.sleep(LOOK_AGAIN)
            if said["status"] == "waiting":
                return {**said, "status": status(edit_id), "release": number(engine.release)}

    @routes.delete("/v1/edits/{edit_id}", summary="Retract an edit", responses=examples.RETRACTED)
    async def retract_edit(
        http: Request, edit_id: Annotated[str, Path(description="as POST and GET name it")]
    ) -> dict[str, Any]:
        """The log says so at once; the endpoint stops answering from it when the next release is out."""
        taken = await queue.run(lambda: desk.retract(edit_id, author=key_name(http)))
        served = status(taken.edit.edit_id) == "served"
        return {"id": taken.edit.edit_id, "object": "edit", "deleted": True, "served_until_next_release": served}

    return routes


async def _json(http: Request) -> object:
    if "application/json" not in http.headers.get("content-type", ""):
        raise ApiError(400, "The request body must be JSON, sent with content-type: application/json.")
    try:
        return await http.json()
    except (ValueError, RecursionError):
        raise ApiError(400, "The request body is not valid JSON.") from None


def _rows(body: object) -> list[Any]:
    """The edits of a post: of {"edits": [...]}, or the one edit that the body itself is."""
    if not isinstance(body, dict):
        raise ApiError(400, 'The request body must be one edit, or {"edits": [...]}.')
    if "edits" not in body:
        return [body]
    rows = body["edits"]
    if set(body) != {"edits"} or not isinstance(rows, list) or not rows:
        raise ApiError(400, '"edits" is a list of at least one edit, with nothing beside it.', param="edits")
    if len(rows) > MOST_EDITS:
        message = f"One request may hold at most {MOST_EDITS} edits; put more into a file, for `wiseline ingest`."
        raise ApiError(400, message, param="edits")
    return rows


def _told(posted: Posted, status: Callable[[str], Status], *, live: bool) -> dict[str, Any]:
    accepted = [
        {"row": row, "id": edit.edit_id, "op": edit.op}
        | ({"status": status(edit.edit_id)} if edit.op == "upsert" else {})
        for row, edit in posted.accepted
    ]
    refused = [{"row": row, "reason": reason} for row, reason in posted.refused]
    counts = {"new": posted.counts.ingested, "unchanged": posted.counts.unchanged + posted.counts.duplicates}
    return {"object": "edits", **counts, "live": live, "accepted": accepted, "refused": refused}


def _all_refused(posted: Posted) -> ApiError:
    row, reason = posted.refused[0]
    param = "edits" if len(posted.refused) == 1 else f"edits.{row}"
    beside = f" and {len(posted.refused) - 1} more" if len(posted.refused) > 1 else ""
    return ApiError(422, f"No edit was accepted: {reason}{beside}.", param=param, code="edit_refused")
