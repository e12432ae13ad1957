"""What is written is read alike by transformers 4 and 5: the names of both are there, and version 5 reads no other."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from finetune.__main__ import main as finetune
from finetune_lora.__main__ import main as finetune_lora
from finetune_lora.merge import main as merge
from novelgpt.export.to_safetensors import main as to_safetensors
from novelgpt.model.loading import load_model
from novelgpt.model.portable import make_portable
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from tests.model.tiny_bases import ADDED, write_tiny_base

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e5, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LAYERS = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
POSITIONS: list[tuple[PreTrainedConfig, dict[str, Any]]] = [
    (Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), {"rope_theta": 1e6}),
    (
        LlamaConfig(max_position_embeddings=128, rope_parameters=dict(YARN)),
        {"rope_theta": 1e6, "rope_scaling": {name: YARN[name] for name in YARN if name != "rope_theta"}},
    ),
    (
        GPTNeoXConfig(rope_parameters={"rope_theta": 5e4, "partial_rotary_factor": 0.5}),
        {"rotary_emb_base": 5e4, "rotary_pct": 0.5},
    ),
    (
        Gemma3TextConfig(rope_parameters=LAYERS),
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    (
        Phi3Config(
            hidden_size=128, num_attention_heads=4, original_max_position_embeddings=4096, rope_parameters=dict(LONG)
        ),
        {
            "rope_theta": 1e5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
        },
    ),
    (Qwen3MoeConfig(num_experts=6), {"num_experts": 6, "rope_theta": 10_000.0}),
]


def read(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings


@pytest.mark.parametrize(("config", "wanted"), POSITIONS, ids=[type(config).__name__ for config, _ in POSITIONS])
def test_a_config_has_the_names_of_both_versions_and_reads_as_before(
    config: PreTrainedConfig, wanted: dict[str, Any], tmp_path: Path
) -> None:
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    make_portable(tmp_path)
    written = read(tmp_path / "config.json")
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert {name: written.get(name) for name in wanted} == wanted
    after = AutoConfig.from_pretrained(tmp_path)
    for parameters in (before.rope_parameters, after.rope_parameters):
        parameters.pop("type", None)  # another name of its rope_type
    assert after.rope_parameters == before.rope_parameters
    assert after.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_a_tokenizer_keeps_its_tokens_under_names_that_both_versions_know(
    family: str, base_folder: Path, tmp_path: Path
) -> None:
    folder = write_tiny_base(family, base_folder, tmp_path)
    text = f"天地{ADDED[0]}玄黄 hello"
    before = AutoTokenizer.from_pretrained(folder)
    make_portable(folder)
    after = AutoTokenizer.from_pretrained(folder)
    written = read(folder / "tokenizer_config.json")
    assert written["additional_special_tokens"][-2:] == ADDED
    assert not isinstance(written.get("extra_special_tokens"), list)
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.all_special_tokens == before.all_special_tokens
    if family == "llama":  # whose class goes by these in version 4
        ids = before("a")["input_ids"]
        assert written["add_bos_token"] == (ids[0] == before.bos_token_id)
        assert written["add_eos_token"] == (ids[-1] == before.eos_token_id)


def test_the_tiny_random_has_a_tokenizer_class_that_both_versions_know(base_folder: Path) -> None:
    assert read(base_folder / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read(base_folder / "config.json")["rope_theta"] == 10_000.0


@pytest.fixture(scope="module")
def written_by_commands(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of all weights, one of an adapter and the adapter merged, made where groups may read what is written."""
    folder = tmp_path_factory.mktemp("runs")
    base = write_tiny_base("qwen2", base_folder, folder / "base", 2048)
    rows = folder / "rows.jsonl"
    pairs = [{"prompt": f"第{number}问", "response": "天地玄黄"} for number in range(8)]
    rows.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    words = ["--model", str(base), "--train_files", str(rows), "--valid_files", str(rows), "--max_length", "64"]
    words += ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--stop_check", "0", "--use_cpu"]
    before = os.umask(0o027)
    try:
        finetune([*words, "--output_dir", str(folder / "full")])
        finetune_lora([*words, "--output_dir", str(folder / "adapter"), "--lora_rank", "2"])
        merge([str(folder / "adapter"), str(folder / "merged")])
        source = load_model(ModelArguments(str(base)), load_tokenizer(ModelArguments(str(base))))
        adapted = get_peft_model(source, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(str(folder / "pickled"), safe_serialization=False)
        to_safetensors([str(folder / "pickled"), str(folder / "converted")])
    finally:
        os.umask(before)
    yield folder


@pytest.mark.parametrize("name", ["full", "full/checkpoint-2", "merged"])
def test_what_commands_leave_is_readable_by_both_versions(name: str, written_by_commands: Path) -> None:
    folder = written_by_commands / name
    config = read(folder / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1_000_000
    assert config["torch_dtype"] == config["dtype"]
    assert read(folder / "tokenizer_config.json")["additional_special_tokens"][-2:] == ADDED


@pytest.mark.parametrize("name", ["full", "adapter", "merged", "converted"])
def test_the_umask_decides_who_may_read_what_is_written(name: str, written_by_commands: Path) -> None:
    folder = written_by_commands / name
    places = [folder, *folder.rglob("*")]
    modes = {str(place): stat.S_IMODE(place.stat().st_mode) for place in places}
    others = {place: oct(mode) for place, mode in modes.items() if mode != (0o750 if Path(place).is_dir() else 0o640)}
    assert not others
    assert any(place.suffix == ".safetensors" for place in places)
