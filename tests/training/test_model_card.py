"""The model card beside weights: what it says, that nothing from outside breaks out of it, and whose it is."""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_lora.__main__ import main as finetune_lora
from finetune_lora.merge import main as merge
from novelgpt.model.card import CARD, base_metadata, code, hub_name, read_card
from novelgpt.training.run_folder import ALL_RESULTS
from predict.__main__ import main as predict
from tests.faults.runs import write_base, write_rows

# What a name may hold on this system, and what would break out of tables, code, metadata and comments.
EVIL = "---\n# 章|`x``y`\n<!-- -->\n| [a](b) | <script>"
HEADINGS = ["Use", "Data", "Settings", "Results", "Versions"]


@pytest.fixture(scope="module")
def base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(base_folder, tmp_path_factory.mktemp("card") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder, 8)[1].rename(folder / f"{EVIL.replace('/', '')}.jsonl")


@pytest.fixture(scope="module")
def words(base: Path, rows: Path) -> list[str]:
    (base / CARD).write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-0.6B\n---\n# a card of its own\n")
    common = ["--model", str(base), "--train_files", str(rows), "--max_length", "48", "--max_steps", "2"]
    common += ["--save_strategy", "steps", "--save_steps", "1", "--lora_rank", "4", "--stop_check", "0"]
    return [*common, "--learning_rate", "0.001", "--preflight", "False", "--packing", "False", "--eval_steps", "0.5"]


