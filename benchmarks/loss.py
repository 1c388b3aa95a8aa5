"""How long do forward and backward of the loss take, beside three bare GEMMs and beside others?"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.contest import Contest
from benchmarks.contestants import LOSS, OURS, Contestant, three_gemms
from benchmarks.harness import NEVER, Deadline
from benchmarks.shapes import HEADS, Problem, Shape, drawn_lengths, make_problem
from benchmarks.table import Table
from hdpo_kernels.testing import Outcome, true_outcome


def shapes(device: str, quick: bool) -> list[Shape]:
    """What matters most comes first."""
    small = HEADS["V=32000 H=512"]
    if quick:
        head = small._replace(hidden_size=128, vocab=4000)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return [Shape("N=256 V=4000 H=128", head, drawn_lengths(4, 256), dtype)]
    if device == "cpu":
        plain = Shape("N=2048 V=32000 H=512", small, drawn_lengths(8, 2048), torch.float32)
        return [
            plain,
            plain._replace(name=f"{plain.name}, half masked", masked=True),
            plain._replace(name=f"{plain.name}, peaked", peaked=True),
            Shape("Qwen2.5-0.5B N=512", HEADS["Qwen2.5-0.5B"], drawn_lengths(4, 512), torch.float32),
        ]
    names = ("Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B", "Llama-3.2-1B", "Qwen2.5-7B")
    whole = [Shape(f"{name} N=8192", HEADS[name], drawn_lengths(16, 8192), torch.bfloat16) for name in names]
    masked = [shape._replace(name=f"{shape.name}, half masked", masked=True) for shape in whole[:2]]
    return [whole[0], masked[0], *whole[1:], masked[1]]


def measure(
    table: Table, shape: Shape, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    problem = make_problem(shape, table.device)
    runs = [(c, c.forward_backward) for c in contestants if c.has_backward]
    contest = Contest(table, "loss", shape, problem, runs, deadline)
    outcome = cache(partial(truth, problem))

    def expected(contestant: Contestant) -> dict[str, Tensor]:
        result, d_hidden, d_weight, _ = outcome(contestant.has_reference)
        return {"loss": result.loss, "d_hidden": d_hidden, "d_weight": d_weight}

    contest.check(expected)
    outcome.cache_clear()  # fp64 gradients are large
    beside = {}
    if shape.peaked and OURS in contest.runs:  # do denormal probabilities cost us anything?
        ordinary = make_problem(shape._replace(peaked=False), table.device)
        beside["ordinary logits"] = partial(contest.contestants[OURS].forward_backward, ordinary)
    contest.race(("three GEMMs", three_gemms(problem)), 3, rounds, beside)


def truth(problem: Problem, with_reference: bool) -> Outcome:
    """The loss and its gradients in fp64."""
    inputs = problem.inputs
    if not with_reference:
        inputs = inputs._replace(ref_logps=torch.zeros_like(inputs.ref_logps))
    return true_outcome(inputs, softcap=problem.softcap, **LOSS)
