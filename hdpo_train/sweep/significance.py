"""What a few seeds can show: Student's t intervals, paired differences, Holm's correction, Page's trend test."""

import functools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """mean ± half_width: Student's t confidence interval of a mean over seeds."""

    mean: float
    half_width: float
    t: float  # mean / its standard error

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width  # which is |t| > critical value, and defined without any spread


class Trend(NamedTuple):
    statistic: float  # Page's L
    p_value: float  # of an L as large where no order of a block is more likely than another; one-sided, exact


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The confidence interval of the mean of at least two values, one a seed."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Interval(mean, critical_t(len(values) - 1, level) * error, t)


def paired(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> Interval:
    """values − others, which belong together one by one; a paired t-test where the interval is asked for zero."""
    return interval([value - other for value, other in zip(values, others, strict=True)], level)


def critical_t(degrees: int, level: float) -> float:
    """t with P(|T| < t) = level for Student's T with so many degrees of freedom, to about 12 digits."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection of atan(t / √degrees)
        angle = (low + high) / 2
        low, high = (angle, high) if _probability(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def p_value(t: float, degrees: int) -> float:
    """Two-sided: P(|T| >= |t|) for Student's T with so many degrees of freedom."""
    return 1 - _probability(math.atan(abs(t) / math.sqrt(degrees)), degrees)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for the family that they are: those <= a level are significant with the family's error at most that.

    The k-th smallest of m (from 0) times m − k, and never below a smaller one's. S. Holm, "A simple sequentially
    rejective multiple test procedure", Scand. J. Stat. 6 (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _probability(angle: float, degrees: int) -> float:
    """P(|T| < √degrees · tan(angle)): the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for i in range(odd + 1, degrees, 2):
        total += term
        term *= i / (i + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def page_trend(blocks: Sequence[Sequence[float]]) -> Trend:
    """Do values rise along a block? blocks: one a seed, each with its values in the order in question.

    L = Σ_j j · (sum over blocks of the rank of value j); ties get the mean of their ranks. E. B. Page, "Ordered
    hypotheses for multiple treatments", JASA 58 (1963). The p-value counts the orders of every block: exact, with ties
    too, and for any number of blocks.
    """
    if not blocks or len(blocks[0]) < 2 or len({len(block) for block in blocks}) > 1:
        raise ValueError(f"a trend needs blocks of one length, at least 2, got lengths {[len(b) for b in blocks]}")
    observed, null = 0, Counter({0: 1})  # 2 L -> orders of the blocks so far that give it
    for block in blocks:
        ranks = _doubled_ranks(block)
        observed += sum(position * rank for position, rank in enumerate(ranks, 1))
        orders = _orders(tuple(sorted(ranks)))
        following: Counter[int] = Counter()
        for total, ways in null.items():
            for more, each in orders.items():
                following[total + more] += ways * each
        null = following
    as_large = sum(ways for total, ways in null.items() if total >= observed)
    return Trend(observed / 2, as_large / sum(null.values()))


def _doubled_ranks(values: Sequence[float]) -> list[int]:
    """2 for the smallest, 4 for the next; equal values share the mean of theirs, which is a whole number too."""
    return [1 + 2 * sum(v < value for v in values) + sum(v == value for v in values) for value in values]


@functools.cache
def _orders(ranks: tuple[int, ...]) -> Counter[int]:
    """Σ_j j · rank_j -> how many orders of the ranks give it."""
    placed = {0: Counter({0: 1})}  # set of ranks in the first positions, as bits -> sums
    for position in range(1, len(ranks) + 1):
        following: dict[int, Counter[int]] = defaultdict(Counter)
        for used, sums in placed.items():
            for index, rank in enumerate(ranks):
                if not used >> index & 1:
                    for total, ways in sums.items():
                        following[used | 1 << index][total + position * rank] += ways
        placed = following
    return placed[(1 << len(ranks)) - 1]
