"""Loading a tokenizer, and the tokens that end things."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError

# For bases whose tokenizer brings no chat template: ChatML where its tokens exist, else plain marked paragraphs.
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### 回答\\n' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### 问题\\n' + message['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### 回答\\n' }}{% endif %}"
)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, with a chat template and a padding token for certain.

    Raises:
        UserError: the folder is missing or holds no tokenizer, or it has no end token.
    """
    if looks_like_path(model) and not Path(model).is_dir():
        raise UserError(
            f"model folder {model} does not exist", "check --model; `bash scripts/run_demo.sh` makes a base"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"no tokenizer can be loaded from {model}: {str(error).strip().splitlines()[0]}",
            "put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights",
        ) from error
    if not encode("字", tokenizer):
        # Without its files, some classes load as an empty shell instead of failing.
        raise UserError(
            f"{model} holds no tokenizer: it gives no token for any text", "put tokenizer.json beside the weights"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} has no end token", "set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: padding is told by position, never by id
    if not tokenizer.chat_template:
        chatml = {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_vocab().keys()
        tokenizer.chat_template = CHATML_TEMPLATE if chatml else PLAIN_TEMPLATE
    return tokenizer


def looks_like_path(model: str) -> bool:
    """Whether a model's name can only be a folder, as hub names have at most one slash and no leading dot."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists()


def document_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents in pretraining: <|endoftext|> for the Qwen family, else the end token."""
    end_of_text = tokenizer.get_vocab().get("<|endoftext|>")
    return int(tokenizer.eos_token_id) if end_of_text is None else int(end_of_text)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a piece of text, with nothing added before or after, whatever its length."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
