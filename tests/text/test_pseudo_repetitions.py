"""Pseudo-repetitions: blocks of text whose pieces go on with their own last tokens."""

from pathlib import Path

import numpy
import pytest
import torch

import pretrain.__main__
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from novelgpt.text.packing import PackedBlocks, TokenizedText
from novelgpt.text.pseudo_repetitions import LEAST_CONTEXT, LONGEST_PERIOD, PIECE

BLOCK = 2000
STARTS = [0, 700, 9000]


def blocks(mixed: bool = True) -> PackedBlocks:
    tokens = numpy.arange(1, 400 * BLOCK, dtype=numpy.uint32)  # no token twice
    return PackedBlocks([TokenizedText(tokens, numpy.array(STARTS))], BLOCK, mixed)


def test_each_piece_goes_on_with_its_own_last_tokens() -> None:
    plain, repetitive = blocks(), blocks().with_repetitions(1.0)
    periods_seen = set()
    for index in range(len(plain)):
        row, before = repetitive[index], plain[index]
        ids, labels, positions, periods = (
            row[name] for name in ("input_ids", "labels", "position_ids", "repeat_periods")
        )
        begin = int(plain.spans[index, 0])
        cuts = {0, *range(0, len(ids), PIECE), *(start - begin for start in STARTS if 0 <= start - begin < len(ids))}
        bounds = [*sorted(cuts), len(ids)]
        assert (positions == 0).nonzero()[:, 0].tolist() == bounds[:-1]
        assert (labels == IGNORE_INDEX).nonzero()[:, 0].tolist() == bounds[:-1]
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            repeated = periods[start:end].nonzero()[:, 0] + start
            if end - start < 2 * LEAST_CONTEXT:
                continue
            first, period = int(repeated[0]), int(periods[repeated[0]])
            assert repeated.tolist() == list(range(first, end)) and set(periods[repeated].tolist()) == {period}
            assert first - start >= LEAST_CONTEXT and 1 <= period <= LONGEST_PERIOD and first - period > start
            assert torch.equal(ids[start:first], before["input_ids"][start:first])
            assert torch.equal(ids[repeated], ids[repeated - period])
            periods_seen.add(period)
    assert {1, 2, 3} < periods_seen and max(periods_seen) > 50


def test_the_share_is_the_same_in_every_epoch_and_subset() -> None:
    plain, some = blocks(), blocks().with_repetitions(0.25)
    repetitive = [index for index in range(len(some)) if "repeat_periods" in some[index]]
    assert 0.15 * len(some) < len(repetitive) < 0.35 * len(some)
    part = some.subset(numpy.array(repetitive))
    for number, index in enumerate(repetitive):
        assert torch.equal(part[number]["input_ids"], some[index]["input_ids"])
    for index in set(range(len(some))) - set(repetitive):
        assert all(torch.equal(plain[index][name], some[index][name]) for name in plain[index])


def test_without_packing_a_block_is_one_piece() -> None:
    row = blocks(mixed=False).with_repetitions(1.0)[3]
    assert row.keys() == {"input_ids", "labels", "repeat_periods"}
    assert (row["labels"] == IGNORE_INDEX).nonzero()[:, 0].tolist() == [0]
    repeated = row["repeat_periods"].nonzero()[:, 0]
    assert repeated.tolist() == list(range(int(repeated[0]), len(row["input_ids"])))


def test_batches_hold_the_periods_of_all_their_rows() -> None:
    some = blocks().with_repetitions(0.5)
    kinds = {"repeat_periods" in some[index]: some[index] for index in range(20)}
    shorter = {name: values[:-9] for name, values in kinds[True].items()}
    batch = Collator(0)([kinds[False], kinds[True], shorter])
    assert not batch["repeat_periods"][0].any()
    assert torch.equal(batch["repeat_periods"][1], kinds[True]["repeat_periods"])
    assert torch.equal(batch["repeat_periods"][2, :-9], shorter["repeat_periods"])
    assert not batch["repeat_periods"][2, -9:].any() and bool(batch["repeat_periods"][1, -9:].all())
    assert "repeat_periods" not in Collator(0)([kinds[False]])
    always = Collator(0, always_periods=True)([kinds[False]])["repeat_periods"]
    assert always.shape == (1, BLOCK) and not always.any()


@pytest.mark.parametrize("mixed", [True, False])
def test_tokens_that_repetitions_replace_are_dropped(mixed: bool) -> None:
    """Each token of the text is trained in one block or none; else it is read in one, or dropped."""
    draw = numpy.random.default_rng(1)
    dropped, replaced_and_read = 0, 0
    for length in (513, 600, 1500):
        ends = numpy.cumsum(draw.integers(1, 1500, 12))
        text = TokenizedText(numpy.arange(1, ends[-1] + 1, dtype=numpy.uint32), numpy.array([0, *ends[:-1]]))
        whole = PackedBlocks([text], length, mixed).with_repetitions(0.6)
        cut = int(draw.integers(1, len(whole)))
        for part in (whole, whole.subset(range(cut)), whole.subset(numpy.arange(cut, len(whole)))):
            spanned, read, trained, replaced = set[int](), set[int](), list[int](), set[int]()
            for (begin, end), row in zip(part.spans.tolist(), (part[index] for index in range(len(part))), strict=True):
                own = torch.arange(begin + 1, end + 1)
                kept = row.get("repeat_periods", torch.zeros_like(own)) == 0
                assert torch.equal(row["input_ids"][kept], own[kept])  # so that tokens tell their places
                spanned |= set(own.tolist())
                read |= set(own[kept].tolist())
                replaced |= set(own[~kept].tolist())
                trained += own[kept & (row["labels"] >= 0)].tolist()
            counts = part.counts()
            assert len(set(trained)) == len(trained)
            assert (counts.tokens_in, counts.trained) == (len(spanned), len(trained))
            assert (counts.context, counts.dropped) == (len(read - set(trained)), len(spanned - read))
            repetitive = sum("repeat_periods" in part[index] for index in range(len(part)))
            assert list(counts.notes.values()) == [repetitive]
            dropped, replaced_and_read = dropped + counts.dropped, replaced_and_read + len(replaced & read)
    assert dropped > 1000 and replaced_and_read > 0  # the latter are last in a block, and first in the next


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--ditto", "1.5"], "--ditto 1.5"),
        (["--ditto", "0.5", "--label_smoothing_factor", "0.1"], "without that of --ditto"),
    ],
)
def test_what_does_not_go_with_them_is_refused(words: list[str], cause: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        pretrain.__main__.main.__wrapped__(["--model", "tiny", "--output_dir", str(tmp_path / "run"), *words])  # type: ignore
    assert cause in caught.value.cause and not (tmp_path / "run").exists()
