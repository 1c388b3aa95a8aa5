"""How long do forward and backward take, beside three bare GEMMs and beside others?"""

from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks.contestants import CONTESTANTS, make_problem, plain, three_gemms
from benchmarks.harness import Table, installed, ratio, take_turns
from benchmarks.shapes import loss_shapes


def run(table: Table, device: str, quick: bool) -> None:
    for shape in loss_shapes(device, quick):
        problem = make_problem(shape.rows, shape.vocab, shape.width, shape.sequences, device, shape.dtype)
        truth = [t.double() for t in plain(problem)]
        for name, contestant in CONTESTANTS.items():  # wrong results are not timed
            errors = [((r - t).norm() / t.norm()).item() for r, t in zip(contestant(problem), truth, strict=True)]
            if not max(errors) < (1e-4 if shape.dtype.itemsize == 4 else 3e-2):
                raise AssertionError(f"{name} is wrong at {shape.name}: relative errors {errors}")
        del truth
        turns: dict[str, Callable[[], object]] = {name: partial(f, problem) for name, f in CONTESTANTS.items()}
        seconds = take_turns({"three GEMMs": three_gemms(problem), **turns}, device, repeats=3 if quick else 9)
        for name, values in seconds.items():
            low, high = 1e3 * min(values), 1e3 * max(values)
            peer = installed("trl") if name == "trl" else ""
            table.add("loss", shape.name, name, "time", 1e3 * median(values), "ms", low, high, peer)
        for name in seconds.keys() - {"hdpo_kernels"}:
            middle, low, high = ratio(seconds["hdpo_kernels"], seconds[name])
            table.add("loss", shape.name, "hdpo_kernels", f"time / {name}", middle, "×", low, high)
