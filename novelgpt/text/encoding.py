"""Text to tokens and answers to text, and the tokens that begin and end documents."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

# Options of a tokenizer for the tokens of a text alone: nothing added before or after, whatever its length.
AS_IT_IS = {"add_special_tokens": False, "verbose": False}
AS_IT_IS_FAST = {"add_special_tokens": False}


def document_begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a model has seen before each text: Llama's and Gemma's begin token; none for Qwen and Baichuan.

    They are those that the tokenizer itself puts before a text, whatever it names them.
    """
    probe = "字"
    whole = list(tokenizer(probe, add_special_tokens=True, verbose=False)["input_ids"])
    text = encode(probe, tokenizer)
    starts = (start for start in range(len(whole)) if whole[start : start + len(text)] == text)
    return whole[: next(starts, 0)]


def encode_document(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text from its start: those that begin a document, then its own. Nothing ends it."""
    return document_begin_ids(tokenizer) + encode(text, tokenizer)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a segment of text, with nothing added before or after, whatever its length."""
    backend = fast_backend(tokenizer)
    if backend is None:
        return list(tokenizer(text, **AS_IT_IS)["input_ids"])
    return list(backend.encode_batch_fast([text], **AS_IT_IS_FAST)[0].ids)


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What gives a tokenizer's own tokens of a text in a third less time than calling it; None where nothing does.

    It must be asked for before each text, as calls of the tokenizer leave settings in it.
    """
    if not isinstance(tokenizer, TokenizersBackend):
        return None
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def document_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents in pretraining: <|endoftext|> for the Qwen family, else the end token."""
    return int(tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id))


def decode_answer(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()) -> str:
    """The text of an answer's tokens, without those that end or pad it.

    Other special tokens stay: those that a user added to the vocabulary are part of what the model was taught.

    Args:
        tokens: ids.
        tokenizer: its end and padding tokens are left out.
        ends: further tokens that end an answer.
    """
    silent = {tokenizer.eos_token_id, tokenizer.pad_token_id, *ends}
    return str(tokenizer.decode([token for token in tokens if token not in silent], skip_special_tokens=False))
