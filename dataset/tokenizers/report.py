"""What a tokenizer makes of text, beside other tokenizers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from novelgpt.settings.console import make_console, number_table
from novelgpt.settings.terminal import say, visible
from novelgpt.text.chunks import encode_texts
from novelgpt.text.encoding import encode
from novelgpt.text.token_bytes import BROKEN

LONGEST, MOST_FREQUENT = 10, 20


def report_of(tokenizers: Iterable[tuple[str, PreTrainedTokenizerBase]], pieces: list[str]) -> dict[str, Any]:
    """Measure tokenizers on the same pieces of text.

    Args:
        tokenizers: (name to show, tokenizer).
        pieces: lines with their ends.
    """
    measured = [{"name": name, **measure(tokenizer, pieces)} for name, tokenizer in tokenizers]
    return {"characters": sum(map(len, pieces)), "lines": len(pieces), "tokenizers": measured}


def measure(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> dict[str, Any]:
    """The figures of a tokenizer.

    Returns:
        vocabulary; characters_per_token and bytes_per_token; unknown_characters and round_trip (shares of the
        characters, and of the pieces that decode to what they were); used (share of the vocabulary); longest and
        most_frequent tokens, as text, the latter with their share of all tokens; characters_per_second (of encoding,
        on all cores).
    """
    encode("字", tokenizer)  # clears any truncation and padding that the tokenizer's file sets
    start = time.perf_counter()
    encoded = encode_texts(pieces, tokenizer)
    seconds = time.perf_counter() - start
    counts = Counter(token for ids in encoded for token in ids)
    tokens, characters = counts.total(), sum(map(len, pieces))
    decoded = (str(tokenizer.decode(ids, skip_special_tokens=False)) for ids in encoded)
    equal = sum(text == piece for text, piece in zip(decoded, pieces, strict=True))
    own = set(tokenizer.get_vocab().values()).difference(tokenizer.added_tokens_decoder)
    texts = (str(tokenizer.decode([token], skip_special_tokens=False)) for token in own)
    whole = (text for text in texts if BROKEN not in text)  # others are parts of characters
    longest = sorted(whole, key=lambda text: (-len(text), text))[:LONGEST]
    shares = [[_text_of(token, tokenizer), round(number / max(1, tokens), 6)]
              for token, number in counts.most_common(MOST_FREQUENT)]  # fmt: skip
    return {
        "vocabulary": len(tokenizer),
        "characters_per_token": characters / max(1, tokens),
        "bytes_per_token": sum(len(piece.encode()) for piece in pieces) / max(1, tokens),
        "unknown_characters": _unknown(tokenizer, pieces, counts) / max(1, characters),
        "round_trip": equal / max(1, len(pieces)),
        "used": len(counts) / len(tokenizer),
        "longest": longest,
        "most_frequent": shares,
        "characters_per_second": round(characters / seconds),
    }


def show_report(report: dict[str, Any]) -> None:
    """Print the figures of all tokenizers, then the tokens of each."""
    console = make_console()
    title = f"On {report['characters']:,} characters outside the sample 样本以外的文本"
    table = number_table(title, "", *(entry["name"] for entry in report["tokenizers"]))
    rows = {
        "vocabulary size 词表大小": ("vocabulary", "{:,}"),
        "characters per token 每 token 字数": ("characters_per_token", "{:.3f}"),
        "bytes per token 每 token 字节数": ("bytes_per_token", "{:.3f}"),
        "unknown characters 未知字": ("unknown_characters", "{:.3%}"),
        "lines that round-trip 可还原的行": ("round_trip", "{:.2%}"),
        "vocabulary used 用到的词表": ("used", "{:.1%}"),
        "characters encoded per second 每秒编码字数": ("characters_per_second", "{:,}"),
    }
    for label, (name, form) in rows.items():
        table.add_row(label, *(form.format(entry[name]) for entry in report["tokenizers"]))
    console.print(table)
    if "word_ends_f1" in report:
        agreement = report["word_ends_f1"]
        say(
            f"word boundaries as the segmenter's 与切词工具一致的词边界: F1 {agreement['likeliest']:.3f} "
            f"(longest match 最长匹配: {agreement['longest_match']:.3f})"
        )
    for entry in report["tokenizers"]:
        for label, tokens in (
            ("longest tokens 最长", entry["longest"]),
            ("most frequent 最常见", [token for token, _ in entry["most_frequent"]]),
        ):
            shown = " ".join(
                visible(repr(token)[1:-1]) if token.strip() != token else visible(token) for token in tokens
            )
            console.print(Text.assemble((f"{entry['name']}, {label}: ", "bold"), shown))


def _text_of(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a token stands for; where that is a part of a character, how the vocabulary writes it."""
    text = str(tokenizer.decode([token], skip_special_tokens=False))
    return str(tokenizer.convert_ids_to_tokens(token)) if BROKEN in text else text


def _unknown(tokenizer: PreTrainedTokenizerBase, pieces: list[str], counts: Counter[int]) -> int:
    """Number of characters of which only the unknown token is left."""
    unknown = tokenizer.unk_token_id
    if unknown is None or not counts[unknown]:
        return 0
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return counts[unknown]
    total = 0
    for encoding in tokenizer.backend_tokenizer.encode_batch(pieces, add_special_tokens=False):
        total += sum(end - begin for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
                     if token == unknown)  # fmt: skip
    return total
