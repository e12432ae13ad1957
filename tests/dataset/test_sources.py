"""What names stand for: files, patterns, folders and parts of their rows, in order; and what is refused, by name."""

import json
import os
import random
from pathlib import Path

import pytest

from dataset.corpus import find_sources
from dataset.sources import find_row_sources
from novelgpt.settings.errors import UserError


def write_rows(file: Path, count: int = 10) -> list[str]:
    """A file of rows, each of which says whose it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    questions = [f"{file.stem}-{number}" for number in range(count)]
    rows = [json.dumps({"instruction": question, "output": "答"}) + "\n" for question in questions]
    file.write_text("".join(rows), encoding="utf-8")
    return questions


def questions_of(*names: str, max_rows: int | None = None) -> list[list[str]]:
    """The questions of each source."""
    sources = find_row_sources(names, max_rows=max_rows)
    return [[json.loads(row.text)["instruction"] for row in source.rows()] for source in sources]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data/part1, part2, part10 and deeper/part3."""
    for name in ("part10", "part2", "part1", "deeper/part3"):
        write_rows(tmp_path / "data" / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_patterns_and_folders_are_read_in_natural_order(place: Path) -> None:
    rows = {name: [f"{name}-{number}" for number in range(10)] for name in ("part1", "part2", "part3", "part10")}
    flat = rows["part1"] + rows["part2"] + rows["part10"]
    whole = rows["part3"] + flat
    (place / "data" / "notes.md").write_text("no rows", encoding="utf-8")
    write_rows(place / "data" / ".hidden" / "part0.jsonl")
    assert questions_of("data/part2.jsonl", "data/part1.jsonl") == [rows["part2"], rows["part1"]]
    assert questions_of("data/*.jsonl", "data/*") == [flat, flat]
    assert questions_of("data/**/*.jsonl", "data", str(place / "data")) == [whole] * 3
    assert [source.name for source in find_row_sources(["data/part1.jsonl", "data/*", "data"])] == [
        "part1", "data", "data~2",
    ]  # fmt: skip
    write_rows(place / "other" / "part1.jsonl")
    names = [source.name for source in find_row_sources(["data/part1.jsonl", "other/part1.jsonl", "other/part1.jsonl"])]
    assert names == ["data/part1", "other/part1", "other/part1~2"]


def test_rows_are_placed_in_the_file_that_holds_them(place: Path) -> None:
    (source,) = find_row_sources(["data/*.jsonl"])
    places = [f"{source.files[row.file]}{row.place}" for row in source.rows()]
    assert places[9:11] == [str(Path("data/part1.jsonl:10")), str(Path("data/part2.jsonl:1"))]


def test_a_name_that_exists_wins_over_what_its_characters_mean(place: Path) -> None:
    names = ["data/[1].jsonl", "data/rows#5", "data/a*b.jsonl", "data/50%#50%.jsonl"]
    for name in names:
        (place / name).mkdir() if "." not in name else write_rows(place / name, 1)
    inside = write_rows(place / "data" / "rows#5" / "inside.jsonl", 9)
    write_rows(place / "data" / "1.jsonl")
    write_rows(place / "data" / "acb.jsonl")
    assert questions_of(*names) == [["[1]-0"], inside, ["a*b-0"], ["50%#50%-0"]]
    assert [len(rows) for rows in questions_of("data/rows#5#4", "data/[1].jsonl#1")] == [4, 1]


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("#7", 7),
        ("#1", 1),
        ("#40", 40),
        ("#41", 40),
        ("#30%", 12),
        ("#100%", 40),
        ("#0.1%", 1),
        ("#12.5%", 5),
        ("", 40),
    ],
)
def test_a_part_is_that_many_rows_in_their_order(part: str, count: int, place: Path) -> None:
    (whole,), (drawn,) = questions_of("data"), questions_of(f"data{part}")
    assert len(drawn) == len(set(drawn)) == count
    assert drawn == [row for row in whole if row in set(drawn)]
    assert questions_of(f"data{part}") == [drawn]


