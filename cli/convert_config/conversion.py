"""What becomes of another tool's settings: ours, each with where it comes from, and a word on each that has none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cli.convert_config.values import typed
from novelgpt.settings.errors import UserError
from novelgpt.settings.peer_names import ANSWERS_ONLY, PEER_NAMES
from novelgpt.settings.remedies import as_typed, pipeline_name

Kind = Literal["same", "differs", "missing"]
KINDS: dict[Kind, str] = {
    "same": "Needs nothing here",
    "differs": "Is different here",
    "missing": "Has no counterpart here, and training differs without it",
}
MARKS = (
    "a base that has never ended an answer with the chat template's marks gets their embedding rows trained as well: "
    "train_mark_tokens"
)
QLORA = "a base is held in 4 bits (qlora: true), beside an adapter alone"
TEMPLATE = (
    "the tokenizer's own chat template is used; a base that has none gets ChatML or plain questions and answers. "
    "Compare a row: `dataset preview`; a file chat_template.jinja in the model's folder sets another"
)
THINKING = (
    "each answer decides: with a thought of its own it is asked for with thinking on; without one, the empty thought "
    "belongs to the prompt and is not trained"
)
# Names of peers whose values are ours as well.
_RENAMED = (
    "cutoff_len", "max_seq_length", "max_seq_len", "lora_r", "enable_liger_kernel", "use_liger", "moe_aux_loss_coef",
    "evaluation_strategy", "max_epochs",
)  # fmt: skip
# Options of one name and one meaning in all tools: fields of transformers.TrainingArguments, and of adapters.
_SHARED = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate",
    "num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "optim_target_modules", "seed", "data_seed",
    "logging_steps", "logging_strategy", "logging_first_step", "logging_nan_inf_filter", "log_level",
    "eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "eval_accumulation_steps",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_backend", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataloader_drop_last", "dataloader_pin_memory", "neftune_noise_alpha", "label_smoothing_factor",
    "full_determinism", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
    "run_name", "project", "disable_tqdm", "train_sampling_strategy", "router_aux_loss_coef", "use_rslora", "use_dora",
    "lora_rank", "lora_dropout", "packing", "max_length", "trust_remote_code", "warmup_steps", "fsdp", "fsdp_config",
    "torch_empty_cache_steps", "average_tokens_across_devices",
)  # fmt: skip
_OF_ADAPTERS = ("lora_rank", "lora_dropout", "use_rslora", "use_dora")
_DEEPSPEED = re.compile(r"(?:ds_)?z(?:ero)?[_-]?([0-3])(_offload)?(?:_config)?(?:\.json)?")


@dataclass
class Setting:
    """One of ours.

    Attributes:
        value: that is written.
        origin: the peer's setting, or why it is written.
    """

    value: Any
    origin: str


@dataclass
class Note:
    """What becomes of a setting that has no counterpart, or not quite."""

    key: str
    kind: Kind
    text: str


@dataclass
class Conversion:
    """The state of a conversion.

    Attributes:
        tool: whose settings they are, with its version.
        file: they stand in.
        root: the folder in which the tool is called: relative paths start there.
        given: what the file says.
        defaults: what the tool takes where the file says nothing, by its own names.
        pipeline: ours.
        settings: ours, by name.
        notes: on what has no counterpart, or not quite.
        named: keys that a setting or a note tells of.
    """

    tool: str
    file: Path
    root: Path
    given: dict[str, Any]
    defaults: Mapping[str, Any]
    pipeline: str = "finetune"
    settings: dict[str, Setting] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Take the values as the kinds that the keys ask for.

        Raises:
            UserError: one is of another kind.
        """
        self.given = typed(self.file, self.given, self.defaults)

    def value(self, key: str) -> Any:
        """What the tool would take: the file's, or its default."""
        given = self.given.get(key)
        return self.defaults.get(key) if given is None else given

    def set(self, option: str, value: Any, *keys: str, why: str = "") -> None:
        """Set one of ours, for the sake of the peer's `keys`."""
        parts = []
        for key in keys:
            alike = key == option and self.value(key) == value
            text = "" if alike and self.is_given(key) else f"{key}: {_short(self.value(key))}"
            parts.append(text if self.is_given(key) else f"{'' if alike else f'{text}, '}by default there")
        self.settings[option] = Setting(value, "; ".join(part for part in [*parts, why] if part))
        self.named.update(keys)

    def note(self, key: str, kind: Kind, text: str) -> None:
        """Say what becomes of a key."""
        self.named.add(key)
        self.notes.append(Note(key, kind, text))

    def is_given(self, key: str) -> bool:
        """Whether the file sets it to something."""
        return self.given.get(key) is not None

    def refuse(self, key: str, cause: str, remedy: str) -> UserError:
        """The error of a setting that cannot be converted."""
        return UserError(f"{self.file}: {key}: {_short(self.given.get(key, self.defaults.get(key)))}: {cause}", remedy)

    def path(self, text: str) -> Path:
        """A path of the file's: relative to this folder where it can be, absolute where the tool ran elsewhere."""
        path = Path(text).expanduser()
        return path if path.is_absolute() or self.root == Path() else self.root / path


