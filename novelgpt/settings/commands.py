"""The commands of `novelgpt`, with the words behind `python -m` that do the same in a checkout."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command.

    Attributes:
        name: as it is typed behind `novelgpt`, in one word or two.
        module: with a `main`; and words in front of the user's own, where it has several commands.
        text: what it does, in a line.
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
        Command("data tokens", "dataset tokens", "text -> tokens that training maps into memory"),
        Command("data conversations", "dataset conversations",
                "papers or prepared novels -> question and answer rows from varied templates"),
        Command("data preview", "dataset preview", "rows as training sees them, trained tokens coloured"),
    ),
    "Evaluation and chat": (
        Command("score", "predict.score", "scores of any predictions file, and two of them compared"),
        Command("report", "predict.report", "a page with scores, pictures and examples of one or several runs"),
        Command("continuations", "predict.continuations", "rows that ask a model to go on with held-out novels"),
        Command("lm-eval", "predict.lm_eval_run", "standard benchmarks by lm-evaluation-harness"),
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
        Command("demo", "cli.demo", "the whole job on the small base and the samples, ending in one table"),
    ),
}  # fmt: skip
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}


def typed_words(module_words: str) -> str | None:
    """What is typed behind `novelgpt` for words behind `python -m`; None where no command does the same.

    >>> typed_words("finetune_lora --lora_rank 8")
    'lora --lora_rank 8'
    """
    for command in COMMANDS.values():
        for module, name in ((command.module, command.name), (_group(command.module), _group(command.name))):
            if module is not None and (module_words + " ").startswith(module + " "):
                return f"{name}{module_words[len(module) :]}"
    return None


def _group(words: str) -> str | None:
    """The first of several words."""
    return words.split()[0] if " " in words else None
