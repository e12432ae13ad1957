"""The exported Llama computes what the Baichuan does, and loads with nothing but transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from novelgpt.export.llama import main as export
from novelgpt.model.baichuan.fast_tokenizer import as_fast_tokenizer
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.paths import SAMPLES
from novelgpt.text.baichuan_tokenizer import BaichuanTokenizer
from novelgpt.text.conversation import encode_prompt
from tests.model.original_checkpoints import tokenizer_model, write_original_baichuan

SHARED = Path(__file__).resolve().parents[3] / "shared"
IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33, 195, 196, 700, 1099]])
# In a process of its own, so that nothing of this project is known to transformers there.
LOAD_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
print(type(model).__name__, ids, logits.argmax().item(), "novelgpt" in sys.modules)
"""


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def lines(count: int) -> list[str]:
    """Lines of novels: the real ones where they are, else the samples'."""
    files = sorted((SHARED / "data" / "novels").glob("*.utf8*.txt")) or sorted((SAMPLES / "novels").glob("*.txt"))
    texts = [file.read_text(encoding="utf-8").splitlines() for file in files]
    return [line for text in texts for line in text if line.strip()][:: max(1, sum(map(len, texts)) // count)][:count]


@pytest.mark.parametrize("norm_head", [False, True], ids=["Baichuan", "Baichuan2"])
@pytest.mark.parametrize("golden", [False, True])
def test_logits_are_equal(
    norm_head: bool, golden: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    base, output = tmp_path / "base", tmp_path / "llama"
    write_original_baichuan(base, position="rope", norm_head=norm_head, golden=golden)
    export([str(base), str(output), "--tolerance", "1e-4", "--allow_pickles"])
    torch.testing.assert_close(logits(output), logits(base), atol=1e-4, rtol=0)

    config = config_of(output)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == config["num_attention_heads"]
    assert "auto_map" not in config
    head = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).lm_head.weight
    norms = torch.linalg.vector_norm(head, dim=-1)
    assert torch.allclose(norms, torch.ones_like(norms)) == norm_head
    shown = capsys.readouterr().out
    assert "LoRA adapters of the Baichuan do not fit" in shown
    assert ("was normalised once" in shown) == norm_head
    assert list(tmp_path.glob("*.unfinished-*")) == []


def test_the_export_loads_without_this_project_and_makes_the_same_prompts(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "llama"
    write_original_baichuan(base, position="rope", norm_head=True, shards="safetensors")
    export([str(base), str(output)])
    tokenizers = [load_tokenizer(ModelArguments(str(folder))) for folder in (base, output)]
    question = [{"role": "user", "content": "海有多深？"}]
    first, second = (encode_prompt(question, tokenizer) for tokenizer in tokenizers)
    assert first == second
    assert (first[0], first[-1]) == (195, 196)

    text = "<reserved_106>第一章 雨夜\n他说：“好。”<reserved_107>"
    ids = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(output), text],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    best = int(logits(base, torch.tensor([ids]))[0, -1].argmax())
    assert done.stdout.splitlines()[-1] == f"LlamaForCausalLM {ids} {best} False"


def test_a_bf16_checkpoint_stays_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, output = tmp_path / "base", tmp_path / "llama"
    write_original_baichuan(base, position="rope", norm_head=True, shards="safetensors")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    export([str(base), str(output), "--tolerance", "1e-4"])
    assert config_of(output)["dtype"] == "bfloat16"
    assert "of which rounding to bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["13B", "adapter", "another model"])
def test_what_has_no_llama_is_refused(
    kind: str, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = base_folder if kind == "another model" else tmp_path / "source"
    if kind == "13B":
        write_original_baichuan(source, position="alibi")
    elif kind == "adapter":
        source.mkdir()
        (source / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}', encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        export([str(source), str(tmp_path / "llama")])
    assert stopped.value.code == 2
    message = {"13B": "ALiBi", "adapter": "is an adapter", "another model": "not a Baichuan"}[kind]
    assert message in capsys.readouterr().err
    assert not (tmp_path / "llama").exists()


def test_the_fast_tokenizer_gives_the_same_ids_and_the_text_back(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model())
    compare_tokenizers(BaichuanTokenizer(str(tmp_path / "tokenizer.model")), lines(300))


@pytest.mark.skipif(not (SHARED / "tokenizers" / "baichuan2").is_dir(), reason="the real tokenizer is not there")
def test_the_fast_tokenizer_of_the_real_baichuan2_gives_the_same_ids(few_or_all: Callable[[int, int], int]) -> None:
    compare_tokenizers(
        BaichuanTokenizer(str(SHARED / "tokenizers" / "baichuan2" / "tokenizer.model")), lines(few_or_all(800, 3000))
    )


def compare_tokenizers(slow: BaichuanTokenizer, texts: list[str]) -> None:
    fast = as_fast_tokenizer(slow)
    assert fast is not None
    hard = ["", " ", "  a  b ", "\r\n\t", "🙂👨‍👩‍👧", "</s>中<s>", "哈" * 50, "…" * 9, "———", "<0x41>", "▁", "1234 5"]
    hard += ["<reserved_106>你好<reserved_107>", "a" * 40, " " * 33, "\u3000\u3000他", "e\u0301", "𠮷野家"]
    for text in [*texts, *hard]:
        ids = slow(text, add_special_tokens=False)["input_ids"]
        assert fast(text, add_special_tokens=False)["input_ids"] == ids, text
        assert fast.decode(ids) == slow.decode(ids), text
    assert (fast.pad_token_id, fast.bos_token_id, fast.eos_token_id, fast.unk_token_id) == (0, 1, 2, 0)
    assert len(fast) == len(slow)


def test_a_tokenizer_that_changes_texts_first_has_no_fast_one(tmp_path: Path) -> None:
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto.FromString(tokenizer_model())
    model.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    assert as_fast_tokenizer(BaichuanTokenizer(str(tmp_path / "tokenizer.model"))) is None
