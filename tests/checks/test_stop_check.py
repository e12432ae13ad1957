"""The stop check asks training prompts and counts ends; every folder that is saved names all end tokens.

Started as a script, this file is one of two processes that check one model together.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.checks.stop_check import check_stops, trained_prompts
from novelgpt.inference.generation import answer_end_ids, answer_prompts
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, ModelArguments, TrainArguments
from novelgpt.text.conversation import encode_conversation, encode_prompt, end_token_ids
from novelgpt.text.packing import PackedRows
from tests.memory_rows import as_rows
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
NOVEL = ROOT / "dataset" / "samples" / "novels" / "shan_zhong_yao_pu.txt"
# Conversations of two turns, whose first answers grow with the number.
CONVERSATIONS = [
    [
        {"role": "user", "content": f"第{number}问：山上有什么？"},
        {"role": "assistant", "content": f"有{number}棵树，" + "很高。" * number},
        {"role": "user", "content": "还有呢？"},
        {"role": "assistant", "content": "没有了。"},
    ]
    for number in range(10)
]


@pytest.fixture
def model(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return load_model(ModelArguments(str(base_folder)), tokenizer).train()


def encoded(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return [row for messages in CONVERSATIONS for row in encode_conversation(messages, tokenizer)]


def rows_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    return [vars(row) for row in encoded(tokenizer)]


def first_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [encode_prompt(messages[:1], tokenizer) for messages in CONVERSATIONS]


def chosen(rows: Any, tokenizer: PreTrainedTokenizerBase, count: int, most: int = 512) -> list[int]:
    """Numbers of the conversations whose first prompts are asked."""
    known = first_prompts(tokenizer)
    prompts, is_text = trained_prompts(rows, count, end_token_ids(tokenizer), most)
    assert not is_text
    return [known.index(prompt.prompt_ids) for prompt in prompts]


def settings(**more: Any) -> TrainArguments:
    return TrainArguments(use_cpu=True, **more)


def writes_only(model: PreTrainedModel, token: int) -> None:
    """Let the model write one token for ever."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.nn.functional.one_hot(torch.tensor(token), model.config.vocab_size).float()
    model.set_output_embeddings(head)


