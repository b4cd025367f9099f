"""The one configuration file, `ray_config.yaml`, as frozen pydantic sections.

Every key has its default here, so a file names only what it changes. Unknown keys are refused with the nearest valid
name; `--set section.key=value` overrides the file. The config is hashed (`Config.digest`) into everything computed
from it, so a field that cannot change results (addresses, ports, counts of workers) belongs to `resources` or `serve`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from pipeline.config_tree import Tree, apply_override, explained, read_tree
from pipeline.errors import ConfigError

FILE_NAME = "ray_config.yaml"
PAPER_DENSITY = 0.2  # arXiv:2405.14768, table 8


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    path: str = Field("demo/model", description="folder with config.json, safetensors and tokenizer, or a hub name")
    layer: int | Literal["auto"] = Field("auto", description="layer of the value matrix; auto: the paper's 27 of 32")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype of the base model")
    placement: Literal["auto", "one", "spread"] = Field(
        "auto", description="auto: the first GPU, and the next ones where it is too small; spread: all GPUs evenly"
    )


class StoreSection(Section):
    uri: str = Field(".wiseline/store", description="folder or s3://bucket/prefix")
    s3_endpoint_url: str | None = Field(
        None, description="for S3 servers other than AWS; keys come from AWS_* variables"
    )


class EditsSection(Section):
    max_prompt_chars: int = Field(8192, gt=0)
    max_target_chars: int = Field(4096, gt=0)


class ShardsSection(Section):
    edits_per_shard: int = Field(
        80, gt=0, description="most edits one shard holds; k times so many fill a memory (docs/experiments.md)"
    )
    shards_per_memory: int = Field(2, gt=0, description="k: shards merged into one side memory; 2 in the paper")
    density: float | Literal["auto"] = Field(
        "auto", description="ρ: share of the value matrix one shard may move; auto: 0.2, less where k do not fit"
    )
    masks: Literal["disjoint", "overlapping"] = Field("disjoint", description="paper: overlapping")

    @model_validator(mode="after")
    def disjoint_masks_fit(self) -> "ShardsSection":
        if not 0 < self.rho <= 1:
            raise ValueError(f"density is a share above 0 and at most 1, not {self.density}")
        if self.masks == "disjoint" and self.rho * self.shards_per_memory > 1 + 1e-9:
            raise ValueError(
                f"{self.shards_per_memory} disjoint masks of density {self.density} do not fit into one matrix; "
                "lower shards.density or shards.shards_per_memory, or set shards.masks to overlapping"
            )
        return self

    @property
    def rho(self) -> float:
        """ρ as trained with: the paper's 0.2, or an even share of the matrix for more than five disjoint shards."""
        if self.density != "auto":
            return self.density
        return min(PAPER_DENSITY, 1 / self.shards_per_memory) if self.masks == "disjoint" else PAPER_DENSITY


class TrainingSection(Section):
    procedure: Literal["default", "paper"] = Field(
        "default", description="paper: one edit after another by SGD, with the margin loss (docs: pipeline/presets.py)"
    )
    max_steps: int = Field(400, gt=0, description="per shard; with procedure paper per edit")
    learning_rate: float = Field(5e-2, gt=0, description="of Adam (procedure paper: SGD), on ΔW in float32")
    key_ridge: float = Field(
        0.1,
        ge=1e-9,
        description="λ of the coordinates ΔW is trained in (pipeline/wise/whitening.py); large: plain",
    )
    batch_prompts: int = Field(64, gt=0, description="prompts per optimiser step")
    stop_loss: float = Field(0.05, gt=0, description="nats per target; an edit below it leaves the batch")
    sibling_penalty: float = Field(
        0.0, ge=0, description="λ_s, on what the delta adds at its siblings' keys; 1e-3 helps ties without polish"
    )
    prefixes: int = Field(4, ge=0, description="generated context prefixes per edit")
    prefix_tokens: int = Field(10, gt=0)
    unrelated_prompts: tuple[str, ...] = Field(
        (), description="prompts that no edit may touch; empty: text the base model writes (procedure paper)"
    )
    margins: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        (5.0, 20.0, 10.0), description="α, β, γ of the margin loss (procedure paper)"
    )
    clamp: float = Field(1.0, gt=0, description="largest |ΔW| of one entry (procedure paper)")
    replay: bool = Field(False, description="the paper's appendix B.3: past edits of a shard keep their margin")
    seed: int = Field(0, ge=0, lt=2**31)
    threads: int = Field(1, gt=0, description="CPU threads per actor; sums, and so the last bits, depend on it")


