"""A full checkpoint on disk that computes what the model it was made from computed; shared by merging and exporting.

Three steps lie between the two: making the new weights (in fp32), rounding them to the type they are stored in, and
writing and reading the files. The first and the last must change nothing beyond fp32 noise, and are held to a
tolerance. What rounding costs is a property of the type, and is told apart from them.
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
from novelgpt.model.portable import make_portable
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.model.weight_files import stored_dtype
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.atomic_files import follow_umask, new_output_folder
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
# For the parsers of the commands that write checkpoints.
DTYPE_CHOICES = ("auto", *DTYPES)
DTYPE_HELP = "type of the stored weights; auto: that of the weights they are made from [default: auto]"
TOLERANCE_HELP = "largest difference of a logit, not counting what rounding to the stored type costs"
SHARD_HELP = "largest weight file [default: 5GB]"
PICKLES_HELP = "read weights from pickles (.bin) where there are no safetensors; tensors only"
# Rounding that moves logits by more than this share of what an adapter moves them by is worth a warning.
NOTABLE_SHARE = 0.1


@dataclass
class Outputs:
    """What a model makes of PROMPTS.

    prompts: token ids; logits: [tokens, vocabulary] of each prompt, fp32; answers: greedy tokens after each.
    """

    prompts: list[list[int]]
    logits: list[torch.Tensor]
    answers: list[list[int]]


@dataclass
class Written:
    """A checkpoint that was written and not read again yet.

    expected: outputs of what it was made from; logits: of the weights as stored; making, rounding: largest differences
    of a logit by making the weights and by rounding them; dtype: of the stored weights.
    """

    expected: Outputs
    logits: list[torch.Tensor]
    making: float
    rounding: float
    dtype: torch.dtype


def read_export_words(program: str, description: str, architecture: str, argv: list[str] | None) -> argparse.Namespace:
    """The command line of an export: `checkpoint`, `output`, and what is asked of the files."""
    parser = CommandParser(prog=program, description=description)
    parser.add_argument(
        "checkpoint", type=from_home, help="folder or hub name of a full checkpoint; merge adapters first"
    )
    parser.add_argument("output", type=Path, help=f"new folder for the {architecture}")
    parser.add_argument("--tolerance", type=float, default=1e-3, help=f"{TOLERANCE_HELP} [default: 0.001]")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto", help=DTYPE_HELP)
    parser.add_argument("--max_shard_size", default="5GB", help=SHARD_HELP)
    parser.add_argument("--allow_pickles", action="store_true", help=PICKLES_HELP)
    return parser.parse_args(argv)


def chosen_dtype(name: str, source: Path) -> torch.dtype:
    """Of --dtype; for "auto", the type in which the weights of the folder `source` are stored."""
    return stored_dtype(source) if name == "auto" else DTYPES[name]


@torch.inference_mode()
def outputs_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Outputs:
    """Logits and greedy answers of a model in evaluation mode; adapters too.

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
    """[tokens, vocabulary] of each prompt, fp32."""
    return [model(input_ids=torch.tensor([prompt])).logits[0].float() for prompt in prompts]


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Between logits of the same prompts; infinite where they hold no numbers or differ in shape."""
    if any(a.shape != b.shape for a, b in zip(left, right, strict=True)):
        return float("inf")
    difference = max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))
    return difference if difference == difference else float("inf")


def write_checkpoint(
    made: PreTrainedModel,
    expected: Outputs,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    options: argparse.Namespace,
    dtype: torch.dtype,
    architectures: list[str] | None = None,
) -> Written:
    """Save a model, in fp32 so far, with its tokenizer and every token that ends an answer.

    Args:
        made: the model; its weights are rounded here, so it is of no further use.
        expected: outputs of what it was made from.
        tokenizer: to be saved with it.
        folder: an empty one.
        options: `tolerance` and `max_shard_size` of the command line.
        dtype: of the stored weights.
        architectures: names for config.json; None for the model's own class.

    Raises:
        UserError: `made` computes something else than expected, or the disk is full.
    """
    logits = logits_of(made, expected.prompts)
    making = largest_difference(expected.logits, logits)
    _hold(making, options.tolerance, "the weights as they would be stored, before any rounding,")
    rounding = 0.0
    if dtype != torch.float32:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(parameter.to(dtype))
        exact, logits = logits, logits_of(made, expected.prompts)
        rounding = largest_difference(exact, logits)
    made.generation_config = GenerationConfig(
        eos_token_id=answer_end_ids(made, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    made.config.use_cache = True  # off in models that are trained
    made.to(dtype)  # type: ignore[arg-type]
    _check_space(made, folder)
    made.save_pretrained(folder, max_shard_size=options.max_shard_size)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    follow_umask(folder)
    if architectures is not None:
        _name_architectures(folder, architectures)
    return Written(expected, logits, making, rounding, dtype)


def compare_reloaded(
    written: Written, model: ModelArguments, names: tuple[str, str], tolerance: float, effect: float | None = None
) -> None:
    """Load the checkpoint as anyone would, show its answers beside those expected, and the differences of the logits.

    Args:
        written: what is known of it.
        model: where it lies.
        names: of what it was made from, and of itself.
        tolerance: largest difference of a logit.
        effect: by how much the adapter that was merged moves a logit; None where there was none.

    Raises:
        UserError: it does not compute what it was made from.
    """
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, tokenizer).eval()
    found = outputs_of(loaded, tokenizer, answer_end_ids(loaded, tokenizer))
    if found.prompts != written.expected.prompts:
        raise UserError(
            "the saved tokenizer makes other prompts than the one it was saved from",
            "check the tokenizer's files beside the weights for settings of other versions",
        )
    storing = largest_difference(written.logits, found.logits)
    total = largest_difference(written.expected.logits, found.logits)
    _print_answers(tokenizer, names, written.expected, found)
    say(f"largest difference of a logit, {names[0]} against {names[1]} as loaded from its files: {total:.1e}")
    if written.dtype != torch.float32:
        _print_rounding(written, effect)
    _hold(max(written.making, storing), tolerance, f"the {names[1]} model's logits")
    if written.rounding == 0:
        _hold(total, tolerance, f"the {names[1]} model's logits")


def read_full_config(model: ModelArguments) -> PreTrainedConfig:
    """The configuration of a full checkpoint.

    Raises:
        UserError: it is an adapter, or what `read_config` raises.
    """
    if adapter_base(model.model) is not None:
        raise UserError(
            f"{model.model} is an adapter",
            f"merge it first: {python_module('finetune_lora.merge ADAPTER OUTPUT')}, then take OUTPUT",
        )
    return read_config(model)


def export_checkpoint(
    words: argparse.Namespace,
    convert: Callable[[PreTrainedModel], PreTrainedModel],
    convert_tokenizer: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase],
    name: str,
) -> None:
    """Write the checkpoint of the command line as another architecture, and compare the two.

    Args:
        words: `checkpoint`, `output`, `tolerance`, `dtype` and `max_shard_size` of the command line.
        convert: the model, in fp32 and evaluation mode, -> the same function as another class. May use up its argument.
        convert_tokenizer: the tokenizer -> one of the same ids.
        name: of the new architecture, to be shown.

    Raises:
        UserError: the two do not compute the same, or something cannot be read or written.
    """
    source = ModelArguments(words.checkpoint, "sdpa", allow_pickles=words.allow_pickles)
    with new_output_folder(words.output) as unfinished:
        written = _write_converted(words, source, convert, convert_tokenizer, unfinished)
        compare_reloaded(written, ModelArguments(str(unfinished), "sdpa"), ("original", name), words.tolerance)
        made = f"{code(shown_name(source.model))}, converted to {name} without further training."
        exported = read_config(ModelArguments(str(unfinished), "sdpa")).model_type
        write_derived_card(unfinished, words.output.name, source.model, made, source.model, exported)
    say(f"exported to {words.output}")


def with_settings(tokenizer: PreTrainedTokenizerBase, like: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer of the same ids as `like`, given its chat template with the record, and its longest row."""
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = like.model_max_length
    tokenizer.chat_template = like.chat_template
    tokenizer.init_kwargs[RECORD] = template_record(like)
    return tokenizer