def sometimes_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the model end half of its answers at once, and write another token for ever in the others."""

    def last_states(prompts: list[list[int]]) -> torch.Tensor:
        with torch.no_grad():
            states = [model.eval().get_decoder()(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
        return torch.stack(states)

    asked = last_states(first_prompts(tokenizer))
    answered = last_states([[*prompt, 5, 5] for prompt in first_prompts(tokenizer)])
    writes_only(model, tokenizer.eos_token_id)
    head = model.get_output_embeddings()
    # Where half of the prompts lead to the token, what follows the token leads to it all the more.
    direction = 100 * (answered.mean(0) - asked.mean(0))
    head.weight.data[5] = direction
    middle = (asked @ direction).sort().values[len(asked) // 2 - 1 :][:2]
    head.bias.data[5] = 1 - middle.mean()
    model.train()


# --- which prompts


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [0]), (4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10)))]
)
def test_first_prompts_are_spread_over_the_rows(
    count: int, expected: list[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert chosen(rows_of(tokenizer), tokenizer, count) == expected


def test_packs_are_asked_row_by_row(tokenizer: PreTrainedTokenizerBase) -> None:
    packs = PackedRows(as_rows(encoded(tokenizer)), max_length=400)
    assert 1 < len(packs) < 5
    assert sorted(chosen(packs, tokenizer, 10)) == list(range(10))
    assert len(set(chosen(packs, tokenizer, 4))) == 4


def test_answers_that_were_cut_or_are_long_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(tokenizer)
    first_ends = [next(i for i, label in enumerate(row["labels"]) if label == tokenizer.eos_token_id) for row in rows]
    for row, end in zip(rows[:3], first_ends[:3], strict=True):  # cut right before the end token
        row["input_ids"], row["labels"] = row["input_ids"][:end], row["labels"][:end]
    assert chosen(rows, tokenizer, 10) == list(range(3, 10))
    lengths = [end + 1 - len(prompt) for end, prompt in zip(first_ends, first_prompts(tokenizer), strict=True)]
    assert lengths == sorted(set(lengths))
    assert chosen(rows, tokenizer, 10, most=2 * lengths[5]) == [3, 4, 5]  # there is room for twice as much
    assert chosen(rows, tokenizer, 10, most=lengths[4]) == [3, 4]  # or, failing that, just enough
    assert chosen(rows, tokenizer, 10, most=lengths[3] - 1) == []


def test_the_end_may_be_a_label_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_of(tokenizer)
    for row in rows:
        end = row["labels"].index(tokenizer.eos_token_id)
        row["input_ids"][end] = 5  # what begins the next question, in templates that end answers so
    assert chosen(rows, tokenizer, 10) == list(range(10))


def test_raw_text_has_no_prompts(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    rows: Any = [{"input_ids": list(range(3, 40)), "labels": [-100, *range(4, 40)]}] * 4
    assert trained_prompts(rows, 20, end_token_ids(tokenizer), 512) == ([], True)
    assert check_stops(tokenizer, rows, model, settings(), Accelerator(cpu=True)) == {}


# --- what is counted


@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.long), 60])
def test_the_share_is_that_of_the_answers(
    limit: int | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    sometimes_ends(model, tokenizer)
    state = torch.get_rng_state()
    training = settings(stop_check=9, stop_check_max_new_tokens=limit)
    share = check_stops(tokenizer, rows_of(tokenizer), model, training, Accelerator(cpu=True))
    printed = capsys.readouterr().out
    assert model.training and torch.equal(torch.get_rng_state(), state)
    ends = answer_end_ids(model, tokenizer)
    asked, _ = trained_prompts(rows_of(tokenizer), 9, ends, limit or 512)
    most = limit or 2 * max(prompt.answer_tokens for prompt in asked)
    prompts = [prompt.prompt_ids for prompt in asked]
    answers = answer_prompts(model.eval(), tokenizer, prompts, GenerationArguments(most), 1, ends)
    stopped = sum(answer.finish_reason == "stop" for answer in answers)
    assert share == {"stopped": stopped / len(prompts)} and 0 < stopped < len(prompts)
    assert f"stopped: {stopped} of {len(prompts)} training prompts" in printed


def test_every_end_token_ends_an_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FORCE_COLOR", "1")
    ends = answer_end_ids(model, tokenizer)
    assert len(ends) > 1
    for token in (*ends, 5):
        writes_only(model, token)
        share = check_stops(tokenizer, rows_of(tokenizer), model, settings(), Accelerator(cpu=True))
        printed = capsys.readouterr().out
        assert share == {"stopped": token in ends}
        stopped = 10 if token in ends else 0
        assert f"stopped: {stopped} of 10 training prompts ({10 * stopped} %)" in printed
        assert ("\x1b[31m" in printed) == ("--num_train_epochs" in printed) == (token not in ends)
        assert ("10 of them without a word" in printed) == (token in ends)


def test_rows_without_a_whole_answer_are_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    training = settings(stop_check_max_new_tokens=2)
    assert check_stops(tokenizer, rows_of(tokenizer), model, training, Accelerator(cpu=True)) == {}
    assert "none of the training rows inspected holds a complete first answer of at most 2" in capsys.readouterr().out
    assert check_stops(tokenizer, rows_of(tokenizer), model, settings(stop_check=0), Accelerator(cpu=True)) == {}
    assert capsys.readouterr().out == ""


# --- whole runs


@pytest.fixture(scope="module")
def own_ends_base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, whose generation_config.json names another end token and holds values that cannot be saved again."""
    folder = tmp_path_factory.mktemp("own") / "base"
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"temperature": 0.3, "top_k": 5, "do_sample": False, "eos_token_id": [9, config["eos_token_id"]]}
    path.write_text(json.dumps(config), encoding="utf-8")
    broken = GenerationConfig.from_pretrained(folder)
    broken.pad_token_id = 3
    with pytest.raises(ValueError, match="temperature"):
        broken.save_pretrained(folder / "nowhere")
    return folder


