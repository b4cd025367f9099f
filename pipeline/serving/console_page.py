"""`/console`: one page that talks to the routes beside it. It holds no data, so it may be loaded without a key.

Its parts are in `console/`; they are joined here, so that nothing has to be built and nothing else is fetched. The
policy names style and script by their hashes: what is not in these files does not run.
"""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from string import Template

from fastapi import APIRouter, Response

FOLDER = files("pipeline.serving") / "console"
SCRIPTS = (
    "elements.js",
    "api.js",
    "ask.js",
    "edits.js",
    "releases.js",
    "round.js",
    "main.js",
)  # one scope, in this order


def console_routes() -> APIRouter:
    routes = APIRouter()
    html, headers = console_page()

    @routes.get("/console", include_in_schema=False)
    async def console() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return routes


def console_page() -> tuple[str, Mapping[str, str]]:
    """The whole page and the headers it is to be sent with."""
    style = _read("style.css")
    script = "\n".join(_read(name) for name in SCRIPTS)
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon in the browser's tab
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",  # together: no text can become markup, not even by mistake
        "trusted-types": "'none'",
    }
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }
    return Template(_read("page.html")).substitute(style=style, script=script), headers


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
