"""A Qwen v1 as the Qwen2 that computes the same, which transformers and vLLM load without code for Qwen v1.

    python -m novelgpt.export.qwen2 CHECKPOINT OUTPUT

LoRA adapters of the Qwen v1 fit the weights, but not their new names: merge them before.
"""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.export.full_checkpoint import (
    export_checkpoint,
    read_export_words,
    read_full_config,
    with_settings,
)
from novelgpt.model.qwen1.configuration import QWenConfig
from novelgpt.model.qwen1.modeling import QWenLMHeadModel, as_qwen2
from novelgpt.model.qwen1.tokenization import QWenTokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export the checkpoint that the command line names."""
    program = "python -m novelgpt.export.qwen2"
    words = read_export_words(program, "A Qwen v1 as a Qwen2.", "Qwen2", argv)
    config = read_full_config(ModelArguments(words.checkpoint, "sdpa"))
    if not isinstance(config, QWenConfig):
        raise UserError(f"{words.checkpoint} is a {config.model_type}, no Qwen v1", "later Qwens need no export")
    export_checkpoint(words, _convert, _portable_tokenizer, "Qwen2")


def _convert(model: PreTrainedModel) -> PreTrainedModel:
    return as_qwen2(cast(QWenLMHeadModel, model))


def _portable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same under a class that loads without this toolkit."""
    if not isinstance(tokenizer, QWenTokenizer):
        return tokenizer
    settings = tokenizer.special_tokens_map
    return with_settings(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **settings), tokenizer)


if __name__ == "__main__":
    main()
