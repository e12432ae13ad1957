"""The command that scores a file: figures, intervals, comparisons, other tools' conventions; no row is ever dropped."""

import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
import rouge_chinese

from novelgpt.scoring.conventions import llamafactory
from novelgpt.scoring.row_scores import RowScores, ScoredRow, score_row
from novelgpt.scoring.segmentation import segment
from novelgpt.scoring.summary import summarise_rows
from novelgpt.scoring.text_scores import score_pair
from predict.score import main

NOVEL = Path(__file__).resolve().parents[2] / "dataset" / "samples" / "novels" / "deng_ta_xia_de_xin.txt"
HARD = ["", " ", "\n\u3000", "好", "🙂", "ＡＢＣ", "Hello, 世界", "啊" * 3000, "。。。"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(shared: float, count: int = 40) -> list[dict[str, Any]]:
    """Predictions that share so much of their references."""
    text = NOVEL.read_text(encoding="utf-8")
    generator = random.Random(20240611)
    made = []
    for number in range(count):
        first, second = (generator.randrange(len(text) - 200) for _ in range(2))
        reference = text[first : first + 100]
        kept = int(100 * shared * generator.uniform(0.8, 1.0))
        prediction = reference[:kept] + text[second : second + 100 - kept]
        made.append({"id": f"r{number}", "prediction": prediction, "reference": reference, "finish_reason": "stop"})
    return made


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_scores_of_the_file_are_means_of_its_rows(tmp_path: Path) -> None:
    made = rows(0.5)
    main([str(write(tmp_path / "predictions.jsonl", made))])
    scores = load(tmp_path / "scores.json")
    lines = [json.loads(line) for line in (tmp_path / "row_scores.jsonl").read_bytes().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in made]
    for name in score_pair("一", "二"):
        assert scores[name] == pytest.approx(sum(line[name] for line in lines) / len(lines))
        assert scores["intervals"][name][0] <= scores[name] + 1e-12 and name in scores["definitions"]
    assert (scores["rows"], scores["stopped"], scores["empty_predictions"]) == (40, 1.0, 0)
    sides = [[segment(row[side]) for row in made] for side in ("prediction", "reference")]
    package = rouge_chinese.Rouge().get_scores(*sides, avg=True)
    assert {name: scores[name] for name in package} == {name: value["f"] for name, value in package.items()}


def test_no_row_is_dropped_whatever_it_holds(tmp_path: Path) -> None:
    made = [{"id": f"{a}-{b}", "prediction": HARD[a], "reference": HARD[b]} for a in range(9) for b in range(9)]
    for extra in ([], ["--scorer", "rouge_chinese"], ["--convention", "llamafactory"], ["--convention", "swift"]):
        main([str(write(tmp_path / "predictions.jsonl", made)), *extra])
    main([str(tmp_path / "predictions.jsonl")])
    scores = load(tmp_path / "scores.json")
    assert (scores["rows"], scores["rows_without_reference"], scores["empty_predictions"]) == (81, 9, 9)
    assert len((tmp_path / "row_scores.jsonl").read_bytes().splitlines()) == 81


def test_what_is_written_row_by_row_is_what_the_rows_give_at_once(tmp_path: Path) -> None:
    """Rows without an id, with the id that another one would get, groups, thoughts, short answers, parts that count."""
    made: list[dict[str, Any]] = rows(0.5, 60)
    expected: list[RowScores] = []
    for number, row in enumerate(made):
        name = {0: None, 1: str(number - 1), 2: "", 3: f"r{number}"}[number % 4]
        row |= {"id": name} | ({"score_group": "乙甲"[number % 2]} if number % 3 else {})
        row |= {"metrics": ["exact_match"], "answers": ["甲"]} if number % 5 == 0 else {}
        row |= {"scored_characters": 20 + number} if number % 6 == 0 else {}
        row |= {"reference": ""} if number % 7 == 0 else {}
        text = row["prediction"]
        row |= {"prediction": f"<think>\n想\n</think>\n\n{text}"} if number % 8 == 0 else {}
        row |= {"finish_reason": "length"} if number % 9 == 0 else {}
        answers = tuple(row.get("answers", ())), tuple(row.get("metrics", ()))
        scored = text[: row.get("scored_characters")]
        scores = score_row(ScoredRow(scored, row["reference"], answers[1], answers[0]))
        scores |= {"stopped": float(row["finish_reason"] == "stop")}
        scores |= {"cut": float(scored != text)} if "scored_characters" in row else {}
        group = {"score_group": row["score_group"]} if "score_group" in row else {}
        expected.append({"id": {0: f"{number}~", 2: str(number)}.get(number % 4, name), **group, **scores})
    main([str(write(tmp_path / "predictions.jsonl", made))])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in expected)
    assert (tmp_path / "row_scores.jsonl").read_text(encoding="utf-8") == lines
    written = load(tmp_path / "scores.json")
    assert list(written["groups"]) == list(
        dict.fromkeys(row["score_group"] for row in expected if "score_group" in row)
    )
    of_groups = [[row for row in expected if row.get("score_group") == name] for name in written["groups"]]
    for scores, members in zip((written, *written["groups"].values()), (expected, *of_groups), strict=True):
        means, intervals = summarise_rows(members)
        assert {name: scores[name] for name in means} == means and list(scores)[: len(means)] == list(means)
        assert scores["intervals"] == intervals and scores["rows"] == len(members)
        assert scores["rows_without_reference"] == sum("rouge-1" not in row for row in members)
    names = {"predictions.jsonl", "row_scores.jsonl", "scores.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("share", "message"),
    [(0.25, "a temporary copy of the rows cannot be written into"), (0.75, "cannot be written: File")],
)
def test_a_full_disk_leaves_the_former_scores(
    share: float, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "predictions.jsonl", rows(0.5, 40))
    main([str(file)])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (round(share * len(before[tmp_path / "row_scores.jsonl"])), limit[1]))
    try:
        with pytest.raises(SystemExit) as left:
            main([str(file)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_package_itself_gives_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "predictions.jsonl", rows(0.4))
    main([str(file)])
    ours = load(tmp_path / "scores.json")
    main([str(file), "--scorer", "rouge_chinese", "--output", str(tmp_path / "package.json")])
    theirs = load(tmp_path / "package.json")
    assert theirs["scorer"].startswith("rouge_chinese 1.")
    assert [ours[name] for name in ("rouge-1", "rouge-2", "rouge-l")] == [
        theirs[name] for name in ("rouge-1", "rouge-2", "rouge-l")
    ]


def test_another_tools_figures_go_to_a_file_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = rows(0.4)
    main([str(write(tmp_path / "predictions.jsonl", made)), "--convention", "llamafactory"])
    scores = load(tmp_path / "scores.llamafactory.json")
    expected = llamafactory([row["prediction"] for row in made], [row["reference"] for row in made])
    assert {name: scores[name] for name in expected} == expected
    assert not (tmp_path / "scores.json").exists()
    assert f"{expected['bleu-4']:.4f}" in capsys.readouterr().out


def test_the_better_of_two_is_found_and_equal_ones_are_not_told_apart(tmp_path: Path) -> None:
    first, better = write(tmp_path / "a.jsonl", rows(0.3)), rows(0.6)
    random.Random(1).shuffle(better)  # rows are matched by id
    main([str(first), "--compare", str(write(tmp_path / "b.jsonl", better)), "--output", str(tmp_path / "c.json")])
    found = {score["name"]: score for score in load(tmp_path / "c.json")["scores"]}
    for name in ("rouge-l", "bleu4_char", "rouge1_char_count", "sacrebleu"):
        assert found[name]["second"] > found[name]["first"] and found[name]["low"] > 0
        assert found[name]["p_value"] < 0.01
    main([str(first), "--compare", str(first), "--output", str(tmp_path / "same.json")])
    assert {score["p_value"] for score in load(tmp_path / "same.json")["scores"]} == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:-1], "do not answer the same rows"),
        (lambda made: [*made[:-1], made[-1] | {"id": "other"}], "r39 is in the first only"),
        (lambda made: [*made[:-1], made[-1] | {"reference": "另一个"}], "row r39 has two references"),
        (lambda made: [*made[:-1], made[-1] | {"metrics": ["f2"]}], "no metric 'f2'"),
        (lambda made: [*made[:-1], made[-1] | {"metrics": "exact_match"}], "field metrics is not a list of texts"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write(tmp_path / "a.jsonl", rows(0.3)), write(tmp_path / "b.jsonl", change(rows(0.3)))
    with pytest.raises(SystemExit) as left:
        main([str(first), "--compare", str(second)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


NAMES = {"LLaMA-Factory": ("predict", "label"), "ms-swift": ("response", "labels")}


def renamed(made: list[dict[str, Any]], names: tuple[str, str]) -> list[dict[str, Any]]:
    """The rows as another tool writes them, without ids."""
    return [{names[0]: row["prediction"], names[1]: row["reference"], "prompt": "写。", "id": None} for row in made]


@pytest.mark.parametrize("tool", NAMES)
def test_files_of_other_tools_are_scored_and_compared(tool: str, tmp_path: Path) -> None:
    made = [{**row, "id": str(number)} for number, row in enumerate(rows(0.5, 12))]
    ours = write(tmp_path / "predictions.jsonl", made)
    theirs = write(tmp_path / "generated_predictions.jsonl", renamed(made, NAMES[tool]))
    for file, output in ((ours, "ours"), (theirs, "theirs")):
        main([str(file), "--output", str(tmp_path / f"{output}.json")])
        main([str(file), "--convention", "llamafactory", "--output", str(tmp_path / output / "scores.json")])
    scores, same = load(tmp_path / "ours.json"), load(tmp_path / "theirs.json")
    assert [scores[name] for name in ("rouge-1", "rouge-l", "rows")] == [
        same[name] for name in ("rouge-1", "rouge-l", "rows")
    ]
    better = write(tmp_path / "better.jsonl", renamed(rows(0.9, 12), NAMES[tool]))
    better_rows = [{**row, "id": str(number)} for number, row in enumerate(rows(0.9, 12))]
    main([str(theirs), "--compare", str(better), "--output", str(tmp_path / "theirs_compared.json")])
    main([str(ours), "--compare", str(write(tmp_path / "b.jsonl", better_rows)), "--output", str(tmp_path / "o.json")])
    compared = load(tmp_path / "o.json")["scores"]
    assert load(tmp_path / "theirs_compared.json")["scores"] == [one for one in compared if one["name"] != "stopped"]


def test_rows_without_an_id_are_told_apart(tmp_path: Path) -> None:
    made = [{**row, "id": name} for row, name in zip(rows(0.5, 4), ["1", None, "", "a"], strict=True)]
    file = write(tmp_path / "predictions.jsonl", made)
    main([str(file)])
    lines = [json.loads(line) for line in (tmp_path / "row_scores.jsonl").read_bytes().splitlines()]
    assert [line["id"] for line in lines] == ["1", "1~", "2", "a"]
    main([str(file), "--compare", str(file)])
    assert load(tmp_path / "comparison.json")["rows"] == 4


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"predict": "好"}, "label"),
        ({"output": "好"}, "prediction"),
        ({"predict": "好", "label": None}, "label"),
        ({"prediction": "好"}, "reference"),
        ({"response": ["好"], "labels": "好"}, "response"),
    ],
)
def test_a_row_without_its_texts_names_the_field(
    row: dict[str, Any], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(write(tmp_path / "predictions.jsonl", [row]))])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and f"predictions.jsonl:1: field {field} is missing or not text" in told
    assert "predict and label" in told and "response and labels" in told
