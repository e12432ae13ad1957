"""A Qwen v1 as the Qwen2 that computes the same, which transformers and vLLM load without code for Qwen v1.

    python -m novelgpt.model.qwen1.qwen2_export CHECKPOINT OUTPUT

LoRA adapters of the Qwen v1 fit the weights, but not their new names: merge them before.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.model.export import (
    DTYPE_CHOICES,
    DTYPE_HELP,
    SHARD_HELP,
    TOLERANCE_HELP,
    export_checkpoint,
    read_full_config,
    with_settings,
)
from novelgpt.model.qwen1.configuration import QWenConfig
from novelgpt.model.qwen1.modeling import QWenLMHeadModel, as_qwen2
from novelgpt.model.qwen1.tokenization import QWenTokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import CommandParser


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export the checkpoint that the command line names."""
    parser = CommandParser(prog="python -m novelgpt.model.qwen1.qwen2_export", description="A Qwen v1 as a Qwen2.")
    parser.add_argument("checkpoint", help="folder or hub name of a full checkpoint; merge adapters first")
    parser.add_argument("output", type=Path, help="new folder for the Qwen2")
    parser.add_argument("--tolerance", type=float, default=1e-3, help=f"{TOLERANCE_HELP} [default: 0.001]")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto", help=DTYPE_HELP)
    parser.add_argument("--max_shard_size", default="5GB", help=SHARD_HELP)
    words = parser.parse_args(argv)
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
