"""A sweep as one SVG file that stands alone: per data set the three scores against the number of edits T."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

SCORES = {
    "rel_em": ("reliability", "#3b6fb6"),
    "gen_em": ("generalization", "#c4622d"),
    "loc_em": ("locality", "#3f8f5b"),
}
PANEL_WIDTH, PANEL_HEIGHT = 220, 150
LEFT, TOP, RIGHT, BOTTOM = 34, 26, 12, 26  # around the area inside a panel's axes


def sweep_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as `wiseline evaluate` returns them, with the name of the data set under "data"; missing scores leave a
    gap. T is on a logarithmic axis."""
    panels: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        panels[str(row["data"])].append(row)
    steps = sorted({int(row["n"]) for row in rows}) or [1]
    span = math.log10(steps[-1] / steps[0]) or 1.0
    width, height = PANEL_WIDTH * max(1, len(panels)), PANEL_HEIGHT + 24
    body = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for index, (name, of_panel) in enumerate(panels.items()):
        body.append(f'<g transform="translate({index * PANEL_WIDTH} 0)">{_panel(name, of_panel, steps, span)}</g>')
    for index, (label, colour) in enumerate(SCORES.values()):
        x = LEFT + index * 130
        body.append(
            f'<line x1="{x}" y1="{height - 10}" x2="{x + 16}" y2="{height - 10}" stroke="{colour}" stroke-width="2"/>'
        )
        body.append(f'<text x="{x + 21}" y="{height - 6}">{label}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" fill="#333">'
        f"<title>Reliability, generalization and locality by number of edits</title>{''.join(body)}</svg>\n"
    )


def _panel(name: str, rows: Sequence[Mapping[str, Any]], steps: Sequence[int], span: float) -> str:
    def at(row_n: float, share: float) -> tuple[float, float]:
        across = math.log10(row_n / steps[0]) / span
        return (
            LEFT + across * (PANEL_WIDTH - LEFT - RIGHT),
            PANEL_HEIGHT - BOTTOM - share * (PANEL_HEIGHT - TOP - BOTTOM),
        )

    drawn = [f'<text x="{LEFT}" y="15" font-weight="600">{escape(name)}</text>']
    for share in (0.0, 0.5, 1.0):
        _, y = at(steps[0], share)
        drawn.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{PANEL_WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>')
    for n in sorted({int(row["n"]) for row in rows}):
        x, _ = at(n, 0)
        drawn.append(f'<text x="{x:.1f}" y="{PANEL_HEIGHT - BOTTOM + 15}" text-anchor="middle">{n}</text>')
    for key, (_, colour) in SCORES.items():
        points = [at(row["n"], row[key]) for row in sorted(rows, key=lambda row: row["n"]) if row.get(key) is not None]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    return "".join(drawn)
