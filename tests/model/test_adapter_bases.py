"""Adapters of others: their folder alone asks no network, and their vocabulary may be longer than the base's."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune_lora.merge import main as merge
from novelgpt.inference.loading import load_for_inference
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError
from tests.model.test_hub import NAME, into_cache
from tests.model.tiny_bases import write_tiny_base

NEW = ["<地点>", "<时间>"]
IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33]])


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=ids).logits
    return made


def write_adapter(
    base: Path, folder: Path, rows: int = 0, seed: int = 1, embedding: bool = False, **settings: Any
) -> tuple[Path, torch.Tensor]:
    """An adapter of another tool, whose vocabulary has `rows` more tokens than the base, and its logits."""
    tokenizer = load_tokenizer(ModelArguments(str(base)))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        if rows > 0:
            tokenizer.add_tokens(NEW[:rows])
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or (embedding and ("embed_tokens" in name or "lm_head" in name)):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(str(folder), save_embedding_layers=embedding)
    tokenizer.save_pretrained(folder)
    ids = torch.cat([IDS, torch.tensor([[model.config.vocab_size - 1]])], dim=1)
    return folder, logits(adapted, ids)


def name_base(adapter: Path, base: str) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": base}), encoding="utf-8")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """What anyone asks a network for, which is there, but answers nobody."""
    asked: list[object] = []

    def refuse(*place: object, **_: object) -> None:
        asked.append(place)
        raise OSError("no network")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return asked


def test_a_folder_that_names_a_base_of_the_hub_asks_no_network(
    calls: list[object], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = write_adapter(base_folder, tmp_path / "adapter")
    name_base(adapter, NAME)
    chosen = ModelArguments(str(adapter))
    tokenizer = load_tokenizer(chosen)
    with pytest.raises(UserError) as caught:
        load_for_inference(chosen, tokenizer)
    assert NAME in caught.value.cause
    assert f"--base {NAME}" in caught.value.remedy
    with pytest.raises(SystemExit) as stopped:
        merge([str(adapter), str(tmp_path / "merged")])
    assert stopped.value.code == 2
    assert f"--base {NAME}" in capsys.readouterr().err
    assert not calls
    with pytest.raises(UserError, match="cannot be reached"):
        load_for_inference(chosen, tokenizer, NAME)
    assert calls


def test_a_base_that_is_in_the_cache_or_named_is_taken(calls: list[object], base_folder: Path, tmp_path: Path) -> None:
    adapter, expected = write_adapter(base_folder, tmp_path / "adapter")
    name_base(adapter, NAME)
    chosen = ModelArguments(str(adapter))
    ids = torch.cat([IDS, torch.tensor([[999]])], dim=1)
    tokenizer = load_tokenizer(chosen)
    torch.testing.assert_close(logits(load_for_inference(chosen, tokenizer, str(base_folder)), ids), expected)
    into_cache(base_folder, tmp_path / "cache")
    torch.testing.assert_close(logits(load_for_inference(chosen, tokenizer), ids), expected)
    assert not calls
    with pytest.raises(UserError, match="goes with an adapter"):
        load_for_inference(ModelArguments(str(base_folder)), tokenizer, str(base_folder))


def test_a_folder_that_is_model_and_adapter_at_once_leads_nowhere_else(
    calls: list[object], base_folder: Path, tmp_path: Path
) -> None:
    both, _ = write_adapter(base_folder, tmp_path / "both")
    shutil.copyfile(base_folder / "config.json", both / "config.json")
    name_base(both, NAME)
    with pytest.raises(UserError, match="is an adapter, not a model"):
        load_model(ModelArguments(str(both)), load_tokenizer(ModelArguments(str(both))))
    assert not calls


# name: family of the base, tokens more than it has, whether the adapter holds the embedding, settings
EXTENDED: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "embedding, tied": ("qwen3", 2, True, {}),
    "embedding and head": ("qwen2", 2, True, {}),
    "modules to save": ("qwen2", 2, False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "added rows, tied": ("qwen3", 2, False, {"trainable_token_indices": "added"}),
    "fewer rows": ("qwen3", -1, True, {}),
}


@pytest.mark.parametrize("kind", EXTENDED)
def test_an_adapter_with_another_vocabulary_is_merged(kind: str, base_folder: Path, tmp_path: Path) -> None:
    family, rows, embedding, settings = EXTENDED[kind]
    base = write_tiny_base(family, base_folder, tmp_path / "base")
    if rows < 0:  # rows that no token has, as bases are padded with
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
        model.save_pretrained(base)
    size = json.loads((base / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if "trainable_token_indices" in settings:
        settings = {"trainable_token_indices": {"embed_tokens": [size, size + 1]}}
    adapter, expected = write_adapter(base, tmp_path / "adapter", rows, embedding=embedding, **settings)
    merge([str(adapter), str(tmp_path / "merged"), "--tolerance", "1e-4"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.cat([IDS, torch.tensor([[size + rows - 1]])], dim=1)
    assert merged.config.vocab_size == size + rows
    torch.testing.assert_close(logits(merged, ids), expected, atol=1e-4, rtol=0)
    chosen = ModelArguments(str(adapter))
    torch.testing.assert_close(
        logits(load_for_inference(chosen, load_tokenizer(chosen)), ids), expected, atol=1e-4, rtol=0
    )


def test_an_adapter_without_the_rows_of_its_tokens_is_refused(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = write_adapter(base_folder, tmp_path / "adapter", 2)
    with pytest.raises(SystemExit) as stopped:
        merge([str(adapter), str(tmp_path / "merged")])
    assert stopped.value.code == 2
    assert "1002 tokens" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