def test_all_rows_are_equally_likely_to_be_drawn(tmp_path: Path) -> None:
    """The mean place of 1,000 of 10,000 rows is the middle, and each tenth of the file gives about a tenth of them."""
    write_rows(tmp_path / "rows.jsonl", 10_000)
    (drawn,) = questions_of(f"{tmp_path / 'rows.jsonl'}#1000")
    places = [int(question.rpartition("-")[2]) for question in drawn]
    tenths = [sum(place // 1000 == tenth for place in places) for tenth in range(10)]
    assert sum(tenths) == 1000 and min(tenths) > 70 and max(tenths) < 130
    state = random.getstate()
    questions_of(f"{tmp_path / 'rows.jsonl'}#1000")
    assert random.getstate() == state


def test_more_rows_than_there_are_is_noted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(questions_of("data/part1.jsonl#99")[0]) == 10
    assert "data/part1.jsonl#99: there are only 10 rows" in capsys.readouterr().out


def test_max_rows_are_the_first_of_each_source_after_the_draw(place: Path) -> None:
    (drawn,) = questions_of("data/part1.jsonl#5")
    assert questions_of("data/part2.jsonl", "data/part1.jsonl#5", max_rows=3) == [
        ["part2-0", "part2-1", "part2-2"],
        drawn[:3],
    ]


def test_identity_is_that_of_the_rows(place: Path) -> None:
    def identities(*names: str, max_rows: int | None = None) -> list[str]:
        return [json.dumps(source.identity()) for source in find_row_sources(names, max_rows=max_rows)]

    (before,) = identities("data")
    (place / "data").rename(place / "moved")
    assert identities("moved") == [before] != identities("moved#5") != identities("moved#5", max_rows=3)
    (place / "moved" / "part2.jsonl").write_text('{"instruction": "a", "output": "b"}', encoding="utf-8")
    assert identities("moved") != [before]


@pytest.mark.parametrize(
    ("name", "cause", "remedy"),
    [
        ("data/prat1.jsonl", "data/prat1.jsonl does not exist", "did you mean data/part1.jsonl"),
        ("dato/part1.jsonl", "dato/part1.jsonl does not exist", "did you mean data"),
        ("data/*.json", "data/*.json matches no file", "there is data/"),
        ("data/none.jsonl#5", "data/none.jsonl does not exist", "relative ones start"),
        ("data#0", "data#0: '0' is no part", "#30%"),
        ("data#x", "data#x: 'x' is no part", "#1000"),
        ("data#101%", "data#101%: '101%' is no part", "#30%"),
        ("data#0%", "data#0%: '0%' is no part", "#30%"),
        ("data#-5", "data#-5: '-5' is no part", "#30%"),
        ("", "'' does not exist", "check the path"),
        ("x" * 300, "x" * 300 + " does not exist", "check the path"),
        ("nothing", "nothing holds no .jsonl, .json, .csv, .parquet", "a folder with files of rows"),
        ("books", "books: no reader for files without a suffix: it holds text", "pretrain"),
        ("books/a.txt", "books/a.txt: no reader for .txt: it holds text", "pretrain"),
        ("books/*.txt#3", "books/a.txt: no reader for .txt: it holds text", "pretrain"),
        ("prepared", "prepared: no reader for files without a suffix: it holds text", "pretrain"),
    ],
)
def test_what_is_no_source_is_refused_with_what_is_near(name: str, cause: str, remedy: str, place: Path) -> None:
    (place / "books").mkdir()
    (place / "nothing").mkdir()
    (place / "books" / "a.txt").write_text("灯塔", encoding="utf-8")
    write_rows(place / "prepared" / "train-00000.jsonl")
    (place / "prepared" / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        find_row_sources(["data/part1.jsonl", name])
    assert refused.value.cause.startswith(cause) and remedy in refused.value.remedy


def test_a_part_of_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="a pipe can be read only once"):
        find_row_sources([f"{tmp_path / 'pipe.jsonl'}#5"])
    (source,) = find_row_sources([str(tmp_path / "pipe.jsonl")])
    with pytest.raises(UserError, match="a pipe can be read only once"):
        source.identity()  # would wait for a second writer


def test_pretraining_takes_patterns_and_refuses_what_names_rows(place: Path) -> None:
    for number in (1, 2, 10):
        (place / f"book{number}.txt").write_text("灯塔" * 9, encoding="utf-8")
    (source,) = find_sources(["book1.txt", "book*.txt"])
    assert source.files == [Path(f"book{number}.txt") for number in (1, 1, 2, 10)]
    for name, told in (
        ("hf://org/text", "hf://org/text: pretraining reads text from files"),
        ("book1.txt#5", "book1.txt#5: pretraining reads whole files"),
        ("boko*.txt", "boko*.txt matches no file"),
    ):
        with pytest.raises(UserError) as refused:
            find_sources([name])
        assert refused.value.cause.startswith(told)
