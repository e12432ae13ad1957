"""Answers of an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): concurrent, with retries.

The server puts messages into its model's chat template and has its own defaults for what a request leaves out, so every
request names all of the settings that the user chose.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from novelgpt.inference.endpoint_client import ServerAddress, ServerClient, ServerError
from novelgpt.inference.endpoint_replies import read_chat_reply, read_model_names, read_text_reply
from novelgpt.inference.generation import Answer
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import say_above_bars
from predict.generate import AnswerRows
from predict.rows import PromptRow

LIST_SECONDS = 30.0
MOST_CAUSES = 20  # told beside the progress bar; a server may put something new into each
# A token is a few characters, and a character up to twelve bytes of JSON ("\\ud83d\\ude42").
BYTES_A_TOKEN, BYTES_BESIDE = 256, 4 * 2**20
# By these words servers refuse a field that they do not know, where they do not name it.
UNKNOWN_FIELD = re.compile(r"unknown|unrecogni[sz]ed|unsupported|unexpected|extra|additional|not permitted", re.I)


@dataclass
class Dialect:
    """What a server takes of what a request could say; its refusals teach it.

    Attributes:
        token_field: in which the longest answer is told; newer OpenAI models know `max_completion_tokens` alone.
        left_out: fields that it does not know. Only such are left out as would say nothing (a penalty of 1), and
            `chat_template_kwargs`, for which the server's template has a default.
    """

    token_field: str = "max_tokens"
    left_out: frozenset[str] = field(default_factory=frozenset)

    def after(self, refusal: ServerError, body: dict[str, Any], neutral: set[str]) -> Dialect | None:
        """The dialect to try after a refusal of this one; None where the refusal is not about a field.

        Args:
            refusal: what the server said.
            body: what it was asked.
            neutral: fields that can be left out.
        """
        if refusal.status not in (400, 422):
            return None
        said, unknown = refusal.said, UNKNOWN_FIELD.search(refusal.said) is not None
        other_name = "max_completion_tokens" in said or ("max_tokens" in said and unknown)
        if other_name and "messages" in body and "max_tokens" in body:
            return replace(self, token_field="max_completion_tokens")
        there = neutral & body.keys()
        named = {name for name in there if name in said}
        if not named and unknown and not any(name in said for name in body):
            named = there
        return replace(self, left_out=self.left_out | named) if named else None


def check_settings(generation: GenerationArguments) -> None:
    """Refuse what these servers cannot be told.

    Raises:
        UserError: names the setting.
    """
    for name, neutral in (("num_beams", 1), ("no_repeat_ngram_size", 0)):
        if vars(generation)[name] != neutral:
            raise UserError(
                f"an endpoint cannot be told --{name} {vars(generation)[name]}",
                "leave it out, or predict without --endpoint",
            )


def through_endpoint(
    url: str, model: str | None, generation: GenerationArguments, concurrency: int, seconds: float
) -> tuple[str, AnswerRows]:
    """Name of the server's model and where it is, and the way to have it answer.

    Args:
        url: of the API, up to its version: http://localhost:8000/v1.
        model: name on the server; None for the first that it lists.
        generation: how tokens are chosen, of what `check_settings` lets pass.
        concurrency: requests at once.
        seconds: for one answer.

    Raises:
        UserError: the server cannot be reached or lists no model.
    """
    address = ServerAddress.parse(url, os.environ.get("OPENAI_API_KEY", ""))
    if model is None:
        with _loop() as loop:
            model = loop.run_until_complete(_first_model(address))
    name = model

    def answer(rows: Sequence[PromptRow], batches: Sequence[Sequence[int]]) -> Iterator[dict[int, Answer]]:
        asking = _Asking(address, name, generation, seconds)
        numbers = iter([number for batch in batches for number in batch])
        with _loop() as loop:
            answers: asyncio.Queue[tuple[int, Answer] | BaseException | None] = asyncio.Queue()
            loop.create_task(asking.ask_all(rows, numbers, concurrency, answers))
            # The loop runs while an answer is waited for, in this thread: Ctrl-C ends the wait, whatever it is for.
            while (one := loop.run_until_complete(answers.get())) is not None:
                if isinstance(one, BaseException):
                    raise one
                yield dict([one])

    return f"{address.plain(name)} at {address.shown}", answer


class _Loop(asyncio.SelectorEventLoop):
    """Looks hosts up in threads that the process does not wait for when it ends: name servers may not answer."""

    async def getaddrinfo(self, *words: Any, **settings: Any) -> Any:
        """As `socket.getaddrinfo`."""
        found = concurrent.futures.Future[Any]()

        def look_up() -> None:
            try:
                found.set_result(socket.getaddrinfo(*words, **settings))
            except Exception as error:
                found.set_exception(error)

        found.set_running_or_notify_cancel()
        threading.Thread(target=look_up, daemon=True).start()
        return await asyncio.wrap_future(found, loop=self)


@contextlib.contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop, whose tasks end with it."""
    loop = _Loop()
    try:
        yield loop
    finally:
        loop.set_exception_handler(lambda *_: None)  # how tasks end that nobody waits for any more is no news
        while left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            # Ctrl-C within a task comes out of the loop once more for each that waits for this one.
            with contextlib.suppress(KeyboardInterrupt):
                loop.run_until_complete(asyncio.wait(left))
        loop.close()


