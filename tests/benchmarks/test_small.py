"""Small calls: who is right is timed, over many calls at once; a graph is asked for on CUDA alone."""

import pytest
import torch

from benchmarks import report, small
from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CONTESTANTS, NAIVE, OURS, Contestant, naive_logp
from benchmarks.table import Table


def test_shapes_are_of_few_rows_and_four_sequences():
    assert [sum(shape.lengths) for shape in small.shapes("cpu", quick=False)] == [16, 64, 256, 1024]
    assert all(len(shape.lengths) == 4 for shape in small.shapes("cuda", quick=False))


def test_measure_times_a_call_not_all_of_them(monkeypatch):
    monkeypatch.setattr(small, "take_turns", lambda turns, *_, **__: {name: [0.05, 0.04, 0.06] for name in turns})
    table = Table("cpu")
    wrong = Contestant(OURS, "", lambda problem: 1.1 * naive_logp(problem))
    (shape,) = small.shapes("cpu", quick=True)
    small.measure(table, shape, CONTESTANTS, rounds=3)
    figures = {(row["contestant"], row["metric"]): row["value"] for row in table.rows}
    assert figures == {(OURS, "time"): "0.5", (NAIVE, "time"): "0.5", (NAIVE, OUR_RATIO): "1"}
    assert "| N=16 V=64 H=64 | 0.5 ms (0.45 … 0.55) | 1 × (1 … 1) |" in report.tables(table.rows)
    again = Table("cpu")
    small.measure(again, shape, [wrong], rounds=3)
    assert [row["status"][:6] for row in again.rows] == ["wrong:"]


def test_measure_calls_everyone_as_often(monkeypatch):
    monkeypatch.setattr(small, "CALLS", 5)
    calls = []
    counted = Contestant(NAIVE, "", lambda problem: calls.append(1) or naive_logp(problem))
    small.measure(Table("cpu"), small.shapes("cpu", quick=True)[0], [counted], rounds=3)
    assert len(calls) == 1 + 5 * 4  # checked once, then a round to warm up and three


def test_a_refused_capture_is_a_status(monkeypatch):
    def captured(run):
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(small, "captured", captured)
    refused = (None, "failed: CUDA error: operation not permitted when stream is capturing")
    assert small._attempt_capture(lambda: None) == refused


@pytest.mark.gpu
def test_captured_replays_what_was_run():
    x, out = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    replay = small.captured(lambda: out.add_(x))
    torch.cuda.synchronize()
    before = out.clone()
    x.fill_(2)
    replay()
    assert torch.equal(out, before + 2)
