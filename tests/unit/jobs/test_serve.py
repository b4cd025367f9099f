"""What `wiseline serve` does when it is signalled; the endpoint itself is a stand-in."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jobs import serve
from pipeline.config import Config
from pipeline.errors import EndpointError

SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_reads_its_config_again_and_goes_on_with_the_old_one_where_the_new_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, switches = tmp_path / "config.yaml", []
    file.write_text("model: {path: first}\n")

    @contextmanager
    def running(config: Config) -> Iterator[str]:
        threading.Thread(target=signals, daemon=True).start()
        yield "http://127.0.0.1:1"

    def signals() -> None:
        for text, number in (
            ("model: {path: second}\n", signal.SIGUSR1),
            ("model: {path: refused}\n", signal.SIGUSR1),
            ("model: {pth: third}\n", signal.SIGUSR1),
            ("", signal.SIGTERM),
        ):
            file.write_text(text)
            told = len(said)
            while signal.getsignal(signal.SIGTERM) in (before, signal.default_int_handler):
                time.sleep(0.01)  # it loads, or switches
            os.kill(os.getpid(), number)
            while number == signal.SIGUSR1 and len(said) == told:
                time.sleep(0.01)

    def switch(serving: Config, wanted: Config) -> Config:
        switches.append((serving.model.path, wanted.model.path))
        if wanted.model.path == "refused":
            raise EndpointError("It does not start.")
        return wanted

    said: list[str] = []
    echo = typer.echo

    def heard(message: str, *, err: bool = False) -> None:
        echo(message, err=err)
        if "now." in message or "as before" in message:
            said.append(message)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(serve, "running_endpoint", running)
    monkeypatch.setattr(serve, "switch_endpoint", switch)
    monkeypatch.setattr(typer, "echo", heard)
    app = typer.Typer()
    app.command()(serve.serve_command)
    result = CliRunner().invoke(app, ["--config", str(file)])
    assert result.exit_code == 0, result.output
    assert switches == [("first", "second"), ("second", "refused")]
    assert said[:2] == ["Serving second now.", "It does not start. second is served as before."]
    assert "did you mean path?" in said[2] and said[2].endswith("second is served as before.")
