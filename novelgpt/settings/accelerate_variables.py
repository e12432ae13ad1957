"""What `accelerate launch`, and a file of `accelerate config`, say of training: obeyed, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from novelgpt.settings.errors import UserError

# Always set by `accelerate launch`; without it, the variables below are those that libraries set for themselves.
PRECISION = "ACCELERATE_MIXED_PRECISION"
NOTHING = ("", "no", "false", "0", "1")  # 1: a number of steps to accumulate
PLAIN = "take accelerate's own out (distributed_type: MULTI_GPU, or --multi_gpu), and "
# By variable: what accelerate calls it, and what does the same here.
REFUSED = {
    "ACCELERATE_USE_FSDP": ("FSDP", PLAIN + "name --fsdp behind the pipeline"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", PLAIN + "name --deepspeed zero3 behind the pipeline"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", "leave it out"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", "leave it out, and name --torch_compile behind the pipeline"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps", "leave it out, and name --gradient_accumulation_steps behind the pipeline"
    ),
}  # fmt: skip


def refuse_settings_of_accelerate(environment: Mapping[str, str]) -> None:
    """Make sure that accelerate says nothing of training that would be taken by halves.

    Raises:
        UserError: it does; names the setting, and ours.
    """
    if PRECISION not in environment:
        return
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        raise UserError(
            "accelerate's own settings of DeepSpeed are not read",
            PLAIN + "name --deepspeed zero2 (or another, or your file) behind the pipeline",
        )
    for name, (setting, remedy) in REFUSED.items():
        if environment.get(name, "").lower() not in NOTHING:
            raise UserError(f"accelerate's {setting} ({environment[name]}) is not read", remedy)


def precision_of_accelerate(environment: Mapping[str, str], chosen: str) -> str:
    """The precision of a run: what accelerate says counts where the run says auto.

    Args:
        environment: variables.
        chosen: --precision, or what --bf16 and --fp16 say.

    Raises:
        UserError: the two differ, or there is none of that name here.
    """
    said = environment.get(PRECISION, "no").lower()
    if said == "no" or chosen == said:
        return chosen
    if said not in ("bf16", "fp16"):
        raise UserError(f"accelerate's mixed_precision {said} is not known here", "take no, bf16 or fp16")
    if chosen != "auto":
        raise UserError(f"accelerate's mixed_precision is {said}, and --precision {chosen}", "leave one of them out")
    return said
