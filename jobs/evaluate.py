"""`wiseline evaluate`: how well edits of a data set hold on a model, by the code of a real round."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import Config, load_config

if TYPE_CHECKING:
    from jobs.evaluation_sets import EvaluationSet
    from pipeline.config import EditsSection
    from pipeline.evaluation.measure import Measurement

SWEEP_FOLDER = Path("sweep")


@dataclass(frozen=True)
class Setting:
    """What is compared. `shards`: K; None fills shards and memories as the config says. `merge` and `router` None: the
    preset's."""

    model: Path
    preset: str = "default"
    variant: str = "merge"
    merge: str | None = None
    router: str | None = None
    shards: int | None = None
    seed: int = 0
    overrides: tuple[str, ...] = ()
    config: Path | None = None


def evaluate_command(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    edits: Annotated[Path, typer.Option(help="File of edits; with --sweep also a folder of data sets.")],
    format: Annotated[
        str, typer.Option(help="auto, zsre, counterfact, hallucination, temporal or jsonl.", metavar="NAME")
    ] = "auto",
    n: Annotated[int | None, typer.Option(help="Only the first N edits.", min=1, show_default="all")] = None,
    variant: Annotated[str, typer.Option(help="merge: one memory; retrieve: a memory per shard.")] = "merge",
    preset: Annotated[str, typer.Option(help="default or paper.")] = "default",
    merge: Annotated[str | None, typer.Option(help="Merge method, such as ties.", metavar="NAME")] = None,
    router: Annotated[str | None, typer.Option(help="scope or activation.", metavar="NAME")] = None,
    shards: Annotated[int | None, typer.Option(help="K; by default as many as the config fills.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of prefixes, masks and batches.")] = 0,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="T = 1, 10, 100, 1000 edits, and write tables and a plot.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for what --sweep writes: results.md, results.csv, results.svg.")
    ] = SWEEP_FOLDER,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Measure an editor on a data set.

    Runs a whole round in a temporary store and asks every edit, its held-out paraphrases and its locality prompts:
    greedy exact match first, the literature's teacher-forced metrics beside it. Nothing is published anywhere.
    """
    from jobs.evaluation_sweep import run_sweep

    setting = Setting(
        model=model,
        preset=preset,
        variant=variant,
        merge=merge,
        router=router,
        shards=shards,
        seed=seed,
        overrides=tuple(set_ or ()),
        config=config,
    )
    if sweep:
        rows = run_sweep(setting, edits, format=format, most=n, out=out)
        result: dict[str, Any] = {"rows": rows, "out": str(out)}
    else:
        result = evaluate(setting, edits, format=format, n=n)
        show_result(result)
    if json_line:
        print_json(result)


def evaluate(setting: Setting, edits: Path, *, format: str = "auto", n: int | None = None) -> dict[str, Any]:
    """What --json prints. Raises ConfigError or NotFound about what was asked for, and what a round raises."""
    from jobs.evaluation_sets import read_evaluation_set

    chosen = read_evaluation_set(edits, format=format, n=n, limits=limits(setting))
    with tempfile.TemporaryDirectory(prefix="wiseline-evaluate-") as folder:
        config = settled(
            setting,
            edits=len(chosen.edits),
            store=Path(folder) / "store",
            out_of_scope=[text for edit in chosen.edits for text in edit.out_of_scope],
        )
        return _evaluate_in(Path(folder), config, chosen, setting)


def limits(setting: Setting) -> "EditsSection":
    """How long a prompt and a target may be; the rest of the config needs the data set."""
    return load_config(setting.config, overrides=[one for one in setting.overrides if one.startswith("edits.")]).edits


def settled(setting: Setting, *, edits: int, store: Path, out_of_scope: Sequence[str] = ()) -> Config:
    """The config of this evaluation: the file's, then the preset, then what the options say, then --set. The store, the
    seed and the open gate are the evaluation's own."""
    from pipeline.errors import ConfigError
    from pipeline.presets import apply_preset

    if setting.variant not in ("merge", "retrieve"):
        raise ConfigError(f"--variant {setting.variant!r} is unknown; it is merge or retrieve.")
    config = apply_preset(load_config(setting.config), setting.preset, model_path=str(setting.model))
    said = []
    if setting.merge:
        said.append(f"merge.method={setting.merge.replace('-', '_')}")
    if setting.router:
        said.append(f"router.method={setting.router}")
    if setting.router == "activation":  # it names no edit whose keys could be read
        said.append("router.addressing=own")
    config = config.overridden([*said, *setting.overrides])
    config = config.overridden([*_layout(config, setting, edits=edits), *setting.overrides])
    sections = config.model_dump()
    sections["model"]["path"] = str(setting.model.resolve() if setting.model.is_dir() else setting.model)
    sections["store"] = {"uri": str(store)}
    sections["training"]["seed"] = setting.seed
    if setting.preset == "paper" and out_of_scope:  # the paper's x_i; without any, text the base model writes
        sections["training"]["unrelated_prompts"] = tuple(out_of_scope)
    sections["round"] = {"min_reliability": 0, "min_generalization": 0, "min_locality": 0, "evaluate_edits": edits}
    return Config.model_validate(sections)


