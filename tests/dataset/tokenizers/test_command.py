"""The command: a sample of any corpus, without what is held out, and a folder that says how it was made."""

import json
import random
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from dataset.corpus import find_sources
from dataset.tokenizers.command import main, shown_names
from dataset.tokenizers.sample import Sample, cut_pieces, draw_sample
from dataset.tokenizers.words import BERT_MARKS, MARKS, load_segmenter
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.encoding import encode

run = main.__wrapped__  # type: ignore[attr-defined]  # without the exit of a command
NOVEL = SAMPLES / "novels" / "deng_ta_xia_de_xin.txt"
# Stands in for the package, of 50 MB: it, too, says that it is loaded, and leaves one of neighbouring blanks.
THULAC = """
import re

class thulac:
    def __init__(self, seg_only=False):
        self.seg_only = seg_only
        print("Model loaded succeed")

    def cut(self, text):
        text = re.sub("([ \\u3000])[ \\u3000]+", r"\\1", text)
        return [[word, "" if self.seg_only else "n"] for word in re.findall("春山|里下|雨天|(?s:.)", text)]
"""


@pytest.fixture
def thulac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    packages = tmp_path / "packages"
    (packages / "thulac-0.0.7.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: thulac\nVersion: 0.0.7\n"
    (packages / "thulac-0.0.7.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    (packages / "thulac.py").write_text(THULAC, encoding="utf-8")
    monkeypatch.syspath_prepend(packages)
    sys.modules.pop("thulac", None)
    yield
    sys.modules.pop("thulac", None)


def drawn(names: list[Path], characters: int, report: int = 0, seed: int = 1) -> Sample:
    return draw_sample(find_sources([str(name) for name in names]), "text", characters, report, seed)


def write_lines(path: Path, characters: int) -> Path:
    """Numbered lines, no two alike."""
    text, draw = NOVEL.read_text(encoding="utf-8").replace("\n", ""), random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        written = number = 0
        while written < characters:
            start = draw.randrange(len(text) - 60)
            line = f"{number}{text[start : start + draw.randrange(20, 60)]}\n"
            number, written = number + 1, written + len(line)
            file.write(line)
    return path


def test_pieces_are_the_text_whatever_the_stretches() -> None:
    text = "　　一行。\n\n \n　　第二行" + "长" * 9000 + "。\n\n\n末行"
    whole = list(cut_pieces([text]))
    assert "".join(whole) == text and len(whole) == 5
    for size in (1, 2, 7, 1000):
        assert list(cut_pieces(text[start : start + size] for start in range(0, len(text), size))) == whole


def test_a_small_corpus_is_all_used(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", 20_000)
    sample = drawn([file], 300_000, 10_000)
    assert sorted(sample.pieces + sample.report) == sorted(cut_pieces([file.read_text(encoding="utf-8")]))
    assert 0 < sum(map(len, sample.report)) < sample.characters / 20
    assert sample.corpus_characters == len(file.read_text(encoding="utf-8"))


def test_a_sample_is_drawn_from_all_of_a_large_corpus(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", 100_000)
    pieces = list(cut_pieces([file.read_text(encoding="utf-8")]))
    sample = drawn([file], 10_000, 2_000)
    assert 9_900 < sample.characters <= 10_000 and 1_900 < sum(map(len, sample.report)) <= 2_000
    assert not set(sample.pieces) & set(sample.report)
    places = [pieces.index(piece) for piece in sample.pieces]
    assert places == sorted(places)  # in order, and from every tenth of it
    assert {10 * place // len(pieces) for place in places} == set(range(10))
    again, other = drawn([file], 10_000, 2_000), drawn([file], 10_000, 2_000, seed=2)
    assert again == sample and again.sha256 == sample.sha256 != other.sha256


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    # The first for what is made once, such as the progress display.
    for characters in (3_000, 1_000_000, 4_000_000):
        file = write_lines(tmp_path / f"{characters}.txt", characters)
        tracemalloc.start()
        drawn([file], 50_000, 5_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1], peaks


def test_held_out_books_are_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    folder.mkdir()
    rows = [{"text": f"第{n}章\n山里。\n", "book": "甲"} for n in (1, 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000.parquet")
    (folder / "held_out-00000.parquet").write_bytes(b"no parquet: to read it would be an error")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    sample = drawn([folder], 1000)
    assert "".join(sample.pieces) == "第1章\n山里。\n\n第2章\n山里。\n\n"
    (folder / "train-00000.parquet").unlink()
    with pytest.raises(UserError, match="all text is held out"):
        drawn([folder], 1000)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_files_of_any_kind_and_encoding_are_read(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    text = "山里下雨。\n　　他说：“好。”"
    lines = {".txt": text, ".jsonl": json.dumps({"text": text}, ensure_ascii=False), ".csv": f'text\n"{text}"\n'}
    file.write_bytes((lines[suffix] * (200 if suffix == ".txt" else 1)).encode("gb18030"))
    assert "".join(drawn([file], 10_000).pieces) == text * (200 if suffix == ".txt" else 1)


def test_the_same_command_writes_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    papers = str(SAMPLES / "papers" / "train.jsonl")
    words = ["--kind", "byte_bpe", "--vocab_size", "600", "--text_column", "title,abstract"]
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        run([papers, str(out), *words, "--compare", str(outs[0])] if out == outs[1] else [papers, str(out), *words])
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == sorted(path.name for path in outs[1].iterdir())
    for name in set(names) - {"tokenizer_report.json", "README.md"}:
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    report = json.loads((outs[1] / "tokenizer_report.json").read_text(encoding="utf-8"))
    own, other = report["tokenizers"]
    assert [own["name"], other["name"]] == ["two", "one"]
    for figures in (own, other):
        del figures["name"], figures["characters_per_second"]
    assert own == other and own["vocabulary"] == 600 and own["round_trip"] == 1
    assert AutoTokenizer.from_pretrained(outs[0]).decode(encode("雨", AutoTokenizer.from_pretrained(outs[0]))) == "雨"
    assert "--tokenizer_name" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not empty"):
        run([papers, str(outs[0]), *words])


def test_names_to_show_are_distinct_and_the_own_comes_first() -> None:
    for out, compared, names in (
        ("new/mine", ["Qwen/Qwen3-0.6B", "old/bpe"], ["mine", "Qwen3-0.6B", "bpe"]),
        ("new/bpe", ["bpe"], ["new/bpe", "bpe"]),
        ("new/bpe", ["old/bpe", "other/bpe", "tiny"], ["new/bpe", "old/bpe", "other/bpe", "tiny"]),
        ("bpe", ["bpe"], ["bpe (new)", "bpe"]),
        ("new/bpe", ["."], ["bpe", "."]),
    ):
        assert shown_names(Path(out), compared) == names


def test_the_report_has_the_own_figures_beside_another_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run([str(NOVEL), "bpe", "--kind", "char", "--vocab_size", "400"])
    run([str(NOVEL), "new/bpe", "--kind", "char", "--vocab_size", "600", "--compare", "bpe"])
    report = json.loads(Path("new/bpe/tokenizer_report.json").read_text(encoding="utf-8"))
    found = [(figures["name"], figures["vocabulary"]) for figures in report["tokenizers"]]
    assert found == [("new/bpe", 600), ("bpe", 400)]


def test_a_sample_without_a_line_says_how_large_it_must_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("山" * 9000, encoding="utf-8")
    with pytest.raises(UserError, match="--sample_characters 1000 leaves nothing to train on") as refusal:
        drawn([tmp_path / "a.txt"], 1000, 100)
    enough = int(refusal.value.remedy.split()[2])
    assert drawn([tmp_path / "a.txt"], enough, enough // 10).pieces


@pytest.mark.usefixtures("thulac")
def test_words_may_come_from_thulac(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = "春山　　里下雨天\n"  # jieba finds 下雨天
    assert load_segmenter("thulac")(line) == ["春山", "　", "　", "里下", "雨天", "\n"]
    (tmp_path / "a.txt").write_text(line * 100, encoding="utf-8")
    size = len(BERT_MARKS) + len(MARKS) + len({"春山", "　", "里下", "雨天"})
    out = tmp_path / "out"
    run([str(tmp_path / "a.txt"), str(out), "--kind", "words", "--vocab_size", str(size), "--segmenter", "thulac"])
    assert "Model loaded" not in "".join(capfd.readouterr())
    words = set(AutoTokenizer.from_pretrained(out).get_vocab()).difference(BERT_MARKS, MARKS)
    assert words == {"春山", "　", "里下", "雨天"}
    record, report = (
        json.loads((out / f"tokenizer_{name}.json").read_text(encoding="utf-8")) for name in ("training", "report")
    )
    assert record["segmenter"] == "thulac" and record["versions"]["thulac"] == "0.0.7"
    assert report["word_ends_f1"]["likeliest"] == 1


def test_what_cannot_be_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "thulac", None)  # as where it is not installed
    wrong = {
        "--kind byte_bpe --vocab_size 90000": "the corpus is too small for --vocab_size 90000",
        "--kind words --vocab_size 900 --segmenter thulac": "--segmenter thulac needs the package thulac",
        "--kind char --vocab_size 900 --segmenter jieba": "--segmenter means nothing for --kind char",
        "--kind char --vocab_size 900 --max_token_length 2": "--max_token_length means nothing",
        "--kind char --vocab_size 0": "--vocab_size 0 is too small",
        "--kind char --vocab_size 90 --sample_characters 40000000": "--sample_characters 40000000 is too large",
        "--kind char --vocab_size 90 --compare missing": "missing",
    }
    for words, cause in wrong.items():
        with pytest.raises(SystemExit) as refusal:
            main([str(NOVEL), str(tmp_path / "out"), *words.split()])
        error, fix = capsys.readouterr().err.splitlines()
        assert refusal.value.code == 2 and error.startswith("error: ") and cause in error and fix.startswith("  fix: ")
        assert "pip install thulac" in fix or "thulac" not in words
        assert list(tmp_path.iterdir()) == []
