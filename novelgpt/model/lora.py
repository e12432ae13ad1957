"""LoRA through peft: which modules get an adapter, and which token embeddings are trained beside it.

In mixtures of experts, transformers 5 stores the weights of all experts of a layer as one parameter, not as modules.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import (
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from novelgpt.model.baichuan.modeling import NormHead
from novelgpt.model.tokenizer import known_ends
from novelgpt.settings.arguments import LoraArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.process import is_first_process
from novelgpt.settings.remedies import pipeline_name
from novelgpt.settings.terminal import say
from novelgpt.text.conversation import IGNORE_INDEX, encode_conversation, encode_prompt
from novelgpt.text.messages import Message


def attach_lora(
    model: PreTrainedModel, lora: LoraArguments, tokenizer: PreTrainedTokenizerBase | None = None
) -> PeftModel:
    """Attach a fresh adapter, which alone is trained.

    Args:
        model: the base.
        lora: settings of the adapter.
        tokenizer: if given, the embeddings of special tokens of its chat template are trained as well, where the base
            has never ended an answer with them (`lora.train_special_tokens`).

    Raises:
        UserError: `lora_targets` matches no module, or one that cannot be adapted; or token embeddings that have to be
            trained cannot be.
    """
    if lora.lora_targets != ["all-linear"]:
        _check_targets(model, _split_targets(model, lora.lora_targets)[0], lora.lora_targets)
    rows = {} if tokenizer is None else _rows_to_train(model, lora, tokenizer)
    config, notes = lora_config(model, lora, rows)
    if lora.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with warnings.catch_warnings():
            # These patterns name parameters here; peft looks for them among the modules alone.
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_targets {' '.join(lora.lora_targets)}: {error}", _adaptable(model)) from error
    # With activation checkpointing, adapters get no gradient unless the output of the embedding requires one.
    adapted.enable_input_require_grads()
    if is_first_process():
        trained, total = adapted.get_nb_trainable_parameters()
        say(*notes, f"LoRA trains {trained:,} weights beside the {total - trained:,} of the base")
    return adapted  # type: ignore[return-value]


def base_model(model: nn.Module | None) -> PreTrainedModel:
    """The model itself, without the adapter around it if there is one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def lora_config(
    model: PreTrainedModel, lora: LoraArguments, rows: dict[str, list[int]] | None = None
) -> tuple[LoraConfig, list[str]]:
    """Build the peft settings, and notes on how they apply to experts.

    Names of expert layers in older checkpoints (gate_proj, up_proj, …) stand for the parameters that hold these weights
    now. peft adds the update of a parameter to the weight itself, so dropout cannot be applied before it: with adapters
    on experts, the adapter has none at all.

    Args:
        model: the base.
        lora: settings of the adapter.
        rows: token ids whose embeddings are trained in full, by the name of the module that holds them.

    Raises:
        UserError: the targets, or DoRA, cannot be combined with experts.
    """
    everything = lora.lora_targets == ["all-linear"]
    parameters = [] if everything else _split_targets(model, lora.lora_targets)[1]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if everything else [name for name in lora.lora_targets if name not in parameters],
        target_parameters=parameters or None,
        trainable_token_indices=rows or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    experts = _expert_parameters(model)
    if not experts:
        return config, []
    try:
        adapted = _converted(model, config).target_parameters or ()
    except ValueError as error:
        raise UserError(f"--lora_targets: {error}", "name them together, or none of them") from error
    notes = []
    if not any(_matches(expert, name) for name in adapted for expert in experts):
        notes.append(
            f"mixture of experts: LoRA leaves the experts as they are; --lora_targets … {' '.join(sorted(experts))} "
            "adapts them as well"
        )
    names = ", ".join(sorted(adapted))
    if adapted and config.use_dora:
        raise UserError(
            f"--use_dora cannot be combined with adapters on experts ({names})",
            "leave it out, or name other modules: --lora_targets q_proj k_proj v_proj o_proj",
        )
    if adapted and config.lora_dropout:
        config.lora_dropout = 0.0
        notes.append(f"mixture of experts: LoRA without dropout, as it adapts stacked parameters: {names}")
    return config, notes


def merge_adapter(adapted: PeftModel) -> PreTrainedModel:
    """Merge the adapter into its base; uses up `adapted`.

    If head and embedding share their weights and only one of the two is adapted, the head gets weights of its own: the
    update of one must not change the other.
    """
    model = cast(PreTrainedModel, adapted.get_base_model())
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    changed = any(isinstance(part, LoraLayer) for part in (embedding, head))
    if changed and head is not None and head.weight is embedding.weight:
        holder = head.get_base_layer() if isinstance(head, LoraLayer) else head
        holder.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        # They are untied on purpose.
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        merged: Any = adapted.base_model
        return cast(PreTrainedModel, merged.merge_and_unload())


def _matches(name: str, target: str) -> bool:
    """Whether a target is the dotted name of a module, or the end of one."""
    return f".{name}".endswith(f".{target}")


