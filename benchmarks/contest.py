"""Contestants on one problem: whoever gets the right results is timed beside the others; the others say why not."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.contestants import NAIVE, OURS, Contestant
from benchmarks.harness import NEVER, Deadline, attempt, peak_bytes, quartiles, ratio, take_turns
from benchmarks.shapes import Problem, Shape
from benchmarks.table import Table

OUR_RATIO = "our time / its time"  # the metric that compares us with a contestant, in that contestant's rows
Run = Callable[[Problem], tuple[Tensor, ...]]
Figure = tuple[str, float, str]  # metric, value, unit


class Contest:
    """`check` drops those whose results are wrong, `race` times the rest side by side."""

    def __init__(
        self,
        table: Table,
        question: str,
        shape: Shape,
        problem: Problem,
        runs: Iterable[tuple[Contestant, Run]],
        deadline: Deadline = NEVER,
    ) -> None:
        self.table, self.question, self.shape, self.problem = table, question, shape, problem
        self.deadline = deadline
        self.contestants: dict[str, Contestant] = {}
        self.runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
        for contestant, run in runs:
            self.contestants[contestant.name] = contestant
            self.runs[contestant.name] = partial(run, problem)
            if obstacle := contestant.obstacle(problem):
                self._drop(contestant.name, obstacle)

    def check(self, truths: Callable[[Contestant], Mapping[str, Tensor]]) -> None:
        """Drop whose relative error is over ten times the largest of plain PyTorch's, or who raises.

        truths: what a contestant should return, by name, in fp64.
        """
        tolerance = torch.finfo(self.problem.hidden.dtype).eps ** 0.5  # where plain PyTorch cannot run
        for name in sorted(self.runs, key=lambda name: name != NAIVE):
            self.deadline.check()
            results, status = attempt(self.runs[name])
            if results is not None:
                truth = truths(self.contestants[name])
                errors = {key: relative_error(x, truth[key]) for key, x in zip(truth, results, strict=True)}
                worst = max(errors, key=lambda key: errors[key])
                if name == NAIVE and errors[worst] < math.inf:
                    tolerance = 10 * errors[worst]
                if errors[worst] > tolerance:
                    status = f"wrong: relative error {errors[worst]:.2g} of {worst}"
            del results  # before the next one needs the memory
            if status:
                self._drop(name, status)

    def race(
        self,
        floor: tuple[str, Callable[[], None]],
        gemms: int,
        rounds: int,
        beside: Mapping[str, Callable[[], object]],
    ) -> None:
        """Write down, of everyone left: time, speed, share of the floor's speed, our time over its, peak memory.

        gemms: how many of them have to be computed. beside: what else takes turns, to be compared with us.
        """
        floor_name, flops = floor[0], gemms * self.shape.gemm_flops
        turns = {floor_name: floor[1], **self.runs, **beside}
        seconds = take_turns(turns, self.table.device, rounds=rounds, deadline=self.deadline)
        for name, values in seconds.items():
            median, low, high = quartiles(values)
            self._add(name, "time", (1e3 * median, 1e3 * low, 1e3 * high), "ms")
            if name in self.runs or name == floor_name:
                self._add(name, "speed", (flops / median / 1e12, flops / high / 1e12, flops / low / 1e12), "TFLOP/s")
            if name in self.runs:
                self._add(name, f"share of {floor_name}", ratio(seconds[floor_name], values), "×")
            if name != OURS and OURS in seconds:
                self._add(name, OUR_RATIO, ratio(seconds[OURS], values), "×")
        for name, run in self.runs.items():
            self._add(name, "peak memory", (peak_mib(run, self.table.device),), "MiB")

    def _add(self, name: str, metric: str, values: tuple[float, ...], unit: str) -> None:
        self.table.add(self.question, self.shape.name, name, metric, values, unit, self._package(name))

    def _drop(self, name: str, status: str) -> None:
        self.table.add_status(self.question, self.shape.name, name, status, self._package(name))
        del self.runs[name]

    def _package(self, name: str) -> str:
        return self.contestants[name].package if name in self.contestants else ""


def measure_each(
    table: Table,
    question: str,
    shape: Shape,
    problem: Problem,
    contestants: Iterable[Contestant],
    figures: Callable[[Contestant], list[Figure]],
    deadline: Deadline = NEVER,
) -> list[Contestant]:
    """The figures of each contestant by itself, or why it has none; returns those that have figures."""
    measured = []
    for contestant in contestants:
        found, status = None, contestant.obstacle(problem)
        if not status:
            deadline.check()
            found, status = attempt(partial(figures, contestant))
        if found is None:
            table.add_status(question, shape.name, contestant.name, status, contestant.package)
            continue
        for metric, value, unit in found:
            table.add(question, shape.name, contestant.name, metric, (value,), unit, contestant.package)
        measured.append(contestant)
    return measured


def relative_error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖; infinite if it is not a number."""
    error = ((result.double() - truth).norm() / truth.norm()).item()
    return math.inf if math.isnan(error) else error


def peak_mib(run: Callable[[], tuple[Tensor, ...]], device: str) -> float:
    """Most memory in use during a run, above what was there before and what it returns."""
    returned = 0

    def function() -> None:
        nonlocal returned
        returned = sum(result.nbytes for result in run())

    return (peak_bytes(function, device) - returned) / 2**20
