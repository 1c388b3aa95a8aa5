"""How do memory and time of one optimizer step of one long pair grow with its length, beside TRL's DPOTrainer?"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.contestants import Contestant
from benchmarks.harness import NEVER, Deadline
from benchmarks.table import Table
from benchmarks.train_step import LARGE, TINY, UNSHARED, WARM_UP, Lengths, Setup, compare, present

POWER = "{}, power"  # the metric that says to which power of the length another one grows
_PROMPT = 32  # tokens of a short one
_STEPS = 2  # that are timed in a run


class Series(NamedTuple):
    """A model, and pairs that it takes steps with, one at a time."""

    name: str
    model: Setup
    pairs: Sequence[Lengths]  # from short to long


def shapes(device: str, quick: bool) -> list[Series]:
    """Rejected has 7/8 of chosen's tokens. First short prompts; then a long one, twice as long as chosen."""
    model, chosen = (TINY, [2000, 4000, 8000, 16000]) if device == "cpu" else (LARGE, [4096, 8192, 16384, 32768])
    if quick:
        model, chosen = TINY, [64, 128]
    model = model._replace(checkpointing=True)
    short = [(_PROMPT, length, 7 * length // 8) for length in chosen]
    long = [(2 * length, length, 7 * length // 8) for length in chosen[1:2]]
    return [
        Series(model.name, model, short),
        Series(f"{model.name}, prompt of {long[0][0]}", model, long),
    ]


def measure(
    table: Table, series: Series, contestants: Sequence[Contestant], rounds: int, deadline: Deadline = NEVER
) -> None:
    """A shape for each length, and one for each pair of lengths between which the power is taken."""
    names = present(contestants)
    if series.pairs[0][0] > _PROMPT:
        names.insert(1, UNSHARED)
    setups = {
        chosen: series.model._replace(
            name=f"{series.name}, {chosen} + {rejected} tokens",
            lengths=[(prompt, chosen, rejected)] * (WARM_UP + _STEPS),
        )
        for prompt, chosen, rejected in series.pairs
    }

    def add_powers(short: int, long: int) -> None:
        before, after = (_figures(table, setups[length].name) for length in (short, long))
        shape = f"{series.name}, power of the length, {short} to {long}"
        for name, metric in after:
            if metric in ("peak memory", "time", "CPU time") and (name, metric) in before:
                power = math.log(after[name, metric] / before[name, metric]) / math.log(long / short)
                table.add("growth", shape, name, POWER.format(metric), (power,), "")

    lengths = list(setups)
    taken = 0.0  # seconds
    for i, length in enumerate(lengths):
        deadline.check(taken)  # it will take longer than the one before
        begin = time.monotonic()
        compare(table, "growth", setups[length], names, deadline)
        taken = time.monotonic() - begin
        if i:
            add_powers(lengths[i - 1], length)
    if len(lengths) > 2:
        add_powers(lengths[0], lengths[-1])


def _figures(table: Table, shape: str) -> dict[tuple[str, str], float]:
    """By contestant and metric."""
    rows = [row for row in table.rows if (row["question"], row["shape"]) == ("growth", shape) and row["metric"]]
    return {(row["contestant"], row["metric"]): float(row["value"]) for row in rows}
