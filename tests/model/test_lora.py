"""LoRA adapters: which modules bear one, rows of marks that a base has never seen, and merging that is exact."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import HfDeepSpeedConfig

from novelgpt.inference.loading import load_for_inference
from novelgpt.model.baichuan import BaichuanConfig, BaichuanForCausalLM
from novelgpt.model.loading import load_model
from novelgpt.model.lora import attach_lora
from novelgpt.model.qwen1 import QWenConfig, QWenLMHeadModel
from novelgpt.model.tokenizer import known_ends, load_tokenizer
from novelgpt.settings.arguments import LoraArguments, ModelArguments, TrainArguments
from novelgpt.settings.errors import UserError
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import encode_conversation
from novelgpt.training.trainer import NovelTrainer
from tests.rounding import assert_close

MARKS = ["<|im_start|>", "<|im_end|>"]
CONVERSATIONS = [
    [{"role": "user", "content": f"第{number}问？"}, {"role": "assistant", "content": f"第{number}答。"}]
    for number in range(4)
]


def unseen(base_folder: Path, folder: Path, tied: bool = True, pipeline: str | None = None) -> Path:
    """The base as one that ends texts with <|endoftext|> and has never seen its template's marks."""
    shutil.copytree(base_folder, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}), encoding="utf-8")
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if pipeline is not None:  # as a run leaves it, which notes all end tokens
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        (folder / "run.json").write_text(json.dumps({"pipeline": pipeline}), encoding="utf-8")
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = load_tokenizer(ModelArguments(str(folder)))
    return load_model(ModelArguments(str(folder)), tokenizer, dtype), tokenizer


def train(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **settings: Any) -> NovelTrainer:
    rows = [vars(row) for messages in CONVERSATIONS for row in encode_conversation(messages, tokenizer)]
    trainer = NovelTrainer(
        model=model,
        args=TrainArguments(
            output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
            save_strategy="no", eval_strategy="no", eval_on_start=False, disable_tqdm=True, warmup_steps=0, **settings,
        ),
        train_dataset=rows,
        data_collator=Collator(int(tokenizer.pad_token_id)),
    )  # fmt: skip
    trainer.train()
    return trainer


def trained_rows(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if "trainable_tokens_delta" in name}


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# --- rows of marks


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_unseen_marks_are_trained_and_merge_exactly(
    tied: bool, checkpointing: bool, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unseen(base_folder, tmp_path / "base", tied)
    base, tokenizer = loaded(folder)
    marks = sorted(tokenizer.convert_tokens_to_ids(mark) for mark in MARKS)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = attach_lora(base, LoraArguments(lora_dropout=0.0), tokenizer)
    printed = capsys.readouterr().out
    assert "rows of <|im_start|> <|im_end|> in model.embed_tokens" in printed
    assert ("lm_head" in printed) == (not tied)
    assert "has never ended an answer with <|im_end|>" in printed
    started = {name: tensor.detach().clone() for name, tensor in trained_rows(model).items()}
    assert [len(rows) for rows in started.values()] == ([2] if tied else [2, 1])
    trainer = train(model, tokenizer, tmp_path / "run", gradient_checkpointing=checkpointing)
    trainer.save_model(str(tmp_path / "adapter"))
    assert all(not torch.equal(tensor, started[name]) for name, tensor in trained_rows(model).items())

    probe = torch.tensor([[*marks, 5, 17, marks[1], 400]])
    expected = logits(model, probe)
    reloaded = PeftModel.from_pretrained(loaded(folder)[0], tmp_path / "adapter")
    assert torch.equal(logits(reloaded, probe), expected)
    merged = reloaded.merge_and_unload()
    assert_close(logits(merged, probe), expected)
    generating = load_for_inference(ModelArguments(str(tmp_path / "adapter")), tokenizer)
    assert_close(logits(generating, probe), expected)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    others = [row for row in range(len(before["lm_head.weight"])) if row not in marks]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][others], before[name][others])
        assert not torch.equal(after[name][marks[-1]], before[name][marks[-1]])
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(logits(whole, probe), expected)


