"""A 7B model on one GPU: training steps, trainers side by side, decoding: `python -m benchmarks.gpu_7b [--json]`.

Random weights in the shape of Llama-2-7B, bfloat16, layer 27, no Ray and no download (13 GB in a temporary folder).
Without a GPU it says that it was skipped. What is measured, each against its neighbour in the same run:

    steps      forward, backward and Adam on ΔW (float32), on the same rows: through the whole model over prompt and
               target, and as trainers take it, through the suffix over the target alone; FLOPs are counted by torch
    trainers   k processes that train on this GPU at the same time, as Ray's actors would with `gpus_per_trainer: 1/k`
    decoding   without a release; every row routed, read at its edit's keys (`matched`) and at its own (`own`)
    memories   bringing one side memory from the host to the GPU

Keys of the JSON object are those of `measure`. `--size tiny` runs all of it on any machine; its figures say nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.gpu_decoding import decoding, time_to_device
from benchmarks.gpu_steps import (
    SIZES,
    Size,
    measure_step,
    random_wordings,
    release_memory,
    side_by_side,
    step_through_the_suffix,
    step_through_the_whole_model,
    timed,
    train_beside_others,
)
from pipeline.config import ModelSection
from pipeline.models.base_model import load_base_model
from pipeline.models.suffix import load_suffix
from pipeline.training.activations import Activations, extract

DEMO = Path(__file__).parents[1] / "demo" / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--trainers", type=int, nargs="+", default=[1, 2, 4], help="how many at the same time")
    parser.add_argument("--train-in", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # this is one of them
    options = parser.parse_args(arguments)
    size, device = SIZES[options.size], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.train_in:
        print(json.dumps(train_beside_others(options.train_in, size, device)), flush=True)
        return
    if device.type == "cpu" and options.size == "7b":
        skipped = "Skipped: benchmarks.gpu_7b needs a GPU, and there is none here."
        print(json.dumps({"skipped": skipped}) if options.json else skipped)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), size, device)
        figures = measure(Path(folder), size, device)
        figures["trainers"] = list(side_by_side(Path(folder), options.size, options.trainers, device))
    show(figures)
    if options.json:
        print(json.dumps(figures))


def save_random_model(folder: Path, size: Size, device: torch.device) -> None:
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(size.config(), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    del model
    release_memory(device)


def measure(folder: Path, size: Size, device: torch.device) -> dict[str, Any]:
    """Everything in this process: with the whole model and, when that is gone, with the suffix."""
    activations, figures = measure_whole_model(folder, size, device)
    release_memory(device)
    seconds, suffix = timed(lambda: load_suffix(folder, size.layer, dtype="bfloat16").to(device), device)
    step = step_through_the_suffix(suffix, activations.to(device))
    full, short = figures["full"], measure_step(step, size, device)
    apart = abs(short["loss"] - full["loss"])
    assert apart < 0.02 * full["loss"], f"the two steps are not the same: {full['loss']} and {short['loss']}"
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "size": f"{size.layers} x {size.width} x {size.ffn}, layer {size.layer}, {size.rows} rows of "
        f"{size.prompt_tokens} + {size.target_tokens} tokens",
        "suffix": short | {"weights_gib": weights_gib(suffix), "load_seconds": seconds},
        "time_over_flops_ratio": (short["seconds"] / full["seconds"]) / (short["flops"] / full["flops"]),
        **figures,
    }


def measure_whole_model(folder: Path, size: Size, device: torch.device) -> tuple[Activations, dict[str, Any]]:
    section = ModelSection(path=str(folder), layer=size.layer, dtype="bfloat16")
    load_seconds, base = timed(lambda: load_base_model(section), device)
    wordings = random_wordings(size)
    extract(base, wordings)
    extract_seconds, activations = timed(lambda: extract(base, wordings), device)
    full = measure_step(step_through_the_whole_model(base, wordings, size), size, device)
    return activations, {
        "full": full | {"weights_gib": weights_gib(base.model), "load_seconds": load_seconds},
        "extract_tokens_per_second": size.rows * (size.prompt_tokens + size.target_tokens - 1) / extract_seconds,
        "decode": list(decoding(base, wordings, size)),
        "memory_to_device_seconds": time_to_device(base, size, device),
        "memory_mib": size.width * size.ffn * 2 / 2**20,
    }


def weights_gib(model: PreTrainedModel) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 2**30


def show(figures: dict[str, Any]) -> None:
    console = Console()
    full, suffix = figures["full"], figures["suffix"]
    table = Table("a step", "suffix", "full model", "ratio", title=f"{figures['machine']}: {figures['size']}")
    for name, key, digits in (
        ("milliseconds", "seconds", 1e3),
        ("TFLOPs", "flops", 1e-12),
        ("peak GiB", "peak_gib", 1.0),
        ("weights GiB", "weights_gib", 1.0),
        ("seconds to load", "load_seconds", 1.0),
    ):
        if full[key] is not None:
            row = (suffix[key], full[key])
            table.add_row(name, *(f"{digits * one:.3g}" for one in row), f"{row[0] / row[1]:.4f}")
    table.add_row("time over FLOPs", "", "", f"{figures['time_over_flops_ratio']:.3f}")
    console.print(table)
    table = Table("trainers", "steps a second", "over one", "peak GiB each", "GiB of the GPU in use")
    for one in figures["trainers"]:
        memory = ("–" if one[key] is None else f"{one[key]:.2f}" for key in ("peak_gib_each", "device_gib_in_use"))
        table.add_row(str(one["trainers"]), f"{one['steps_per_second']:.2f}", f"{one['over_one']:.2f}", *memory)
    console.print(table)
    table = Table("decoding, rows", "routed", "milliseconds a token", "over unrouted")
    for one in figures["decode"]:
        cost = (f"{1e3 * one['seconds_per_token']:.2f}", f"{one['over_unrouted']:.3f}")
        table.add_row(str(one["batch"]), one["routed"], *cost)
    console.print(table)
    console.print(
        f"extraction: {figures['extract_tokens_per_second']:.0f} tokens a second; a memory of "
        f"{figures['memory_mib']:.0f} MiB to the device: {1e3 * figures['memory_to_device_seconds']:.1f} ms"
    )


if __name__ == "__main__":
    main()
