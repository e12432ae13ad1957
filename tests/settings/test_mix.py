"""`--mix`: words and files to exact weights, and what is refused."""

from fractions import Fraction
from pathlib import Path

import pytest

from novelgpt.settings.arguments import ConversationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.mix import parse_mix
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun


def test_weights_are_as_exact_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text("novels.jsonl: 2\ngeneral.jsonl: 0.3\n")
    weights = {"novels.jsonl": Fraction(2), "general.jsonl": Fraction(3, 10)}
    assert parse_mix(["novels.jsonl=2", "general.jsonl=0.3"]) == parse_mix([str(file)]) == weights
    assert parse_mix(["a=b.jsonl=1/3"]) == {"a=b.jsonl": Fraction(1, 3)}


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["a.jsonl"], "--mix a.jsonl gives no weight"),
        (["a.jsonl=much"], "the weight 'much' of a.jsonl is not a number from 0 to 1,000"),
        (["a.jsonl=-1"], "the weight '-1' of a.jsonl"),
        (["a.jsonl=nan"], "the weight 'nan' of a.jsonl"),
        (["a.jsonl=1e999999999"], "the weight '1e999999999' of a.jsonl"),
        (["a.jsonl=1", "a.jsonl=2"], "--mix a.jsonl=2 names a.jsonl twice"),
        (["missing.yaml"], "missing.yaml: No such file"),
    ],
)
def test_what_is_no_weight_is_refused(words: list[str], cause: str) -> None:
    with pytest.raises(UserError) as error:
        ConversationArguments(mix=words)
    assert cause in error.value.cause


def test_the_mix_names_the_files_where_nothing_else_does(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model: tiny-random\nmix:\n  a.jsonl: 2\n  b.jsonl: 0.3\n")
    by_file = parse_arguments(FinetuneRun, ["--config", str(config)]).data
    by_words = parse_arguments(FinetuneRun, ["--model", "tiny-random", "--mix", "a.jsonl=2", "b.jsonl=0.3"]).data
    assert by_file == by_words
    assert by_words.train_files == ["a.jsonl", "b.jsonl"]
    given = parse_arguments(
        FinetuneRun, ["--model", "tiny-random", "--train_files", "a.jsonl", "b.jsonl", "--mix", "a=2"]
    ).data
    assert given.train_files == ["a.jsonl", "b.jsonl"]
