"""Settings of transformers and accelerate that would be accepted and ignored, or do harm: refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import environment_program, pip_install, pipeline_name

UPLOAD = "a training uploads nothing", "leave it out, and upload the run once it has finished: {hf} upload NAME FOLDER"
TRACKED = "it is for a tracker, and --report_to names none", "leave it out, or name a tracker with --report_to"
LEAVE_OUT = "leave it out"
# By name: why any value but the default is refused, and what to do.
IGNORED = {
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_always_push", "hub_revision"), UPLOAD
    ),
    "batch_eval_metrics": ("evaluation keeps three numbers per row, whatever the number of rows", LEAVE_OUT),
    "include_for_metrics": ("evaluation metrics are computed from losses only", LEAVE_OUT),
    "label_names": ("rows hold their labels under one name", LEAVE_OUT),
    "remove_unused_columns": ("rows hold tokens only, and all of it is used", LEAVE_OUT),
    "prediction_loss_only": ("evaluation metrics are computed from losses only", LEAVE_OUT),
    "eval_do_concat_batches": ("evaluation metrics are computed over all rows", LEAVE_OUT),
    "eval_use_gather_object": ("evaluation gathers three numbers per row", LEAVE_OUT),
    "fp16_full_eval": ("evaluation computes as training does, and the weights that are saved would be rounded",
                       "--precision chooses for both"),
    "bf16_full_eval": ("evaluation computes as training does, and the weights that are saved would be rounded",
                       "--precision chooses for both"),
    "auto_find_batch_size": ("the rows per optimizer step would change during a run",
                             "--auto_batch finds the micro-batch before the first step"),
    "ignore_data_skip": ("a resumed run continues with the next rows", LEAVE_OUT),
    "restore_callback_states_from_checkpoint": ("a run resumes with everything that its checkpoint holds", LEAVE_OUT),
    "enable_jit_checkpoint": ("a run that gets SIGTERM saves the step by itself", LEAVE_OUT),
    "save_on_each_node": ("all hosts write into one run folder, which they share", LEAVE_OUT),
    "length_column_name": ("the length of a row is the number of its tokens", LEAVE_OUT),
    "do_predict": ("training generates no answers", "predict once it has finished: {predict}"),
    "use_cache": ("training keeps no keys and values", LEAVE_OUT),
}  # fmt: skip
OF_TRACKERS = ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
# Optimizers that read --optim_args, and those that read --optim_target_modules, by parts of their names.
WITH_OPTIONS = ("sgd", "adagrad", "rmsprop", "ademamix", "anyprecision", "galore", "apollo", "grokadamw", "4bit",
                "torch_8bit", "schedule_free", "stable_adamw")  # fmt: skip
WITH_TARGETS = ("galore", "apollo")
# By tracker: the modules that transformers imports, and the packages that bring them.
TRACKERS = {
    "azure_ml": (("azureml.core.run",), ("azureml-core",)),
    "comet_ml": (("comet_ml",), ("comet-ml",)),
    "mlflow": (("mlflow",), ("mlflow",)),
    "neptune": (("neptune",), ("neptune",)),
    "trackio": (("trackio",), ("trackio",)),
    "wandb": (("wandb",), ("wandb",)),
    "codecarbon": (("codecarbon",), ("codecarbon",)),
    "clearml": (("clearml",), ("clearml",)),
    "dagshub": (("dagshub", "mlflow"), ("dagshub", "mlflow")),
    "flyte": (("flytekit", "flytekitplugins.deck", "pandas"), ("flytekit", "flytekitplugins-deck-standard", "pandas")),
    "dvclive": (("dvclive",), ("dvclive",)),
    "swanlab": (("swanlab",), ("swanlab",)),
}
# Names that torch.compile takes.
COMPILATION = {
    "torch_compile_backend": [backend.value.lower() for backend in DynamoBackend],
    "torch_compile_mode": ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
}
# Always on, by this toolkit itself.
TENSORBOARD = "tensorboard"

# Always set by `accelerate launch`; without it, the variables of ACCELERATE are those that libraries set themselves.
PRECISION = "ACCELERATE_MIXED_PRECISION"
UNSET = ("", "no", "false", "0", "1")  # 1: a number of steps to accumulate
WITHOUT = "take accelerate's own out (distributed_type: MULTI_GPU, or --multi_gpu), and "
# By variable: what accelerate calls it, and what does the same here.
ACCELERATE = {
    "ACCELERATE_USE_FSDP": ("FSDP", WITHOUT + "name --fsdp behind the pipeline"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", WITHOUT + "name --deepspeed zero3 behind the pipeline"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "leave it out"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "leave it out, and name --torch_compile behind the pipeline"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps", "leave it out, and name --gradient_accumulation_steps behind the pipeline"
    ),
}  # fmt: skip


def refuse_ignored(training: TrainingArguments) -> None:
    """Make sure that each argument that is set has an effect, and that trackers are installed.

    Args:
        training: after transformers has settled its defaults. TensorBoard is taken out of its trackers.

    Raises:
        UserError: names the argument.
    """
    training.report_to = _known_trackers(list(training.report_to or []))
    reasons = dict(IGNORED)
    if not training.report_to:
        reasons |= dict.fromkeys(OF_TRACKERS, TRACKED)
    if "trackio" not in training.report_to:
        reasons["hub_private_repo"] = UPLOAD
    for field in fields(training):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in reasons and vars(training)[field.name] != default:
            value = "" if field.name.endswith("_token") else f" {vars(training)[field.name]}"
            reason, remedy = reasons[field.name]
            raise UserError(
                f"--{field.name}{value} would have no effect: {reason}",
                remedy.format(hf=environment_program("hf"), predict=pipeline_name("predict")),
            )
    for refused, cause, remedy in _combinations(training):
        if refused:
            raise UserError(cause, remedy)
    for name, known in COMPILATION.items():
        value = vars(training)[name]
        if value is not None and value.lower() not in known:
            raise UserError(f"--{name} {value} is unknown", f"take one of {', '.join(known)}")


def _combinations(training: TrainingArguments) -> list[tuple[bool, str, str]]:
    """List settings that others leave without effect, or contradict: whether they are set, cause and remedy."""
    optimizer = str(getattr(training.optim, "value", training.optim))
    pairs = training.optim_args.split(",") if training.optim_args else []
    wrong = next((pair for pair in pairs if pair.count("=") != 1), None)
    accelerator: Any = training.accelerator_config
    return [
        (
            bool(training.liger_kernel_config and not training.use_liger_kernel),
            "--liger_kernel_config chooses kernels that are not in use",
            "add --use_liger_kernel",
        ),
        (
            bool(training.fsdp_config and not training.fsdp),
            "--fsdp_config configures sharding, and --fsdp is off",
            "add --fsdp, or leave it out",
        ),
        (
            bool(pairs) and not any(part in optimizer for part in WITH_OPTIONS),
            f"--optim_args {training.optim_args} would have no effect: {optimizer} takes none",
            "leave it out; --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay have options of their own",
        ),
        (wrong is not None, f"--optim_args holds {wrong!r}, which is not a pair", "write name=value,name=value"),
        (
            bool(training.optim_target_modules) and not any(part in optimizer for part in WITH_TARGETS),
            f"--optim_target_modules would have no effect: {optimizer} optimizes everything that is trained",
            "leave it out, or take a galore or apollo --optim; --lora_targets is for adapters",
        ),
        (
            bool(accelerator.dispatch_batches),
            "--accelerator_config dispatch_batches: batches are made by each process, of rows of all lengths",
            "leave it out; --dataloader_num_workers gives processes to the making of batches",
        ),
        (
            (accelerator.gradient_accumulation_kwargs or {}).get("num_steps") is not None,
            "--accelerator_config sets gradient_accumulation_kwargs.num_steps, which the Trainer does not count with",
            "--gradient_accumulation_steps sets both",
        ),
    ]


def _known_trackers(names: list[str]) -> list[str]:
    """Return the trackers without TensorBoard.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    wanted = [name for name in names if name != TENSORBOARD]
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"--report_to {name} is not a tracker", f"take one or more of {known}, all or none")
        modules, packages = TRACKERS.get(name, ((), ()))
        missing = [module for module in modules if not _is_installed(module)]
        if missing:
            raise UserError(f"--report_to {name} needs the package {missing[0]}", pip_install(*packages))
    return wanted


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or stands for a missing one
        return False


