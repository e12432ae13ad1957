"""Prediction: checkpoint (+ adapter) or a server -> predictions.jsonl -> scores.json."""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.instructions import load_instructions
from dataset.sources import find_row_sources
from novelgpt.inference.endpoint_client import EndpointClient, check_endpoint_settings
from novelgpt.inference.generation import check_continuous, plan_batches
from novelgpt.inference.loading import load_for_inference, with_default_model
from novelgpt.model.card import CARD
from novelgpt.model.hub import folder_of
from novelgpt.model.loading import longest_row
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.settings.arguments import InferenceModelArguments, PredictArguments
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import check_folder_can_be_made
from novelgpt.settings.process import leave_process_group
from novelgpt.settings.run_record import this_attempt
from novelgpt.settings.runs import PredictRun
from novelgpt.settings.small_bases import TINY, small_base_name
from novelgpt.settings.terminal import counted, progress, say
from predict.generate import AnswerRows, continuously, in_batches, reference_sums, through_endpoint
from predict.journal import Journal, unwritten
from predict.results import add_scores_to_card, say_endings, write_results
from predict.rows import PromptRows, check_lengths, read_prompt_rows

ROWS_SENT_AT_ONCE = 1024


@dataclass
class AnswerSource:
    """A model in this process with its tokenizer, or a server, for which both are None; and how it answers rows."""

    name: str
    answer: AnswerRows
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@exit_on_user_error
@leave_process_group
def main(argv: list[str] | None = None) -> None:
    """Answer the rows that the command line names, and score the answers."""
    run = parse_arguments(PredictRun, argv)
    if run.data.endpoint is not None and run.data.backend == "continuous":
        raise UserError("--backend continuous does nothing with --endpoint", "choose one of them")
    folder = _output_folder(run)
    source, rows = _open_source(run, folder)
    # Without `cpu`, accelerate takes several processes on CPUs for one each.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:
        say(f"{counted(len(rows), 'row')} for {source.name}")
    with Journal(folder, _identity(run, source.name, rows), state.process_index) as journal:
        known = len(journal.answers)
        if known and state.is_main_process:
            say(f"{known} of them were answered before")
        this_attempt().reach(known, "row")
        state.wait_for_everyone()  # each process has read what all had written
        start = time.perf_counter()
        _answer(source.answer, rows, _unanswered(run, rows, journal, state), journal, state.is_main_process)
        seconds = time.perf_counter() - start
        own = numpy.arange(state.process_index, len(rows), state.num_processes)
        sums = numpy.zeros((len(rows), 3))
        if source.model is not None and source.tokenizer is not None:
            sums[own] = reference_sums(source.model, source.tokenizer, rows, own, run.data.batch_size)
        if state.num_processes > 1:
            for process, share in enumerate(gather_object([sums[own]])):
                sums[process :: state.num_processes] = share
            _gather_answers(journal, len(rows), state)
        if not state.is_main_process:
            return
        settings = {"seconds": seconds, "answered_before": known, "model": source.name}
        settings |= {"generation": asdict(run.generation)}
        try:
            scores, endings = write_results(rows, journal.answers, sums, settings, known, folder)
        except OSError as error:
            raise unwritten(folder, error) from error
        if source.model is not None:
            add_scores_to_card(Path(source.name), rows.sources, scores)
        journal.remove()
        this_attempt().finish()
        say_endings(endings)
        say(f"  predictions   {folder / 'predictions.jsonl'}", f"  scores        {folder / 'scores.json'}")


def _open_source(run: PredictRun, folder: Path) -> tuple[AnswerSource, PromptRows]:
    """What answers, and the rows as it reads them; settings that it cannot honour are refused first."""
    data = run.data
    instructions = load_instructions(data.instruction_templates)
    sources = find_row_sources(data.data_files, data.dataset, data.dataset_dir, data.columns)
    if data.endpoint is not None:
        check_endpoint_settings(run.generation)
        rows = read_prompt_rows(sources, None, data.max_rows, instructions, folder)
        client = EndpointClient(str(data.endpoint), data.endpoint_model, run.generation, data.endpoint_timeout)
        return AnswerSource(client.name, partial(through_endpoint, client, data.endpoint_concurrency)), rows
    if data.backend == "continuous":
        check_continuous(run.generation)
    chosen = _chosen_model(run)
    tokenizer = load_tokenizer(chosen)
    rows = read_prompt_rows(sources, tokenizer, data.max_rows, instructions, folder)
    model = load_for_inference(chosen, tokenizer, run.model.base)
    check_lengths(rows, longest_row(model.config), run.generation.max_new_tokens)
    answer: AnswerRows = partial(in_batches, model, tokenizer, run.generation)
    if data.backend == "continuous":
        answer = partial(continuously, model, tokenizer, run.generation, data.batch_size)
    return AnswerSource(chosen.model, answer, model, tokenizer), rows


