"""Figures of each length, and the power of the length with which they grow."""

import contextlib
import time

import pytest

from benchmarks import growth, train_step
from benchmarks.contestants import CONTESTANTS
from benchmarks.harness import Deadline, OutOfTime
from benchmarks.table import Table, installed
from benchmarks.train_step import OUR_MEMORY_RATIO, OURS, TRL, UNSHARED, Run

SERIES, LONG_PROMPT = growth.shapes("cpu", quick=False)


def fake_train(name, setup, device):
    """Memory and time of ours grow with the length and its 1.5th power, TRL's with its square."""
    ((_, chosen, _),) = set(setup.lengths)
    length = chosen / 1000
    return Run([length**1.5], [length**1.5], length if name == OURS else length**2, [0.6931])


def test_shapes_are_the_lengths_of_the_targets():
    assert [pair[1:] for pair in SERIES.pairs] == [(2000, 1750), (4000, 3500), (8000, 7000), (16000, 14000)]
    assert LONG_PROMPT.pairs == [(8000, 4000, 3500)]
    assert SERIES.model.checkpointing and LONG_PROMPT.model.checkpointing


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_measure_tells_the_power_of_each_doubling_and_of_all(monkeypatch):
    monkeypatch.setattr(train_step, "train", fake_train)
    table = Table("cpu")
    growth.measure(table, SERIES, CONTESTANTS, rounds=1)
    powers = {}
    for row in table.rows:
        if ", power" in row["metric"]:
            powers.setdefault((row["contestant"], row["metric"]), []).append(float(row["value"]))
    spans = {row["shape"].partition("length, ")[2] for row in table.rows if "power" in row["shape"]}
    assert spans == {"2000 to 4000", "4000 to 8000", "8000 to 16000", "2000 to 16000"}
    assert powers[OURS, "peak memory, power"] == [1.0] * 4 and powers[TRL, "peak memory, power"] == [2.0] * 4
    assert powers[OURS, "CPU time, power"] == powers[TRL, "time, power"] == pytest.approx([1.5] * 4, rel=1e-3)
    ratios = [float(row["value"]) for row in table.rows if row["metric"] == OUR_MEMORY_RATIO]
    assert ratios == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])


def test_measure_a_long_prompt_is_beside_itself_without_sharing(monkeypatch):
    monkeypatch.setattr(train_step, "train", fake_train)
    table = Table("cpu")
    growth.measure(table, LONG_PROMPT, [], rounds=1)
    (row,) = [row for row in table.rows if row["metric"] == OUR_MEMORY_RATIO]
    assert (row["contestant"], row["value"]) == (UNSHARED, "0.25")
    assert not [row for row in table.rows if "power" in row["metric"]]


@pytest.mark.parametrize(("seconds", "lengths"), [(15, 1), (45, 2), (85, 4)])
def test_measure_keeps_the_lengths_that_the_deadline_allows(seconds, lengths, monkeypatch):
    """A run takes ten seconds, and a length two runs; where less is left, one."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def train(*args):
        now[0] += 10
        return fake_train(*args)

    monkeypatch.setattr(train_step, "train", train)
    table = Table("cpu")
    with contextlib.nullcontext() if lengths == 4 else pytest.raises(OutOfTime):
        growth.measure(table, SERIES, [], rounds=1, deadline=Deadline(seconds))
    assert len({row["shape"] for row in table.rows if "power" not in row["shape"]}) == lengths
    assert len({row["shape"] for row in table.rows if "power" in row["shape"]}) == {1: 0, 2: 1, 4: 4}[lengths]