async def _first_model(address: ServerAddress) -> str:
    client = ServerClient(address, LIST_SECONDS, BYTES_BESIDE, most_retries=1)
    try:
        names = await client.fetch("models", None, read_model_names)
    except ServerError as error:
        raise UserError(
            f"no list of models from {address.shown}: it {error}",
            "check --endpoint and OPENAI_API_KEY, or name --endpoint_model",
        ) from error
    finally:
        await client.aclose()
    if not names:
        raise UserError(f"{address.shown} lists no model", "name it with --endpoint_model")
    return names[0]


class _Asking:
    """Requests for the answers to rows."""

    def __init__(self, address: ServerAddress, model: str, generation: GenerationArguments, seconds: float) -> None:
        self.address = address
        self.model = model
        self.generation = generation
        self.seconds = seconds
        self.dialect = Dialect()
        self.noted: set[str] = set()

    async def ask_all(
        self, rows: Sequence[PromptRow], numbers: Iterator[int], concurrency: int, answers: asyncio.Queue[Any]
    ) -> None:
        """Put (number, answer) into the queue as they come; then None, or the first error in its place."""
        most_bytes = BYTES_BESIDE + BYTES_A_TOKEN * self.generation.max_new_tokens

        async def ask_in_turn() -> None:
            for number in numbers:
                await answers.put((number, await self._ask(client, rows[number], number)))

        try:
            client = ServerClient(self.address, self.seconds, most_bytes, on_retry=self._say_once)
        except Exception as error:
            await answers.put(error)
            return
        asking = [asyncio.ensure_future(ask_in_turn()) for _ in range(min(concurrency, len(rows)))]
        try:
            await asyncio.gather(*asking)
            await answers.put(None)
        except Exception as error:
            await answers.put(error)
        finally:
            for task in asking:
                task.cancel()
            await client.aclose()

    async def _ask(self, client: ServerClient, row: PromptRow, number: int) -> Answer:
        """One answer, in a dialect that the server takes."""
        dialect, kept = self.dialect, None
        path, read = ("completions", read_text_reply) if row.plain else ("chat/completions", read_chat_reply)
        while True:
            body, neutral = self._body(row, number, dialect)
            try:
                answer = await client.fetch(path, body, read)
                break
            except ServerError as refusal:
                following = dialect.after(refusal, body, neutral)
                if following is None:
                    raise _user_error(kept or refusal, row) from refusal
                if following.token_field != dialect.token_field:
                    kept = refusal  # of the field that all servers know, should the other be refused as well
                dialect = following
        if "chat_template_kwargs" in dialect.left_out:
            self._say_once("does not take chat_template_kwargs: its template decides whether the model thinks")
        self.dialect = replace(dialect, left_out=dialect.left_out | self.dialect.left_out)
        return answer

    def _body(self, row: PromptRow, number: int, dialect: Dialect) -> tuple[dict[str, Any], set[str]]:
        """What is asked, and which of its fields say nothing that a server which lacks them would do otherwise."""
        generation = self.generation
        body: dict[str, Any] = {"model": self.model}
        further: dict[str, Any] = {"repetition_penalty": generation.repetition_penalty}
        neutral = {"chat_template_kwargs"}
        if generation.repetition_penalty == 1.0:
            neutral.add("repetition_penalty")
        if row.plain:
            body |= {"prompt": row.prompt, "max_tokens": generation.max_new_tokens}
        else:
            body |= {"messages": row.asked(), dialect.token_field: generation.max_new_tokens}
            if row.thinking is not None:
                further["chat_template_kwargs"] = {"enable_thinking": row.thinking}
        body["temperature"] = generation.temperature if generation.do_sample else 0.0
        if generation.do_sample:
            body |= {"top_p": generation.top_p, "seed": generation.seed + number}
            # vLLM takes the model's own top_k and min_p where none is named; -1 is all tokens.
            further |= {"top_k": generation.top_k or -1, "min_p": 0.0}
            neutral |= {"min_p"} | ({"top_k"} if not generation.top_k else set())
        return body | {name: value for name, value in further.items() if name not in dialect.left_out}, neutral

    def _say_once(self, cause: str) -> None:
        """A line beside the progress bar, once for each cause."""
        if cause not in self.noted and len(self.noted) < MOST_CAUSES:
            self.noted.add(cause)
            say_above_bars(f"the server {cause}")


def _user_error(error: ServerError, row: PromptRow) -> UserError:
    said = str(error).removeprefix("answers ")
    cause = f"the server refuses row {row.id} {said}" if error.status else f"row {row.id}: the server {error}"
    return UserError(cause, f"{_remedy(error.status)}; run this again: it goes on")


def _remedy(status: int) -> str:
    """What can be done about a request that failed, by the status of the reply; 0 for none."""
    if status in (401, 403):
        return "see that OPENAI_API_KEY, or user and password in --endpoint, are those of this server"
    if status in (402, 429):
        return "the server wants fewer requests or more credit: lower --endpoint_concurrency, or wait"
    if status in (404, 405) or 200 <= status < 400:
        return "see that --endpoint is the server's API up to the version (…/v1), and --endpoint_model a name it lists"
    if status >= 500:
        return "see what the server's log says"
    if status:
        return "change what it names (it may not know --top_k or --repetition_penalty)"
    return (
        "see that it runs, that --endpoint is its API up to the version (…/v1), and that --endpoint_timeout is long "
        "enough"
    )