def test_rows_of_a_bf16_base_are_trained_in_fp32(base_folder: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(unseen(base_folder, tmp_path / "base"), torch.bfloat16)
    model = attach_lora(base, LoraArguments(), tokenizer)
    assert {tensor.dtype for tensor in trained_rows(model).values()} == {torch.float32}
    assert base.lm_head.original_module.weight.dtype == torch.bfloat16
    train(model, tokenizer, tmp_path / "run", bf16=True)


def test_a_base_that_knows_its_marks_trains_no_rows(base_folder: Path) -> None:
    for choice in ("auto", "never"):
        base, tokenizer = loaded(base_folder)
        assert not trained_rows(attach_lora(base, LoraArguments(train_special_tokens=choice), tokenizer))  # type: ignore[arg-type]
    base, tokenizer = loaded(base_folder)
    model = attach_lora(base, LoraArguments(train_special_tokens="always"), tokenizer)
    (rows,) = trained_rows(model).values()
    assert len(rows) == 1  # <|im_end|> is this tokenizer's own end token: the base knows it
    base, _ = loaded(base_folder)
    assert not trained_rows(attach_lora(base, LoraArguments()))


def test_weights_that_were_random_have_seen_the_end_of_documents_only(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever their tokenizer calls its end token: here that of answers, as chat models have it."""
    first, second, continued = (tmp_path / name for name in ("first", "second", "continued"))
    made_from = {first: {"config_name": "qwen3-5m", "model": str(base_folder)}, second: {"model": str(first)},
                 continued: {"model": str(base_folder)}}  # fmt: skip
    for folder, model in made_from.items():
        shutil.copytree(base_folder, folder)
        record = {"pipeline": "pretrain", "status": "finished", "arguments": {"model": model}}
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    for folder in made_from:
        base, tokenizer = loaded(folder)
        end, document_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        assert tokenizer.eos_token_id == end != document_end
        assert known_ends(str(folder), tokenizer) == ({end} if folder == continued else {document_end})
        rows = trained_rows(attach_lora(base, LoraArguments(), tokenizer))
        assert [len(of_module) for of_module in rows.values()] == ([] if folder == continued else [2])
        assert ("never ended an answer with <|im_end|>" in capsys.readouterr().out) == (folder != continued)


def test_unseen_marks_are_refused_where_their_rows_may_not_be_trained(base_folder: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(unseen(base_folder, tmp_path / "base"))
    with pytest.raises(UserError, match=r"never ended an answer with <\|im_end\|>.*would not stop") as caught:
        attach_lora(base, LoraArguments(train_special_tokens="never"), tokenizer)
    assert "--train_special_tokens auto" in caught.value.remedy
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match="ZeRO-3.*would not stop") as caught:
        attach_lora(base, LoraArguments(), tokenizer)
    assert "ZERO=2" in caught.value.remedy
    del zero3


@pytest.mark.parametrize(("pipeline", "trained"), [("pretrain", True), ("finetune", False)])
def test_continued_pretraining_teaches_no_marks(
    pipeline: str, trained: bool, base_folder: Path, tmp_path: Path
) -> None:
    base, tokenizer = loaded(unseen(base_folder, tmp_path / "base", pipeline=pipeline))
    assert bool(trained_rows(attach_lora(base, LoraArguments(), tokenizer))) == trained


def test_a_run_json_beside_a_base_is_not_that_of_the_base(base_folder: Path, tmp_path: Path) -> None:
    """Only of a checkpoint does the folder above tell how it was trained."""
    unseen(base_folder, tmp_path / "checkpoint-9", pipeline="finetune")
    unseen(base_folder, tmp_path / "base", pipeline="finetune")
    for folder in ("checkpoint-9", "base"):
        (tmp_path / folder / "run.json").unlink()
    (tmp_path / "run.json").write_text('{"pipeline": "pretrain"}', encoding="utf-8")
    for folder, trained in (("checkpoint-9", True), ("base", False)):
        base, tokenizer = loaded(tmp_path / folder)
        assert bool(trained_rows(attach_lora(base, LoraArguments(), tokenizer))) == trained
    (tmp_path / "run.json").write_text("[]", encoding="utf-8")
    base, tokenizer = loaded(tmp_path / "base")
    assert not trained_rows(attach_lora(base, LoraArguments(), tokenizer))


def test_modules_with_an_adapter_of_their_own_keep_their_rows(base_folder: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(unseen(base_folder, tmp_path / "base", tied=False))
    model = attach_lora(base, LoraArguments(lora_targets=["q_proj", "lm_head"]), tokenizer)
    (name,) = trained_rows(model)
    assert "embed_tokens" in name
    train(model, tokenizer, tmp_path / "run")


# --- targets


def baichuan(norm_head: bool, position: Literal["rope", "alibi"] = "rope") -> BaichuanForCausalLM:
    torch.manual_seed(0)
    config = BaichuanConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        position_embedding=position, norm_head=norm_head,
    )  # fmt: skip
    return BaichuanForCausalLM(config)


def qwen1() -> QWenLMHeadModel:
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=80, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, kv_channels=8
    )
    return QWenLMHeadModel(config)


BAICHUAN_TARGETS = ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]
QWEN_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted_names(model: PeftModel) -> set[str]:
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("targets", [["all-linear"], BAICHUAN_TARGETS, ["W_pack"]])
@pytest.mark.parametrize("norm_head", [True, False])
def test_baichuan_bears_adapters_that_merge(targets: list[str], norm_head: bool) -> None:
    model = attach_lora(baichuan(norm_head, "alibi"), LoraArguments(lora_targets=targets))
    assert adapted_names(model) == set(BAICHUAN_TARGETS if targets == ["all-linear"] else targets)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(std=0.1)
    probe = torch.arange(3, 20)[None]
    expected = logits(model, probe)
    merged = model.merge_and_unload()
    assert_close(logits(merged, probe), expected)
    assert (expected - logits(baichuan(norm_head, "alibi"), probe)).abs().max() > 1e-2


def test_qwen1_has_the_names_of_qwen2() -> None:
    assert adapted_names(attach_lora(qwen1(), LoraArguments(lora_targets=QWEN_TARGETS))) == set(QWEN_TARGETS)
    assert adapted_names(attach_lora(qwen1(), LoraArguments())) == set(QWEN_TARGETS)
    with pytest.raises(UserError, match="no module is named c_attn") as caught:
        attach_lora(qwen1(), LoraArguments(lora_targets=["c_attn", "o_proj"]))
    assert all(name in caught.value.remedy for name in (*QWEN_TARGETS, "lm_head", "all-linear"))


def test_a_head_that_normalises_bears_no_adapter() -> None:
    for targets in (["W_pack", "lm_head"], ["lm_head"]):
        with pytest.raises(UserError, match="lm_head: the head of BaichuanForCausalLM normalises") as caught:
            attach_lora(baichuan(norm_head=True), LoraArguments(lora_targets=targets))
        assert caught.value.remedy == "leave lm_head out of --lora_targets"
    with pytest.raises(UserError, match="no module is named q_proj") as caught:
        attach_lora(baichuan(norm_head=True), LoraArguments(lora_targets=["q_proj"]))
    assert "W_pack" in caught.value.remedy and "lm_head" not in caught.value.remedy
    attach_lora(baichuan(norm_head=False), LoraArguments(lora_targets=["W_pack", "lm_head"]))


# --- a whole run


def test_a_run_on_an_unseen_base_stops_and_merges(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = unseen(base_folder, tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in CONVERSATIONS]
    rows.write_text("".join(lines), encoding="utf-8")
    words = ["--model", str(base), "--output_dir", str(tmp_path / "run"), "--train_files", str(rows)]
    words += ["--valid_files", str(rows), "--max_steps", "25", "--learning_rate", "1e-2", "--max_length", "96"]
    words += ["--eval_strategy", "no", "--eval_on_start", "False", "--save_strategy", "no", "--lora_dropout", "0"]
    importlib.import_module("finetune_lora.__main__").main(words)
    printed = capsys.readouterr().out
    assert "LoRA also trains the rows of <|im_start|> <|im_end|>" in printed
    assert "stopped: 4 of 4 training prompts (100 %)" in printed
    assert "no estimate" not in printed
    importlib.import_module("finetune_lora.merge").main([str(tmp_path / "run"), str(tmp_path / "merged")])
