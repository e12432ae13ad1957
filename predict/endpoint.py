"""Answers of an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): concurrent, with retries.

The server puts messages into its model's chat template and has its own defaults for what a request leaves out, so every
request names all of the settings that the user chose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from novelgpt.model.generation import Answer
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.remedies import pip_install
from predict.generate import AnswerRows
from predict.rows import PromptRow

if TYPE_CHECKING:
    import openai

RETRIES = 8  # with pauses that double from half a second to 8: a server that restarts is waited for
TIMEOUT = 1800.0  # seconds for one answer; long texts from a busy server take their time


def through_endpoint(
    url: str, model: str | None, generation: GenerationArguments, concurrency: int
) -> tuple[str, AnswerRows]:
    """Name of the server's model, and the way to have it answer.

    Args:
        url: of the API, up to its version: http://localhost:8000/v1.
        model: name on the server; None for the first that it lists.
        generation: how tokens are chosen; of beams and forbidden n-grams these servers know nothing.
        concurrency: requests at once.

    Raises:
        UserError: the client is not installed, the server cannot be reached or lists no model, or a setting that it
            cannot be told.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("--endpoint needs the package openai", pip_install("openai")) from error
    if generation.num_beams != 1 or generation.no_repeat_ngram_size:
        raise UserError("an endpoint has neither --num_beams nor --no_repeat_ngram_size", "leave them out")
    if concurrency < 1:
        raise UserError(f"--endpoint_concurrency {concurrency}", "take at least 1")
    # Local servers want no key, but the client wants a word.
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
    name = model or _first_model(client, url)

    def answer(rows: Sequence[PromptRow], batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Answer]]:
        numbers = [number for batch in batches for number in batch]
        with ThreadPoolExecutor(concurrency) as pool:
            asked = {pool.submit(_ask, client, name, rows[number], number, generation): number for number in numbers}
            try:
                for done in as_completed(asked):
                    yield {asked[done]: done.result()}
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return name, answer


def _first_model(client: openai.OpenAI, url: str) -> str:
    import openai

    try:
        models = client.with_options(max_retries=1, timeout=30.0).models.list().data
    except openai.OpenAIError as error:
        raise UserError(
            f"no list of models from {url}: {error}", "check --endpoint and OPENAI_API_KEY, or name --endpoint_model"
        ) from error
    if not models:
        raise UserError(f"{url} lists no model", "name it with --endpoint_model")
    return models[0].id


def _ask(client: openai.OpenAI, model: str, row: PromptRow, number: int, generation: GenerationArguments) -> Answer:
    """One answer. The client tries again after failed connections, time-outs, and errors 408, 409, 429 and 5xx."""
    import openai

    further: dict[str, Any] = {}
    sampling: dict[str, Any] = {"temperature": 0.0}
    if generation.do_sample:
        sampling = {"temperature": generation.temperature, "top_p": generation.top_p, "seed": generation.seed + number}
        if generation.top_k:
            further["top_k"] = generation.top_k
    if generation.repetition_penalty != 1.0:
        further["repetition_penalty"] = generation.repetition_penalty
    settings: Any = {"max_tokens": generation.max_new_tokens, "extra_body": further, **sampling}
    messages: Any = row.asked()
    reply: Any
    try:
        if row.plain:
            reply = client.completions.create(model=model, prompt=row.prompt, **settings)
        else:
            reply = client.chat.completions.create(model=model, messages=messages, **settings)
    except openai.APIConnectionError as error:
        raise UserError(f"the server does not answer: {error}", "start it and run this again: it goes on") from error
    except openai.APIStatusError as error:
        raise UserError(
            f"the server refuses row {row.id} with status {error.status_code}: {error.message}",
            "change what it names (it may not know --top_k or --repetition_penalty) and run this again: it goes on",
        ) from error
    choice = reply.choices[0]
    usage = reply.usage
    return Answer(
        (choice.text if row.plain else choice.message.content) or "",
        "stop" if choice.finish_reason == "stop" else "length",
        usage.completion_tokens if usage else 0,
        usage.prompt_tokens if usage else 0,
    )
