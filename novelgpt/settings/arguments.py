"""The arguments of each command, in groups. Own fields are few; the rest is transformers.TrainingArguments."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, cast

import torch
from transformers import TrainingArguments

from novelgpt.settings.deepspeed_settings import (
    NAMED,
    check_deepspeed,
    deepspeed_place,
    disable_unused_build,
    release_build_locks,
)
from novelgpt.settings.errors import UserError
from novelgpt.settings.mix import format_weight, parse_mix
from novelgpt.settings.paths import SAMPLES, default_hub
from novelgpt.settings.refused_settings import precision_of_accelerate, refuse_ignored
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.small_bases import TINY, model_place

# Metrics of an evaluation that can choose the best checkpoint, and whether greater is better; those of answers need
# predict_during_eval.
EVALUATION_FIGURES = {"loss": False, "perplexity": False, "bits_per_character": False, "token_accuracy": True}
ANSWER_FIGURES = {"rouge-1": True, "rouge-2": True, "rouge-l": True, "rep4_char": False}
DATASET_DIR = "data"
DATASET_DIR_HELP = "Folder of the dataset_info.json that --dataset names are looked up in, or the file itself."
COLUMNS_HELP = (
    "Names of the rows' fields where they are others than those that are read: prompt=question,response=std_answer, or "
    "a mapping in YAML. For all files that are named; not for --dataset, whose dataset_info.json says them."
)
HUB_HELP = (
    "Hub on which names are looked up. modelscope needs the package modelscope. Default: huggingface, or modelscope "
    "where USE_MODELSCOPE_HUB=1 is set."
)
# Above it, next to nothing is left.
MOST_DROPOUT = 0.95


def _samples(*names: str) -> list[str]:
    return [str(SAMPLES / name) for name in names]


PAPERS = _samples("papers/train.jsonl")


def option(default: Any, help_text: str, former_name: str | None = None) -> Any:
    """Return a dataclass field with a help text; a list default is copied for each instance.

    Args:
        default: value.
        help_text: shown by --help.
        former_name: of the option, which is still accepted.
    """
    metadata = {"help": help_text} | ({} if former_name is None else {"aliases": [f"--{former_name}"]})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_least(arguments: object, leasts: dict[str, int]) -> None:
    """Raise a UserError where an option is below its minimum."""
    for name, least in leasts.items():
        value = vars(arguments)[name]
        if value is not None and value < least:
            raise UserError(f"--{name} {value} is too small", f"take at least {least}")


def check_ranges(arguments: object, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise a UserError where an option lies outside its range, ends included, or is NaN."""
    for name, (least, most) in ranges.items():
        value = vars(arguments)[name]
        if value is None or least <= value <= most:
            continue
        if value > most:
            raise UserError(f"--{name} {value} is too large", f"take at most {most:g}")
        too_small = value < least
        cause = f"--{name} {value} is too small" if too_small else f"--{name} {value} is not a number"
        raise UserError(cause, f"take at least {least:g}" if too_small else f"take one from {least:g} to {most:g}")


@dataclass
class ModelArguments:
    """The base model, and how to load it."""

    _argument_group_name: ClassVar[str] = "Model"

    model: str = option(
        TINY,
        "Folder or hub name of the base model, loaded through AutoModel; tiny is the small base, trained with the "
        "settings in PIPELINE/configs/tiny.yaml. Required with training files of your own.",
    )
    attention: Literal["packed", "sdpa", "eager", "flash_attention_2"] = option(
        "packed",
        "Attention kernel. packed: torch's own; packed documents cost what each would alone, and none attends to "
        "another. flash_attention_2 needs the package flash-attn and a GPU.",
    )
    trust_remote_code: bool = option(
        False, "Run Python code from the checkpoint's folder where the architecture is unknown here. Read it first."
    )
    hub: Literal["huggingface", "modelscope"] | None = option(None, HUB_HELP)
    allow_pickles: bool = option(
        False, "Load weights from pickles (.bin) where there are no safetensors; tensors only. For trusted sources."
    )

    def __post_init__(self) -> None:
        """Resolve the model to a folder or a hub name, and the hub to its default.

        Raises:
            UserError: as default_hub.
        """
        self.model = model_place(self.model)
        self.hub = self.hub or default_hub()


