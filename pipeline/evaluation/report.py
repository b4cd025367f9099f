"""The page report.html: what a round did, how it measured, and what failed. One file, no script, no network.

Edits are written by others: every text goes through `html.escape`, and the page's content security policy forbids
whatever would get past it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from pipeline.evaluation.report_plots import loss_plot, score_plot

SHOWN_FAILURES = 200
SHOWN_TOO_LONG = 50
SHOWN_CHARS = 400  # of one prompt or answer
FOLDED_SHARDS = 8  # a longer table of shards is folded away

ASKED = {
    "reliability": ("Reliability", "the edited prompts"),
    "reliability_chat": ("Reliability in chat", "the edited prompts as chat messages"),
    "generalization": ("Generalization", "held-out paraphrases"),
    "locality": ("Locality", "prompts the edits must leave alone"),
}

Row = tuple[str, ...]  # cells, as markup


def render_html(report: Mapping[str, Any]) -> str:
    """The page for what `pipeline/rounds.py` gathers (or what report.json holds)."""
    page = Template(files("pipeline.evaluation").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"{_outcome(report)} · wiseline round {report['round_id']}"),
        headline=_headline(report),
        scores=_scores(report),
        work=_work(report),
        losses=_losses(report),
        routing=_routing(report["routing"]),
        failures=_failures(report["measured"]["failures"]),
        too_long=_too_long(report["too_long"]),
        origin=_origin(report),
    )


def _outcome(report: Mapping[str, Any]) -> str:
    published = report["outcome"] == "published"
    return f"Release {report['release']} published" if published else "Gate failed, nothing published"


def _headline(report: Mapping[str, Any]) -> str:
    published = report["outcome"] == "published"
    parent = report["parent"]
    stands = f"Release {parent} stands." if parent is not None else "There is no release yet."
    follows = f"It follows release {parent}." if parent is not None else "It is the first release."
    missed = "".join(f"<li>{escape(sentence)}</li>" for sentence in _missed(report))
    return (
        f'<header class="headline {"good" if published else "bad"}"><h1>{escape(_outcome(report))}</h1>'
        f"{f'<ul>{missed}</ul>' if missed else ''}"
        f"<p>{escape(follows if published else stands)} Round {escape(report['round_id'])} "
        f"on version {report['log_version']} of the edit log.</p></header>"
    )


def _missed(report: Mapping[str, Any]) -> list[str]:
    """The thresholds alone; `report["missed"]` goes on with failed edits, which have a table of their own."""
    measured = report["measured"]
    return [
        f"{ASKED[name][0]} {measured[name]:.3f} is below the threshold {least:g}."
        for name, least in report["thresholds"].items()
        if measured[name] is not None and measured[name] < least
    ]


def _scores(report: Mapping[str, Any]) -> str:
    measured, thresholds = report["measured"], report["thresholds"]
    rows = [
        _score_row(title, note, measured[name], thresholds.get(name), measured["routed"].get(name))
        for name, (title, note) in ASKED.items()
    ]
    rows += [
        _score_row(f"Locality: {kind.replace('_', ' ')}", "", score, None, measured["routed"].get(f"locality.{kind}"))
        for kind, score in measured["locality_by_kind"].items()
    ]
    asked = f"{measured['edits']:,} of {report['edits']:,} edits asked"
    caption = f"Exact match of greedy answers, {asked}; routed is the share sent to a side memory."
    return _table(("Questions", "Score", "At least", "Routed"), rows, caption=caption, numbers=(1, 2, 3))


def _score_row(title: str, note: str, score: float | None, least: float | None, routed: float | None) -> Row:
    name = f"{escape(title)}<small>{escape(note)}</small>"
    threshold = "" if least is None else f"{least:g}"
    if score is None:
        return name, '<span class="muted">not asked</span>', threshold, ""
    tick = "" if least is None else f'<b style="left:{least:.1%}"></b>'
    verdict = "" if least is None else f' <span class="{_met(score, least)}">{_met(score, least)}</span>'
    meter = f'<span class="meter" aria-hidden="true"><i style="width:{score:.1%}"></i>{tick}</span>'
    return name, f"{score:.3f}{verdict}{meter}", threshold, "" if routed is None else f"{routed:.1%}"


def _met(score: float, least: float) -> str:
    return "met" if score >= least else "missed"


def _work(report: Mapping[str, Any]) -> str:
    shards = report["shards"]
    reused = sum(shard["reused"] for shard in shards)
    rows = [
        ("Living edits", f"{report['edits']:,}"),
        ("Prompts too long", f"{len(report['too_long']):,}"),
        ("Side memories", f"{report['memories']:,}"),
        ("Shards trained", f"{len(shards) - reused:,}"),
        ("Shards reused", f"{reused:,}"),
        *_polished(report.get("polish", ())),
        *((f"Seconds to {escape(phase)}", f"{seconds:,.1f}") for phase, seconds in report["seconds"].items()),
        ("Seconds in all", f"{sum(report['seconds'].values()):,.1f}"),
    ]
    return _table(("What", "How much"), rows, numbers=(1,))


def _polished(memories: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many wordings hold in the memories that were merged now, and after the second attempt."""
    if not memories:
        return []
    wordings, merged, polished = (
        sum(memory[key] for memory in memories) for key in ("wordings", "held_merged", "held_polished")
    )
    return [
        ("Wordings that held as merged", f"{merged:,} of {wordings:,}"),
        ("Wordings that hold when polished", f"{polished:,} of {wordings:,}"),
    ]


