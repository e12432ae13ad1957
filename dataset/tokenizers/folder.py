"""The folder of a trained tokenizer: files that AutoTokenizer loads by itself, how they were made, and a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset.tokenizers import subwords, words
from novelgpt.model.portable import make_portable
from novelgpt.settings.atomic_files import follow_umask
from novelgpt.text.templates import CHATML_TEMPLATE

RECORD, REPORT, CARD = "tokenizer_training.json", "tokenizer_report.json", "README.md"
# No tokenizer limits how much it reads; transformers warns of texts that are longer than this.
LONGEST_TEXT = 1_000_000_000
_CARD = """---
library_name: transformers
tags: [tokenizer]
---

# A tokenizer of {size:,} tokens

Kind `{kind}`, trained on {characters:,} characters, a sample (seed {seed}) of the {corpus:,} in {files}.

| On {report:,} other characters of the same corpus | |
| --- | --- |
| characters per token | {characters_per_token:.3f} |
| bytes per token | {bytes_per_token:.3f} |
| unknown characters | {unknown:.4%} |
| lines that round-trip | {round_trip:.2%} |

```python
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
```

`{record}` says how it was made, `{report_file}` how it compares. It is for models trained from scratch: the weights of
a pretrained model are tied to its own tokenizer.
"""


def as_pretrained(tokenizer: Tokenizer, kind: str) -> PreTrainedTokenizerFast:
    """A trained tokenizer with the roles of its special tokens and a chat template.

    Args:
        tokenizer: of `train_words` and its like.
        kind: of it.
    """
    options: dict[str, Any] = {"clean_up_tokenization_spaces": False, "model_max_length": LONGEST_TEXT}
    if kind == "words":
        options |= {"bos_token": words.BEGIN, "eos_token": words.END, "pad_token": words.PADDING,
                    "unk_token": words.UNKNOWN, "chat_template": words.WORDS_TEMPLATE}  # fmt: skip
    else:
        # As Qwen's bases have it: a model that reads documents learns their end, not that of answers.
        options |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": CHATML_TEMPLATE}
        if kind != "byte_bpe":
            options["unk_token"] = subwords.UNKNOWN
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def write_folder(
    folder: Path, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write a tokenizer, its record, its report and its card.

    Args:
        folder: exists.
        tokenizer: of `as_pretrained`.
        record: how it was made; the same for the same corpus and options.
        report: of `report_of`.
    """
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    for name, content in ((RECORD, record), (REPORT, report)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    own = report["tokenizers"][0]
    card = _CARD.format(
        size=record["vocab_size"],
        kind=record["kind"],
        characters=record["sample"]["characters"],
        seed=record["seed"],
        corpus=record["corpus"]["characters"],
        files="1 file" if len(record["corpus"]["files"]) == 1 else f"{len(record['corpus']['files']):,} files",
        report=report["characters"],
        characters_per_token=own["characters_per_token"],
        bytes_per_token=own["bytes_per_token"],
        unknown=own["unknown_characters"],
        round_trip=own["round_trip"],
        record=RECORD,
        report_file=REPORT,
    )
    (folder / CARD).write_text(card, encoding="utf-8")
    follow_umask(folder)