Handler = Callable[[Conversion], None]


def convert_keys(conversion: Conversion, handlers: Mapping[str, Handler], taken: Collection[str]) -> None:
    """Convert what the file and the tool's defaults say, key by key, in the order of the file.

    Args:
        conversion: the state, which is filled.
        handlers: by key, for those whose values change; each also says what is to be noted.
        taken: keys that are converted elsewhere.
    """
    for key in dict.fromkeys([*conversion.given, *conversion.defaults]):
        if key in taken:
            continue
        if key in handlers:
            handlers[key](conversion)
        elif key in _SHARED or key in _RENAMED:
            _pass_on(conversion, key)
        elif conversion.is_given(key):
            _note_known(conversion, key)
    if not conversion.is_given("save_total_limit") and conversion.value("save_strategy") != "no":
        text = (
            f"{conversion.tool} keeps all checkpoints by default, and here the newest two stay; set as many as you want"
        )
        conversion.note("save_total_limit", "differs", text)
    for key, value in conversion.given.items():
        if key not in conversion.named:
            known = PEER_NAMES.get(key)
            told = as_typed(known.here) if known and not known.options else "the settings above hold what it says"
            conversion.note(key, "same", "it is not set" if value is None else told)


def _pass_on(conversion: Conversion, key: str) -> None:
    option = PEER_NAMES[key].options[0] if key in _RENAMED else key
    value = conversion.value(key)
    if option in _OF_ADAPTERS and conversion.pipeline != "finetune_lora":
        if conversion.is_given(key):
            conversion.note(key, "same", "the pipeline trains no adapter")
    elif value is not None:
        conversion.set(option, value, key)


def _note_known(conversion: Conversion, key: str) -> None:
    """A key without handler: what the table of names says, or that nobody knows it."""
    value = conversion.given[key]
    known = PEER_NAMES.get(key)
    if value in (False, "", [], "none", "None") or value == conversion.defaults.get(key):
        conversion.note(key, "same", "it is off, or as the tool has it by default")
    elif known is None:
        conversion.note(key, "missing", f"not known here: check how {conversion.tool} spells it, and what it does")
    elif not known.options and key not in _CHANGES_TRAINING:
        conversion.note(key, "same", as_typed(known.here))
    else:
        conversion.note(key, "missing" if key in _CHANGES_TRAINING else "differs", f"here {as_typed(known.here)}")


# Names without a counterpart that change what is trained, or how.
_CHANGES_TRAINING = (
    "rope_scaling", "max_model_len", "use_unsloth", "shift_attn", "mixture_of_depths", "use_kt", "resize_vocab",
    "add_tokens", "add_special_tokens", "new_special_tokens", "new_special_tokens_config", "train_from_scratch",
    "additional_target", "modules_to_save", "lora_modules_to_save", "pissa_init", "init_weights", "loraplus_lr_ratio",
    "lorap_lr_ratio", "lora_bias", "create_new_adapter", "use_llama_pro", "freeze_parameters",
    "freeze_parameters_ratio",
    "freeze_parameters_regex", "trainable_parameters", "trainable_parameters_regex", "use_galore", "use_apollo",
    "use_badam", "use_adam_mini", "use_muon", "use_dft_loss", "enable_dft_loss", "use_asft_loss", "use_eaft_loss",
    "loss_type", "fp8", "train_on_prompt", "streaming", "dataset_streaming", "mix_strategy", "interleave_probs",
    "interleave_prob", "tokenized_path", "cached_dataset", "tool_format", "agent_template", "early_stopping_steps",
    "early_stop_interval", "sequence_parallel_size", "target_regex", "target_parameters", "lora_target_parameters",
    "model_revision", "chat_template_path", "eos_token", "disable_shuffling", "external_plugins", "optimizer",
    "model_init_kwargs", "template_type", "model_type", "task_type", "custom_dataset_info", "load_in_8bit",
)  # fmt: skip


def precision(conversion: Conversion) -> None:
    """bf16, fp16 and pure_bf16 say together in which format is computed."""
    keys = [key for key in ("bf16", "fp16", "pure_bf16") if conversion.value(key)]
    if "precision" in conversion.settings:
        return
    if len({key[-4:] for key in keys}) > 1:
        raise conversion.refuse(keys[0], f"{' and '.join(keys)} at once", "choose one")
    chosen = "fp32" if not keys else keys[0][-4:]
    conversion.set("precision", chosen, *(keys or ["bf16"]))
    if "pure_bf16" in keys:
        conversion.note("pure_bf16", "differs", "full training keeps fp32 weights beside bf16: more memory, same steps")


