"""Settings of transformers and accelerate that would be accepted and ignored, or do harm: refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import MISSING, fields
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
    "batch_eval_metrics": ("evaluation keeps three numbers a row, whatever the number of rows", LEAVE_OUT),
    "include_for_metrics": ("the figures of evaluations are made of losses alone", LEAVE_OUT),
    "label_names": ("rows hold their labels under one name", LEAVE_OUT),
    "remove_unused_columns": ("rows hold tokens only, and all of it is used", LEAVE_OUT),
    "prediction_loss_only": ("the figures of evaluations are made of losses alone", LEAVE_OUT),
    "eval_do_concat_batches": ("the figures of evaluations are those of all rows", LEAVE_OUT),
    "eval_use_gather_object": ("evaluation gathers three numbers a row", LEAVE_OUT),
    "fp16_full_eval": ("evaluation computes as training does, and the weights that are saved would be rounded",
                       "--precision chooses for both"),
    "bf16_full_eval": ("evaluation computes as training does, and the weights that are saved would be rounded",
                       "--precision chooses for both"),
    "auto_find_batch_size": ("the rows of an optimizer step would change in the midst of a run",
                             "--auto_batch finds the micro-batch before the first step"),
    "ignore_data_skip": ("a run that is gone on with takes the rows that come next", LEAVE_OUT),
    "restore_callback_states_from_checkpoint": ("a run goes on with all that its checkpoint holds", LEAVE_OUT),
    "enable_jit_checkpoint": ("a run that gets SIGTERM saves the step by itself", LEAVE_OUT),
    "save_on_each_node": ("all hosts write into one run folder, which they share", LEAVE_OUT),
    "length_column_name": ("the length of a row is the number of its tokens", LEAVE_OUT),
    "do_predict": ("a training answers no rows", "predict once it has finished: {predict}"),
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
        if field.name in reasons and vars(training)[field.name] != _default(field):
            value = "" if field.name.endswith("_token") else f" {vars(training)[field.name]}"
            reason, remedy = reasons[field.name]
            raise UserError(
                f"--{field.name}{value} would have no effect: {reason}",
                remedy.format(hf=environment_program("hf"), predict=pipeline_name("predict")),
            )
    _refuse_combinations(training)


def _refuse_combinations(training: TrainingArguments) -> None:
    """What only something else gives an effect to, or what two settings say at once."""
    if training.liger_kernel_config and not training.use_liger_kernel:
        raise UserError("--liger_kernel_config chooses kernels that are not in use", "add --use_liger_kernel")
    if training.fsdp_config and not training.fsdp:
        raise UserError("--fsdp_config says how a model is shared, and --fsdp is off", "add --fsdp, or leave it out")
    _check_compilation(training)
    name = str(getattr(training.optim, "value", training.optim))
    if training.optim_args and not any(part in name for part in WITH_OPTIONS):
        raise UserError(
            f"--optim_args {training.optim_args} would have no effect: {name} takes none",
            "leave it out; --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay have options of their own",
        )
    for part in (training.optim_args or "").split(","):
        if training.optim_args and part.count("=") != 1:
            raise UserError(f"--optim_args holds {part!r}, which is no pair", "write name=value,name=value")
    if training.optim_target_modules and not any(part in name for part in WITH_TARGETS):
        raise UserError(
            f"--optim_target_modules would have no effect: {name} optimizes all that is trained",
            "leave it out, or take a galore or apollo --optim; --lora_targets is for adapters",
        )
    accelerator: Any = training.accelerator_config
    if accelerator.dispatch_batches:
        raise UserError(
            "--accelerator_config dispatch_batches: batches are made by each process, of rows of all lengths",
            "leave it out; --dataloader_num_workers gives processes to the making of batches",
        )
    if (accelerator.gradient_accumulation_kwargs or {}).get("num_steps") is not None:
        raise UserError(
            "--accelerator_config sets gradient_accumulation_kwargs.num_steps, which the Trainer does not count with",
            "--gradient_accumulation_steps sets both",
        )


def _check_compilation(training: TrainingArguments) -> None:
    """What torch.compile is told are names that it knows."""
    known = {
        "torch_compile_backend": [backend.value.lower() for backend in DynamoBackend],
        "torch_compile_mode": ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    }
    for name, names in known.items():
        value = vars(training)[name]
        if value is not None and value.lower() not in names:
            raise UserError(f"--{name} {value} is unknown", f"take one of {', '.join(names)}")


def _known_trackers(names: list[str]) -> list[str]:
    """The trackers without TensorBoard.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    wanted = [name for name in names if name != TENSORBOARD]
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"--report_to {name} is no tracker", f"take one or more of {known}, all or none")
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


def _default(field: Any) -> Any:
    return field.default_factory() if field.default is MISSING else field.default


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
    said = environment.get(PRECISION, "no").lower()
    if said == "no" or chosen == said:
        return chosen
    if said not in ("bf16", "fp16"):
        raise UserError(f"accelerate's mixed_precision {said} is not known here", "take no, bf16 or fp16")
    if chosen != "auto":
        raise UserError(f"accelerate's mixed_precision is {said}, and --precision {chosen}", "leave one of them out")
    return said
