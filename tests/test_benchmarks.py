"""The benchmark judges as its tables say, its chart can be read, and it runs."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks.chart import draw
from benchmarks.client import RawClient
from benchmarks.grow import flatness
from benchmarks.peers import Bare, Nbdkit
from benchmarks.processes import BenchmarkError
from benchmarks.report import shown
from benchmarks.results import Cell, Results, Spread
from benchmarks.stage import in_turn
from benchmarks.workloads import BULK_ROWS, DISK_WORKLOADS, REACHES, USER_REACHES, WORKLOADS, Reach

from tests.lab import MIB
from tests.test_docs import ROOT, doc, spans, table

ROW = "4k-randwrite-qd32"


def results(reaches: tuple[Reach, ...], **peers: list[float]) -> Results:
    """A run whose rounds gave each peer these IOPS in one row."""
    machine: dict[str, object] = {"cpu": "a < b", "cores": 2, "kernel": "6", "load_before": 0.1}
    found = Results("title", machine, {}, {}, reaches)
    for peer, values in peers.items():
        found.cells += [
            Cell(ROW, peer.replace("_", "-"), number, "iops", {"iops": value, "p99_us": 1e6 / value})
            for number, value in enumerate(values)
        ]
    return found


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_the_rounds() -> None:
    found = results((), lockstep_512=[100, 300, 200], nbdkit=[100, 100, 400])
    assert found.of("lockstep-512", ROW, "iops") == Spread(200, 100, 300)
    assert found.ratio("lockstep-512", "nbdkit", ROW, "iops") == Spread(2.0, 0.5, 3.0)


@pytest.mark.parametrize(
    ("peer", "iops", "verdict"),
    [
        ("lockstep_4096", 500.0, "PASS"),
        ("lockstep_4096", 499.0, "short"),
        ("lockstep_512", 450.0, "PASS"),
        ("lockstep_512", 449.0, "short"),
    ],
)
def test_sectors_of_512_bytes_may_cost_a_write_ten_percent(peer: str, iops: float, verdict: str) -> None:
    reach = Reach("qemu", ROW, 5.0, at_512=4.5)
    found = results((reach,), **{peer: [iops], "qemu": [100.0]})
    (judged,) = found.judged()
    assert judged.verdict == verdict
    assert found.all_reached() == (verdict == "PASS")


@pytest.mark.parametrize(("p99_times", "verdict"), [(1.5, "PASS"), (1.6, "short")])
def test_latency_is_bounded_from_above(p99_times: float, verdict: str) -> None:
    reach = Reach("nbdkit", ROW, 1.5, figure="p99_us", at_most=True)
    (judged,) = results((reach,), lockstep_4096=[300 / p99_times], nbdkit=[300.0]).judged()
    assert (judged.verdict, judged.bound) == (verdict, "<= 1.5x")


def test_a_lockstep_is_compared_with_the_bare_one_of_its_own_sectors() -> None:
    rates = {"lockstep_512": [80.0], "lockstep_4096": [90.0], "bare_512": [100.0], "bare_4096": [300.0], "qemu": [10.0]}
    found = results((Reach("bare", ROW, 0.5),), **rates)
    assert [(each.what, each.verdict) for each in found.judged()] == [
        ("lockstep-4096 / bare", "short"),
        ("lockstep-512 / bare", "PASS"),
    ]
    assert found.pairs() == [
        (ours, other)
        for ours, bare in (("lockstep-4096", "bare-4096"), ("lockstep-512", "bare-512"))
        for other in (bare, "qemu")
    ]


def test_what_was_not_measured_is_not_reached() -> None:
    found = results((Reach("qemu", ROW, 5.0), Reach(None, "verify", 0.7, figure="share")), lockstep_512=[100.0])
    assert [each.verdict for each in found.judged()] == ["not measured"] * 2
    assert not found.all_reached()


def test_flat_is_within_ten_percent_of_the_first() -> None:
    found = results((), lockstep_4096=[100.0])
    found.cells += [Cell(row, "lockstep-4096", 0, "iops", {"iops": iops}) for row, iops in (("b", 91.0), ("c", 89.0))]
    b, c = flatness(found, [ROW, "b", "c"])
    assert b.endswith(": flat")
    assert c.endswith(": not flat")


def test_each_goes_first_in_its_turn() -> None:
    assert [in_turn("abc", number) for number in range(3)] == [list("abc"), list("bca"), list("cab")]


def test_the_chart_is_well_formed_and_has_a_bar_for_each_peer() -> None:
    found = results((Reach("nbdkit", ROW, 0.8),), lockstep_4096=[50, 60, 70], nbdkit=[100.0] * 3, qemu=[20.0] * 3)
    root = ElementTree.fromstring(draw(found, shown))
    texts = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text.endswith("x")] == ["0.1k  0.60x", "0.1k  1.00x", "0.0k  0.20x"]
    assert any("a < b" in text for text in texts)


def test_every_reach_row_is_measured() -> None:
    assert {reach.row for reach in REACHES} <= {each.name for each in (*WORKLOADS, *DISK_WORKLOADS)} | {*BULK_ROWS}


def test_the_document_has_the_rows_of_the_code() -> None:
    documented = {
        (spans(row)[0], figure, against, bound)
        for row, figure, against, bound in table(doc("benchmarks.md"), "row", "figure", "against", "bound")
    }
    figures = {"iops": "requests/s", "p99_us": "p99", "share": "rate", "tps": "TPS"}

    def bound(reach: Reach) -> str:
        small = "" if reach.at_512 is None else f" ({reach.at_512:g}x)"
        return f"{'<=' if reach.at_most else '>='} {reach.bound:g}x{small}"

    assert documented == {
        (reach.row, figures[reach.figure], reach.peer or "slowest step", bound(reach))
        for reach in (*REACHES, *USER_REACHES)
    }


def test_the_raw_client_writes_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(bytes(MIB))
    with Nbdkit(tmp_path, MIB) as peer, contextlib.closing(RawClient(peer.uri)) as client:
        client.write(512, b"x" * 4096)
        assert peer.target.read_bytes()[512:4608] == b"x" * 4096


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_the_bare_server_mirrors_and_its_proof_can_fail(tmp_path: Path, sector_bytes: int) -> None:
    (tmp_path / "target").write_bytes(os.urandom(MIB))
    with Bare(tmp_path, MIB, sector_bytes) as peer:
        with contextlib.closing(RawClient(peer.uri)) as client:
            client.write(8192, b"x" * 4096)
        assert peer.target.read_bytes()[8192:12288] == b"x" * 4096
        assert peer.prove()
        with peer.target.open("r+b") as target:
            target.seek(8192)
            target.write(b"y")
        with pytest.raises(BenchmarkError, match="differs"):
            peer.prove()


def test_it_runs_and_says_what_it_did_not_measure(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    few = ["--peers", "nbdkit", "--rounds", "1", "--seconds", "1", "--size", "16M", "--dir", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks", *few, "--json", str(report), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, report.exists()) == (1, True), done.stderr  # no lockstep, so nothing was reached
    document = json.loads(report.read_text())
    assert set(document["headlines"]) == {each.name for each in (*WORKLOADS, *DISK_WORKLOADS)}
    assert {row["verdict"] for row in document["reach"]} == {"not measured"}
    assert ElementTree.parse(report.with_suffix(".svg")).getroot().tag.endswith("svg")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.json", "report.svg"]