def _losses(report: Mapping[str, Any]) -> str:
    shards = report["shards"]
    curves = {_shard_name(shard): shard["loss"] for shard in shards if shard["loss"]}
    if curves:
        plot = f"<figure>{loss_plot(curves, stop_loss=report['config']['training']['stop_loss'])}</figure>"
    else:
        plot = '<p class="muted">Every shard was trained by an earlier run, so there is no curve.</p>'
    headers = ("Shard", "Edits", "Steps", "Holding", "Last loss")
    table = _table(headers, [_shard_row(shard) for shard in shards], numbers=(1, 2, 3, 4))
    unfolded = " open" if len(shards) <= FOLDED_SHARDS else ""
    return f"{plot}<details{unfolded}><summary>Table of shards</summary>{table}</details>"


def _shard_name(shard: Mapping[str, Any]) -> str:
    return f"memory {shard['memory']}, shard {shard['shard']}"


def _shard_row(shard: Mapping[str, Any]) -> Row:
    name, edits = escape(_shard_name(shard)), f"{shard['edits']}"
    if shard["reused"]:
        return name, edits, '<span class="muted">reused</span>', "", ""
    if shard["steps"] is None:
        return name, edits, "", "", ""
    return name, edits, f"{shard['steps']}", f"{shard['holding']}/{shard['wordings']}", f"{shard['loss'][-1][1]:.4f}"


def _routing(routing: Mapping[str, Any]) -> str:
    plot = score_plot(routing["positive_scores"], routing["negative_scores"], threshold=routing["threshold"])
    missing = "" if routing["negative_scores"] else '<p class="muted">There were no prompts out of scope.</p>'
    return f"<figure>{plot}</figure>{missing}"


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    if not failures:
        return "<p>Every question was answered as it should be.</p>"
    kinds = Counter(failure["kind"] for failure in failures)
    counted = ", ".join(f"{_kind(kind)} {count:,}" for kind, count in kinds.most_common())
    left_out = len(failures) - SHOWN_FAILURES
    note = f" The first {SHOWN_FAILURES} are shown; report.json holds all {len(failures)}." if left_out > 0 else ""
    rows = [
        (
            escape(_kind(failure["kind"])),
            _said(failure["prompt"]),
            _said(failure["expected"]),
            _said(failure["answer"]),
            "yes" if failure["routed"] else "no",
        )
        for failure in failures[:SHOWN_FAILURES]
    ]
    headers = ("Kind", "Prompt", "Expected", "Answer", "Routed")
    return f"<p>{escape(counted)}.{note}</p>" + _table(headers, rows, style="cards")


def _kind(kind: str) -> str:
    return kind.replace("locality.", "locality: ").replace("_", " ")


def _too_long(prompts: Sequence[str]) -> str:
    if not prompts:
        return "<p>None.</p>"
    left_out = len(prompts) - SHOWN_TOO_LONG
    listed = "".join(f"<li>{_said(prompt)}</li>" for prompt in prompts[:SHOWN_TOO_LONG])
    note = f"<p>and {left_out} more, see report.json.</p>" if left_out > 0 else ""
    advice = "These edits were left out; shorten the prompt or use a model with a longer context."
    return f"<p>{advice}</p><ul>{listed}</ul>{note}"


def _origin(report: Mapping[str, Any]) -> str:
    model = report["model"]
    rows = [
        ("Base model", escape(str(model["path"]))),
        ("Fingerprint", escape(str(model["fingerprint"]))),
        ("Layer of the side memories", escape(str(model["layer"]))),
    ]
    config = "\n".join(
        f"{section}:\n"
        + "\n".join(f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
        for section, values in report["config"].items()
    )
    table = _table(("What", "Value"), rows)
    return f"<details><summary>Base model and config</summary>{table}<pre>{escape(config)}</pre></details>"


def _said(text: str) -> str:
    """A text from an edit or from the model; its own direction, so that one right-to-left prompt turns no row."""
    if not text.strip():
        return '<span class="muted">(nothing)</span>'
    cut = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
    return f'<bdi class="said">{escape(cut)}</bdi>'


def _table(
    headers: Sequence[str], rows: Iterable[Row], *, caption: str = "", numbers: Sequence[int] = (), style: str = ""
) -> str:
    """Cells are markup already; the first one heads its row, except in a table of `cards`."""
    shades = ["number" if column in numbers else "" for column in range(len(headers))]
    head = "".join(
        f'<th scope="col" class="{shade}">{escape(text)}</th>' for text, shade in zip(headers, shades, strict=True)
    )
    body = "".join(f"<tr>{_cells(headers, shades, row, row_head=style != 'cards')}</tr>" for row in rows)
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<table class="{style}">{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cells(headers: Sequence[str], shades: Sequence[str], row: Row, *, row_head: bool) -> str:
    cells = [
        f'<td class="{shade}" data-label="{escape(header)}">{cell}</td>'
        for header, shade, cell in zip(headers, shades, row, strict=True)
    ]
    if row_head:
        cells[0] = f'<th scope="row">{row[0]}</th>'
    return "".join(cells)
