"""Trainers take turns, and one whose loss is wrong is not timed."""

import contextlib
import re
import statistics
import time

import pytest

from benchmarks import train_step
from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CONTESTANTS
from benchmarks.harness import Deadline, OutOfTime
from benchmarks.table import Table, installed
from benchmarks.train_step import IN_TRL, OUR_CPU_RATIO, OUR_MEMORY_RATIO, OURS, OVER_TRL, TRL, Run

(SETUP,) = train_step.shapes("cpu", quick=True)


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_measure_takes_turns_by_runs(monkeypatch):
    order = []

    def train(name, setup, device):
        order.append(name)
        if name == OURS:
            return Run([1.0, 2.0], [0.5, 0.75], 64.0, [0.6931])
        part = 0.5 if name == IN_TRL else 1.0
        return Run([part * 2.0, part * 4.0], [part * 4.0, part * 6.0], part * 256.0, [0.6931])

    monkeypatch.setattr(train_step, "train", train)
    table = Table("cpu")
    train_step.measure(table, SETUP, CONTESTANTS, rounds=1)
    assert order == [OURS, TRL, IN_TRL, IN_TRL, TRL, OURS]
    figures = {(row["contestant"], row["metric"]): float(row["value"]) for row in table.rows}
    ratios = {metric: figures[TRL, metric] for metric in (OUR_RATIO, OUR_CPU_RATIO, OUR_MEMORY_RATIO)}
    assert ratios == {OUR_RATIO: 0.5, OUR_CPU_RATIO: 0.125, OUR_MEMORY_RATIO: 0.25}
    assert figures[OURS, "CPU time"] == 625 and not {(OURS, ratio) for ratio in ratios} & figures.keys()
    over_trl = {(who, metric): value for (who, metric), value in figures.items() if metric.endswith("/ trl's")}
    assert over_trl == {(IN_TRL, OVER_TRL.format(metric)): 0.5 for metric in ("time", "CPU time", "peak memory")}
    assert figures[OURS, "speed"] == pytest.approx(SETUP.batch_tokens / 1.5, rel=1e-3)


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_measure_a_wrong_loss_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        train_step, "train", lambda name, *_: Run([1.0], [1.0], 64.0, [0.6931 if name == OURS else 0.9])
    )
    table = Table("cpu")
    train_step.measure(table, SETUP, CONTESTANTS, rounds=1)
    (row,) = [row for row in table.rows if row["contestant"] == TRL]
    assert row["status"] == "wrong: the loss starts at 0.9, not at log 2"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lengths_are_near_what_a_name_says(device):
    for setup in train_step.shapes(device, quick=False):
        assert setup.steps == train_step.WARM_UP + train_step.STEPS and len(set(setup.lengths)) == len(setup.lengths)
        if told := re.search(r"(\d+) pairs?, about (\d+) tokens a sequence, (\d+)% prompt", setup.name):
            pairs, tokens, prompt = map(int, told.groups())
            prompts = sum(lengths[0] for lengths in setup.lengths) / len(setup.lengths)
            assert pairs == setup.pairs and setup.batch_tokens / (2 * pairs) == pytest.approx(tokens, rel=0.15)
            assert prompts == pytest.approx(prompt / 100 * tokens, rel=0.25)
        else:
            assert setup.pairs == 8
            medians = [statistics.median(column) for column in zip(*setup.lengths, strict=True)]
            assert medians == pytest.approx([60, 125, 125], rel=0.1)


def test_records_have_the_lengths_of_their_setup():
    words = [[len(record[key].split()) for key in ("prompt", "chosen", "rejected")]
             for record in train_step._records(SETUP)]  # fmt: skip
    assert [(p, c + 1, r + 1) for p, c, r in words] == SETUP.lengths  # the EOS is the last one


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
@pytest.mark.parametrize(
    ("seconds", "runs"),
    [(39, [OURS, TRL, IN_TRL]), (61, [OURS, TRL, IN_TRL, IN_TRL, TRL, OURS]), (15, [OURS])],
)
def test_measure_takes_the_turns_that_the_deadline_allows(seconds, runs, monkeypatch):
    """A run takes ten seconds; one of each trainer, or two."""
    now, order = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def train(name, setup, device):
        now[0] += 10
        order.append(name)
        return Run([1.0], [1.0], 64.0, [0.6931])

    monkeypatch.setattr(train_step, "train", train)
    table = Table("cpu")
    with contextlib.nullcontext() if len(runs) > 1 else pytest.raises(OutOfTime):
        train_step.measure(table, SETUP, CONTESTANTS, rounds=1, deadline=Deadline(seconds))
    assert order == runs
    assert {row["contestant"] for row in table.rows} == (set(runs) if len(runs) > 1 else set())