class MergeSection(Section):
    method: Literal[
        "linear", "sum", "slerp", "sign", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "ram", "keyed"
    ] = "keyed"
    density: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        "auto", description="share of the trained entries that trimming or dropping keeps; auto: the method's own"
    )
    keyed_ridge: float = Field(1.0, gt=0, description="λ of the ridge solve")
    polish_steps: int = Field(
        300, ge=0, description="most optimiser steps on a merged memory whose edits do not all hold; 0: none"
    )


Signal = Literal["keys", "subject", "encoder", "relation"]


class RouterSection(Section):
    method: Literal["scope", "activation"] = Field(
        "scope", description="activation: the paper's Δ_act > ε; it names no edit, so it needs addressing own"
    )
    activation_ratio: float = Field(
        1.0, gt=0, description="ε, as a share of the smallest Δ_act among the edits; the authors' code: 0.88"
    )
    signals: Literal["auto"] | Annotated[tuple[Signal, ...], Len(min_length=1)] = Field(
        "auto", description="auto: keys and subject; encoder and relation too where the extra `encoder` is installed"
    )
    false_positive_rate: float = Field(0.005, gt=0, lt=1)
    addressing: Literal["matched", "own"] = Field(
        "matched", description="read the side memory at the matched edit's keys, or at the prompt's own as in the paper"
    )

    @model_validator(mode="after")
    def addressing_can_be_had(self) -> "RouterSection":
        if self.method == "activation" and self.addressing == "matched":
            raise ValueError("activation routing names no edit to read the side memory at; set addressing to own")
        return self


class RoundSection(Section):
    min_reliability: float = Field(0.9, ge=0, le=1)
    min_generalization: float = Field(0.8, ge=0, le=1)
    min_locality: float = Field(0.9, ge=0, le=1)
    evaluate_edits: int = Field(1000, gt=0, description="at most so many edits are evaluated, chosen by the seed")


class ResourcesSection(Section):
    ray_address: str | None = Field(None, description="a running cluster; default: RAY_ADDRESS, else a local Ray")
    gpus_per_trainer: NonNegativeFloat | Literal["auto"] = Field(
        "auto", description="auto: 1 where the cluster has GPUs, else 0"
    )
    cpus_per_trainer: float = Field(0.25, ge=0)
    gpus_per_model: NonNegativeFloat | Literal["auto"] = Field(
        "auto", description="of a worker that holds the whole model, on one machine; auto: as many as a trainer"
    )
    stages: Literal["auto", "together", "apart"] = Field(
        "auto",
        description="apart: extraction, training and evaluation start workers of their own, which hold the part of the "
        "model they need; together: the same workers do all; auto: together where the weights are at most 1 GiB",
    )
    placement: Literal["DEFAULT", "SPREAD"] = "DEFAULT"
    max_restarts: int = Field(2, ge=0)


class ServeSection(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, gt=0)
    gpus_per_replica: NonNegativeFloat | Literal["auto"] = Field(
        "auto", description="auto: 1 where the cluster has GPUs, else 0; a fraction leaves room for rounds on one GPU"
    )
    max_batch_requests: int = Field(64, gt=0, description="most answers that are written at once")
    max_batch_tokens: int = Field(
        512, gt=0, description="most tokens one step reads; longer prompts are read in pieces, beside running answers"
    )
    cache_gib: PositiveFloat | Literal["auto"] = Field(
        "auto", description="keys and values of running answers; auto: whole contexts, in a quarter of what is free"
    )
    max_queued_requests: int = Field(256, gt=0)
    max_new_tokens: int = Field(256, gt=0, description="most tokens one answer may have")
    max_prompt_tokens: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="longest prompt that is read; auto: what the model's context holds"
    )
    keys_file: str | None = Field(
        None,
        description="API keys (`wiseline keys create`); without it whoever reaches the port may do everything",
    )
    first_token_seconds: float = Field(60.0, gt=0, description="an answer that has not begun by then is given up (503)")
    next_token_seconds: float = Field(
        60.0, gt=0, description="so is one that has stood still for so long; its whole length has no limit"
    )
    min_release_seconds: float = Field(
        10.0, ge=0, description="how long a request waits for the release that its x-wiseline-min-release names"
    )
    drain_seconds: float = Field(60.0, ge=0, description="how long answers that have begun may take after a stop")
    poll_seconds: PositiveFloat | Literal["auto"] = Field(
        "auto", description="how often a replica looks for a newer release; auto: 0.2 in a folder, 1 on S3"
    )
    live_edits: bool | Literal["auto"] = Field(
        "auto", description="posted edits take effect within seconds; auto: where no GPU would be held for it all day"
    )
    device_memory_gib: PositiveFloat | Literal["auto"] = Field(
        "auto", description="room for side memories on the GPU, others wait in host memory; auto: half of what is free"
    )


