"""Answers during evaluation: which rows, what is logged, and that training does not notice."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.inference.generation import answer_end_ids, answer_prompts
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.loading import load_model
from novelgpt.scoring.repetition import rep4_char
from novelgpt.scoring.rouge import mean_f, score_texts
from novelgpt.settings.arguments import GenerationArguments, ModelArguments, TrainArguments
from novelgpt.text.conversation import encode_conversation, encode_prompt
from novelgpt.text.encoding import document_end_id, encode
from novelgpt.text.packing import PackedBlocks, TokenizedText
from novelgpt.training.sample_predictions import (
    MAX_PROMPT_TOKENS,
    PREDICTIONS_FILE,
    SamplePredictions,
    choose_samples,
    preserve_mode_and_rng,
)
from tests.ranks import run_pipeline

ROOT = Path(__file__).resolve().parents[2]
NOVEL = ROOT / "dataset" / "samples" / "novels" / "shan_zhong_yao_pu.txt"
FIGURES = ["eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_rep4_char", "eval_predicted_characters"]
NEW_TOKENS = 12

Row = dict[str, Any]


def conversation(number: int) -> list[dict[str, str]]:
    """Two turns, whose length grows with the number."""
    return [
        {"role": "user", "content": f"第{number}问：" + "山上有什么？" * (1 + number % 3)},
        {"role": "assistant", "content": f"有{number}棵树。"},
        {"role": "user", "content": "还有呢？"},
        {"role": "assistant", "content": f"还有第{number}座庙，" + "庙里有和尚。" * (1 + number % 4)},
    ]


CONVERSATIONS = [conversation(number) for number in range(9)]


def encoded(tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    return [vars(row) for messages in CONVERSATIONS for row in encode_conversation(messages, tokenizer)]


def packed(rows: list[Row]) -> Row:
    """Several rows as one, as packing makes it."""
    return {
        "input_ids": torch.tensor([token for row in rows for token in row["input_ids"]]),
        "labels": torch.tensor([label for row in rows for label in row["labels"]]),
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows]),
    }


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# --- which samples


def test_a_conversation_asks_for_its_last_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = choose_samples(encoded(tokenizer), tokenizer, 99, NEW_TOKENS)  # type: ignore[arg-type]
    assert len(samples) == len(CONVERSATIONS)
    for sample, messages in zip(samples, CONVERSATIONS, strict=True):
        assert sample.prompt_ids == encode_prompt(messages[:-1], tokenizer)
        assert sample.reference_ids == [*encode(messages[-1]["content"], tokenizer), tokenizer.eos_token_id]
        assert not sample.continues_text


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (3, [0, 3, 6]), (4, [0, 2, 4, 6])])
def test_samples_are_spread_evenly(count: int, chosen: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    samples = choose_samples(encoded(tokenizer), tokenizer, count, NEW_TOKENS)  # type: ignore[arg-type]
    assert [sample.prompt_ids for sample in samples] == [
        encode_prompt(CONVERSATIONS[number][:-1], tokenizer) for number in chosen
    ]


def test_rows_that_train_nothing_are_passed_over(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded(tokenizer)[:4]
    for row in rows[::2]:
        row["labels"] = [-100] * len(row["labels"])
    samples = choose_samples(rows, tokenizer, 2, NEW_TOKENS)  # type: ignore[arg-type]
    assert [sample.prompt_ids for sample in samples] == [
        encode_prompt(CONVERSATIONS[number][:-1], tokenizer) for number in (1, 3)
    ]
    assert choose_samples(rows[:1], tokenizer, 2, NEW_TOKENS) == []  # type: ignore[arg-type]


def test_packed_conversations_are_asked_one_by_one(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded(tokenizer)
    packs = [packed(rows[:2]), packed(rows[2:5]), packed(rows[5:])]

    def numbers(count: int) -> list[int]:
        """Which conversations are chosen."""
        prompts = [encode_prompt(messages[:-1], tokenizer) for messages in CONVERSATIONS]
        samples = choose_samples(packs, tokenizer, count, NEW_TOKENS)  # type: ignore[arg-type]
        return [prompts.index(sample.prompt_ids) for sample in samples]

    assert numbers(3) == [1, 3, 7]  # of each pack, the one with the longest answers
    assert numbers(5)[:3] == numbers(3) and len(set(numbers(5))) == 5
    assert sorted(numbers(99)) == list(range(9))


def test_thoughts_before_answers_are_not_scored(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "写一句。"}]
    rows: list[Row] = []
    for answer in ("<think>想</think>答", "<think>想到一半", "用 <think> 写。"):
        rows += map(vars, encode_conversation([*asked, {"role": "assistant", "content": answer}], tokenizer))
    training = TrainArguments(output_dir=str(tmp_path), predict_during_eval=9, predict_max_new_tokens=4)
    samples = SamplePredictions(rows, tokenizer, training, tmp_path)  # type: ignore[arg-type]
    assert samples.references == ["答", "", "用 <think> 写。"]


def test_text_is_asked_to_go_on_after_its_first_half(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*encode(NOVEL.read_text(encoding="utf-8")[:3000], tokenizer), document_end_id(tokenizer)]
    for max_length in (64, 2 * MAX_PROMPT_TOKENS, 1024):
        blocks = PackedBlocks([TokenizedText(numpy.array(ids))], max_length)
        samples = choose_samples(blocks, tokenizer, len(blocks), 40)
        rows = [blocks[index]["input_ids"].tolist() for index in range(len(blocks))]
        for block, sample in zip(rows, samples, strict=True):
            border = len(sample.prompt_ids)
            assert sample.continues_text
            assert sample.prompt_ids + sample.reference_ids == block[: border + 40]
            assert 0 <= min(len(block) // 2, MAX_PROMPT_TOKENS) - border < 4


def test_a_prompt_ends_in_a_whole_character(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode("😀𠮷龘龘😀𠮷", tokenizer)
    assert len(ids) == 22  # a byte each, 4 + 4 + 3 + 3 + 4 + 4
    for length in range(4, 23):
        row = {"input_ids": ids[:length], "labels": [-100, *ids[1:length]]}
        (sample,) = choose_samples([row], tokenizer, 1, 99)  # type: ignore[arg-type]
        whole = [border for border in (4, 8, 11, 14) if border <= length // 2]
        assert len(sample.prompt_ids) == (whole[-1] if whole else length // 2)
        assert sample.prompt_ids + sample.reference_ids == ids[:length]


def test_the_longest_document_of_a_block_is_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    end = document_end_id(tokenizer)
    texts = ["短。", "这一篇比较长，所以选它。", "也短。"]
    blocks = PackedBlocks([TokenizedText(numpy.array([*encode(text, tokenizer), end])) for text in texts], 100)
    (sample,) = choose_samples(blocks, tokenizer, 1, 99)
    assert sample.prompt_ids + sample.reference_ids == [*encode(texts[1], tokenizer), end]


# --- what a model answers


@pytest.fixture
def model(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """As training loads it, in the middle of training."""
    return load_model(ModelArguments(str(base_folder)), tokenizer).train()


def predictions(
    rows: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, count: int = 3, **settings: Any
) -> SamplePredictions:
    training = TrainArguments(
        predict_during_eval=count, predict_max_new_tokens=NEW_TOKENS, per_device_eval_batch_size=2, use_cpu=True,
        **settings,
    )  # fmt: skip
    return SamplePredictions(rows, tokenizer, training, folder)


def lines(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / PREDICTIONS_FILE).read_bytes().splitlines()]


def test_answers_are_those_of_prediction(
    model: PreTrainedModel, base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    scores = predictions(encoded(tokenizer), tokenizer, tmp_path).scores(model, Accelerator(cpu=True), 7)
    predictor = load_for_inference(ModelArguments(str(base_folder)), tokenizer)
    wanted = [CONVERSATIONS[number] for number in (0, 3, 6)]
    prompts = [encode_prompt(messages[:-1], tokenizer) for messages in wanted]
    ends = answer_end_ids(predictor, tokenizer)
    answers = answer_prompts(predictor, tokenizer, prompts, GenerationArguments(NEW_TOKENS), 3, ends)
    assert any(answer.text for answer in answers)
    assert lines(tmp_path) == [
        {
            "step": 7,
            "prompt": tokenizer.decode(prompt),
            "reference": messages[-1]["content"],
            "prediction": answer.text,
            "finish_reason": answer.finish_reason,
        }
        for prompt, messages, answer in zip(prompts, wanted, answers, strict=True)
    ]
    texts, references = [answer.text for answer in answers], [messages[-1]["content"] for messages in wanted]
    means = mean_f(score_texts(texts, references))
    assert scores == {
        **{f"eval_{name}": value for name, value in means.items()},
        "eval_rep4_char": rep4_char(texts),
        "eval_predicted_characters": sum(map(len, texts)) / 3,
    }
    assert list(scores) == FIGURES


def test_nothing_to_answer_gives_no_figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for rows, count in ((encoded(tokenizer), 0), ([], 3)):
        assert predictions(rows, tokenizer, tmp_path, count).scores(model, Accelerator(cpu=True), 0) == {}
    assert not (tmp_path / PREDICTIONS_FILE).exists()


def test_texts_and_answers_stop_at_the_end_of_a_document(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    end = document_end_id(tokenizer)
    assert end in answer_end_ids(model, tokenizer)
    only_ends = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    torch.nn.init.zeros_(only_ends.weight)
    only_ends.bias.data = torch.nn.functional.one_hot(torch.tensor(end), model.config.vocab_size).float()
    model.set_output_embeddings(only_ends)
    text = PackedBlocks([TokenizedText(numpy.array([*encode("山上有座庙，庙里有个老和尚。", tokenizer), end]))], 100)
    for rows in (text, encoded(tokenizer)):
        predictions(rows, tokenizer, tmp_path, 1).scores(model, Accelerator(cpu=True), 0)
        assert lines(tmp_path)[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("adapter", [False, True])
def test_training_state_is_left_as_it_was(
    adapter: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model.activation_checkpointing_enable()
    read: list[int] = []
    model.get_decoder().register_forward_hook(lambda *call: read.append(call[2].last_hidden_state.shape[1]))
    tuned: Any = model
    if adapter:
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", lora_dropout=0.5))
        tuned.enable_input_require_grads()
        tuned.train()
    model.get_decoder().layers[1].eval()  # frozen parts may be in another mode than the rest
    modes = [module.training for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    predictions(encoded(tokenizer), tokenizer, tmp_path, 2).scores(tuned, Accelerator(cpu=True), 0)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert model.is_activation_checkpointing
    assert model.config.use_cache is False
    assert len(read) > 2 and read[0] > 1 and set(read[1:]) == {1}  # one token at a time: the cache was used
    batch = torch.tensor([encode("山上有座庙。", tokenizer)])
    loss = tuned(input_ids=batch, labels=batch).loss
    loss.backward()  # no weight is left as an inference tensor
    assert torch.isfinite(loss)


def test_random_states_are_left_as_they_were() -> None:
    part = torch.nn.Linear(2, 2)
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with preserve_mode_and_rng(part):
        inside = random.random(), numpy.random.rand(), torch.rand(())
    assert (random.random(), numpy.random.rand(), torch.rand(())) == inside
    with pytest.raises(ZeroDivisionError), preserve_mode_and_rng(part):
        random.random()
        assert not part.training
        raise ZeroDivisionError
    assert part.training


def test_answers_are_computed_in_the_precision_of_training(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dtypes = set()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))  # type: ignore[union-attr]
    samples = predictions(encoded(tokenizer), tokenizer, tmp_path, 1, precision="bf16")
    samples.scores(model, Accelerator(cpu=True, mixed_precision="bf16"), 0)
    assert dtypes == {torch.bfloat16}
    assert next(model.parameters()).dtype == torch.float32


# --- whole runs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name the rows to train on and to evaluate on."""
    folder = tmp_path_factory.mktemp("rows")
    for name, messages in (("train", CONVERSATIONS[3:]), ("valid", CONVERSATIONS[:3])):
        rows = [json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in messages]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return ["--train_files", str(folder / "train.jsonl"), "--valid_files", str(folder / "valid.jsonl")]