def run(pipeline: str, base: Path, folder: Path, *more: str) -> dict[str, Any]:
    """The results of two steps on the conversations."""
    rows = folder.parent / "rows.jsonl"
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in CONVERSATIONS]
    rows.write_text("".join(lines), encoding="utf-8")
    words = ["--model", str(base), "--output_dir", str(folder), "--train_files", str(rows), "--valid_files", str(rows)]
    words += ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]
    words += ["--eval_on_start", "False", "--max_length", "128"]
    importlib.import_module(f"{pipeline}.__main__").main([*words, *more])
    results: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]
    return results


def assert_all_ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert set(config["eos_token_id"]) == {9, *end_token_ids(tokenizer)}
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert not {"temperature", "top_k", "top_p"} & config.keys()


@pytest.mark.parametrize("pipeline", [pytest.param("finetune", marks=pytest.mark.long), "finetune_lora"])
def test_every_saved_folder_names_all_end_tokens(pipeline: str, own_ends_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    results = run(pipeline, own_ends_base, folder, "--stop_check_max_new_tokens", "20")
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    folders = [folder, folder / "checkpoint-1", folder / "checkpoint-2"]
    if pipeline == "finetune_lora":
        merged = tmp_path / "merged"
        importlib.import_module("finetune_lora.merge").main([str(folder), str(merged)])
        folders.append(merged)
    for saved in folders:
        assert_all_ends(saved, tokenizer)
    # What was logged is what the saved model does.
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    assert [entry["stopped"] for entry in entries if "stopped" in entry] == [results["stopped"]]
    (scalar,) = EventAccumulator(str(folder / "logs")).Reload().Scalars("train/stopped")
    assert scalar.value == pytest.approx(results["stopped"])
    saved_model = load_for_inference(ModelArguments(str(folder)), tokenizer)
    ends = answer_end_ids(saved_model, tokenizer)
    packs: Any = rows_of(tokenizer)
    asked, _ = trained_prompts(packs, 10, ends, 20)
    prompts = [prompt.prompt_ids for prompt in asked]
    answers = answer_prompts(saved_model, tokenizer, prompts, GenerationArguments(20), 10, ends)
    assert results["stopped"] == sum(answer.finish_reason == "stop" for answer in answers) / len(prompts)


def test_a_reloaded_model_stops_at_each_of_them(own_ends_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("finetune", own_ends_base, folder, "--stop_check", "0")
    for token in json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]:
        reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        writes_only(reloaded, token)
        assert reloaded.generate(torch.tensor([[5, 6]]), max_new_tokens=7).tolist() == [[5, 6, token]]


def test_pretraining_asks_nothing(own_ends_base: Path, tmp_path: Path) -> None:
    more = ["--train_files", str(NOVEL), "--valid_files", str(NOVEL), "--max_valid_tokens", "1000"]
    results = run("pretrain", own_ends_base, tmp_path / "run", *more)
    assert "stopped" not in results and "eval_loss" in results
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert_all_ends(folder, load_tokenizer(ModelArguments(str(folder))))


# --- two processes


def main(base: Path, folder: Path) -> None:
    """Check as one of two processes."""
    tokenizer = load_tokenizer(ModelArguments(str(base)))
    model = load_model(ModelArguments(str(base)), tokenizer)
    sometimes_ends(model, tokenizer)
    counted: list[int] = []
    generate: Any = model.generate

    def counting(**words: Any) -> Any:
        counted.append(len(words["input_ids"]))
        return generate(**words)

    vars(model)["generate"] = counting
    training = settings(stop_check=7, stop_check_max_new_tokens=60)
    share = check_stops(tokenizer, rows_of(tokenizer), model, training, Accelerator(cpu=True))
    found = {"share": share, "asked": sum(counted)}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


@pytest.mark.slow
def test_two_processes_share_the_prompts(
    base_folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    run_ranks(__file__, str(base_folder), str(tmp_path), logs=tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    sometimes_ends(model, tokenizer)
    training = settings(stop_check=7, stop_check_max_new_tokens=60)
    alone = check_stops(tokenizer, rows_of(tokenizer), model, training, Accelerator(cpu=True))
    assert 0 < alone["stopped"] < 1
    assert found == [{"share": alone, "asked": 4}, {"share": alone, "asked": 3}]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
