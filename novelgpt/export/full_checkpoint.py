"""Full checkpoints that compute the same as the model they were made from; used by merging and exporting.

Three steps lead from one to the other: making the new weights (in fp32), rounding them to the stored type, and
writing and reading the files. The first and the last must not change anything beyond fp32 noise, and are held to a
tolerance. The error of rounding depends on the type, and is reported separately.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Column, Table
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from novelgpt.inference.generation import answer_end_ids
from novelgpt.model.card import code, shown_name, write_derived_card
from novelgpt.model.fingerprint import base_folder
from novelgpt.model.loading import adapter_base, load_model, read_config
from novelgpt.model.portable import save_portable
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.model.weight_files import stored_dtype
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import new_output_folder
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.console import make_console
from novelgpt.settings.errors import UserError
from novelgpt.settings.parsed_files import read_object
from novelgpt.settings.paths import from_home
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import say
from novelgpt.text.conversation import encode_prompt
from novelgpt.text.templates import RECORD, template_record

PROMPTS = ("你好", "请写一段关于海的文字。", "论文标题：基于深度学习的图像去噪方法", "第一章 雨夜")
ANSWER_TOKENS = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PICKLES_HELP = "read weights from pickles (.bin) where there are no safetensors; tensors only"
# A rounding error above this share of the adapter's own effect on the logits deserves a warning.
NOTABLE_SHARE = 0.1


@dataclass
class Outputs:
    """What a model computes for PROMPTS.

    prompts: token ids; logits: [tokens, vocabulary] of each prompt, fp32; answers: greedy tokens after each.
    """

    prompts: list[list[int]]
    logits: list[torch.Tensor]
    answers: list[list[int]]


@dataclass
class StoredCheckpoint:
    """A checkpoint that was written and is not verified yet.

    expected: outputs of the model it was made from; logits: of the weights as stored; making, rounding: max difference
    of a logit from making the weights and from rounding them; dtype: of the stored weights.
    """

    expected: Outputs
    logits: list[torch.Tensor]
    making: float
    rounding: float
    dtype: torch.dtype


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that write checkpoints."""
    parser.add_argument(
        "--tolerance", type=float, default=1e-3,
        help="max difference of a logit, not counting the rounding to the stored type [default: 0.001]",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="type of the stored weights; auto: that of the weights they are made from [default: auto]",
    )  # fmt: skip
    parser.add_argument("--max_shard_size", default="5GB", help="max size of a weight file [default: 5GB]")
    parser.add_argument("--allow_pickles", action="store_true", help=PICKLES_HELP)


@torch.inference_mode()
def outputs_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Outputs:
    """Compute logits and greedy answers of a model, with or without an adapter, in evaluation mode.

    Args:
        model: one that generates.
        tokenizer: its tokenizer.
        ends: tokens that end an answer.
    """
    prompts = [encode_prompt([{"role": "user", "content": prompt}], tokenizer) for prompt in PROMPTS]
    config = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        generated = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        answers.append(generated[0, len(prompt) :].tolist())
    return Outputs(prompts, logits_of(model, prompts), answers)


@torch.inference_mode()
def logits_of(model: torch.nn.Module, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Compute [tokens, vocabulary] of each prompt, fp32."""
    return [model(input_ids=torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def max_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Of logits of the same prompts; infinite if they contain NaN or differ in shape."""
    if any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return float("inf")
    differences = torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)])
    return float("inf") if differences.isnan().any() else float(differences.max())


