"""The merged checkpoint, read from its files, computes base + adapter, for every kind of adapter and base."""

import json
import shutil
import struct
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from finetune_lora.merge import main as merge
from novelgpt.export.full_checkpoint import compare_reloaded, outputs_of, write_checkpoint
from novelgpt.model.fingerprint import BASE_RECORD, write_base_record
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import new_output_folder
from novelgpt.settings.errors import UserError
from novelgpt.text.conversation import encode_prompt, end_token_ids
from novelgpt.text.templates import RECORD, template_record, use_template
from tests.model.original_checkpoints import write_original_baichuan
from tests.model.original_qwen1 import write_original_qwen1
from tests.text.test_templates import THINKING

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33]])
MARKS = [1, 2]  # ChatML's, in the tiny-random base

# name: settings of the adapter for the tiny-random base, whose head and embedding are one matrix
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear layers": {"target_modules": "all-linear"},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": MARKS}},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "the whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
}
OWN_HEAD = {"the head", "the embedding", "the whole head"}


def write_adapter(base: Path, folder: Path, size: float = 0.05, **settings: Any) -> Path:
    """An adapter that does something: its weights are moved at random, by `size`."""
    source = ModelArguments(str(base), allow_pickles=True)  # as some bases are written
    tokenizer = load_tokenizer(source)
    adapted = get_peft_model(load_model(source, tokenizer), LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    write_base_record(folder, str(base))
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def expected_logits(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter))


def merged_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def stored_types(folder: Path) -> set[str]:
    return {dtype for file in folder.glob("*.safetensors") for dtype in header(file).values()}