class ObserveSection(Section):
    logs: Literal["text", "json"] = Field(
        "text", description="json: each line that is logged is an object, with the ids of its round, shard or request"
    )
    traces: str | None = Field(
        None, description="where spans go: an address that takes OTLP over HTTP (extra `tracing`), or a file"
    )


class Config(Section):
    model: ModelSection = ModelSection()
    store: StoreSection = StoreSection()
    edits: EditsSection = EditsSection()
    shards: ShardsSection = ShardsSection()
    training: TrainingSection = TrainingSection()
    merge: MergeSection = MergeSection()
    router: RouterSection = RouterSection()
    round: RoundSection = RoundSection()
    resources: ResourcesSection = ResourcesSection()
    serve: ServeSection = ServeSection()
    observe: ObserveSection = ObserveSection()

    @model_validator(mode="after")
    def the_papers_procedure_goes_with_its_own(self) -> "Config":
        if self.training.procedure == "paper" and (self.merge.polish_steps or self.router.addressing == "matched"):
            raise ValueError(
                "training.procedure paper trains on whole prompts and at their own keys; set merge.polish_steps to 0 "
                "and router.addressing to own, or take preset paper"
            )
        return self

    @model_validator(mode="after")
    def live_edits_can_be_had(self) -> "Config":
        if self.serve.live_edits is True and not self.teaches_live:
            raise ValueError(
                "live edits are trained by the default procedure and reached by the scope router; set serve.live_edits "
                "to false, or training.procedure to default and router.method to scope"
            )
        return self

    @property
    def teaches_live(self) -> bool:
        return self.training.procedure == "default" and self.router.method == "scope"

    def digest(self, *sections: str) -> str:
        """Hash of the named sections: what is computed from them alone is found again by it."""
        chosen = self.model_dump(mode="json", include=set(sections))
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    def overridden(self, overrides: Sequence[str]) -> "Config":
        """With `section.key=value` overrides on top; raises ConfigError like `load_config`."""
        return _validated(self.model_dump(mode="json"), overrides)


def load_config(path: str | Path | None = None, *, overrides: Sequence[str] = ()) -> Config:
    """Config from `path` (default: ./ray_config.yaml if there is one) with `section.key=value` overrides on top.

    Raises ConfigError naming the key, and the nearest valid one when it is unknown.
    """
    file = Path(path) if path is not None else Path(FILE_NAME)
    tree: Tree = {}
    if file.exists():
        tree = read_tree(file, sections=list(Config.model_fields))
    elif path is not None:
        raise ConfigError(
            f"There is no config file at {file}; copy the repository's {FILE_NAME} there or leave out --config."
        )
    return _validated(tree, overrides)


def _validated(tree: Tree, overrides: Sequence[str]) -> Config:
    for override in overrides:
        apply_override(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise explained(error, Config) from None
    return _with_absolute_paths(config)


def _with_absolute_paths(config: Config) -> Config:
    """Actors do not run in the folder a command was started in."""
    model, store, serve, observe = config.model, config.store, config.serve, config.observe
    if Path(model.path).is_dir():
        model = model.model_copy(update={"path": str(Path(model.path).resolve())})
    if "://" not in store.uri:
        store = store.model_copy(update={"uri": str(Path(store.uri).expanduser().resolve())})
    if serve.keys_file is not None:
        serve = serve.model_copy(update={"keys_file": str(Path(serve.keys_file).expanduser().resolve())})
    if observe.traces is not None and "://" not in observe.traces:
        observe = observe.model_copy(update={"traces": str(Path(observe.traces).expanduser().resolve())})
    return config.model_copy(update={"model": model, "store": store, "serve": serve, "observe": observe})
