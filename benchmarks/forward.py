"""How long do log-probs alone take, as in evaluation and in the reference pass, beside one bare GEMM and others?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.contest import Contest
from benchmarks.contestants import Contestant, one_gemm
from benchmarks.harness import NEVER, Deadline
from benchmarks.shapes import Problem, Shape, make_problem
from benchmarks.table import Table
from hdpo_kernels import naive


def shapes(device: str, quick: bool) -> list[Shape]:
    return [shape for shape in loss.shapes(device, quick) if not shape.masked and not shape.peaked][:3]


def measure(
    table: Table, shape: Shape, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    problem = make_problem(shape, table.device)
    contest = Contest(table, "forward", shape, problem, [(c, c.forward) for c in contestants if c.logp], deadline)
    truth = _truth(problem)
    contest.check(lambda contestant: {"logp": truth})
    contest.race(("one GEMM", one_gemm(problem)), 1, rounds, {})


@torch.no_grad()
def _truth(problem: Problem, slice_rows: int = 512) -> Tensor:
    """(N,) log-probs in fp64, a slice of rows at a time."""
    hidden, weight = problem.hidden.double(), problem.weight.double()
    slices = zip(hidden.split(slice_rows), problem.labels.split(slice_rows), strict=True)
    parts = [naive.linear_logp(rows, weight, labels, softcap=problem.softcap).logp for rows, labels in slices]
    return torch.cat(parts)
