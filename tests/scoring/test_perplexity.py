"""Loss, perplexity, token accuracy and bits per character are what their definitions say."""

import math

import numpy
import pytest

from novelgpt.scoring.perplexity import loss_by_source, summarise

# nats, trained tokens, tokens predicted right of three rows
SUMS = numpy.array([[6.0, 3.0, 1.0], [10.0, 4.0, 2.0], [0.0, 0.0, 0.0]])


def test_means_are_weighted_by_tokens() -> None:
    means = summarise(SUMS)
    assert means == {
        "loss": pytest.approx(16 / 7),
        "perplexity": pytest.approx(math.exp(16 / 7)),
        "token_accuracy": pytest.approx(3 / 7),
        "tokens": 7,
    }


def test_bits_per_character_are_all_nats_in_bits_over_all_characters() -> None:
    means = summarise(SUMS, characters=10)
    assert means.pop("bits_per_character") == pytest.approx(16 / math.log(2) / 10)
    assert means == summarise(SUMS)


def test_a_uniform_guess_costs_its_bits_whatever_the_tokens() -> None:
    # 12 characters from an alphabet of 8 are 3 bits each: as 12 tokens of 8 kinds, or as 6 tokens of 64 kinds.
    singles = numpy.array([[12 * math.log(8), 12, 0]])
    pairs = numpy.array([[6 * math.log(64), 6, 0]])
    assert summarise(singles, 12)["bits_per_character"] == pytest.approx(3.0)
    assert summarise(pairs, 12)["bits_per_character"] == pytest.approx(3.0)
    assert summarise(singles)["perplexity"] != pytest.approx(summarise(pairs)["perplexity"])


def test_nothing_trained_is_no_division_by_zero() -> None:
    assert summarise(numpy.zeros((1, 3)), characters=0)["bits_per_character"] == 0.0


def test_the_losses_of_sources_are_those_of_their_rows() -> None:
    sums = numpy.array([[6.0, 3, 1], [4.0, 1, 0], [8.0, 2, 2]])
    sources = numpy.array([2, 0, 2])
    assert loss_by_source(sums, sources, ["novels", "unseen", "general"]) == {"novels_loss": 4.0, "general_loss": 2.8}
    weighted = sum(summarise(sums[sources == one])["loss"] * sums[sources == one, 1].sum() for one in (0, 2))
    assert summarise(sums)["loss"] == weighted / sums[:, 1].sum()