def words(base: Path, folder: Path, count: int) -> list[str]:
    """Options of two steps, with an evaluation before, between and after."""
    return [
        "--model", str(base), "--output_dir", str(folder), "--max_steps", "2", "--logging_steps", "1",
        "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-2",
        "--stop_check", "0",
        "--per_device_train_batch_size", "2", "--predict_during_eval", str(count),
        "--predict_max_new_tokens", str(NEW_TOKENS),
    ]  # fmt: skip


def train(pipeline: str, base: Path, folder: Path, count: int, *more: str) -> list[Row]:
    """The log entries of a run in this process."""
    importlib.import_module(f"{pipeline}.__main__").main([*words(base, folder, count), *more])
    return entries(folder)


def entries(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def losses(log: list[Row]) -> list[float]:
    """All losses and gradient norms, which the least change of weights, rows or draws would alter."""
    names = ("loss", "grad_norm", "eval_loss")
    return [entry[name] for entry in log for name in names if name in entry]


LORA = ["--lora_dropout", "0.5", "--lora_rank", "4"]


@pytest.mark.parametrize(
    ("pipeline", "more"),
    [("finetune", ["--activation_checkpointing"]), pytest.param("finetune_lora", LORA, marks=pytest.mark.long)],
)
def test_losses_are_the_same_with_and_without(
    pipeline: str, more: list[str], base_folder: Path, files: list[str], tmp_path: Path
) -> None:
    plain = train(pipeline, base_folder, tmp_path / "plain", 0, *files, *more)
    watched = train(pipeline, base_folder, tmp_path / "watched", 2, *files, *more)
    assert losses(watched) == losses(plain)
    assert len(losses(plain)) == 2 * 2 + 3
    assert not (tmp_path / "plain" / PREDICTIONS_FILE).exists()
    assert all(name not in entry for entry in plain for name in FIGURES)
    assert [line["step"] for line in lines(tmp_path / "watched")] == [0, 0, 1, 1, 2, 2]


def test_figures_and_texts_are_logged_everywhere(
    base_folder: Path, files: list[str], tmp_path: Path, tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log = [entry for entry in train("finetune", base_folder, tmp_path / "run", 2, *files) if "eval_loss" in entry]
    texts = lines(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    printed = capsys.readouterr().out
    assert [entry["step"] for entry in log] == [0, 1, 2]
    for entry in log:
        mine = [line for line in texts if line["step"] == entry["step"]]
        answers = [line["prediction"] for line in mine]
        means = mean_f(score_texts(answers, [line["reference"] for line in mine]))
        assert {name: entry[f"eval_{name}"] for name in means} == means
        assert entry["eval_rep4_char"] == rep4_char(answers)
        assert f"rep4 {entry['eval_rep4_char']:.3f}" in printed
        for name in FIGURES:
            (scalar,) = (one for one in events.Scalars(name.replace("_", "/", 1)) if one.step == entry["step"])
            assert scalar.value == pytest.approx(entry[name])
        for index, line in enumerate(mine):
            (event,) = (one for one in events.Tensors(f"predictions/{index}/text_summary") if one.step == entry["step"])
            shown = event.tensor_proto.string_val[0].decode()
            for part in ("prompt", "reference", "prediction"):
                assert all(piece in shown for piece in line[part].split("\n"))
    # The last answers are the saved model's.
    saved = load_for_inference(ModelArguments(str(tmp_path / "run")), tokenizer)
    prompts = [encode_prompt(messages[:-1], tokenizer) for messages in CONVERSATIONS[:3]]
    answers = answer_prompts(
        saved, tokenizer, prompts, GenerationArguments(NEW_TOKENS), 4, answer_end_ids(saved, tokenizer)
    )
    of_prompt = {tokenizer.decode(prompt): answer.text for prompt, answer in zip(prompts, answers, strict=True)}
    assert all(of_prompt[line["prompt"]] == line["prediction"] for line in texts[-2:])


def test_an_evaluation_after_training_is_logged_in_the_same_place(
    base_folder: Path, files: list[str], tmp_path: Path
) -> None:
    train("finetune", base_folder, tmp_path / "run", 1, *files, "--eval_strategy", "no")
    assert [line["step"] for line in lines(tmp_path / "run")] == [0, 2]
    assert {path.parent.name for path in (tmp_path / "run").rglob("*tfevents*")} == {"logs"}
    (events,) = (tmp_path / "run" / "logs").glob("*tfevents*")
    assert [scalar.step for scalar in EventAccumulator(str(events)).Reload().Scalars("eval/rouge-l")] == [0, 2]


def test_pretraining_continues_the_held_out_text(base_folder: Path, tmp_path: Path) -> None:
    more = ["--valid_files", str(NOVEL), "--max_length", "256"]
    log = train("pretrain", base_folder, tmp_path / "run", 2, *more)
    assert all(name in entry for entry in log if "eval_loss" in entry for name in FIGURES)
    text = NOVEL.read_text(encoding="utf-8")
    for line in lines(tmp_path / "run"):
        assert line["prompt"] + line["reference"] in text
        assert line["prompt"] and line["reference"]


def launch(pipeline: str, processes: int, zero: int, folder: Path, options: list[str]) -> list[Row]:
    """The answers of a run through the real launch script."""
    run_pipeline(pipeline, options, processes, zero)
    assert [entry["step"] for entry in entries(folder) if "eval_rouge-l" in entry] == [0, 1, 2]
    return lines(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "zero"), [pytest.param("finetune", 2, marks=pytest.mark.long), ("finetune_lora", 3)]
)
def test_two_ranks_answer_as_one_process_does(
    pipeline: str, zero: int, base_folder: Path, files: list[str], tmp_path: Path
) -> None:
    more = [*files, "--lora_dropout", "0"] if pipeline == "finetune_lora" else files
    answers = []
    for processes, stage in ((1, 0), (2, zero)):
        folder = tmp_path / str(processes)
        options = [*words(base_folder, folder, 2), *more, "--per_device_train_batch_size", str(2 // processes)]
        options += ["--learning_rate", "1e-5"]
        answers.append(launch(pipeline, processes, stage, folder, options))
    assert answers[0] == answers[1]
    assert [line["step"] for line in answers[1]] == [0, 0, 1, 1, 2, 2]
