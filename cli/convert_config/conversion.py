"""The conversion of another tool's settings: ours, each with its origin, and a note on each that has no equivalent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cli.convert_config.source import convert_types
from novelgpt.settings.errors import UserError
from novelgpt.settings.peer_names import PEER_NAMES
from novelgpt.settings.remedies import as_typed

Kind = Literal["same", "differs", "missing"]
KINDS: dict[Kind, str] = {
    "same": "Needs nothing here",
    "differs": "Is different here",
    "missing": "Has no counterpart here, and training differs without it",
}
MARKS = (
    "if the base was never trained on the chat template's special tokens, their embedding rows are trained as well: "
    "train_special_tokens"
)
TEMPLATE = (
    "the tokenizer's own chat template is used; a base that has none gets ChatML or plain questions and answers. "
    "Compare a row: `dataset preview`; a file chat_template.jinja in the model's folder sets another"
)
# Names of peers whose values are ours as well.
RENAMED = (
    "cutoff_len", "max_seq_length", "max_seq_len", "lora_r", "enable_liger_kernel", "use_liger", "moe_aux_loss_coef",
    "evaluation_strategy", "max_epochs",
)  # fmt: skip
# Options with the same name and meaning in all tools: fields of transformers.TrainingArguments, and of adapters.
SHARED = (
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
_OF_ADAPTERS = ("lora_targets", "lora_rank", "lora_dropout", "use_rslora", "use_dora")
# Names without an equivalent that change what is trained, or how.
CHANGES_TRAINING = (
    "rope_scaling", "max_model_len", "use_unsloth", "shift_attn", "mixture_of_depths", "use_kt", "resize_vocab",
    "add_tokens", "add_special_tokens", "new_special_tokens", "new_special_tokens_config", "train_from_scratch",
    "additional_target", "modules_to_save", "lora_modules_to_save", "pissa_init", "init_weights", "loraplus_lr_ratio",
    "lorap_lr_ratio", "lora_bias", "create_new_adapter", "use_llama_pro", "freeze_parameters",
    "freeze_parameters_ratio",
    "freeze_parameters_regex", "trainable_parameters", "trainable_parameters_regex", "use_galore", "use_apollo",
    "use_badam", "use_adam_mini", "use_muon", "use_dft_loss", "enable_dft_loss", "use_asft_loss", "use_eaft_loss",
    "loss_type", "fp8", "train_on_prompt", "dataset_streaming", "mix_strategy", "interleave_probs",
    "interleave_prob", "tokenized_path", "cached_dataset", "tool_format", "agent_template", "early_stopping_steps",
    "early_stop_interval", "sequence_parallel_size", "target_regex", "target_parameters", "lora_target_parameters",
    "model_revision", "chat_template_path", "eos_token", "disable_shuffling", "external_plugins", "optimizer",
    "model_init_kwargs", "template_type", "model_type", "task_type", "custom_dataset_info", "load_in_8bit",
)  # fmt: skip
_DEEPSPEED = re.compile(r"(?:ds_)?z(?:ero)?[_-]?([0-3])(_offload)?(?:_config)?(?:\.json)?")


Handler = Callable[["Conversion", str], None]
"""(state, key of the peer): converts the key's value."""


@dataclass(frozen=True)
class Peer:
    """A tool whose settings are converted.

    Attributes:
        tool: name and version.
        model_key: its name for the base.
        lora_targets: its name for the modules of an adapter, and the value that means all linear ones.
        attention: its names of attention kernels -> ours; "" for the default.
        defaults: by its own names, where they are not ours.
        pipeline: names ours. Raises UserError for a training that is not here.
        datasets: converts what names the rows.
        taken: keys that `pipeline`, `datasets` and `derived` convert.
        handlers: by key, convert a value and add its notes.
        notes: by key, for keys that are noted whatever their value.
        values: by key, our option and the function that makes its value.
        derived: converts what the tool derives from several settings, last.
    """

    tool: str
    model_key: str
    lora_targets: tuple[str, str]
    attention: Mapping[str, str]
    defaults: Mapping[str, Any]
    pipeline: Callable[[Conversion], str]
    datasets: Callable[[Conversion], None]
    taken: Sequence[str]
    handlers: Mapping[str, Handler]
    notes: Mapping[str, tuple[Kind, str]]
    values: Mapping[str, tuple[str, Callable[[Any], Any]]] = field(default_factory=dict)
    derived: Callable[[Conversion], None] = lambda conversion: None


