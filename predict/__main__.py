"""Prediction: checkpoint (+ adapter) -> predictions.jsonl -> scores.json."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy
from accelerate import PartialState
from accelerate.utils import gather_object

from novelgpt.model.generation import Answer
from novelgpt.model.loading import load_for_generation
from novelgpt.scoring.perplexity import summarise
from novelgpt.settings.arguments import ModelArguments
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.parser import parse_arguments
from novelgpt.settings.paths import EMBEDDED_BASE
from novelgpt.settings.runs import PredictRun
from novelgpt.text.tokenizer import load_tokenizer
from novelgpt.training.run_folder import newest_finetuning
from predict.generate import generate_answers, reference_sums
from predict.rows import PromptRow, read_prompt_rows
from predict.score import score_predictions, write_scores


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Run the pipeline on the words of a command line."""
    run = parse_arguments(PredictRun, argv)
    model_name = run.data.model or str(newest_finetuning() or EMBEDDED_BASE)
    folder = _output_folder(run.data.output_dir, model_name)
    chosen = ModelArguments(model_name, run.data.attention, run.data.trust_remote_code, run.data.hub)
    tokenizer = load_tokenizer(chosen)
    rows = read_prompt_rows(run.data.data_files, tokenizer, run.data.max_rows)
    model = load_for_generation(chosen, tokenizer)
    state = PartialState()
    own = rows[state.process_index :: state.num_processes]
    state.print(f"{len(rows)} rows for {model_name}")
    begin = time.perf_counter()
    answers = generate_answers(
        model, tokenizer, own, run.generation, run.data.batch_size, show_progress=state.is_main_process
    )
    seconds = time.perf_counter() - begin
    sums = reference_sums(model, tokenizer, own, run.data.batch_size)
    if state.num_processes > 1:
        answers = _interleave(gather_object([answers]), len(rows))
        sums = numpy.concatenate(gather_object([sums]))
    if state.is_main_process:
        _write_predictions(rows, answers, folder / "predictions.jsonl")
        _write_scores(rows, answers, sums, seconds, folder / "scores.json", asdict(run.generation), model_name)
        print(f"  predictions   {folder / 'predictions.jsonl'}\n  scores        {folder / 'scores.json'}")


def _output_folder(output_dir: str | None, model_name: str) -> Path:
    if output_dir is None and not Path(model_name).is_dir():
        raise UserError(f"{model_name} is no folder that predictions could be written beside", "name --output_dir")
    folder = Path(output_dir) if output_dir else Path(model_name) / "predict"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}", "name a folder that can be written") from error
    return folder


def _interleave(shares: list[list[Answer]], count: int) -> list[Answer]:
    """Answers of all processes in row order; process p of n answered rows p, p+n, p+2n, …"""
    return [shares[index % len(shares)][index // len(shares)] for index in range(count)]


def _write_predictions(rows: list[PromptRow], answers: list[Answer], path: Path) -> None:
    lines = [
        {
            "id": row.id,
            "prompt": "\n".join(message["content"] for message in row.messages[: -1 if row.reference else None]),
            "reference": row.reference,
            "prediction": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(row.prompt_ids),
            "completion_tokens": answer.completion_tokens,
        }
        for row, answer in zip(rows, answers, strict=True)
    ]
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)


def _write_scores(
    rows: list[PromptRow],
    answers: list[Answer],
    sums: numpy.ndarray,
    seconds: float,
    path: Path,
    generation: dict[str, object],
    model_name: str,
) -> None:
    scored = [index for index, row in enumerate(rows) if row.reference]
    scores: dict[str, object] = {}
    if scored:
        scores |= score_predictions([answers[i].text for i in scored], [rows[i].reference for i in scored])
        scores |= summarise(sums)
    scores |= {
        "stopped": sum(answer.finish_reason == "stop" for answer in answers) / len(answers),
        "seconds": seconds,
        "tokens_per_second": sum(answer.completion_tokens for answer in answers) / seconds,
        "model": model_name,
        "generation": generation,
    }
    write_scores(scores, path)


if __name__ == "__main__":
    main()