def _chosen_model(run: PredictRun) -> InferenceModelArguments:
    chosen = with_default_model(run.model)
    fallback = not run.model.model and small_base_name(chosen.model) is not None
    if fallback and run.data.data_files != PredictArguments().data_files:
        raise UserError(
            "--data_files names rows of your own, and neither a model is named nor is there a finished fine-tuning",
            f"name it: MODEL=NAME before the command, or --model NAME; the small base is --model {TINY}",
        )
    return chosen


def _output_folder(run: PredictRun) -> Path:
    if run.data.output_dir:
        folder = Path(run.data.output_dir)
    elif run.data.endpoint is not None:
        raise UserError("--endpoint has no model folder to write predictions beside", "name --output_dir")
    else:
        folder = folder_of(_chosen_model(run), "--output_dir") / "predict"
    check_folder_can_be_made(folder, f"--output_dir {folder}")
    return folder


def _identity(run: PredictRun, name: str, rows: PromptRows) -> str:
    """A hash of what the answers depend on: the model's files, the prompts, the settings."""
    local = run.data.endpoint is None and Path(name).is_dir()
    # Except the card, to which predictions add their scores.
    files = sorted(path for path in Path(name).iterdir() if path.is_file() and path.name != CARD) if local else []
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = asdict(run.generation), run.model.base, run.data.batch_size, run.data.backend, run.model.attention
    # Piece by piece, the JSON of [name, state, settings, [prompts]].
    digest = hashlib.sha256(json.dumps([name, state, settings])[:-1].encode())
    for number, row in enumerate(rows):
        prompt = json.dumps((row.id, row.prompt_ids, row.prompt, row.plain))
        digest.update(f"{', ' if number else ', ['}{prompt}".encode())
    digest.update(b"]]")
    return digest.hexdigest()


def _unanswered(run: PredictRun, rows: PromptRows, journal: Journal, state: PartialState) -> list[array[int]]:
    """The rows of this process that the journal lacks, in batches that do not depend on the number of processes.

    Batches that are computed together are answered whole: in bf16, or where answers are sampled, an answer depends on
    the others in its batch, and an interrupted prediction must end like an uninterrupted one.
    """
    own = plan_batches(rows.lengths, run.data.batch_size)[state.process_index :: state.num_processes]
    if run.data.endpoint is None and run.data.backend == "batches":
        return [batch for batch in own if any(number not in journal.answers for number in batch)]
    left = [array("q", (number for number in batch if number not in journal.answers)) for batch in own]
    return [batch for batch in left if batch]


def _answer(answer_rows: AnswerRows, rows: PromptRows, batches: list[array[int]], journal: Journal, show: bool) -> None:
    total = sum(map(len, batches))
    shown = progress(total, "answers", "row") if show and total else nullcontext(lambda count: None)
    with shown as advance:
        for answers in answer_rows(rows, batches):
            journal.add(answers)
            this_attempt().reach(len(journal.answers), "row")
            advance(len(answers))


def _gather_answers(journal: Journal, rows: int, state: PartialState) -> None:
    """Let the first process read the answers of all; from hosts whose files it does not see, they are sent to it."""
    state.wait_for_everyone()
    if state.is_main_process:
        journal.read_others()
    unseen = array("q", (number for number in range(rows) if number not in journal.answers))
    (unseen,) = broadcast_object_list([unseen])
    for start in range(0, len(unseen), ROWS_SENT_AT_ONCE):
        numbers = unseen[start : start + ROWS_SENT_AT_ONCE]
        shares = gather_object([{number: journal.answers[number] for number in numbers if number in journal.answers}])
        if state.is_main_process:
            journal.add({number: answer for share in shares for number, answer in share.items()})


if __name__ == "__main__":
    main()
