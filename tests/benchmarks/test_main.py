"""The command: what it measures first, what it leaves out when time is up, and one real run."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks.contestants import CONTESTANTS
from benchmarks.table import Table, read

ROOT = Path(__file__).parents[2]


def fake_question(name, seconds, clock, contestants=("ours",)):
    def measure(table, shape, _, rounds, deadline):
        for contestant in contestants:
            deadline.check(seconds)
            clock.now += seconds
            if shape.name == "bad":
                raise ValueError("a bug of ours")
            table.add(name, shape.name, contestant, "time", (1.0,), "ms")

    return SimpleNamespace(measure=measure)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def shapes(*names):
    return [SimpleNamespace(name=name) for name in names]


def test_in_order_asks_every_question_once_before_any_twice():
    order = main.in_order({"loss": ["a", "b", "c"], "longest": ["l", "m"], "memory": ["x"], "forward": ["a", "b"]})
    assert order == [
        ("loss", "a"), ("memory", "x"), ("forward", "a"), ("loss", "b"), ("forward", "b"), ("loss", "c"),
        ("longest", "l"), ("longest", "m"),
    ]  # fmt: skip


def test_run_leaves_out_what_would_end_too_late(monkeypatch, tmp_path, clock):
    questions = {"slow": fake_question("slow", 50, clock), "fast": fake_question("fast", 1, clock)}
    monkeypatch.setattr(main, "QUESTIONS", questions)
    tasks = main.in_order({"slow": shapes("a", "b", "c"), "fast": shapes("a", "b", "c")})
    table = Table("cpu")
    left_out = main.run(tasks, table, [], rounds=1, minutes=104 / 60, out=tmp_path)
    assert left_out == ["slow of c"]
    assert [(row["question"], row["shape"]) for row in read(tmp_path / "cpu.csv")] == [
        ("slow", "a"), ("fast", "a"), ("slow", "b"), ("fast", "b"), ("fast", "c"),
    ]  # fmt: skip


def test_run_does_not_start_a_first_shape_whose_estimate_does_not_fit(monkeypatch, tmp_path, clock):
    monkeypatch.setattr(main, "QUESTIONS", {name: fake_question(name, 30, clock) for name in ("loss", "longest")})
    tasks = main.in_order({"longest": shapes("a", "b"), "loss": shapes("a", "b", "c", "d")})
    minutes = (main.ESTIMATES["loss"] + 60) / 60
    assert main.run(tasks, Table("cpu"), [], 1, minutes, tmp_path) == ["longest of a", "longest of b"]
    assert clock.now == 120 < 60 * minutes < main.ESTIMATES["longest"]


def test_run_stops_inside_a_shape_and_keeps_what_was_measured(monkeypatch, tmp_path, clock):
    monkeypatch.setattr(main, "QUESTIONS", {"slow": fake_question("slow", 50, clock, ("ours", "naive", "trl"))})
    left_out = main.run(main.in_order({"slow": shapes("a", "b")}), Table("cpu"), [], 1, 101 / 60, tmp_path)
    assert clock.now == 100 and left_out == ["the rest of slow of a", "slow of b"]
    assert [row["contestant"] for row in read(tmp_path / "cpu.csv")] == ["ours", "naive"]


def test_main_draws_and_prints_what_was_measured_before_the_device_failed(monkeypatch, tmp_path, capsys):
    def measure(table, *_):
        table.add("loss", "N=8", "naive", "time", (1.0,), "ms")
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(main.QUESTIONS, "loss", SimpleNamespace(measure=measure, shapes=lambda *_: shapes("N=8")))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--only", "loss", "--out", str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with pytest.raises(torch.AcceleratorError):
        main.main()
    assert "| N=8 | 1 ms |" in capsys.readouterr().out and (tmp_path / "cpu-time.png").exists()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_run_goes_on_after_an_error_and_reports_it(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "QUESTIONS", {"loss": fake_question("loss", 0, SimpleNamespace(now=0))})
    main.run(main.in_order({"loss": shapes("bad", "good")}), Table("cpu"), [], 1, float("inf"), tmp_path)
    bad, good = read(tmp_path / "cpu.csv")
    assert bad["status"] == "failed: ValueError: a bug of ours" and good["value"] == "1"


@pytest.mark.parametrize(("options", "stays"), [([], False), (["--quick"], True), (["--minutes", "0.5"], True)])
def test_main_drops_shapes_that_are_no_more_once_all_others_are_measured(options, stays, monkeypatch, tmp_path, clock):
    old = Table("cpu")
    old.add("loss", "gone", "naive", "time", (2.0,), "ms")
    old.write(tmp_path)
    question = fake_question("loss", 20, clock)
    question.shapes = lambda *_: shapes("a", "b")
    monkeypatch.setitem(main.QUESTIONS, "loss", question)
    monkeypatch.setitem(main.ESTIMATES, "loss", 0.0)
    monkeypatch.setattr(main.plots, "draw", lambda *_: [])
    command = ["benchmarks", "--device", "cpu", "--only", "loss", "--out", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", command)
    main.main()
    assert ("gone" in {row["shape"] for row in read(tmp_path / "cpu.csv")}) == stays


def test_quick_run_end_to_end(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    options = f"--quick --device cpu --only loss train_step growth --out {tmp_path}".split()
    command = [sys.executable, "-m", "benchmarks", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read(tmp_path / "cpu.csv")
    names = (contestant.name for contestant in CONTESTANTS if contestant.has_backward)
    contestants = {"three GEMMs", "hdpo_train", "hdpo_train, prompts twice", "trl, linear_logp", *names}
    assert {row["contestant"] for row in rows} == contestants
    assert not [row for row in rows if row["status"].startswith(("wrong", "failed"))]
    assert (tmp_path / "cpu-time.png").exists()
    assert "| Forward + backward" in done.stdout and "| One optimizer step" in done.stdout
    assert "power of the length, 64 to 128" in done.stdout and (tmp_path / "cpu-growth.png").exists()