def header(file: Path) -> dict[str, str]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return {name: entry["dtype"] for name, entry in json.loads(content[8 : 8 + length]).items() if "dtype" in entry}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        merge([str(word) for word in words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base_folder, tmp_path_factory.mktemp("adapter"), target_modules="all-linear")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_model_computes_base_and_adapter(
    kind: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, output = write_adapter(base_folder, tmp_path / "adapter", **ADAPTERS[kind]), tmp_path / "out" / "merged"
    merge([str(adapter), str(output), "--tolerance", "1e-4"])
    shown = capsys.readouterr().out
    assert Counter(line.strip(" │").rsplit("│", 1)[-1].strip() for line in shown.splitlines())["equal"] == 4
    assert "largest difference of a logit" in shown

    expected, merged = expected_logits(base_folder, adapter), merged_model(output)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    assert (expected - logits(merged_model(base_folder))).abs().max() > 0.1
    assert config_of(output)["tie_word_embeddings"] == (kind not in OWN_HEAD)
    assert list(output.parent.iterdir()) == [output]


def test_trained_rows_are_in_the_embedding_and_in_the_head(base_folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base_folder, tmp_path / "adapter", **ADAPTERS["rows of the embedding"])
    merge([str(adapter), str(tmp_path / "merged")])
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        (name,) = [name for name in file.keys() if "trainable_tokens" in name]  # noqa: SIM118  not a dict
        rows = file.get_tensor(name)
    merged, base = merged_model(tmp_path / "merged"), merged_model(base_folder)
    head, embedding = merged.get_parameter("lm_head.weight"), merged.get_parameter("model.embed_tokens.weight")
    old = base.get_parameter("model.embed_tokens.weight")
    others = [index for index in range(old.shape[0]) if index not in MARKS]
    assert torch.equal(embedding[MARKS], rows)
    assert torch.equal(head, embedding)
    assert torch.equal(embedding[others], old[others])
    assert not torch.equal(embedding[MARKS], old[MARKS])


@pytest.mark.parametrize("norm_head", [False, True], ids=["Baichuan", "Baichuan2"])
def test_an_original_baichuan_keeps_its_names_and_loads_without_its_code(norm_head: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    original = write_original_baichuan(base, position="rope", norm_head=norm_head, shards="bin_sharded")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["W_pack", "o_proj", "gate_proj"])
    output = tmp_path / "merged"
    merge([str(adapter), str(output), "--tolerance", "1e-4", "--max_shard_size", "100KB", "--allow_pickles"])

    names = [name for file in output.glob("*.safetensors") for name in header(file)]
    assert sorted(names) == sorted(original)
    assert len(list(output.glob("*.safetensors"))) > 1
    config = config_of(output)
    assert config["architectures"] == config_of(base)["architectures"]
    assert (config["position_embedding"], config["norm_head"]) == ("rope", norm_head)
    texts = "".join(file.read_text(encoding="utf-8") for file in output.glob("*.json"))
    assert "auto_map" not in texts
    torch.testing.assert_close(logits(merged_model(output)), expected_logits(base, adapter), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "rows", [None, {"model.embed_tokens": [510, 511], "lm_head": [511]}], ids=["layers", "rows too"]
)
def test_an_original_qwen_v1_keeps_its_names(rows: dict[str, list[int]] | None, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    original = write_original_qwen1(base, shards="bin")
    settings = {"target_modules": "all-linear", "trainable_token_indices": rows}
    adapter = write_adapter(base, tmp_path / "adapter", **settings)
    merge([str(adapter), str(output), "--tolerance", "1e-4", "--allow_pickles"])
    assert sorted(header(output / "model.safetensors")) == sorted(original)
    assert config_of(output)["architectures"] == ["QWenLMHeadModel"]
    torch.testing.assert_close(logits(merged_model(output)), expected_logits(base, adapter), atol=1e-4, rtol=0)
    head = merged_model(output).get_parameter("lm_head.weight")
    changed = (head != original["lm_head.weight"]).any(dim=-1).nonzero().flatten().tolist()
    assert changed == ([] if rows is None else rows["lm_head"])


def test_tokenizer_template_and_end_tokens_come_along(base_folder: Path, adapter: Path, tmp_path: Path) -> None:
    merge([str(adapter), str(tmp_path / "merged")])
    base, merged = (load_tokenizer(ModelArguments(str(folder))) for folder in (base_folder, tmp_path / "merged"))
    assert template_record(merged) == template_record(base)
    assert merged.chat_template == base.chat_template
    assert merged.get_vocab() == base.get_vocab()
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert set(end_token_ids(base)) <= set(ends)
    assert config_of(tmp_path / "merged")["use_cache"] is True
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token_id == base.pad_token_id


def test_a_merged_model_asks_for_thoughts_as_its_adapter_was_trained(
    base_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    """By default, as a server does that is told nothing; also of an adapter whose own template has no default yet."""
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    tokenizer = load_tokenizer(ModelArguments(str(base_folder)))
    use_template(tokenizer, "own", THINKING)
    tokenizer.init_kwargs[RECORD]["thinking"] = False
    tokenizer.save_pretrained(copied)
    merge([str(copied), str(tmp_path / "merged")])
    asked = [{"role": "user", "content": "写一句。"}]
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged").apply_chat_template(asked, add_generation_prompt=True)
    assert list(ids["input_ids"]) == encode_prompt(asked, tokenizer, thinking=False)
    assert list(ids["input_ids"]) != encode_prompt(asked, tokenizer, thinking=True)


@pytest.mark.parametrize(
    ("words", "stored"), [([], "BF16"), (["--dtype", "float32"], "F32"), (["--dtype", "bfloat16"], "BF16")]
)
def test_weights_are_stored_in_the_type_of_the_base_or_the_chosen_one(
    words: list[str], stored: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(base)
    adapter, output = write_adapter(base, tmp_path / "adapter", target_modules="all-linear"), tmp_path / "merged"
    merge([str(adapter), str(output), "--tolerance", "1e-4", *words])
    shown = capsys.readouterr().out
    assert stored_types(output) == {stored}
    assert config_of(output)["dtype"] == {"BF16": "bfloat16", "F32": "float32"}[stored]
    difference = (logits(merged_model(output)) - expected_logits(base, adapter)).abs().max()
    # What rounding costs is far above the tolerance, and no reason to refuse.
    assert (difference > 1e-3) == (stored == "BF16")
    assert ("of which rounding to bfloat16" in shown) == (stored == "BF16")


def test_above_the_tolerance_nothing_is_kept(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, adapter, tmp_path / "merged", "--tolerance", "1e-12")
    assert "above 1e-12" in text
    assert list(tmp_path.iterdir()) == []


def test_files_that_hold_something_else_are_found_whatever_rounding_costs(base_folder: Path, tmp_path: Path) -> None:
    source, folder = ModelArguments(str(base_folder)), ModelArguments(str(tmp_path))
    tokenizer = load_tokenizer(source)
    model = load_model(source, tokenizer).eval()
    expected = outputs_of(model, tokenizer, end_token_ids(tokenizer))
    options = Namespace(tolerance=1e-4, max_shard_size="5GB", dtype="bfloat16")
    written = write_checkpoint(model, expected, tokenizer, tmp_path, options, base_folder)
    compare_reloaded(written, folder, ("original", "copy"), options.tolerance)
    assert written.rounding > 10 * options.tolerance

    weights = tmp_path / "model.safetensors"
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    tensors["model.norm.weight"][0] += 0.05
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="copy model's logits differ"):
        compare_reloaded(written, folder, ("original", "copy"), options.tolerance)


def test_another_base_is_refused_and_the_moved_one_is_not(
    base_folder: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("other", "moved"):
        shutil.copytree(base_folder, tmp_path / name)
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # one bit of one weight
    weights.write_bytes(content)

    text = refused(capsys, adapter, tmp_path / "merged", "--base", tmp_path / "other")
    assert "is not the base" in text and "--base" in text
    assert not (tmp_path / "merged").exists()
    merge([str(adapter), str(tmp_path / "merged"), "--base", str(tmp_path / "moved")])
    torch.testing.assert_close(
        logits(merged_model(tmp_path / "merged")), expected_logits(base_folder, adapter), atol=1e-4, rtol=0
    )


def without_base(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}), encoding="utf-8")


def with_other_shapes(adapter: Path) -> None:
    (adapter / BASE_RECORD).unlink()
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"r": 8}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"), [(without_base, "the base /nowhere/base is not there"), (with_other_shapes, "does not fit")]
)
def test_what_cannot_be_merged_is_told_in_one_line(
    change: Callable[[Path], None], message: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "adapter"
    shutil.copytree(adapter, damaged)
    change(damaged)
    text = refused(capsys, damaged, tmp_path / "merged")
    assert message in text and "--base" in text
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_something_is_not_touched(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine", encoding="utf-8")
    assert "is not empty" in refused(capsys, adapter, tmp_path / "mine")
    assert (tmp_path / "mine" / "file").read_text(encoding="utf-8") == "mine"


def test_an_interrupted_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_output_folder(tmp_path / "output") as unfinished:
        (unfinished / "half").write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "output").mkdir()
    with new_output_folder(tmp_path / "output") as unfinished:
        (unfinished / "whole").write_text("whole", encoding="utf-8")
    assert [file.name for file in (tmp_path / "output").iterdir()] == ["whole"]
