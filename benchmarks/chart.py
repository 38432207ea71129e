"""A chart of a run: one group of bars for each row, as SVG, with nothing but text.

A bar is a peer's median as a multiple of the group's reference, a whisker its least and greatest round, a tick on
Lockstep's bar what it should reach.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape

from benchmarks.results import Results, Spread

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 1100, 430, 150, 16, 12, 78
COLOURS = ("#1b6ca8", "#58a4d4", "#8c8c8c", "#d08a3c", "#7a9a4a", "#a06a9a")
REFERENCE = "nbdkit"
LESS_IS_BETTER = ("mean_us", "s", "bytes")
STYLE = "text{font:12px sans-serif;fill:#222}.title{font-size:16px;font-weight:bold}.small{font-size:11px;fill:#555}"


@dataclass(frozen=True)
class Bar:
    """One peer in one row; all but `text` are multiples of the row's reference."""

    peer: str
    spread: Spread
    text: str
    bound: float | None


def draw(results: Results, shown: Callable[[str, float], str]) -> str:
    """The whole document."""
    groups = [(row, list(_bars(results, row, shown))) for row in results.rows]
    colours = dict(zip(results.peers, COLOURS * len(results.peers), strict=False))
    longest = max((max(bar.spread.greatest, bar.bound or 1) for _, bars in groups for bar in bars), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / longest
    drawn, y = [], TOP
    for row, bars in groups:
        height = len(bars) * BAR
        less = " (less is better)" if results.headline(row) in LESS_IS_BETTER else ""
        drawn.append(_text(LEFT - 10, y + height / 2 + 4, row + less, "end"))
        for number, bar in enumerate(bars):
            drawn += _bar(bar, y + number * BAR, scale, colours[bar.peer])
        y += height + GAP
    reference = (
        f'<line x1="{LEFT + scale}" x2="{LEFT + scale}" y1="{TOP - 6}" y2="{y}" stroke="#222" stroke-dasharray="3"/>'
    )
    sentence = f"Multiples of {REFERENCE}, the slowest step, or the least. Bar: median. Line: rounds. Red: reach."
    legend = [
        f'<rect x="{LEFT + 120 * number}" y="50" width="12" height="12" fill="{colour}"/>'
        + _text(LEFT + 120 * number + 17, 60, peer)
        for number, (peer, colour) in enumerate(colours.items())
    ]
    machine = ", ".join(f"{name} {results.machine[name]}" for name in ("cpu", "cores", "kernel", "load_before"))
    body = [
        _text(20, 24, results.title, kind="title"),
        _text(20, 42, sentence, kind="small"),
        *legend,
        *drawn,
        reference,
        _text(20, y + 20, machine, kind="small"),
    ]
    size = f'viewBox="0 0 {WIDTH} {y + 32}" width="{WIDTH}" height="{y + 32}"'
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{paper}'
    return "\n".join([head, *body, "</svg>\n"])


def _bars(results: Results, row: str, shown: Callable[[str, float], str]) -> Iterator[Bar]:
    figure = results.headline(row)
    found = {peer: spread for peer in results.peers if (spread := results.of(peer, row, figure))}
    least = min((spread.median for spread in found.values() if spread.median), default=1.0)
    unit = found[REFERENCE].median if REFERENCE in found else least
    for peer, spread in found.items():
        share = results.of(peer, row, "share")  # it has a reference of its own
        multiples = share or Spread(*(value / unit for value in spread))
        judged = (None, row, "share") if share else (REFERENCE, row, figure)
        bounds = [
            reach.bound_for(peer)
            for reach in results.reaches
            if (reach.peer, reach.row, reach.figure) == judged and peer in results.locksteps
        ]
        yield Bar(peer, multiples, shown(figure, spread.median), bounds[0] if bounds else None)


def _bar(bar: Bar, y: float, scale: float, colour: str) -> list[str]:
    middle = y + BAR / 2 - 1
    length, least, greatest = (value * scale for value in bar.spread)
    drawn = [
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>',
        f'<line x1="{LEFT + least:.1f}" x2="{LEFT + greatest:.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>',
        _text(LEFT + max(length, greatest) + 6, y + 12, f"{bar.text}  {bar.spread.median:.2f}x"),
    ]
    if bar.bound is not None:
        at = LEFT + bar.bound * scale
        drawn.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{y + BAR - 2}" stroke="#c00" stroke-width="2"/>')
    return drawn


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
