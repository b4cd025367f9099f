"""The report's plots as inline SVG: loss per shard, and routing scores in and out of scope.

A plot is drawn 360 units wide and shown at most 35rem wide, so its labels stay readable on a phone and on a desk. The
colours are classes (`s0`, `s1`, …) that the page defines for light and for dark.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Curve = Sequence[tuple[float, float]]  # (optimiser step, loss), steps rising

MOST_LINES = 8  # as many as there are colours; above it a band of quantiles
BAND_POINTS = 80
LEAST_LOSS = 1e-6  # what a loss of zero is drawn as
BINS = 40

WIDTH = 360
LEFT, RIGHT = 40, 344  # of the area inside the axes
LOSS_TOP, LOSS_BOTTOM, LOSS_HEIGHT = 10, 190, 224
ROW_HEIGHT = 58  # of one histogram, its label above it included


@dataclass(frozen=True)
class _Axis:
    """Where a value lies on the page; on a log axis the values are logarithms already."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def loss_plot(curves: Mapping[str, Curve], *, stop_loss: float) -> str:
    """One line per shard, or beyond MOST_LINES the median and the band of the middle 80 %; the loss axis is
    logarithmic. `curves` must not be empty."""
    drawn = {
        name: [(step, math.log10(max(loss, LEAST_LOSS))) for step, loss in curve] for name, curve in curves.items()
    }
    points = [point for curve in drawn.values() for point in curve]
    stop = math.log10(stop_loss)
    lowest, highest = min(stop, *(loss for _, loss in points)), max(stop, *(loss for _, loss in points))
    x = _Axis(0, max(step for step, _ in points), LEFT, RIGHT)
    y = _Axis(lowest - 0.1, highest + 0.1, LOSS_BOTTOM, LOSS_TOP)
    many = len(drawn) > MOST_LINES
    body = [*_loss_grid(x, y), _level(y.at(stop), f"stop loss {stop_loss:g}")]
    body += _band(list(drawn.values()), x, y) if many else _lines(drawn, x, y)
    summary = f"{len(drawn)} shards over {x.high:g} steps, last losses from {_last_losses(curves)}."
    legend = ["median shard", "middle 80 % of the shards"] if many else list(drawn)
    marks = ["line s0", "band s0"] if many else [f"line s{index}" for index in range(len(drawn))]
    return _svg("Loss per shard", summary, height=LOSS_HEIGHT, body=body) + _legend(zip(marks, legend, strict=True))


def score_plot(positives: Sequence[float], negatives: Mapping[str, Sequence[float]], *, threshold: float) -> str:
    """One histogram per kind of prompt on a common axis, the threshold through all of them."""
    kinds = {"in scope": positives}
    kinds |= {f"out of scope, {kind}": scores for kind, scores in negatives.items()}
    finite = [score for scores in kinds.values() for score in scores if math.isfinite(score)]
    low, high = min([threshold, *finite]), max([threshold, *finite])
    margin = 0.04 * (high - low) or 1.0
    x = _Axis(low - margin, high + margin, 10, RIGHT)
    bottom = 18 + ROW_HEIGHT * len(kinds)
    bars, labels, summary = [], [], []
    for row, (kind, scores) in enumerate(kinds.items()):
        top = 18 + ROW_HEIGHT * row
        above = sum(score > threshold for score in scores)
        share = f"{above / len(scores):.1%} of {len(scores):,} above" if scores else "none"
        bars += _histogram(scores, x, base=top + ROW_HEIGHT, shade="s0" if row == 0 else "s1")
        labels.append(_label(10, top + 13, f"{kind}: {share}", halo=True))
        summary.append(f"{kind}: {share} the threshold.")
    middle = x.at(threshold)
    line = f'<line class="threshold" x1="{middle:.1f}" y1="14" x2="{middle:.1f}" y2="{bottom}"/>'
    anchor = "start" if middle < 80 else "end" if middle > RIGHT - 70 else "middle"
    labels.append(_label(middle, 10, f"threshold {threshold:.2f}", anchor=anchor))
    labels += [_label(x.at(tick), bottom + 14, f"{tick:g}", anchor="middle") for tick in _round_values(x.low, x.high)]
    labels.append(_label((10 + RIGHT) / 2, bottom + 30, "routing score (logit)", anchor="middle"))
    body = [*bars, line, *labels]
    return _svg("Routing score in and out of scope", " ".join(summary), height=bottom + 36, body=body)


def _lines(curves: Mapping[str, Curve], x: _Axis, y: _Axis) -> list[str]:
    """The dot at the end also shows a shard that was done after one pass."""
    body = []
    for index, (name, curve) in enumerate(curves.items()):
        last_step, last_loss = curve[-1]
        body.append(
            f'<polyline class="line s{index}" points="{_points(curve, x, y)}"><title>{escape(name)}</title></polyline>'
        )
        body.append(f'<circle class="dot s{index}" cx="{x.at(last_step):.1f}" cy="{y.at(last_loss):.1f}" r="2.5"/>')
    return body


