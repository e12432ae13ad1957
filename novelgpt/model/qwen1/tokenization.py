"""The tokenizer of Qwen v1: `qwen.tiktoken` turned into a fast tokenizer."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", *(f"<|extra_{index}|>" for index in range(205)))
RANK_FILE = "qwen.tiktoken"


class QWenTokenizer(TokenizersBackend):
    """Byte-level BPE after NFC, with the pre-tokenization of Qwen2; named as in the original checkpoints.

    Read from `tokenizer.json`, which is what is saved, or from the original `qwen.tiktoken`. The 208 special tokens
    come after the ranks: 151643 <|endoftext|>, 151644 <|im_start|>, 151645 <|im_end|>, then <|extra_0|> to
    <|extra_204|>. <|endoftext|> ends texts and pads rows.
    """

    vocab_files_names = {"vocab_file": RANK_FILE, "tokenizer_file": "tokenizer.json"}
    model = models.BPE  # type: ignore[assignment]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **settings: Any) -> dict[str, Any]:
        """Arguments of the constructor, including the tokenizer itself.

        Raises:
            ValueError: the rank file is damaged.
        """
        settings.pop("auto_map", None)  # refers to code that is neither needed nor saved
        rank_file = settings.pop("vocab_file", None)
        if settings.get("tokenizer_file") is None and rank_file is not None:
            settings["tokenizer_object"] = convert_rank_file(Path(rank_file))
        else:
            settings = super().convert_to_native_format(trust_remote_code=trust_remote_code, **settings)
        for name in ("eos_token", "pad_token"):
            settings[name] = settings.get(name) or END_OF_TEXT
        return settings


def convert_rank_file(path: Path) -> Tokenizer:
    """Convert a `qwen.tiktoken` to a fast tokenizer of the same ids.

    Raises:
        ValueError: a line is not base64 and a rank, or ranks are not 0, 1, 2, ….
    """
    converter = _RankFileConverter(str(path), pattern=PRETOKENIZE_REGEX, extra_special_tokens=list(SPECIAL_TOKENS))
    tokenizer = converter.converted()
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


class _RankFileConverter(TikTokenConverter):
    """transformers' converter with our reader of the file: its own needs another package."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(Path(tiktoken_url).read_bytes().splitlines(), 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise ValueError(f"{tiktoken_url}:{number}: not a token in base64 and its rank") from error
        if list(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{tiktoken_url}: the ranks are not 0, 1, 2, … without a gap; the file is incomplete")
        return ranks
