"""Names that users bring from LLaMA-Factory, ms-swift and TRL, and our counterparts.

The error for an unknown option, `convert-config` and docs/coming_from.md all read this one table. Other names of the
model, which are taken as they are, are settled here as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import IS_CHECKOUT
from novelgpt.settings.remedies import as_typed, python_module

TOOLS = {"L": "LLaMA-Factory", "S": "ms-swift", "T": "TRL"}
# Other names of --model; the second kind names an adapter, whose base the first kind names.
OF_MODEL = ("model_name_or_path",)
OF_ADAPTER = ("adapter_name_or_path", "adapters")
OTHER_NAMES = (*OF_MODEL, *OF_ADAPTER)
MODEL_NAMES = ("model", "base", *OTHER_NAMES)


@dataclass(frozen=True)
class PeerName:
    """Our counterpart of a peer's option.

    Attributes:
        tools: whose name it is, in letters of TOOLS.
        options: ours that take its place; none where there is no counterpart.
        here: what to write, or why nothing is to be written.
    """

    tools: str
    options: tuple[str, ...]
    here: str

    def whose(self) -> str:
        """Return the names of the tools."""
        *others, last = (TOOLS[letter] for letter in self.tools)
        return f"{', '.join(others)} and {last}" if others else last


PIPELINE = "the pipeline says it: finetune_lora, finetune (all weights) or pretrain (raw text)"
ANSWERS_ONLY = "the loss counts all answers and their end tokens, never prompts; pretrain trains whole texts"
NOT_HERE = "there is none"
AUTOMATIC = "automatic: leave it out"
# Tools, their names, options of ours, what to write (the option itself where it is empty).
_TABLE: tuple[tuple[str, str, str, str], ...] = (
    ("S", "model_id_or_path", "model", ""),
    ("LST", "model_revision", "model", "model: the folder of a download (hf download NAME --revision REVISION)"),
    ("S", "use_hf", "hub", "hub: names are looked up on Hugging Face unless it says modelscope"),
    ("L", "hf_hub_token ms_hub_token om_hub_token", "", "the environment variable HF_TOKEN, or modelscope's login"),
    ("L", "cache_dir", "", "the environment variable HF_HOME or MODELSCOPE_CACHE"),
    ("ST", "torch_dtype dtype", "precision", ""),
    ("L", "infer_dtype", "precision", "precision, of training; predict computes in what the device has"),
    ("L", "pure_bf16", "precision", "precision: bf16, over fp32 weights in full training"),
    ("LST", "flash_attn attn attn_impl use_flash_attn attn_implementation", "attention", ""),
    ("LS", "rope_scaling max_model_len", "", "write rope_parameters into the model's own config.json"),
    ("LST", "quantization_bit quant_bits load_in_4bit", "qlora", "qlora: true, of 4 bits"),
    ("T", "load_in_8bit", "qlora", "qlora: true, of 4 bits; there are no 8 bits"),
    ("LST", "quantization_method quantization_type double_quantization quant_method bnb_4bit_quant_type "
     "bnb_4bit_use_double_quant bnb_4bit_compute_dtype bnb_4bit_quant_storage use_bnb_nested_quant", "qlora",
     "qlora: true is bitsandbytes' nf4 with double quantization"),
    ("L", "quantization_device_map", "", NOT_HERE),
    ("L", "enable_liger_kernel use_liger", "use_liger_kernel", ""),
    ("L", "use_unsloth use_v1_kernels shift_attn mixture_of_depths use_kt", "", NOT_HERE),
    ("L", "disable_gradient_checkpointing", "activation_checkpointing", "activation_checkpointing: false"),
    ("L", "use_unsloth_gc use_reentrant_gc", "activation_checkpointing", ""),
    ("S", "vit_gradient_checkpointing", "activation_checkpointing", ""),
    ("L", "moe_aux_loss_coef", "router_aux_loss_coef", ""),
    ("LS", "resize_vocab add_tokens add_special_tokens new_special_tokens new_special_tokens_config "
     "init_special_tokens", "", "add tokens to the model's folder before training, with transformers"),
    ("L", "use_fast_tokenizer low_cpu_mem_usage use_kv_cache offload_folder", "", AUTOMATIC),
    ("L", "split_special_tokens", "", "special tokens that a text spells are always text"),
    ("L", "upcast_layernorm upcast_lmhead_output", "", "weights that train are fp32, and so is the loss"),
    ("L", "train_from_scratch", "config_name tokenizer_name",
     "config_name, a ready size or a config.json, with tokenizer_name, in pretrain"),
    ("LS", "infer_backend", "endpoint", "endpoint: the URL of a server such as vLLM's, in predict"),
    ("L", "print_param_status", "", AUTOMATIC),
    # Method.
    ("L", "stage", "", PIPELINE),
    ("LST", "finetuning_type train_type tuner_type sft_type use_peft", "", PIPELINE),
    ("T", "lora_r", "lora_rank", ""),
    ("L", "lora_target", "lora_targets", "lora_targets; all is all-linear"),
    ("ST", "target_modules lora_target_modules", "lora_targets", ""),
    ("S", "target_regex", "lora_targets", "lora_targets: the ends of the modules' names"),
    ("ST", "target_parameters lora_target_parameters", "lora_targets",
     "lora_targets: all-linear reaches a mixture's experts, too"),
    ("LST", "additional_target modules_to_save lora_modules_to_save", "train_special_tokens",
     "train_special_tokens trains the rows of the chat template's special tokens; other modules are not trained beside "
     "an adapter"),
    ("LS", "pissa_init pissa_iter pissa_convert init_weights", "", "adapters start at zero"),
    ("LS", "loraplus_lr_ratio loraplus_lr_embedding lorap_lr_ratio", "", "one learning_rate for the whole adapter"),
    ("S", "lora_bias lora_dtype use_swift_lora", "", NOT_HERE),
    ("S", "tuner_backend", "", "peft makes the adapters"),
    ("T", "lora_task_type", "", AUTOMATIC),
    ("L", "create_new_adapter", "model",
     "model: the base with the old adapter merged into it; a training makes a new one"),
    ("L", "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro", "",
     "all weights train (finetune), or an adapter (finetune_lora)"),
    ("S", "freeze_parameters freeze_parameters_ratio freeze_parameters_regex trainable_parameters "
     "trainable_parameters_regex", "", "all weights train (finetune), or an adapter (finetune_lora)"),
    ("LS", "use_galore", "optim optim_target_modules", "optim: galore_adamw with optim_target_modules"),
    ("L", "use_apollo", "optim optim_target_modules", "optim: apollo_adamw with optim_target_modules"),
    ("L", "use_badam use_adam_mini use_muon", "", "optim takes the optimizers that transformers knows"),
    ("LST", "use_dft_loss enable_dft_loss use_asft_loss use_eaft_loss loss_type", "",
     "the loss is the mean over the trained tokens"),
    ("L", "pref_beta pref_loss pref_ftx ref_model reward_model", "",
     "there is no training on preferences here: TRL and LLaMA-Factory have it"),
    ("L", "fp8 fp8_backend", "precision", "precision: bf16; there is no fp8"),
    # Data.
    ("T", "dataset_name datasets", "train_files", "train_files: paths, patterns, or hf://OWNER/NAME:SUBSET:SPLIT"),
    ("ST", "val_dataset dataset_test_split", "valid_files",
     "valid_files: paths, patterns, or hf://OWNER/NAME:SUBSET:SPLIT"),
    ("S", "custom_dataset_info", "dataset_dir", "dataset_dir: the folder of a dataset_info.json as LLaMA-Factory's"),
    ("L", "media_dir", "", "there are no pictures or sounds here"),
    ("LST", "val_size split_dataset_ratio dataset_test_ratio test_split_size", "valid_fraction",
     "valid_fraction, a share"),
    ("LST", "cutoff_len max_seq_length max_seq_len", "max_length", ""),
    ("ST", "truncation_strategy truncation_mode", "overlong", "overlong: truncate, split, drop or refuse"),
    ("LS", "template template_type", "",
     "automatic: the tokenizer's own chat template; a file chat_template.jinja in the model's folder sets another"),
    ("T", "chat_template_path", "",
     "automatic: the tokenizer's own chat template; a file chat_template.jinja in the model's folder sets another"),
    ("LS", "default_system system", "", "give the rows a field system"),
    ("L", "max_samples", "max_rows", "max_rows, the first ones of each name; rows.jsonl#1000 draws some"),
    ("S", "loss_scale", "mask_history",
     "mask_history where it is last_round; an answer or a row says otherwise how much it counts: \"weight\": 0.5"),
    ("LT", "train_on_prompt completion_only_loss assistant_only_loss", "", ANSWERS_ONLY),
    ("L", "ignore_pad_token_for_loss", "", "padding is never trained"),
    ("L", "neat_packing", "packing", "packing, in which documents never see each other"),
    ("ST", "packing_strategy packing_length packing_num_proc eval_packing padding_free", "packing",
     "packing, of whole rows, in packs of max_length tokens"),
    ("T", "pad_to_multiple_of", "", AUTOMATIC),
    ("LST", "preprocessing_num_workers preprocessing_batch_size dataset_num_proc", "", "all cores are used"),
    ("LST", "overwrite_cache load_from_cache_file lazy_tokenize download_mode data_shared_file_system "
     "dataset_kwargs skip_prepare_dataset", "", AUTOMATIC),
    ("T", "dataset_streaming", "streaming",
     "streaming, of conversations, with max_steps and valid_files; text is tokenised first: `dataset tokens`"),
    ("LS", "buffer_size shuffle_buffer_size", "buffer_rows", ""),
    ("LS", "mix_strategy interleave_probs interleave_prob stopping_strategy", "mix",
     "mix: the passes over each file in an epoch (mix: a.jsonl=2 b.jsonl=0.3), in place of probabilities; without it, "
     "the rows of all train_files are shuffled together"),
    ("LS", "tokenized_path cached_dataset cached_val_dataset", "train_files",
     "train_files takes a folder of `dataset tokens`, in pretraining"),
    ("LS", "tool_format agent_template", "", "calls of tools are written as the tokenizer's own chat template does"),
    ("LS", "enable_thinking preserve_thinking add_non_thinking_prefix", "", "the answers in the rows decide"),
    ("T", "dataset_text_field", "text_column", "text_column, in pretraining"),
    ("T", "dataset_config dataset_train_split", "train_files", "train_files: hf://OWNER/NAME:SUBSET:SPLIT"),
    ("T", "eos_token pad_token", "", "the tokenizer and its chat template say them"),
    ("ST", "dataset_shuffle val_dataset_shuffle shuffle_dataset train_dataloader_shuffle", "", "rows are shuffled"),
    ("LS", "disable_shuffling", "", "rows are shuffled, in an order that the seed decides"),
    ("S", "group_by_length", "train_sampling_strategy", "train_sampling_strategy: group_by_length"),
    # Training and results.
    ("LS", "warmup_ratio", "warmup_steps", "warmup_steps, a share where below 1: 0.1 is a tenth of the run"),
    ("LST", "evaluation_strategy", "eval_strategy", ""),
    ("LS", "predict_with_generate", "predict_during_eval", "predict_during_eval: how many rows; or predict afterwards"),
    ("LS", "generation_max_length", "predict_max_new_tokens", ""),
    ("L", "eval_num_beams generation_num_beams", "num_beams", "num_beams, in predict"),
    ("L", "compute_accuracy", "", "every evaluation gives token_accuracy"),
    ("L", "eval_on_each_dataset", "", "one evaluation of all valid_files"),
    ("LS", "early_stopping_steps early_stop_interval", "metric_for_best_model",
     "metric_for_best_model: the best checkpoint is always kept; a run goes to its end"),
    ("L", "plot_loss", "", "every run draws loss.png"),
    ("L", "use_swanlab", "report_to", "report_to: swanlab"),
    ("LS", "swanlab_project swanlab_workspace swanlab_run_name swanlab_exp_name swanlab_mode swanlab_api_key "
     "swanlab_token swanlab_logdir", "report_to", "report_to: swanlab, with its own environment variables (SWANLAB_…)"),
    ("LT", "include_effective_tokens_per_second include_tokens_per_second", "", "tokens/s are always logged"),
    ("LST", "logging_dir", "", "TensorBoard's events are in logs/ of the run folder"),
    ("LST", "save_safetensors safe_serialization", "", "weights are always saved as safetensors"),
    ("S", "add_version create_checkpoint_symlink", "", "a run folder is never overwritten unasked"),
    ("S", "max_epochs", "num_train_epochs", ""),
    ("S", "acc_strategy", "", "the loss is the mean over the trained tokens of a whole step"),
    ("S", "optimizer", "optim", ""),
    ("S", "sequence_parallel_size", "", NOT_HERE),
    ("S", "check_model use_logits_to_keep external_plugins custom_register_path model_kwargs model_type task_type",
     "", NOT_HERE),
    ("S", "self_cognition_sample model_name model_author", "", NOT_HERE),
    ("T", "activation_offloading", "activation_checkpointing", ""),
    ("T", "model_init_kwargs", "", NOT_HERE),
    ("L", "ray_run_name ray_num_workers ray_init_kwargs", "", NOT_HERE),
    ("L", "export_dir", "", "`finetune_lora.merge ADAPTER FOLDER`"),
    ("S", "merge_lora", "", "`finetune_lora.merge ADAPTER FOLDER`"),
    ("S", "max_tokens", "max_new_tokens", "max_new_tokens, in predict"),
)  # fmt: skip
PEER_NAMES = {
    name: PeerName(tools, tuple(options.split()), here or options)
    for tools, names, options, here in _TABLE
    for name in names.split()
}


def explain(key: str, options: Collection[str], command: str) -> tuple[str, str] | None:
    """Whose name an unknown option is, and what to write in its place; None where no peer has it.

    Args:
        key: as given.
        options: that the command takes.
        command: its name.
    """
    known = PEER_NAMES.get(key.lstrip("-").replace("-", "_"))
    if known is None:
        return None
    foreign = [option for option in known.options if option not in options]
    here = as_typed(known.here) + (
        f" ({' and '.join(foreign)} is for another pipeline than {command})" if foreign else ""
    )
    page = "; docs/coming_from.md has all names" if IS_CHECKOUT else ""
    remedy = f"convert a whole file with {python_module('cli.convert_config FILE')}{page}"
    return f"a name of {known.whose()}: here {here}", remedy


def settle_model(layers: Sequence[tuple[str, Mapping[str, Any]]], takes_base: bool) -> dict[str, str]:
    """The model, and its base where an adapter is named, by whatever names they were given.

    Args:
        layers: where settings stand, and those of MODEL_NAMES that they set; later layers win over earlier ones.
        takes_base: whether the command takes adapters.

    Returns:
        {"model", "base"}; what is not there was not named.

    Raises:
        UserError: names that mean the same disagree within a layer, or an adapter is named where none is taken.
    """
    found: dict[str, tuple[str, str]] = {}  # kind -> name, value
    for where, settings in layers:
        for kind, names in (("model", ("model", *OF_MODEL)), ("base", ("base",)), ("adapter", OF_ADAPTER)):
            given = [(name, settings[name]) for name in names if settings.get(name) is not None]
            if len({value for _, value in given}) > 1:
                (one, first), (other, second) = given[0], given[-1]
                raise UserError(f"{where}: {one} is {first} and {other} is {second}", "name one model, by one name")
            if given:
                found[kind] = given[0]
    result: dict[str, str] = {kind: found[kind][1] for kind in ("model", "base") if kind in found}
    if "adapter" not in found:
        return result
    name, adapter = found["adapter"]
    if not takes_base:
        raise UserError(
            f"{name} {adapter}: a training starts from a base, and makes an adapter of its own",
            f"merge it first: {python_module('finetune_lora.merge ADAPTER FOLDER')}, then model: FOLDER; an unfinished "
            "run resumes when its command is repeated",
        )
    named_by, model = found.get("model", ("", adapter))
    if named_by == "model" and model != adapter:
        raise UserError(f"model is {model} and {name} is {adapter}", "name the adapter with model, its base with base")
    if named_by in OF_MODEL:
        if result.get("base", model) != model:
            raise UserError(f"base is {result['base']} and {named_by} is {model}", "name one base")
        result["base"] = model
    return result | {"model": adapter}
