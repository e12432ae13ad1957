"""What becomes of answers: a user's own marks stay in them, and none goes beyond the model's positions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from novelgpt.inference.generation import answer_prompts
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import GenerationArguments, ModelArguments, TrainArguments
from novelgpt.text.encoding import decode_answer
from novelgpt.training.sample_predictions import SamplePredictions
from predict.__main__ import main as predict
from predict.chat import main as chat
from tests.model.tiny_bases import ADDED, write_tiny_base

MARK = ADDED[0]


@pytest.fixture(scope="module")
def one_word(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes a mark which a user added to its vocabulary, and nothing else."""
    folder = write_tiny_base("qwen2", base_folder, tmp_path_factory.mktemp("one_word"))
    mark = load_tokenizer(ModelArguments(str(folder))).convert_tokens_to_ids(MARK)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[mark] = 1.0
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", [predict, chat])
def test_weights_that_are_no_numbers_are_told(
    command: Any, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a training that has diverged leaves them."""
    folder = write_tiny_base("qwen2", base_folder, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    model.save_pretrained(folder)
    rows = ["--data_files", str(write_rows(tmp_path / "rows.jsonl", {"prompt": "问", "response": "答"}))]
    with pytest.raises(SystemExit) as ended:
        command(["--model", str(folder), *(rows if command is predict else [])])
    assert ended.value.code == 2
    assert f"error: {folder} computes no numbers (NaN)" in capsys.readouterr().err
    assert not (folder / "predict" / "predictions.jsonl").exists()


@pytest.mark.parametrize("backend", ["batches", "continuous"])
def test_a_users_own_special_tokens_stay_in_answers_which_are_shown(
    backend: str, one_word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"第{number}问\x1b[2J", "response": f"{MARK}答"} for number in range(3)]
    words = ["--model", str(one_word), "--data_files", str(write_rows(tmp_path / "rows.jsonl", *rows))]
    predict([*words, "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out"), "--backend", backend])
    lines = (tmp_path / "out" / "predictions.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == [MARK * 4] * 3
    shown = capsys.readouterr().out
    assert shown.count("prediction    ") == 2
    assert f"reference     {MARK}答" in shown
    assert "第0问<U+001B>[2J" in shown
    assert "\x1b" not in shown


def test_the_chat_shows_them(
    one_word: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["你好"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    chat(["--model", str(one_word), "--mode", "chat", "--max_new_tokens", "3", "--do_sample", "False"])
    assert MARK * 3 in capsys.readouterr().out


def test_the_samples_of_evaluations_show_them(one_word: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelArguments(str(one_word)))
    ids = tokenizer(f"第一问{MARK}答<|im_end|>", add_special_tokens=False)["input_ids"]
    border = ids.index(tokenizer.convert_tokens_to_ids(MARK))
    row = {"input_ids": ids, "labels": [-100] * border + ids[border:]}
    training = TrainArguments(output_dir=str(tmp_path), predict_during_eval=1, predict_max_new_tokens=2)
    samples = SamplePredictions([row], tokenizer, training, tmp_path)  # type: ignore[arg-type]
    assert samples.references == [f"{MARK}答"]
    model = load_model(ModelArguments(str(one_word)), tokenizer)
    assert [answer.text for answer in samples._answers(model)] == [MARK * 2]


def test_end_and_padding_tokens_are_no_part_of_an_answer(one_word: Path) -> None:
    tokenizer = load_tokenizer(ModelArguments(str(one_word)))
    start, mark = tokenizer.convert_tokens_to_ids(["<|im_start|>", MARK])
    ids = [mark, start, int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)]
    assert decode_answer(ids, tokenizer) == f"{MARK}<|im_start|>"
    assert decode_answer(ids, tokenizer, [start]) == MARK


@pytest.fixture(scope="module")
def short(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with 64 positions, which are a table that ends there."""
    return write_tiny_base("gpt2", base_folder, tmp_path_factory.mktemp("short"), 64)


@pytest.mark.parametrize(
    ("prompt", "reference", "longest", "cause"),
    [
        ("雨" * 60, "", 8, "no room for an answer of 8 within the 64 positions"),
        ("雨", "", 64, "no room for an answer of 64 within the 64 positions"),
        ("雨", "水" * 70, 8, "more than the 64 positions"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_rows_beyond_the_models_positions_are_refused(
    plain: bool, prompt: str, reference: str, longest: int, cause: str, short: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def row(name: str, prompt: str, reference: str) -> dict[str, Any]:
        if plain:
            return {"id": name, "text_prompt": prompt, "text_completion": reference}
        answer = [{"role": "assistant", "content": reference}] if reference else []
        return {"id": name, "messages": [{"role": "user", "content": prompt}, *answer]}

    file = write_rows(tmp_path / "rows.jsonl", row("fits", "雨", ""), row("far", prompt, reference))
    words = ["--model", str(short), "--data_files", str(file), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        predict([*words, "--max_new_tokens", str(longest)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert cause in error
    assert ("row fits" if longest == 64 else "row far") in error
    assert not list((tmp_path / "out").glob("*.json*"))


def test_answers_during_training_end_where_the_positions_end(short: Path) -> None:
    chosen = ModelArguments(str(short))
    tokenizer = load_tokenizer(chosen)
    model = load_for_inference(chosen, tokenizer)
    prompts = [[5] * 60, [5] * 10]
    with torch.inference_mode():
        answers = answer_prompts(model, tokenizer, prompts, GenerationArguments(max_new_tokens=20), 1, [])
    assert [answer.completion_tokens for answer in answers] == [4, 20]


def test_padding_is_no_token_that_may_not_come_back(base_folder: Path, tmp_path: Path) -> None:
    """A model that writes 天 and then ends, whose padding is its end token, as in most of the Llama kind."""
    folder = str(write_tiny_base("llama", base_folder, tmp_path / "base"))
    chosen = ModelArguments(folder, "sdpa")
    tokenizer = load_tokenizer(chosen)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = load_model(chosen, tokenizer).eval()
    word, end = tokenizer.convert_tokens_to_ids("天"), int(tokenizer.eos_token_id)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name or "embed" in name))
        model.get_output_embeddings().weight[word] = 2.0
        model.get_output_embeddings().weight[end] = 1.0
    prompts = [[5, 6, 7, 8, 9], [5], [6, 7]]
    for setting in ({"no_repeat_ngram_size": 1}, {"repetition_penalty": 4.0}):
        generation = GenerationArguments(max_new_tokens=4, **setting)
        answers = answer_prompts(model, tokenizer, prompts, generation, 3, [end])
        assert [(answer.text, answer.finish_reason) for answer in answers] == [("天", "stop")] * 3