def refuse_settings_of_accelerate(environment: Mapping[str, str]) -> None:
    """Refuse settings of `accelerate launch`, or of a file of `accelerate config`, that would be applied only in part.

    Raises:
        UserError: there is one; names the setting, and ours.
    """
    if PRECISION not in environment:
        return
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's own settings of DeepSpeed are not read",
            WITHOUT + "name --deepspeed zero2 (or another, or your file) behind the pipeline",
        )
    for name, (setting, remedy) in ACCELERATE.items():
        if environment.get(name, "").lower() not in UNSET:
            raise UserError(f"accelerate's {setting} ({environment[name]}) is not read", remedy)


def precision_of_accelerate(environment: Mapping[str, str], chosen: str) -> str:
    """Return the precision of a run: accelerate's where the run's own is auto.

    Args:
        environment: variables.
        chosen: --precision, or that of --bf16 and --fp16.

    Raises:
        UserError: the two differ, or accelerate's is unknown here.
    """
    precision = environment.get(PRECISION, "no").lower()
    if precision == "no" or chosen == precision:
        return chosen
    if precision not in ("bf16", "fp16"):
        raise UserError(f"accelerate's mixed_precision {precision} is unknown here", "take no, bf16 or fp16")
    if chosen != "auto":
        raise UserError(
            f"accelerate's mixed_precision is {precision}, and --precision {chosen}", "leave one of them out"
        )
    return precision