@dataclass
class Conversion:
    """The state of a conversion.

    Attributes:
        peer: whose settings they are.
        file: that holds them.
        root: the folder in which the tool is called: relative paths start there.
        given: what the file says.
        output_data: folder for rows that must be written; None where the user named none.
        pipeline: ours.
        settings: ours, by name.
        origins: of each setting, the peer's settings that it comes from, or the reason for it.
        notes: "key: text" on what has no equivalent, or not quite.
        named: keys that a setting or a note mentions.
        rows: number of rows of each file that is read, by its path in our settings.
        written: rows that must be written, by file.
    """

    peer: Peer
    file: Path
    root: Path
    given: dict[str, Any]
    output_data: Path | None = None
    pipeline: str = "finetune"
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: dict[Kind, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    named: set[str] = field(default_factory=set)
    rows: dict[str, int] = field(default_factory=dict)
    written: dict[Path, str] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """What the tool would use: the file's value, or its default."""
        given = self.given.get(key)
        return self.peer.defaults.get(key) if given is None else given

    def is_given(self, key: str) -> bool:
        """Whether the file sets it to something."""
        return self.given.get(key) is not None

    def set(self, option: str, value: Any, *keys: str, why: str = "") -> None:
        """Set one of ours because of the peer's `keys`."""
        parts = []
        for key in keys:
            alike = key == option and self.value(key) == value
            text = "" if alike and self.is_given(key) else f"{key}: {_short(self.value(key))}"
            parts.append(text if self.is_given(key) else f"{'' if alike else f'{text}, '}by default there")
        self.settings[option] = value
        self.origins[option] = "; ".join(part for part in [*parts, why] if part)
        self.named.update(keys)

    def note(self, key: str, kind: Kind, text: str) -> None:
        """Report what becomes of a key."""
        self.named.add(key)
        self.notes[kind].append(f"{key}: {text}")

    def refuse(self, key: str, cause: str, remedy: str) -> UserError:
        """The error of a setting that cannot be converted."""
        value = self.given.get(key, self.peer.defaults.get(key))
        return UserError(f"{self.file}: {key}: {_short(value)}: {cause}", remedy)

    def path(self, text: str) -> Path:
        """A path of the file's: relative to this folder if possible, absolute where the tool ran elsewhere."""
        path = Path(text).expanduser()
        return path if path.is_absolute() or self.root == Path() else self.root / path


def convert(peer: Peer, given: dict[str, Any], file: Path, root: Path, output_data: Path | None) -> Conversion:
    """Convert the settings of a file.

    Args:
        peer: whose settings they are.
        given: what the file says.
        file: for errors.
        root: the folder in which the tool is called.
        output_data: folder for rows that must be written.

    Raises:
        UserError: a value of the wrong type, a training that is not here, or data that cannot be read.
    """
    conversion = Conversion(peer, file, root, convert_types(file, given, peer.defaults), output_data)
    conversion.pipeline = peer.pipeline(conversion)
    if not conversion.is_given(peer.model_key):
        raise conversion.refuse(peer.model_key, "no model is named", "name one")
    model = str(given[peer.model_key])
    local = conversion.path(model)
    conversion.set("model", str(local) if local.is_dir() else model, peer.model_key)
    peer.datasets(conversion)
    for key in dict.fromkeys([*conversion.given, *peer.defaults]):
        if key not in (*peer.taken, peer.model_key, "lora_alpha"):
            _convert_key(conversion, key)
    if not conversion.is_given("save_total_limit") and conversion.value("save_strategy") != "no":
        text = f"{peer.tool} keeps all checkpoints by default, and here the newest two stay; set as many as you want"
        conversion.note("save_total_limit", "differs", text)
    if conversion.pipeline == "finetune_lora":
        if alpha := conversion.value("lora_alpha"):
            conversion.set("lora_alpha", int(alpha), "lora_alpha")
        else:
            conversion.set("lora_alpha", 2 * conversion.value("lora_rank"), why="by default, it is 2 * lora_rank")
        conversion.note(peer.lora_targets[0], "differs", MARKS)
    peer.derived(conversion)
    for key, value in conversion.given.items():
        if key not in conversion.named:
            known = PEER_NAMES.get(key)
            here = as_typed(known.here) if known and not known.options else "the settings above hold what it says"
            conversion.note(key, "same", "it is not set" if value is None else here)
    return conversion


def _convert_key(conversion: Conversion, key: str) -> None:
    peer, value = conversion.peer, conversion.value(key)
    if handler := peer.handlers.get(key) or _HANDLERS.get(key):
        handler(conversion, key)
    elif key in peer.notes:
        if conversion.is_given(key):
            conversion.note(key, *peer.notes[key])
    elif key in _VALUES or key in peer.values:
        option, make = {**_VALUES, **peer.values}[key]
        if value not in (None, ""):
            conversion.set(option, make(value), key)
    elif key in SHARED or key in RENAMED or key == peer.lora_targets[0]:
        option = PEER_NAMES[key].options[0] if key in RENAMED else key
        if key == peer.lora_targets[0]:
            option, everything = "lora_targets", peer.lora_targets[1]
            names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
            value = ["all-linear"] if names == [everything] else names
        if option not in _OF_ADAPTERS or conversion.pipeline == "finetune_lora":
            if value is not None:
                conversion.set(option, value, key)
        elif conversion.is_given(key):
            conversion.note(key, "same", "the pipeline trains no adapter")
    elif conversion.is_given(key):
        _note_known(conversion, key)


def _note_known(conversion: Conversion, key: str) -> None:
    """Note a key without handler: from the table of names, or as unknown."""
    value, known = conversion.given[key], PEER_NAMES.get(key)
    if value in (False, "", [], "none", "None") or value == conversion.peer.defaults.get(key):
        conversion.note(key, "same", "off, or the tool's default")
    elif known is None:
        conversion.note(key, "missing", f"not known here: check how {conversion.peer.tool} spells it, and what it does")
    elif key in CHANGES_TRAINING:
        conversion.note(key, "missing", f"here {as_typed(known.here)}")
    elif known.options:
        conversion.note(key, "differs", f"here {as_typed(known.here)}")
    else:
        conversion.note(key, "same", as_typed(known.here))


def _precision(conversion: Conversion, _: str) -> None:
    """bf16, fp16 and pure_bf16 together name the format of computations; defaults count where none is set."""
    if "precision" in conversion.settings:
        return
    on = [key for key in ("bf16", "fp16", "pure_bf16") if conversion.value(key)]
    keys = [key for key in on if conversion.is_given(key)] or on
    if len({key[-4:] for key in keys}) > 1:
        raise conversion.refuse(keys[0], f"{' and '.join(keys)} at once", "choose one")
    conversion.set("precision", keys[0][-4:] if keys else "fp32", *(keys or ["bf16"]))
    if "pure_bf16" in keys:
        conversion.note("pure_bf16", "differs", "full training keeps fp32 weights beside bf16: more memory, same steps")


def _warmup(conversion: Conversion, _: str) -> None:
    """Steps where they are set, otherwise the share."""
    steps, share = conversion.value("warmup_steps") or 0, conversion.value("warmup_ratio") or 0
    if "warmup_steps" not in conversion.settings:
        if steps and share:
            conversion.note("warmup_ratio", "same", "warmup_steps is set as well, and wins")
        conversion.set("warmup_steps", steps or share, "warmup_steps" if steps or not share else "warmup_ratio")


def _deepspeed(conversion: Conversion, key: str) -> None:
    """Files of known names are settings that come with this toolkit."""
    value = conversion.value(key)
    match = _DEEPSPEED.fullmatch(Path(value).name) if isinstance(value, str) else None
    if match and match[1] == "0":
        conversion.note(key, "same", "stage 0 is plain data parallelism: the default for one process; ZERO=0")
    elif match and not (match[1] == "1" and match[2]):
        conversion.set(key, f"zero{match[1]}{match[2] or ''}", key)
        conversion.note(key, "differs", "the settings of that name that come with this toolkit are taken")
    elif value:
        conversion.set(key, str(conversion.path(value)) if isinstance(value, str) else value, key)


def _overwrite(conversion: Conversion, key: str) -> None:
    if conversion.value(key):
        text = "here it empties the folder before it trains; add --overwrite_output_dir if you mean that"
        conversion.note(key, "differs", text)


def _resume(conversion: Conversion, key: str) -> None:
    """Checkpoints of other tools are not checkpoints here."""
    value = conversion.value(key)
    if value not in (None, False, "false"):
        text = "a run resumes when its command is repeated; another tool's checkpoint can only be a base (model)"
        conversion.note(key, "differs" if value in (True, "true") else "missing", text)


def _streaming(conversion: Conversion, key: str) -> None:
    """A stream of conversations, and the rows that are shuffled together."""
    if not conversion.is_given(key):
        return
    if not conversion.value("streaming"):
        conversion.note(key, "same", "rows are not streamed")
    elif conversion.pipeline == "pretrain":
        conversion.note(key, "missing", "here text is tokenised before training: `dataset tokens`")
    elif key == "streaming":
        conversion.set("streaming", True, key)
    else:
        conversion.set("buffer_rows", int(conversion.value(key)), key)


def _trackers(conversion: Conversion, _: str) -> None:
    value = conversion.value("report_to")
    names = {value} if isinstance(value, str) else set(value)
    names |= {"swanlab"} if conversion.value("use_swanlab") else set()
    shown = sorted(names - {"tensorboard", "none", "null"})
    conversion.set("report_to", shown or "none", "report_to", why="TensorBoard is always on")


def attention(conversion: Conversion, key: str) -> None:
    """The attention kernel, by `Peer.attention`."""
    if not conversion.is_given(key) or "attention" in conversion.settings:
        return
    ours = conversion.peer.attention.get(str(conversion.given[key]))
    if ours is None:
        conversion.note(key, "differs", "here attention: packed (the default), sdpa, eager, flash_attention_2")
    elif ours:
        conversion.set("attention", ours, key)
    else:
        conversion.note(key, "same", "packed, the default, is torch's own attention")


def quantization(conversion: Conversion, key: str) -> None:
    """A base in 4 bits, for adapters only."""
    value = conversion.value(key)
    four_bits = (value is True or value == 4) and conversion.value("quant_method") in (None, "bnb")
    if four_bits and conversion.pipeline == "finetune_lora":
        conversion.set("qlora", True, key)
    elif value:
        conversion.note(key, "missing", "a base is held in 4 bits (qlora: true) only beside an adapter")


_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("bf16", "fp16", "pure_bf16"), _precision),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), _warmup),
    **dict.fromkeys(("report_to", "use_swanlab"), _trackers),
    "deepspeed": _deepspeed,
    "overwrite_output_dir": _overwrite,
    "resume_from_checkpoint": _resume,
    **dict.fromkeys(("streaming", "buffer_size", "shuffle_buffer_size"), _streaming),
}
_VALUES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "output_dir": ("output_dir", str),
    "gradient_checkpointing": ("activation_checkpointing", bool),
}


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text[1:-1] if isinstance(value, str) and len(text) > 2 else text
    return text if len(text) <= 60 else f"{text[:60]}…"
