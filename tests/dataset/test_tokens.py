"""Prepared tokens are those of the text, even after a killed or repeated run."""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dataset.corpus import read_corpus
from dataset.tokens_command import main
from novelgpt.model.tiny_random import build_tokenizer
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import CorpusArguments, ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT, SAMPLES
from novelgpt.text.encoding import document_end_id, encode
from novelgpt.text.packing import PackedBlocks
from pretrain.__main__ import main as pretrain
from tests.model.original_checkpoints import write_original_baichuan

SHARED = ROOT.parent / "shared"
NOVELS = sorted((SAMPLES / "novels").glob("*.txt"))


def chapters(book: str, count: int, draw: random.Random) -> list[dict[str, str]]:
    lines = [line for line in NOVELS[0].read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        {"text": "\n".join([f"第{n}章　{book}", *draw.choices(lines, k=draw.choice([0, 1, 40]))]) + "\n" * (n % 3),
         "book": book, "chapter": f"第{n}章", "title": "", "source": f"{book}.txt#{n}"}
        for n in range(1, count + 1)
    ]  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """As `python -m dataset novels` makes it: books that continue in the next shard, one spanning three of them."""
    draw = random.Random(1)
    folder = tmp_path / "prepared"
    folder.mkdir()
    rows = [*chapters("甲", 7, draw), *chapters("乙", 12, draw), *chapters("丙", 3, draw)]
    for number, shard in enumerate((rows[:5], rows[5:9], rows[9:13], rows[13:19], rows[19:])):
        write_rows(folder / f"train-{number:05d}.parquet", shard)
    write_rows(folder / "held_out-00000.parquet", chapters("丁", 5, draw))
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of several kinds; a book continues from one file in the next."""
    draw = random.Random(2)
    rows = [*chapters("甲", 3, draw), *chapters("乙", 6, draw)]
    plain = [{"text": text} for text in ("短篇。", "又一篇。", "", "\n\n末篇。\r\n完")]
    return [
        NOVELS[0],
        write_rows(tmp_path / "a.jsonl", rows[:5]),
        write_rows(tmp_path / "b.parquet", rows[5:]),
        write_rows(tmp_path / "c.jsonl", plain),
        NOVELS[1],
        NOVELS[1],
    ]


def tokenise(inputs: list[Path], out: Path, model: Path, *more: str) -> dict[str, Any]:
    main([*map(str, inputs), str(out), "--model", str(model), *more])
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def corpus(names: list[Path], tokenizer: PreTrainedTokenizerBase, **more: Any) -> tuple[PackedBlocks, PackedBlocks]:
    return read_corpus(CorpusArguments(train_files=[str(name) for name in names], **more), tokenizer)


def assert_same_blocks(blocks: PackedBlocks, wanted: PackedBlocks) -> None:
    assert len(blocks) == len(wanted) and blocks.counts() == wanted.counts()
    for index in range(len(blocks)):
        row, wanted_row = blocks[index], wanted[index]
        assert row.keys() == wanted_row.keys()
        assert all(torch.equal(row[name], wanted_row[name]) for name in row)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_files(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_ino for path in folder.glob("shards/*/tokens")}


@pytest.mark.parametrize("packing", [True, False])
def test_blocks_are_those_of_the_text(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Path,
    files: list[Path],
    tmp_path: Path,
    packing: bool,
) -> None:
    for name, inputs in {"files": files, "folder": [prepared], "all": [*files[:3], prepared, *files[3:]]}.items():
        tokenise(inputs, tmp_path / name, base_folder)
        for max_length in (16, 300):
            more = {"max_length": max_length, "packing": packing}
            for blocks, wanted in zip(
                corpus([tmp_path / name], tokenizer, **more), corpus(inputs, tokenizer, **more), strict=True
            ):
                assert_same_blocks(blocks, wanted)


def test_tokens_are_those_of_the_chapters_joined(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, prepared: Path, tmp_path: Path
) -> None:
    manifest = tokenise([prepared], tmp_path / "out", base_folder)
    end = document_end_id(tokenizer)
    for split in ("train", "held_out"):
        books: dict[str, list[str]] = {}
        for path in sorted(prepared.glob(f"{split}-*")):
            for row in pyarrow.parquet.read_table(path).to_pylist():
                books.setdefault(row["book"], []).append(row["text"].strip("\n"))
        wanted = [token for texts in books.values() for token in [*encode("\n\n".join(texts), tokenizer), end]]
        shards = [tmp_path / "out" / "shards" / shard["name"] for shard in manifest["splits"][split]["shards"]]
        tokens = numpy.concatenate(
            [numpy.fromfile(shard / "tokens", manifest["tokenizer"]["dtype"]) for shard in shards]
        )
        assert tokens.tolist() == wanted
        assert manifest["splits"][split]["tokens"] == len(wanted)
        assert manifest["splits"][split]["documents"] == len(books)


@pytest.mark.parametrize("name", ["qwen2", "baichuan2"])
def test_real_tokenizers_on_a_real_novel(tmp_path: Path, name: str) -> None:
    model, novel = SHARED / "tokenizers" / name, SHARED / "data" / "novels" / "hulanhezhuan.daocaoren.utf8.txt"
    if not model.is_dir() or not novel.is_file():
        pytest.skip("the real tokenizers and novels are not beside the checkout")
    if name == "baichuan2":  # beside a model, for its own class
        write_original_baichuan(tmp_path / name, "alibi", norm_head=True)
        shutil.copy(model / "tokenizer.model", tmp_path / name / "tokenizer.model")
        model = tmp_path / name
    tokenizer = load_tokenizer(ModelArguments(str(model)))
    manifest = tokenise([novel], tmp_path / "out", model)
    assert manifest["tokenizer"]["dtype"] == "<u4"
    for blocks, wanted in zip(corpus([tmp_path / "out"], tokenizer), corpus([novel], tokenizer), strict=True):
        assert_same_blocks(blocks, wanted)
    whole = novel.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    assert manifest["splits"]["train"]["tokens"] == len(encode(whole, tokenizer)) + 1


def test_the_same_text_is_not_tokenised_again(
    base_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tokenise([prepared], out, base_folder)
    assert "nothing to do" not in capsys.readouterr().out
    before, made = content(out), shard_files(out)
    tokenise([prepared], out, base_folder)
    assert "nothing to do" in capsys.readouterr().out
    assert content(out) == before and shard_files(out) == made


def test_a_changed_file_is_tokenised_alone_and_nothing_old_is_left(
    base_folder: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokenise(files, out, base_folder)
    made = shard_files(out)
    rows = [json.loads(line) for line in files[1].read_bytes().splitlines()]
    rows[1]["text"] += "添一句。"
    write_rows(files[1], rows)
    manifest = tokenise(files, out, base_folder)
    again = shard_files(out)
    assert len(made.items() - again.items()) == 1 and len(again.items() - made.items()) == 1
    assert again.keys() == {shard["name"] for split in manifest["splits"].values() for shard in split["shards"]}
    tokenise(files, tmp_path / "fresh", base_folder)
    assert content(out) == content(tmp_path / "fresh")


def test_a_damaged_shard_is_refused_and_mended(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokenise(files, out, base_folder)
    good = content(out)
    shard = max(out.glob("shards/*/tokens"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="damaged"):
        corpus([out], tokenizer, max_length=64)
    tokenise(files, out, base_folder)
    assert content(out) == good


ODD_MANIFESTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no version": lambda manifest: {"kind": manifest["kind"]},
    "no splits": lambda manifest: manifest | {"splits": None},
    "splits in a list": lambda manifest: manifest | {"splits": [manifest["splits"]]},
    "a split of numbers": lambda manifest: manifest | {"splits": {"train": {"shards": [1, 2]}}},
    "a shard without a name": lambda manifest: manifest | {"splits": {"train": {"shards": [{"tokens": 1}]}}},
    "a shard elsewhere": lambda manifest: (
        manifest | {"splits": {"train": {"shards": [{"name": "../../etc", "tokens": 1, "documents": 1}]}}}
    ),
    "less than no token": lambda manifest: (
        manifest | {"splits": {"train": {"shards": [{"name": "a", "tokens": -1, "documents": 1}]}}}
    ),
    "no tokenizer": lambda manifest: {**manifest, "tokenizer": "qwen"},
    "objects for numbers": lambda manifest: manifest | {"tokenizer": manifest["tokenizer"] | {"dtype": "|O"}},
}


@pytest.mark.parametrize("name", ODD_MANIFESTS)
def test_a_manifest_of_another_shape_is_told_by_its_name(
    name: str, base_folder: Path, files: list[Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    out = tmp_path / "out"
    tokenise(files[:1], out, base_folder)
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    (out / "manifest.json").write_text(json.dumps(ODD_MANIFESTS[name](manifest)), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"out(/manifest.json cannot be read: \w+| holds tokens in the form of another)"
    ):
        corpus([out], tokenizer)


def killed_at(event: int, words: list[str], out: Path) -> bool:
    """Run the command in a process that kills itself at its `event`-th change on disk; whether it got there."""
    child = os.fork()
    if child == 0:
        events = 0

        def count(name: str, arguments: tuple[object, ...]) -> None:
            nonlocal events
            changes = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open", "shutil.rmtree")
            if changes and any(str(out) in str(argument) for argument in arguments):
                events += 1
                if events == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            main(words)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [pytest.param(False, marks=pytest.mark.long), True])
def test_after_a_kill_at_any_moment_the_outcome_is_the_same(
    base_folder: Path, files: list[Path], prepared: Path, tmp_path: Path, earlier: bool
) -> None:
    inputs, out = [*files[1:4], prepared], tmp_path / "out"
    words = [*map(str, inputs), str(out), "--model", str(base_folder)]
    main(words)
    undisturbed = content(out)
    start = tmp_path / "start"
    start.mkdir()
    if earlier:  # there are tokens of a text that was different in two places
        for index in (0, 2):
            kept = inputs[index].read_text("utf-8") if inputs[index].suffix == ".jsonl" else ""
            inputs[index].write_text(kept.replace("。", "！"), encoding="utf-8")
        main([*map(str, inputs), str(start), "--model", str(base_folder)])
        for index in (0, 2):
            inputs[index].write_text(inputs[index].read_text("utf-8").replace("！", "。"), encoding="utf-8")
        shutil.rmtree(out)
        main(words)
        undisturbed = content(out)
    draw = random.Random(4)
    event, killed = 0, 0
    while True:
        event += draw.randint(1, 12)
        shutil.rmtree(out)
        shutil.copytree(start, out)
        if not killed_at(event, words, out):
            break
        killed += 1
        main(words)
        assert content(out) == undisturbed, event
    assert killed >= 8 and content(out) == undisturbed


def test_the_held_out_part_is_evaluated_on_up_to_a_limit(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, prepared: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    manifest = tokenise([prepared], tmp_path / "out", base_folder)
    held_out = manifest["splits"]["held_out"]["tokens"]
    for source in (tmp_path / "out", prepared):
        train, valid = corpus([source], tokenizer, max_length=64)
        assert train.counts().tokens_in == manifest["splits"]["train"]["tokens"]
        assert valid.counts().tokens_in == held_out
        for limit in (640, 64 * len(valid) - 1):
            _, some = corpus([source], tokenizer, max_length=64, max_valid_tokens=limit)
            assert len(some) == limit // 64 < len(valid)
            counts = some.counts()
            assert counts.tokens_in <= limit
            assert f"{held_out - counts.tokens_in:,}" in capsys.readouterr().out  # what is dropped is shown
        _, all_of_it = corpus([source], tokenizer, max_length=64, max_valid_tokens=0)
        assert_same_blocks(all_of_it, valid)
        train, named = corpus([NOVELS[0]], tokenizer, max_length=64, valid_files=[str(source)])
        assert_same_blocks(named, valid)
        assert_same_blocks(train, corpus([NOVELS[0]], tokenizer, max_length=64, valid_files=[str(NOVELS[1])])[0])
        _, named = corpus([source], tokenizer, max_length=64, valid_files=[str(NOVELS[1])], max_valid_tokens=640)
        assert len(named) > 10  # a file that is named is evaluated on as a whole


def test_a_prepared_folder_says_how_to_tokenise_once(
    tokenizer: PreTrainedTokenizerBase, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus([prepared], tokenizer, max_length=64)
    assert "python -m dataset tokens" in capsys.readouterr().out


def test_another_tokenizer_is_refused(base_folder: Path, files: list[Path], tmp_path: Path) -> None:
    tokenise(files, tmp_path / "out", base_folder)
    other = build_tokenizer([path.read_text(encoding="utf-8") for path in NOVELS])
    with pytest.raises(UserError, match=str(base_folder)):
        corpus([tmp_path / "out"], other, max_length=64)


def test_unusable_folders_are_user_errors(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, prepared: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokenise([prepared], out, base_folder)
    model = ["--model", str(base_folder)]
    with pytest.raises(SystemExit):
        main([str(out), str(tmp_path / "again"), *model])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("字")
    with pytest.raises(SystemExit):
        main([str(prepared), str(taken), *model])
    assert content(taken) == {"mine.txt": "字".encode()}
    with pytest.raises(UserError, match="manifest.json"):
        corpus([taken], tokenizer)
    (prepared / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json"):
        corpus([prepared], tokenizer)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json"):
        corpus([out], tokenizer)
    with pytest.raises(UserError, match="nowhere.txt"):
        corpus([tmp_path / "nowhere.txt"], tokenizer)
    (taken / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="train-"):
        corpus([taken], tokenizer)


def test_training_from_tokens_has_the_losses_of_training_from_text(
    base_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    tokenise([prepared], tmp_path / "tokens", base_folder)
    losses, hashes = [], []
    for name in ("tokens", "prepared"):
        run = tmp_path / f"run-{name}"
        words = ["--model", str(base_folder), "--train_files", str(tmp_path / name), "--max_length", "128"]
        words += ["--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no", "--output_dir", str(run)]
        pretrain([*words, "--per_device_train_batch_size", "2", "--max_valid_tokens", "512"])
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([row.get("loss", row.get("eval_loss")) for row in map(json.loads, lines)])
        hashes.append(json.loads((run / "run.json").read_text(encoding="utf-8"))["data_sha256"])
    assert losses[0] == losses[1] and len(losses[0]) >= 3
    manifests = [tmp_path / name / "manifest.json" for name in ("tokens", "prepared")]
    assert hashes == [{str(path.parent): hashlib.sha256(path.read_bytes()).hexdigest()} for path in manifests]