def _write_converted(
    words: argparse.Namespace,
    source: ModelArguments,
    convert: Callable[[PreTrainedModel], PreTrainedModel],
    convert_tokenizer: Callable[[PreTrainedTokenizerBase], PreTrainedTokenizerBase],
    folder: Path,
) -> Written:
    """Write the converted checkpoint. No model is left in memory."""
    tokenizer = load_tokenizer(source)
    loaded = load_model(source, tokenizer).eval()
    expected = outputs_of(loaded, tokenizer, answer_end_ids(loaded, tokenizer))
    converted = convert_tokenizer(tokenizer)
    dtype = chosen_dtype(words.dtype, base_folder(source.model))
    return write_checkpoint(convert(loaded), expected, converted, folder, words, dtype)


def vllm_notes(config: PreTrainedConfig) -> list[str]:
    """What hinders vLLM from loading a checkpoint of this configuration, by the rules in vLLM's own loaders.

    vLLM 0.23 is the last release that knows Baichuan (removed in vllm-project/vllm pull request 46362) and Qwen v1
    (45131). It takes RoPE for the name BaiChuanForCausalLM or a width of 4096, and normalises the head of a vocabulary
    of 125696, whatever the configuration says.
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
    """Limits of what was written, in yellow."""
    for note in notes:
        say(note, style="yellow")


def _hold(difference: float, tolerance: float, what: str) -> None:
    if not difference <= tolerance:
        raise UserError(
            f"{what} differ by {difference:.2e} from those of what it was made from, above {tolerance:.0e}",
            "raise --tolerance if that is small enough for you; else please report it with the versions in use",
        )


def _check_space(model: PreTrainedModel, folder: Path) -> None:
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the checkpoint needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free where it shall lie",
            "free some space, or name a folder on another disk",
        )


def _name_architectures(folder: Path, architectures: list[str]) -> None:
    """As in the checkpoint it was made from: other tools choose their class by this name."""
    path = folder / "config.json"
    config = read_object(path)
    path.write_text(json.dumps(config | {"architectures": architectures}, indent=2) + "\n", encoding="utf-8")


def _print_answers(
    tokenizer: PreTrainedTokenizerBase, names: tuple[str, str], expected: Outputs, found: Outputs
) -> None:
    table = Table(*(Column(name, overflow="fold") for name in ("prompt", *names, "token for token")))
    for prompt, left, right in zip(PROMPTS, expected.answers, found.answers, strict=True):
        common = len(os.path.commonprefix([left, right]))
        same = "equal" if left == right else f"{common} equal, then different"
        table.add_row(prompt, *(_shown(tokenizer, answer) for answer in (left, right)), same)
    make_console().print(table)


def _shown(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    """With end tokens, which are part of what is compared, and in one line."""
    return str(tokenizer.decode(answer, skip_special_tokens=False)).replace("\n", "⏎")


def _print_rounding(written: Written, effect: float | None) -> None:
    name = str(written.dtype).removeprefix("torch.")
    say(f"  of which rounding to {name} makes {written.rounding:.1e}, all else {written.making:.1e}")
    if effect:
        share = written.rounding / effect
        say(f"  the adapter itself moves a logit by up to {effect:.1e}; rounding by {share:.1%} of that")
        if share > NOTABLE_SHARE:
            print_notes([f"{name} is coarse for this adapter: --dtype float32 keeps all of it, in more space"])
