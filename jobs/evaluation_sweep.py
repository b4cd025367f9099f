"""`wiseline evaluate --sweep`: the paper's tables, T = 1, 10, 100, 1000 edits of every data set."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.evaluate import Setting, evaluate, limits
from jobs.evaluation_sets import read_evaluation_set
from pipeline.errors import ConfigError, NotFound, WiselineError
from pipeline.evaluation.sweep_plot import sweep_plot

STEPS = (1, 10, 100, 1000)
SUFFIXES = ("-edit.json", "_edit.json")
COLUMNS = {
    "data": "data set",
    "n": "T",
    "variant": "variant",
    "rel_em": "reliability",
    "gen_em": "generalization",
    "loc_em": "locality",
    "rel_tf": "rel. (TF)",
    "gen_tf": "gen. (TF)",
    "loc_tf": "loc. (TF)",
    "route_fpr": "false pos.",
    "route_fnr": "false neg.",
    "perplexity": "perplexity",
    "ood": "OOD",
    "s_per_edit": "s/edit",
}


def run_sweep(setting: Setting, edits: Path, *, format: str, most: int | None, out: Path) -> list[dict[str, Any]]:
    """One row per data set and T, each a round of its own; written to `out` after every row, so that a sweep that is
    stopped leaves what it measured. A data set with fewer edits than a step ends with all it has."""
    console = Console(stderr=True, highlight=False)
    rows: list[dict[str, Any]] = []
    files = data_sets(edits)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be a folder ({error.strerror}); name another one.") from None
    for file in files:
        name = file.stem.removesuffix("-edit").removesuffix("_edit")
        try:
            for n in steps(_size(file, format, setting), most=most):
                console.print(f"[bold]{name}[/bold], T = {n}")
                rows.append({"data": name, **evaluate(setting, file, format=format, n=n)})
                write_tables(rows, out)
        except WiselineError as error:  # of this file; the others are measured all the same
            console.print(f"{name} goes no further: {error}", markup=False)
    if not rows:
        raise ConfigError(f"None of the data sets in {edits} could be measured; what each lacks is said above.")
    console.print(f"The tables and the plot are in {out}.", markup=False)
    return rows


def data_sets(edits: Path) -> list[Path]:
    """The file itself, or the files of edits in a folder and its folders."""
    if edits.is_file():
        return [edits]
    found = sorted(file for file in edits.rglob("*") if file.name.endswith(SUFFIXES) or file.suffix == ".jsonl")
    if not found:
        raise NotFound(f"There are no files of edits in {edits} (*-edit.json, *_edit.json or *.jsonl); name one.")
    return found


def steps(size: int, *, most: int | None) -> list[int]:
    """T as in the paper's tables, up to what there is; the last one is all there is below 1000."""
    limit = min(size, most or STEPS[-1])
    return [*(step for step in STEPS if step < limit), min(limit, STEPS[-1])]


def write_tables(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    (out / "results.md").write_text(markdown(rows), encoding="utf-8")
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, fieldnames=list(COLUMNS), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (out / "results.csv").write_text(sheet.getvalue(), encoding="utf-8")
    (out / "results.svg").write_text(sweep_plot(rows), encoding="utf-8")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; columns that no row fills are left out."""
    shown = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    lines = [f"| {' | '.join(shown.values())} |", f"|{'---|' * len(shown)}"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in shown)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _size(file: Path, format: str, setting: Setting) -> int:
    return len(read_evaluation_set(file, format=format, n=STEPS[-1], limits=limits(setting)).edits)
