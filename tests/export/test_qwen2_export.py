"""A Qwen v1 exported as a Qwen2 computes the same, under Qwen2's names."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from novelgpt.export.qwen2 import main as export
from novelgpt.model.card import CARD, read_card
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.text.conversation import encode_prompt
from tests.model.original_qwen1 import write_original_qwen1

IDS = torch.tensor([[3, 17, 42, 5, 9, 60, 1, 33]])


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits


def test_logits_and_prompts_are_equal(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "qwen2"
    write_original_qwen1(base)
    export([str(base), str(output), "--tolerance", "1e-4"])
    torch.testing.assert_close(logits(output), logits(base), atol=1e-4, rtol=0)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert type(AutoTokenizer.from_pretrained(output)).__module__.startswith("transformers.")
    question = [{"role": "user", "content": "海有多深？"}]
    first, second = (encode_prompt(question, load_tokenizer(ModelArguments(str(name)))) for name in (base, output))
    assert first == second
    card = read_card(output)
    assert card is not None and "`base`, converted to Qwen2 without further training." in card.sections[""]
    assert ModelCard.load(output / CARD).data.get("library_name") == "transformers"
    assert "import novelgpt" not in card.sections["Use"] and str(tmp_path) not in card.text()


def test_another_model_is_refused(base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        export([str(base_folder), str(tmp_path / "qwen2")])
    assert stopped.value.code == 2
    assert "not a Qwen v1" in capsys.readouterr().err
    assert not (tmp_path / "qwen2").exists()
