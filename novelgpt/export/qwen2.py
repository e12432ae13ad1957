"""Export of a Qwen v1 as the equivalent Qwen2, which transformers and vLLM load without code for Qwen v1.

    python -m novelgpt.export.qwen2 CHECKPOINT OUTPUT

LoRA adapters of the Qwen v1 fit the weights, but not their new names: merge them first.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.export.full_checkpoint import export_checkpoint, with_settings
from novelgpt.model.qwen1.configuration import QWenConfig
from novelgpt.model.qwen1.modeling import as_qwen2
from novelgpt.model.qwen1.tokenization import QWenTokenizer
from novelgpt.settings.errors import UserError, exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export the checkpoint that the command line names."""
    export_checkpoint("novelgpt.export.qwen2", "Qwen2", argv, _check_is_qwen1, as_qwen2, _portable_tokenizer)


def _check_is_qwen1(config: PreTrainedConfig, name: str) -> None:
    if not isinstance(config, QWenConfig):
        raise UserError(f"{name} is a {config.model_type}, not a Qwen v1", "later Qwens need no export")


def _portable_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer as a class that loads without this toolkit."""
    if not isinstance(tokenizer, QWenTokenizer):
        return tokenizer
    settings = tokenizer.special_tokens_map
    return with_settings(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **settings), tokenizer)


if __name__ == "__main__":
    main()
