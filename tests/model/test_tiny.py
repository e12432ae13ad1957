"""The small base that comes with the toolkit: its files, its card, and that it writes Chinese."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dataset.novels.held_out.works import load_held_out_works
from novelgpt.model.card import read_card
from novelgpt.model.hub import locate
from novelgpt.scoring.repetition import first_loop
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import hash_file
from novelgpt.settings.paths import SAMPLES
from novelgpt.settings.small_bases import SHIPPED_TINY, SMALL_BASES, TINY, TINY_DIGEST
from scripts.recipes.tiny_base.export import MAX_BYTES

FOLDER = SHIPPED_TINY
TESTED = [work for work in load_held_out_works("public_domain").works if work.role == "test"]
BOOK = (SAMPLES / "novels" / "shan_zhong_yao_pu.txt").read_text(encoding="utf-8")


def bits_per_character(folder: Path, text: str) -> float:
    """Bits of all tokens but the first."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float()
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return nats / math.log(2) / len(text)


def test_its_name_means_a_copy_of_the_files_that_are_shipped() -> None:
    folder = Path(locate(ModelArguments(TINY)))
    assert folder == SMALL_BASES[TINY] and not folder.is_relative_to(FOLDER)
    assert {path.name for path in FOLDER.iterdir()} <= {path.name for path in folder.iterdir()}
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (FOLDER / name).read_bytes()
    assert hash_file(FOLDER / "model.safetensors")[0].startswith(TINY_DIGEST)


def test_its_size() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    assert 2_500_000 <= model.num_parameters() <= 3_000_000
    assert model.dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(FOLDER).max_position_embeddings == 4096
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES


def test_it_predicts_a_book_that_it_has_not_read(base_folder: Path) -> None:
    text = BOOK[:2000]
    assert bits_per_character(FOLDER, text) < 6.5 < 9 < bits_per_character(base_folder, text)


def test_its_tokenizer_returns_what_it_was_given() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(BOOK)["input_ids"]
    assert tokenizer.decode(ids) == BOOK
    assert len(BOOK) / len(ids) > 1.1
    assert tokenizer.eos_token == "<|endoftext|>"


def test_by_its_own_settings_it_writes_chinese_without_loops() -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER).float()
    opening = tokenizer(BOOK[:300], return_tensors="pt")
    torch.manual_seed(20)
    written = model.generate(**opening, num_return_sequences=8, max_new_tokens=200)
    texts = tokenizer.batch_decode(written[:, opening["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(first_loop(text) is not None for text in texts) <= 1
    chinese = "".join(texts)
    assert len(re.findall("[一-鿿]", chinese)) > 0.7 * len(chinese) > 500


def test_it_reads_as_far_as_it_has_positions() -> None:
    """Its last blocks had 4,096 tokens: text far from the start is predicted as well as text close to it."""
    ids = AutoTokenizer.from_pretrained(FOLDER)(BOOK, return_tensors="pt")["input_ids"][:, :4096]
    assert ids.shape[1] == 4096
    model = AutoModelForCausalLM.from_pretrained(FOLDER).float()
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses[-1000:].mean() < losses[100:1100].mean() + 0.1


def test_its_card_says_what_it_was_trained_on_and_nothing_that_is_held_out() -> None:
    card = read_card(FOLDER)
    assert card is not None
    assert card.metadata["license"] == "apache-2.0"
    trained, held_out = card.sections["Data 数据"].split("**Held out")
    for work in TESTED:
        assert f"`{work.title}` `{work.author}`" in held_out and f"`{work.author}`" not in trained
    assert trained.count("; `") > 150
    training = card.sections["Training 训练"]
    weights, _ = hash_file(FOLDER / "model.safetensors")
    assert f"sha256 of `model.safetensors` `{weights}`" in training
    assert re.search("sha256 of the files that decide the weights `[0-9a-f]{64}`", training)
    assert float(re.findall(r"on ([\d.]+) M tokens", training)[0]) >= 20 and "in blocks of 4,096 tokens" in training
    assert (FOLDER / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_its_card_reports_how_it_does_on_the_works_that_are_held_out() -> None:
    card = read_card(FOLDER)
    assert card is not None
    results = card.sections["Results 结果"]
    assert all(f"`{name}`" in results for name in ("tiny", "tiny-random", "compared-own", "compared-qwen2"))
    assert all(f"`{work.author}_{work.title}`" in results for work in TESTED)
    continued, loops = re.search(r"Of (\d+) continuations [^,]*, (\d+) of the\s+sampled", results).groups()  # type: ignore[union-attr]
    assert (int(continued), int(loops) <= 5) == (100, True)
    assert "contain 0 undecodable characters" in results
    assert card.sections["Samples 样例"].count("→") == 10
