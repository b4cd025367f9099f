"""The resident trainer: a Ray actor that stays beside an endpoint and turns what is posted into live releases."""

import contextlib
import time
from typing import Any

import ray
import torch

from pipeline.actors.worker import gpus_per_worker
from pipeline.config import Config
from pipeline.errors import RoundConflict, WiselineError
from pipeline.live import LiveEditor
from pipeline.logs import logger
from pipeline.metrics import record
from pipeline.models.base_model import load_base_model, model_folder
from pipeline.models.suffix import load_suffix
from pipeline.storage.object_store import open_store
from pipeline.training.contexts import stored_texts

log = logger(__name__)

NAME = "wiseline-live-trainer"
NAMESPACE = "wiseline"
LOOK_SECONDS = 0.5  # between two looks at the log when there is nothing to do
LONGEST_PAUSE = 60.0  # seconds between two attempts at the same failure
FOR_EVER = -1


class LiveTrainer:
    """Nothing is loaded in `__init__`: an exception there would end a restarting actor for good."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.training.threads)
        self._config = config

    def run(self) -> None:
        """Never returns. One step after another; what was posted during one is the next one's batch. A process that
        dies is started again by Ray, and with it this call: where to go on is in the store."""
        pause, editor = 0.0, None
        while True:
            try:
                editor = editor or self._editor()
                began = time.monotonic()
                release = editor.step()
                pause = 0.0
            except RoundConflict as conflict:
                log.info("%s", conflict)
                continue
            except Exception as error:  # a store may be silent for a while, and a config or model may be put right
                pause = min(max(2 * pause, LOOK_SECONDS), LONGEST_PAUSE)
                log.warning("Live edits wait: %s", error, exc_info=not isinstance(error, WiselineError))
                release = None
            if release is not None:
                record("wiseline_live_release_seconds", time.monotonic() - began)
                log.info("Release %d holds %d edits.", release.number, release.edits)
            else:
                time.sleep(pause or LOOK_SECONDS)

    def _editor(self) -> LiveEditor:
        config = self._config
        store, base = open_store(config.store, probe=True), load_base_model(config.model)
        texts = stored_texts(base, store, tokens=config.training.prefix_tokens, seed=config.training.seed)
        suffix = load_suffix(model_folder(config.model), base.layer, dtype=config.model.dtype)
        if torch.cuda.is_available():
            suffix.to("cuda")
        return LiveEditor(config, store, base, suffix, texts=texts)


def start_live_trainer(config: Config) -> Any:
    """The actor, at work. One that an endpoint left behind is ended first: its config may be another.

    It asks for no CPU: it works in bursts, and must not keep a round's workers from their places."""
    stop_live_trainer()
    trainer = (
        ray.remote(LiveTrainer)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            num_gpus=gpus_per_worker(config, whole_model=True),
            max_restarts=FOR_EVER,
            max_task_retries=FOR_EVER,
        )
        .remote(config)
    )
    trainer.run.remote()
    return trainer


def stop_live_trainer() -> None:
    """Nothing is lost: the log has what was posted."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
