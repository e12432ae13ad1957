"""The recipe of the tiny base: its parts, its weights, its card, its evaluation; and the whole of it on little."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import held_out_bits
from benchmarks.from_scratch import curve_of, estimate_rows
from benchmarks.tiny_base import continuations, openings
from novelgpt.model.card import CARD, read_card
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.encoding import document_end_id
from scripts.recipes.tiny_base import card, parts, steps
from scripts.recipes.tiny_base.export import export
from tests.launched import Launched

MODERN = "她说的话，我们的心里都记着的。" * 5
EARLIER = "却说宋江当下听罢，大怒道：好厮，如何敢来！" * 5


def write_prepared(folder: Path) -> Path:
    """A folder as `dataset novels` leaves it: three books to train on, one held out."""
    folder.mkdir(parents=True)
    rows = {
        "train-00000.jsonl": [("甲_新书", MODERN), ("甲_新书", f"{MODERN}完"), ("旧书", EARLIER), ("乙_短篇", MODERN)],
        "held_out-00000.jsonl": [("丙_试卷", f"第一章{EARLIER}"), ("丙_试卷", f"第二章{MODERN}")],
    }
    for name, books in rows.items():
        lines = [
            {"text": text, "book": book, "chapter": "", "title": "", "source": f"卷/{book}.txt#{number}"}
            for number, (book, text) in enumerate(books)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_parts(tmp_path: Path) -> Path:
    papers = tmp_path / "papers.jsonl"
    rows = [{"title": f"题{number}", "abstract": f"摘要{number}"} for number in range(20)]
    papers.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    known = tmp_path / "books-known.json"
    known.write_text(
        '[{"file": "旧书.txt", "title": "旧", "author": "丁", "author_death_year": 1700}]', encoding="utf-8"
    )
    prepared = write_prepared(tmp_path / "prepared")
    parts.main([str(prepared), str(papers), str(tmp_path / "parts"), "--books", str(known)])
    return tmp_path / "parts"


def test_every_row_is_in_one_part_and_books_stay_whole(tmp_path: Path) -> None:
    made = make_parts(tmp_path)
    found = {part: [row["text"] for row in read(made / f"{part}.jsonl")] for part in ("modern", "earlier", "held_out")}
    assert found == {
        "modern": [MODERN, f"{MODERN}完", MODERN],
        "earlier": [EARLIER],
        "held_out": [f"第一章{EARLIER}", f"第二章{MODERN}"],
    }
    papers = [[row["text"] for row in read(made / f"{name}.jsonl")] for name in ("papers", "papers_held_out")]
    assert sorted(papers[0] + papers[1]) == sorted(f"题{number}\n摘要{number}" for number in range(20))
    assert papers[1] == ["题0\n摘要0", "题10\n摘要10"]
    listed = json.loads((made / "books.json").read_text(encoding="utf-8"))
    assert [(book["author"], book["title"], book["died"], book["part"]) for book in listed["books"]] == [
        ("甲", "新书", None, "modern"), ("丁", "旧", 1700, "earlier"), ("乙", "短篇", None, "modern"),
        ("丙", "试卷", None, "held_out"),
    ]  # fmt: skip
    assert listed["parts"] == {part: sum(map(len, texts)) for part, texts in found.items()} | {
        "papers": sum(map(len, papers[0]))
    }


@pytest.mark.parametrize(
    ("text", "modern"),
    [("的" * 30 + "一" * 970, True), ("的" * 29 + "一" * 971, False), ("的" * 18 + "她" + "一" * 981, True),
     ("的" * 17 + "她" * 9 + "一" * 974, False), ("", False)],
)  # fmt: skip
def test_what_is_modern(text: str, modern: bool) -> None:
    assert parts.is_modern(text) is modern


def test_steps_read_as_many_characters_whatever_the_tokenizer(tmp_path: Path) -> None:
    made = make_parts(tmp_path)
    sizes = json.loads((made / "books.json").read_text(encoding="utf-8"))["parts"]
    characters = sum(sizes.values()) - sizes["held_out"]
    for tokens_a_character in (2, 4):
        for name in ("modern", "earlier", "papers"):
            manifest = tmp_path / f"tokens-{tokens_a_character}" / name / "manifest.json"
            manifest.parent.mkdir(parents=True)
            tokens = sizes[name] * tokens_a_character
            manifest.write_text(json.dumps({"splits": {"train": {"tokens": tokens}}}), encoding="utf-8")
        tokens_a_step = 8
        assert steps.steps_for(made, tmp_path / f"tokens-{tokens_a_character}", characters, tokens_a_step) == math.ceil(
            characters * tokens_a_character / tokens_a_step
        )


def test_bits_are_the_nats_of_every_token_once(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = held_out_bits.load(base_folder)
    work = held_out_bits.Work("书", "第一章\n\n" + "\n".join(["潮水退下去，滩上留着一道一道的白沫。"] * 9))
    ids = [*tokenizer(work.text)["input_ids"], document_end_id(tokenizer)]
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    assert held_out_bits.text_sums(loaded, work, len(ids))[0] == pytest.approx(nats, rel=1e-4)
    found = held_out_bits.bits_of_works(loaded, [work, work], len(ids))
    assert found["works"]["书"] == found["all"] == pytest.approx(nats / math.log(2) / len(work.text), rel=1e-4)
    for context in (2, 7, len(ids) + 5):
        assert held_out_bits.text_sums(loaded, work, context)[1] == len(ids) - 1


def test_works_are_read_as_training_joins_their_chapters(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared")
    whole = f"第一章{EARLIER}\n\n第二章{MODERN}"
    assert held_out_bits.read_works(prepared) == [("丙_试卷", whole)]
    assert held_out_bits.read_works(prepared, 9) == [("丙_试卷", whole[:9])]


def test_weights_without_loading_them(base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    table, total = model.get_input_embeddings().weight.numel(), model.num_parameters()
    counts = {"all": total, "embeddings": table, "multiplied": total}
    assert held_out_bits.weights_of(model.config) == counts
    model.config.tie_word_embeddings = False
    assert held_out_bits.weights_of(model.config) == {
        "all": total + table, "embeddings": 2 * table, "multiplied": total
    }  # fmt: skip


def test_continuations_are_of_one_length_and_counted(base_folder: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "manifest.json").write_text("{}", encoding="utf-8")
    text = (SAMPLES / "novels" / "shan_zhong_yao_pu.txt").read_text(encoding="utf-8")
    row = {"text": text, "book": "山中药铺", "chapter": "", "title": "", "source": "a.txt#0"}
    (prepared / "held_out-00000.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    rows = openings(prepared, 3, 7, tmp_path)
    assert len(rows) == 3
    found = continuations(base_folder, tmp_path / "openings.jsonl", tmp_path / "greedy", 7)
    assert [one["id"] for one in found] == [row["id"] for row in rows]
    assert [one["opening"] for one in found] == [row["text_prompt"] for row in rows]
    assert all(len(one["text"]) == 500 for one in found if not one["ended"])
    assert all(one["loops"] for one in found)  # greedy, from random weights
    assert all(one["broken"] == one["text"].count("\ufffd") for one in found)


def test_the_export_is_the_run_rounded_to_bf16(base_folder: Path, tmp_path: Path) -> None:
    size = export(base_folder, tmp_path / "tiny")
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base_folder, tmp_path / "tiny"))
    assert all(
        torch.equal(weight.to(torch.bfloat16), after.state_dict()[name]) for name, weight in before.state_dict().items()
    )
    assert size == sum(path.stat().st_size for path in (tmp_path / "tiny").iterdir()) < 8_000_000
    settings = after.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 0.8, 0.8, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert settings.eos_token_id == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


def write_run(folder: Path, max_length: int, entries: list[dict[str, Any]], status: str = "finished") -> None:
    folder.mkdir(parents=True)
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 10}
    run = {"status": status, "seed": 5, "processes": 1, "git_commit": "c0ffee",
           "arguments": {"training": training, "data": {"max_length": max_length}},
           "results": {"train_runtime": 60.0, "tokens_per_second": 1234.0}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_the_card_says_what_was_recorded(tmp_path: Path) -> None:
    make_parts(tmp_path)
    (tmp_path / "tiny").mkdir()
    write_run(tmp_path / "stable", 100, [
        {"step": 0, "eval_loss": 8.3, "eval_bits_per_character": 9.5}, {"step": 5, "loss": 7.0},
        {"step": 10, "eval_loss": 4.5, "eval_bits_per_character": 6.25},
    ])  # fmt: skip
    write_run(tmp_path / "decay", 1000, [{"step": 10, "eval_loss": 4.0, "eval_bits_per_character": 5.125}])
    figures = {"works": {"丙_试卷": 5.4321}, "all": 5.4321, "loss": 3.9, "characters_a_token": 1.5,
               "weights": {"all": 2_970_000, "embeddings": 1_048_576}}  # fmt: skip
    drawn = [{"id": f"丙/{number}", "opening": "潮水", "text": f"第{number}段```\x1b", "loops": number < 2, "broken": 0,
              "ended": False} for number in range(40)]  # fmt: skip
    evaluation = {"bits": {"tiny": figures, "tiny-random": figures | {"all": 9.99}}, "characters": {"丙_试卷": 321},
                  "continuations": {"drawn": drawn, "greedy": drawn, "greedy_loops": 0.9}}  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    card.write(tmp_path, "apache-2.0")
    text = (tmp_path / "tiny" / CARD).read_text(encoding="utf-8")
    # Tokens: 10 steps of 2 x 3 rows of 100 and of 1,000 tokens.
    curve = ["| 0.00 M | 8.300 | 9.500 |", "| 0.01 M | 4.500 | 6.250 |", "| 0.07 M | 4.000 | 5.125 |"]
    said = ["2.97 M weights (1.05 M of them embeddings)", "on 0.07 M tokens", "in 2\nminutes", "`c0ffee`",
            card.recipe_hash(), "| `丙_试卷` | 321 | 5.432 | 5.432 |", "| 5.432 | 9.990 |", "`旧` `丁` 1700.",
            "5% of those drawn", "`papers.jsonl`", "90% of the greedy", "one in 4", *curve]  # fmt: skip
    assert [words for words in said if words not in text] == []
    assert re.findall(r"→ 第(\d+)段'''<U\+001B>", text) == [str(number) for number in range(0, 40, 4)]
    assert list(read_card(tmp_path / "tiny").sections)[1:] == [  # type: ignore[union-attr]
        "Use 使用", "What it cannot do 它做不到的", "Data 数据", "Training 训练", "Results 结果", "Samples 样例",
    ]  # fmt: skip
    assert read_card(tmp_path / "tiny").metadata["license"] == "apache-2.0"  # type: ignore[union-attr]
    assert (tmp_path / "tiny" / "curve.png").read_bytes().startswith(b"\x89PNG")
    write_run(tmp_path / "unfinished", 100, [], status="running")
    with pytest.raises(UserError, match="not finished"):
        card.read_curve(tmp_path / "unfinished", 0)


def test_estimates_follow_from_what_was_measured() -> None:
    found = [{"weights": {"all": 9, "multiplied": 8}, "tokens_per_second": 36e6}]
    larger = {"big": {"all": 300_000_000, "multiplied": 200_000_000}}
    # 8 x 36e6 / 200e6 tokens/s; 20 tokens for each of 300 M weights, at this speed.
    assert estimate_rows(larger, found) == [["`big`", "300.0 M", "1", "6,000 M", f"{6e9 / 1.44 / 3600:,.0f} h"]]
    entries = [{"step": 0, "eval_loss": 8.0, "eval_bits_per_character": 9.0}, {"step": 2, "loss": 7.0, "seconds": 3.0},
               {"step": 2, "eval_loss": 6.0, "eval_bits_per_character": 7.0}]  # fmt: skip
    assert curve_of(entries) == {
        "losses": [{"tokens": 8192, "seconds": 3.0, "loss": 7.0}],
        "evaluations": [{"tokens": 0, "seconds": 0.0, "loss": 8.0, "bits": 9.0},
                        {"tokens": 8192, "seconds": 3.0, "loss": 6.0, "bits": 7.0}],
    }  # fmt: skip


@pytest.mark.long
def test_the_whole_recipe_on_the_samples(tmp_path: Path) -> None:
    corpus, out = SAMPLES / "novels", tmp_path / "out"
    words = [str(corpus), str(SAMPLES / "papers" / "train.jsonl"), str(out)]
    variables = {"STABLE_STEPS": "6", "DECAY_STEPS": "2", "VOCABULARY": "900", "EVALUATED": "500",
                 "HELD_OUT": "--held_out shan_zhong_yao_pu", "PRECISION": "fp32"}  # fmt: skip
    for number in range(2):
        log = tmp_path / f"log-{number}"
        with Launched(*words, log=log, script="recipes/tiny_base.sh", variables=variables) as recipe:
            assert recipe.ends() == 0, recipe.text()[-3000:]
    tiny = AutoModelForCausalLM.from_pretrained(out / "tiny")
    assert tiny.dtype == torch.bfloat16 and tiny.config.vocab_size == 900
    text = (out / "tiny" / CARD).read_text(encoding="utf-8")
    assert "shan_zhong_yao_pu" in text and "tiny-random" in text
    assert read(out / "stable" / "metrics.jsonl")[-1]["step"] == 6
