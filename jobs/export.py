"""`wiseline export`: a release as a folder that other programs load."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, print_json
from pipeline.config import load_config
from pipeline.errors import NotFound


def export_command(
    to: Annotated[Path, typer.Option(help="Folder, new or empty.", show_default=False)],
    format: Annotated[str, typer.Option(help="hf, lora or safetensors.")] = "hf",
    release: Annotated[int | None, typer.Option(help="Number of the release.", min=1, show_default="newest")] = None,
    tolerance: Annotated[
        float, typer.Option(help="lora: share of ‖ΔW‖ that the adapter may miss.", min=0.0, max=1.0)
    ] = 0.01,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_line: JsonOption = False,
) -> None:
    """Write a release as a folder that other programs load.

    hf: with the base model, for transformers and this package; routed. lora: each memory as a PEFT adapter; unrouted.
    safetensors: memories, router and bank, for other runtimes.
    """
    settings = load_config(config, overrides=set_ or ())

    from pipeline.export.lora import UNROUTED
    from pipeline.export.releases import export_release
    from pipeline.models.base_model import identify
    from pipeline.models.loaded_release import newest_for
    from pipeline.storage.object_store import open_store
    from pipeline.storage.releases import read_release

    store = open_store(settings.store)
    published = newest_for(store, identify(settings.model)) if release is None else read_release(store, release)
    if published is None:
        raise NotFound(f"Nothing is published in {store.uri} yet; run `wiseline ingest` and `wiseline round`.")
    exported = export_release(store, published, settings.model, format=format, to=to, tolerance=tolerance)
    for adapter in exported.details.get("adapters", ()):
        typer.echo(
            f"{adapter['name']}: rank {adapter['rank']} of {adapter['full_rank']}, "
            f"misses {adapter['error']:.4f} of ‖ΔW‖ (tolerance {tolerance})"
        )
    typer.echo(f"Release {published.number} in {to}: {exported.files} files, {exported.bytes / 2**20:.1f} MiB.")
    if format == "hf":
        typer.echo("Load it with `import pipeline.export` and AutoModelForCausalLM.from_pretrained; see its README.md.")
    if format == "lora":
        typer.echo(UNROUTED)
    if json_line:
        print_json({"release": published.number, "format": format, "to": str(to), **asdict(exported)})
