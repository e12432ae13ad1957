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

from novelgpt.export.full_checkpoint import (
    StoredCheckpoint,
    add_checkpoint_options,
    compare_reloaded,
    logits_of,
    max_difference,
    outputs_of,
    print_notes,
    vllm_notes,
    write_checkpoint,
)
from novelgpt.inference.generation import answer_end_ids
from novelgpt.model.card import code, write_derived_card
from novelgpt.model.fingerprint import base_folder, check_base
from novelgpt.model.hub import locate
from novelgpt.model.loading import BASE_HELP, NOT_OF_FILES, adapter_base, find_base, load_model, read_config
from novelgpt.model.lora import merge_adapter
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.model.weight_files import check_adapter_files, check_no_pickles
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import new_output_folder
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error, reason_of
from novelgpt.settings.paths import from_home
from novelgpt.settings.terminal import say


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Merge the adapter that the command line names."""
    parser = CommandParser(prog="python -m finetune_lora.merge", description="An adapter merged into its base.")
    parser.add_argument("adapter", type=from_home, help="folder of a finetune_lora run or of one of its checkpoints")
    parser.add_argument("output", type=Path, help="new folder for the full checkpoint")
    parser.add_argument("--base", help=f"{BASE_HELP}; tiny is the small base")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code from the base's folder, if it needs that"
    )
    add_checkpoint_options(parser)
    args = parser.parse_args(argv)
    trained_on = adapter_base(args.adapter)
    if trained_on is None:
        locate(ModelArguments(args.adapter))  # reports what is wrong with a folder that is not a model either
        raise UserError(f"{args.adapter} holds no adapter_config.json", "name the folder of a LoRA run")
    base = find_base(args.adapter, trained_on, ModelArguments(args.base) if args.base else None)
    with new_output_folder(args.output) as folder:
        check_no_pickles(base_folder(base), args.allow_pickles)
        check_adapter_files(Path(args.adapter), args.allow_pickles)
        check_base(Path(args.adapter), base)
        stored, effect = _write_merged(args, base, folder)
        merged = ModelArguments(str(folder), "sdpa", args.trust_remote_code)
        compare_reloaded(stored, merged, ("base + adapter", "merged"), args.tolerance, effect)
        made = f"{code(Path(args.adapter).name)} and its base, merged into full weights."
        write_derived_card(folder, args.output.name, args.adapter, made, base, read_config(merged).model_type)
    say(f"merged into {args.output}")
    print_notes(vllm_notes(read_config(ModelArguments(str(args.output), "sdpa", args.trust_remote_code))))


def _write_merged(args: argparse.Namespace, base: str, folder: Path) -> tuple[StoredCheckpoint, float]:
    """Write the merged checkpoint; also return how far the adapter moves a logit. No model is left in memory."""
    tokenizer = load_tokenizer(ModelArguments(args.adapter, "sdpa", args.trust_remote_code))
    model = ModelArguments(base, "sdpa", args.trust_remote_code, allow_pickles=args.allow_pickles)
    loaded = load_model(model, tokenizer, adapter=Path(args.adapter)).eval()
    architectures = read_config(model).architectures
    ends = answer_end_ids(loaded, tokenizer)
    try:
        with warnings.catch_warnings():
            # `merge_adapter` handles a head and an embedding that share their weights.
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")
            adapted = PeftModel.from_pretrained(loaded, args.adapter).eval()
    except NOT_OF_FILES:
        raise
    except Exception as error:
        raise UserError(
            f"the adapter {args.adapter} does not fit {base}: {reason_of(error)}",
            "name the base it was trained on with --base",
        ) from error
    expected = outputs_of(adapted, tokenizer, ends)
    with adapted.disable_adapter():
        effect = max_difference(expected.logits, logits_of(adapted, expected.prompts))
    tied = bool(loaded.config.tie_word_embeddings)
    merged = merge_adapter(adapted)
    if tied and not merged.config.tie_word_embeddings:
        print_notes(["the adapter changes the embedding or the head alone: merged, the two no longer share weights"])
    return write_checkpoint(merged, expected, tokenizer, folder, args, base_folder(base), architectures), effect


if __name__ == "__main__":
    main()
