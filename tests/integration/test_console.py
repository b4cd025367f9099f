"""The console in a real browser, over a real endpoint: what it shows, what it does, and what it keeps from running.

One endpoint with a release of the demo model serves this module, without keys; a small one asks for keys. Each test has
a page of its own, and at its end the browser must not have complained about anything.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from pipeline.config import load_config
from pipeline.models.base_model import load_base_model
from pipeline.serving.app import build_app
from pipeline.serving.engine import Engine
from pipeline.serving.keys import create_key, revoke_key
from pipeline.serving.release_follower import ReleaseFollower
from pipeline.storage.object_store import ObjectStore, open_store
from pipeline.training.round_state import write_plan
from pipeline.training.shard_files import FILES, shard_path
from tests.integration.browser import Browser, Page, running_browser
from tests.ports import free_ports
from tests.tiny_world import publish_release, save_model
from tests.unit.training.test_planning import Edit, plan

pytestmark = pytest.mark.timeout(600)

REPOSITORY = Path(__file__).parents[2]
QUESTION, OLD, NEW = "What is the capital of Kazakhstan?", "Nur-Sultan", "Astana"
NEIGHBOUR = "In which currency are wages paid in Kazakhstan?"
RUNS = """document.title = 'ran'"""
HOSTILE = f"""Who is <img src=x onerror="{RUNS}">?"""
HOSTILE_ANSWER = f"""</script><script>{RUNS}</script>"""
SETTINGS = {
    "shards.edits_per_shard": 4,
    "training.prefixes": 1,
    "merge.polish_steps": 0,
    "round.min_reliability": 0,
    "round.min_generalization": 0,
    "round.min_locality": 0,
    "serve.poll_seconds": 0.2,
    "serve.live_edits": "false",
}
WORLD = """
import sys
from jobs.ingest_edits import ingest
from jobs.serve import running_endpoint
from pipeline.config import load_config
from pipeline.rounds import run_round
config = load_config(overrides=sys.argv[2:])
ingest(config, [sys.argv[1]])
run_round(config)
with running_endpoint(config) as url:
    print("endpoint", url, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Served:
    url: str
    store: ObjectStore

    def edits(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._call("edits")["data"]
        return rows

    def releases(self) -> list[int]:
        return [one["number"] for one in self._call("releases")["data"]]

    def roll_back(self, release: int) -> int:
        return int(self._call("releases/rollback", json.dumps({"release": release}).encode())["number"])

    def _call(self, path: str, body: bytes | None = None) -> Any:
        asked = urllib.request.Request(f"{self.url}/v1/{path}", data=body, headers={"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A round over a few of the demo's edits and a hostile one, and an endpoint over its release; one Ray for both."""
    folder = tmp_path_factory.mktemp("world")
    rows = [json.loads(line) for line in (REPOSITORY / "demo" / "edits.jsonl").read_text().splitlines()]
    rows = sorted(rows, key=lambda row: row["prompt"] != QUESTION)[:7]
    rows += [{"prompt": HOSTILE, "target": HOSTILE_ANSWER, "subject": HOSTILE}]
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SETTINGS | {
        "model.path": REPOSITORY / "demo" / "model",
        "store.uri": folder / "store",
        "serve.port": free_ports(1)[0],
    }
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    paths = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    world = subprocess.Popen(
        [sys.executable, "-c", WORLD, str(folder / "edits.jsonl"), *(f"{key}={settings[key]}" for key in settings)],
        cwd=folder,
        env=variables | {"HOME": str(folder), "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
    )
    assert world.stdin and world.stdout
    try:
        told = next((line for line in world.stdout if line.startswith("endpoint ")), None)
        assert told, (folder / "stderr").read_text()
        yield Served(told.split()[1], ObjectStore(str(folder / "store")))
    finally:
        world.stdin.close()
        world.wait(timeout=120)


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Callable[..., Page]]:
    """Opens the console, and has it show what it knows."""
    pages = []

    def visit(**how: Any) -> Page:
        page = browser.open(f"{served.url}/console", **how)
        pages.append(page)
        for selector in ("#edits-list strong", "#releases-list strong", "#round-news:not(:empty)"):
            page.wait(f"document.querySelector({selector!r}) !== null")
        return page

    yield visit
    for page in pages:
        assert page.complaints() == []
        assert page.run("document.title") == "wiseline console"
        assert page.run("document.querySelectorAll('img, iframe, script:not([type=module])').length") == 0


def ask(page: Page, question: str, *, kind: str = "chat") -> None:
    page.click(f"input[value={kind}]")
    page.fill("#question", question)
    page.click("#ask-form .primary")
    page.wait_for_text("#live", "Without edits:")


def test_both_answers_stream_side_by_side_with_the_decision_and_the_edit(visit: Callable[..., Page]) -> None:
    page = visit()
    page.run(
        "globalThis.seen = {edited: [], unedited: []}; for (const name of ['edited', 'unedited'])"
        " new MutationObserver(() => seen[name].push(document.getElementById(`${name}-said`).textContent))"
        ".observe(document.getElementById(`${name}-said`), {childList: true, characterData: true, subtree: true}); 1"
    )
    ask(page, QUESTION)
    assert page.text("#edited-said") == NEW
    assert page.text("#unedited-said") == OLD
    for name, answer in page.run("seen").items():
        pieces = [piece for piece in dict.fromkeys(said.strip() for said in answer) if piece]
        assert len(pieces) > 1 and all(pieces[-1].startswith(piece) for piece in pieces), (name, pieces)
    assert page.text("#edited-route") == "side memory 0"
    said = re.fullmatch(
        r"Side memory 0 answered: the score ([−\d.]+) is above the threshold ([−\d.]+)\.", page.text("#verdict")
    )
    assert said and float(said[1].replace("−", "-")) > float(said[2].replace("−", "-"))
    assert f"{QUESTION} → {NEW}" in page.text("#behind")
    assert page.text("#live") == f"With edits: {NEW}. Without edits: {OLD}. They differ."
    sent = [request for request in page.requests() if request["url"].endswith("/v1/chat/completions")]
    assert sorted(request["headers"].get("x-wiseline-route", "") for request in sent) == ["", "off"]
    assert all(json.loads(request["postData"])["stream"] for request in sent)


def test_a_neighbour_keeps_its_answer_and_the_page_says_why(visit: Callable[..., Page]) -> None:
    page = visit()
    ask(page, NEIGHBOUR, kind="text")
    assert page.text("#edited-said") == page.text("#unedited-said") != ""
    assert page.text("#edited-route") == "main memory"
    assert "is not above the threshold" in page.text("#verdict")
    assert page.text("#live").endswith("Both are the same.")


def test_edits_are_added_searched_and_retracted_and_their_text_never_runs(
    visit: Callable[..., Page], served: Served
) -> None:
    page = visit()
    ask(page, HOSTILE)  # the edit behind the answer, and most likely the answer
    page.wait(f"document.getElementById('behind').innerText.includes({HOSTILE!r})")
    page.fill("#search", "onerror")
    page.wait("document.querySelectorAll('#edits-list > li').length === 1")
    [row] = page.run("[...document.querySelectorAll('#edits-list > li')].map(row => row.innerText)")
    assert HOSTILE in row and HOSTILE_ANSWER in row and "served" in row

    prompt, answer = f"And who <b onclick={RUNS}>leads</b> it?", HOSTILE_ANSWER
    page.click("#add summary")
    for field, text in {"prompt": prompt, "target": answer, "subject": "<i>it</i>", "before": "<s>him</s>"}.items():
        page.fill(f"#add-{field}", text)
    page.click("#add .primary")
    page.wait_for_text("#edits-said", "Added; its status is “waiting”.")
    page.fill("#search", "leads")
    shown = page.wait_for_text("#edits-list", prompt)
    assert page.run("document.querySelectorAll('#edits-list > li').length") == 1
    assert all(text in shown for text in (prompt, answer, "<i>it</i>", "<s>him</s>", "waiting"))
    assert [edit["prompt"] for edit in served.edits() if edit["status"] == "waiting"] == [prompt]

    page.click("#edits-list button")
    assert prompt in page.wait_for_text("#confirm", "Retract this edit?")
    page.click("#confirm-no")
    assert page.run("document.getElementById('confirm').open") is False
    assert prompt in [edit["prompt"] for edit in served.edits()]
    page.click("#edits-list button")
    page.click("#confirm-yes")
    page.wait_for_text("#edits-said", "Retracted.")
    page.wait_for_text("#edits-list", "No edits.")
    assert prompt not in [edit["prompt"] for edit in served.edits()]


def test_an_edit_that_is_refused_says_why_and_keeps_what_was_typed(visit: Callable[..., Page]) -> None:
    page = visit()
    page.click("#add summary")
    page.fill("#add-prompt", "Same")
    page.fill("#add-target", "Same")
    page.run("document.getElementById('add-prompt').scrollIntoView()")
    page.click("#add .primary")
    page.wait_for_text("#edits-said", "the target equals the prompt")
    assert page.run("document.getElementById('add-prompt').value") == "Same"
    # The browser itself notes answers that are no success; nothing else is wrong.
    assert [line for line in page.complaints() if "status of 422" not in line] == []
    page.forget_complaints()


def test_releases_have_scores_and_are_rolled_back_after_a_question(visit: Callable[..., Page], served: Served) -> None:
    newest = served.roll_back(1)
    page = visit()
    page.wait_for_text("#releases-list", f"Release {newest}")
    shown = page.text("#releases-list")
    assert all(name in shown for name in ("reliability", "generalization", "locality", "restores release 1", "8 edits"))
    assert re.search(r"\b[01]\.\d{3}\b", shown)
    button = "button[aria-label='Roll back to release 1']"
    page.click(button)
    page.wait_for_text("#confirm", "Roll back to release 1?")
    page.press("Escape")
    page.wait("!document.getElementById('confirm').open")
    assert page.focused() == "button: Roll back to release 1"
    assert served.releases()[0] == newest
    page.click(button)
    page.click("#confirm-yes")
    page.wait_for_text("#releases-said", f"Release {newest + 1} is published; it restores release 1.")
    status = f"#releases-list > [data-id='{newest + 1}'] .status"
    page.wait(f"document.querySelector({json.dumps(status)})?.innerText === 'in use'")
    page.wait_for_text("#model", f"release {newest + 1}")
    assert served.releases()[0] == newest + 1


def test_the_running_rounds_shards_and_how_they_get_on(visit: Callable[..., Page], served: Served) -> None:
    page = visit()
    assert "No round is running." in page.text("#round-said")
    assert "published a release" in page.text("#round-news")
    planned = plan([Edit(prompt=f"question {index}", target="answer") for index in range(8)])
    write_plan(served.store, planned)
    page.run("document.dispatchEvent(new Event('visibilitychange')); 1")  # somebody comes back to the page
    page.wait_for_text("#round-said", f"Round {planned.round_id[:8]}: 0 of 5 shards trained.")
    assert "0/2\n2 edits, waiting" in page.text("#shards")
    for shard in planned.memories[0].shards:
        for name in FILES:
            served.store.put(shard_path(shard.digest, name), b"x")
    page.wait_for_text("#round-said", "3 of 5 shards trained.")  # by itself
    assert page.run("document.getElementById('round-progress').value") == 3
    assert page.run("document.querySelectorAll('#shards .trained').length") == 3
    served.store.remove(f"rounds/{planned.round_id}/plan.json")
    page.wait_for_text("#round-said", "No round is running.")


def test_asking_and_rolling_back_with_the_keyboard_alone(visit: Callable[..., Page], served: Served) -> None:
    newest = served.roll_back(1)
    page = visit()
    page.press("Tab")
    assert page.focused() == "link: Skip to the question"
    page.press("Enter")
    page.press("Tab")
    if "Question" not in page.focused():  # the link moves the focus there, or just before it
        page.press("Tab", shift=True)
    assert page.focused() == "textbox: Question"
    page.type(QUESTION)
    page.press("Enter")
    page.wait_for_text("#live", "They differ.")
    assert page.focused() == "textbox: Question", "an answer takes nobody's focus away"
    page.wait("document.querySelector(\"button[aria-label='Roll back to release 1']\") !== null")
    seen = []

    def wanted(name: str) -> bool:
        seen.append(name)
        visible = page.run(
            "(s => s.outlineStyle !== 'none' && s.outlineWidth === '3px')(getComputedStyle(document.activeElement))"
        )
        assert visible or "RootWebArea" in name or "radio" in name, f"no visible focus on {name}"
        return name == "button: Roll back to release 1"

    page.tab_to(wanted)
    order = [
        seen.index(next(name for name in seen if part in name)) for part in ("Edit this", "Search", "Retract", "Roll")
    ]
    assert order == sorted(order), seen
    page.press("Enter")
    page.wait("document.getElementById('confirm').open")
    assert page.focused() == "button: Cancel"
    page.tab_to(lambda name: name == "button: Roll back to 1", most=3)
    page.press("Enter")
    page.wait_for_text("#releases-said", f"Release {newest + 1} is published")
    assert page.focused() == "button: Roll back to release 1"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_it_fits_the_window_and_axe_finds_nothing(visit: Callable[..., Page], dark: bool, width: int) -> None:
    """With everything open that can be opened. Axe checks names, landmarks, roles, and contrast (WCAG 2.1 AA)."""
    page = visit(width=width, dark=dark)
    ask(page, HOSTILE)
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true }); 1")
    assert page.run("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('body *:not(.unseen, .unseen *, .skip)')].filter(e => e.offsetParent)"
        ".map(e => [e.getBoundingClientRect(), e.outerHTML]).filter(([r]) => r.right > innerWidth + .5 || r.left < -.5)"
    )
    assert page.run(outside) == []
    light = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(part => part > 200)")
    assert light is not dark
    assert violations(page) == []
    page.click("#edits-list button")
    page.wait("document.getElementById('confirm').open")
    assert violations(page) == []


def violations(page: Page) -> list[Any]:
    page.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8") + "; 1")
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
    found: list[Any] = page.run(
        f"axe.run(document, {{runOnly: {rules}, resultTypes: ['violations']}})"
        ".then(({violations}) => violations.map(one => [one.id, one.nodes.map(node => node.html)]))"
    )
    return found


def test_what_was_not_sent_with_the_page_does_not_run(browser: Browser, served: Served) -> None:
    """And the browser says so: what the other tests rely on when they find no complaint."""
    page = browser.open(f"{served.url}/console")
    assert page.complaints() == []
    for script in (
        f"document.body.append(Object.assign(document.createElement('script'), {{text: {RUNS!r}}}))",
        f"document.body.innerHTML = {HOSTILE!r}",
        f"document.body.setAttribute('onclick', {RUNS!r}), document.body.click()",
    ):
        page.run(f"try {{ {script} }} catch {{}}; 1")
    style = (
        "document.body.append(Object.assign(document.createElement('style'), {textContent: 'body { display: none }'}))"
    )
    page.run(f"{style}; 1")
    page.run("fetch('https://elsewhere.example/').catch(() => 1)")
    assert page.run("document.title") == "wiseline console"
    assert page.run("getComputedStyle(document.body).display") == "block"
    assert sum("Content Security Policy" in line or "TrustedHTML" in line for line in page.complaints()) >= 4


# ---- other sites


@pytest.fixture
def another_site() -> Iterator[str]:
    class Blank(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!DOCTYPE html><title>another site</title>")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Blank)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()


def test_a_page_of_another_site_can_neither_post_nor_read_nor_frame(
    browser: Browser, served: Served, another_site: str
) -> None:
    before = len(served.edits()), served.releases()
    page = browser.open(another_site)
    edit, rollback = json.dumps({"prompt": "planted?", "target": "yes"}), json.dumps({"release": 1})
    for kind in ("text/plain", "application/json"):
        for path, body in (("edits", edit), ("releases/rollback", rollback)):
            how = {"method": "POST", "mode": "no-cors", "body": body, "headers": {"content-type": kind}}
            page.run(f"fetch('{served.url}/v1/{path}', {json.dumps(how)}).catch(() => 1).then(() => 1)")
    assert page.run(f"fetch('{served.url}/v1/edits').then(r => r.text()).catch(() => 'refused')") == "refused"
    framed = f"Object.assign(document.createElement('iframe'), {{src: '{served.url}/console', onload: () => done(1)}})"
    page.run(f"new Promise(done => document.body.append({framed}))")
    assert any("frame-ancestors" in line for line in page.complaints())
    form = (
        f"(f => {{ f.method = 'post'; f.enctype = 'text/plain'; f.action = '{served.url}/v1/releases/rollback';"
        " const i = f.appendChild(document.createElement('input'));"
        ' i.name = \'{"release": 1, "x": "\'; i.value = \'"}\'; document.body.append(f); f.submit();'
        " })(document.createElement('form')), 1"
    )
    page.run(form)
    page.wait("document.body.innerText.includes('takes no requests from pages of other sites')")
    assert (len(served.edits()), served.releases()) == before


# ---- keys


@dataclass(frozen=True)
class Guarded:
    url: str
    keys: Path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A small random model behind keys."""
    folder = tmp_path_factory.mktemp("guarded")
    create_key(folder / "keys.json", name="nobody", scopes=["infer"])
    settings = {
        "model.path": save_model(folder / "model"),
        "store.uri": folder / "store",
        "serve.keys_file": folder / "keys.json",
        "serve.max_new_tokens": 5,
    }
    config = load_config(overrides=[f"{key}={value}" for key, value in settings.items()])
    base, store = load_base_model(config.model), open_store(config.store)
    for seed in (1, 2):
        publish_release(store, base, prompts=["Who leads"], seed=seed)
    engine = Engine(base, config.serve)
    app = build_app(config, engine, ReleaseFollower(store, base, engine.swap, poll_seconds=60))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    yield Guarded(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", folder / "keys.json")
    server.should_exit = True
    thread.join()


def test_a_key_is_asked_for_and_what_it_may_not_do_is_explained(browser: Browser, guarded: Guarded) -> None:
    key, secret = create_key(guarded.keys, name="reader", scopes=["infer"])
    page = browser.open(f"{guarded.url}/console")
    page.wait("!document.getElementById('door').hidden")
    assert page.focused() == "textbox: API key"
    assert page.text("#door-why") == ""
    page.type("wl-wrong")
    page.press("Enter")
    page.wait_for_text("#door-why", "not valid here")
    page.fill("#key", secret)
    page.press("Enter")
    page.wait("document.querySelector('#releases-list strong') !== null")
    assert page.run("document.getElementById('door-why').textContent") == ""
    page.wait_for_text("#edits-wrong", "lacks the scope 'edit'")
    page.wait_for_text("#edits-wrong", "Ask whoever runs the endpoint for a key that has it")
    ask(page, "Who leads", kind="text")
    assert "side memory 0" in page.text("#edited-route")
    page.click("button[aria-label='Roll back to release 1']")
    page.click("#confirm-yes")
    page.wait_for_text("#confirm-wrong", "lacks the scope 'admin'")
    page.click("#confirm-no")
    assert violations(page) == []
    for request in page.requests():
        assert secret not in request["url"] and secret not in request.get("postData", "")
        assert request["headers"].get("Authorization", request["headers"].get("authorization")) in (
            None, "Bearer wl-wrong", f"Bearer {secret}"
        )  # fmt: skip
    kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
    assert secret not in page.run(kept)
    assert secret not in page.run(
        "document.documentElement.outerHTML + [...document.querySelectorAll('input')].map(i => i.value)"
    )

    page.fill("#question", "Who leads")
    revoke_key(guarded.keys, key.id)
    page.press("Enter")  # or the page has looked by itself meanwhile: then the empty field for the key takes no Enter
    page.wait("document.getElementById('inside').hidden")
    assert "was revoked" in page.text("#door-why")
    # The browser itself notes answers that are no success; nothing else is wrong.
    assert [line for line in page.complaints() if not re.search(r"status of 40[13]", line)] == []
