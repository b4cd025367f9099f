"""What a round is doing, live: its phases, and every shard that is in training. Without a terminal, plain lines."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.round_diary import Event, MemoryNews, PhaseStarted, ShardNews
from pipeline.training.fit import Progress

MOST_ROWS = 12  # of shards; beyond it only those in training have one
SPARE_LINES = 10  # of the terminal, for the phases, the header and the totals
BAR_WIDTH = 10


@dataclass
class _Phase:
    name: str
    detail: str
    started: float
    seconds: float | None = None
    failed: bool = False


@dataclass
class _Shard:
    name: str
    edits: int
    progress: Progress | None = None
    state: str = "training"  # training | finished | reused | stopped


class RoundProgress:
    """Pass it as `observe` to `run_round`, inside `with`: leaving it closes the view, also after an error."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        # On stderr, so that a script reads only results on stdout.
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._started = clock()
        self._phases: list[_Phase] = []
        self._shards: dict[str, _Shard] = {}
        self._to_train: int | None = None
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(self, console=self._console, refresh_per_second=4) if live else None

    def __enter__(self) -> "RoundProgress":
        self._started = self._clock()
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_phase(failed=error is not None)
        for shard in self._shards.values():
            if shard.state == "training":
                shard.state = "stopped"
        if self._live:
            self._live.stop()
        else:
            self._line("stopped" if error else "done")

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self._end_phase()
            self._phases.append(_Phase(event.name, event.detail, self._clock()))
            self._to_train = event.shards or self._to_train
            self._line(f"{event.name}: {event.detail}")
        elif isinstance(event, MemoryNews):
            self._polish(event)
        else:
            self._take(event)

    def _polish(self, news: MemoryNews) -> None:
        progress = news.progress
        held = f"memory {news.memory}: {progress.holding} of {progress.wordings} wordings hold"
        if progress.step:
            held += f" after {progress.step} steps"
        self._phases[-1].detail = held
        if progress.step == 0:
            self._line(f"{held} as merged")

    def _take(self, news: ShardNews) -> None:
        name = f"{news.memory}/{news.shard.index}"
        shard = self._shards.setdefault(news.shard.digest, _Shard(name, len(news.shard.edits)))
        if news.progress is not None:
            shard.progress, shard.state = news.progress, "training"
        elif news.reused:
            shard.state = "reused"
        else:
            shard.state = "finished"
            self._line(f"shard {name} finished: {_summary(shard)}")

    def _end_phase(self, *, failed: bool = False) -> None:
        if self._phases:
            last = self._phases[-1]
            last.seconds, last.failed = self._clock() - last.started, failed

    def _line(self, text: str) -> None:
        if self._live is None:
            seconds = self._clock() - self._started
            self._console.print(f"{seconds:8.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> RenderableType:
        """The view as it is now."""
        parts: list[RenderableType] = []
        for phase in self._phases:
            parts.append(self._phase_line(phase))
            if phase.name == "train" and self._shards:
                parts += self._training()
        return Group(*parts)

    def _phase_line(self, phase: _Phase) -> Text:
        plain = self._console.options.ascii_only
        running = phase.seconds is None
        seconds = self._clock() - phase.started if phase.seconds is None else phase.seconds
        mark, style = (">" if plain else "›", "bold") if running else ("v" if plain else "✓", "green")
        if phase.failed:
            mark, style = ("x" if plain else "✗", "red")
        line = Text(no_wrap=True, overflow="ellipsis")
        return line.append(f"{mark} {phase.name:<9}", style).append(f"{seconds:7.1f} s  ").append(phase.detail, "dim")

    def _training(self) -> Iterator[RenderableType]:
        shards = list(self._shards.values())  # a copy: rich draws from its own thread
        rows = shards if len(shards) <= MOST_ROWS else [s for s in shards if s.state in ("training", "stopped")]
        shown = rows[: max(1, self._console.height - SPARE_LINES)]
        if shown:
            yield Padding(_shard_table(shown), (0, 0, 0, 2))
        states = [shard.state for shard in shards]
        counts = {state: states.count(state) for state in ("finished", "training", "stopped", "reused")}
        if self._to_train is not None:
            counts["waiting"] = self._to_train - (len(shards) - counts["reused"])
        yield Text("  " + ", ".join(f"{count} {state}" for state, count in counts.items() if count > 0), "dim")


def _shard_table(shards: list[_Shard]) -> Table:
    """Fits 60 columns. Shards are named memory/shard."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("shard", "edits", "step", "holding", "loss"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for shard in shards:
        progress = shard.progress
        figures = ["", "", ""]
        if progress is not None:
            figures = [f"{progress.step}", f"{progress.holding}/{progress.wordings}", f"{progress.loss:.3g}"]
        table.add_row(shard.name, f"{shard.edits}", *figures, _state(shard))
    return table


def _state(shard: _Shard) -> RenderableType:
    if shard.state == "training" and shard.progress is not None:
        return ProgressBar(total=shard.progress.wordings, completed=shard.progress.holding, width=BAR_WIDTH)
    return Text(shard.state, {"finished": "green", "stopped": "red"}.get(shard.state, "dim"))


def _summary(shard: _Shard) -> str:
    said = f"{shard.edits} edits"
    if shard.progress is not None:
        progress = shard.progress
        said += f", {progress.step} steps, {progress.holding} of {progress.wordings} wordings hold"
        said += f", loss {progress.loss:.3g}"
    return said