def write_checkpoint(
    made: PreTrainedModel,
    expected: Outputs,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    options: argparse.Namespace,
    source: Path,
    architectures: list[str] | None = None,
) -> StoredCheckpoint:
    """Save a model with its tokenizer and every token that ends an answer.

    Args:
        made: the model, in fp32; its weights are rounded in place, so it is of no further use.
        expected: outputs of the model it was made from.
        tokenizer: to be saved with it.
        folder: an empty one.
        options: `tolerance`, `dtype` and `max_shard_size` of the command line.
        source: folder of the weights it was made from, whose type is stored by `--dtype auto`.
        architectures: names for config.json, by which other tools choose their class; None for the model's own class.

    Raises:
        UserError: `made` does not compute what is expected, or the disk is full.
    """
    dtype = stored_dtype(source) if options.dtype == "auto" else DTYPES[options.dtype]
    logits = logits_of(made, expected.prompts)
    making = max_difference(expected.logits, logits)
    _hold(making, options.tolerance, "the weights as they would be stored, before any rounding,")
    rounding = 0.0
    if dtype != torch.float32:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(parameter.to(dtype))
        exact, logits = logits, logits_of(made, expected.prompts)
        rounding = max_difference(exact, logits)
    made.generation_config = GenerationConfig(
        eos_token_id=answer_end_ids(made, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    made.config.use_cache = True  # off in models that are trained
    made.to(dtype)  # type: ignore[arg-type]
    needed = sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the checkpoint needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on its disk",
            "free some space, or name a folder on another disk",
        )
    save_portable(folder, made, tokenizer, options.max_shard_size)
    if architectures is not None:
        config = read_object(folder / "config.json") | {"architectures": architectures}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return StoredCheckpoint(expected, logits, making, rounding, dtype)


def compare_reloaded(
    stored: StoredCheckpoint,
    model: ModelArguments,
    names: tuple[str, str],
    tolerance: float,
    effect: float | None = None,
) -> None:
    """Load the checkpoint like a user, and show its answers beside those expected, and the differences of the logits.

    Args:
        stored: what is known of it.
        model: where it is.
        names: of the model it was made from, and of itself.
        tolerance: max difference of a logit.
        effect: by how much the merged adapter moves a logit; None without one.

    Raises:
        UserError: it does not compute the same as the model it was made from.
    """
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, tokenizer).eval()
    expected, found = stored.expected, outputs_of(loaded, tokenizer, answer_end_ids(loaded, tokenizer))
    if found.prompts != expected.prompts:
        raise UserError(
            "the saved tokenizer makes other prompts than the one it was saved from",
            "check the tokenizer's files beside the weights for settings of other versions",
        )
    storing = max_difference(stored.logits, found.logits)
    total = max_difference(expected.logits, found.logits)
    table = Table(*(Column(name, overflow="fold") for name in ("prompt", *names, "token for token")))
    for prompt, left, right in zip(PROMPTS, expected.answers, found.answers, strict=True):
        common = len(os.path.commonprefix([left, right]))
        # With end tokens, which are part of the comparison, and in one line.
        shown = [str(tokenizer.decode(answer)).replace("\n", "⏎") for answer in (left, right)]
        table.add_row(prompt, *shown, "equal" if left == right else f"{common} equal, then different")
    make_console().print(table)
    say(f"largest difference of a logit, {names[0]} against {names[1]} as loaded from its files: {total:.1e}")
    if stored.dtype != torch.float32:
        name = str(stored.dtype).removeprefix("torch.")
        say(f"  of which rounding to {name} makes {stored.rounding:.1e}, all else {stored.making:.1e}")
        if effect:
            share = stored.rounding / effect
            say(f"  the adapter itself moves a logit by up to {effect:.1e}; rounding by {share:.1%} of that")
            if share > NOTABLE_SHARE:
                print_notes([f"{name} is coarse for this adapter: --dtype float32 keeps all of it, in more space"])
    # Without rounding, the sum of both steps is held to the tolerance as well.
    exact = total if stored.rounding == 0 else 0.0
    _hold(max(stored.making, storing, exact), tolerance, f"the {names[1]} model's logits")


