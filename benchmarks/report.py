"""Results as tables on the terminal, as JSON, and as a chart."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import rich.console
import rich.table

from benchmarks.chart import draw
from benchmarks.results import Results, Spread

Column = TypeVar("Column")

FORMAT = 2

UNITS: dict[str, tuple[float, str]] = {  # figure -> what it is divided by, and how it then is read
    "iops": (1e3, "{:.1f}k"),
    "bytes_s": (1e9, "{:.2f} GB/s"),
    "mean_us": (1, "{:.0f} us"),
    "tps": (1, "{:.0f} TPS"),
    "s": (1, "{:.2f} s"),
    "bytes": (1 << 20, "{:.0f} MiB"),
}
COSTS = ("mean_us", "p99_us", "server_cpu_s_per_gib", "client_cpu")


def write(results: Results, path: Path) -> None:
    """Everything raw and what the tables show, as JSON at `path`; the chart beside it."""
    judged = [
        {**asdict(each.reach), "bound": each.bound, "lockstep": each.lockstep, "verdict": each.verdict}
        | {"value": each.value._asdict() if each.value else None}
        for each in results.judged()
    ]
    medians = {
        row: {
            peer: spread._asdict()
            for peer in results.peers
            if (spread := results.of(peer, row, results.headline(row))) is not None
        }
        for row in results.rows
    }
    document = {"format": FORMAT, **asdict(results), "headlines": medians, "reach": judged}
    document.pop("reaches")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".svg").write_text(draw(results, shown))


def shown(figure: str, value: float) -> str:
    """A figure with its unit."""
    divisor, pattern = UNITS[figure]
    return pattern.format(value / divisor)


def show(results: Results) -> None:
    """Print the tables."""
    pairs = results.pairs()

    def headline(row: str, peer: str) -> str:
        figure = results.headline(row)
        spread = results.of(peer, row, figure)
        return "" if spread is None else "{} ({} - {})".format(*(shown(figure, value) for value in spread))

    def costs(row: str, peer: str) -> str:
        found = [results.of(peer, row, figure) for figure in COSTS]
        values = [spread.median for spread in found if spread]
        return "{:.0f} / {:.0f}; {:.2f}; {:.0%}".format(*values) if len(values) == len(COSTS) else ""

    def ratio(row: str, pair: tuple[str, str]) -> str:
        return _times(results.ratio(*pair, row, results.headline(row)))

    _table(f"{results.title}: median (least - greatest round)", results.rows, results.peers, results.peers, headline)
    if pairs:
        heads = [f"{peer} / {other}" for peer, other in pairs]
        _table("Ratio of the medians (least - greatest round)", results.rows, heads, pairs, ratio)
    loaded = [row for row in results.rows if any(costs(row, peer) for peer in results.peers)]
    if loaded:
        title = "Latency mean / p99 in us; server CPU seconds per GiB; fio's share of a core"
        _table(title, loaded, results.peers, results.peers, costs)
    if results.reaches:
        _print("Reach", ["row", "compared", "bound", "is", ""], _reach_rows(results))
    for peer, proof in results.proofs.items():
        print(f"{peer}: {proof}")
    for sentence in results.notes:
        print(sentence)
    print("; ".join(f"{name}: {value}" for name, value in {**results.machine, **results.versions}.items()))


def _reach_rows(results: Results) -> list[list[str]]:
    return [[each.reach.row, each.what, each.bound, _times(each.value), each.verdict] for each in results.judged()]


def _times(ratio: Spread | None) -> str:
    return "" if ratio is None else "{:.2f}x ({:.2f} - {:.2f})".format(*ratio)


def _table(
    title: str, rows: Sequence[str], heads: Sequence[str], columns: Sequence[Column], cell: Callable[[str, Column], str]
) -> None:
    _print(title, ["", *heads], [[row, *(cell(row, column) for column in columns)] for row in rows])


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = rich.table.Table(*heads, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width of its own, and a table folded into 80 columns is not readable.
    rich.console.Console(width=None if sys.stdout.isatty() else 240).print(table)
