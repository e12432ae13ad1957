"""The recipe of the tiny base: its parts, its weights, its card, its evaluation; and the whole of it on little."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import held_out_bits
from benchmarks.from_scratch import (
    FACTS,
    MOST_WEIGHTS,
    SECTION,
    SHARES,
    curve_of,
    hours_to_optimum,
    listed_weights,
    sustained,
    weights_with,
)
from benchmarks.from_scratch import main as from_scratch
from benchmarks.tiny_base import continuations, openings, read_continuations
from dataset.novels.command import main as prepare_novels
from dataset.novels.held_out import works
from dataset.novels.held_out.command import main as list_held_out
from novelgpt.inference.chat import continues_text
from novelgpt.model.card import CARD, read_card
from novelgpt.model.tokenizer import known_ends, load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT, SAMPLES
from novelgpt.settings.random_weights import SIZES
from novelgpt.settings.small_bases import SHIPPED_TINY
from novelgpt.text.encoding import document_end_id
from novelgpt.text.templates import template_record
from scripts.recipes.tiny_base import card, origin, parts, steps
from scripts.recipes.tiny_base.export import export
from tests.launched import Launched

MODERN = "她说的话，我们的心里都记着的。" * 5
NOT_SHARED = "cannot share the 2 rows of a step"
EARLIER = "却说宋江当下听罢，大怒道：好厮，如何敢来！" * 5


def write_prepared(folder: Path) -> Path:
    """A folder as `dataset novels` leaves it: three books to train on, one held out."""
    folder.mkdir(parents=True)
    rows = {
        "train-00000.jsonl": [("甲_新书", MODERN), ("甲_新书", f"{MODERN}完"), ("旧书", EARLIER),
                              ("乙_短篇_上", MODERN)],
        "held_out-00000.jsonl": [("丙_试卷", f"第一章{EARLIER}"), ("丙_试卷", f"第二章{MODERN}")],
    }  # fmt: skip
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
    return [json.loads(line) for line in path.read_bytes().splitlines()]


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
        ("甲", "新书", None, "modern"), ("丁", "旧", 1700, "earlier"), ("乙", "短篇_上", None, "modern"),
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
    repeats = {"papers": 10, "modern": 6, "earlier": 1}
    for tokenizer, per_character in (("own", {"papers": 2, "modern": 1, "earlier": 1}),
                                     ("other", {"papers": 4, "modern": 5, "earlier": 3})):  # fmt: skip
        folder = tmp_path / tokenizer
        for name in repeats:
            (folder / name).mkdir(parents=True)
            manifest = {"splits": {"train": {"tokens": sizes[name] * per_character[name]}}}
            (folder / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        read_by_training = [folder / name for name, times in repeats.items() for _ in range(times)]
        characters = sum(times * sizes[name] for name, times in repeats.items())
        tokens = sum(times * sizes[name] * per_character[name] for name, times in repeats.items())
        # All that training reads, and half of it.
        assert steps.steps_for(made, characters, 8, read_by_training) == math.ceil(tokens / 8)
        assert steps.steps_for(made, characters // 2, 8, read_by_training) in (tokens // 16, math.ceil(tokens / 16))


def nats_of(model: PreTrainedModel, ids: list[int]) -> float:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()


def test_bits_are_the_nats_of_every_token_once(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    loaded = held_out_bits.load(base_folder)
    text = "第一章\n\n" + "\n".join(["潮水退下去，滩上留着一道一道的白沫。"] * 9)
    work = held_out_bits.Work("书", (text,))
    ids = [*tokenizer(text)["input_ids"], document_end_id(tokenizer)]
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    nats = nats_of(model, ids)
    assert held_out_bits.text_sums(loaded, work, len(ids))[0] == pytest.approx(nats, rel=1e-4)
    found = held_out_bits.bits_of_works(loaded, [work, work], len(ids))
    assert found["works"]["书"] == found["all"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-4)
    for context in (2, 7, len(ids) + 5):
        assert held_out_bits.text_sums(loaded, work, context)[1] == len(ids) - 1


def test_rows_of_a_file_are_documents_that_do_not_see_each_other(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = ["题一\n潮水退下去了。", "题二\n山中有一家药铺，\n门前种着薄荷。", "题三"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    work = held_out_bits.read_documents("论文", file)
    assert work == ("论文", tuple(texts))
    assert held_out_bits.read_documents("论文", file, 12) == ("论文", (texts[0], texts[1][:2]))
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    ids = [[*tokenizer(text)["input_ids"], document_end_id(tokenizer)] for text in texts]
    found = held_out_bits.text_sums(held_out_bits.load(base_folder), work, 100)
    assert found[0] == pytest.approx(sum(nats_of(model, of_text) for of_text in ids), rel=1e-4)
    assert found[1] == sum(len(of_text) - 1 for of_text in ids)
    file.write_text("", encoding="utf-8")
    with pytest.raises(UserError):
        held_out_bits.read_documents("论文", file)


def test_works_are_read_as_training_joins_their_chapters(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared")
    whole = f"第一章{EARLIER}\n\n第二章{MODERN}"
    assert held_out_bits.read_works(prepared) == [("丙_试卷", (whole,))]
    assert held_out_bits.read_works(prepared, 9) == [("丙_试卷", (whole[:9],))]


def test_weights_without_loading_them(base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    table, total = model.get_input_embeddings().weight.numel(), model.num_parameters()
    counts = {"all": total, "embeddings": table, "multiplied": total}
    assert held_out_bits.weights_of(model.config) == counts
    model.config.tie_word_embeddings = False
    assert held_out_bits.weights_of(model.config) == {
        "all": total + table, "embeddings": 2 * table, "multiplied": total
    }  # fmt: skip


def test_the_model_continues_the_openings_of_held_out_chapters(base_folder: Path, tmp_path: Path) -> None:
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
    assert all(one["loops"] for one in found)  # greedy, from random weights


def test_what_is_counted_in_continuations(tmp_path: Path) -> None:
    predictions = [
        ("潮" * 501, "stop"),
        ("山水" + "\ufffd" * 700, "length"),
        ("山水\ufffd", "stop"),
        ("山\u2028水\x85", "length"),
    ]
    rows = [
        {"id": str(number), "prompt": "开头", "prediction": prediction, "finish_reason": reason}
        for number, (prediction, reason) in enumerate(predictions)
    ]
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = read_continuations(file)
    assert [(len(one["text"]), one["broken"], one["ended"]) for one in found] == [
        (500, 0, False), (500, 498, False), (3, 1, True), (4, 0, False),
    ]  # fmt: skip
    assert [one["loops"] for one in found] == [True, True, False, False]


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
    end = document_end_id(tokenizer)
    assert AutoTokenizer.from_pretrained(base_folder).eos_token_id != end  # it ends answers
    assert known_ends(str(tmp_path / "tiny"), tokenizer) == {end}
    assert {settings.eos_token_id, after.config.eos_token_id, tokenizer.eos_token_id} == {end}
    assert after.config.use_cache and tokenizer.model_max_length == after.config.max_position_embeddings
    assert "local_files_only" not in json.loads((tmp_path / "tiny" / "tokenizer_config.json").read_text())
    loaded = load_tokenizer(ModelArguments(str(tmp_path / "tiny")))
    assert (template_record(loaded)["name"], continues_text(tmp_path / "tiny", loaded)) == ("chatml", True)


def write_run(
    folder: Path, max_length: int, entries: list[dict[str, Any]], status: str = "finished", ditto: float = 0.0
) -> None:
    folder.mkdir(parents=True)
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 10}
    run = {"status": status, "seed": 5, "processes": 1, "git_commit": "c0ffee",
           "arguments": {"training": training, "data": {"max_length": max_length, "ditto": ditto}},
           "results": {"train_runtime": 60.0, "tokens_per_second": 1234.0}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def test_the_card_says_what_was_recorded(tmp_path: Path) -> None:
    make_parts(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"weights")
    write_run(tmp_path / "stable", 100, [
        {"step": 0, "eval_loss": 8.3, "eval_bits_per_character": 9.5}, {"step": 5, "loss": 7.0},
        {"step": 10, "eval_loss": 4.5, "eval_bits_per_character": 6.25},
    ])  # fmt: skip
    write_run(tmp_path / "decay", 1000, [{"step": 10, "eval_loss": 4.0, "eval_bits_per_character": 5.125}], ditto=0.25)
    figures = {"works": {"丙_试卷": 5.4321}, "all": 5.4321, "loss": 3.9, "characters_a_token": 1.5,
               "weights": {"all": 2_970_000, "embeddings": 1_048_576}}  # fmt: skip
    sampled = [{"id": f"丙/{number}", "opening": "潮水", "text": f"第{number}段```\x1b", "loops": number < 2,
                "broken": number == 7, "ended": number > 36} for number in range(40)]  # fmt: skip
    greedy = [one | {"loops": True} for one in sampled]
    evaluation = {"bits": {"tiny": figures, "tiny-random": figures | {"all": 9.99}}, "characters": {"丙_试卷": 321},
                  "continuations": {"sampled": sampled, "greedy": greedy, "greedy_loops": 1.0}}  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    made_from = {"MODERN": "6", "PAPER": "10"}
    write_origin = (tmp_path / origin.RECORD).write_text
    write_origin(json.dumps({"made_from": made_from, "recipe": ""}), encoding="utf-8")
    card.write(tmp_path, "apache-2.0")
    text = (tmp_path / "tiny" / CARD).read_text(encoding="utf-8")
    # Tokens: 10 steps of 2 x 3 rows of 100 and of 1,000 tokens.
    curve = ["| 0.00 M | 8.300 | 9.500 |", "| 0.01 M | 4.500 | 6.250 |", "| 0.07 M | 4.000 | 5.125 |"]
    said = ["2.97 M weights (1.05 M of them embeddings)", "on 0.07 M tokens", "in 1\nminutes", "`c0ffee`",
            f"`not recorded` (when this card was written: `{origin.recipe_hash()}`)", "每秒 1,234 个；再用 1,000 token",
            "tokens/s, then", "1,234 tokens/s, 25% of the blocks made of", "其中 25% 的块",
            "| `丙_试卷` | 321 | 5.432 | 5.432 |", "| 5.432 | 9.990 |", "`旧` `丁` 1700.", "`papers.jsonl`",
            "Of 40 continuations of held-out chapters (500 characters each; 3 of the sampled ones end before), 2 of",
            "40 of the greedy", f"`model.safetensors` `{hashlib.sha256(b'weights').hexdigest()}`",
            "contain 1 undecodable", "modern works 6 times, papers 10 times", "现代作品 6 遍，论文 10 遍",
            "18 titles and", "every 4th continuation", "每 4 段取一段", *curve]  # fmt: skip
    assert [words for words in said if words not in text] == []
    assert re.findall(r"→ 第(\d+)段'''<U\+001B>", text) == [str(number) for number in range(0, 40, 4)]
    assert list(read_card(tmp_path / "tiny").sections)[1:] == [  # type: ignore[union-attr]
        "Use 使用", "Limitations 局限", "Data 数据", "Training 训练", "Results 结果", "Samples 样例",
    ]  # fmt: skip
    assert read_card(tmp_path / "tiny").metadata["license"] == "apache-2.0"  # type: ignore[union-attr]
    assert (tmp_path / "tiny" / "curve.png").read_bytes().startswith(b"\x89PNG")
    origin.settle(tmp_path / "new", made_from | {"PAPER": "0"})
    (tmp_path / "new" / origin.RECORD).rename(tmp_path / origin.RECORD)
    card.write(tmp_path)
    text = (tmp_path / "tiny" / CARD).read_text(encoding="utf-8")
    assert f"decide the weights `{origin.recipe_hash()}`; commit" in text and "when this card" not in text
    # Where no paper was trained on, nothing says so.
    assert "modern works 6 times.\n" in text and "现代作品 6 遍。\n" in text
    assert [
        words
        for words in ("titles and abstracts of", "paper abstracts", "以及论文摘要", "论文标题与摘要")
        if words in text
    ] == []
    write_run(tmp_path / "unfinished", 100, [], status="running")
    with pytest.raises(UserError, match="not finished"):
        card.read_curve(tmp_path / "unfinished", 0)


def test_estimates_follow_from_what_was_measured() -> None:
    found = [{"weights": {"all": weights}, "tokens_per_second": 36e6} for weights in (7, 10, 12)]
    assert sustained(found) == 6 * 10 * 36e6
    # 20 tokens for each of 26 M weights are 520 M tokens, at 6 FLOP for each of both.
    assert hours_to_optimum(26_000_000, 1e12) == pytest.approx(8.112e16 / 1e12 / 3600)
    entries = [{"step": 0, "eval_loss": 8.0, "eval_bits_per_character": 9.0}, {"step": 2, "loss": 7.0, "seconds": 3.0},
               {"step": 2, "eval_loss": 6.0, "eval_bits_per_character": 7.0}]  # fmt: skip
    assert curve_of(entries) == {
        "losses": [{"tokens": 8192, "seconds": 3.0, "loss": 7.0}],
        "evaluations": [{"tokens": 0, "seconds": 0.0, "loss": 8.0, "bits": 9.0},
                        {"tokens": 8192, "seconds": 3.0, "loss": 6.0, "bits": 7.0}],
    }  # fmt: skip


def test_pages_tell_what_was_measured_wherever_they_are_written(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, docs = tmp_path / "work", tmp_path / "docs"
    (docs / "zh").mkdir(parents=True)
    work.mkdir()
    pages = [docs / "from_scratch.md", docs / "zh" / "from_scratch.md"]
    for page in pages:
        page.write_text("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter\n", encoding="utf-8")

    def measured(name: str, **facts: Any) -> None:
        sample = {"id": "1", "opening": "潮水", "text": f"{name}写的"}
        part = {"share": 1.0, "steps": 9, "tokens": 36_864, "bits": 5.5, "loss": 4.25, "samples": [sample]}
        figures = {"name": name, "parts": [part], "weights": {"all": 5_000_000}, "tokens_per_second": 2e4,
                   "evaluations": [{"tokens": 0, "bits": 9.0}, {"tokens": 36_864, "bits": 5.5}]}  # fmt: skip
        facts = dict(zip(FACTS, (7, 3, 512, 1_000, "fp32", "", []), strict=True)) | facts
        (work / f"{name}.json").write_text(json.dumps(figures | facts), encoding="utf-8")

    words = ["--held_out", str(tmp_path), "--tokenizer", str(base_folder), "--folder", str(work), "--docs", str(docs)]
    measured("qwen3-5m")
    measured("gpt2-10m")
    others = ("baichuan-10m-alibi", "baichuan-10m-rope", "llama-43m")  # small, too, with so few tokens
    with pytest.raises(SystemExit):
        from_scratch([*words, "--only", "gpt2-10m"])
    assert "old" in pages[0].read_text(encoding="utf-8")
    refusal = capsys.readouterr().err
    assert all(name in refusal for name in others)
    for name in others:
        measured(name)
    from_scratch([*words, "--only", "gpt2-10m"])
    texts = [page.read_text(encoding="utf-8") for page in pages]
    said = ("about 7 minutes of training each, on 3 CPU cores", "3 个 CPU 核，每种规模训练约 7 分钟")
    for text, facts in zip(texts, said, strict=True):
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
        assert facts in text and "| `qwen3-5m` | 5.00 M | 20,000 |" in text and "gpt2-10m写的" in text
        # In the row of a larger size stands the page's own computation, at the speed that was measured.
        hours = 6 * 20 * listed_weights(SIZES / "qwen3-26m.json") ** 2 / (6 * 5e6 * 2e4) / 3600
        assert re.search(rf"\| `qwen3-26m` \| {hours:,.0f} (h|小时) \|", text)
    (work / "baichuan-10m-rope.json").unlink()
    for only in ("typo", "qwen3-0.6b", "baichuan-10m-rope"):  # the last would take other minutes on other cores
        with pytest.raises(SystemExit) as stop:
            from_scratch([*words, "--only", only])
        assert stop.value.code == 2
    measured("baichuan-10m-rope")
    measured("gpt2-10m", cores=4)
    with pytest.raises(SystemExit) as stop:
        from_scratch([*words, "--only", "gpt2-10m"])
    assert stop.value.code == 2
    assert [page.read_text(encoding="utf-8") for page in pages] == texts
    measured("gpt2-10m")
    capsys.readouterr()
    for damage, cause, remedy in (
        (lambda: pages[1].write_text("after", encoding="utf-8"), "has no <!-- measured -->", "add these two lines"),
        (pages[1].unlink, "zh/from_scratch.md: [Errno 2] No such file", "--docs"),
    ):
        damage()
        with pytest.raises(SystemExit) as stop:
            from_scratch(words)
        error, fix = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and cause in error and remedy in fix
        assert pages[0].read_text(encoding="utf-8") == texts[0]  # neither, where one has no place for the figures


@pytest.mark.parametrize("page", ["from_scratch.md", "zh/from_scratch.md"])
def test_the_page_has_figures_and_samples_of_each_small_size(page: str) -> None:
    found = SECTION.search((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert found is not None
    tokenizer = load_tokenizer(ModelArguments(str(SHIPPED_TINY)))
    weights = {size.stem: weights_with(size, tokenizer) for size in SIZES.glob("*.json")}
    small = [name for name, number in weights.items() if number <= MOST_WEIGHTS]
    assert len(small) == 4 and f"{len(tokenizer):,}" in found[0]
    for name in small:
        rows = re.findall(rf"^\| `{name}` \| {weights[name] / 1e6:.2f} M \| .* \| ([\d.]+) \|$", found[0], re.MULTILINE)
        bits = list(map(float, rows))
        assert len(bits) == len(SHARES) and bits == sorted(bits, reverse=True)
        samples = re.findall(
            rf"^`{name}`[,，] ?[\d.]+ M [a-z]+\n\n```text\n…[^`]+→ [^`]{{50,}}```$", found[0], re.MULTILINE
        )
        assert len(samples) == len(SHARES)
    larger = [name for name in weights if name not in small]
    assert all(re.search(rf"^\| `{name}` \| [\d,]+ (h|小时) \|$", found[0], re.MULTILINE) for name in larger)


def test_a_folder_goes_on_from_what_it_is_made_from_or_not_at_all(tmp_path: Path) -> None:
    corpus, papers, out = tmp_path / "corpus", tmp_path / "papers.jsonl", tmp_path / "out"
    corpus.mkdir()
    (corpus / "甲_书.txt").write_text("潮水退下去。", encoding="utf-8")
    papers.write_text("{}", encoding="utf-8")

    def settle(held_out: str = "public_domain", steps: int = 5) -> None:
        origin.settle(out, origin.describe(corpus, papers, held_out, [f"STABLE_STEPS={steps}"]))

    settle(steps=4)
    settle()  # nothing has been made yet
    (out / "parts").mkdir()
    (out / "parts" / "books.json").write_text("{}", encoding="utf-8")
    settle()
    assert origin.recorded(out)[0] == origin.recipe_hash()
    listed = tmp_path / "mine.json"
    listed.write_bytes((Path(works.__file__).with_name("public_domain.json")).read_bytes() + b" ")
    with pytest.raises(UserError, match="another HELD_OUT$"):
        settle(str(listed))
    with pytest.raises(UserError, match="another STABLE_STEPS$"):
        settle(steps=4)
    papers.write_text("{} ", encoding="utf-8")
    (corpus / "甲_书.txt").rename(corpus / "乙_书.txt")
    with pytest.raises(UserError, match="another CORPUS, another PAPERS$"):
        settle()
    (corpus / "乙_书.txt").rename(corpus / "甲_书.txt")
    papers.write_text("{}", encoding="utf-8")
    settle()
    record = json.loads((out / origin.RECORD).read_text(encoding="utf-8"))
    (out / origin.RECORD).write_text(json.dumps(record | {"recipe": "0" * 64}), encoding="utf-8")
    with pytest.raises(UserError, match="begun by another version of the recipe"):
        settle()
    write_run(out / "decay", 100, [])
    settle()  # with the weights there, the evaluation and the card follow
    # One of an earlier version has no record.
    (out / origin.RECORD).unlink()
    settle()
    settle()
    assert origin.recorded(out)[0] == ""
    with pytest.raises(UserError, match="another STABLE_STEPS$"):
        settle(steps=4)
    with pytest.raises(UserError, match="no-such-list"):
        settle("no-such-list")


@pytest.mark.parametrize(
    ("variable", "value", "refusal"),
    [
        *(
            ("NPROC", number, [f"error: {number} processes {NOT_SHARED}", "  fix: NPROC=1 or NPROC=2"])
            for number in ("0", "3", "4", "two")
        ),
        *(
            (name, value, [f"error: {name}={value} is not a whole number of at least {least}",
                           f"  fix: {name}=NUMBER, or leave it out"])
            for name, value, least in (("VOCABULARY", "abc", 1), ("STABLE_STEPS", "0", 1), ("MODERN", "1.5", 1),
                                       ("PAPER", "-1", 0), ("EVALUATED", "010", 0))
        ),
        ("VOCABULARY", "8000", ["error: VOCABULARY=8000 makes weights of more than 8 MB",
                                "  fix: VOCABULARY=7000 or fewer"]),
        ("QWEN2_TOKENIZER", "nowhere", ["error: QWEN2_TOKENIZER=nowhere has no tokenizer_config.json",
                                        "  fix: name the folder of a tokenizer"]),
    ],
)  # fmt: skip
def test_what_would_fail_hours_later_is_refused_at_once(
    variable: str, value: str, refusal: list[str], tmp_path: Path
) -> None:
    words, variables = ["corpus", "papers.jsonl", str(tmp_path / "out")], {variable: value}
    with Launched(*words, log=tmp_path / "log", script="recipes/tiny_base.sh", variables=variables) as recipe:
        assert recipe.ends() == 2
    assert recipe.text().splitlines() == refusal
    assert not (tmp_path / "out").exists()


def test_models_whose_tokenizers_are_compared_are_of_one_size() -> None:
    """One of 151,646 tokens, Qwen2's, has hardly any weights left."""
    folder = Path(steps.__file__).parent
    own, narrow = (AutoConfig.from_pretrained(folder / f"{name}.json") for name in ("model", "narrow"))
    assert (own.vocab_size, narrow.vocab_size) == (4096, 151_646)
    assert held_out_bits.weights_of(narrow)["all"] == pytest.approx(held_out_bits.weights_of(own)["all"], rel=0.05)


