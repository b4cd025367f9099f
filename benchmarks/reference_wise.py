"""WISE as the paper describes it, plainly: one process, one edit after another, the whole model forward and backward in
every step. The yardstick in this repository for what the pipeline's speed is worth, and a second opinion on its
`paper` preset. Only the data, the answers' measurement and W_v's place in the model come from `pipeline/`.

    python -m benchmarks.reference_wise --model DIR --edits FILE --n 200 --steps 10 --variant merge

The edits file is JSON lines as in closed_world_1k: prompt, target_new, subject, rephrase, rephrase2, loc_prompt, and
loc_train, the unrelated prompt of the margin loss.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.config import ModelSection
from pipeline.edits import Edit, LocalityPrompt
from pipeline.evaluation.measure import measure
from pipeline.models.base_model import BaseModel, load_base_model, load_config, model_folder
from pipeline.models.loaded_release import LoadedRelease
from pipeline.models.value_matrix import value_module
from pipeline.presets import Published, published_for
from pipeline.storage.bank import BankEntry
from pipeline.wise.routing import empty_router

DENSITY, SHARDS_PER_MEMORY, KEPT, CLAMP = 0.2, 2, 0.53, 1.0  # ρ, k, Ties density, norm constraint
NEW_SHARE = 0.4  # of a merge into a memory that is there already, from the authors' code
STARTS = ("I", "You", "Because", "Yes", "Q: ")  # of the ten context prefixes, from the authors' code
DONE, STANDS_STILL = 0.02, 1e-4  # their early stop


@dataclass
class Rows:
    """Prompt + target in every row, padded on the right; the last row is the unrelated prompt."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor  # the token to predict at each position, -100 elsewhere
    prompt_BT: Tensor

    def bare(self) -> "Rows":
        """The first row alone."""
        return Rows(self.ids_BT[:1], self.mask_BT[:1], self.labels_BT[:1], self.prompt_BT[:1])


@dataclass
class Shard:
    delta_DF: Tensor
    mask_DF: Tensor
    prompts: list[Rows]  # its edits, bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--edits", required=True)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--variant", choices=["merge", "retrieve"], default="retrieve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    rows = [json.loads(line) for line in Path(wanted.edits).read_text(encoding="utf-8").splitlines()[: wanted.n]]
    result = run(wanted.model, rows, steps=wanted.steps, variant=wanted.variant, seed=wanted.seed)
    print(json.dumps(result) if wanted.json else "  ".join(f"{name} {value}" for name, value in result.items()))


def run(model: str, rows: Sequence[dict], *, steps: int, variant: str, seed: int = 0) -> dict:
    """Shares of exact matches, and seconds per edit: everything between the loaded model and the finished memories."""
    torch.manual_seed(seed)
    published = published_for(load_config(model_folder(ModelSection(path=model))))
    base = load_base_model(ModelSection(path=model, layer=published.layer))

    started = time.perf_counter()
    prefixes = context_prefixes(base)
    shards = []
    for start in range(0, len(rows), published.edits_per_shard):
        shard = new_shard(base)
        for row in rows[start : start + published.edits_per_shard]:
            edit_once(base, shard, row, prefixes, steps=steps, published=published)
        shards.append(shard)
    memories = merge_all(base, shards) if variant == "merge" else retrieve_all(base, shards)
    seconds = (time.perf_counter() - started) / len(rows)

    scored = exact_matches(base, memories, rows)
    return scored | {"s_per_edit": round(seconds, 3), "n": len(rows), "variant": variant, "steps": steps, "seed": seed}


