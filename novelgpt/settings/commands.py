"""The commands of `novelgpt`, with the modules behind `python -m` that do the same in a checkout."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        name: after `novelgpt`, of one or two words.
        module: with a `main`, and its subcommand where it has several.
        text: one line for --help.
    """

    name: str
    module: str
    text: str


# A heading, and the commands below it in `novelgpt --help`.
SECTIONS: dict[str, tuple[Command, ...]] = {
    "Training and prediction, one process per GPU": (
        Command("pretrain", "pretrain", "continued pretraining on raw text"),
        Command("finetune", "finetune", "full fine-tuning on conversations"),
        Command("lora", "finetune_lora", "LoRA fine-tuning on conversations"),
        Command("predict", "predict", "answers of a checkpoint, an adapter or a server, and their scores"),
    ),
    "Data preparation": (
        Command("data novels", "dataset novels",
                "a folder of novels -> clean chapters, without repeats, split by book, and a report"),
        Command("data held-out", "dataset held_out", "a list of works to hold out wherever they occur"),
        Command("data tokenizer", "dataset tokenizer", "text -> a tokenizer for models trained from scratch"),
        Command("data tokens", "dataset tokens", "text -> tokens that training maps into memory"),
        Command("data conversations", "dataset conversations",
                "papers or prepared novels -> question and answer rows from varied templates"),
        Command("data preferences", "dataset preferences",
                "preferred and rejected answers in any tool's shape -> rows for DPO"),
        Command("data preview", "dataset preview", "rows as training sees them, trained tokens coloured"),
    ),
    "Evaluation and chat": (
        Command("score", "predict.score", "scores of any predictions file, and two of them compared"),
        Command("report", "predict.report", "a page with scores, pictures and examples of one or several runs"),
        Command("continuations", "predict.continuations", "rows that ask a model to continue held-out novels"),
        Command("lm-eval", "predict.lm_eval_run", "standard benchmarks with lm-evaluation-harness"),
        Command("chat", "predict.chat", "a conversation in the terminal"),
    ),
    "Models": (
        Command("doctor", "novelgpt.doctor", "what would stop a run, before it starts"),
        Command("merge", "finetune_lora.merge", "an adapter and its base -> a full checkpoint"),
        Command("export llama", "novelgpt.export.llama", "Baichuan with rotary positions -> Llama"),
        Command("export qwen2", "novelgpt.export.qwen2", "Qwen v1 -> Qwen2"),
        Command("export safetensors", "novelgpt.export.to_safetensors", "weights in pickles -> safetensors"),
    ),
    "From other tools": (
        Command("convert-config", "cli.convert_config", "settings of LLaMA-Factory, ms-swift or TRL -> ours"),
    ),
    "Demo": (
        Command("demo", "cli.demo", "the whole workflow on the small base and the samples, ending in two tables"),
    ),
}  # fmt: skip
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}


def novelgpt_args(module_args: str) -> str | None:
    """Return the arguments of `novelgpt` for those of `python -m`; None where no command does the same.

    >>> novelgpt_args("finetune_lora --lora_rank 8")
    'lora --lora_rank 8'
    """
    names = {module: name for name, module, _ in COMMANDS.values()}
    groups = {
        module.split()[0]: name.split()[0] for module, name in names.items() if " " in module
    }  # of `dataset novels`
    for known, typed in (names | groups).items():
        if f"{module_args} ".startswith(f"{known} "):
            return f"{typed}{module_args[len(known) :]}"
    return None
