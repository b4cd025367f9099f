"""A small model that knows CounterFact: `python -m benchmarks.pretrain_counterfact OUT [--rows 3000]`.

No model that fits here knows CounterFact's facts, so none can be edited away from them. This trains one of 5.8 M
parameters, from nothing, on the file's own sentences: `prompt` and `rephrase_prompt` are answered with `ground_truth`
and the end of the sequence, `locality_prompt` with `locality_ground_truth`. Same seed, same machine: same model.

Some rephrasings begin with an unrelated passage. In a part of its showings a sentence stands behind the passage of
another one, or none, so that the answer hangs on the question and not on the passage, which alone would identify it.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.training.tokens import Wording, plain_wording

VOCABULARY, CONTEXT_LENGTH = 4096, 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WORDINGS = (
    ("prompt", "ground_truth"),
    ("rephrase_prompt", "ground_truth"),
    ("locality_prompt", "locality_ground_truth"),
)
SENTENCE_END = re.compile(r"[.!?][\"')\]]*\s+|\n+")
TOKENS_PER_STEP = 2048
MATRIX_LR, OTHER_LR, WARM_UP = 4e-3, 3e-3, 60  # peak rates; steps
COOL_AT, COOLING = 0.95, 8  # share of sentences right while training at which the rate starts to fall; epochs it falls
CHECK_EVERY = 10  # epochs
ENOUGH = 0.995  # of the sentences of each wording, exactly
BARE, BEHIND_ANOTHER = 0.25, 0.1  # shares of the showings without a passage, and behind another sentence's
IGNORED = -100  # a label without loss


@dataclass(frozen=True)
class Sentence:
    """`passage` is what an unrelated text before the question says, empty for most."""

    wording: str
    passage: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """As the file has it."""
        return self.passage + self.question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/counterfact/counterfact-edit.json"))
    parser.add_argument("--rows", type=int, default=3000, help="the first so many")
    parser.add_argument("--epochs", type=int, default=40, help="at most; it stops when it knows enough")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rows = json.loads(options.data.read_text())[: options.rows]
    sentences, contradictory = read_sentences(rows)
    print(f"{len(rows)} rows, {len(sentences)} sentences; {contradictory} contradict an earlier row and are left out")
    tokenizer = train_tokenizer(sentences)
    model = new_model(tokenizer)
    result = {
        "rows": len(rows),
        "sentences": len(sentences),
        "contradictory": contradictory,
        "parameters": model.num_parameters(),
        **train(model, tokenizer, sentences, epochs=options.epochs, seed=options.seed, out=options.out),
    }
    (options.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
    if min(result["exact"].values()) < ENOUGH:
        sys.exit("Some facts are not answered: train longer (--epochs) or with another --seed.")


def read_sentences(rows: Sequence[dict[str, Any]]) -> tuple[list[Sentence], int]:
    """Every sentence once, and how many were left out: where rows answer one prompt differently, the first counts."""
    known: dict[str, str] = {}
    sentences, contradictory = [], 0
    for row in rows:
        for wording, answer in WORDINGS:
            if row[wording] not in known:
                known[row[wording]] = row[answer]
                passage = split_passage(row[wording], row["subject"])
                sentences.append(Sentence(wording, passage, row[wording][len(passage) :], row[answer]))
            elif known[row[wording]] != row[answer]:
                contradictory += 1
    return sentences, contradictory


def split_passage(prompt: str, subject: str) -> str:
    """What `prompt` says before the sentence that names the subject; empty if it names none."""
    ends = [match.end() for match in SENTENCE_END.finditer(prompt, 0, max(prompt.find(subject), 0))]
    return prompt[: ends[-1]] if ends else ""


def train_tokenizer(sentences: Sequence[Sentence]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the sentences; puts BOS before a text and pads on the left."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((f"{sentence.prompt} {sentence.answer}" for sentence in sentences), trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[Sentence],
    *,
    epochs: int,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """At a constant rate until most sentences are right, then at a falling one, to zero; saved as it goes.

    Muon for the matrices of the layers, AdamW for the rest: with AdamW alone 18 epochs did not reach what this does in
    two (docs/experiments.md).
    Returns epochs, seconds and, per wording, the share of sentences the saved model answers exactly.
    """
    optimizers = new_optimizers(model)
    as_in_file = [plain_wording(sentence.prompt, sentence.answer, tokenizer) for sentence in sentences]
    rng = random.Random(seed)
    started, step, cooling_from = time.perf_counter(), 0, math.inf
    exact: dict[str, float] = {}
    epoch = 0
    for epoch in range(1, epochs + 1):
        model.train()
        right = total = tokens = 0
        steps = list(batches(shown_sentences(sentences, as_in_file, tokenizer, rng), rng))
        for number, batch in enumerate(steps):
            passed = epoch + number / len(steps)
            rate = min((step + 1) / WARM_UP, 1.0, max(1 - (passed - cooling_from) / COOLING, 0.0))
            for optimizer, peak in optimizers:
                optimizer.param_groups[0]["lr"] = peak * rate
            ids_BT, labels_BT = padded(batch, pad=tokenizer.pad_token_id)
            loss, right_B = answer_loss(model, ids_BT, labels_BT)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, _ in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            right, total, tokens = right + int(right_B.sum()), total + len(batch), tokens + ids_BT.numel()
            step += 1
        if cooling_from == math.inf and (right / total >= COOL_AT or epoch >= epochs - COOLING):
            cooling_from = epoch + 1
        seconds = time.perf_counter() - started
        print(f"epoch {epoch}  {right / total:.1%} right  {tokens:,} tokens  {seconds:.0f} s", flush=True)
        cooled = epoch + 1 >= cooling_from + COOLING
        if epoch % CHECK_EVERY == 0 or cooled or epoch == epochs:
            exact = exact_shares(model, sentences, as_in_file, pad=tokenizer.pad_token_id)
            print("  as in the file: " + ", ".join(f"{name} {share:.2%}" for name, share in exact.items()), flush=True)
            save(model, tokenizer, out)
        if cooled:
            break
    return {"epochs": epoch, "seconds": round(time.perf_counter() - started, 1), "exact": exact}


def new_optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its peak rate."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [(muon, MATRIX_LR), (adamw, OTHER_LR)]


def shown_sentences(
    sentences: Sequence[Sentence],
    as_in_file: Sequence[Wording],
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
) -> list[Wording]:
    """One epoch's sentences: most as the file has them, some bare, some behind another one's passage."""
    passages = [sentence.passage for sentence in sentences if sentence.passage] or [""]
    shown = []
    for sentence, wording in zip(sentences, as_in_file, strict=True):
        drawn = rng.random()
        if drawn < BEHIND_ANOTHER:
            passage = rng.choice(passages)
        else:
            passage = "" if drawn < BEHIND_ANOTHER + BARE else sentence.passage
        changed = passage != sentence.passage
        shown.append(plain_wording(passage + sentence.question, sentence.answer, tokenizer) if changed else wording)
    return shown


def batches(wordings: Sequence[Wording], rng: random.Random) -> Iterator[list[Wording]]:
    """Of about TOKENS_PER_STEP, of neighbours in length (little padding), in random order."""
    order = sorted(wordings, key=lambda wording: (len(wording.prompt_ids) + len(wording.target_ids), rng.random()))
    batches: list[list[Wording]] = [[]]
    for wording in order:
        width = len(wording.prompt_ids) + len(wording.target_ids)
        if (len(batches[-1]) + 1) * width > TOKENS_PER_STEP:
            batches.append([])
        batches[-1].append(wording)
    rng.shuffle(batches)
    return iter([batch for batch in batches if batch])


def padded(batch: Sequence[Wording], *, pad: int) -> tuple[Tensor, Tensor]:
    """Token ids B × T padded on the right, where causal attention does not look, and labels B × T: the answer's."""
    width = max(len(wording.prompt_ids) + len(wording.target_ids) for wording in batch)
    ids_BT = torch.full((len(batch), width), pad)
    labels_BT = torch.full((len(batch), width), IGNORED)
    for row, wording in enumerate(batch):
        ids = wording.prompt_ids + wording.target_ids
        ids_BT[row, : len(ids)] = torch.tensor(ids)
        labels_BT[row, len(wording.prompt_ids) : len(ids)] = torch.tensor(wording.target_ids)
    return ids_BT, labels_BT


