"""python -m dataset conversations: each candidate is kept or rejected with its reason; books and splits stay apart."""

import json
import os
import random
import subprocess
import unicodedata
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dataset.conversation_rows.command import main
from dataset.conversation_rows.sources import keep_tail
from dataset.instructions import load_instructions
from dataset.readers import read_conversation_rows
from novelgpt.settings.locks import locked
from tests.launched import PATIENCE
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data" / "papers"
Row = dict[str, str]


def prose(draw: random.Random, characters: int) -> str:
    return "".join(chr(draw.randint(0x4E00, 0x9FA5)) for _ in range(characters))


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def build(*words: object) -> tuple[list[Row], list[Row]]:
    """(kept, rejected) rows."""
    main([str(word) for word in words])
    output = next(Path(str(word)) for word in words if str(word).endswith("rows.jsonl"))
    return read(output), read(output.with_name("rows.rejected.jsonl"))


def papers(count: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)
    return [
        {"id": f"p{number}", "title": prose(draw, 15), "abstract": prose(draw, 150)} for number in range(count)
    ]  # fmt: skip


def test_the_filters_drop_the_planted_rows_and_no_other(tmp_path: Path) -> None:
    good, held, draw = papers(40), papers(5, seed=1), random.Random(2)
    swap, again = good[7]["abstract"], good[3]["title"]
    near = swap[:60] + prose(draw, 1) + swap[61:]
    far = swap[:75] + prose(draw, 75)
    planted = {
        "empty": [{"title": "", "abstract": prose(draw, 100)}, {"title": prose(draw, 9)}],
        "question_too_short": [{"title": prose(draw, 4), "abstract": prose(draw, 100)}],
        "question_too_long": [{"title": prose(draw, 41), "abstract": prose(draw, 100)}],
        "answer_too_short": [{"title": prose(draw, 9), "abstract": prose(draw, 19)}],
        "answer_too_long": [{"title": prose(draw, 9), "abstract": prose(draw, 301)}],
        "answer_in_question": [{"title": (both := prose(draw, 20)) + "的", "abstract": f"{both[:9]} {both[9:]}"}],
        "not_chinese": [{"title": prose(draw, 9), "abstract": "plain English words " * 5}],
        "excluded": [{"title": held[0]["title"], "abstract": prose(draw, 100)},
                     {"title": prose(draw, 9), "abstract": f" {held[1]['abstract']}\n"}],
        "near_excluded": [{"title": held[2]["title"] + "新", "abstract": held[2]["abstract"][1:]}],
        "duplicate_question": [{"title": f"{again[:5]}  {again[5:]}", "abstract": prose(draw, 99)}],
        "duplicate_answer": [{"title": prose(draw, 9), "abstract": good[4]["abstract"]}],
        "near_duplicate": [{"title": good[7]["title"] + "新", "abstract": near}],
    }  # fmt: skip
    fine = {"id": "far", "title": prose(draw, 9), "abstract": far}
    bad = [row | {"id": f"{reason}{n}"} for reason, rows in planted.items() for n, row in enumerate(rows)]
    exclude = write(tmp_path / "held.jsonl", held)
    options = ["--question_min", 5, "--question_max", 40, "--answer_min", 20, "--answer_max", 300, "--drop_leaks"]
    kept, rejected = build(
        write(tmp_path / "in.jsonl", [*good, *bad, fine]), tmp_path / "rows.jsonl", "--task", "title_to_abstract",
        "--exclude", exclude,
        *options,
    )  # fmt: skip
    assert [row["id"] for row in kept] == [f"{row['id']}-title_to_abstract" for row in [*good, fine]]
    assert [row["abstract"] for row in kept] == [row["abstract"] for row in [*good, fine]]
    assert Counter(entry["reason"] for entry in rejected) == {reason: len(rows) for reason, rows in planted.items()}
    for entry in rejected:
        texts = [(row.get("title", ""), row.get("abstract", "").strip()) for row in planted[entry["reason"]]]
        assert (entry["row"]["title"], entry["row"]["abstract"]) in [(title.strip(), body) for title, body in texts]