def write_list(folder: Path, corpus: Path) -> Path:
    """A list that holds out one of the books of `corpus`."""
    choice = folder / "choice.yaml"
    choice.write_text("name: mine\nworks:\n  - {author: 乙, title: 山中药铺, era: modern}\n", encoding="utf-8")
    prepare_novels([str(corpus), str(folder / "all"), "--held_out_share", "0"])
    list_held_out([str(choice), str(folder / "all"), str(folder / "list.json")])
    return folder / "list.json"


@pytest.mark.long
def test_the_whole_recipe_on_the_samples(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out of * [1]"
    corpus.mkdir()
    for name, sample in (("甲_灯塔下的信", "deng_ta_xia_de_xin"), ("乙_山中药铺", "shan_zhong_yao_pu")):
        shutil.copy(SAMPLES / "novels" / f"{sample}.txt", corpus / f"{name}.txt")
    words = [str(corpus), str(SAMPLES / "papers" / "train.jsonl"), str(out)]
    variables = {"STABLE_STEPS": "6", "DECAY_STEPS": "2", "VOCABULARY": "900", "EVALUATED": "500",
                 "HELD_OUT": str(write_list(tmp_path, corpus)), "PRECISION": "fp32"}  # fmt: skip

    def start(**others: str) -> Launched:
        return Launched(*words, log=tmp_path / "log", script="recipes/tiny_base.sh", variables=variables | others)

    with start() as recipe:  # killed after its first training
        recipe.until("== 5/7")
    trained = (out / "stable" / "model.safetensors").stat().st_mtime_ns
    for _ in range(2):
        with start() as recipe:
            assert recipe.ends() == 0, recipe.text()[-3000:]
    assert (out / "stable" / "model.safetensors").stat().st_mtime_ns == trained
    with start(PAPER="3") as recipe:
        assert recipe.ends() == 2 and "another PAPER\n" in recipe.text()
    tiny = AutoModelForCausalLM.from_pretrained(out / "tiny")
    assert tiny.dtype == torch.bfloat16 and tiny.config.vocab_size == 900
    books = json.loads((out / "parts" / "books.json").read_text(encoding="utf-8"))["books"]
    assert {book["title"]: book["part"] for book in books} == {"灯塔下的信": "modern", "山中药铺": "held_out"}
    trained_on, held_out = (out / "tiny" / CARD).read_text(encoding="utf-8").split("Held out")
    assert "`灯塔下的信` `甲`." in trained_on and "`山中药铺`" not in trained_on and "`山中药铺` `乙`." in held_out
    assert "`titles and abstracts 标题与摘要`" in held_out and "tiny-random" in held_out
    assert read(out / "stable" / "metrics.jsonl")[-1]["step"] == 6


def test_a_folder_without_a_listed_work_is_told_how_to_hold_books_out(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "prepared")
    (prepared / "held_out-00000.jsonl").unlink()
    with pytest.raises(UserError, match="holds no book out") as refusal:
        parts.write_books(prepared, {}, tmp_path)
    assert "HELD_OUT_SHARE=0.05" in refusal.value.remedy