@dataclass
class InferenceModelArguments(ModelArguments):
    """Which model generates, and how to load it."""

    model: str = option(
        "",
        "Full checkpoint, adapter folder or hub name; tiny is the small base. Default: the newest finished fine-tuning "
        "under output/; where there is none, tiny.",
    )
    base: str | None = option(
        None,
        "Folder or hub name of an adapter's base. Default: where it was in training, or its copy in the hub's cache; "
        "only a base named here is ever downloaded.",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = option("sdpa", "Attention kernel.")


@dataclass
class CorpusArguments:
    """Raw text for continued pretraining."""

    _argument_group_name: ClassVar[str] = "Data"

    train_files: list[str] = option(
        _samples("novels/deng_ta_xia_de_xin.txt"),
        "Training data: text files (.txt .jsonl .json .csv .parquet), patterns (books/*.txt), or folders made by "
        "`dataset novels` or `dataset tokens`.",
    )
    valid_files: list[str] = option(
        [],
        "Validation data: text files, or folders (their held-out part). Default: the held-out part of the folders in "
        "train_files; where there is none, the end of the training text.",
    )
    max_valid_tokens: int = option(
        1_000_000, "Max validation tokens from a folder's held-out part, or from the end of the text; 0 for all."
    )
    valid_fraction: float = option(
        0.02, "Share of the training blocks held out for validation where there are no valid_files."
    )
    text_column: str = option(
        "text",
        "Column or key of the text, for all formats but .txt. Of several, as in title,abstract, the texts are joined "
        "by line ends.",
    )
    max_length: int = option(2048, "Tokens per block. Text that does not fit continues in the next block.")
    packing: bool = option(
        True, "Pack several documents into a block; none attends to another. False: each block holds one document."
    )
    ditto: float = option(
        0.0,
        "Share of the blocks that become pseudo-repetitions, on which training lowers the probability of one more "
        "repetition (DITTO, arXiv:2206.02369): against loops in generated text.",
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: names the option.
        """
        check_ranges(self, {"ditto": (0, 1)})


@dataclass
class ConversationArguments:
    """Conversations for supervised fine-tuning."""

    _argument_group_name: ClassVar[str] = "Data"

    train_files: list[str] = option(
        PAPERS,
        "Training rows: files (.jsonl .json .csv .parquet), patterns (data/**/*.jsonl), folders of files, and data "
        "sets of hubs (hf://OWNER/NAME:SUBSET, ms://OWNER/NAME), all or a part: rows.jsonl#1000, rows.jsonl#30%. "
        "Alpaca, ShareGPT, OpenAI messages, prompt/completion or title/abstract rows, or rows that name a task.",
    )
    valid_files: list[str] = option(
        [], "Validation rows, named as in train_files. Default: a share of the training rows."
    )
    valid_fraction: float = option(
        0.05, "Share of the training rows held out for validation where there are no valid_files."
    )
    max_length: int = option(2048, "Tokens per row, prompt and answers together, and per pack of rows.")
    packing: bool = option(
        True, "Pack whole rows up to max_length tokens; none attends to another. False: pad each row."
    )
    overlong: Literal["truncate", "split", "drop", "refuse"] = option(
        "truncate",
        "Rows longer than max_length: truncate cuts off the end, split continues in another row that starts with half "
        "a row of context, drop leaves them out, refuse stops before training. The counts are shown.",
    )
    min_length: int = option(0, "Leave out rows of fewer tokens, prompt and answers together. The count is shown.")
    mask_history: bool = option(
        False, "Train only the last answer of each conversation; those before it are context. The count is shown."
    )
    instruction_templates: list[str] = option(
        [],
        "YAML files with instruction templates per task, in the format of dataset/instructions.yaml. With them, "
        "title/abstract rows that name no task use title_to_abstract.",
    )
    instruction_seed: int = option(
        42, "Seed with which each training row draws a template of its task. Validation rows use the first one."
    )
    dataset: list[str] = option(
        [], "Training rows beside, or in place of, train_files: names in LLaMA-Factory's dataset_info.json."
    )
    eval_dataset: list[str] = option([], "Validation rows, by names in that dataset_info.json.")
    dataset_dir: str = option(DATASET_DIR, DATASET_DIR_HELP)
    columns: dict[str, str] | None = option(None, COLUMNS_HELP)
    max_rows: int | None = option(None, "Train on at most this many rows, the first ones, of each name.")
    mix: list[str] = option(
        [],
        "Weights of training sources: NAME=WEIGHT for each, or a YAML file of `name: weight` lines. A weight is the "
        "number of passes over a source in an epoch, such as 2 or 0.3; 1 for those not named. Without train_files, the "
        "names are the files. Validation loss is logged for each source.",
    )
    streaming: bool = option(
        False,
        "Read and encode training rows as the training goes on, and store nothing: for data whose tokens would not fit "
        "on the disk. Needs max_steps and valid_files.",
    )
    buffer_rows: int = option(
        10_000, "With streaming: rows that are read ahead, shuffled and packed together; on each device."
    )

    def __post_init__(self) -> None:
        """Check ranges; data sets that are named take the place of the samples, else the sources of a mix do.

        Raises:
            UserError: names the option; or as parse_mix.
        """
        _check_least(self, {"max_rows": 1})
        check_ranges(self, {"buffer_rows": (1, 1e7)})
        weights = parse_mix(self.mix)
        self.mix = [f"{name}={format_weight(weight)}" for name, weight in weights.items()]
        if (self.dataset or self.mix) and self.train_files == PAPERS:
            self.train_files = [] if self.dataset else list(weights)


@dataclass
class LoraArguments:
    """The low-rank adapter (peft)."""

    _argument_group_name: ClassVar[str] = "LoRA"

    lora_rank: int = option(16, "Rank of the update matrices.")
    lora_alpha: int = option(32, "Scale of the update: alpha/rank (alpha/sqrt(rank) with use_rslora).")
    lora_dropout: float = option(0.05, "Dropout probability before the adapter.")
    lora_targets: list[str] = option(["all-linear"], "Modules to adapt, e.g. q_proj v_proj, or all-linear.")
    use_rslora: bool = option(False, "Rank-stabilised scaling (arXiv:2312.03732).")
    use_dora: bool = option(False, "Weight-decomposed LoRA (arXiv:2402.09353).")
    qlora: bool = option(False, "Load the base in 4 bits (arXiv:2305.14314). Needs CUDA and the package bitsandbytes.")
    train_special_tokens: Literal["auto", "always", "never"] = option(
        "auto",
        "Train the embedding rows of the chat template's special tokens (<|im_end|>, …) beside the adapter. auto: "
        "where the base has never ended an answer with them; never: refuse such a base.",
        former_name="train_mark_tokens",
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: names the option.
        """
        check_ranges(self, {"lora_rank": (1, 65536), "lora_alpha": (1, 1e6), "lora_dropout": (0, MOST_DROPOUT)})


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with defaults for this toolkit."""

    _argument_group_name: ClassVar[str] = "Training (transformers.TrainingArguments)"

    output_dir: str | None = option(None, "Run folder. Default: output/PIPELINE, with a number where that is taken.")
    overwrite_output_dir: bool = option(False, "Replace the run in output_dir.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Compute precision: auto is bf16 where the GPU supports it, else fp32. Full training keeps fp32 weights.",
    )
    num_train_epochs: float = option(3.0, "Passes over the training data.")
    per_device_train_batch_size: int = option(4, "Rows per device and micro-batch.")
    auto_batch: bool = option(
        False, "Find the largest micro-batch that fits into memory, for the same number of rows per optimizer step."
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass: less memory, about a fifth more time. Default: only "
            "where the run would not fit otherwise.",
            "nargs": "?",
            "const": True,
        },
    )
    per_device_eval_batch_size: int = option(4, "Rows per device in evaluation.")
    learning_rate: float = option(2e-5, "Peak learning rate of the schedule.")
    lr_scheduler_type: str = option("cosine", "Learning rate schedule: cosine, linear, constant_with_warmup, …")
    warmup_steps: float = option(0.03, "Warm-up steps; below 1, a share of the run.")
    weight_decay: float = option(0.0, "AdamW weight decay.")
    logging_steps: float = option(5, "Steps between two log entries.")
    logging_first_step: bool = option(True, "Log step 1 as well.")
    eval_strategy: str = option(
        "epoch", "When to evaluate: no, steps (every eval_steps; setting that is enough) or epoch."
    )
    eval_on_start: bool = option(True, "Evaluate before step 1, so that curves start at the base model.")
    max_eval_share: float = option(
        0.2,
        "Max tokens of all evaluations together, as a share of the training tokens: an evenly spaced subset of the "
        "rows is evaluated, at least 20,000 tokens and 8 rows each time. 0 evaluates all rows.",
    )
    predict_during_eval: int = option(
        0, "Generate answers to this many rows at each evaluation; logs texts, ROUGE and repetition. 0 is off."
    )
    predict_max_new_tokens: int = option(256, "Max tokens of each of these answers.")
    preflight: bool = option(
        True,
        "Before training, check versions, devices and the model's files, and run the longest micro-batch. "
        "False: only the checks that always run.",
    )
    guards: bool = option(
        True, "Before step 1, check that training and evaluation agree, values are finite, and the model learns."
    )
    on_non_finite: Literal["stop", "skip"] = option(
        "stop",
        "Steps whose loss or gradients are not finite, after their rows are reported: stop the run, or skip the step; "
        "ten in a row always stop it.",
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of the auxiliary loss that balances the experts of a mixture; 0 is off. Default: config.json's, where "
        "output_router_logits is true there.",
    )
    stop_check: int = option(
        20, "After fine-tuning, answer this many training prompts and report how many answers stop; 0 is off."
    )
    stop_check_max_new_tokens: int | None = option(
        None, "Max tokens of each of these answers. Default: twice the longest reference, at most 512."
    )
    save_strategy: str = option(
        "epoch", "When to save a checkpoint: no, steps (every save_steps; setting that is enough) or epoch."
    )
    save_total_limit: int | None = option(2, "Max checkpoints to keep; the oldest are deleted first.")
    resume: bool | None = field(
        default=None,
        metadata={
            "help": "Resume from the newest verified checkpoint in output_dir. Default: where it holds an unfinished "
            "run with the same settings; False never does.",
            "nargs": "?",
            "const": True,
        },
    )
    resume_from_checkpoint: str | None = option(None, "Resume from this checkpoint-N folder.")
    metric_for_best_model: str | None = option("loss", "Evaluation metric whose best checkpoint is always kept.")
    logging_nan_inf_filter: bool = option(False, "Log the mean of the last finite losses in place of a NaN.")
    report_to: None | str | list[str] = option(
        "none", "Trackers beside TensorBoard (wandb, …), which need their packages. TensorBoard is always on."
    )
    deepspeed: dict[str, Any] | str | None = option(
        None,
        f"DeepSpeed settings: one of the built-in {', '.join(NAMED)} (./zero2 is a file of that name), a JSON file, or "
        "the settings in JSON. Needs a launcher, which the scripts and novelgpt start.",
    )
    ddp_find_unused_parameters: bool | None = option(False, "Only for models that do not use all weights in each step.")
    remove_unused_columns: bool = option(False, "Not needed: rows hold tokens only.")

    # Shown by --help; every other field of TrainingArguments by --help_all.
    everyday_fields: ClassVar[tuple[str, ...]] = (
        "output_dir", "overwrite_output_dir", "precision", "num_train_epochs", "max_steps", "learning_rate",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "auto_batch",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "activation_checkpointing", "seed",
        "logging_steps", "eval_strategy", "eval_steps", "eval_on_start", "max_eval_share", "predict_during_eval",
        "predict_max_new_tokens", "preflight", "guards", "on_non_finite", "stop_check", "stop_check_max_new_tokens",
        "save_strategy",
        "save_steps", "save_total_limit", "resume", "resume_from_checkpoint", "deepspeed",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Derive TrainingArguments' own switches, such as bf16 from `precision`, and check them.

        Raises:
            UserError: a setting cannot be used.
        """
        if self.deepspeed is not None:
            self.deepspeed = deepspeed_place(self.deepspeed)
            check_deepspeed(self.deepspeed)
        if self.report_to is None:
            self.report_to = "none"
        if not torch.accelerator.is_available():
            # Without it, bf16 is refused, and accelerate takes several ranks on CPUs for one process each.
            self.use_cpu = True
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):  # accelerate launch --cpu
            self.use_cpu = True
        given = "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision
        precision = precision_of_accelerate(os.environ, given)
        if precision != given:
            self.precision = cast(Any, precision)
        cuda = torch.cuda.is_available() and not self.use_cpu
        if self.precision == "auto" and not (self.bf16 or self.fp16):
            self.bf16 = cuda and torch.cuda.is_bf16_supported()
        else:
            self.bf16 = self.bf16 or self.precision == "bf16"
            self.fp16 = self.fp16 or self.precision == "fp16"
        if self.use_liger_kernel:
            self._choose_liger_kernels()
        self.dataloader_pin_memory = self.dataloader_pin_memory and cuda
        self.checkpointing_is_open = self.activation_checkpointing is None and self.gradient_checkpointing is None
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if self.deepspeed:
            # DeepSpeed builds when the processes meet, which is now.
            disable_unused_build()
            release_build_locks()
        if self.greater_is_better is None:
            figure = str(self.metric_for_best_model).removeprefix("eval_")
            self.greater_is_better = (EVALUATION_FIGURES | ANSWER_FIGURES).get(figure)
        output_dir = self.output_dir
        super().__post_init__()
        self.output_dir = output_dir
        refuse_ignored(self)

    def _choose_liger_kernels(self) -> None:
        """Norm, rotary and SwiGLU; the loss is this toolkit's own."""
        if importlib.util.find_spec("liger_kernel") is None:
            raise UserError("--use_liger_kernel needs the package liger-kernel", pip_install("liger-kernel"))
        chosen = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
        self.liger_kernel_config = chosen | {"fused_linear_cross_entropy": False} | (self.liger_kernel_config or {})


@dataclass
class PredictArguments:
    """Rows to answer, and where the answers are written."""

    _argument_group_name: ClassVar[str] = "Prediction"

    data_files: list[str] = option(
        _samples("papers/valid.jsonl"),
        "Rows to answer, in any format and named in any way of fine-tuning's train_files.",
    )
    dataset: list[str] = option(
        [], "Rows to answer beside, or in place of, data_files: names in LLaMA-Factory's dataset_info.json."
    )
    dataset_dir: str = option(DATASET_DIR, DATASET_DIR_HELP)
    columns: dict[str, str] | None = option(None, COLUMNS_HELP)
    output_dir: str | None = option(None, "Folder for predictions.jsonl and scores.json. Default: MODEL/predict.")
    max_rows: int | None = option(None, "Answer only this many rows.")
    instruction_templates: list[str] = option(
        [], "The YAML files with instruction templates that training used; the first template of a task is used."
    )
    batch_size: int = option(32, "Prompts per batch.")
    backend: Literal["batches", "continuous"] = option(
        "batches",
        "batches: prompts of similar length together, until the longest answer ends. continuous: transformers' "
        "continuous batching, where a new prompt starts whenever an answer ends; for GPUs and answers of mixed "
        "length.",
    )
    endpoint: str | None = option(
        None,
        "URL of an OpenAI-compatible API that answers (vLLM, SGLang, `transformers serve`), such as "
        "http://localhost:8000/v1. Its key is read from the environment variable OPENAI_API_KEY.",
    )
    endpoint_model: str | None = option(None, "Name of the model on that server. Default: the first in its list.")
    endpoint_concurrency: int = option(32, "Concurrent requests to that server.")
    endpoint_timeout: float = option(
        1800, "Timeout of a request to that server, in seconds, from sending it to its last byte."
    )

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            UserError: names the option.
        """
        _check_least(self, {"batch_size": 1, "max_rows": 1, "endpoint_concurrency": 1})
        if self.dataset and self.data_files == _samples("papers/valid.jsonl"):
            self.data_files = []
        check_ranges(self, {"endpoint_timeout": (0.1, 1e6)})


@dataclass
class GenerationArguments:
    """How answers are generated; greedy unless do_sample."""

    _argument_group_name: ClassVar[str] = "Generation"

    max_new_tokens: int = option(512, "Max tokens per answer.")
    do_sample: bool = option(False, "Sample tokens instead of always taking the most likely one.")
    temperature: float = option(0.7, "With do_sample: below 1 is more conservative, above 1 more varied.")
    top_p: float = option(0.8, "With do_sample: sample from the most likely tokens that hold this probability mass.")
    top_k: int = option(20, "With do_sample: sample from this many most likely tokens; 0 for all.")
    num_beams: int = option(1, "Beams of beam search; 1 is greedy.")
    repetition_penalty: float = option(1.0, "Above 1 makes tokens that occurred before less likely.")
    no_repeat_ngram_size: int = option(0, "Do not repeat n-grams of this many tokens; 0 is off.")
    seed: int = option(42, "Random seed of sampling.")

    def __post_init__(self) -> None:
        """Check ranges, and that no sampling setting is set without do_sample.

        Raises:
            UserError: names the option.
        """
        _check_least(self, {"max_new_tokens": 1, "num_beams": 1, "top_k": 0, "no_repeat_ngram_size": 0})
        check_ranges(self, {"max_new_tokens": (1, 1e6), "seed": (0, 2**32 - 1)})
        check_ranges(self, {"repetition_penalty": (0, 1e4), "temperature": (0, 1e4)})
        above_zero = ["repetition_penalty", *(["temperature", "top_p"] if self.do_sample else [])]
        for name in above_zero:
            if not vars(self)[name] > 0:
                raise UserError(f"--{name} {vars(self)[name]} is too small", "take more than 0")
        if self.do_sample and not self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p} is not a share", "take at most 1")
        if not self.do_sample:
            defaults = {one.name: one.default for one in fields(self)}
            for name in ("temperature", "top_p", "top_k"):
                if vars(self)[name] != defaults[name]:
                    raise UserError(
                        f"--{name} {vars(self)[name]} has no effect without --do_sample",
                        "add --do_sample, or leave it out",
                    )
