"""Which rows are kept: lengths, duplicates, leaks, language, excluded rows. Each dropped row has a reason."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import rensa

from dataset.conversation_rows.sources import Row, RowCandidate
from dataset.instructions import Instructions
from dataset.readers import messages_of
from dataset.records import Record

# Reason -> its description in the closing table.
REASONS = {
    "first_chapter": "first chapter of its book, nothing before it",
    "gap_in_chapters": "the chapter before it is missing",
    "no_room_for_context": "not one paragraph of context fits beside the answer",
    "nothing_follows": "the chapter ends with the opening",
    "empty": "a field is empty or missing",
    "question_too_short": "question below --question_min",
    "question_too_long": "question above --question_max",
    "answer_too_short": "answer below --answer_min",
    "answer_too_long": "answer above --answer_max",
    "row_too_long": "question and answer above --max_characters",
    "answer_in_question": "the question contains the answer",
    "not_chinese": "too few Chinese characters among its letters",
    "excluded": "question or answer of an excluded row",
    "near_excluded": "nearly an excluded row",
    "duplicate_question": "question of an earlier row",
    "duplicate_answer": "answer of an earlier row",
    "near_duplicate": "nearly an earlier row",
}
SHINGLE = 5
PERMUTATIONS = 128
BANDS = 32  # of 4: pairs with similarity 0.6 are compared in 99 of 100 cases, with 0.8 always
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_LETTER = re.compile(r"[^\W\d_]")
# Adjacent rows of this task share text by design: the answer of one is in the question of the next.
_ANSWER_ALONE = "next_chapter"


@dataclass(frozen=True)
class Limits:
    """Limits of a row.

    Attributes:
        question: min and max length of the question's fields; None for no limit.
        answer: the same of the answer's fields.
        max_characters: of all messages together, in the longest wording.
        chinese_share: min share of Chinese among the letters of question and answer, in [0, 1].
        near_duplicates: similarity of 5-character shingles (Jaccard) from which rows are duplicates; 0 for off.
        drop_leaks: whether rows are dropped whose question contains the answer.
    """

    question: tuple[int, int | None]
    answer: tuple[int, int | None]
    max_characters: int
    chinese_share: float
    near_duplicates: float
    drop_leaks: bool


class RowFilter:
    """Judges rows one after the other, and remembers those it keeps.

    Args:
        limits: of a row.
        instructions: wordings of the tasks.
        measure: length of a text, in characters or tokens.
    """

    def __init__(self, limits: Limits, instructions: Instructions, measure: Callable[[str], int] = len) -> None:
        self.limits = limits
        self.instructions = instructions
        self.measure = measure
        self._excluded: dict[str, str] = {}
        self._seen: dict[tuple[str, str, str], str] = {}
        self._near: defaultdict[str, _NearIndex] = defaultdict(lambda: _NearIndex(limits.near_duplicates))

    def sides(self, row: Row) -> tuple[str, str]:
        """Question and answer of a row: the texts of their fields, without the wording."""
        question, answer = self.instructions.fields(row["task"], row["source"])
        return "\n".join(row[name] for name in question), "\n".join(row[name] for name in answer)

    def exclude(self, records: Iterable[tuple[str, Record]], tasks: Iterable[str]) -> None:
        """Exclude rows that have a question or an answer in common with `records`, or are near-duplicates of them."""
        for where, record in records:
            for task in tasks:
                question, answer = self.instructions.fields(task, where)
                texts = [str(record[name]) for name in (*question, *answer) if record.get(name)]
                if not texts:
                    messages = messages_of(record, where, self.instructions.fixed()) if "text" not in record else []
                    texts = [message["content"] for message in messages] or [str(record["text"])]
                for text in texts:
                    self._excluded[_key(text)] = where
                self._near[task].add(_compared(task, texts), where)

    def judge(self, candidate: RowCandidate) -> tuple[str, str]:
        """("", "") for a row to keep, which is remembered; else the reason to drop it and a detail."""
        row = candidate.row
        if candidate.reason:
            return candidate.reason, candidate.detail
        sides = self.instructions.fields(row["task"], row["source"])
        if empty := [name for side in sides for name in side if not row.get(name)]:
            return "empty", ", ".join(empty)
        question, answer = self.sides(row)
        for name, text, (shortest, longest) in (
            ("question", question, self.limits.question), ("answer", answer, self.limits.answer),
        ):  # fmt: skip
            length = self.measure(text)
            if length < shortest:
                return f"{name}_too_short", str(length)
            if longest is not None and length > longest:
                return f"{name}_too_long", str(length)
        whole = self.instructions.max_characters(row["task"], row, row["source"])
        if whole > self.limits.max_characters:
            return "row_too_long", str(whole)
        if self.limits.drop_leaks and _key(answer) in _key(question):
            return "answer_in_question", ""
        share = chinese_share(question + answer)
        if share < self.limits.chinese_share:
            return "not_chinese", f"{share:.2f}"
        return self._find_duplicate(row, question, answer)

    def _find_duplicate(self, row: Row, question: str, answer: str) -> tuple[str, str]:
        """As `judge`, by comparison with excluded and earlier rows."""
        task = row["task"]
        keys = {"question": (task, "question", _key(question)), "answer": (task, "answer", _key(answer))}
        for _, _, key in keys.values():
            if key in self._excluded:
                return "excluded", self._excluded[key]
        for name, full in keys.items():
            if full in self._seen:
                return f"duplicate_{name}", self._seen[full]
        near = self._near[task].add(_compared(task, [question, answer]), "", row["id"])
        if near is None:
            self._seen |= dict.fromkeys(keys.values(), row["id"])
        return near or ("", "")


def chinese_share(text: str) -> float:
    """Share of Chinese characters among the letters of a text; 0 for none.

    >>> chinese_share("用BERT做摘要。")
    0.5
    """
    letters = len(_LETTER.findall(text))
    return len(_CHINESE.findall(text)) / letters if letters else 0.0


class _NearIndex:
    """MinHash signatures of texts, looked up by their bands.

    Args:
        threshold: min estimated similarity of near-duplicates; 0 finds none.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._bands = rensa.RMinHashLSH(threshold=threshold or 1.0, num_perm=PERMUTATIONS, num_bands=BANDS)
        self._entries: list[tuple[rensa.RMinHash, tuple[str, str]]] = []

    def add(self, text: str, excluded_at: str, name: str = "") -> tuple[str, str] | None:
        """Add a text, unless it is a near-duplicate of one in the index: then return the reason and that one's name."""
        if not self.threshold:
            return None
        key = _key(text)
        signature = rensa.RMinHash(num_perm=PERMUTATIONS, seed=1)
        signature.update([key[start : start + SHINGLE] for start in range(max(1, len(key) - SHINGLE + 1))])
        if not excluded_at:
            for index in sorted(self._bands.query(signature)):
                other, found = self._entries[index]
                if signature.jaccard(other) >= self.threshold:
                    return found
        self._bands.insert(len(self._entries), signature)
        self._entries.append((signature, ("near_excluded", excluded_at) if excluded_at else ("near_duplicate", name)))
        return None


def _compared(task: str, texts: list[str]) -> str:
    """Of question and answer, the one by which near-duplicates are found: usually the longer one."""
    return texts[-1] if task == _ANSWER_ALONE else max(texts, key=len)


def _key(text: str) -> str:
    """The normalised form by which texts are compared: without blanks, and without differences in width."""
    return "".join(unicodedata.normalize("NFKC", text).split())