def _band(curves: Sequence[Curve], x: _Axis, y: _Axis) -> list[str]:
    """A shard that is done keeps its last loss; before its first pass it counts with its first."""
    first = min(curve[0][0] for curve in curves)
    steps = [first + (x.high - first) * index / (BAND_POINTS - 1) for index in range(BAND_POINTS)]
    ranked = [sorted(_loss_at(curve, step) for curve in curves) for step in steps]
    low, median, high = (
        [(step, losses[round(share * (len(losses) - 1))]) for step, losses in zip(steps, ranked, strict=True)]
        for share in (0.1, 0.5, 0.9)
    )
    return [
        f'<polygon class="band s0" points="{_points(low, x, y)} {_points(high[::-1], x, y)}"/>',
        f'<polyline class="line s0" points="{_points(median, x, y)}"/>',
        f'<circle class="dot s0" cx="{x.at(x.high):.1f}" cy="{y.at(median[-1][1]):.1f}" r="2.5"/>',
    ]


def _loss_at(curve: Curve, step: float) -> float:
    return curve[max(0, bisect_right(curve, step, key=lambda point: point[0]) - 1)][1]


def _histogram(scores: Sequence[float], x: _Axis, *, base: float, shade: str) -> list[str]:
    """Bars relative to the fullest one; one stray score is still a visible sliver, for strays are what to look for."""
    counts = [0] * BINS
    for score in scores:
        if math.isfinite(score):
            counts[min(BINS - 1, int((score - x.low) / (x.high - x.low) * BINS))] += 1
    width = (x.end - x.start) / BINS
    body = [f'<line class="axis" x1="{x.start}" y1="{base}" x2="{x.end}" y2="{base}"/>']
    for index, count in enumerate(counts):
        if count:
            height = max(1.5, (ROW_HEIGHT - 22) * count / max(counts))
            left = x.start + index * width
            body.append(
                f'<rect class="bar {shade}" x="{left:.1f}" y="{base - height:.1f}" '
                f'width="{width - 0.6:.1f}" height="{height:.1f}"/>'
            )
    return body


def _loss_grid(x: _Axis, y: _Axis) -> list[str]:
    body = []
    for tick in _decade_values(y.low, y.high):
        height = y.at(math.log10(tick))
        body.append(f'<line class="grid" x1="{LEFT}" y1="{height:.1f}" x2="{RIGHT}" y2="{height:.1f}"/>')
        body.append(_label(LEFT - 5, height + 3.5, f"{tick:g}", anchor="end"))
    for tick in _round_values(x.low, x.high):
        body.append(_label(x.at(tick), LOSS_BOTTOM + 14, f"{tick:g}", anchor="middle"))
    body.append(_label((LEFT + RIGHT) / 2, LOSS_BOTTOM + 30, "optimiser step", anchor="middle"))
    body.append(f'<line class="axis" x1="{LEFT}" y1="{LOSS_BOTTOM}" x2="{RIGHT}" y2="{LOSS_BOTTOM}"/>')
    return body


def _level(height: float, text: str) -> str:
    line = f'<line class="threshold" x1="{LEFT}" y1="{height:.1f}" x2="{RIGHT}" y2="{height:.1f}"/>'
    return line + _label(LEFT + 4, height - 4, text, halo=True)


def _decade_values(low: float, high: float) -> list[float]:
    """1, 10, 100, …; with 2 and 5 between them where there would be fewer than three."""
    for factors in ((1,), (1, 2, 5)):
        values = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
        inside = [value for value in values if low <= math.log10(value) <= high]
        if len(inside) >= 3:
            break
    return inside


def _round_values(low: float, high: float) -> list[float]:
    """About five round values between `low` and `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _last_losses(curves: Mapping[str, Curve]) -> str:
    last = [curve[-1][1] for curve in curves.values()]
    return f"{min(last):.3g} to {max(last):.3g}"


def _points(curve: Curve, x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x.at(step):.1f},{y.at(loss):.1f}" for step, loss in curve)


def _label(x: float, y: float, text: str, *, anchor: str = "start", halo: bool = False) -> str:
    """With `halo` the text keeps a border in the page's colour, to be read on top of lines."""
    return (
        f'<text class="{"halo" if halo else ""}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(title: str, summary: str, *, height: float, body: Sequence[str]) -> str:
    name = title.lower().replace(" ", "-")
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-text" viewBox="0 0 {WIDTH} {height:g}">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-text">{escape(summary)}</desc>'
        f"{''.join(body)}</svg>"
    )


def _legend(items: Iterable[tuple[str, str]]) -> str:
    """Outside the SVG, where it wraps."""
    listed = (
        f'<li><svg class="key" aria-hidden="true" viewBox="0 0 20 10">{_key(mark)}</svg>{escape(text)}</li>'
        for mark, text in items
    )
    return f'<ul class="legend">{"".join(listed)}</ul>'


def _key(mark: str) -> str:
    if mark.startswith("band"):
        return f'<rect class="{mark}" width="20" height="10"/>'
    return f'<line class="{mark}" x1="0" y1="5" x2="20" y2="5"/>'
