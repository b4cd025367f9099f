"""A small model that knows CounterFact: `python -m benchmarks.pretrain_counterfact OUT [--rows 3000]`.

No model that fits here knows CounterFact's facts, so none can be edited away from them. This trains one of 5.8 M
parameters, from nothing, on the file's own sentences: `prompt` and `rephrase_prompt` are answered with `ground_truth`
and the end of the sequence, `locality_prompt` with `locality_ground_truth`. Same seed, same machine: same model.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.counterfact_sentences import WORDINGS, Sentence, read_sentences, shown_sentences
from demo.pretrain import new_model
from pipeline.training.tokens import Wording, plain_wording

VOCABULARY, CONTEXT_LENGTH = 4096, 512
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TOKENS_PER_STEP = 2048
MATRIX_LR, OTHER_LR, WARM_UP = 4e-3, 3e-3, 60  # peak rates; steps
COOL_AT, COOLING = 0.95, 8  # share of sentences right while training at which the rate starts to fall; epochs it falls
CHECK_EVERY = 10  # epochs
ENOUGH = 0.995  # of the sentences of each wording, exactly
IGNORED = -100  # a label without loss

Paced = tuple[torch.optim.Optimizer, float]  # with its peak rate


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
        right = 0
        epoch_batches = batches(shown_sentences(sentences, as_in_file, tokenizer, rng), rng)
        for number, batch in enumerate(epoch_batches):
            cooled = (epoch + number / len(epoch_batches) - cooling_from) / COOLING
            rate = min((step + 1) / WARM_UP, 1.0, max(1 - cooled, 0.0))
            right += learn(model, optimizers, *padded(batch, pad=tokenizer.pad_token_id), rate=rate)
            step += 1
        share = right / len(sentences)
        print(f"epoch {epoch}  {share:.1%} right  {time.perf_counter() - started:.0f} s", flush=True)
        if cooling_from == math.inf and (share >= COOL_AT or epoch >= epochs - COOLING):
            cooling_from = epoch + 1
        last = epoch == epochs or epoch + 1 >= cooling_from + COOLING
        if last or epoch % CHECK_EVERY == 0:
            exact = exact_shares(model, sentences, as_in_file, pad=tokenizer.pad_token_id)
            print("  as in the file: " + ", ".join(f"{name} {share:.2%}" for name, share in exact.items()), flush=True)
            save(model, tokenizer, out)
        if last:
            break
    return {"epochs": epoch, "seconds": round(time.perf_counter() - started, 1), "exact": exact}


def new_optimizers(model: LlamaForCausalLM) -> list[Paced]:
    """Muon for the matrices of the layers: with AdamW alone 18 epochs did not reach what this does in two
    (docs/experiments.md)."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [(muon, MATRIX_LR), (adamw, OTHER_LR)]


def learn(
    model: LlamaForCausalLM, optimizers: Sequence[Paced], ids_BT: Tensor, labels_BT: Tensor, *, rate: float
) -> int:
    """One step at `rate` times the peak rates. How many sentences were right before it."""
    loss, right_B = answer_loss(model, ids_BT, labels_BT)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, peak in optimizers:
        optimizer.param_groups[0]["lr"] = peak * rate
        optimizer.step()
        optimizer.zero_grad()
    return int(right_B.sum())


def batches(wordings: Sequence[Wording], rng: random.Random) -> list[list[Wording]]:
    """Of about TOKENS_PER_STEP, of neighbours in length (little padding), in random order."""
    order = sorted(wordings, key=lambda wording: (len(wording.prompt_ids) + len(wording.target_ids), rng.random()))
    filled: list[list[Wording]] = [[]]
    for wording in order:
        width = len(wording.prompt_ids) + len(wording.target_ids)
        if (len(filled[-1]) + 1) * width > TOKENS_PER_STEP:
            filled.append([])
        filled[-1].append(wording)
    rng.shuffle(filled)
    return [batch for batch in filled if batch]


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
