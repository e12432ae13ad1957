"""Prediction: checkpoint (+ adapter) or a server -> predictions.jsonl -> scores.json."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.instructions import load_instructions
from novelgpt.inference.endpoint_client import EndpointClient, check_endpoint_settings
from novelgpt.inference.generation import Answer, check_continuous, plan_batches
from novelgpt.inference.loading import load_for_inference, with_default_model
from novelgpt.model.card import CARD
from novelgpt.model.hub import folder_of
from novelgpt.model.loading import longest_row
from novelgpt.model.tokenizer import load_tokenizer
from novelgpt.scoring.summary import reference_scores
from novelgpt.settings.arguments import InferenceModelArguments, PredictArguments
from novelgpt.settings.atomic_files import atomic_write
from novelgpt.settings.attempts import this_attempt
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import EMBEDDED_BASE, TINY, check_folder_can_be_made
from novelgpt.settings.process import leave_process_group
from novelgpt.settings.runs import PredictRun
from novelgpt.settings.terminal import counted, progress, say
from predict.card_scores import add_scores
from predict.endpoint import through_endpoint
from predict.generate import AnswerRows, continuously, in_batches, reference_sums
from predict.journal import Journal, unwritten
from predict.lengths import check_lengths
from predict.rows import PromptRow, read_prompt_rows
from predict.score import score_predictions, scored_prediction, write_scores
from predict.shown_answers import show_answers


@dataclass
class Source:
    """Where answers come from: a model in this process with its tokenizer, or a server, of which neither is here."""

    name: str
    answer: AnswerRows
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@exit_on_user_error
@leave_process_group
def main(argv: list[str] | None = None) -> None:
    """Run the pipeline on the words of a command line."""
    run = parse_arguments(PredictRun, argv)
    _check_backend(run)
    folder = _output_folder(run)
    instructions = load_instructions(run.data.instruction_templates)
    if run.data.endpoint is not None:
        rows = read_prompt_rows(run.data.data_files, None, run.data.max_rows, instructions)
        source = _server(run)
    else:
        chosen = _chosen_model(run)
        tokenizer = load_tokenizer(chosen)
        rows = read_prompt_rows(run.data.data_files, tokenizer, run.data.max_rows, instructions)
        source = _model(run, chosen, tokenizer, rows)
    # Without the word, accelerate takes several processes on CPUs for one each.
    state = PartialState(cpu=not torch.accelerator.is_available())
    if state.is_main_process:
        say(f"{counted(len(rows), 'row')} for {source.name}")
    with Journal(folder, _identity(run, source.name, rows), state.process_index) as journal:
        known = len(journal.answers)
        if known and state.is_main_process:
            say(f"{known} of them were answered before")
        this_attempt().reach(known, "row")
        state.wait_for_everyone()  # each process has read what all had written
        begin = time.perf_counter()
        whole_batches = run.data.endpoint is None and run.data.backend == "batches"
        batches = _unanswered(rows, run.data.batch_size, journal, state, whole_batches)
        _answer(source.answer, rows, batches, journal, state.is_main_process)
        seconds = time.perf_counter() - begin
        sums = numpy.zeros((len(rows), 3))
        if source.model is not None and source.tokenizer is not None:
            own = slice(state.process_index, None, state.num_processes)
            sums[own] = reference_sums(source.model, source.tokenizer, rows[own], run.data.batch_size)
        answers = journal.answers
        if state.num_processes > 1:
            answers = {number: answer for share in gather_object([answers]) for number, answer in share.items()}
            sums = sum(gather_object([sums]), numpy.zeros_like(sums))
        if state.is_main_process:
            ordered = [answers[number] for number in range(len(rows))]
            try:
                _write_predictions(rows, ordered, folder / "predictions.jsonl")
            except OSError as error:
                raise unwritten(folder, error) from error
            show_answers(rows, ordered)
            figures = {"seconds": seconds, "answered_before": known, "model": source.name}
            figures |= {"generation": asdict(run.generation)}
            try:
                scores = _write_scores(rows, ordered, sums, figures, folder / "scores.json")
            except OSError as error:
                raise unwritten(folder, error) from error
            if source.model is not None:
                add_scores(Path(source.name), run.data.data_files, scores)
            journal.remove()
            this_attempt().finish()
            _say_endings(rows, ordered)
            say(f"  predictions   {folder / 'predictions.jsonl'}", f"  scores        {folder / 'scores.json'}")


def _check_backend(run: PredictRun) -> None:
    """Refuse settings that what answers cannot honour, before anything is read."""
    continuous = run.data.backend == "continuous"
    if run.data.endpoint is not None:
        if continuous:
            raise UserError("--backend continuous does nothing with --endpoint", "take one of them")
        check_endpoint_settings(run.generation)
    elif continuous:
        check_continuous(run.generation)


def _chosen_model(run: PredictRun) -> InferenceModelArguments:
    chosen = with_default_model(run.model)
    fallback = not run.model.model and chosen.model == str(EMBEDDED_BASE)
    if fallback and run.data.data_files != PredictArguments().data_files:
        raise UserError(
            "--data_files names rows of your own, and neither a model is named nor is there a finished fine-tuning",
            f"name it: MODEL=NAME before the command, or --model NAME; the small base is --model {TINY}",
        )
    return chosen


def _model(
    run: PredictRun, chosen: InferenceModelArguments, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
) -> Source:
    model = load_for_inference(chosen, tokenizer, run.model.base)
    check_lengths(rows, tokenizer, longest_row(model.config), run.generation.max_new_tokens)
    if run.data.backend == "continuous":
        answer = continuously(model, tokenizer, run.generation, run.data.batch_size)
    else:
        answer = in_batches(model, tokenizer, run.generation)
    return Source(chosen.model, answer, model, tokenizer)


def _server(run: PredictRun) -> Source:
    data = run.data
    client = EndpointClient(str(data.endpoint), data.endpoint_model, run.generation, data.endpoint_timeout)
    return Source(client.name, through_endpoint(client, data.endpoint_concurrency))


def _output_folder(run: PredictRun) -> Path:
    if run.data.output_dir:
        folder = Path(run.data.output_dir)
    elif run.data.endpoint is not None:
        raise UserError("--endpoint has no folder that predictions could be written beside", "name --output_dir")
    else:
        folder = folder_of(_chosen_model(run), "--output_dir") / "predict"
    check_folder_can_be_made(folder, f"--output_dir {folder}")
    return folder


def _identity(run: PredictRun, name: str, rows: Sequence[PromptRow]) -> str:
    """What the answers depend on, as a hash: the model's files, the prompts, the settings."""
    local = run.data.endpoint is None and Path(name).is_dir()
    # But for the card, into which predictions write their scores.
    files = sorted(path for path in Path(name).iterdir() if path.is_file() and path.name != CARD) if local else []
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = asdict(run.generation), run.model.base, run.data.batch_size, run.data.backend, run.model.attention
    asked = [(row.id, row.prompt_ids, row.prompt, row.plain) for row in rows]
    return hashlib.sha256(json.dumps([name, state, settings, asked]).encode()).hexdigest()


