"""Wordings of rows that name a task: questions and answers drawn from templates when a row is read."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_yaml
from novelgpt.text.messages import Message

BUILT_IN = Path(__file__).with_name("instructions.yaml")
PAPERS_TASK = "title_to_abstract"
# Placeholders of questions that state the length of the answer.
COMPUTED = ("characters", "characters_at_most")


@dataclass(frozen=True)
class Wording:
    """One way to ask a question, with the ways to answer it.

    Attributes:
        user: pattern of the question.
        system: pattern of the system message; "" for none.
        answers: patterns of the answer, at least one.
    """

    user: str
    system: str
    answers: tuple[str, ...]

    @property
    def question_fields(self) -> frozenset[str]:
        """Fields of the row that the question contains."""
        return (_placeholders(self.system) | _placeholders(self.user)) - set(COMPUTED)

    @property
    def answer_fields(self) -> frozenset[str]:
        """Fields of the row that its answers contain."""
        return frozenset().union(*map(_placeholders, self.answers))

    def messages(self, record: Mapping[str, Any], answer: int = 0) -> list[Message]:
        """System message where there is one, question, and answer number `answer` where the row has its fields."""
        fields = _placeholders(self.answers[answer])
        values = {name: str(record[name]) for name in (self.question_fields | fields) if name in record}
        answered = fields <= values.keys()
        if answered:
            length = sum(len("".join(values[name].split())) for name in fields)
            values |= {"characters": str(rounded(length)), "characters_at_most": str(rounded_up(length))}
        turns = {"system": self.system, "user": self.user, "assistant": self.answers[answer] if answered else ""}
        said = {role: pattern.format_map(values) for role, pattern in turns.items() if pattern or role == "user"}
        return [{"role": role, "content": content} for role, content in said.items()]


@dataclass(frozen=True)
class Instructions:
    """The wordings of each task, and how one of them is chosen for a row.

    Attributes:
        tasks: task -> wordings, at least one each.
        seed: of the random choice; None takes the first question with its first answer for every row.
        words_papers: whether title/abstract rows without a task get a wording of `title_to_abstract`, too.
    """

    tasks: Mapping[str, tuple[Wording, ...]]
    seed: int | None = None
    words_papers: bool = False

    def fixed(self) -> Instructions:
        """The same wordings, of which every row takes the first, so that scores can be compared."""
        return replace(self, seed=None)

    def messages(self, task: str, record: Mapping[str, Any], where: str) -> list[Message]:
        """The messages of a row. The choice depends on the seed, the task and the row's id (its fields, without one).

        Under the fixed wording, a row without the fields of the answer gives a question without one, for prediction.

        Args:
            task: what the row is for.
            record: the row; the fields that the wording needs are texts.
            where: file and line, for errors.

        Raises:
            UserError: no such task, or a field is missing or not a text.
        """
        wordings = self.wordings(task, where)
        question, answer = _fields(wordings if self.seed is not None else wordings[:1])
        if self.seed is None and all(record.get(name) is None for name in answer):
            answer = frozenset()
        for name in sorted(question | answer):
            if not isinstance(record.get(name), str):
                raise UserError(
                    f"{where}: field {name} of the task {task} is {'not a text' if record.get(name) else 'missing'}",
                    f"give the row the texts {', '.join(sorted(question | answer))}",
                )
        texts = {name: record[name] for name in sorted(question | answer)}
        if self.seed is None:
            return wordings[0].messages(texts)
        key = json.dumps([self.seed, task, str(record.get("id") or "") or texts], ensure_ascii=False).encode("utf-8")
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        wording = wordings[number % len(wordings)]
        return wording.messages(texts, number // len(wordings) % len(wording.answers))

    def wordings(self, task: str, where: str) -> tuple[Wording, ...]:
        """The wordings of a task.

        Raises:
            UserError: no such task.
        """
        if task not in self.tasks:
            nearest = difflib.get_close_matches(str(task), self.tasks, n=1, cutoff=0.0)[0]
            raise UserError(
                f"{where}: no task {task!r} (did you mean {nearest!r}?)",
                f"take one of {', '.join(self.tasks)}, or bring its wordings with --instruction_templates",
            )
        return self.tasks[task]

    def fields(self, task: str, where: str) -> tuple[list[str], list[str]]:
        """Names of the fields that the questions of a task contain, and of those that its answers contain."""
        question, answer = _fields(self.wordings(task, where))
        return sorted(question), sorted(answer)

    def max_characters(self, task: str, record: Mapping[str, Any], where: str) -> int:
        """Number of characters of the row in the longest of its wordings, all messages together."""
        return max(
            sum(len(message["content"]) for message in wording.messages(record, answer))
            for wording in self.wordings(task, where)
            for answer in range(len(wording.answers))
        )


def load_instructions(files: Sequence[str] = (), seed: int | None = None) -> Instructions:
    """Load the built-in wordings, then those of `files`; later ones replace earlier ones, task by task.

    Args:
        files: YAML files in the form of dataset/instructions.yaml.
        seed: of the random choice; None for the first wording of each task.

    Raises:
        UserError: a file that cannot be read, or an invalid pattern; names the file, the task and the pattern.
    """
    tasks = dict(_built_in())
    for file in files:
        tasks |= _read(Path(file), tasks)
    return Instructions(tasks, seed, words_papers=bool(files))


def rounded(length: int) -> int:
    """Round a length to two digits, at most 5 % off.

    >>> rounded(19), rounded(208), rounded(1215)
    (19, 210, 1200)
    """
    step = 10 ** max(0, len(str(length)) - 2)
    return (length + step // 2) // step * step


def rounded_up(length: int) -> int:
    """Round a length up to a multiple of ten, from 1000 on of a hundred.

    >>> rounded_up(19), rounded_up(208), rounded_up(1215)
    (20, 210, 1300)
    """
    step = 10 if length < 1000 else 100
    return -(-length // step) * step


@functools.cache
def _built_in() -> dict[str, tuple[Wording, ...]]:
    return _read(BUILT_IN, {})


def _read(path: Path, known: Mapping[str, tuple[Wording, ...]]) -> dict[str, tuple[Wording, ...]]:
    content = read_yaml(path, "name an existing YAML file", f"write it like {BUILT_IN}")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no tasks", f"write it like {BUILT_IN}")
    tasks = {}
    for task, entry in content.items():
        where = f"{path}: task {task}"
        _check_keys(entry, {"questions", "answers", "extends"}, where)
        wordings = _wordings(entry, where)
        wordings = (*known.get(task, ()), *wordings) if entry.get("extends") else wordings
        if not set(COMPUTED).isdisjoint(_placeholders(wordings[0].system + wordings[0].user)):
            raise UserError(
                f"{where}: the first question, which evaluation takes, states the length of the answer",
                "put a question without {characters} first",
            )
        tasks[str(task)] = wordings
    return tasks


def _wordings(entry: dict[str, Any], where: str) -> tuple[Wording, ...]:
    questions = entry.get("questions")
    if not isinstance(questions, list) or not questions:
        raise UserError(f"{where} has no list of questions", "write questions: [text, …]")
    wordings = []
    for number, question in enumerate(questions, start=1):
        place = f"{where}, question {number}"
        parts = {"user": question} if isinstance(question, str) else question
        _check_keys(parts, {"user", "system", "answers"}, place)
        answers = parts.get("answers", entry.get("answers"))
        if not isinstance(answers, list) or not answers:
            raise UserError(f"{place} has no list of answers", 'write answers: ["{field}", …], with the task or here')
        wording = Wording(
            _pattern(parts.get("user"), f"{place}, user", computed=True),
            _pattern(parts.get("system", ""), f"{place}, system", computed=True),
            tuple(_pattern(answer, f"{place}, answer {nth}") for nth, answer in enumerate(answers, start=1)),
        )
        shared = sorted(wording.question_fields & wording.answer_fields)
        if shared:
            raise UserError(f"{place} holds what the answer is: {{{shared[0]}}}", "take it out of the question")
        if not all(map(_placeholders, wording.answers)):
            raise UserError(f"{place} has an answer without a {{field}}", "every answer holds a field of the row")
        wordings.append(wording)
    return tuple(wordings)


def _fields(wordings: Sequence[Wording]) -> tuple[frozenset[str], frozenset[str]]:
    """Fields of the questions and of the answers of all `wordings`."""
    question = frozenset[str]().union(*(wording.question_fields for wording in wordings))
    return question, frozenset[str]().union(*(wording.answer_fields for wording in wordings))


def _check_keys(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}", f"write the keys {', '.join(sorted(known))}")
    unknown = sorted(map(str, set(entry) - known))
    if unknown:
        raise UserError(f"{where} has the unknown key {unknown[0]!r}", f"use {', '.join(sorted(known))}")


def _pattern(text: Any, where: str, computed: bool = False) -> str:
    """Check a pattern: placeholders are plain names, and computed ones stand in questions only."""
    if not isinstance(text, str):
        raise UserError(f"{where} is not a text", "write a text with {field} placeholders")
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"{where}: {error}", "write {field}, and {{ or }} for a brace") from error
    for _, name, specification, conversion in parts:
        if name is not None and (not name.isidentifier() or specification or conversion):
            raise UserError(f"{where}: {{{name}}} is not a placeholder", "write {field}, and {{ or }} for a brace")
        if name in COMPUTED and not computed:
            raise UserError(f"{where}: {{{name}}} is in an answer", "use it in questions")
    return text


@functools.lru_cache(maxsize=4096)
def _placeholders(pattern: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None)
