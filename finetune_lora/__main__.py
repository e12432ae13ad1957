"""LoRA SFT: conversations -> adapter weights."""

from __future__ import annotations

from functools import partial

from transformers import set_seed

from dataset.conversations import read_conversations
from novelgpt.checks.arguments import check_arguments
from novelgpt.checks.before_training import check, preflight
from novelgpt.model.loading import frozen_dtype, load_model
from novelgpt.model.lora import attach_lora
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.errors import exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.process import leave_process_group
from novelgpt.settings.runs import LoraRun
from novelgpt.training.fit import fit
from novelgpt.training.run_folder import claim_run_folder


@exit_on_user_error
@leave_process_group
def main(argv: list[str] | None = None) -> None:
    """Run the pipeline."""
    run = parse_arguments(LoraRun, argv)
    check_arguments(run)
    with claim_run_folder(run) as folder:
        tokenizer = load_tokenizer(run.model)
        preflight(run, tokenizer)
        train, valid = read_conversations(run.data, tokenizer, folder.run.training)
        adapt = partial(attach_lora, lora=run.lora, tokenizer=tokenizer)
        plan = check(folder, tokenizer, train, frozen_dtype(), run.lora.qlora, adapt)
        base = load_model(run.model, tokenizer, dtype=frozen_dtype(), qlora=run.lora.qlora)
        set_seed(run.training.seed)  # the adapter is drawn before the Trainer sets the seed
        model = adapt(base)
        fit(model, tokenizer, train, valid, plan)


if __name__ == "__main__":
    main()
