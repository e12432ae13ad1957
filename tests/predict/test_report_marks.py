"""What a report finds in texts: where they repeat themselves, what they share, where they loop."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from novelgpt.scoring.repetition import first_loop, repetition
from predict.report.curves import means_by_length, repetition_by_position, seen_before
from predict.report.marks import SHORTEST_OVERLAP, SHORTEST_REPEAT, loops, overlaps, repeats, split_at_marks

TEXTS = st.text(alphabet="天地玄黄，。\n 𠮷", max_size=120)


@given(st.text(max_size=80) | TEXTS)
def test_the_places_of_repetition_are_its_share(text: str) -> None:
    seen = seen_before(text)
    assert len(seen) == max(0, len(text) - 7)
    if len(seen):
        assert seen.mean() == pytest.approx(repetition(text, 8), abs=1e-12)


def test_repetition_by_position() -> None:
    prose = "".join(map(chr, range(0x4E00, 0x4E00 + 100)))
    curve = repetition_by_position([prose + prose[-20:] * 5, prose], 20)
    # The loop begins at 100; the 8-grams that begin from there on have all been seen.
    assert curve.places.tolist() == [10, 30, 50, 70, 90, 110, 130, 150, 170, 190]
    assert curve.counts.tolist() == [2] * 5 + [1] * 5
    assert curve.means.tolist()[:4] == [0.0] * 4
    assert curve.means.tolist()[5:] == [1.0] * 5


def test_means_by_length_are_of_all_rows() -> None:
    chance = numpy.random.default_rng(0)
    lengths, values = chance.integers(1, 9, 200).tolist(), chance.random(200).tolist()
    curve = means_by_length(lengths, values)
    assert curve.counts.sum() == 200
    assert numpy.average(curve.means, weights=curve.counts) == pytest.approx(numpy.mean(values))
    assert (numpy.diff(curve.places) > 0).all()


@settings(deadline=None)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=2))
def test_overlaps_stand_in_the_other_text_and_none_is_left_out(text: str, others: list[str]) -> None:
    spans = overlaps(text, others)
    marked = {place for span in spans for place in range(*span)}
    assert len(marked) == sum(end - start for start, end in spans)
    for span in spans:
        assert any(text[slice(*span)] in other for other in others)
        assert len(text[slice(*span)].strip()) >= SHORTEST_OVERLAP
    for start in range(len(text) - SHORTEST_OVERLAP + 1):
        piece = text[start : start + SHORTEST_OVERLAP]
        if not any(character.isspace() for character in piece) and any(piece in other for other in others):
            assert marked & set(range(start, start + SHORTEST_OVERLAP))


def test_the_longest_overlap_is_taken_first() -> None:
    text, other = "一二三四五六七八九十", "一二三四五六x四五六七八九十"
    assert overlaps(text, [other]) == [(3, 10)]
    assert overlaps("一二三四五\0六七八九十", ["一二三四五", "六七八九十"]) == [(0, 5), (6, 11)]


@settings(deadline=None)
@given(TEXTS)
def test_repeats_stood_in_the_text_before(text: str) -> None:
    for start, end in repeats(text):
        assert text.find(text[start:end]) < start
    assert repeats("甲" * 40) == [(1, 40)]
    repeated = text + "甲乙丙丁戊己庚辛壬癸" * 2
    assert any(end == len(repeated) and end - start >= SHORTEST_REPEAT for start, end in repeats(repeated))


def test_loops_are_what_first_loop_finds_with_their_ends() -> None:
    prose = "".join(map(chr, range(0x4E00, 0x4E00 + 80)))
    text = prose + "风停了，雨也停了。" * 8 + prose[::-1] + "他走。" * 30
    found = loops(text)
    assert [start for start, _ in found] == [80, 80 + 72 + 80]
    assert [end for _, end in found] == [80 + 72, len(text)]
    assert found[0][0] == first_loop(text)
    assert loops(prose) == [] == loops("")


@given(TEXTS, TEXTS)
def test_pieces_are_the_text(text: str, other: str) -> None:
    marks = {"overlap": overlaps(text, [other]), "repeat": repeats(text)}
    pieces = split_at_marks(text, marks)
    assert "".join(piece.text for piece in pieces) == text
    for name, spans in marks.items():
        length = sum(len(piece.text) for piece in pieces if name in piece.marks)
        assert length == sum(end - start for start, end in spans)
