"""An adapter merged into its base, as a full checkpoint.

    python -m finetune_lora.merge ADAPTER OUTPUT [--base FOLDER] [--dtype TYPE] [--tolerance LOGITS]

Merged in fp32. The checkpoint is loaded again and compared with base + adapter on a few prompts: their greedy answers
are shown side by side, with the largest difference of a logit. Above the tolerance nothing is kept, exit status 2.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from peft import PeftModel
from torch import nn

from novelgpt.export.full_checkpoint import (
    DTYPE_CHOICES,
    DTYPE_HELP,
    PICKLES_HELP,
    SHARD_HELP,
    TOLERANCE_HELP,
    Written,
    chosen_dtype,
    compare_reloaded,
    largest_difference,
    logits_of,
    outputs_of,
    print_notes,
    vllm_notes,
    write_checkpoint,
)
from novelgpt.inference.generation import answer_end_ids
from novelgpt.model.adapter_bases import BASE_HELP, find_base
from novelgpt.model.card import code, write_derived_card
from novelgpt.model.fingerprint import base_folder, check_base
from novelgpt.model.hub import locate
from novelgpt.model.loading import NOT_OF_FILES, adapter_base, load_model, read_config
from novelgpt.model.merging import merge_adapter
from novelgpt.model.pickles import check_adapter_files, check_no_pickles
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import new_output_folder
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error, reason_of
from novelgpt.settings.paths import from_home
from novelgpt.settings.terminal import say


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Merge the adapter that the command line names."""
    words = _parser().parse_args(argv)
    trained_on = adapter_base(words.adapter)
    if trained_on is None:
        locate(ModelArguments(words.adapter))  # tells what is wrong with a folder that is no model either
        raise UserError(f"{words.adapter} holds no adapter_config.json", "name the folder of a LoRA run")
    base = find_base(words.adapter, trained_on, ModelArguments(words.base) if words.base else None)
    with new_output_folder(words.output) as unfinished:
        check_no_pickles(base_folder(base), words.allow_pickles)
        check_adapter_files(Path(words.adapter), words.allow_pickles)
        check_base(Path(words.adapter), base)
        written, effect = _write_merged(words, base, unfinished)
        merged = ModelArguments(str(unfinished), "sdpa", words.trust_remote_code)
        compare_reloaded(written, merged, ("base + adapter", "merged"), words.tolerance, effect)
        made = f"{code(Path(words.adapter).name)} and its base, merged into full weights."
        write_derived_card(unfinished, words.output.name, words.adapter, made, base, read_config(merged).model_type)
    say(f"merged into {words.output}")
    print_notes(vllm_notes(read_config(ModelArguments(str(words.output), "sdpa", words.trust_remote_code))))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m finetune_lora.merge", description="An adapter merged into its base.")
    parser.add_argument("adapter", type=from_home, help="folder of a finetune_lora run or of one of its checkpoints")
    parser.add_argument("output", type=Path, help="new folder for the full checkpoint")
    parser.add_argument("--base", help=f"{BASE_HELP}; tiny is the small base")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that lies with the base, if it needs that"
    )
    parser.add_argument("--allow_pickles", action="store_true", help=PICKLES_HELP)
    parser.add_argument("--tolerance", type=float, default=1e-3, help=f"{TOLERANCE_HELP} [default: 0.001]")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto", help=DTYPE_HELP)
    parser.add_argument("--max_shard_size", default="5GB", help=SHARD_HELP)
    return parser


def _write_merged(words: argparse.Namespace, base: str, folder: Path) -> tuple[Written, float]:
    """Write the merged checkpoint; also by how much the adapter moves a logit. No model is left in memory."""
    tokenizer = load_tokenizer(ModelArguments(words.adapter, "sdpa", words.trust_remote_code))
    model = ModelArguments(base, "sdpa", words.trust_remote_code, allow_pickles=words.allow_pickles)
    loaded = load_model(model, tokenizer, adapter=Path(words.adapter)).eval()
    architectures = read_config(model).architectures
    ends = answer_end_ids(loaded, tokenizer)
    adapted = _attach(loaded, words.adapter, base)
    expected = outputs_of(adapted, tokenizer, ends)
    with adapted.disable_adapter():
        effect = largest_difference(expected.logits, logits_of(adapted, expected.prompts))
    tied = bool(loaded.config.tie_word_embeddings)
    merged = merge_adapter(adapted)
    if tied and not merged.config.tie_word_embeddings:
        print_notes(["the adapter changes the embedding or the head alone: merged, the two share no weights any more"])
    dtype = chosen_dtype(words.dtype, base_folder(base))
    return write_checkpoint(merged, expected, tokenizer, folder, words, dtype, architectures), effect


def _attach(base_model: nn.Module, adapter: str, base: str) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # Of a head and an embedding that share their weights, which `merge_adapter` takes care of.
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
            return PeftModel.from_pretrained(base_model, adapter).eval()  # type: ignore[arg-type]
    except NOT_OF_FILES:
        raise
    except Exception as error:
        raise UserError(
            f"the adapter {adapter} does not fit {base}: {reason_of(error)}",
            "name the base it was trained on with --base",
        ) from error


if __name__ == "__main__":
    main()
