"""Intervals and tests over seeds, against printed tables, numbers worked by hand, and enumeration."""

import itertools
import math
import random

import pytest

from hdpo_train.sweep.significance import Interval, critical_t, holm, interval, p_value, page_trend, paired


@pytest.mark.parametrize(
    ("degrees", "level", "value"),  # NIST e-Handbook of Statistics, 1.3.6.7.2
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (9, 0.95, 2.262), (100, 0.95, 1.984),
     (1, 0.99, 63.657), (2, 0.99, 9.925), (4, 0.99, 4.604), (5, 0.99, 4.032), (30, 0.99, 2.750)],
)  # fmt: skip
def test_critical_t_is_that_of_the_tables(degrees, level, value):
    assert critical_t(degrees, level) == pytest.approx(value, abs=6e-4)


def test_paired_is_the_t_test():
    # differences 1 … 5: mean 3, standard deviation √2.5, standard error √0.5
    result = paired([11, 22, 33, 44, 55], [10, 20, 30, 40, 50], level=0.99)
    assert result.mean == 3
    assert result.t == pytest.approx(3 * math.sqrt(2), rel=1e-12)  # 4.243 < 4.604
    assert result.half_width == pytest.approx(4.6041 * math.sqrt(0.5), rel=1e-5)
    assert not result.excludes_zero
    assert paired([12, 22, 33, 44, 54], [10, 20, 30, 40, 50], 0.99).excludes_zero  # 2, 2, 3, 4, 4: t = 3 / √0.2 = 6.7


def test_paired_without_spread():
    assert paired([1.0, 1.0], [1.0, 1.0]) == Interval(0.0, 0.0, 0.0)
    assert paired([1.0, 1.0], [2.0, 2.0]).t == -math.inf and paired([1.0, 1.0], [2.0, 2.0]).excludes_zero


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = random.Random(0)
    draws = 4000
    covered = sum(not interval([rng.gauss(0, 1) for _ in range(3)]).excludes_zero for _ in range(draws))
    assert covered / draws == pytest.approx(0.95, abs=0.014)  # 4 standard errors


def test_page_trend_of_a_case_worked_by_hand():
    # Ranks 1 2 3 and 1 3 2: L = (1 + 4 + 9) + (1 + 6 + 6) = 27. One block's sums over its 6 orders: 14, 13, 13, 11, 11,
    # 10. Of 36 pairs, 27 or more is 14 + 14 once, 14 + 13 four times.
    assert page_trend([[0.1, 0.2, 0.3], [5, 7, 6]]) == (27, 5 / 36)


def test_page_trend_agrees_with_its_printed_table():
    # Page 1963, table 2: the 5% point is L = 84 for 4 values in 3 blocks, 66 for 3 values in 5 blocks.
    def p_value(statistic, k, n):
        blocks = next(
            blocks
            for blocks in itertools.product(itertools.permutations(range(1, k + 1)), repeat=n)
            if sum(j * rank for block in blocks for j, rank in enumerate(block, 1)) == statistic
        )
        return page_trend(blocks).p_value

    assert p_value(84, 4, 3) <= 0.05 < p_value(83, 4, 3)
    assert p_value(66, 3, 5) <= 0.05 < p_value(65, 3, 5)


@pytest.mark.parametrize("blocks", [[[3, 1, 1, 2], [1, 2, 2, 2]], [[1, 1, 1, 1]], [[1.5, 2.5, 2.5, 9], [4, 3, 2, 1]]])
def test_page_trend_counts_orders_with_ties(blocks):
    def ranks(block):
        return [(sum(v < x for v in block) + sum(v <= x for v in block) + 1) / 2 for x in block]

    def statistic(blocks):
        return sum(j * rank for block in blocks for j, rank in enumerate(ranks(block), 1))

    all_orders = list(itertools.product(*(list(itertools.permutations(block)) for block in blocks)))
    expected = sum(statistic(orders) >= statistic(blocks) for orders in all_orders) / len(all_orders)
    assert page_trend(blocks) == (statistic(blocks), pytest.approx(expected, rel=1e-12))


def test_page_trend_raises_false_alarms_as_rarely_as_it_says():
    rng = random.Random(1)
    p_values = [page_trend([[rng.random() for _ in range(4)] for _ in range(3)]).p_value for _ in range(600)]
    for level in (0.05, 0.2):
        alarms = sum(p <= level for p in p_values) / len(p_values)
        assert level / 3 < alarms < level + 4 * math.sqrt(level * (1 - level) / len(p_values))


def test_page_trend_finds_a_trend_and_not_its_opposite():
    rising = [[1, 2, 3, 4, 5]] * 5
    assert page_trend(rising).p_value == pytest.approx(math.factorial(5) ** -5)
    assert page_trend([block[::-1] for block in rising]).p_value == 1


@pytest.mark.parametrize("blocks", [[], [[1]], [[1, 2], [1, 2, 3]]])
def test_page_trend_refuses_what_has_no_order(blocks):
    with pytest.raises(ValueError, match="blocks of one length"):
        page_trend(blocks)


def test_holm_adjusts_as_in_a_case_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_p_value_is_what_the_critical_value_leaves():
    for degrees in (1, 2, 3, 4, 9):
        assert p_value(-critical_t(degrees, 0.95), degrees) == pytest.approx(0.05)
