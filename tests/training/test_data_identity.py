"""A run goes on with the data that it was started with: the same content in the same role, order and number."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from dataset.tokens_command import main as tokenise
from novelgpt.settings.errors import UserError
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.runs import FinetuneRun, PretrainRun, TrainingRun
from novelgpt.training.run_choice import preview_run_folder
from novelgpt.training.run_folder import claim_run_folder

TEMPLATES = "tasks:\n  next_chapter:\n  - user: {}：{{title}}\n    answers: ['{{text}}']\n"


@pytest.fixture(scope="session")
def inputs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a text, templates, a folder as `dataset novels` leaves it, and tokens."""
    place = tmp_path_factory.mktemp("inputs")
    for name in ("a", "b", "v"):
        rows = [{"prompt": f"{name} 第{number}问", "completion": "一封信。"} for number in range(4)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (place / "book.txt").write_text("灯塔下有一封信。\n" * 50, encoding="utf-8")
    (place / "ask.yaml").write_text(TEMPLATES.format("写一章"), encoding="utf-8")
    (place / "prepared").mkdir()
    for name in ("train-00000", "train-00001", "held_out-00000"):
        row = {"text": f"{name}：雨停了。" * 20, "book": name}
        (place / "prepared" / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (place / "prepared" / "manifest.json").write_text('{"outputs": []}', encoding="utf-8")
    tokenise([str(place / "book.txt"), str(place / "tokens"), "--model", str(base_folder)])
    return place


@pytest.fixture
def own(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the inputs for a test to change."""
    return Path(shutil.copytree(inputs, tmp_path / "inputs"))


def sft(
    base: Path, folder: Path, own: Path, train: list[str], valid: list[str], weight: str | None = None
) -> TrainingRun:
    words = ["--model", str(base), "--output_dir", str(folder), "--instruction_templates", str(own / "ask.yaml")]
    words += [] if weight is None else ["--mix", f"{own / train[0]}={weight}"]
    words += ["--train_files", *(str(own / name) for name in train)]
    return parse_arguments(FinetuneRun, [*words, "--valid_files", *(str(own / name) for name in valid)])


def corpus(base: Path, folder: Path, own: Path, train: list[str], valid: list[str], ditto: str = "0") -> TrainingRun:
    words = ["--model", str(base), "--output_dir", str(folder), "--ditto", ditto]
    words += ["--train_files", *(str(own / name) for name in train)]
    return parse_arguments(PretrainRun, [*words, "--valid_files", *(str(own / name) for name in valid)])


def begin(run: TrainingRun) -> None:
    """The run as it is when it is killed before its first checkpoint."""
    with claim_run_folder(run) as folder:
        folder.start(folder.run)


def append(name: str, text: str) -> Callable[[Path], None]:
    def change(own: Path) -> None:
        with (own / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def flip_token(own: Path) -> None:
    """One token is another one, in a file of the same size and time."""
    path = max(own.glob("tokens/shards/*/tokens"), key=lambda one: one.stat().st_size)
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip_token_later(own: Path) -> None:
    """The same at a later time."""
    path = max(own.glob("tokens/shards/*/tokens"), key=lambda one: one.stat().st_size)
    flip_token(own)
    os.utime(path)


def swap_splits(own: Path) -> None:
    """What was trained is evaluated on."""
    path = own / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"] = {"held_out": manifest["splits"]["train"]}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def replace_tokens(own: Path) -> None:
    """Another file has the name."""
    path = max(own.glob("tokens/shards/*/tokens"), key=lambda one: one.stat().st_size)
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def swap_shards(own: Path) -> None:
    """The rows of two shards have changed places."""
    one, other = own / "prepared" / "train-00000.jsonl", own / "prepared" / "train-00001.jsonl"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def end_otherwise(own: Path) -> None:
    """By its ending, a file is read in another way."""
    (own / "b.jsonl").rename(own / "b.json")


def nothing(_: Path) -> None:
    """The files stay as they are."""


def touch_tokens(own: Path) -> None:
    """Written anew with the content that they had."""
    for path in own.glob("tokens/shards/*/*"):
        path.write_bytes(path.read_bytes())


SFT, CORPUS = (["a.jsonl", "b.jsonl"], ["v.jsonl"]), (["prepared", "book.txt", "tokens"], ["a.jsonl"])
# What is changed, which files are named then, and the words that tell of it.
REFUSED_SFT = {
    "evaluated rows are trained": (nothing, ["a.jsonl", "b.jsonl", "v.jsonl"], ["v.jsonl"], "files of --train_files"),
    "moved from one to the other": (nothing, ["a.jsonl"], ["b.jsonl", "v.jsonl"], "files of --valid_files"),
    "twice": (nothing, ["a.jsonl", "a.jsonl", "b.jsonl"], ["v.jsonl"], "files of --train_files"),
    "another order": (nothing, ["b.jsonl", "a.jsonl"], ["v.jsonl"], "files of --train_files"),
    "one less": (nothing, ["a.jsonl"], ["v.jsonl"], "files of --train_files"),
    "a row more": (append("b.jsonl", '{"prompt": "问", "completion": "答"}\n'), *SFT, "content of b.jsonl"),
    "a row more to evaluate on": (append("v.jsonl", '{"prompt": "问", "completion": "答"}\n'), *SFT, "of v.jsonl"),
    "another wording": (append("ask.yaml", "  - user: 再写一章\n"), *SFT, "content of ask.yaml"),
    "another ending": (end_otherwise, ["a.jsonl", "b.json"], ["v.jsonl"], "b.json"),
}  # fmt: skip
REFUSED_CORPUS = {
    "a shard": (append("prepared/train-00001.jsonl", '{"text": "灯"}\n'), "content of prepared/train-00001.jsonl"),
    "a held-out shard": (append("prepared/held_out-00000.jsonl", '{"text": "灯"}\n'), "held_out-00000.jsonl"),
    "a shard more": (append("prepared/train-00002.jsonl", '{"text": "灯"}\n'), "content of prepared"),
    "two shards swapped": (swap_shards, "content of prepared/train-00000.jsonl"),
    "a token": (flip_token, "content of tokens/shards/"),
    "splits swapped": (swap_splits, "content of tokens/shards/"),
    "all tokens": (replace_tokens, "content of tokens/shards/"),
    "a text": (append("book.txt", "灯"), "content of book.txt"),
}


@pytest.mark.parametrize("name", REFUSED_SFT)
def test_other_rows_are_refused(name: str, base_folder: Path, own: Path, tmp_path: Path) -> None:
    change, train, valid, words = REFUSED_SFT[name]
    begin(sft(base_folder, tmp_path / "run", own, *SFT))
    change(own)
    with pytest.raises(UserError, match=f"unfinished run with other settings: .*{words}"):
        preview_run_folder(sft(base_folder, tmp_path / "run", own, train, valid))


@pytest.mark.parametrize("name", REFUSED_CORPUS)
def test_another_corpus_is_refused(name: str, base_folder: Path, own: Path, tmp_path: Path) -> None:
    change, words = REFUSED_CORPUS[name]
    begin(corpus(base_folder, tmp_path / "run", own, *CORPUS))
    change(own)
    with pytest.raises(UserError, match=f"unfinished run with other settings: .*{words}"):
        preview_run_folder(corpus(base_folder, tmp_path / "run", own, *CORPUS))


@pytest.mark.parametrize("change", [nothing, touch_tokens])
def test_the_same_data_elsewhere_are_the_same(
    change: Callable[[Path], None], base_folder: Path, own: Path, tmp_path: Path
) -> None:
    begin(sft(base_folder, tmp_path / "sft", own, *SFT))
    begin(corpus(base_folder, tmp_path / "corpus", own, *CORPUS))
    change(own)
    preview_run_folder(corpus(base_folder, tmp_path / "corpus", own, *CORPUS))
    moved = Path(shutil.copytree(own, tmp_path / "moved"))
    shutil.rmtree(own)
    preview_run_folder(sft(base_folder, tmp_path / "sft", moved, *SFT))
    preview_run_folder(corpus(base_folder, tmp_path / "corpus", moved, *CORPUS))


def forget(run: Path, setting: str) -> None:
    """Take a setting of the data out of the record of a run, as a version that had none wrote it."""
    path = run / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["arguments"]["data"][setting]
    path.write_text(json.dumps(record), encoding="utf-8")


def test_a_mix_is_one_of_weights_wherever_its_files_lie(base_folder: Path, own: Path, tmp_path: Path) -> None:
    begin(sft(base_folder, tmp_path / "run", own, *SFT, "1/3"))
    moved = Path(shutil.copytree(own, tmp_path / "moved"))
    preview_run_folder(sft(base_folder, tmp_path / "run", moved, *SFT, "1/3"))
    for weight in ("0.3", None):
        with pytest.raises(UserError, match="other settings: mix"):
            preview_run_folder(sft(base_folder, tmp_path / "run", own, *SFT, weight))
    forget(tmp_path / "run", "mix")
    preview_run_folder(sft(base_folder, tmp_path / "run", own, *SFT))
    with pytest.raises(UserError, match="other settings: mix"):
        preview_run_folder(sft(base_folder, tmp_path / "run", own, *SFT, "1/3"))


def test_another_share_of_pseudo_repetitions_is_another_run(base_folder: Path, own: Path, tmp_path: Path) -> None:
    begin(corpus(base_folder, tmp_path / "run", own, *CORPUS, "0.25"))
    preview_run_folder(corpus(base_folder, tmp_path / "run", own, *CORPUS, "0.25"))
    for share in ("0", "0.5"):
        with pytest.raises(UserError, match="other settings: ditto"):
            preview_run_folder(corpus(base_folder, tmp_path / "run", own, *CORPUS, share))
    forget(tmp_path / "run", "ditto")
    preview_run_folder(corpus(base_folder, tmp_path / "run", own, *CORPUS))
    with pytest.raises(UserError, match="other settings: ditto"):
        preview_run_folder(corpus(base_folder, tmp_path / "run", own, *CORPUS, "0.25"))


def test_another_vocabulary_is_another_model(base_folder: Path, own: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(base_folder, tmp_path / "base"))
    (base / "vocab.json").write_text('{"a": 0}', encoding="utf-8")
    begin(sft(base, tmp_path / "run", own, *SFT))
    preview_run_folder(sft(base, tmp_path / "run", own, *SFT))
    (base / "vocab.json").write_text('{"b": 0}', encoding="utf-8")
    with pytest.raises(UserError, match="the model .* or its files"):
        preview_run_folder(sft(base, tmp_path / "run", own, *SFT))


def test_a_run_of_an_earlier_version_is_compared_by_what_it_noted(base_folder: Path, own: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.json"
    begin(sft(base_folder, tmp_path / "run", own, *SFT))
    description = json.loads(path.read_text(encoding="utf-8"))
    del description["data"]
    del description["model_identity"]["chat_template.jinja"]  # as if it had not been looked at
    path.write_text(json.dumps(description), encoding="utf-8")
    preview_run_folder(sft(base_folder, tmp_path / "run", own, *SFT))
    for name in ("evaluated rows are trained", "moved from one to the other", "twice", "another order", "a row more"):
        change, train, valid, _ = REFUSED_SFT[name]
        change(own)
        with pytest.raises(UserError, match="unfinished run with other settings: .*(data files|content of)"):
            preview_run_folder(sft(base_folder, tmp_path / "run", own, train, valid))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (append("b.jsonl", '{"prompt": "问", "completion": "答"}\n'), "b.jsonl"),
        (append("prepared/held_out-00000.jsonl", '{"text": "灯"}\n'), "prepared/held_out-00000.jsonl"),
        (append("prepared/train-00002.jsonl", '{"text": "灯"}\n'), "prepared/train-00002.jsonl"),
        (lambda own: (own / "prepared" / "train-00001.jsonl").unlink(), "prepared/train-00001.jsonl"),
        (flip_token_later, "tokens/shards"),
    ],
)
def test_what_is_written_while_it_is_read_is_not_trained(
    change: Callable[[Path], None], name: str, base_folder: Path, own: Path, tmp_path: Path
) -> None:
    """As by `python -m dataset novels` and `tokens`, which bring a folder up to date."""
    files = [str(own / one) for one in ("a.jsonl", "b.jsonl", "prepared", "tokens")]
    words = ["--model", str(base_folder), "--output_dir", str(tmp_path / "run"), "--train_files", *files]
    run = parse_arguments(PretrainRun, words)
    with pytest.raises(UserError, match=f"{name}.* was written while this run read it"), ExitStack() as stack:
        folder = stack.enter_context(claim_run_folder(run))
        change(own)
        folder.start(folder.run)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_read_twice_is_refused(base_folder: Path, own: Path, tmp_path: Path) -> None:
    os.mkfifo(own / "pipe.jsonl")
    with (
        pytest.raises(UserError, match="pipe.jsonl is not a regular file"),
        claim_run_folder(sft(base_folder, tmp_path / "run", own, ["pipe.jsonl"], ["v.jsonl"])),
    ):
        pass
    assert not (tmp_path / "run").exists()


def write_info(own: Path, described: dict[str, object]) -> None:
    info = {"it": {"file_name": "a.jsonl"} | described, "other": {"file_name": "b.jsonl"}}
    (own / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "words", "told"),
    [
        (nothing, [], None),
        (lambda own: write_info(own, {}), [], None),
        (lambda own: shutil.copy(own / "a.jsonl", own / "d.jsonl"), [], "content of"),
        (append("v.jsonl", '{"prompt": "问", "completion": "答"}\n'), [], "content of"),
        (lambda own: write_info(own, {"columns": {"prompt": "completion", "response": "prompt"}}), [], "content of it"),
        (append("a.jsonl", '{"prompt": "问", "completion": "答"}\n'), [], "content of"),
        (nothing, ["--train_files", "?.jsonl#4"], "content of"),
        (nothing, ["--train_files", "?.jsonl"], "content of"),
        (nothing, ["--dataset", "other"], "content of other"),
        (nothing, ["--max_rows", "2"], r"max_rows \(None, now 2\)"),
        (nothing, ["--columns", "output=completion,instruction=prompt"], "columns"),
    ],
)
def test_patterns_parts_and_described_data_are_those_of_the_start(
    change: Callable[[Path], object], words: list[str], told: str | None, base_folder: Path, own: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(own)
    write_info(own, {})
    given = ["--model", str(base_folder), "--output_dir", str(tmp_path / "run"), "--train_files", "?.jsonl#5"]
    given += ["--dataset", "it", "--dataset_dir", str(own)]
    begin(parse_arguments(FinetuneRun, given))
    change(own)
    again = parse_arguments(FinetuneRun, [*given, *words])
    if told is None:
        assert preview_run_folder(again).training.output_dir == str(tmp_path / "run")
        return
    with pytest.raises(UserError, match=told):
        preview_run_folder(again)
