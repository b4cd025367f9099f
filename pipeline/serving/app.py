"""The HTTP side of the endpoint: what is served where, and what every request passes on its way in. No Ray in here."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from pipeline.config import Config
from pipeline.serving.access import Access
from pipeline.serving.answers import Answerer
from pipeline.serving.answers_api import answers_routes, identity
from pipeline.serving.api_errors import answer_errors_in_openais_shape
from pipeline.serving.body_limit import BodyLimit
from pipeline.serving.console_page import console_routes
from pipeline.serving.drain import Drain
from pipeline.serving.edits_api import edits_routes
from pipeline.serving.engine import Engine
from pipeline.serving.explain_api import explain_routes
from pipeline.serving.keys import KeyRing
from pipeline.serving.openapi_document import documented
from pipeline.serving.release_follower import ReleaseFollower
from pipeline.serving.release_headers import ReleaseHeader
from pipeline.serving.releases_api import releases_routes
from pipeline.serving.request_id import RequestId
from pipeline.serving.round_api import round_routes
from pipeline.serving.same_origin import SameOrigin


def build_app(
    config: Config,
    engine: Engine,
    follower: ReleaseFollower,
    *,
    drain: Drain | None = None,
    replica: str | None = None,
) -> FastAPI:
    """The endpoint over a loaded model. Engine and follower start and stop with the app. `replica`: its name."""
    drain = drain or Drain()
    answerer = Answerer(config, engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        follower.follow()
        engine.start()
        follower.start()
        yield
        await drain.finish(seconds=config.serve.drain_seconds)
        follower.close()
        engine.close()

    app = FastAPI(title="wiseline", lifespan=lifespan, docs_url=None, redoc_url=None)  # their pages need a CDN
    # The last one added is passed first.
    app.add_middleware(BodyLimit)
    app.add_middleware(Access, keys=KeyRing(config.serve.keys_file) if config.serve.keys_file else None, drain=drain)
    if config.serve.keys_file is None:
        app.add_middleware(SameOrigin, host=config.serve.host)
    app.add_middleware(ReleaseHeader, engine=engine, replica=replica)
    app.add_middleware(RequestId)
    answer_errors_in_openais_shape(app)
    app.include_router(answers_routes(config, engine, follower, answerer))
    app.include_router(explain_routes(config, engine, follower, answerer))
    app.include_router(edits_routes(config, engine))
    app.include_router(releases_routes(config, engine))
    app.include_router(round_routes(config))
    app.include_router(console_routes())

    @app.get("/healthz", tags=["operation"], summary="Whether this replica answers")
    async def healthz() -> Response:
        """503 when the engine has stopped or the replica is being stopped."""
        status = "the engine has stopped" if not engine.alive else "stopping" if drain.draining else "ok"
        body = {"status": status, **identity(engine)}
        body["follower"] = {"alive": follower.alive, "error": follower.state.error}
        return JSONResponse(body, status_code=200 if status == "ok" else 503)

    return documented(app)