def export_checkpoint(
    program: str,
    name: str,
    argv: list[str] | None,
    check: Callable[[PreTrainedConfig, str], None],
    convert: Callable[[PreTrainedModel], PreTrainedModel],
    convert_tokenizer: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase],
) -> PreTrainedConfig:
    """Write the checkpoint that a command line names as another architecture, and compare the two.

    Args:
        program: module of the command.
        name: of the new architecture.
        argv: of the command line.
        check: raises a UserError for a configuration, named by the second argument, that cannot be converted.
        convert: the model, in fp32 and evaluation mode, -> the same function as another class. May use up its argument.
        convert_tokenizer: the tokenizer -> one of the same ids.

    Returns:
        The configuration of the original.

    Raises:
        UserError: the two do not compute the same, or something cannot be read or written.
    """
    parser = CommandParser(prog=f"python -m {program}", description=f"Exports a checkpoint as a {name}.")
    parser.add_argument(
        "checkpoint", type=from_home, help="folder or hub name of a full checkpoint; merge adapters first"
    )
    parser.add_argument("output", type=Path, help=f"new folder for the {name}")
    add_checkpoint_options(parser)
    args = parser.parse_args(argv)
    source = ModelArguments(args.checkpoint, "sdpa", allow_pickles=args.allow_pickles)
    if adapter_base(source.model) is not None:
        raise UserError(
            f"{source.model} is an adapter",
            f"merge it first: {python_module('finetune_lora.merge ADAPTER OUTPUT')}, then take OUTPUT",
        )
    config = read_config(source)
    check(config, args.checkpoint)
    with new_output_folder(args.output) as folder:
        tokenizer = load_tokenizer(source)
        loaded = load_model(source, tokenizer).eval()
        expected = outputs_of(loaded, tokenizer, answer_end_ids(loaded, tokenizer))
        converted = convert(loaded)
        stored = write_checkpoint(
            converted, expected, convert_tokenizer(tokenizer), folder, args, base_folder(source.model)
        )
        del loaded, converted  # only one model is in memory at a time
        exported = ModelArguments(str(folder), "sdpa")
        compare_reloaded(stored, exported, ("original", name), args.tolerance)
        made = f"{code(shown_name(source.model))}, converted to {name} without further training."
        model_type = read_config(exported).model_type
        write_derived_card(folder, args.output.name, source.model, made, source.model, model_type)
    say(f"exported to {args.output}")
    return config


def with_settings(tokenizer: PreTrainedTokenizerBase, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer of the same ids the chat template, its record and the max length of another one."""
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = like.model_max_length
    tokenizer.chat_template = like.chat_template
    tokenizer.init_kwargs[RECORD] = template_record(like)
    return tokenizer


def vllm_notes(config: PreTrainedConfig) -> list[str]:
    """What prevents vLLM from loading a checkpoint of this configuration, according to vLLM's own loaders.

    vLLM 0.23 is the last release with Baichuan (removed in vllm-project/vllm pull request 46362) and Qwen v1 (45131).
    It uses RoPE for the name BaiChuanForCausalLM or a width of 4096, and normalises the head for a vocabulary of
    125696, whatever the configuration says.
    """
    if config.model_type == "qwen":
        way_out = f"{python_module('novelgpt.export.qwen2')} makes a Qwen2 of it"
        return [f"vLLM after 0.23 does not know Qwen v1; {way_out}"]
    if config.model_type != "baichuan":
        return []
    rope = config.position_embedding == "rope"
    llama = f"{python_module('novelgpt.export.llama')} makes a Llama of it"
    way_out = llama if rope else "use transformers"
    notes = [f"vLLM after 0.23 does not know Baichuan; {way_out}"]
    if rope != ("BaiChuanForCausalLM" in (config.architectures or []) or config.hidden_size == 4096):
        notes.append(f"vLLM up to 0.23 takes a Baichuan of width {config.hidden_size} for one with other positions")
    if config.norm_head != (config.vocab_size == 125696):
        notes.append(
            f"vLLM up to 0.23 normalises the head of a vocabulary of 125696 only; this one has {config.vocab_size}, "
            f"and {'needs it' if config.norm_head else 'must not have it'}"
        )
    return notes


def print_notes(notes: list[str]) -> None:
    """Print limits of what was written, in yellow."""
    for note in notes:
        say(note, style="yellow")


def _hold(difference: float, tolerance: float, what: str) -> None:
    if difference > tolerance:
        raise UserError(
            f"{what} differ by {difference:.2e} from those of what it was made from, above {tolerance:.0e}",
            "raise --tolerance if that is small enough for you; else please report it with the versions in use",
        )