def warmup(conversion: Conversion) -> None:
    """Steps where they are set, or else the share."""
    steps, share = conversion.value("warmup_steps") or 0, conversion.value("warmup_ratio") or 0
    if "warmup_steps" not in conversion.settings:
        if steps and share:
            conversion.note("warmup_ratio", "same", "warmup_steps is set as well, and wins")
        conversion.set("warmup_steps", steps or share, "warmup_steps" if steps or not share else "warmup_ratio")


def deepspeed(conversion: Conversion) -> None:
    """Files of known names are settings that come with this toolkit."""
    value = conversion.value("deepspeed")
    if value is None or value == "":
        return
    match = _DEEPSPEED.fullmatch(Path(value).name) if isinstance(value, str) else None
    if match and match[1] == "0":
        conversion.note("deepspeed", "same", "stage 0 is plain data parallelism: the default for one process; ZERO=0")
    elif match and not (match[1] == "1" and match[2]):
        conversion.set("deepspeed", f"zero{match[1]}{match[2] or ''}", "deepspeed")
        conversion.note("deepspeed", "differs", "the settings of that name that come with this toolkit are taken")
    else:
        conversion.set("deepspeed", str(conversion.path(value)) if isinstance(value, str) else value, "deepspeed")


def output_dir(conversion: Conversion) -> None:
    """The folder of the run, as the tool has it."""
    if conversion.value("output_dir"):
        conversion.set("output_dir", str(conversion.value("output_dir")), "output_dir")


def overwrite(conversion: Conversion) -> None:
    """Here it deletes what is there."""
    if conversion.value("overwrite_output_dir"):
        text = "here it empties the folder before it trains; type --overwrite_output_dir where you mean that"
        conversion.note("overwrite_output_dir", "differs", text)


def resume(conversion: Conversion) -> None:
    """Checkpoints of other tools are no checkpoints here."""
    value = conversion.value("resume_from_checkpoint")
    if value not in (None, False, "false"):
        text = "a run goes on when its command is typed again; a checkpoint of another tool can only be a base (model)"
        conversion.note("resume_from_checkpoint", "differs" if value in (True, "true") else "missing", text)


def trackers(conversion: Conversion) -> None:
    """TensorBoard is always on."""
    value = conversion.value("report_to")
    names = [value] if isinstance(value, str) else list(value)
    if conversion.value("use_swanlab"):
        names.append("swanlab")
    names = [name for name in names if name not in ("tensorboard", "none", "null")]
    conversion.set("report_to", sorted(set(names)) or "none", "report_to", why="TensorBoard is always on")


def check_trains(conversion: Conversion) -> None:
    """Only trainings are converted."""
    if conversion.value("do_train") is False:
        raise conversion.refuse("do_train", "it trains nothing", f"answer rows with {pipeline_name('predict')}")
    if conversion.is_given("do_train"):
        conversion.note("do_train", "same", "a pipeline trains")


def all_tokens(conversion: Conversion, key: str) -> None:
    """Prompts in the loss."""
    if conversion.value(key):
        conversion.note(key, "missing", ANSWERS_ONLY)


def attention(names: Mapping[str, str]) -> Handler:
    """A handler that turns the tool's names of attention kernels into ours.

    Args:
        names: the tool's -> ours; "" for the default.
    """

    def handle(conversion: Conversion) -> None:
        for key in ("flash_attn", "attn", "attn_impl", "attn_implementation"):
            if not conversion.is_given(key) or "attention" in conversion.settings:
                continue
            ours = names.get(str(conversion.given[key]))
            if ours is None:
                conversion.note(key, "differs", "here attention: packed (the default), sdpa, eager, flash_attention_2")
            elif ours:
                conversion.set("attention", ours, key)
            else:
                conversion.note(key, "same", "packed, the default, is torch's own attention")

    return handle


def lora_targets(key: str, everything: str) -> Handler:
    """A handler for the modules of an adapter, whose names may stand in one text."""

    def handle(conversion: Conversion) -> None:
        value = conversion.value(key)
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])
        if conversion.pipeline == "finetune_lora":
            conversion.set("lora_targets", ["all-linear"] if names == [everything] else names, key)
        elif conversion.is_given(key):
            conversion.note(key, "same", "the pipeline trains no adapter")

    return handle


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text[1:-1] if isinstance(value, str) and len(text) > 2 else text
    return text if len(text) <= 60 else f"{text[:60]}…"
