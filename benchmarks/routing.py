"""Routing alone: which share of paraphrases finds its edit, at 1 % false positives. No language model is needed.

    python -m benchmarks.routing [--json] [--data ../shared/data]     measure (about six minutes on one core)
    python -m benchmarks.routing --fit                                the weights in pipeline/wise/calibration.py

Fitted on CounterFact rows 5,000-9,999, in banks of 400 edits; measured on rows 0-399 (bank: their prompts; positives:
their rephrase_prompt; negatives: their locality_prompt, and the other edits' prompts), and on all of ZsRE (bank:
`src`; positives: `rephrase`; negatives: the NQ questions in `loc`). A positive counts when its score passes the
threshold and the nearest entry is the right edit or one that asks the same: same subject, and same old or same new
answer. (ZsRE asks many facts twice and wants two different new answers; `_strict` counts the same new answer alone.)
The text signals are measured; `keys` needs a model.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.encoder import Encoder, shared_encoder
from pipeline.models.questions import TURN, asked
from pipeline.models.readings import TextReader
from pipeline.storage.bank import BankEntry
from pipeline.wise.calibration import PRIOR, PRIOR_WITHOUT_ENCODER, fit_logistic, threshold_at
from pipeline.wise.routing import SIGNALS, Match, Router

RATE = 0.01
BANK = 400
SWAPPED = 0.05  # of the fit's negatives
FIT_BANKS = 6  # of the twelve in rows 5,000-9,999 for the threshold; --fit uses all


class RememberingEncoder(Encoder):
    """Encodes what a bank will ask in one go: twice as fast as one by one, equal up to rounding."""

    def prepare(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._remembered]
        self._remembered.update(zip(new, self.encode_many(new), strict=True))


@dataclass(frozen=True)
class Case:
    """A bank and what it is asked."""

    entries: list[BankEntry]
    positives: list[str]
    right: list[set[int]]  # those that ask the same
    strictly_right: list[set[int]]  # of these the ones that also give the same new answer
    neighbours: list[str]
    neighbours_alike: list[bool]  # the neighbourhood prompt asks an edit of this bank: same subject, same old answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counterfact = json.loads((arguments.data / "counterfact/counterfact-edit.json").read_text())
    if arguments.fit:
        print(fitted_weights(counterfact[5000:]))
        return
    zsre = json.loads((arguments.data / "zsre/zsre_mend_edit.json").read_text())
    figures = measured(counterfact, zsre) | {"lookups_per_s": lookups_per_second()}
    if arguments.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:36} {value}")


def measured(counterfact: Sequence[dict[str, str]], zsre: Sequence[dict[str, str]]) -> dict[str, float]:
    shared = shared_encoder()
    figures: dict[str, float] = {}
    evaluated, answered = case_of_counterfact(counterfact[:BANK]), case_of_zsre(zsre)
    for encoder, ending in ((shared and RememberingEncoder(shared.folder), ""), (None, "_no_encoder")):
        if ending == "" and encoder is None:
            continue
        fit = [Bench(case_of_counterfact(rows), encoder) for rows in banks(counterfact[5000:], FIT_BANKS)]
        cf, zs = Bench(evaluated, encoder), Bench(answered, encoder)
        figures[f"cf_tpr_loc{ending}"] = cf.tpr(cf.neighbours)
        figures[f"cf_tpr_other{ending}"] = cf.tpr(cf.others)
        figures[f"zsre_tpr{ending}"] = zs.tpr(zs.neighbours)
        figures[f"zsre_tpr_strict{ending}"] = zs.tpr(zs.neighbours, right=answered.strictly_right)
        figures[f"cf_tpr_loc_alike_apart{ending}"] = cf.tpr(cf.neighbours[~torch.tensor(evaluated.neighbours_alike)])
        both = [torch.cat([getattr(bench, kind) for bench in fit]) for kind in ("neighbours", "others")]
        threshold = max(threshold_at(scores, false_positive_rate=RATE) for scores in both)
        figures[f"threshold{ending}"] = round(threshold, 3)
        for name, bench in (("cf", cf), ("zsre", zs)):
            figures[f"{name}_calibrated_tpr{ending}"] = bench.passing(threshold)
            figures[f"{name}_calibrated_fpr_loc{ending}"] = share(bench.neighbours > threshold)
            figures[f"{name}_calibrated_fpr_other{ending}"] = share(bench.others > threshold)
        for kind, (texts, right) in hard_cases(evaluated).items():
            matches = cf.ask(texts)
            if right is None:
                figures[f"fpr {kind}{ending}"] = share(scores_of(matches) > threshold)
            else:
                figures[f"tpr {kind}{ending}"] = share(hits(matches, right) & (scores_of(matches) > threshold))
    return figures


class Bench:
    """A case asked once, with the shipped weights."""

    def __init__(self, case: Case, encoder: RememberingEncoder | None) -> None:
        self.case, self._encoder = case, encoder
        if encoder:
            encoder.prepare([asked(text) for text in (*case.positives, *case.neighbours)])
        self._reader = TextReader(case.entries, encoder)
        self._router = text_router(self._reader, PRIOR if encoder else PRIOR_WITHOUT_ENCODER)
        self.found = self.ask(case.positives)
        self.hit, self.scores = hits(self.found, case.right), scores_of(self.found)
        self.neighbours = scores_of(self.ask(case.neighbours))
        prompts = [entry.prompt for entry in case.entries]
        self.others = scores_of(self.ask(prompts, hidden=case.right))

    def ask(self, texts: Sequence[str], hidden: Sequence[set[int]] | None = None) -> list[Match]:
        return self._router.match(torch.zeros(len(texts), 1), self._reader.read(texts), hidden=hidden)

    def tpr(self, negatives: Tensor, *, right: Sequence[set[int]] | None = None) -> float:
        """At 1 % false positives among these negatives."""
        passes = self.scores > threshold_at(negatives, false_positive_rate=RATE)
        return share(passes & (self.hit if right is None else hits(self.found, right)))

    def passing(self, threshold: float) -> float:
        return share(self.hit & (self.scores > threshold))


def text_router(reader: TextReader, weights: Sequence[float]) -> Router:
    """A router whose states are all alike, so that `keys` says nothing."""
    asked_EM, relation_EM = reader.embeddings()
    entries = len(asked_EM)
    return Router(
        mean_D=torch.zeros(1),
        whiten_DD=torch.eye(1),
        keys_ND=torch.zeros(entries, 1),
        entry_N=torch.arange(entries),
        memory_E=torch.zeros(entries, dtype=torch.long),
        asked_EM=asked_EM,
        relation_EM=relation_EM,
        weights_S=torch.tensor(weights),
        bias_E=torch.zeros(entries),
        threshold=0.0,
    )


def banks(rows: Sequence[dict[str, str]], count: int) -> Iterator[Sequence[dict[str, str]]]:
    for start in range(0, min(count, len(rows) // BANK) * BANK, BANK):
        yield rows[start : start + BANK]


def case_of_counterfact(rows: Sequence[dict[str, str]]) -> Case:
    old = {(row["subject"], row["ground_truth"]) for row in rows}
    alike = [
        any(subject in row["locality_prompt"] and answer == row["locality_ground_truth"] for subject, answer in old)
        for row in rows
    ]
    edits = [(row["prompt"], row["subject"], row["target_new"], row["ground_truth"]) for row in rows]
    return case(edits, [row["rephrase_prompt"] for row in rows], [row["locality_prompt"] for row in rows], alike)


def case_of_zsre(rows: Sequence[dict[str, str]]) -> Case:
    edits = [(row["src"], row["subject"], row["alt"], row["answers"][0]) for row in rows]
    return case(edits, [row["rephrase"] for row in rows], [row["loc"] for row in rows], [False] * len(rows))


def case(
    edits: Sequence[tuple[str, str, str, str]], positives: list[str], neighbours: list[str], alike: list[bool]
) -> Case:
    """`edits`: prompt, subject, new and old answer. Edits of one subject that share either answer ask the same."""
    entries = [BankEntry(str(i), prompt, new, subject, 0) for i, (prompt, subject, new, _) in enumerate(edits)]
    same: dict[tuple[str, str], set[int]] = {}
    for index, (_, subject, new, old) in enumerate(edits):
        same.setdefault((subject, f"new {new}"), set()).add(index)
        same.setdefault((subject, f"old {old}"), set()).add(index)
    right = [same[subject, f"new {new}"] | same[subject, f"old {old}"] for _, subject, new, old in edits]
    strictly = [same[subject, f"new {new}"] for _, subject, new, _ in edits]
    return Case(entries, positives, right, strictly, neighbours, alike)


def hits(matches: Sequence[Match], right: Sequence[set[int]]) -> Tensor:
    return torch.tensor([match.entry in entries for match, entries in zip(matches, right, strict=True)])


def scores_of(matches: Sequence[Match]) -> Tensor:
    return torch.tensor([match.score for match in matches])


def share(flags: Tensor) -> float:
    return round(float(flags.float().mean()), 4)


def hard_cases(case: Case) -> dict[str, tuple[list[str], list[set[int]] | None]]:
    """Prompts by kind, made of the case's own: which must reach an edit (with the entries that may answer), and which
    must reach none."""
    rng = random.Random(0)
    P, right, foreign = case.positives, case.right, case.neighbours
    foreign = [text for text, alike in zip(foreign, case.neighbours_alike, strict=True) if not alike]
    names = [entry.subject or "" for entry in case.entries]
    filler = [" ".join(f"{text} so they say." for text in rng.sample(foreign, 26)) for _ in P]  # about 300 tokens
    other = [rng.choice(foreign) for _ in P]
    second = rng.sample(range(len(P)), len(P))
    alone = [index for index, text in enumerate(P) if asked(text) == text]
    return {
        "question after 300 tokens": ([f"{a} {p}" for a, p in zip(filler, P, strict=True)], right),
        "question, 300 tokens, other question": (
            [f"{p} so. {a} {q}" for p, a, q in zip(P, filler, other, strict=True)],
            None,
        ),
        "other, question inside, other": (
            [f"{a[:600]} {p} so. {a[600:]}" for p, a in zip(P, filler, strict=True)],
            None,
        ),
        "chat, answer asked for briefly": ([f"{p}? Answer in one word." for p in P], right),
        "turns: other question, then this": ([f"{q}{TURN}{p}" for p, q in zip(P, other, strict=True)], right),
        "turns: this question, then other": ([f"{p}{TURN}{q}" for p, q in zip(P, other, strict=True)], None),
        "two edited facts in one question": (
            [f"{case.positives[a]} and {case.positives[b]}" for a, b in enumerate(second)],
            [right[a] | right[b] for a, b in enumerate(second)],
        ),
        "subject by its last word": (
            [P[index].replace(names[index], names[index].split()[-1]) for index in alone if " " in names[index]],
            [right[index] for index in alone if " " in names[index]],
        ),
        "subject in capitals": ([p.replace(n, n.upper()) for p, n in zip(P, names, strict=True)], right),
        "same subject, other question": same_subject(case, rng),
    }


def same_subject(case: Case, rng: random.Random) -> tuple[list[str], None]:
    """Another edit's question about this edit's subject; some ask the same relation in other words, so this kind cannot
    come out at nothing."""
    texts = []
    for entry in case.entries:
        other = rng.choice(case.entries)
        texts.append(other.prompt.replace(other.subject or "", entry.subject or ""))
    return texts, None


def fitted_weights(rows: Sequence[dict[str, str]]) -> dict[str, list[float]]:
    """Logistic weights of the text signals: paraphrases against neighbourhood prompts, other edits' prompts and some
    other questions about the same subject, which are partly paraphrases themselves."""
    shared = shared_encoder()
    assert shared is not None
    encoder = RememberingEncoder(shared.folder)
    inside, outside = [], []
    for chunk in banks(rows, len(rows) // BANK):
        bench = Bench(case_of_counterfact(chunk), encoder)
        inside += [match.signals for match, hit in zip(bench.ask(bench.case.positives), bench.hit, strict=True) if hit]
        negatives = bench.ask(bench.case.neighbours) + bench.ask(
            [entry.prompt for entry in bench.case.entries], hidden=bench.case.right
        )
        outside += [match.signals for match in negatives]
        swapped = bench.ask(same_subject(bench.case, random.Random(len(inside)))[0])
        outside += [match.signals for match in swapped[: round(SWAPPED * len(negatives))]]
    result = {}
    for name, on in (("with", SIGNALS[1:]), ("without", SIGNALS[1:2])):
        start = torch.tensor([1.0 if signal in on else 0.0 for signal in SIGNALS])
        weights_S, _ = fit_logistic(torch.tensor(inside), torch.tensor(outside), prior_S=start)
        result[f"{name}_encoder"] = [round(weight, 2) for weight in weights_S.tolist()]
    return result


def lookups_per_second(*, entries: int = 100_000, queries: int = 1000, width: int = 256) -> float:
    """A bank of made-up people, two to four wordings each, asked about some of them, 32 questions at a time, on one
    core. Embedding the question is left out: it is the encoder's time, about ten milliseconds."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    names = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(3)).title() for _ in range(6000)]
    people = [f"{rng.choice(names)} {rng.choice(names)}" for _ in range(entries)]
    made_up = [BankEntry(str(i), f"What does {person} play?", "x", person, 0) for i, person in enumerate(people)]
    owner_N = torch.repeat_interleave(torch.arange(entries), torch.randint(2, 5, (entries,), generator=generator))
    unit = torch.nn.functional.normalize
    router = replace(
        text_router(TextReader([], None), PRIOR),
        mean_D=torch.zeros(width),
        whiten_DD=torch.eye(width),
        keys_ND=unit(torch.randn(len(owner_N), width, generator=generator), dim=1),
        entry_N=owner_N,
        memory_E=torch.zeros(entries, dtype=torch.long),
        asked_EM=unit(torch.randn(entries, 384, generator=generator), dim=1).half(),
        relation_EM=unit(torch.randn(entries, 384, generator=generator), dim=1).half(),
        bias_E=torch.zeros(entries),
    )
    reader = TextReader(made_up, _RandomEncoder())
    texts = [f"Which instrument is it that {rng.choice(people)} plays?" for _ in range(queries)]
    states = torch.randn(queries, width, generator=generator)
    router.match(states[:32], reader.read(texts[:32]))  # the sketch is made once
    reader.read(texts)  # and so are the embeddings
    start = time.process_time()
    for first in range(0, queries, 32):
        router.match(states[first : first + 32], reader.read(texts[first : first + 32]))
    return round(queries / (time.process_time() - start), 1)


class _RandomEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(Path())

    def _encode(self, text: str) -> Tensor:
        if text not in self._remembered:
            generator = torch.Generator().manual_seed(len(text))
            self._remembered[text] = torch.nn.functional.normalize(torch.randn(384, generator=generator), dim=0)
        return self._remembered[text]


if __name__ == "__main__":
    main()
