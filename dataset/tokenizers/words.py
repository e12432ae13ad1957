"""A vocabulary of words, with BERT's marks, as GPT-2 models of Chinese stories have been trained on."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dataset.tokenizers.too_small import check_room, corpus_too_small
from novelgpt.scoring.segmentation import words as cut_by_jieba
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pip_install
from novelgpt.text.pretokenization import QUOTATION_MARKS

SEGMENTERS = ("jieba", "thulac")
PADDING, UNKNOWN, END, LINE_END, BEGIN = BERT_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A prompt is what was asked and a line end; an answer ends as a text does.
WORDS_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
# Words of their own in every text.
MARKS = [*QUOTATION_MARKS, *"0123456789"]
# Of choosing the words: characters replace words, whose characters are then missing in turn.
ROUNDS = 4
# By how much a word's score exceeds that of its best split (natural logarithm).
MARGIN = 1e-3
# A literal "[PAD]" that is to be text is none.
_SPLITS = rf"[{QUOTATION_MARKS}]|\p{{N}}|\[(?=(?:PAD|UNK|CLS|MASK)\])"
_MARK = re.compile(rf"([{QUOTATION_MARKS}\d\n])")
# Of neighbouring blanks, all but the first.
_MORE_BLANKS = re.compile("((?<=[ \u3000])[ \u3000]+)")

Segmenter = Callable[[str], list[str]]


def load_segmenter(name: str) -> Segmenter:
    """A function that cuts a text into words, whose concatenation is the text.

    Args:
        name: one of SEGMENTERS.

    Raises:
        UserError: its package is missing.
    """
    if name == "jieba":
        return cut_by_jieba
    try:
        import thulac  # an extra, of 50 MB
    except ImportError as error:
        raise UserError("--segmenter thulac needs the package thulac", pip_install("thulac")) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it is loaded
        model = thulac.thulac(seg_only=True)

    def cut_by_thulac(text: str) -> list[str]:
        words: list[str] = []
        for part in _MORE_BLANKS.split(text):  # thulac drops them
            words += [part] if part.isspace() else [word for word, _ in model.cut(part)]
        return words

    return cut_by_thulac


def train_words(pieces: list[str], vocabulary_size: int, max_token_length: int, segmenter: Segmenter) -> Tokenizer:
    """Train a vocabulary of words whose tokenizer.json segments by itself.

    A line end is [SEP]; [MASK] begins a text and [CLS] ends it. Of all ways to cut a text into words of the vocabulary,
    the likeliest is taken (a unigram model), which is how jieba reads its own dictionary.

    Args:
        pieces: of text.
        vocabulary_size: words, marks included.
        max_token_length: characters that a word may have.
        segmenter: cuts the pieces into words.

    Raises:
        UserError: the pieces have fewer words, or there is no room.
    """
    least = len(BERT_MARKS) + len(MARKS)
    check_room("words", vocabulary_size, least)
    counts = count_words(pieces, segmenter, max_token_length)
    chosen = choose_words(counts, vocabulary_size - least)
    if least + len(chosen) < vocabulary_size:
        raise corpus_too_small("words", vocabulary_size, least + len(chosen), least)
    scores = raise_scores(chosen)
    scored = [(token, 0.0) for token in (*BERT_MARKS, *MARKS)] + list(scores.items())
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=BERT_MARKS.index(UNKNOWN)))
    tokenizer.normalizer = normalizers.Replace("\n", LINE_END)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPLITS), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(LINE_END, "\n"), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        pair=f"{BEGIN} $A {LINE_END} $B {END}",
        special_tokens=[(mark, BERT_MARKS.index(mark)) for mark in (BEGIN, LINE_END, END)],
    )
    special = [mark for mark in BERT_MARKS if mark != LINE_END]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in special])
    # Not special, as answers are printed without special tokens: their line ends are to stay. Found where the
    # normalizer has written it.
    tokenizer.add_tokens([AddedToken(LINE_END, special=False, normalized=True)])
    return tokenizer


def count_words(pieces: list[str], segmenter: Segmenter, longest: int) -> Counter[str]:
    """How often each word occurs, without marks and line ends; of a longer word, its characters are counted."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        for part in _MARK.split(piece)[::2]:  # between marks
            for word in segmenter(part) if part else ():
                counts.update([word] if len(word) <= longest else word)
    for mark in MARKS:
        counts.pop(mark, None)
    return counts


def choose_words(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """The words that are used most often, and how often.

    A single character is also used where a word that is not among them is written with it: without it, that would be
    unknown. So words and characters compete for the same room.
    """
    chosen: dict[str, int] = dict(counts)
    for _ in range(ROUNDS):
        uses = Counter(counts)
        for word, number in counts.items():
            if word not in chosen:
                for character in word:
                    uses[character] += number
        # Characters that are words themselves, and are not among the chosen, have been counted twice.
        for word, number in counts.items():
            if len(word) == 1 and word not in chosen:
                uses[word] -= number
        ranked = sorted(uses, key=lambda word: (-uses[word], word))[:size]
        chosen = {word: uses[word] for word in ranked}
    return chosen


def raise_scores(uses: Mapping[str, int]) -> dict[str, float]:
    """The logarithm of each word's frequency, or a little more than the best split of the word has, if that is higher.

    So every word is one token where it stands alone.
    """
    total = sum(uses.values())
    scores = {word: math.log(number / total) for word, number in uses.items()}
    for word in sorted(uses, key=len):
        if len(word) > 1:
            scores[word] = max(scores[word], _best_split(word, scores) + MARGIN)
    return scores


def _best_split(word: str, scores: Mapping[str, float]) -> float:
    """The highest sum of the scores of shorter words that make up a word; -inf where there is none."""
    best = [0.0] + [-math.inf] * len(word)
    for end in range(1, len(word) + 1):
        for begin in range(end == len(word), end):
            part = scores.get(word[begin:end])
            if part is not None:
                best[end] = max(best[end], best[begin] + part)
    return best[-1]
