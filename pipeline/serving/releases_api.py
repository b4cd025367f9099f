"""`GET /v1/releases` and `POST /v1/releases/rollback`: the same as `wiseline releases list` and `rollback`."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import Config
from pipeline.errors import CorruptObject, NewerSchema
from pipeline.serving import examples
from pipeline.serving.answers import number as number_of
from pipeline.serving.api_errors import ApiError
from pipeline.serving.engine import Engine
from pipeline.serving.writable import WritableStore
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.storage.releases import OfModel, describe, head, read_release, release_numbers, rollback


class RollbackRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"release": 1}]})

    release: int = Field(ge=1, description="the release whose memories, router and bank are published again")


def releases_routes(config: Config, engine: Engine) -> APIRouter:
    routes = APIRouter(tags=["wiseline"])
    store = open_store(config.store)
    writable = WritableStore(config.store)
    of_model = OfModel(engine.base.fingerprint, engine.base.layer)

    def followed() -> int | None:
        try:
            newest = head(store, of_model)
        except (CorruptObject, NewerSchema):  # replicas keep trying it
            return release_numbers(store)[-1]
        return newest.number if newest else None

    def restored(number: int) -> dict[str, Any]:
        if not of_model.has(read_release(store, number)):
            message = f"Release {number} is for another base model; serve that model to go back to it."
            raise ApiError(400, message, param="release", code="other_base_model")
        return describe(store, rollback(writable.get(), number))

    @routes.get("/v1/releases", summary="Releases, newest first", responses=examples.RELEASES)
    def releases(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[int | None, Query(ge=1, description="go on behind the release of this number")] = None,
    ) -> dict[str, Any]:
        """`head` is what replicas follow; `served` is what this one answers with. Rollbacks say what they `restore`.
        Releases of other base models are listed too, and followed by endpoints of theirs."""
        older = [one for one in reversed(release_numbers(store)) if after is None or one < after]
        newest = followed()
        rows = [
            _described(store, one) | {"head": one == newest, "served": one == number_of(engine.release)}
            for one in older[:limit]
        ]
        return {"object": "list", "data": rows, "has_more": len(older) > limit}

    @routes.post("/v1/releases/rollback", summary="Publish an older release again", responses=examples.ROLLBACK)
    async def roll_back(body: RollbackRequest) -> dict[str, Any]:
        """Nothing is deleted: a new release names the older one's memories, and replicas follow it within seconds.
        One of another base model is refused: to go back to that model, serve it."""
        return await run_in_threadpool(restored, body.release)

    return routes


def _described(store: ObjectStore, release: int) -> dict[str, Any]:
    """A manifest that cannot be read hides none of the others: it is what one rolls back from."""
    try:
        return describe(store, read_release(store, release))
    except (CorruptObject, NewerSchema) as error:
        return {"number": release, "error": str(error)}
