"""A training step through the suffix alone, on target tokens alone: `python -m benchmarks.suffix [--json]`.

A random Llama of 24 layers and about 300 M parameters, edited at layer 20. The same step twice, on the same rows: once
through the whole model over prompt and target, once through the suffix from extracted activations, as trainers take it.
Both steps are measured in one run on one thread; FLOPs are counted by torch while the steps run.

    time_over_flops_ratio   (suffix time / full time) / (suffix FLOPs / full FLOPs); 1 is as good as FLOPs allow
    resident_over_suffix    bytes of all tensors of a process that loaded a trainer's weights, over those of the
                            layers above L, the final norm and the head in the checkpoint
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipeline.config import ModelSection
from pipeline.models.base_model import BaseModel, load_base_model
from pipeline.models.suffix import load_suffix
from pipeline.models.value_matrix import value_module
from pipeline.training.activations import IGNORED, extract
from pipeline.training.fit import edited_logits
from pipeline.training.tokens import Wording
from pipeline.wise.whitening import key_whitening

DEMO = Path(__file__).parents[1] / "demo" / "model"
LAYER, LAYERS, WIDTH, FFN, VOCABULARY = 20, 24, 896, 2432, 32_000
ROWS, PROMPT_TOKENS, TARGET_TOKENS = 48, 36, 4  # a prompt behind a context prefix, and its answer with the end
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder))
        suffix = load_suffix(Path(folder), LAYER, dtype="float32")
        resident, needed = resident_bytes(), suffix_bytes(Path(folder))
        base = load_base_model(ModelSection(path=folder, layer=LAYER))
        wordings = random_wordings()
        activations = extract(base, wordings)
        whitening = key_whitening(activations.target_keys_MF(), ridge=0.1)

        def suffix_step(steps_DF: Tensor) -> Tensor:
            logits_BTV = edited_logits(suffix, activations, whitening(steps_DF))
            return cross_entropy(logits_BTV.flatten(0, 1), activations.labels_NT.flatten(), ignore_index=IGNORED)

        ids_BT, labels_BT = whole_rows(wordings)

        def full_step(delta_DF: Tensor) -> Tensor:
            logits_BTV = with_delta(base, ids_BT, delta_DF)
            return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED)

        losses = [float(step(torch.zeros(WIDTH, FFN))) for step in (suffix_step, full_step)]
        assert abs(losses[0] - losses[1]) < 1e-3, f"the two steps are not the same: {losses}"
        flops = [count_flops(step) for step in (suffix_step, full_step)]
        seconds = time_in_turns([suffix_step, full_step])
        parameters = sum(parameter.numel() for parameter in base.model.parameters())
    figures = {
        "parameters": parameters,
        "suffix_seconds": seconds[0],
        "full_seconds": seconds[1],
        "suffix_flops": flops[0],
        "full_flops": flops[1],
        "time_over_flops_ratio": (seconds[0] / seconds[1]) / (flops[0] / flops[1]),
        "resident_over_suffix": resident / needed,
    }
    table = Table("", "suffix", "full model", "ratio", title=f"{parameters / 1e6:.0f} M parameters, layer {LAYER}")
    table.add_row("seconds a step", *(f"{one:.3f}" for one in seconds), f"{seconds[0] / seconds[1]:.4f}")
    table.add_row("GFLOPs a step", *(f"{one / 1e9:.0f}" for one in flops), f"{flops[0] / flops[1]:.4f}")
    table.add_row("time over FLOPs", "", "", f"{figures['time_over_flops_ratio']:.3f}")
    table.add_row("resident over suffix", "", "", f"{figures['resident_over_suffix']:.3f}")
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


def save_random_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=14,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def random_wordings() -> list[Wording]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2000, (ROWS, PROMPT_TOKENS + TARGET_TOKENS), generator=generator).tolist()
    return [Wording(tuple(row[:PROMPT_TOKENS]), tuple(row[PROMPT_TOKENS:])) for row in ids]


def whole_rows(wordings: list[Wording]) -> tuple[Tensor, Tensor]:
    """Prompt and target in one row, and the labels of the target alone."""
    ids_BT = torch.tensor([[*one.prompt_ids, *one.target_ids] for one in wordings])
    labels_BT = ids_BT.clone()
    labels_BT[:, :PROMPT_TOKENS] = IGNORED
    return ids_BT, labels_BT


def with_delta(base: BaseModel, ids_BT: Tensor, delta_DF: Tensor) -> Tensor:
    """The whole model with W a + ΔW a from the last prompt token on."""

    def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added_BTD = inputs[0][:, PROMPT_TOKENS - 1 :] @ delta_DF.T
        return torch.cat([output[:, : PROMPT_TOKENS - 1], output[:, PROMPT_TOKENS - 1 :] + added_BTD], dim=1)

    handle = value_module(base.model, base.layer).register_forward_hook(add)
    try:
        logits: Tensor = base.model(input_ids=ids_BT, use_cache=False).logits
    finally:
        handle.remove()
    return logits


def run(step: Callable[[Tensor], Tensor]) -> None:
    """Forward and backward; the optimiser's part is the same for both and left out."""
    step(torch.zeros(WIDTH, FFN, requires_grad=True)).backward()


def count_flops(step: Callable[[Tensor], Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        run(step)
    return int(counter.get_total_flops())


def time_in_turns(steps: list[Callable[[Tensor], Tensor]]) -> list[float]:
    """Median seconds of each, taken in turns so that a busy machine slows all of them alike."""
    taken: list[list[float]] = [[] for _ in steps]
    for step in steps:
        run(step)
    for _ in range(STEPS):
        for step, seconds in zip(steps, taken, strict=True):
            started = time.perf_counter()
            run(step)
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def resident_bytes() -> int:
    """Of all tensors alive in this process, each storage once."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, Tensor)
    }
    return sum(storages.values())


def suffix_bytes(folder: Path) -> int:
    """Of the tensors above the layer, the final norm and the head, as the checkpoint names them."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                parts = name.split(".")
                above = parts[1] == "layers" and int(parts[2]) > LAYER
                if above or name in ("model.norm.weight", "lm_head.weight"):
                    total += tensors.get_tensor(name).nbytes
    return total


if __name__ == "__main__":
    main()
