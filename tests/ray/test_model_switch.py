"""Another base model: trained from the log side by side, then served in place of the first, under load."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from jobs.serve import running_endpoint, switch_endpoint
from pipeline.config import Config, load_config
from pipeline.errors import EndpointError
from pipeline.models.base_model import identify
from pipeline.rounds import run_round
from pipeline.storage.object_store import open_store
from pipeline.storage.releases import OfModel, head
from tests.ports import free_ports
from tests.ray.test_round import SETTINGS, edits, ingest
from tests.tiny_world import save_model

CLIENTS = 2
PROMPTS = [str(edit["prompt"]) for edit in edits("abc")]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Config, Config]:
    """Two configs that differ in nothing but the base model."""
    [port] = free_ports(1)
    settings = [*SETTINGS, f"store.uri={tmp_path / 'store'}", f"serve.port={port}", "serve.live_edits=false"]
    first, second = (save_model(tmp_path / f"model-{seed}", seed=seed, chat=False) for seed in (1, 2))
    return load_config(overrides=[*settings, f"model.path={first}"]), load_config(
        overrides=[*settings, f"model.path={second}"]
    )


@contextmanager
def asked_without_a_pause(client: openai.OpenAI) -> Iterator[list[tuple[str, int, str]]]:
    """What two clients are told meanwhile: system fingerprint, release, text. A request that fails is raised here."""
    told: list[tuple[str, int, str]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            told.append(said(client, PROMPTS[len(told) % len(PROMPTS)]))

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask) for _ in range(CLIENTS)]
        try:
            yield told
        finally:
            done.set()
        for one in asking:
            one.result()


def said(client: openai.OpenAI, prompt: str) -> tuple[str, int, str]:
    answer: Any = client.completions.create(model="wiseline", prompt=prompt, max_tokens=6)
    return answer.system_fingerprint.split("-")[0], answer.wiseline["release"], answer.choices[0].text.strip()


def health(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/healthz", timeout=10) as response:
        return dict(json.load(response))


def fingerprints(models: Sequence[Config]) -> list[str]:
    return [identify(config.model).fingerprint[:12] for config in models]


@pytest.mark.timeout(1200)
def test_the_base_model_is_switched_under_load(models: tuple[Config, Config], local_ray: None, tmp_path: Path) -> None:
    first, second = models
    old, new = fingerprints(models)
    ingest(first, edits("abc"), tmp_path, "edits")
    run_round(first)
    with running_endpoint(first) as url:
        client = openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0, timeout=120)
        with asked_without_a_pause(client) as told:
            with pytest.raises(EndpointError, match="run a round with this one first"):
                switch_endpoint(first, second)
            assert run_round(second).release.number == 2
            assert run_round(first).published is False, "the first model's release stands as before"
            assert (health(url)["release"], health(url)["follower"]["error"]) == (1, None)
            switch_endpoint(first, second)
            while told[-1][0] != new:
                time.sleep(0.05)
        assert {(model, release, text) for model, release, text in told} == {(old, 1, "new"), (new, 2, "new")}
        store, model = open_store(second.store), identify(second.model)
        assert head(store, OfModel(model.fingerprint, model.layer)) == head(store)