def _layout(config: Config, setting: Setting, *, edits: int) -> list[str]:
    """merge: all shards in one memory. retrieve: a memory per shard, and without K the config's own memories. Shards
    are filled one after another, so few edits may fill fewer than K."""
    if setting.variant == "retrieve" and setting.shards is None:
        return []
    shards = min(setting.shards or math.ceil(edits / config.shards.edits_per_shard), edits)
    per_memory = shards if setting.variant == "merge" else 1
    return [f"shards.edits_per_shard={math.ceil(edits / shards)}", f"shards.shards_per_memory={per_memory}"]


def _evaluate_in(folder: Path, config: Config, chosen: "EvaluationSet", setting: Setting) -> dict[str, Any]:
    import ray

    from jobs.ingest_edits import ingest
    from jobs.round_progress import RoundProgress
    from pipeline.actors.results import fetch
    from pipeline.actors.worker import start_worker
    from pipeline.errors import ConfigError
    from pipeline.rounds import run_round

    file = folder / "edits.jsonl"
    file.write_text("".join(f"{edit.model_dump_json()}\n" for edit in chosen.edits), encoding="utf-8")
    ingest(config, [str(file)])
    with RoundProgress() as progress:
        result = run_round(config, observe=progress)
    measured = result.measured
    assert measured is not None, "a fresh store has news"
    if not result.release.edits:
        raise ConfigError(f"None of the edits fits the context of {config.model.path}; take shorter ones.")
    worker = start_worker(config)
    try:
        studied = fetch(worker.study.remote(result.release, chosen.cases, measured))
    finally:
        ray.kill(worker)
    n = result.release.edits
    seconds: dict[str, float] = result.report["seconds"]
    making = sum(taken for phase, taken in seconds.items() if phase not in ("evaluate", "publish"))
    stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
    served = sum((folder / "store" / reference.path).stat().st_size for reference in result.release.objects)
    return {
        "rel_em": measured.reliability,
        "gen_em": measured.generalization,
        "loc_em": measured.locality,
        **{name: value for name, value in asdict(studied).items() if name.endswith("_tf")},
        **routing(measured),
        "s_per_edit": round(making / n, 4),
        "n": n,
        "variant": setting.variant,
        "merge": config.merge.method,
        "router": config.router.method,
        "shards": len(result.report["shards"]),
        "seed": setting.seed,
        "preset": setting.preset,
        "format": chosen.format,
        "memories": result.report["memories"],
        "rel_em_chat": measured.reliability_chat,
        "loc_em_by_kind": measured.locality_by_kind,
        "routed": measured.routed,
        "retention": list(studied.retention),
        **{name: getattr(studied, name) for name in ("perplexity", "perplexity_unedited", "ood", "ood_unedited")},
        "polish": result.report["polish"],
        "seconds": seconds,
        "bytes_per_edit": {"served": served // n, "stored": stored // n},
        "left_out": len(result.report["too_long"]) + chosen.refused,
        "model": str(setting.model),
    }


def routing(measured: "Measurement") -> dict[str, float | None]:
    """Shares: of all locality prompts those that reach a memory, of the paraphrases those that do not reach the memory
    for their own edit's sake."""
    local = [(kind, share) for kind, share in measured.routed.items() if kind.startswith("locality.")]
    asked = measured.asked
    prompts = sum(asked[kind] for kind, _ in local)
    reached = measured.reached.get("generalization")
    return {
        "route_fpr": sum(share * asked[kind] for kind, share in local) / prompts if prompts else None,
        "route_fnr": None if reached is None else 1 - reached,
    }


def show_result(result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table("", "exact match", "teacher-forced", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, key in (("reliability", "rel"), ("generalization", "gen"), ("locality", "loc")):
        table.add_row(name, _shown(result[f"{key}_em"]), _shown(result[f"{key}_tf"]))
    for kind, share in result["loc_em_by_kind"].items():
        table.add_row(f"  {kind.replace('_', ' ')}", _shown(share), "")
    console.print(table)
    console.print(
        f"Routing: {_shown(result['route_fpr'])} false positives, {_shown(result['route_fnr'])} false negatives"
    )
    console.print("Reliability by age, oldest first: " + "  ".join(_shown(share) for share in result["retention"]))
    if result["ood"] is not None:
        console.print(
            f"Passages: sure of {_shown(result['ood'])} of the tokens, unedited {_shown(result['ood_unedited'])}"
        )
    if result["perplexity"] is not None:
        console.print(
            f"Perplexity of the targets: {result['perplexity']:.2f}, unedited {result['perplexity_unedited']:.2f}"
        )
    phases = ", ".join(f"{phase} {taken:.1f}" for phase, taken in result["seconds"].items() if phase != "evaluate")
    console.print(f"{result['s_per_edit']:.3f} s per edit ({phases})")
    size = result["bytes_per_edit"]
    console.print(f"{size['served'] / 1024:.0f} KiB served and {size['stored'] / 1024:.0f} KiB stored per edit")
    console.print(
        f"{result['n']} edits in {result['shards']} shards and {result['memories']} memories, "
        f"{result['preset']} preset, {result['merge']}, router {result['router']}, seed {result['seed']}",
        style="dim",
    )
    if result["left_out"]:
        console.print(
            f"Left out: {result['left_out']} rows that are no edits, repeat one, or are too long", style="dim"
        )


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
