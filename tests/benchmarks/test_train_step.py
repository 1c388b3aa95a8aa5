"""Trainers take turns, and one whose loss is wrong is not timed."""

import contextlib
import time

import pytest

from benchmarks import train_step
from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CONTESTANTS
from benchmarks.harness import Deadline, OutOfTime
from benchmarks.table import Table, installed
from benchmarks.train_step import OURS, TRL, Run

(SETUP,) = train_step.shapes("cpu", quick=True)


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_measure_takes_turns_by_runs(monkeypatch):
    order = []

    def train(name, setup, device):
        order.append(name)
        return Run([1.0, 2.0] if name == OURS else [2.0, 4.0], 64.0, 0.6931)

    monkeypatch.setattr(train_step, "train", train)
    table = Table("cpu")
    train_step.measure(table, SETUP, CONTESTANTS, rounds=1)
    assert order == [OURS, TRL, TRL, OURS]
    (row,) = [row for row in table.rows if row["metric"] == OUR_RATIO]
    assert (row["contestant"], row["value"]) == (TRL, "0.5")
    speeds = {row["contestant"]: float(row["value"]) for row in table.rows if row["metric"] == "speed"}
    assert speeds[OURS] == pytest.approx(SETUP.batch_tokens / 1.5, rel=1e-3)


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_measure_a_wrong_loss_is_not_timed(monkeypatch):
    monkeypatch.setattr(train_step, "train", lambda name, *_: Run([1.0], 64.0, 0.6931 if name == OURS else 0.9))
    table = Table("cpu")
    train_step.measure(table, SETUP, CONTESTANTS, rounds=1)
    (row,) = [row for row in table.rows if row["contestant"] == TRL]
    assert row["status"] == "wrong: the loss starts at 0.9, not at log 2"


def test_records_have_the_lengths_of_their_setup():
    for setup in train_step.shapes("cpu", quick=False):
        assert abs(setup.batch_tokens / (2 * setup.pairs) - setup.tokens) < 0.15 * setup.tokens
        assert (len(set(setup.lengths)) > 1) == setup.ragged
        words = [[len(record[key].split()) for key in ("prompt", "chosen", "rejected")]
                 for record in train_step._records(setup)]  # fmt: skip
        assert [(p, c + 1, r + 1) for p, c, r in words] == setup.lengths  # the EOS is the last one


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
@pytest.mark.parametrize(("seconds", "runs"), [(29, [OURS, TRL]), (41, [OURS, TRL, TRL, OURS]), (15, [OURS])])
def test_measure_takes_the_turns_that_the_deadline_allows(seconds, runs, monkeypatch):
    """A run takes ten seconds; one of each trainer, or two."""
    now, order = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def train(name, setup, device):
        now[0] += 10
        order.append(name)
        return Run([1.0], 64.0, 0.6931)

    monkeypatch.setattr(train_step, "train", train)
    table = Table("cpu")
    with contextlib.nullcontext() if len(runs) > 1 else pytest.raises(OutOfTime):
        train_step.measure(table, SETUP, CONTESTANTS, rounds=1, deadline=Deadline(seconds))
    assert order == runs
    assert {row["contestant"] for row in table.rows} == (set(runs) if len(runs) > 1 else set())
