"""Raw text that a base model goes on with, in the terminal: no marks of a conversation around it."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.run_record import read_run_record
from novelgpt.text.encoding import document_begin_ids, encode_document
from novelgpt.text.templates import template_record


class RawText:
    """A text and its continuation so far, and the prompts they make.

    Args:
        tokenizer: of the model.
        context: tokens that the model takes, text and continuation together.
        max_new_tokens: longest continuation; at most half of the context is kept free for it.

    Attributes:
        text: all so far, which the model goes on with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.max_new_tokens = max_new_tokens
        self.text = ""

    def clear(self) -> None:
        """Forget the text."""
        self.text = ""

    def ask(self, text: str) -> tuple[list[int], int]:
        """Begin a new text; "" goes on with the last.

        Returns:
            Tokens of the prompt, and how many tokens of the text's beginning were left out to make it fit.
        """
        self.text = text or self.text
        ids = encode_document(self.text, self.tokenizer)
        room = self.context - min(self.max_new_tokens, self.context // 2)
        left_out = max(0, len(ids) - room)
        begin = document_begin_ids(self.tokenizer) if left_out else []  # which the model has seen before every text
        return begin + ids[len(begin) + left_out :], left_out

    def answer_room(self, prompt: list[int]) -> int:
        """Most tokens that the continuation of a prompt may have."""
        return min(self.max_new_tokens, self.context - len(prompt))

    def answered(self, text: str) -> None:
        """Add the continuation."""
        self.text += text


def continues_text(folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has seen raw text alone, as far as its folder tells, so that no conversation makes sense to it.

    So it is after continued pretraining, and for bases that come without a chat template of their own; not for
    whatever was fine-tuned on conversations.
    """
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    runs = [run for run in map(read_run_record, places) if run is not None]
    if runs:
        return bool(runs[0]["pipeline"] == "pretrain")
    record = template_record(tokenizer)
    return record["name"] != "own" and "thinking" not in record  # which training on conversations notes
