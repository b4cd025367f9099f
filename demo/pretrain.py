"""Trains the demo model from nothing: `python -m demo.pretrain`. Same seed, same machine: same model.

After the training comes revision: the model as it will be served (bfloat16 weights, read back from disk) is asked
every fact in every phrasing, and trained a little more with what it missed among the rest. Fails when it still misses
something after the last revision.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import ANSWER, ROW, Asked, Corpus
from demo.exact_match import Question, chat, exact_matches, plain
from demo.facts import Fact, all_facts
from demo.filler import Filler
from demo.tokenizer import CONTEXT_LENGTH, train_tokenizer

TOKENS_PER_STEP = 4096
LONG_ROW_EVERY = 16  # steps; then rows are as long as the context, so that every position is trained
PEAK_LR = 3e-3
WARM_UP = 50  # steps
REVISIONS = 4  # at most
REVISION_STEPS = 120
REVISION_LR = 4e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    facts = all_facts()
    tokenizer = train_tokenizer(facts, options.seed)
    model = new_model(tokenizer)
    train(model, Corpus(facts, tokenizer, options.seed), options.steps, PEAK_LR)
    save(model, tokenizer, options.out)
    if not revise(options.out, facts, options.seed):
        sys.exit("Some facts are not answered: train longer (--steps) or with another --seed.")


def revise(out: Path, facts: list[Fact], seed: int) -> bool:
    """Whether the saved model answers everything, after as many revisions as that takes, each of them saved."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    for revision in range(1, REVISIONS + 2):
        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        passed, missed = examine(model, tokenizer, facts)
        if passed or revision > REVISIONS:
            return passed
        print(f"revision {revision}: {len(missed)} questions among the rest", flush=True)
        train(model, Corpus(facts, tokenizer, seed + revision, hard=missed), REVISION_STEPS, REVISION_LR)
        save(model, tokenizer, out)
    return False


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """With the demo's tokenizer 5.3 M parameters, 10.5 MB in bfloat16."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, corpus: Corpus, steps: int, peak_lr: float) -> None:
    """AdamW; the learning rate rises over the warm-up and then falls to zero in a straight line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (steps - step) / (steps - WARM_UP))
    )
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        length = CONTEXT_LENGTH if step % LONG_ROW_EVERY == LONG_ROW_EVERY - 1 else ROW
        loss, right = weighted_loss(model, *corpus.rows(TOKENS_PER_STEP // length, length))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            seconds = time.perf_counter() - started
            speed = (step + 1) * TOKENS_PER_STEP / seconds
            print(
                f"step {step + 1}  loss {loss.item():.3f}  answer tokens right {right:.1%}  "
                f"{speed:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )


def weighted_loss(model: LlamaForCausalLM, tokens: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Mean next-token loss under `weights`, and the share of answer tokens that are predicted.

    Tokens of weight zero cost no arithmetic in the head.
    """
    targets, weights = tokens[:, 1:], weights[:, 1:]
    trained = weights > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[trained])
    losses = functional.cross_entropy(logits.float(), targets[trained], reduction="none")
    of_answers = weights[trained] == ANSWER
    right = (logits.argmax(-1) == targets[trained])[of_answers].float().mean()
    return (losses * weights[trained]).sum() / weights.sum(), right.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def examine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: list[Fact]) -> tuple[bool, list[Asked]]:
    """Every plain and chat answer must be right, and 99 % of those after a sentence; also what was missed."""
    model.eval()
    rng = random.Random("examination")
    filler = Filler()
    asked = [(prompt, fact.answer) for fact in facts for prompt in fact.prompts]
    layouts: list[tuple[str, list[Question], float]] = [
        ("plain", [plain(*pair) for pair in asked], 1.0),
        ("chat", [chat(*pair) for pair in asked], 1.0),
        ("after a sentence", [plain(*pair, context=filler.sentence(rng)) for pair in asked], 0.99),
    ]
    passed = True
    missed: list[Asked] = []
    for name, questions, wanted in layouts:
        matches = exact_matches(model, tokenizer, questions)
        print(f"{name}: {sum(matches)} of {len(matches)} exact", flush=True)
        passed &= sum(matches) >= wanted * len(matches)
        missed += [pair for pair, match in zip(asked, matches, strict=True) if not match]
    return passed, missed


if __name__ == "__main__":
    main()
