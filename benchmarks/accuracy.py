"""How far are the log-probs of long sequences, and the gradients, from fp64?"""

from collections.abc import Sequence
from functools import cache, partial

import torch

from benchmarks import loss
from benchmarks.contest import Figure, measure_each, relative_error
from benchmarks.contestants import Contestant
from benchmarks.harness import NEVER, Deadline
from benchmarks.shapes import HEADS, Shape, make_problem
from benchmarks.table import Table
from hdpo_kernels import naive


def shapes(device: str, quick: bool) -> list[Shape]:
    head, length = HEADS["V=32000 H=512"], 2048
    if quick:
        head, length = head._replace(hidden_size=128, vocab=4000), 128
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    lengths = (length, 7 * length // 8)
    return [Shape(f"{length} + {lengths[1]} tokens, {name}", head, lengths, dtype) for dtype, name in names.items()]


def measure(
    table: Table, shape: Shape, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    problem = make_problem(shape, table.device)
    truth = cache(partial(loss.truth, problem))

    def figures(contestant: Contestant) -> list[Figure]:
        found = []
        if contestant.logp:
            logps = naive.sequence_sum(contestant.forward(problem)[0].double(), problem.cu_seqlens)
            off = (logps - truth(True).result.logps).abs().max().item()
            found.append(("log-prob of a sequence", off, "nat"))
        if contestant.has_backward:
            true = truth(contestant.has_reference)
            _, d_hidden, d_weight = contestant.forward_backward(problem)
            found.append(("d_hidden, relative", relative_error(d_hidden, true.d_hidden), ""))
            found.append(("d_weight, relative", relative_error(d_weight, true.d_weight), ""))
        return found

    measure_each(table, "accuracy", shape, problem, contestants, figures, deadline)
