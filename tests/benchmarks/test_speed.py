"""Regressions of speed, at shapes small enough for every test run: pytest tests/benchmarks/test_speed.py"""

import pytest
import torch

from benchmarks.contestants import CONTESTANTS, OURS, one_gemm, three_gemms
from benchmarks.harness import ratio, take_turns
from benchmarks.shapes import Head, Shape, make_problem

SHAPE = Shape("small", Head(512, 8000), (64,) * 8, torch.float32)
(ours,) = [contestant for contestant in CONTESTANTS if contestant.name == OURS]


@pytest.fixture(scope="module")
def problem():
    return make_problem(SHAPE, "cpu")


def test_forward_backward_is_near_its_three_gemms(problem):
    turns = {"ours": lambda: ours.forward_backward(problem), "floor": three_gemms(problem)}
    seconds = take_turns(turns, "cpu", rounds=7)
    assert ratio(seconds["ours"], seconds["floor"])[0] < 2.5


def test_forward_is_near_its_gemm(problem):
    seconds = take_turns({"ours": lambda: ours.forward(problem), "floor": one_gemm(problem)}, "cpu", rounds=7)
    assert ratio(seconds["ours"], seconds["floor"])[0] < 3.5


def test_forward_backward_of_peaked_logits_keeps_denormals_out_of_the_gemms(problem):
    peaked = make_problem(SHAPE._replace(peaked=True), "cpu")
    turns = {"peaked": lambda: ours.forward_backward(peaked), "ordinary": lambda: ours.forward_backward(problem)}
    seconds = take_turns(turns, "cpu", rounds=7)
    assert ratio(seconds["peaked"], seconds["ordinary"])[0] < 3  # it was 15 where they got in


@pytest.mark.parametrize("run", ["forward", "forward_backward"])
def test_speed(benchmark, problem, run):
    benchmark.pedantic(getattr(ours, run), args=(problem,), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("floor", [one_gemm, three_gemms])
def test_speed_of_the_floor(benchmark, problem, floor):
    benchmark.pedantic(floor(problem), rounds=5, warmup_rounds=1)
