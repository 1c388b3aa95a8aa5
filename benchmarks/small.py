"""How long does a call of a few rows take, forward and backward, which is bound by the host, beside plain PyTorch's?"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks import loss
from benchmarks.contest import OUR_RATIO, Contest
from benchmarks.contestants import LOSS, NAIVE, OURS, Contestant
from benchmarks.harness import NEVER, Deadline, attempt, quartiles, ratio, synchronize, take_turns
from benchmarks.shapes import HEADS, Head, Problem, Shape, drawn_lengths, make_problem
from benchmarks.table import Table
from hdpo_kernels import linear_hdpo_loss, naive

CALLS = 100  # that are timed together
GRAPH = "{}, graph"  # name of a contestant whose call is a CUDA graph that is replayed
_ROWS = (16, 64, 256, 1024)
_SEQUENCES = 4


def shapes(device: str, quick: bool) -> list[Shape]:
    """On a CPU a head so small that the GEMMs are next to nothing; on a GPU one of a model."""
    name, head = ("V=64 H=64", Head(64, 64)) if device == "cpu" else ("Qwen2.5-0.5B", HEADS["Qwen2.5-0.5B"])
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = _ROWS[:1] if quick else _ROWS
    return [Shape(f"N={n} {name}", head, drawn_lengths(_SEQUENCES, n), dtype) for n in rows]


def measure(
    table: Table, shape: Shape, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    problem = make_problem(shape, table.device)
    runs = [(c, c.forward_backward) for c in contestants if c.name in (OURS, NAIVE)]
    contest = Contest(table, "small", shape, problem, runs, deadline)
    truth = cache(partial(loss.truth, problem, True))
    contest.check(lambda _: {"loss": truth().result.loss, "d_hidden": truth().d_hidden, "d_weight": truth().d_weight})
    calls: dict[str, Callable[[], object]] = dict(contest.runs)
    if table.device == "cuda":
        for name in contest.runs:
            table.add("small", shape.name, name, "host time", _host_time(contest.runs[name]), "ms")
        for name, function in ((OURS, linear_hdpo_loss), (NAIVE, naive.linear_hdpo_loss)):
            replay, status = _attempt_capture(partial(_forward_backward, function, problem))
            if replay is None:
                table.add_status("small", shape.name, GRAPH.format(name), status)
            else:
                calls[GRAPH.format(name)] = replay

    turns: dict[str, Callable[[], object]] = {name: partial(_repeat, call) for name, call in calls.items()}
    seconds = take_turns(turns, table.device, rounds=rounds, deadline=deadline)
    for name, values in seconds.items():
        median, low, high = (1e3 / CALLS * value for value in quartiles(values))
        table.add("small", shape.name, name, "time", (median, low, high), "ms")
        if name != OURS and OURS in seconds:
            table.add("small", shape.name, name, OUR_RATIO, ratio(seconds[OURS], values), "×")


def _attempt_capture(run: Callable[[], object]) -> tuple[Callable[[], None] | None, str]:
    """`captured`, or why not: a capture that CUDA refuses is over with that, unlike its other errors."""
    try:
        return attempt(partial(captured, run))
    except torch.AcceleratorError as error:
        return None, f"failed: {str(error).splitlines()[0][:120]}"


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of a run, which may copy nothing from memory that is not pinned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates what stays
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _forward_backward(function: Callable[..., naive.HDPOLoss], problem: Problem) -> tuple[Tensor, ...]:
    """With labels on the device, where a graph finds what it reads, and boundaries that are pinned."""
    bounds = _pinned(tuple(problem.cu_seqlens))
    result = function(*problem[:3], bounds, problem.ref_logps, softcap=problem.softcap, **LOSS)
    return torch.autograd.grad(result.loss, problem[:2])


@cache
def _pinned(bounds: tuple[int, ...]) -> Tensor:
    return torch.tensor(bounds).pin_memory()


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(CALLS):
        call()


def _host_time(call: Callable[[], object]) -> tuple[float, float, float]:
    """ms until a call returns, the device having nothing else to do: median and quartiles."""
    taken = []
    for _ in range(CALLS):
        synchronize("cuda")
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    return quartiles(taken)
