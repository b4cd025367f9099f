"""The console as it is sent: one page, a policy that fits it to the letter, and nothing in it that needs a key."""

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from pipeline.serving.console_page import FOLDER, SCRIPTS, console_page
from pipeline.serving.keys import create_key
from tests.unit.serving.conftest import Endpoint

# What would turn text into markup or code, or fetch something from elsewhere.
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setHTML|srcdoc|DOMParser"
    r"|localStorage|sessionStorage|document\.cookie|@import"
)


def policy(headers: dict[str, str]) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in headers["content-security-policy"].split(";"))
    return {name: value for name, _, value in parts}


def test_the_policy_lets_in_this_style_and_this_script_and_nothing_else(endpoint: Endpoint) -> None:
    response = endpoint.client.get("/console")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    said = policy(dict(response.headers))
    for directive, tag in (("script-src", "script"), ("style-src", "style")):
        [inside] = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert said.pop(directive) == f"'sha256-{digest}'"
    assert said == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_the_page_fetches_nothing_and_makes_no_markup_of_text() -> None:
    html, _ = console_page()
    assert re.findall(r"""\b(?:src|srcset|action|formaction|on\w+|style)=["']""", html) == []
    assert set(re.findall(r'href="([^"]{1,20})', html)) <= {
        "#question", "#ask", "#edits", "#releases", "#round", "data:image/svg+xml,%"
    }  # fmt: skip
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    assert not FORBIDDEN.search(html)


def test_every_part_in_the_folder_is_on_the_page() -> None:
    assert {part.name for part in FOLDER.iterdir()} == {"page.html", "style.css", *SCRIPTS}


def test_the_page_needs_no_key_and_all_that_it_asks_for_does(start: Callable[..., Endpoint], tmp_path: Path) -> None:
    create_key(tmp_path / "keys.json", name="a", scopes=["infer"])
    guarded = start(keys_file=tmp_path / "keys.json")
    assert guarded.client.get("/console").status_code == 200
    for path in ("/console/", "/console/keys.json", "/v1/models", "/v1/edits", "/v1/releases", "/v1/round"):
        assert guarded.client.get(path, follow_redirects=False).status_code == 401, path
