"""Full-parameter SFT: conversations -> all weights."""

from __future__ import annotations

from dataset.conversations import read_conversations
from novelgpt.checks.arguments import check_arguments
from novelgpt.checks.before_training import check, preflight
from novelgpt.model.loading import load_model
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.errors import exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.process import leave_process_group
from novelgpt.settings.runs import FinetuneRun
from novelgpt.training.fit import fit
from novelgpt.training.run_folder import claim_run_folder


@exit_on_user_error
@leave_process_group
def main(argv: list[str] | None = None) -> None:
    """Run the pipeline."""
    run = parse_arguments(FinetuneRun, argv)
    check_arguments(run)
    with claim_run_folder(run) as folder:
        tokenizer = load_tokenizer(run.model)
        preflight(run, tokenizer)
        train, valid = read_conversations(run.data, tokenizer, folder.run.training)
        plan = check(folder, tokenizer, train)
        model = load_model(run.model, tokenizer)
        fit(model, tokenizer, train, valid, plan)


if __name__ == "__main__":
    main()