def test_leaks_and_near_rows_of_the_evaluation(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows, (held,) = papers(6), papers(1, seed=4)
    leak = {"id": "leak", "title": prose(draw, 9)}
    leak["abstract"] = prose(draw, 40) + leak["title"] + prose(draw, 40)
    nearly = {"id": "nearly", "title": prose(draw, 12), "abstract": held["abstract"][:-3] + prose(draw, 3)}
    source = write(tmp_path / "in.jsonl", [*rows, leak, nearly])
    exclude = write(tmp_path / "held.jsonl", [held])
    words = [source, tmp_path / "rows.jsonl", "--exclude", exclude, "--task", "abstract_to_title"]
    kept, rejected = build(*words, "--drop_leaks")
    assert [(entry["row"]["title"], entry["reason"]) for entry in rejected] == [
        (leak["title"], "answer_in_question"), (nearly["title"], "near_excluded"),
    ]  # fmt: skip
    kept, rejected = build(*words, "--near_duplicates", 0)
    assert len(kept) == 8 and rejected == []


def test_conversations_can_be_excluded_whatever_their_shape(tmp_path: Path) -> None:
    rows = papers(4)
    messages = [{"role": "user", "content": "写摘要"}, {"role": "assistant", "content": rows[0]["abstract"]}]
    shapes = [{"messages": messages}, {"instruction": "起题目", "input": "", "output": rows[1]["abstract"]},
              {"task": "abstract_to_title", "title": rows[2]["title"], "abstract": "别的"}]  # fmt: skip
    kept, rejected = build(
        write(tmp_path / "in.jsonl", rows), tmp_path / "rows.jsonl", "--task", "title_to_abstract", "--exclude",
        write(tmp_path / "held.jsonl", shapes),
    )  # fmt: skip
    assert [row["title"] for row in kept] == [rows[3]["title"]]
    assert {entry["reason"] for entry in rejected} == {"excluded"}


def test_columns_of_a_tsv_without_names(tmp_path: Path) -> None:
    rows = papers(3)
    rows[1]["title"] = '"引号'
    lines = [f"to title\t{row['abstract']}\t{row['title']}\n" for row in rows]
    (tmp_path / "in.tsv").write_text("".join(lines), encoding="gb18030")
    words = [str(tmp_path / "in.tsv"), str(tmp_path / "rows.jsonl"), "--task", "title_to_abstract"]
    kept, _ = build(*words, "--columns", "_", "abstract", "title")
    assert [(row["title"], row["abstract"]) for row in kept] == [(row["title"], row["abstract"]) for row in rows]
    assert [row["source"] for row in kept] == ["in.tsv:1", "in.tsv:2", "in.tsv:3"]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["in.tsv", "rows.jsonl", "--columns", "title", "abstract", "--task", "poem"], "no task 'poem'"),
        (["in.tsv", "rows.jsonl", "--columns", "title", "abstract", "--task", "abstract_to_title"], "tsv:2: 3 columns"),
        (["in.tsv", "rows.json", "--task", "title_to_abstract"], "does not end in .jsonl"),
        (["none.jsonl", "rows.jsonl", "--task", "title_to_abstract"], "none.jsonl: No such file"),
        (["papers.jsonl", "papers.jsonl", "--task", "title_to_abstract"], "is read and written"),
        (["papers.jsonl", "rows.jsonl", "--task", "chapter_summary"], "no row is left: 3 a field is empty or missing"),
        (["papers.jsonl", "rows.jsonl", "--task", "next_chapter"], "papers.jsonl:1: no text in field 'text'"),
        (["folder", "rows.jsonl", "--task", "next_chapter"], "folder holds no manifest.json"),
        (["papers.jsonl", "rows.jsonl"], "required: --task"),
    ],
)  # fmt: skip
def test_errors_name_their_place_and_leave_nothing_behind(
    words: list[str], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    write(Path("papers.jsonl"), papers(3))
    Path("in.tsv").write_text("甲\t乙\n甲\t乙\t丙\n", encoding="utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert cause in error and error.count("\n") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_that_fails_leaves_the_earlier_output(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", papers(5)), tmp_path / "rows.jsonl"
    build(source, output, "--task", "title_to_abstract")
    before = output.read_bytes()
    (tmp_path / "bad.jsonl").write_text(json.dumps(papers(1)[0]) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(source), str(tmp_path / "bad.jsonl"), str(output), "--task", "title_to_abstract"])
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "bad.jsonl", "rows.jsonl", "rows.rejected.jsonl"}


def chapter(book: str, number: int, seed: int, paragraphs: int = 12) -> Row:
    draw = random.Random(seed)
    lines = [f"第{number}章 {prose(draw, 4)}", *(prose(draw, draw.randint(5, 120)) + "。" for _ in range(paragraphs))]
    return {
        "text": "\n".join(lines), "book": book, "chapter": f"第{number}章", "title": lines[0].split()[1],
        "source": f"{book}.txt",
    }  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Two books and a half to train on, in two shards that cut a book, and one that is held out."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    train = [chapter("甲", n, n) for n in range(1, 8)] + [chapter("乙", n, 20 + n) for n in (1, 2, 4, 5)]
    train[10]["text"] = chapter("丙", 2, 42)["text"]  # which the held-out book has, too
    held = [chapter("丙", n, 40 + n) for n in range(1, 5)]
    table = pyarrow.Table.from_pylist(train[:5])
    pyarrow.parquet.write_table(table, folder / "train-00000.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(train[5:]), folder / "train-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held), folder / "held_out-00000.parquet")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


