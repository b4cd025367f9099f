"""What benchmarks/gpu_7b.py measures of training: a step through the suffix, one through the whole model, and trainers
that share a GPU."""

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedModel

from pipeline.models.base_model import BaseModel
from pipeline.models.suffix import load_suffix
from pipeline.models.value_matrix import value_module
from pipeline.training.activations import IGNORED, Activations
from pipeline.training.fit import edited_logits
from pipeline.training.tokens import Wording
from pipeline.wise.whitening import key_whitening

Step = Callable[[Tensor], Tensor]  # ΔW or V, D × F → loss
KEY_RIDGE, RATE = 0.1, 5e-2  # the defaults of `training`


@dataclass(frozen=True)
class Size:
    """Rows of a step are edits behind a context prefix, with their answers; see benchmarks/suffix.py."""

    layers: int
    layer: int
    width: int
    ffn: int
    heads: int
    vocabulary: int = 32_000
    rows: int = 64
    prompt_tokens: int = 36
    target_tokens: int = 4
    steps: int = 20
    answer_tokens: int = 64
    batches: tuple[int, ...] = (1, 16)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )


SIZES = {
    "7b": Size(layers=32, layer=27, width=4096, ffn=11_008, heads=32),
    "tiny": Size(
        layers=4, layer=2, width=64, ffn=160, heads=4, vocabulary=2048, rows=4, steps=2, answer_tokens=4, batches=(1, 2)
    ),
}


def random_wordings(size: Size) -> list[Wording]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2000, (size.rows, size.prompt_tokens + size.target_tokens), generator=generator).tolist()
    return [Wording(tuple(row[: size.prompt_tokens]), tuple(row[size.prompt_tokens :])) for row in ids]


def step_through_the_suffix(suffix: PreTrainedModel, activations: Activations) -> Step:
    """What `fit` does in a step: V in whitened coordinates, layers above L, target tokens."""
    whitening = key_whitening(activations.target_keys_MF(), ridge=KEY_RIDGE)

    def loss(steps_DF: Tensor) -> Tensor:
        logits_BTV = edited_logits(suffix, activations, whitening(steps_DF))
        return cross_entropy(logits_BTV.float().flatten(0, 1), activations.labels_NT.flatten(), ignore_index=IGNORED)

    return loss


def step_through_the_whole_model(base: BaseModel, wordings: Sequence[Wording], size: Size) -> Step:
    """All layers on prompt and target; ΔW (float32) from the last prompt token on."""
    ids_BT = torch.tensor([[*one.prompt_ids, *one.target_ids] for one in wordings], device=base.device)
    labels_BT = ids_BT[:, size.prompt_tokens :]
    first = size.prompt_tokens - 1

    def loss(delta_DF: Tensor) -> Tensor:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            said_BTD = output[:, first:] + inputs[0][:, first:].float() @ delta_DF.T
            return torch.cat([output[:, :first], said_BTD.to(output.dtype)], dim=1)

        handle = value_module(base.model, base.layer).register_forward_hook(add)
        try:
            logits_BTV = base.model(input_ids=ids_BT, use_cache=False).logits[:, first:-1]
        finally:
            handle.remove()
        return cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten())

    return loss


def measure_step(step: Step, size: Size, device: torch.device) -> dict[str, Any]:
    """Loss before any step, median seconds of a step with its optimiser, its FLOPs, and the most memory it took
    beside all that is loaded."""
    with torch.no_grad():
        loss = float(step(torch.zeros(size.width, size.ffn, device=device)))
    take = optimiser_step(step, size, device)
    with FlopCounterMode(display=False) as counter:
        take()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [timed(take, device)[0] for _ in range(size.steps)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    flops = float(counter.get_total_flops())
    return {"loss": loss, "seconds": statistics.median(seconds), "flops": flops, "peak_gib": peak}


def optimiser_step(step: Step, size: Size, device: torch.device) -> Callable[[], None]:
    moved_DF = torch.zeros(size.width, size.ffn, device=device, requires_grad=True)
    optimiser = torch.optim.Adam([moved_DF], lr=RATE)

    def take() -> None:
        optimiser.zero_grad()
        step(moved_DF).backward()
        optimiser.step()

    return take


def side_by_side(
    folder: Path, size_name: str, counts: Sequence[int], device: torch.device
) -> Iterator[dict[str, float | None]]:
    """k trainers in processes of their own, which begin together."""
    release_memory(device)
    alone = None
    for count in counts:
        command = [sys.executable, "-m", "benchmarks.gpu_7b", "--size", size_name, "--train-in", str(folder)]
        running = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n", "a trainer did not start"
        in_use = None
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            in_use = (total - free) / 2**30
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [json.loads(process.communicate()[0]) for process in running]
        rate = sum(one["steps"] for one in found) / max(one["seconds"] for one in found)
        alone = alone or rate / count
        yield {
            "trainers": count,
            "steps_per_second": rate,
            "over_one": rate / alone,
            "peak_gib_each": found[0]["peak_gib"],
            "device_gib_in_use": in_use,
        }


def train_beside_others(folder: Path, size: Size, device: torch.device) -> dict[str, float | None]:
    """One trainer: random activations (a step costs the same whatever they say), then steps when it is told to."""
    suffix = load_suffix(folder, size.layer, dtype="bfloat16").to(device)
    take = optimiser_step(step_through_the_suffix(suffix, random_activations(size, device)), size, device)
    for _ in range(2):
        take()
    timed(take, device)
    print("ready", flush=True)
    sys.stdin.readline()
    steps = 5 * size.steps
    seconds, _ = timed(lambda: [take() for _ in range(steps)], device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"steps": steps, "seconds": seconds, "peak_gib": peak}


def random_activations(size: Size, device: torch.device) -> Activations:
    generator = torch.Generator().manual_seed(0)
    N, T, P = size.rows, size.target_tokens, size.prompt_tokens - 1
    past = (N, size.heads, P, size.width // size.heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Activations(
        states_ND=random(N, size.width),
        keys_NTF=random(N, T, size.ffn),
        hidden_NTD=random(N, T, size.width),
        labels_NT=torch.randint(3, 2000, (N, T), generator=generator),
        positions_NT=torch.arange(P, P + T).expand(N, T).contiguous(),
        past=[(random(*past), random(*past)) for _ in range(size.layers - size.layer - 1)],
        past_mask_NP=torch.ones(N, P, dtype=torch.long),
    ).to(device)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - started, result


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
