"""Attaching a LoRA adapter to a base, through peft."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import GENERATION_CONFIG_NAME

from novelgpt.model.baichuan.modeling import NormHead
from novelgpt.model.lora import expert_parameters, lora_config, modules_left
from novelgpt.settings.arguments import LoraArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import pipeline_name
from novelgpt.settings.run_record import read_run_record
from novelgpt.settings.terminal import say
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation, encode_prompt

ADAPTABLE = (nn.Linear, nn.Embedding, Conv1D)


def base_dtype() -> torch.dtype:
    """Of the frozen base: bf16 on GPUs that have it, else fp32. The adapter's own weights are fp32 in any case."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def attach_lora(
    model: PreTrainedModel, lora: LoraArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> PeftModel:
    """The model with a fresh adapter, which alone is trained.

    Args:
        model: the base.
        lora: its settings.
        tokenizer: with it, rows of the embedding are trained as well, where the chat template has marks that the base
            has never ended an answer with (`lora.train_mark_tokens`).

    Raises:
        UserError: no module has a name of `lora_targets`, or one that has cannot bear an adapter; or rows that should
            be trained cannot be.
    """
    if lora.lora_targets != ["all-linear"]:
        _check_targets(model, modules_left(model, lora.lora_targets)[0], lora.lora_targets)
    rows = {} if tokenizer is None else _rows_to_train(model, lora, tokenizer)
    config, lines = lora_config(model, lora, rows)
    for line in lines:
        if is_first_process():
            say(line)
    if lora.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():
            # Ranks by pattern are those of parameters here, which peft looks for among the modules alone.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_targets {' '.join(lora.lora_targets)}: {error}", _choice(model)) from error
    # With activation checkpointing, adapters get no gradient unless the embedding's output asks for one.
    adapted.enable_input_require_grads()
    if is_first_process():
        trained, total = adapted.get_nb_trainable_parameters()
        say(f"LoRA trains {trained:,} weights beside the {total - trained:,} of the base")
    return adapted  # type: ignore[return-value]


def _check_targets(model: PreTrainedModel, targets: list[str], named: list[str]) -> None:
    """Each name of `targets`, of all that are named, is that of a module, or its end, and none that of a NormHead."""
    for target in targets:
        parts = [part for name, part in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not parts:
            raise UserError(f"--lora_targets {' '.join(named)}: no module is named {target}", _choice(model))
        if any(isinstance(part, NormHead) for part in parts):
            raise UserError(
                f"--lora_targets {target}: the head of {type(model).__name__} normalises its rows, which does not "
                "commute with a low-rank update: base and adapter would not merge into one weight",
                f"leave {target} out of --lora_targets",
            )


def _choice(model: PreTrainedModel) -> str:
    names = {
        name.rsplit(".", 1)[-1]
        for name, part in model.named_modules()
        if isinstance(part, ADAPTABLE) and not isinstance(part, NormHead)
    }
    return f"take some of {', '.join(sorted(names | expert_parameters(model)))}, or all-linear"


def _rows_to_train(
    model: PreTrainedModel, lora: LoraArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """Token ids whose rows are trained in full, by the name of the module that holds the rows.

    Raises:
        UserError: the base has never seen the template's marks, and their rows are not or cannot be trained.
    """
    end, written = _template_marks(tokenizer)
    known = _known_ends(model, tokenizer)
    marks = sorted(written - known)
    unseen = end not in known
    if not marks or not (unseen or lora.train_mark_tokens == "always"):
        return {}
    listed = " ".join(str(token) for token in tokenizer.convert_ids_to_tokens(marks))
    why = f"the base has never ended an answer with {tokenizer.convert_ids_to_tokens(end)}"
    if lora.train_mark_tokens == "never":
        raise UserError(
            f"{why}, and an adapter alone hardly teaches it to: answers would not stop",
            "--train_mark_tokens auto trains the rows of the marks; or take a chat model, or "
            f"{pipeline_name('finetune')}",
        )
    if is_deepspeed_zero3_enabled():
        raise UserError(
            f"the rows of {listed} are to be trained, and peft cannot train single rows of weights in parts (ZeRO-3)"
            + (f"; without them, answers would not stop, as {why}" if unseen else ""),
            f"ZERO=2, a chat model as base, or {pipeline_name('finetune')}",
        )
    rows = _modules_with_rows(model, lora, marks, end if end in marks else None)
    if rows and is_first_process():
        say(f"LoRA also trains the rows of {listed} in {' and '.join(rows)}" + (f": {why}" if unseen else ""))
    return rows


def _template_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, set[int]]:
    """The token that ends an answer in the chat template, and all special tokens that the template writes."""
    question = [{"role": "user", "content": "问"}]
    row = encode_conversation([*question, {"role": "assistant", "content": "答"}], tokenizer)[0]
    end = [label for label in row.labels if label != IGNORE_INDEX][-1]
    written = {*row.input_ids, *encode_prompt(question, tokenizer)}
    return end, {end} | {token for token in written if token in tokenizer.added_tokens_decoder}


def _known_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that the base has surely been trained to end with."""
    known = {int(tokenizer.eos_token_id)}
    # Continued pretraining notes all end tokens for later use, but has shown the model none of a template's.
    folder = Path(model.name_or_path or "")
    places = (folder, folder.parent) if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else (folder,)
    if any((read_run_record(place) or {}).get("pipeline") == "pretrain" for place in places):
        return known
    named = [model.generation_config.eos_token_id if model.generation_config is not None else None]
    if model.device.type == "meta" and (folder / GENERATION_CONFIG_NAME).is_file():  # made without it, for planning
        named.append(GenerationConfig.from_pretrained(folder).eos_token_id)
    for ids in named:
        known |= set(ids) if isinstance(ids, (list, tuple)) else set() if ids is None else {ids}
    return known


def _modules_with_rows(
    model: PreTrainedModel, lora: LoraArguments, marks: list[int], end: int | None
) -> dict[str, list[int]]:
    """The embedding with all marks and, where it is not the same matrix, the head with the mark that it has to write.

    Modules that bear an adapter of their own learn their rows by that.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {part: name for name, part in model.named_modules() if not _is_target(name, lora)}
    rows = {names[embedding]: marks} if embedding in names else {}
    if end is not None and isinstance(head, nn.Module) and head in names and head.weight is not embedding.weight:
        if type(head) is not nn.Linear or head.bias is not None:
            raise UserError(
                f"the base has never ended an answer with token {end}, and single rows of its head, "
                f"{type(head).__name__}, cannot be trained",
                f"take a chat model as base, or {pipeline_name('finetune')}",
            )
        rows[names[head]] = [end]
    return rows


def _is_target(name: str, lora: LoraArguments) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in lora.lora_targets)