def most_characters(row: Row) -> int:
    wordings = load_instructions().tasks[row["task"]]
    return max(sum(len(message["content"]) for message in wording.messages(row)) for wording in wordings)


@pytest.mark.parametrize(("limit", "chapters"), [(1200, 1), (1600, 3), (2500, 3), (100_000, 2)])
def test_next_chapters_stay_in_their_book_and_split(prepared: Path, tmp_path: Path, limit: int, chapters: int) -> None:
    kept, rejected = build(
        prepared, tmp_path / "rows.jsonl", "--task", "next_chapter", "--max_characters", limit, "--previous_chapters",
        chapters,
    )  # fmt: skip
    held = read(tmp_path / "rows.held_out.jsonl")
    books = {book: [chapter(book, n, 20 * place + n) for n in range(1, 8)] for place, book in enumerate("甲乙丙")}
    assert {row["book"] for row in held} == {"丙"} and {row["book"] for row in kept} == {"甲", "乙"}
    for row in kept + held:
        number = int(row["chapter"][1])
        texts = [entry["text"] for entry in books[row["book"]]]
        assert row["next"] == texts[number - 1]
        first = 3 if row["book"] == "乙" and number >= 4 else 0
        before = "\n\n".join(texts[max(first, number - 1 - chapters) : number - 1])
        assert before.endswith(row["previous"])
        assert most_characters(row) <= limit
        left = before[: len(before) - len(row["previous"])]
        assert not left or left.endswith("\n")
        if left:  # one paragraph more would be too much
            more = before[left.rstrip("\n").rfind("\n") + 1 :]
            assert most_characters(row | {"previous": more}) > limit
    reasons = Counter((entry["reason"], entry["row"]["book"], entry["row"].get("chapter", "")) for entry in rejected)
    wanted = {("first_chapter", "甲", "第1章"), ("first_chapter", "乙", "第1章"), ("first_chapter", "丙", "第1章"),
              ("gap_in_chapters", "乙", "第4章"), ("excluded", "乙", "第5章")}  # fmt: skip
    assert len(kept) + len(held) + len(rejected) == 15
    if limit > 2000:
        assert set(reasons) == wanted
    assert wanted <= set(reasons)
    assert {reason for reason, _, _ in set(reasons) - wanted} <= {"no_room_for_context", "row_too_long"}


def test_a_tail_is_the_longest_that_begins_a_paragraph() -> None:
    draw = random.Random(6)
    for _ in range(300):
        text = "\n".join(prose(draw, draw.randint(1, 12)) for _ in range(draw.randint(1, 8)))
        starts = [0, *(index + 1 for index, character in enumerate(text) if character == "\n")]
        for characters in range(len(text) + 2):
            fitting = [text[start:] for start in starts if len(text) - start <= characters]
            assert keep_tail(text, characters) == max(fitting, key=len, default="")


@pytest.mark.parametrize("limit", [600, 900, 100_000])
def test_continued_texts_hold_each_paragraph_once(prepared: Path, tmp_path: Path, limit: int) -> None:
    kept, rejected = build(
        prepared, tmp_path / "rows.jsonl", "--task", "continue_text", "--max_characters", limit,
        "--opening_characters", 100,
    )  # fmt: skip
    rows = kept + read(tmp_path / "rows.held_out.jsonl")
    assert all(most_characters(row) <= limit and len(row["opening"]) >= 100 for row in rows)
    parts: dict[str, dict[int, str]] = {}
    for row in rows + [entry["row"] for entry in rejected]:
        name, part = row["id"].removesuffix("-continue_text").rsplit(".", 1)
        parts.setdefault(name, {})[int(part.split("~")[0])] = "\n".join(filter(None, (row["opening"], row["rest"])))
    joined = {name: "\n".join(pieces[part] for part in sorted(pieces)) for name, pieces in parts.items()}
    texts = [row["text"] for name in ("train-00000", "train-00001", "held_out-00000")
             for row in pyarrow.parquet.read_table(prepared / f"{name}.parquet").to_pylist()]  # fmt: skip
    assert sorted(joined.values()) == sorted(texts)
    if limit == 100_000:
        assert [entry["reason"] for entry in rejected] == ["excluded"]


def test_chapter_titles_are_not_left_in_the_text(prepared: Path, tmp_path: Path) -> None:
    kept, _ = build(prepared, tmp_path / "rows.jsonl", "--task", "chapter_title")
    assert len(kept) == 10
    for row in kept:
        assert len(row["title"]) == 4 and row["title"] not in row["text"].split("\n")[0]


