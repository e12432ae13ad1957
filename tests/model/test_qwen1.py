"""Qwen v1 from original folders: the original outputs, the original names back, every way of running it the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.trainer_utils import load_sharded_checkpoint

from novelgpt.model.qwen1 import QWenConfig, QWenLMHeadModel
from novelgpt.model.qwen1.modeling import as_qwen2
from novelgpt.text.collator import Collator
from novelgpt.text.conversation import IGNORE_INDEX
from tests.model.original_qwen1 import SIZES, Style, write_original_qwen1
from tests.model.original_weights import Shards
from tests.rounding import assert_close

# What the original code gives for these sizes, weights and tokens.
GOLDEN_SIZES: dict[str, Any] = {"vocab_size": 64, "seq_length": 64}
GOLDEN_IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33]])
GOLDEN_LOSS = 4.797453
GOLDEN_LOGITS = torch.tensor([1.22582, 1.27684, 0.68328, -0.25521, -1.06487, -1.33696])
GOLDEN_CHOICES = [48, 43, 25, 23, 61, 52, 61, 61]
KINDS: tuple[Shards, ...] = ("safetensors", "safetensors_sharded", "bin", "bin_sharded")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "qwen"
    write_original_qwen1(folder)
    return folder


def load(folder: Path, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


def tokens(length: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("style", ["later", "first"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "packed"])
def test_the_outputs_of_the_original_code(style: Style, training: bool, attention: str, tmp_path: Path) -> None:
    write_original_qwen1(tmp_path, style=style, golden=True, **GOLDEN_SIZES)
    model = load(tmp_path, attention).train(training)
    output = model(input_ids=GOLDEN_IDS, labels=GOLDEN_IDS, attention_mask=torch.ones_like(GOLDEN_IDS))
    assert abs(output.loss.item() - GOLDEN_LOSS) < 1e-4
    assert (output.logits[0, -1, :6] - GOLDEN_LOGITS).abs().max() < 1e-4
    assert output.logits[0].argmax(-1).tolist() == GOLDEN_CHOICES


@pytest.mark.parametrize("shards", KINDS)
def test_each_tensor_comes_back_under_its_name_bit_for_bit(shards: Shards, tmp_path: Path) -> None:
    original = write_original_qwen1(tmp_path / "original", shards=shards)
    outcome: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "original", output_loading_info=True)
    model, report = outcome
    assert isinstance(model, QWenLMHeadModel)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == original.keys() and len(saved) == 19
    assert all(torch.equal(saved[name], original[name]) for name in original)
    again = load(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_made_from_a_configuration_is_saved_with_the_original_names(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize("style", ["later", "first"])
def test_the_saved_configuration_is_the_original_without_its_code(style: Style, tmp_path: Path) -> None:
    write_original_qwen1(tmp_path / "original", style=style)
    model = load(tmp_path / "original")
    for generation in ("once", "twice"):
        model.save_pretrained(tmp_path / generation)
        model = load(tmp_path / generation)
        saved = json.loads((tmp_path / generation / "config.json").read_text())
        assert "auto_map" not in saved
        assert saved["model_type"] == "qwen" and saved["architectures"] == ["QWenLMHeadModel"]
        expected = SIZES | {"max_position_embeddings": SIZES["seq_length"], "layer_norm_epsilon": 1e-6}
        assert {name: saved[name] for name in expected} == expected
        assert saved["rotary_emb_base"] == 10000 and saved["use_dynamic_ntk"] and saved["use_logn_attn"]


@pytest.mark.parametrize("setting", [{"rotary_pct": 0.5}, {"no_bias": False}, {"emb_dropout_prob": 0.1}])
def test_settings_of_no_released_model_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        QWenConfig(**setting)


def test_the_base_of_the_rotary_embedding_counts() -> None:
    settings: Any = SIZES
    models = [QWenLMHeadModel(QWenConfig(**settings, rotary_emb_base=base)) for base in (10000, 1000000)]
    frequencies = [model.model.rotary_emb.inv_freq for model in models]
    assert torch.allclose(frequencies[1], frequencies[0] ** 1.5)


def test_query_key_and_value_alone_have_biases(folder: Path) -> None:
    biased = {name.rsplit(".", 2)[-2] for name in load(folder).state_dict() if name.endswith(".bias")}
    assert biased == {"q_proj", "k_proj", "v_proj"}


def test_past_its_length_neither_base_nor_queries_change(folder: Path) -> None:
    model = load(folder)
    ids = tokens(2 * SIZES["seq_length"])
    whole = model(ids).logits
    half = model(ids[:, : SIZES["seq_length"] // 2]).logits
    assert_close(whole[:, : half.shape[1]], half)
    torch.testing.assert_close(model.train()(ids).logits, whole, rtol=0, atol=0)


def test_cache_and_padding_change_nothing(folder: Path) -> None:
    model = load(folder)
    ids = tokens(12)
    expected = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], 1), expected)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(padded, attention_mask=mask, position_ids=positions).logits
    assert_close(output[:, 3:], expected)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(ids, **settings)[0, 12:]
    rows, masks = torch.cat([padded, tokens(15, seed=2)]), torch.cat([mask, torch.ones_like(mask)])
    both = model.generate(rows, attention_mask=masks, **settings)
    assert both[0, 15:].tolist() == alone.tolist()
    assert model.generate(ids, use_cache=False, **settings)[0, 12:].tolist() == alone.tolist()


def test_packed_documents_are_what_they_are_alone(folder: Path) -> None:
    model = load(folder, "packed")
    documents = [tokens(size, seed=size)[0] for size in (7, 2, 5)]
    pack = {
        "input_ids": torch.cat(documents),
        "labels": torch.cat([torch.cat([torch.tensor([IGNORE_INDEX]), document[1:]]) for document in documents]),
        "position_ids": torch.cat([torch.arange(len(document)) for document in documents]),
    }
    batch = Collator(pad_token_id=0)([pack])
    batch.pop("labels")
    packed = model(**batch, use_cache=False).logits[0]
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    assert_close(packed, alone)


def test_gradients_with_activation_checkpointing_are_the_same(folder: Path) -> None:
    model = load(folder).train()
    ids = tokens(20, rows=2)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert all(torch.equal(again[name], gradient) and gradient.any() for name, gradient in plain.items())


def test_an_adapter_attaches_again_and_merges(folder: Path, tmp_path: Path) -> None:
    ids = tokens(16)
    adapted = get_peft_model(load(folder), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    targets = {name.split(".")[-4] for name in adapted.state_dict() if name.endswith("lora_A.default.weight")}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    draw = torch.Generator().manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    expected = adapted.eval()(ids).logits
    assert (expected - load(folder)(ids).logits).abs().max() > 0.1
    adapted.save_pretrained(str(tmp_path / "adapter"))
    attached = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(attached(ids).logits, expected, rtol=0, atol=0)
    merged = attached.merge_and_unload()
    assert_close(merged(ids).logits, expected)
    merged.save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    torch.testing.assert_close(load(tmp_path / "merged")(ids).logits, merged(ids).logits, rtol=0, atol=0)


def test_a_saved_checkpoint_goes_back_into_a_model(folder: Path, tmp_path: Path) -> None:
    """As the Trainer does it to resume, in one file and in several."""
    trained = load(folder)
    for parameter in trained.parameters():
        parameter.data += 1
    trained.save_pretrained(tmp_path / "whole")
    trained.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    one, several = load(folder), load(folder)
    assert not any(one.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors")))
    load_sharded_checkpoint(several, str(tmp_path / "cut"), strict=False)
    for model in (one, several):
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


def test_the_model_without_its_head(folder: Path) -> None:
    ids = tokens(9)
    states = AutoModel.from_pretrained(folder).eval()(ids).last_hidden_state
    model = load(folder)
    assert_close(model.lm_head(states), model(ids).logits)


def test_as_qwen2_it_is_the_same_function_for_those_who_know_no_qwen(folder: Path, tmp_path: Path) -> None:
    model, ids = load(folder), tokens(30)
    as_qwen2(model).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "qwen2" and saved["intermediate_size"] == SIZES["intermediate_size"] // 2
    outcome: Any = Qwen2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    again, report = outcome
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=0, atol=0)
