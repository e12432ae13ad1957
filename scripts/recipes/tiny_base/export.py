"""The weights of a run in bf16, with tokenizer and generation settings: python …/export.py RUN OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from novelgpt.model.portable import save_portable
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import atomic_folder
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.terminal import say
from novelgpt.text.encoding import document_end_id
from novelgpt.text.templates import RECORD

MAX_BYTES = 8_000_000
# Those of the samples in the card.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "top_k": 0}


def export(run: Path, out: Path) -> int:
    """Write the model of a run folder into `out` and return its bytes.

    Raises:
        UserError: it takes more than MAX_BYTES.
    """
    tokenizer = load_tokenizer(ModelArguments(str(run)))
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16)
    # It has read documents only: whoever loads the folder, without the run's record, learns of no other end and of no
    # template. Training on conversations gives it ChatML, whose tokens it has.
    tokenizer.chat_template = None
    for name in (RECORD, "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.use_cache = True  # which training turned off
    end = document_end_id(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    model.config.eos_token_id = end
    padding, begin = tokenizer.pad_token_id, tokenizer.bos_token_id
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=padding, bos_token_id=begin, **SAMPLING)
    with atomic_folder(out) as folder:
        save_portable(folder, model, tokenizer)
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > MAX_BYTES:
            raise UserError(f"{out} would take {size:,} bytes, more than {MAX_BYTES:,}", "train a smaller model")
    return size


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Export what the command line names."""
    run, out = map(Path, sys.argv[1:] if argv is None else argv)
    say(f"{out}: {export(run, out) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
