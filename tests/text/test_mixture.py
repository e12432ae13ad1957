"""Sources in given proportions: exact passes, every row equally often, the same in every process."""

from fractions import Fraction

import numpy
import pytest

from novelgpt.text.mixture import MixedOrder

SIZES = (7, 100, 41)
WEIGHTS = (Fraction(2), Fraction("0.3"), Fraction(1))
SOURCES = numpy.repeat(numpy.arange(len(SIZES)), SIZES)


@pytest.mark.parametrize("per_epoch", [1, 2, 5])
def test_after_any_number_of_sections_passes_are_within_half_a_row_of_the_weights(per_epoch: int) -> None:
    order = MixedOrder(SOURCES, WEIGHTS, 1, per_epoch)
    seen = numpy.zeros(len(SOURCES), int)
    for section in range(10 * per_epoch):
        numpy.add.at(seen, order.section(section), 1)
        by_source = numpy.bincount(SOURCES, seen)
        for taken, weight, size in zip(by_source, WEIGHTS, SIZES, strict=True):
            assert abs(int(taken) - weight * size * Fraction(section + 1, per_epoch)) <= Fraction(1, 2)
        for source in range(len(SIZES)):
            times = seen[source == SOURCES]
            assert times.max() - times.min() <= 1  # every row as often as any other
    assert by_source.tolist() == [140, 300, 410]


def test_the_order_follows_from_the_seed_and_the_section_alone() -> None:
    whole = [MixedOrder(SOURCES, WEIGHTS, 1).section(number).tolist() for number in range(6)]
    order = MixedOrder(SOURCES, WEIGHTS, 1)
    assert [order.section(number).tolist() for number in (5, 3, 0)] == [whole[5], whole[3], whole[0]]
    assert MixedOrder(SOURCES, WEIGHTS, 2).section(0).tolist() != whole[0]
    second, third = (whole[number][14:44] for number in (0, 1))  # of the source with 0.3 passes
    assert not set(second) & set(third)  # no row again before the others had their turn


def test_a_source_without_weight_or_rows_is_left_out() -> None:
    order = MixedOrder(SOURCES, (Fraction(0), Fraction(1), Fraction(0)), 1)
    assert set(order.section(0).tolist()) == set(range(7, 107))
    order = MixedOrder(numpy.array([0, 0, 2]), (Fraction(1), Fraction(5), Fraction(1)), 1)
    assert sorted(order.section(0).tolist()) == [0, 1, 2]
