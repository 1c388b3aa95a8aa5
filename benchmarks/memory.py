"""How much memory do forward and backward of one pair take, above inputs and gradients, as the pair gets longer?"""

import ctypes
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.contest import Figure, measure_each, peak_mib
from benchmarks.contestants import Contestant
from benchmarks.harness import NEVER, Deadline, in_fresh_process
from benchmarks.shapes import HEADS, Problem, Shape, make_problem
from benchmarks.table import Table

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt: larger blocks are mapped, and unmapped when they are freed


def shapes(device: str, quick: bool) -> list[Shape]:
    """The longest first, then what tells most about the curve."""
    if device == "cpu":
        name, dtype = "V=32000 H=512", torch.float32
        lengths = [64, 128] if quick else [4096, 256, 1024, 512, 2048]
    else:
        name, dtype = "Llama-3-8B", torch.bfloat16
        lengths = [1024, 2048] if quick else [65536, 1024, 16384, 4096]
    pairs = [(length, 7 * length // 8) for length in lengths]
    return [Shape(f"{name}, {pair[0]} + {pair[1]} tokens", HEADS[name], pair, dtype) for pair in pairs]


def measure(
    table: Table, shape: Shape, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    problem = make_problem(shape, table.device)

    def figures(contestant: Contestant) -> list[Figure]:
        if table.device == "cpu":
            return [("peak memory", in_fresh_process(_peak_of_process, contestant, shape), "MiB")]
        return [("peak memory", _peak(contestant, problem), "MiB")]

    measure_each(table, "memory", shape, problem, [c for c in contestants if c.has_backward], figures, deadline)


def _peak(contestant: Contestant, problem: Problem) -> float:
    run = partial(contestant.forward_backward, problem)
    run()  # compiles, tunes, and allocates what stays
    return peak_mib(run, problem.hidden.device.type)


def _peak_of_process(contestant: Contestant, shape: Shape) -> float:
    """On the CPU. What the first run frees goes back to the system, or the second would seem to take nothing."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    return _peak(contestant, make_problem(shape, "cpu"))
