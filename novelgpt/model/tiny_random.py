"""A small Qwen3 base of random weights, built from the samples in seconds: what tests and first steps start from.

    python -m novelgpt.model.tiny_random [FOLDER]

About 2 M random weights and a byte-level BPE tokenizer with Qwen's special tokens and ChatML. The same samples give the
same files, byte for byte.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from novelgpt.model.portable import save_portable
from novelgpt.settings.atomic_files import atomic_folder
from novelgpt.settings.errors import exit_on_user_error
from novelgpt.settings.paths import SAMPLES
from novelgpt.settings.process import in_process_group, is_first_process, run_outside_group
from novelgpt.settings.small_bases import SMALL_BASES, TINY_RANDOM
from novelgpt.settings.terminal import say
from novelgpt.text.byte_level_bpe import train_byte_level_bpe
from novelgpt.text.templates import CHATML_TEMPLATE

VOCABULARY = 1000
SEED = 20
# Of the samples, for the tokenizer. Further ones do not change the base, with which recorded figures begin.
PAPERS = 130


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`."""
    # Four Chinese characters: longer tokens of so small a text would be whole phrases.
    tokenizer = train_byte_level_bpe(texts, VOCABULARY, max_token_bytes=12, normalizer=normalizers.NFC())
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_model(vocabulary: int) -> Qwen3ForCausalLM:
    """Build a Qwen3 of 2 layers and width 256 with random weights of a fixed seed."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        # Twice the usual: with so few layers, the model would otherwise only repeat the last token.
        initializer_range=0.04,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Qwen3ForCausalLM(config)


def build_tiny_random(folder: Path) -> None:
    """Write the base into `folder` atomically. The held-out samples are not used."""
    book = (SAMPLES / "novels" / "deng_ta_xia_de_xin.txt").read_text(encoding="utf-8")
    lines = (SAMPLES / "papers" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    papers = [f"{row['title']}\n{row['abstract']}" for row in map(json.loads, lines[:PAPERS])]
    tokenizer = build_tokenizer([book, *papers])
    model = build_model(VOCABULARY)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_folder(folder, keep_existing=True) as unfinished:
        save_portable(unfinished, model, tokenizer)
    say(f"tiny-random base: {model.num_parameters() / 1e6:.1f} M weights, {len(tokenizer)} tokens, in {folder}")


def ensure_tiny_random(folder: Path) -> None:
    """Build the base unless it exists."""
    if (folder / "config.json").is_file():
        return
    if is_first_process() or not in_process_group():
        build_tiny_random(folder)
        return
    # In a process of its own: transformers only writes weights in the first rank.
    status = run_outside_group("novelgpt.model.tiny_random", str(folder))
    if status != 0:  # it has printed why
        raise SystemExit(status)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Build the base unless it exists."""
    args = sys.argv[1:] if argv is None else argv
    ensure_tiny_random(Path(args[0]) if args else SMALL_BASES[TINY_RANDOM])


if __name__ == "__main__":
    main()