def answer_loss(model: LlamaForCausalLM, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss of the answers' tokens, and whether each row's are all the most likely ones (bool, B).

    That is the case exactly when greedy decoding gives the answer and stops. The head runs on the answers alone.
    """
    targets_BT = labels_BT[:, 1:]
    trained_BT = targets_BT != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.training):
        hidden = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
        logits_NV = model.lm_head(hidden[trained_BT]).float()
    wrong_BT = torch.zeros_like(trained_BT)
    wrong_BT[trained_BT] = logits_NV.argmax(dim=-1) != targets_BT[trained_BT]
    return functional.cross_entropy(logits_NV, targets_BT[trained_BT]), ~wrong_BT.any(dim=1)


@torch.no_grad()
def exact_shares(
    model: LlamaForCausalLM, sentences: Sequence[Sentence], as_in_file: Sequence[Wording], *, pad: int
) -> dict[str, float]:
    """Per wording, the share of sentences that are answered exactly, in float32."""
    model.eval()
    order = sorted(range(len(sentences)), key=lambda index: len(as_in_file[index].prompt_ids))
    right = dict.fromkeys(order, False)
    for start in range(0, len(order), 256):
        chosen = order[start : start + 256]
        _, right_B = answer_loss(model, *padded([as_in_file[index] for index in chosen], pad=pad))
        right.update(zip(chosen, right_B.tolist(), strict=True))
    shares = {}
    for name, _ in WORDINGS:
        of_wording = [right[index] for index, sentence in enumerate(sentences) if sentence.wording == name]
        shares[name] = round(sum(of_wording) / max(len(of_wording), 1), 4)
    return shares


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Float32 safetensors, config and tokenizer, as `load_base_model` reads them."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
