"""Rows answered by an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from novelgpt.inference.endpoint_client import EndpointClient, EndpointRequest
from novelgpt.inference.generation import Answer
from predict.generate import AnswerRows
from predict.rows import PromptRow


def through_endpoint(client: EndpointClient, concurrency: int) -> AnswerRows:
    """Answer rows by a server, with `concurrency` requests at once. The seed of a row depends on its number alone."""

    def answer(rows: Sequence[PromptRow], batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Answer]]:
        numbers = [number for batch in batches for number in batch]
        requests = [
            EndpointRequest(f"row {row.id}", row.prompt if row.plain else row.asked(), number, row.thinking)
            for number, row in ((number, rows[number]) for number in numbers)
        ]
        for index, one in client.answers(requests, concurrency):
            yield {numbers[index]: one}

    return answer
