"""How long may a pair be for one optimizer step to fit in memory, beside TRL's DPOTrainer on the same model?"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.contestants import Contestant
from benchmarks.harness import NEVER, Deadline, attempt
from benchmarks.table import Table, installed
from benchmarks.train_step import OURS, TRL, Setup, train
from benchmarks.train_step import shapes as steps_measured

OUR_RATIO = "our length / its length"
_PRECISION = 0.05  # of the length found, or _TOKENS if that is more
_TOKENS = 16


class Search(NamedTuple):
    """A model, and the memory that a step may take."""

    name: str
    setup: Setup  # its tokens are what is tried first
    mib: float | None = None  # above model and data; None: all that the device has


def shapes(device: str, quick: bool) -> list[Search]:
    model = steps_measured(device, quick)[0]
    # Two steps: the optimizer's states are there from the end of the first.
    model = model._replace(pairs=1, steps=2)
    mib = None if device == "cuda" else 64.0 if quick else 1024.0
    name = model.name if mib is None else f"{model.name}, {mib:.0f} MiB"
    return [
        Search(name, model, mib),
        Search(f"{name}, checkpointing", model._replace(checkpointing=True), mib),
    ]


def measure(
    table: Table, search: Search, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    """Tokens of each sequence of the longest pair, half of them prompt."""
    names = [OURS, *(contestant.name for contestant in contestants if contestant.name == TRL)]
    lengths: dict[str, int] = {}
    for name in names:
        package = TRL if name == TRL else ""
        if package and not installed(package):
            table.add_status("longest", search.name, name, "not installed", package)
            continue
        fits = _fits(name, search, table.device, deadline)
        found, status = attempt(partial(longest, fits, search.setup.tokens))
        if found is None:
            table.add_status("longest", search.name, name, status, package)
            continue
        lengths[name] = found
        table.add("longest", search.name, name, "longest sequence", (found,), "tokens", package)
        if name != OURS and OURS in lengths and found:
            table.add("longest", search.name, name, OUR_RATIO, (lengths[OURS] / found,), "×", package)


def longest(fits: Callable[[int], bool], first: int) -> int:
    """The largest length known to fit, at most 5 % (or 16) below one that does not; 0: none does.

    By doubling from `first`, then bisection: what fits, fits if it is shorter.
    """
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(_PRECISION * low, _TOKENS):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(name: str, search: Search, device: str, deadline: Deadline) -> Callable[[int], bool]:
    """Whether the trainer takes its steps with a pair of a length. Raises ValueError if its loss is wrong."""
    per_token = 0.0  # seconds of the slowest run so far, which the next one may take too

    def fits(tokens: int) -> bool:
        nonlocal per_token
        deadline.check(per_token * tokens)
        begin = time.monotonic()
        try:
            run = train(name, search.setup._replace(tokens=tokens), device)
        except torch.OutOfMemoryError:
            return False
        per_token = max(per_token, (time.monotonic() - begin) / tokens)
        if run.wrong:
            raise ValueError(f"{run.wrong}, with {tokens} tokens")
        return search.mib is None or run.peak_mib <= search.mib

    return fits
