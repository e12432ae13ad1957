"""Rows that name a task: seed and row alone decide the wording; what is trained is the answer's pattern, filled."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from dataset.conversations import read_conversations
from dataset.encoded_rows import encode_rows
from dataset.instructions import BUILT_IN, Instructions, load_instructions, rounded, rounded_up
from dataset.readers import TITLE_TO_ABSTRACT, messages_of, read_conversation_rows
from dataset.sources import find_row_sources
from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import IGNORE_INDEX
from predict.rows import read_prompt_rows
from tests.memory_rows import as_list

ROOT = Path(__file__).resolve().parents[2]
TASKS = sorted(load_instructions().tasks)
Row = dict[str, str]


def text(draw: random.Random, most: int) -> str:
    return "".join(draw.choices("山水风云人我他说一二三的，。！{}%\n𠮷é", k=draw.randint(1, most))) + "终"


def row_of(task: str, number: int, most: int = 60) -> Row:
    draw = random.Random(f"{task}{number}")
    question, answer = load_instructions().fields(task, "")
    return {"id": f"r{number}", "task": task} | {name: text(draw, most) for name in (*question, *answer)}


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def contents(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_has_eight_questions_or_more_all_different(task: str) -> None:
    wordings = load_instructions().tasks[task]
    assert len({(wording.system, wording.user) for wording in wordings}) == len(wordings) >= 8
    assert any(wording.system for wording in wordings)
    assert any("{characters" in wording.user + wording.system for wording in wordings)


def test_title_and_abstract_rows_without_a_task_keep_their_one_wording() -> None:
    row = {"title": "题", "abstract": "要"}
    wanted = [
        {"role": "user", "content": TITLE_TO_ABSTRACT.format(title="题")},
        {"role": "assistant", "content": "要"},
    ]
    for seed in range(20):
        assert messages_of(row, "rows:1", load_instructions(seed=seed)) == wanted
    assert messages_of(row, "rows:1") == messages_of(row | {"task": "title_to_abstract"}, "rows:1") == wanted


def test_rows_of_another_shape_may_have_a_field_task() -> None:
    row = {"prompt": "问", "completion": "答", "task": "what they call it"}
    assert contents(messages_of(row, "rows:1")) == ["问", "答"]


@pytest.mark.parametrize("task", TASKS)
def test_the_draw_depends_on_the_seed_and_the_row_alone(task: str) -> None:
    rows = [row_of(task, number) for number in range(40)]
    drawn = {row["id"]: load_instructions(seed=5).messages(task, row, "a:1") for row in rows}
    backwards = load_instructions(seed=5)
    for row in reversed(rows):
        assert backwards.messages(task, row, "b:9") == drawn[row["id"]]
        assert backwards.messages(task, dict(reversed(row.items())) | {"unread": "x"}, "b:9") == drawn[row["id"]]
    other = {row["id"]: load_instructions(seed=6).messages(task, row, "a:1") for row in rows}
    assert sum(other[name] != drawn[name] for name in drawn) > 20


def test_another_process_draws_the_same() -> None:
    rows = [row_of(task, number) for task in TASKS for number in range(5)]
    program = (
        "import json, sys; from dataset.instructions import load_instructions; i = load_instructions(seed=3)\n"
        "print(json.dumps([i.messages(r['task'], r, '') for r in json.load(sys.stdin)]))"
    )
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(rows), capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed},
        )  # fmt: skip
        assert json.loads(done.stdout) == [load_instructions(seed=3).messages(r["task"], r, "") for r in rows]


def test_rows_without_an_id_are_told_apart_by_their_fields() -> None:
    rows = [{"title": f"题{number}", "abstract": "要"} for number in range(60)]
    instructions = load_instructions(seed=1)
    drawn = [contents(instructions.messages("title_to_abstract", row, f"x:{n}")) for n, row in enumerate(rows)]
    again = [contents(instructions.messages("title_to_abstract", row, "y")) for row in rows]
    assert drawn == again
    assert len({tuple(messages)[0].replace(row["title"], "") for messages, row in zip(drawn, rows, strict=True)}) > 8


@pytest.mark.parametrize("task", TASKS)
def test_each_wording_is_drawn_about_equally_often(task: str) -> None:
    instructions = load_instructions(seed=0)
    row = row_of(task, 0)
    possible = [
        (number, tuple(contents(wording.messages(row, answer))))
        for number, wording in enumerate(instructions.tasks[task])
        for answer in range(len(wording.answers))
    ]
    drawn = [tuple(contents(instructions.messages(task, row | {"id": str(n)}, ""))) for n in range(2000)]
    assert set(drawn) == {texts for _, texts in possible}
    expected = 2000 / len(instructions.tasks[task])
    for number in range(len(instructions.tasks[task])):
        count = sum(drawn.count(texts) for texts in {texts for n, texts in possible if n == number})
        assert 0.6 * expected < count < 1.4 * expected


@pytest.mark.parametrize("task", TASKS)
def test_each_wording_holds_its_fields_as_they_are_and_nothing_unfilled(task: str) -> None:
    instructions = load_instructions()
    question, answer = instructions.fields(task, "")
    for wording, number in itertools.product(instructions.tasks[task], range(20)):
        row = row_of(task, number)
        for chosen, pattern in enumerate(wording.answers):
            *asked, answered = wording.messages(row, chosen)
            assert all(row[name] in "".join(contents(asked)) for name in question)
            assert all(row[name] not in "".join(contents(asked)) for name in answer)
            assert answered == {"role": "assistant", "content": pattern.replace(f"{{{answer[0]}}}", row[answer[0]])}
            rest = "".join(contents(asked))
            for name in question:
                rest = rest.replace(row[name], "")
            assert "{" not in rest and "}" not in rest


@pytest.mark.parametrize("task", TASKS)
def test_lengths_named_in_questions_are_those_of_the_answer(task: str) -> None:
    instructions = load_instructions()
    question, answer = instructions.fields(task, "")
    hints = 0
    for number in range(60):
        row = row_of(task, number, most=(10, 300, 5000)[number % 3])
        length = len("".join(row[answer[0]].split()))
        for wording in instructions.tasks[task]:
            pattern = wording.system + wording.user
            empty = wording.messages(row | dict.fromkeys(question, ""))[:-1]
            for hint in map(int, re.findall(r"\d+", "".join(contents(empty)))):
                hints += 1
                if "{characters_at_most}" in pattern:
                    assert length <= hint < length + (10 if length < 1000 else 100)
                else:
                    assert abs(hint - length) <= 0.05 * length
    assert hints


def test_rounding_keeps_two_digits() -> None:
    assert [rounded(n) for n in (0, 7, 99, 104, 105, 999, 1049, 12345)] == [0, 7, 99, 100, 110, 1000, 1000, 12000]
    for length in range(1, 20000):
        assert abs(rounded(length) - length) <= 0.05 * length
        assert length <= rounded_up(length)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_trained_is_the_filled_answer_and_the_end(task: str, tokenizer: PreTrainedTokenizerBase) -> None:
    instructions = load_instructions(seed=9)
    for number in range(25):
        row = row_of(task, number)
        messages = messages_of(row, "rows:1", instructions)
        (piece,), _ = encode_rows(
            [{"messages": messages, "source": "rows:1"}], tokenizer, ConversationArguments(max_length=4096)
        )
        trained = [label for label in piece.labels if label != IGNORE_INDEX]
        assert tokenizer.decode(trained) == messages[-1]["content"] + "<|im_end|>"
        assert row[instructions.fields(task, "")[1][0]] in messages[-1]["content"]


def answers_and_prompts(rows: object, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return sorted(tokenizer.decode(row.input_ids) for row in as_list(rows))  # type: ignore[arg-type]


@pytest.mark.parametrize("own_file", [True, False])
def test_rows_to_evaluate_on_have_the_first_wording(
    own_file: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [row_of("abstract_to_title", number) for number in range(30)]
    train = write(tmp_path / "train.jsonl", rows)
    valid = [write(tmp_path / "valid.jsonl", rows)] if own_file else []
    shown = {}
    for seed in (1, 1, 2):
        data = ConversationArguments([train], valid, 0.5, 4096, False, instruction_seed=seed)
        parts = [answers_and_prompts(part, tokenizer) for part in read_conversations(data, tokenizer)]
        shown.setdefault(seed, []).append(parts)
    (first, again), (other,) = shown[1], shown[2]
    assert first == again
    assert first[0] != other[0] and first[1] == other[1]
    fixed = load_instructions()
    worded = [tokenizer.apply_chat_template(messages_of(row, "", fixed), tokenize=False) for row in rows]
    assert len(first[1]) == (30 if own_file else 15)
    assert set(first[1]) <= set(worded)


def test_prediction_asks_in_the_first_wording_with_or_without_a_reference(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = row_of("next_chapter", 0)
    asked = {name: row[name] for name in row if name != "next"}
    file = write(tmp_path / "rows.jsonl", [row, asked])
    answered, unanswered = read_prompt_rows(find_row_sources([file]), tokenizer, None)
    assert answered.prompt_ids == unanswered.prompt_ids
    assert (answered.reference, unanswered.reference) == (row["next"], "")
    assert contents(unanswered.messages) == [f"下面是小说的前文，请接着写下一章。\n\n{row['previous']}"]


def own_templates(path: Path, content: str) -> list[str]:
    path.write_text(content, encoding="utf-8")
    return [str(path)]


def test_own_wordings_replace_or_extend(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    files = own_templates(
        tmp_path / "own.yaml",
        'title_to_abstract: {questions: ["写：{title}", {user: "{title}？", system: 简}], answers: ["{abstract}"]}\n'
        'chapter_title: {extends: true, questions: ["起名：{text}"], answers: ["{title}"]}\n'
        'poem: {questions: ["以{{{topic}}}为题作诗"], answers: ["{poem}"]}\n',
    )
    own, built_in = load_instructions(files, seed=1), load_instructions()
    assert [wording.user for wording in own.tasks["title_to_abstract"]] == ["写：{title}", "{title}？"]
    assert own.tasks["chapter_title"][:-1] == built_in.tasks["chapter_title"]
    assert own.tasks["next_chapter"] == built_in.tasks["next_chapter"]
    poem = {"task": "poem", "topic": "海", "poem": "潮"}
    assert contents(messages_of(poem, "", own)) == ["以{海}为题作诗", "潮"]
    papers = [{"title": f"题{n}", "abstract": "要"} for n in range(20)]
    asked = [contents(messages_of(row, "", own)) for row in papers]  # they draw, though they name no task
    for row, texts in zip(papers, asked, strict=True):
        assert texts in (["写：" + row["title"], "要"], ["简", row["title"] + "？", "要"])
    assert {len(texts) for texts in asked} == {2, 3}
    file = write(tmp_path / "rows.jsonl", papers)
    prompts = read_prompt_rows(find_row_sources([file]), tokenizer, None, own.fixed())
    assert [row.messages[0]["content"] for row in prompts] == ["写：" + row["title"] for row in papers]
    assert load_instructions([str(BUILT_IN)]).tasks == built_in.tasks


def test_question_and_answer_are_drawn_each_on_its_own(tmp_path: Path) -> None:
    template = 'a: {questions: ["{x}", "问{x}"], answers: ["{z}", "答：{z}", "{z}。"]}'
    own = load_instructions(own_templates(tmp_path / "own.yaml", template), seed=1)
    rows = [{"id": str(number), "task": "a", "x": "甲", "z": "乙"} for number in range(300)]
    drawn = [tuple(contents(messages_of(row, "", own))) for row in rows]
    possible = set(itertools.product(("甲", "问甲"), ("乙", "答：乙", "乙。")))
    assert set(drawn) == possible and all(drawn.count(texts) > 25 for texts in possible)
    assert {tuple(contents(messages_of(row, "", own.fixed()))) for row in rows} == {("甲", "乙")}


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "holds no tasks"),
        ("- a", "holds no tasks"),
        ("a: [", "is not YAML"),
        ("a: {questions: [], answers: ['{y}']}", "task a has no list of questions"),
        ("a: {questions: ['{x}']}", "task a, question 1 has no list of answers"),
        ("a: {questions: ['{x}'], answers: ['答']}", "question 1 has an answer without a {field}"),
        ("a: {questions: ['{x}'], answers: ['{x}']}", "question 1 holds what the answer is: {x}"),
        ("a: {questions: ['{x}', '{x.y}'], answers: ['{z}']}", "question 2, user: {x.y} is not a placeholder"),
        ("a: {questions: ['{x!r}'], answers: ['{z}']}", "user: {x} is not a placeholder"),
        ("a: {questions: ['{0}'], answers: ['{z}']}", "user: {0} is not a placeholder"),
        ("a: {questions: ['{}'], answers: ['{z}']}", "user: {} is not a placeholder"),
        ("a: {questions: ['{x'], answers: ['{z}']}", "question 1, user:"),
        ("a: {questions: ['{x}', {user: '', answer: ''}], answers: ['{z}']}", "question 2 has the unknown key"),
        ("a: {questions: ['{x}'], answers: ['{z}{characters}']}", "answer 1: {characters} is in an answer"),
        ("a: {questions: ['{x} {characters}'], answers: ['{z}']}", "the first question, which evaluation takes"),
        ("a: {questions: ['{x}'], answers: ['{z}'], seed: 3}", "task a has the unknown key 'seed'"),
    ],
)  # fmt: skip
def test_a_wrong_template_is_told_with_its_place(tmp_path: Path, content: str, cause: str) -> None:
    with pytest.raises(UserError) as caught:
        load_instructions(own_templates(tmp_path / "own.yaml", content))
    assert str(tmp_path / "own.yaml") in caught.value.cause and cause in caught.value.cause


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"task": "title_to_abstrakt", "title": "题"}, "(did you mean 'title_to_abstract'?)"),
        ({"task": "title_to_abstract", "abstract": "要"}, "field title of the task title_to_abstract is missing"),
        ({"task": "title_to_abstract", "title": "题"}, "field abstract of the task title_to_abstract is missing"),
        ({"task": "title_to_abstract", "title": 3, "abstract": "要"}, "field title of the task title_to_abstract is"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_worded_is_told_with_its_line(tmp_path: Path, row: Row, cause: str) -> None:
    file = write(tmp_path / "rows.jsonl", [row_of("title_to_abstract", 0), row])
    drawn = load_instructions(seed=1)
    with pytest.raises(UserError) as caught:
        list(read_conversation_rows(Path(file), drawn))
    assert caught.value.cause.startswith(f"{file}:2: ") and cause in caught.value.cause


def test_a_missing_template_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_instructions([str(tmp_path / "none.yaml")])
    assert isinstance(load_instructions(), Instructions)


@pytest.mark.parametrize("page", ["docs/data.md", "docs/zh/data.md"])
def test_the_examples_of_the_documents_hold(page: str, tmp_path: Path) -> None:
    content = (ROOT / page).read_text(encoding="utf-8")
    (rows,) = re.findall(r"^```jsonl task\n(.*?)^```$", content, flags=re.MULTILINE | re.DOTALL)
    for row in map(json.loads, rows.splitlines()):
        assert messages_of(row, page)[-1]["role"] == "assistant"
    (templates,) = re.findall(r"^```text\n(poem:.*?)^```$", content, flags=re.MULTILINE | re.DOTALL)
    own = load_instructions(own_templates(tmp_path / "own.yaml", templates), seed=1)
    assert own.fields("poem", page) == (["topic"], ["poem"])
    assert all(f"`{task}`" in content for task in TASKS)
