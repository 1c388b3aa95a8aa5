"""The search finds the longest length that fits, and tells what does not fit from what fails."""

import time

import pytest
import torch

from benchmarks import longest
from benchmarks.contestants import CONTESTANTS
from benchmarks.harness import Deadline, OutOfTime
from benchmarks.table import Table, installed
from benchmarks.train_step import OURS, TRL, Run


def longer_sequence(setup):
    ((prompt, chosen, rejected),) = set(setup.lengths)
    assert rejected == 7 * chosen // 8
    return prompt + chosen


@pytest.mark.parametrize("limit", [0, 15, 17, 100, 256, 1000, 100_000])
def test_longest_is_within_its_precision(limit):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= limit

    found = longest.longest(fits, 256)
    assert found <= limit <= found + max(0.05 * found, 16)
    assert len(tried) == len(set(tried)) < 20


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
@pytest.mark.parametrize("runs_out", [False, True])
def test_measure_compares_lengths(runs_out, monkeypatch):
    """By a budget, as on a CPU, and by what the device says when it has no more."""

    def train(name, setup, device):
        mib = longer_sequence(setup) * (0.25 if name == OURS else 1.0)
        if runs_out and mib > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return Run([], [], mib, [0.6931])

    monkeypatch.setattr(longest, "train", train)
    (search, checkpointed) = longest.shapes("cpu", quick=True)
    assert checkpointed.setup.checkpointing and not search.setup.checkpointing
    table = Table("cpu")
    longest.measure(table, search._replace(mib=None if runs_out else 1000), CONTESTANTS, rounds=1)
    figures = {(row["contestant"], row["metric"]): float(row["value"]) for row in table.rows}
    assert 0.95 * 4000 < figures[OURS, "longest sequence"] <= 4000
    assert 0.95 * 1000 < figures[TRL, "longest sequence"] <= 1000
    assert figures[TRL, longest.OUR_RATIO] == pytest.approx(4, rel=0.06)


@pytest.mark.skipif(not installed(TRL), reason="TRL is not installed")
def test_measure_a_wrong_loss_has_no_length(monkeypatch):
    monkeypatch.setattr(longest, "train", lambda name, *_: Run([], [], 2000.0, [0.6931 if name == OURS else 0.9]))
    table = Table("cpu")
    longest.measure(table, longest.shapes("cpu", quick=True)[0], CONTESTANTS, rounds=1)
    ours, theirs = table.rows
    assert (ours["metric"], ours["value"]) == ("longest sequence", "0")
    assert theirs["status"].startswith("failed: ValueError: wrong: the loss starts at 0.9, not at log 2")


def test_measure_does_not_start_a_length_that_would_end_too_late(monkeypatch):
    """A run takes a second for 100 tokens: lengths of 64, 128, 256 … are over after 0.64, 1.92, 4.48, 9.6 seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tried = []

    def train(name, setup, device):
        tried.append(longer_sequence(setup))
        now[0] += tried[-1] / 100
        return Run([], [], 0.0, [0.6931])

    monkeypatch.setattr(longest, "train", train)
    search, _ = longest.shapes("cpu", quick=True)
    with pytest.raises(OutOfTime):
        longest.measure(Table("cpu"), search, [], rounds=1, deadline=Deadline(9))
    assert tried == [64, 128, 256] and now[0] == pytest.approx(4.48)