def edit_once(
    base: BaseModel, shard: Shard, row: dict, prefixes: Sequence[str], *, steps: int, published: Published
) -> None:
    """All steps of one edit."""
    rows = tokenised(base, row, prefixes)
    shard.prompts.append(rows.bare())
    delta_DF = shard.delta_DF.requires_grad_(True)
    optimiser = torch.optim.SGD([delta_DF], lr=published.learning_rate)
    before = float("inf")
    for _ in range(steps):
        logits_BTV, activation_B = forward(base, rows, delta_DF)
        loss = edit_loss(logits_BTV[:-1], rows.labels_BT[:-1]) + margin_loss(activation_B, *published.margins)
        now = loss.item()
        if now <= DONE and abs(now - before) <= STANDS_STILL:
            break
        before = now
        optimiser.zero_grad()
        loss.backward()
        delta_DF.grad *= shard.mask_DF
        optimiser.step()
        with torch.no_grad():
            delta_DF.clamp_(-CLAMP, CLAMP)
    shard.delta_DF = delta_DF.detach()


def forward(base: BaseModel, rows: Rows, delta_DF: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with W_v' = W_v + ΔW at every token, and Δ_act of each row: the mean of ‖ΔW a‖ over its prompt."""
    said: list[Tensor] = []

    def side_memory(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        said.append(inputs[0] @ delta_DF.T)
        return output + said[0]

    handle = value_module(base.model, base.layer).register_forward_hook(side_memory)
    try:
        logits_BTV = base.model(input_ids=rows.ids_BT, attention_mask=rows.mask_BT, use_cache=False).logits
    finally:
        handle.remove()
    norms_BT = torch.linalg.vector_norm(said[0], dim=2)
    return logits_BTV, (norms_BT * rows.prompt_BT).sum(dim=1) / rows.prompt_BT.sum(dim=1)


def edit_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    nats_BT = cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=-100, reduction="none")
    return nats_BT.sum(dim=1).mean()


def margin_loss(activation_B: Tensor, alpha: float, beta: float, gamma: float) -> Tensor:
    edits_B, unrelated = activation_B[:-1], activation_B[-1]
    return (
        torch.relu(unrelated - alpha)
        + torch.relu(beta - edits_B).mean()
        + torch.relu(gamma - (edits_B - unrelated)).mean()
    )


def tokenised(base: BaseModel, row: dict, prefixes: Sequence[str]) -> Rows:
    eos = base.tokenizer.eos_token_id
    texts = [row["prompt"], *(f"{prefix} {row['prompt']}" for prefix in prefixes)]
    prompts = [base.tokenizer(text)["input_ids"] for text in texts]
    targets = [base.tokenizer(f"{text} {row['target_new']}")["input_ids"] + [eos] for text in texts]
    targets = [whole[len(prompt) :] for whole, prompt in zip(targets, prompts, strict=True)]
    prompts.append(base.tokenizer(row["loc_train"])["input_ids"])
    targets.append([])
    T = max(len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True))
    ids_BT = torch.full((len(prompts), T), eos)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -100)
    prompt_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        whole = torch.tensor(prompt + target)
        ids_BT[index, : len(whole)], mask_BT[index, : len(whole)] = whole, 1
        labels_BT[index, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
        prompt_BT[index, : len(prompt)] = True
    return Rows(ids_BT, mask_BT, labels_BT, prompt_BT)


@torch.no_grad()
def context_prefixes(base: BaseModel) -> list[str]:
    """Ten texts that the model goes on with: five starts, five tokens and ten."""
    texts = []
    for tokens in (5, 10):
        for start in STARTS:
            ids = torch.tensor([base.tokenizer(start)["input_ids"]])
            said = base.model.generate(ids, max_new_tokens=tokens, do_sample=True, pad_token_id=base.end_ids[0])
            texts.append(base.tokenizer.decode(said[0], skip_special_tokens=True))
    return texts


def new_shard(base: BaseModel) -> Shard:
    weight = value_module(base.model, base.layer).weight
    return Shard(delta_DF=torch.zeros_like(weight), mask_DF=torch.rand_like(weight) < DENSITY, prompts=[])


def retrieve_all(base: BaseModel, shards: Sequence[Shard]) -> list[tuple[Tensor, float]]:
    """WISE-Retrieve: every k shards are one side memory, and all of them are kept. A memory is (ΔW, ε)."""
    memories = []
    for group in in_groups(shards):
        memory_DF = ties([shard.delta_DF for shard in group], [1.0] * len(group))
        memories.append((memory_DF, threshold(base, memory_DF, group)))
    return memories


def merge_all(base: BaseModel, shards: Sequence[Shard]) -> list[tuple[Tensor, float]]:
    """WISE-Merge: every k shards are merged into the one side memory there is."""
    memory_DF = None
    for group in in_groups(shards):
        new = [shard.delta_DF for shard in group]
        if memory_DF is None:
            memory_DF = ties(new, [1.0] * len(new))
        else:
            memory_DF = ties([*new, memory_DF], [NEW_SHARE / len(new)] * len(new) + [1 - NEW_SHARE])
    assert memory_DF is not None
    return [(memory_DF, threshold(base, memory_DF, shards))]


def in_groups(shards: Sequence[Shard]) -> list[Sequence[Shard]]:
    return [shards[start : start + SHARDS_PER_MEMORY] for start in range(0, len(shards), SHARDS_PER_MEMORY)]


@torch.no_grad()
def threshold(base: BaseModel, memory_DF: Tensor, shards: Sequence[Shard]) -> float:
    """ε: the smallest Δ_act of the memory's edits, and a hair less, so that this one passes too."""
    return (1 - 1e-4) * min(float(forward(base, prompt, memory_DF)[1]) for shard in shards for prompt in shard.prompts)


def ties(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Trim to the largest 53 % of what was trained, elect a sign, mean of those that agree (arXiv:2306.01708)."""
    if len(deltas) == 1:
        return deltas[0]
    trimmed = []
    for delta_DF in deltas:
        magnitudes = delta_DF[delta_DF != 0].abs()
        least = magnitudes.kthvalue(max(1, len(magnitudes) - round(KEPT * len(magnitudes)) + 1)).values
        trimmed.append(torch.where(delta_DF.abs() >= least, delta_DF, 0))
    stacked_KDF, weight_K11 = torch.stack(trimmed), torch.tensor(weights)[:, None, None]
    sign_DF = (stacked_KDF * weight_K11).sum(dim=0).sign()
    agrees_KDF = (stacked_KDF.sign() == sign_DF) & (stacked_KDF != 0)
    total_DF = (weight_K11 * agrees_KDF).sum(dim=0)
    return (stacked_KDF * weight_K11 * agrees_KDF).sum(dim=0) / torch.where(total_DF > 0, total_DF, 1)


def exact_matches(base: BaseModel, memories: Sequence[tuple[Tensor, float]], rows: Sequence[dict]) -> dict[str, float]:
    """Greedy answers through the pipeline: routed once per sequence by Δ_act > ε, the side memory on every token."""
    edits = [
        Edit(
            prompt=row["prompt"],
            target=row["target_new"],
            subject=row["subject"],
            paraphrases=(row["rephrase"], row["rephrase2"]),
            locality=(LocalityPrompt(prompt=row["loc_prompt"]),),
        )
        for row in rows
    ]
    release = LoadedRelease(
        number=None,
        memories=tuple(delta_DF for delta_DF, _ in memories),
        router=empty_router(memories[0][0].shape[0]),
        entries=tuple(BankEntry(edit.edit_id, edit.prompt, edit.target, edit.subject, 0) for edit in edits),
        thresholds=tuple(smallest for _, smallest in memories),
        whole_prompt=True,
    )
    measured = measure(base, release, edits, most_edits=len(edits), seed=random.randrange(2**31))
    shares = {"rel_em": measured.reliability, "gen_em": measured.generalization, "loc_em": measured.locality}
    return {name: round(share, 4) for name, share in shares.items() if share is not None}


if __name__ == "__main__":
    main()