@pytest.fixture(scope="module")
def adapter(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / EVIL.replace("/", "")
    finetune_lora([*words, "--output_dir", str(folder)])
    return folder


def headings(text: str) -> list[tuple[str, str]]:
    """Tag and text of each heading, as a reader of Markdown has them."""
    tokens = MarkdownIt().parse(ModelCard(text).text)
    return [
        (token.tag, tokens[place + 1].content) for place, token in enumerate(tokens) if token.type == "heading_open"
    ]


def cells(text: str) -> list[str]:
    """What stands in code in tables."""
    tokens = MarkdownIt().enable("table").parse(ModelCard(text).text)
    inside = [tokens[place + 1] for place, token in enumerate(tokens) if token.type == "td_open"]
    return [part.content for token in inside for part in token.children or [] if part.type == "code_inline"]


@pytest.mark.parametrize("place", ["", "checkpoint-1"])
def test_a_card_says_what_it_is_and_no_name_breaks_out(place: str, adapter: Path, rows: Path) -> None:
    text = (adapter / place / CARD).read_text(encoding="utf-8")
    metadata = ModelCard.load(adapter / place / CARD).data
    assert (metadata.get("library_name"), metadata.pipeline_tag) == ("peft", "text-generation")
    # What the base was made of is none that the adapter fits.
    assert (metadata.base_model, metadata.license, metadata.language) == (None, "apache-2.0", ["zh"])
    assert headings(text)[1:] == [("h2", name) for name in HEADINGS] and headings(text)[0][0] == "h1"
    run = json.loads((adapter / "run.json").read_text(encoding="utf-8"))
    (digest,) = run["data_sha256"].values()
    found = cells(text)
    shown = rows.name.replace("\n", "<U+000A>")
    assert found[found.index("train_files") : found.index("train_files") + 3] == ["train_files", shown, digest]
    settings = dict(zip(found[found.index("precision") :: 2], found[found.index("precision") + 1 :: 2], strict=True))
    assert settings["lora_rank"] == "4" and settings["learning_rate"] == "0.001" and "lora_dropout" not in settings
    assert str(adapter.parent) not in text and str(rows.parent) not in text
    fingerprint = json.loads((adapter / "base.json").read_text(encoding="utf-8"))["fingerprint"]
    assert fingerprint in text and "More Information Needed" not in text


def test_the_python_of_a_card_answers(adapter: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = (adapter / CARD).read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    python = python.replace('folder = "."', f"folder = {str(adapter)!r}").replace('"path/to/the/base"', repr(str(base)))
    exec(compile(python.replace("max_new_tokens=256", "max_new_tokens=3"), "card", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
    assert PeftModel and AutoModelForCausalLM and AutoTokenizer and torch  # what it imports is what is installed


def test_predictions_add_their_scores_to_a_card_that_nobody_edited(adapter: Path, rows: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter, tmp_path / "own")
    words = ["--model", str(own), "--data_files", str(rows), "--max_new_tokens", "2", "--max_rows", "2"]
    for _ in range(2):  # the same rows again take the place of their line
        predict(words)
    card = read_card(own)
    assert card is not None and card.metadata["metrics"] == ["perplexity", "rouge"]
    assert ModelCard.load(own / CARD).data.metrics == ["perplexity", "rouge"]
    lines = card.sections["Scores"].splitlines()
    scores = json.loads((own / "predict" / "scores.json").read_text(encoding="utf-8"))
    assert len(lines) == 5 and f"| 2 | {scores['rouge-1']:.4f} | " in lines[-1]
    before = (own / CARD).read_text(encoding="utf-8")
    os.mkfifo(pipe := tmp_path / "rows.jsonl")  # which cannot be read a second time
    with ThreadPoolExecutor() as writer:
        writer.submit(pipe.write_bytes, rows.read_bytes())
        predict([word if word != str(rows) else str(pipe) for word in words])
    assert (own / CARD).read_text(encoding="utf-8") == before
    text = (own / CARD).read_text(encoding="utf-8").replace("\n## Use", "\n我改过了。\n\n## Use")
    (own / CARD).write_text(text, encoding="utf-8")
    predict(words)
    assert (own / CARD).read_text(encoding="utf-8") == text


def test_a_merged_model_says_how_its_adapter_was_trained(adapter: Path, tmp_path: Path) -> None:
    merge([str(adapter), str(tmp_path / "merged")])
    before, card = read_card(adapter), read_card(tmp_path / "merged")
    assert before is not None and card is not None
    assert list(card.sections) == ["", *HEADINGS]
    for name in ("Data", "Settings", "Results"):
        assert card.sections[name] == before.sections[name]
    assert card.sections[""].splitlines()[0].endswith(" and its base, merged into full weights.")
    assert "peft" not in card.sections["Use"] and "apply_chat_template" in card.sections["Use"]
    metadata = ModelCard.load(tmp_path / "merged" / CARD).data
    assert (metadata.get("library_name"), metadata.base_model) == ("transformers", "Qwen/Qwen3-0.6B")
    assert str(tmp_path) not in card.text()


def interrupted(adapter: Path, folder: Path) -> Path:
    """The run as it is when it is killed after its first step of two."""
    own = shutil.copytree(adapter, folder)
    shutil.rmtree(own / "checkpoint-2")
    run = json.loads((own / "run.json").read_text(encoding="utf-8"))
    (own / "run.json").write_text(json.dumps(run | {"status": "running"}), encoding="utf-8")
    return own


def test_a_disk_that_is_full_at_the_very_end_keeps_the_weights(
    adapter: Path, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = interrupted(adapter, tmp_path / "run")
    weights = "adapter_model.safetensors"
    (own / weights).unlink()
    (own / CARD).unlink()
    (own / CARD).symlink_to(tmp_path / "not there yet.md")
    (own / f"{ALL_RESULTS}.unfinished").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as end:
        finetune_lora([*words, "--output_dir", str(own)])
    told = capsys.readouterr().err
    assert end.value.code == 2 and "No space left on device; the trained weights are saved in" in told
    assert "fix: make room there; the same command resumes from checkpoint-2" in told
    assert (own / weights).read_bytes() == (adapter / weights).read_bytes()
    assert json.loads((own / "run.json").read_text(encoding="utf-8"))["status"] == "running"
    assert not list(own.glob("*.unfinished")) and not (own / ALL_RESULTS).exists()
    finetune_lora([*words, "--output_dir", str(own)])
    assert (own / weights).read_bytes() == (adapter / weights).read_bytes()
    assert json.loads((own / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (own / ALL_RESULTS).is_file() and (own / CARD).is_symlink()  # a link is the user's own


def test_edited_cards_stay_as_they_are_when_the_run_goes_on(adapter: Path, words: list[str], tmp_path: Path) -> None:
    own = interrupted(adapter, tmp_path / "run")
    for folder in (own, own / "checkpoint-1"):
        (folder / CARD).write_text("# 我自己写的\n", encoding="utf-8")
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    finetune_lora([*words, "--output_dir", str(own)])
    logging.getLogger("transformers").removeHandler(handler)
    assert logged == []
    assert json.loads((own / "run.json").read_text(encoding="utf-8"))["resumed"][0]["checkpoint"] == "checkpoint-1"
    for folder in (own, own / "checkpoint-1"):
        assert (folder / CARD).read_text(encoding="utf-8") == "# 我自己写的\n"
    assert read_card(own / "checkpoint-2") is not None


def test_bases_in_cards(base: Path) -> None:
    assert base_metadata("Qwen/Qwen3-0.6B", "adapter")["base_model"] == "Qwen/Qwen3-0.6B"
    assert base_metadata("Qwen/Qwen3-0.6B", "adapter", hub="modelscope") == {}
    (base / CARD).write_text("---\nlicense: 'mit\n  x: y'\nbase_model: Qwen/Qwen3-0.6B\n---\n", encoding="utf-8")
    assert base_metadata(str(base), "finetune") == {"base_model": "Qwen/Qwen3-0.6B", "base_model_relation": "finetune"}
    for damaged in ("---\n- [\n---\n", "---\n" + "[" * 300 + "\n---\n", "---\nbase_model: ../..\n---\n", "x"):
        (base / CARD).write_text(damaged, encoding="utf-8")
        assert base_metadata(str(base), "finetune") == {}


def test_names_in_cards() -> None:
    for name in (EVIL, "`", "``a", "a`", " ", "", "a" * 1000, "x\u202ey"):
        (token,) = MarkdownIt().parse(f"a {code(name)} b")[1:2]
        kinds = [part.type for part in token.children or []]
        assert kinds == ["text", "code_inline", "text"], name
    assert hub_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert [hub_name(name) for name in ("/models/a", "a---b/c", "../a", "a/b/c", "~/a", "模型/甲")] == [None] * 6
