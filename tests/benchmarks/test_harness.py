"""Turns, ratios, peaks, and what becomes of an error."""

import os
import time

import pytest
import torch

from benchmarks import memory
from benchmarks.contestants import CONTESTANTS, NAIVE
from benchmarks.harness import (
    Deadline,
    OutOfTime,
    attempt,
    in_fresh_process,
    peak_bytes,
    quartiles,
    ratio,
    take_turns,
    use_one_device,
)
from benchmarks.shapes import Head, Shape, make_problem
from benchmarks.table import Table


def test_take_turns_rotates_the_order():
    order: list[str] = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, "cpu", rounds=3, warm_up=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]  # the first is warm-up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_take_turns_ends_when_time_is_up_but_not_before_three_rounds():
    assert len(take_turns({"a": lambda: None}, "cpu", rounds=9, seconds=0)["a"]) == 3


@pytest.mark.parametrize(("seconds", "rounds"), [(4.0, 3), (6.5, 5), (100.0, 9)])
def test_take_turns_ends_before_the_deadline(seconds, rounds, monkeypatch):
    """Rounds of one second, one of them to warm up."""
    now = [0.0]
    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: now[0])

    def second() -> None:
        now[0] += 1

    taken = take_turns({"a": second}, "cpu", rounds=9, deadline=Deadline(seconds))
    assert len(taken["a"]) == rounds and now[0] <= seconds


def test_take_turns_does_not_start_rounds_that_it_cannot_end(monkeypatch):
    now = [0.0]
    for clock in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, clock, lambda: now[0])

    def second() -> None:
        now[0] += 1

    with pytest.raises(OutOfTime):
        take_turns({"a": second}, "cpu", rounds=9, deadline=Deadline(3.5))
    assert now[0] == 1  # the round to warm up; three more would end at 4


@pytest.mark.parametrize(
    ("before", "after"), [(None, "0"), ("2,3", "2"), ("5", "5"), ("", ""), ("GPU-a,GPU-b", "GPU-a")]
)
def test_use_one_device_keeps_the_first(before, after, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    use_one_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_ratio_is_taken_within_a_round():
    assert ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == (0.5, 0.5, 0.5)


def test_quartiles():
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_peak_bytes_sees_memory_that_is_gone_again():
    def function() -> None:
        torch.ones(2**24).sum()

    assert abs(peak_bytes(function, "cpu") - 2**26) < 2**24  # pages are counted in batches


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …"), "out of memory"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "needs a C++ compiler"),
        (ValueError("no such head\nmore"), "failed: ValueError: no such head"),
        (AssertionError(), "failed: AssertionError: no message"),
    ],
)
def test_attempt_says_what_went_wrong(error, status):
    def function() -> None:
        raise error

    assert attempt(function) == (None, status)
    assert attempt(lambda: 3) == (3, "")


def test_attempt_does_not_take_the_deadline_for_an_error():
    with pytest.raises(OutOfTime):
        attempt(lambda: Deadline(-1).check())


def test_in_fresh_process_raises_what_the_function_raises():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        in_fresh_process(int, "x")


def test_memory_of_a_contestant_is_the_same_whatever_ran_before():
    """Plain PyTorch holds the logits and their log-softmax at least."""
    shape = Shape("small", Head(64, 16000), (256, 224), torch.float32)
    (naive,) = [contestant for contestant in CONTESTANTS if contestant.name == NAIVE]
    table = Table("cpu")
    logits_mib = sum(shape.lengths) * shape.head.vocab * 4 / 2**20
    memory.measure(table, shape, [naive], rounds=1)
    naive.forward_backward(make_problem(shape._replace(lengths=(512, 448)), "cpu"))
    memory.measure(table, shape, [naive], rounds=1)
    first, second = (float(row["value"]) for row in table.rows)
    assert first == pytest.approx(second, rel=0.1) and 2 * logits_mib < first < 8 * logits_mib