def _unanswered(
    rows: Sequence[PromptRow], batch_size: int, journal: Journal, state: PartialState, whole: bool
) -> list[list[int]]:
    """The rows of this process that the journal lacks, in batches that are the same however many processes there are.

    Batches that are computed together are answered whole or not at all: in bf16, or where answers are drawn, an answer
    depends on its neighbours, and a prediction that was killed shall end as one that was not.
    """
    batches = plan_batches([len(row.prompt_ids) or len(row.prompt) for row in rows], batch_size)
    left = [
        [number for number in batch if number not in journal.answers]
        for batch in batches[state.process_index :: state.num_processes]
    ]
    if whole:
        own = batches[state.process_index :: state.num_processes]
        return [batch for batch, missing in zip(own, left, strict=True) if missing]
    return [missing for missing in left if missing]


def _answer(
    answer_rows: AnswerRows, rows: Sequence[PromptRow], batches: list[list[int]], journal: Journal, show: bool
) -> None:
    total = sum(map(len, batches))
    shown = progress(total, "answers", "row") if show and total else nullcontext(lambda count: None)
    with shown as advance:
        for answers in answer_rows(rows, batches):
            journal.add(answers)
            this_attempt().reach(len(journal.answers), "row")
            advance(len(answers))


def _write_predictions(rows: Sequence[PromptRow], answers: Sequence[Answer], path: Path) -> None:
    lines = []
    for row, answer in zip(rows, answers, strict=True):
        (thought, text), (reference_thought, reference) = row.told_apart(answer), row.reference_told_apart()
        line = {
            "id": row.id,
            "prompt": row.prompt,
            "reference": reference,
            "prediction": text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens or len(row.prompt_ids),
            "completion_tokens": answer.completion_tokens,
        }
        thoughts = {"reasoning": thought, "reference_reasoning": reference_thought}
        line |= {name: value for name, value in thoughts.items() if value}
        lines.append(json.dumps(line | row.scoring.fields(), ensure_ascii=False) + "\n")
    atomic_write(path, "".join(lines))


def _say_endings(rows: Sequence[PromptRow], answers: Sequence[Answer]) -> None:
    """Say how many answers hold no answer proper, or ended otherwise than by themselves or at --max_new_tokens."""
    thoughts = sum(bool(thought) and not text for thought, text in map(PromptRow.told_apart, rows, answers))
    if thoughts:
        say(
            f"{thoughts} of {len(answers)} answers are a thought alone, and count as empty: raise --max_new_tokens; a "
            "server that takes whole answers for thoughts wants no reasoning parser"
        )
    reasons = Counter(answer.finish_reason for answer in answers)
    for reason in sorted(reasons.keys() - {"stop", "length"}):
        say(f"{reasons[reason]} of {len(answers)} answers ended with {reason!r}, by the server's word")


def _write_scores(
    rows: Sequence[PromptRow],
    answers: Sequence[Answer],
    sums: numpy.ndarray,
    figures: dict[str, object],
    path: Path,
) -> dict[str, Any]:
    predictions = [
        scored_prediction(
            row.id, row.told_apart(answer)[1], row.reference_told_apart()[1], row.scoring, answer.finish_reason
        )
        for row, answer in zip(rows, answers, strict=True)
    ]
    of_the_model = {number: reference_scores(row) for number, row in enumerate(sums.tolist()) if row[1]}
    tokens = sum(answer.completion_tokens for answer in answers)
    seconds = figures["seconds"]
    assert isinstance(seconds, float)
    # Of the answers made before a kill, the seconds are not known; and some servers do not count tokens.
    unknown = figures["answered_before"] or any(answer.text and not answer.completion_tokens for answer in answers)
    speed = {} if unknown else {"tokens_per_second": tokens / seconds}
    return write_scores(score_predictions(predictions, of_the_model), path, figures | speed)


if __name__ == "__main__":
    main()
