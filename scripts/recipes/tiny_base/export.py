"""The weights of a run in bf16, with tokenizer and generation settings: python …/export.py RUN OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from novelgpt.model.portable import make_portable
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import atomic_folder, follow_umask
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.terminal import say
from novelgpt.text.conversation import end_token_ids
from novelgpt.text.encoding import document_end_id

MAX_BYTES = 8_000_000
# With which the samples of the card were drawn.
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "top_k": 0}


def export(run: Path, out: Path) -> int:
    """Write the model of a run folder into `out` and return its bytes.

    Raises:
        UserError: it takes more than MAX_BYTES.
    """
    tokenizer = load_tokenizer(ModelArguments(str(run)))
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16)
    ends = sorted({*end_token_ids(tokenizer), document_end_id(tokenizer)})
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, **SAMPLING
    )
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_portable(folder)
        follow_umask(folder)
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
