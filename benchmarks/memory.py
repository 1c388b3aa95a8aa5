"""How much memory do forward and backward take above their inputs and gradients?"""

from functools import partial

from benchmarks.contestants import CONTESTANTS, make_problem
from benchmarks.harness import Table, installed, peak_bytes
from benchmarks.shapes import memory_shapes


def run(table: Table, device: str, quick: bool) -> None:
    for shape in memory_shapes(device, quick):
        problem = make_problem(shape.rows, shape.vocab, shape.width, shape.sequences, device, shape.dtype)
        gradients = sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))
        peaks = {}
        for name, contestant in CONTESTANTS.items():
            contestant(make_problem(64, 100, 8, 2, device, shape.dtype))  # one-time allocations of the libraries
            peaks[name] = peak_bytes(partial(contestant, problem), device) - gradients
            peer = installed("trl") if name == "trl" else ""
            table.add("memory", shape.name, name, "peak above gradients", peaks[name] / 2**20, "MiB", peer=peer)
        for name in peaks.keys() - {"hdpo_kernels"}:
            table.add("memory", shape.name, "hdpo_kernels", f"peak / {name}", peaks["hdpo_kernels"] / peaks[name], "×")
