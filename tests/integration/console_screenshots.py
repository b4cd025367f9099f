"""Pictures of the console for the docs: `python -m tests.integration.console_screenshots http://127.0.0.1:8000`.

They are of a real endpoint, with whatever is in its store. Those in docs/ show the demo's release after a rollback,
with one edit posted since, beside a round that had extracted its shards when it was stopped.
"""

import sys
import tempfile
from pathlib import Path

from tests.integration.browser import Browser, running_browser

DOCS = Path(__file__).parents[2] / "docs"
QUESTION = "What is the capital of Kazakhstan?"
PICTURES = {
    "console-light.png": {"width": 1180, "height": 1330, "dark": False},
    "console-dark.png": {"width": 1180, "height": 1330, "dark": True},
    "console-380.png": {"width": 380, "height": 1500, "dark": False},
}


def take(browser: Browser, url: str, *, width: int, height: int, dark: bool) -> bytes:
    page = browser.open(f"{url}/console", width=width, height=height, dark=dark)
    for selector in ("#edits-list strong", "#releases-list strong", "#round-news:not(:empty)"):
        page.wait(f"document.querySelector({selector!r}) !== null")
    page.fill("#question", QUESTION)
    page.press("Enter")
    page.wait_for_text("#live", "Without edits")
    page.run("scrollTo(0, 0)")
    return page.screenshot(whole=False)


def main(url: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as profile, running_browser(Path(profile)) as browser:
        for name, picture in PICTURES.items():
            (folder / name).write_bytes(take(browser, url, **picture))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), Path(sys.argv[2]) if len(sys.argv) > 2 else DOCS)
