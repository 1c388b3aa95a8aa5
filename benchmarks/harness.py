"""Time and memory, measured side by side: contestants take turns in one process, since machines are noisy."""

import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_IMPORTED_ONCE = [  # for all fresh processes, where they are installed
    "benchmarks.memory",
    "benchmarks.train_step",
    "datasets",
    "hdpo_train.trainer",
    "liger_kernel.chunked_loss",
    "matplotlib.backends.backend_agg",  # draws the report at the end of a run
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
    "trl.kernels",
    "trl.trainer.dpo_trainer",
]


class OutOfTime(Exception):
    """What was asked would end after the deadline."""


class Deadline:
    """Until when to measure: `seconds` from now."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def check(self, seconds: float = 0.0) -> None:
        """Raises OutOfTime where less is left than what comes next takes."""
        if self.left < seconds:
            raise OutOfTime


NEVER = Deadline()


def take_turns(
    contestants: dict[str, Callable[[], object]],
    device: str,
    *,
    rounds: int,
    seconds: float = 120,
    warm_up: int = 1,
    deadline: Deadline = NEVER,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the order rotates, so that no one always runs after the same one.

    Ends after `rounds`, or once `seconds` have passed or the deadline is near, and three rounds are in. Where these
    would end after the deadline: OutOfTime.
    """
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    last = 0.0  # seconds of the last round
    for i in range(-warm_up, rounds):
        if i >= 3 and (time.perf_counter() - begin > seconds or deadline.left < last):
            break
        deadline.check(last * max(1, min(3, rounds) - i))
        start_of_round = time.perf_counter()
        for name in names[i % len(names) :] + names[: i % len(names)]:
            synchronize(device)
            start = time.perf_counter()
            contestants[name]()
            synchronize(device)
            if i >= 0:
                taken[name].append(time.perf_counter() - start)
        last = time.perf_counter() - start_of_round
    return taken


def ratio(seconds: list[float], base: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within each round: a slow round slows both."""
    return quartiles([a / b for a, b in zip(seconds, base, strict=True)])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), low, high


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most memory in use while `function` runs, above what was in use before. On the CPU: resident, on Linux.

    There in a thread of its own, so that what a contestant keeps for its thread's next call counts.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide what the function takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts again from now
    before = _status("VmRSS")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result()
        return _status("VmHWM") - before


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """The function's result, from a process where nothing has run yet: memory that earlier calls leave to the allocator
    hides what a call takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def attempt(function: Callable[[], T]) -> tuple[T | None, str]:
    """The function's result and no words, or no result and why, in a few words."""
    try:
        return function(), ""
    except OutOfTime:
        raise
    except torch.AcceleratorError:
        raise  # a sticky error: nothing that is measured on the device after it means anything
    except Exception as error:
        status = _describe(error)
    start_afresh()  # after the handler: the error held the memory of everything on its stack
    return None, status


def start_afresh() -> None:
    """Give back cached memory and compiled code."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def use_one_device() -> None:
    """Show this process the first of its GPUs alone, before torch looks: trainers spread a batch over all they see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _describe(error: Exception) -> str:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if "C++ compiler" in text:  # torch.compile on a CPU
        return "needs a C++ compiler"
    return f"failed: {type(error).__name__}: {(text.strip() or 'no message').splitlines()[0][:120]}"


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
