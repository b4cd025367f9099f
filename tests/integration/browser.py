"""Headless Chromium, driven over its DevTools protocol: what a person does, and what the browser complains about."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

PATIENCE = 60.0  # seconds; for what a page does by itself, on a machine that is busy
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "Space": (32, " ")}


def installed_chromium() -> str:
    """Its command. Skips the test where there is none, but never in CI."""
    found = shutil.which("chromium")
    if found is None:
        missing = "no chromium: run tests/integration/install_chromium.sh as root"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


class Browser:
    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._socket.send(json.dumps(message))
        while (answer := json.loads(self._socket.recv(timeout=PATIENCE))).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> "Page":
        """A page of its own: no other page's storage, keys or cache."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.show_in(dark=dark)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        return page


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise's when it is kept."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, (script[:200], done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, condition: str, *, seconds: float = PATIENCE) -> Any:
        """Until the expression is true; returns its value. A page that is just being loaded may not know it yet."""
        deadline = time.monotonic() + seconds
        while True:
            value = None
            with suppress(AssertionError):
                value = self.run(condition)
            if value:
                return value
            assert time.monotonic() < deadline, f"not so within {seconds} s: {condition}; {self.complaints()}"
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def wait_for_text(self, selector: str, part: str) -> str:
        found = f"document.querySelector({json.dumps(selector)})?.innerText"
        return str(self.wait(f"{found}?.includes({json.dumps(part)}) && {found}"))

    def click(self, selector: str) -> None:
        """In the middle of the element, as a mouse does: what lies above it would get the click."""
        self.wait(f"document.querySelector({json.dumps(selector)}) !== null")
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();"
            " return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **place, button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.type(text)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        code, text = KEYS[key]
        name = " " if key == "Space" else key
        held: dict[str, Any] = {"key": name, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **held)
        self.call("Input.dispatchKeyEvent", type="keyUp", **held)

    def tab_to(self, wanted: Callable[[str], bool], *, most: int = 80) -> str:
        """Press Tab until what has the focus is wanted, by the name that a screen reader says."""
        for _ in range(most):
            self.press("Tab")
            name = self.focused()
            if wanted(name):
                return name
        raise AssertionError(f"not reached with {most} tabs")

    def focused(self) -> str:
        """Role and accessible name of what has the focus."""
        value = self.call("Runtime.evaluate", expression="document.activeElement")["result"]["objectId"]
        [node, *_] = self.call("Accessibility.getPartialAXTree", objectId=value, fetchRelatives=False)["nodes"]
        return f"{node.get('role', {}).get('value', '')}: {node.get('name', {}).get('value', '')}"

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def show_in(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, still])

    def screenshot(self, *, whole: bool = True) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def requests(self) -> list[dict[str, Any]]:
        """All that the page has sent, with headers."""
        return [event["params"]["request"] for event in self._told("Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Errors and warnings in the console, violations of the policy and exceptions, since the page was opened."""
        self.run("1")  # what was told before the answer to this has arrived
        logged = [event["params"]["entry"] for event in self._told("Log.entryAdded")]
        thrown = [event["params"]["exceptionDetails"] for event in self._told("Runtime.exceptionThrown")]
        said = [event["params"] for event in self._told("Runtime.consoleAPICalled")]
        return [
            *(f"{entry['level']}: {entry['text']} {entry.get('url', '')}" for entry in logged),
            *(str(one.get("exception", {}).get("description", one["text"])) for one in thrown),
            *(f"{one['type']}: {[argument.get('value') for argument in one['args']]}" for one in said),
        ]

    def forget_complaints(self) -> None:
        """Those that a test has looked at."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        ours = [event for kind in kinds for event in self._told(kind)]
        self._browser.events = [event for event in self._browser.events if event not in ours]

    def _told(self, method: str) -> list[dict[str, Any]]:
        return [e for e in self._browser.events if e.get("sessionId") == self._session and e["method"] == method]


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """One Chromium with an empty profile in `folder`."""
    command = [
        installed_chromium(),
        "--headless",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
    ]
    if os.geteuid() == 0:  # Chromium's sandbox refuses root
        command.append("--no-sandbox")
    chromium = subprocess.Popen(command, env=os.environ | {"HOME": str(folder)}, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE
        while not port.exists() or len(port.read_text().splitlines()) < 2:
            assert chromium.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.05)
        number, path = port.read_text().splitlines()
        with connect(f"ws://127.0.0.1:{number}{path}", max_size=None, compression=None) as socket:
            yield Browser(socket)
    finally:
        chromium.terminate()
        chromium.wait(timeout=PATIENCE)