def _expert_parameters(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that stack the weights of all experts of a layer, such as experts.gate_up_proj."""
    return {".".join(name.split(".")[-2:]) for name, weight in model.named_parameters() if weight.dim() == 3}


def _converted(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """A copy of the settings with the names that transformers 5 gives to renamed weights."""
    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, get_model_conversion_mapping(model))
    return converted


def _split_targets(model: PreTrainedModel, targets: list[str]) -> tuple[list[str], list[str]]:
    """Targets that are modules, and those that are parameters of experts; without names that peft converts itself."""
    experts = _expert_parameters(model)
    modules = [name for name, _ in model.named_modules()]
    parameters = [
        target
        for target in targets
        if any(_matches(expert, target) for expert in experts) and not any(_matches(name, target) for name in modules)
    ]
    left = [target for target in targets if target not in parameters]
    if experts:
        try:
            kept = _converted(model, LoraConfig(task_type="CAUSAL_LM", target_modules=left)).target_modules or ()
        except ValueError:  # `lora_config` reports it
            kept = ()
        left = [target for target in left if target in kept]
    return left, parameters


def _check_targets(model: PreTrainedModel, targets: list[str], given: list[str]) -> None:
    for target in targets:
        modules = [module for name, module in model.named_modules() if _matches(name, target)]
        if not modules:
            raise UserError(f"--lora_targets {' '.join(given)}: no module is named {target}", _adaptable(model))
        if any(isinstance(module, NormHead) for module in modules):
            raise UserError(
                f"--lora_targets {target}: the head of {type(model).__name__} normalises its rows, which does not "
                "commute with a low-rank update: base and adapter would not merge into one weight",
                f"leave {target} out of --lora_targets",
            )


def _adaptable(model: PreTrainedModel) -> str:
    names = _expert_parameters(model) | {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and not isinstance(module, NormHead)
    }
    return f"take some of {', '.join(sorted(names))}, or all-linear"


def _rows_to_train(
    model: PreTrainedModel, lora: LoraArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """Token ids whose rows are trained in full, by the name of the module that holds the rows.

    Raises:
        UserError: the base has never seen the special tokens of the template, and their rows are not or cannot be
            trained.
    """
    end, written = _template_tokens(tokenizer)
    loaded = None if model.device.type == "meta" else model.generation_config  # not loaded for memory estimates
    known = known_ends(model.name_or_path or "", tokenizer, loaded)
    tokens = sorted(written - known)
    unseen = end not in known
    if not tokens or not (unseen or lora.train_special_tokens == "always"):
        return {}
    names = " ".join(tokenizer.convert_ids_to_tokens(tokens))
    reason = f"the base has never ended an answer with {tokenizer.convert_ids_to_tokens(end)}"
    if lora.train_special_tokens == "never":
        raise UserError(
            f"{reason}, and an adapter alone hardly teaches it to: answers would not stop",
            "--train_special_tokens auto trains the rows of the special tokens; or take a chat model, or "
            f"{pipeline_name('finetune')}",
        )
    if is_deepspeed_zero3_enabled():
        raise UserError(
            f"the rows of {names} are to be trained, and peft cannot train single rows of partitioned weights (ZeRO-3)"
            + (f"; without them, answers would not stop, as {reason}" if unseen else ""),
            f"ZERO=2, a chat model as base, or {pipeline_name('finetune')}",
        )
    rows = _rows_by_module(model, lora, tokens, end if end in tokens else None)
    if rows and is_first_process():
        say(f"LoRA also trains the rows of {names} in {' and '.join(rows)}" + (f": {reason}" if unseen else ""))
    return rows


def _template_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, set[int]]:
    """The token that ends an answer in the chat template, and all special tokens that the template writes."""
    question: list[Message] = [{"role": "user", "content": "问"}]
    row = encode_conversation([*question, {"role": "assistant", "content": "答"}], tokenizer)[0]
    end = [label for label in row.labels if label != IGNORE_INDEX][-1]
    written = {*row.input_ids, *encode_prompt(question, tokenizer)}
    return end, {end} | (written & tokenizer.added_tokens_decoder.keys())


def _rows_by_module(
    model: PreTrainedModel, lora: LoraArguments, tokens: list[int], end: int | None
) -> dict[str, list[int]]:
    """The embedding with all tokens, and an untied head with the end token, which it has to predict.

    Modules with an adapter of their own learn their rows through that.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {
        module: name
        for name, module in model.named_modules()
        if not any(_matches(name, target) for target in lora.lora_targets)
    }
    rows = {names[embedding]: tokens} if embedding in names else {}
    if end is not None and isinstance(head, nn.Module) and head in names and head.weight is not embedding.weight:
        if type(head) is not nn.Linear or head.bias is not None:
            raise UserError(
                f"the base has never ended an answer with token {end}, and single rows of its head, "
                f"{type(head).__name__}, cannot be trained",
                f"take a chat model as base, or {pipeline_name('finetune')}",
            )
        rows[names[head]] = [end]
    return rows
