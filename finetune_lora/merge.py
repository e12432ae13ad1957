"""An adapter merged into its base, as a full checkpoint.

    python -m finetune_lora.merge ADAPTER OUTPUT [--tolerance LOGITS]

Merged in fp32. The checkpoint is loaded again and compared with base + adapter on a few prompts; the largest difference
of a logit is printed, and above the tolerance the checkpoint is removed and the exit status is 2.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from novelgpt.model.loading import adapter_base, load_model
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import CommandParser
from novelgpt.text.conversation import encode_prompt
from novelgpt.text.tokenizer import load_tokenizer
from novelgpt.training.fit import save_generation_config

PROMPTS = ("你好", "请写一段关于海的文字。", "论文标题：基于深度学习的图像去噪方法", "第一章 雨夜")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Merge the adapter that the command line names."""
    parser = CommandParser(prog="python -m finetune_lora.merge", description="An adapter merged into its base.")
    parser.add_argument("adapter", help="folder of a finetune_lora run or of one of its checkpoints")
    parser.add_argument("output", type=Path, help="new folder for the full checkpoint")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a logit [default: 0.001]")
    words = parser.parse_args(argv)
    base = adapter_base(words.adapter)
    if base is None:
        raise UserError(f"{words.adapter} holds no adapter_config.json", "name the folder of a LoRA run")
    if words.output.exists() and (not words.output.is_dir() or any(words.output.iterdir())):
        raise UserError(f"{words.output} is not empty", "name a new folder")
    tokenizer = load_tokenizer(words.adapter)
    adapted = PeftModel.from_pretrained(load_model(ModelArguments(base), tokenizer), words.adapter).eval()
    expected = _logits(adapted, tokenizer)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(words.output)
    tokenizer.save_pretrained(words.output)
    save_generation_config(tokenizer, words.output)
    found = _logits(load_model(ModelArguments(str(words.output)), tokenizer).eval(), tokenizer)
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    if difference > words.tolerance:
        shutil.rmtree(words.output)
        raise UserError(
            f"the merged model's logits differ by {difference:.2e} from base + adapter, above {words.tolerance:.0e}",
            "serve base + adapter unmerged, or raise --tolerance if that is small enough for you",
        )
    print(f"merged into {words.output}: largest difference of a logit from base + adapter {difference:.1e}")


@torch.inference_mode()
def _logits(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """[1, tokens, vocabulary] for each prompt."""
    prompts = [encode_prompt([{"role": "user", "content": prompt}], tokenizer) for prompt in PROMPTS]
    return [model(input_ids=torch.tensor([prompt])).logits.float() for prompt in prompts]


if __name__ == "__main__":
    main()
