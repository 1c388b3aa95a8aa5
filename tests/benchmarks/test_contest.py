"""Nobody is timed who gets it wrong, and nobody is missing without a word."""

import pytest
import torch

from benchmarks import forward, loss
from benchmarks.contest import OUR_RATIO
from benchmarks.contestants import CONTESTANTS, NAIVE, OURS, Contestant, naive_logp, naive_loss
from benchmarks.shapes import Head, Shape, make_problem
from benchmarks.table import Table, installed

TINY = Shape("tiny", Head(32, 500), (16, 16, 16, 16), torch.float32)


def raises(problem):
    raise RuntimeError("no kernel for this")


GOOD = tuple(contestant for contestant in CONTESTANTS if contestant.name in (OURS, NAIVE))
BAD = {
    "biased": (Contestant("biased", "", lambda problem: 1.001 * naive_logp(problem)), "wrong: relative error 0."),
    "not a number": (Contestant("not a number", "", lambda p: naive_logp(p) * torch.nan), "wrong: relative error inf"),
    "broken": (Contestant("broken", "", raises), "failed: RuntimeError: no kernel for this"),
    "absent": (Contestant("absent", "", naive_logp, package="no-such-package"), "not installed"),
    "elsewhere": (Contestant("elsewhere", "", naive_logp, needs_cuda=True), "needs CUDA"),
}


@pytest.mark.parametrize("question", [loss, forward], ids=["loss", "forward"])
def test_measure_reports_who_is_wrong_and_does_not_time_them(question):
    table = Table("cpu")
    bad = [contestant for contestant, _ in BAD.values()]
    question.measure(table, TINY, [*bad, *GOOD], rounds=3)
    for name, (_, status) in BAD.items():
        (row,) = [row for row in table.rows if row["contestant"] == name]
        assert row["status"].startswith(status) and not row["metric"], name
    floor = "three GEMMs" if question is loss else "one GEMM"
    metrics = {
        name: {row["metric"] for row in table.rows if row["contestant"] == name} for name in (OURS, NAIVE, floor)
    }
    assert metrics[OURS] == {"time", "speed", f"share of {floor}", "peak memory"}
    assert metrics[NAIVE] == metrics[OURS] | {OUR_RATIO}
    assert metrics[floor] == {"time", "speed", OUR_RATIO}


def test_measure_a_wrong_gradient_is_wrong_though_the_loss_is_right():
    def half(problem):
        loss = naive_loss(problem)
        return loss.detach() / 2 + loss / 2

    table = Table("cpu")
    loss.measure(table, TINY, [Contestant("half", "", loss=half), *GOOD], rounds=1)
    (row,) = [row for row in table.rows if row["contestant"] == "half"]
    assert row["status"].startswith("wrong: relative error 0.5 of d_")


def test_measure_peaked_compares_us_with_ordinary_logits():
    table = Table("cpu")
    loss.measure(table, TINY._replace(peaked=True), GOOD, rounds=1)
    rows = [row["metric"] for row in table.rows if row["contestant"] == "ordinary logits"]
    assert rows == ["time", OUR_RATIO]


@pytest.mark.parametrize("masked", [False, True], ids=["all scored", "half masked"])
@pytest.mark.parametrize("name", [c.name for c in CONTESTANTS if not c.needs_cuda])
def test_contestants_that_run_on_the_cpu_are_right(name, masked):
    (contestant,) = [contestant for contestant in CONTESTANTS if contestant.name == name]
    if contestant.package and not installed(contestant.package):
        pytest.skip(f"{contestant.package} is not installed")
    table = Table("cpu")
    loss.measure(table, TINY._replace(masked=masked), list(dict.fromkeys([contestant, *GOOD])), rounds=1)
    statuses = {row["status"] for row in table.rows if row["contestant"] == name}
    assert statuses <= {"", "needs a C++ compiler", "needs torch 2.13"}


def test_obstacle_softcap():
    problem = make_problem(TINY._replace(head=Head(32, 500, 30.0)), "cpu")
    obstacles = {contestant.name: contestant.obstacle(problem) for contestant in CONTESTANTS}
    assert obstacles[OURS] == "" and obstacles["torch"] in ("no softcap", "needs torch 2.13")