def test_summaries_make_rows_both_ways(tmp_path: Path) -> None:
    draw = random.Random(7)
    source = write(tmp_path / "in.jsonl", [
        {"text": prose(draw, 300), "summary": prose(draw, 40), "outline": "一、" + prose(draw, 20)} for _ in range(3)
    ])  # fmt: skip
    tasks = ["chapter_summary", "summary_to_chapter", "chapter_outline", "outline_to_chapter"]
    kept, rejected = build(source, tmp_path / "rows.jsonl", "--task", *tasks)
    assert (len(kept), rejected) == (12, [])
    assert len({row["id"] for row in kept}) == 12
    for row, worded in zip(kept, read_conversation_rows(tmp_path / "rows.jsonl"), strict=True):
        asked, answered = worded["messages"]
        name = {"chapter_summary": "summary", "chapter_outline": "outline"}.get(row["task"], "text")
        assert answered["content"] == row[name] and row[name] not in asked["content"]


def test_lengths_in_tokens(tmp_path: Path, base_folder: Path) -> None:
    from novelgpt.model.tokenizer import load_tokenizer
    from novelgpt.settings.arguments import ModelArguments
    from novelgpt.text.encoding import encode

    tokenizer = load_tokenizer(ModelArguments(str(base_folder)))
    rows = papers(20)
    sizes = [len(encode(row["abstract"], tokenizer)) for row in rows]
    most = sorted(sizes)[10]
    kept, _ = build(
        write(tmp_path / "in.jsonl", rows), tmp_path / "rows.jsonl", "--task", "title_to_abstract", "--model",
        base_folder, "--answer_max", most,
    )  # fmt: skip
    short = [row["title"] for row, size in zip(rows, sizes, strict=True) if size <= most]
    assert [row["title"] for row in kept] == short


def test_the_same_input_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build(prepared, tmp_path / name / "rows.jsonl", "--task", "next_chapter", "continue_text", "chapter_title")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["rows.held_out.jsonl", "rows.jsonl", "rows.rejected.jsonl"]
    assert [(tmp_path / "a" / name).read_bytes() for name in files] == [
        (tmp_path / "b" / name).read_bytes() for name in files
    ]


def test_real_papers(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the real data are not beside the checkout")
    tsv, jsonl = SHARED / "csl_ts.raw.tsv", SHARED / "csl_title_abstract.jsonl"
    columns = ["--columns", "_", "abstract", "title"]
    kept, rejected = build(tsv, tmp_path / "rows.jsonl", "--task", "abstract_to_title", *columns, "--drop_leaks")
    assert len(kept) + len(rejected) == 1000
    leaks = [entry["row"] for entry in rejected if entry["reason"] == "answer_in_question"]
    assert leaks and all(plain(row["title"]) in plain(row["abstract"]) for row in leaks)
    assert not any(plain(row["title"]) in plain(row["abstract"]) for row in kept)
    with pytest.raises(SystemExit):  # they are the same papers
        main([str(jsonl), str(tmp_path / "x.jsonl"), "--task", "title_to_abstract", "--exclude", str(tsv), *columns])


def test_what_another_run_is_writing_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"title": "灯塔下的一封信", "abstract": "雨停了，灯还亮着，她把信又读了一遍，然后下了楼。"}]
    words = [str(write(tmp_path / "papers.jsonl", rows)), str(tmp_path / "rows.jsonl"), "--task", "title_to_abstract"]
    partial = tmp_path / "rows.jsonl.partial"
    partial.write_text("of the other", encoding="utf-8")
    with locked(partial):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "another run writes" in capsys.readouterr().err
        assert partial.read_text(encoding="utf-8") == "of the other"
    main(words)  # the other was killed
    assert len(read(tmp_path / "rows.jsonl")) == 1 and not partial.exists()


def test_from_the_command_line_to_a_training(tmp_path: Path, base_folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}

    def python(*words: object) -> str:
        done = subprocess.run(
            [warm_python(), "-m", *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    samples = ROOT / "dataset" / "samples" / "papers"
    shown = python(
        "dataset", "conversations", samples / "train.jsonl", "rows.jsonl", "--task", "abstract_to_title",
        "--exclude", samples / "valid.jsonl",
    )  # fmt: skip
    assert "kept 保留" in shown and "rows.jsonl" in shown
    quick = "--max_steps 3 --logging_steps 1 --save_strategy no --eval_strategy no --eval_on_start false --stop_check 0"
    quick += " --per_device_train_batch_size 1 --guards false"
    python(
        "finetune", "--model", base_folder, "--train_files", "rows.jsonl", "--output_dir", "run", "--max_length", 384,
        *quick.split(),
    )  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len([entry for entry in map(json.loads, lines) if "loss" in entry]) == 3
