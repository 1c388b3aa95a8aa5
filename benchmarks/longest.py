"""How long may a pair be for one optimizer step to fit in memory, beside TRL's DPOTrainer on the same model?"""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.contestants import Contestant
from benchmarks.harness import NEVER, Deadline, attempt
from benchmarks.table import Table, installed
from benchmarks.train_step import LARGE, OURS, SMALL, TINY, TRL, Lengths, Setup, present, train

OUR_RATIO = "our length / its length"
PROMPT = random.Random(0).uniform(0.1, 0.5)  # its share of the longer sequence
_PRECISION = 0.05  # of the length found, or _TOKENS if that is more
_TOKENS = 16


class Search(NamedTuple):
    """A model, and the memory that a step may take."""

    name: str
    setup: Setup
    first: int  # tokens of the longer sequence, to begin with
    mib: float | None = None  # above model and data; None: all that the device has


def shapes(device: str, quick: bool) -> list[Search]:
    model, first, mib = (LARGE, 2048, None) if device == "cuda" else (SMALL, 256, 1024.0)
    if quick:
        model, first, mib = TINY, 64, None if device == "cuda" else 64.0
    budget = "" if mib is None else f", {mib:.0f} MiB"
    name = f"{model.name}{budget}, {PROMPT:.0%} prompt, rejected 7/8 of chosen"
    return [
        Search(name, model, first, mib),
        Search(f"{name}, checkpointing", model._replace(checkpointing=True), first, mib),
    ]


def pair(tokens: int) -> Lengths:
    """The pair whose longer sequence, prompt and chosen, has so many tokens; rejected has 7/8 of chosen's."""
    prompt = round(PROMPT * tokens)
    return prompt, tokens - prompt, 7 * (tokens - prompt) // 8


def measure(
    table: Table, search: Search, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    """Tokens of the longer sequence of the longest pair."""
    lengths: dict[str, int] = {}
    for name in present(contestants):
        package = TRL if name == TRL else ""
        if package and not installed(package):
            table.add_status("longest", search.name, name, "not installed", package)
            continue
        fits = _fits(name, search, table.device, deadline)
        found, status = attempt(partial(longest, fits, search.first))
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
            # Two steps: the optimizer's states are there from the end of the first.
            run = train(name, search.setup._replace(lengths=[pair(tokens)] * 2), device)
        except torch.OutOfMemoryError:
            return False
        per_token = max(per_token, (time.monotonic() - begin) / tokens)
        if run.wrong:
            raise ValueError(f"{run.wrong}, with {tokens} tokens")
        return search.mib is None or run.peak_mib <= search.mib

    return fits
