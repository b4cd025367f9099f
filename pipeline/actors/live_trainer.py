"""The resident trainer: a Ray actor that stays beside an endpoint and turns what is posted into live releases."""

import threading
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
STOP_SECONDS = 10.0  # a trainer that is in the middle of a step has so long to end it
FOR_EVER = -1

_runs: list[Any] = []  # the call of `run` that this process made


class LiveTrainer:
    """Nothing is loaded in `__init__`: an exception there would end a restarting actor for good."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.training.threads)
        self._config = config
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Beside `run`, which ends after its step, where it has the time."""
        self._stopping.set()

    def run(self) -> None:
        """Until it is stopped. One step after another; what was posted during one is the next one's batch. A process
        that dies is started again by Ray, and with it this call: where to go on is in the store."""
        pause, editor = 0.0, None
        while not self._stopping.is_set():
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
                self._stopping.wait(pause or LOOK_SECONDS)

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
            max_concurrency=2,  # `stop` beside `run`
        )
        .remote(config)
    )
    _runs.append(trainer.run.remote())
    return trainer


def stop_live_trainer() -> None:
    """Nothing is lost: the log has what was posted. One that this process started has time to end its step: a call that
    was seen to end is none that Ray sees fail with the actor, and tells the user of. Any other is killed at once."""
    runs = [*_runs]
    _runs.clear()
    try:
        trainer = ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:  # there is none
        return
    trainer.stop.remote()
    if runs:
        ray.wait(runs, timeout=STOP_SECONDS)
    ray.kill(trainer)
