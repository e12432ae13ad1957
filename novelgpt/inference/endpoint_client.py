"""Answers of an OpenAI-compatible server (vLLM, SGLang, `transformers serve`): concurrent, with retries.

    client = EndpointClient("http://localhost:8000/v1", None, generation)
    for number, answer in client.answers([EndpointRequest("row 1", messages), …], concurrency=32):
        ...

The server applies its model's chat template and has its own defaults for missing fields, so each request names all
settings that the user chose. The key is read from the environment variable OPENAI_API_KEY.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from novelgpt.inference.endpoint_http import EndpointAddress, EndpointConnection, EndpointError
from novelgpt.inference.endpoint_replies import read_chat_reply, read_model_names, read_text_reply
from novelgpt.inference.generation import Answer
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import say_above_bars
from novelgpt.text.conversation import Message

LIST_SECONDS = 30.0
MAX_CAUSES = 20  # shown beside the progress bar; a server may put something new into each
# A token is a few characters, and a character up to twelve bytes of JSON ("\\ud83d\\ude42").
BYTES_PER_TOKEN, FURTHER_BYTES = 256, 4 * 2**20
# How servers refuse a field that they do not know, where they do not name it.
UNKNOWN_FIELD = re.compile(r"unknown|unrecogni[sz]ed|unsupported|unexpected|extra|additional|not permitted", re.I)


@dataclass(frozen=True)
class EndpointRequest:
    """What to answer.

    Attributes:
        name: of the request in errors, such as "row 7".
        prompt: messages of a conversation, or a raw text to continue.
        seed: added to that of the generation settings.
        thinking: whether to think before the answer; None leaves it to the server's template.
    """

    name: str
    prompt: Sequence[Message] | str
    seed: int = 0
    thinking: bool | None = None


@dataclass(frozen=True)
class Dialect:
    """Which fields a server takes, learnt from its refusals.

    Attributes:
        token_field: for the max answer length; newer OpenAI models only know `max_completion_tokens`.
        left_out: fields that the server does not know. Only fields are left out that change nothing (a penalty of 1),
            and `chat_template_kwargs`, for which the server's template has a default.
    """

    token_field: str = "max_tokens"
    left_out: frozenset[str] = field(default_factory=frozenset)

    def after(self, refusal: EndpointError, body: dict[str, Any], neutral: set[str]) -> Dialect | None:
        """The dialect to try after a refusal of this one; None if the refusal is not about a field.

        Args:
            refusal: what the server said.
            body: of the request.
            neutral: fields that can be left out.
        """
        if refusal.status not in (400, 422):
            return None
        unknown = UNKNOWN_FIELD.search(refusal.message) is not None
        other_name = "max_completion_tokens" in refusal.message or ("max_tokens" in refusal.message and unknown)
        if other_name and "messages" in body and "max_tokens" in body:
            return replace(self, token_field="max_completion_tokens")
        candidates = neutral & body.keys()
        named = {name for name in candidates if name in refusal.message}
        if not named and unknown and not any(name in refusal.message for name in body):
            named = candidates
        return replace(self, left_out=self.left_out | named) if named else None


class EndpointClient:
    """Asks one model of a server.

    Args:
        url: of the API, up to its version: http://localhost:8000/v1.
        model: name on the server; None for the first one it lists.
        generation: how tokens are chosen; without beams and n-gram bans, which servers do not offer.
        seconds: timeout of one answer.

    Attributes:
        name: of the model and where it is, to be shown.

    Raises:
        UserError: a setting that servers do not take, or the server cannot be reached or lists no model.
    """

    def __init__(self, url: str, model: str | None, generation: GenerationArguments, seconds: float = 1800) -> None:
        check_endpoint_settings(generation)
        self.address = EndpointAddress.parse(url, os.environ.get("OPENAI_API_KEY", ""))
        self.generation = generation
        self.seconds = seconds
        if model is None:
            with _event_loop() as loop:
                model = loop.run_until_complete(self._first_model())
        self.model = model
        self.name = f"{self.address.redact(model)} at {self.address.shown}"
        self.dialect = Dialect()
        self.shown_causes: set[str] = set()

    def answers(self, requests: Iterable[EndpointRequest], concurrency: int) -> Iterator[tuple[int, Answer]]:
        """Yield (index of the request, answer) as they arrive.

        Args:
            requests: in the order in which they are sent; of a long iterator, `concurrency` are in memory.
            concurrency: max requests at once.

        Raises:
            UserError: the server refuses a request, or does not answer after all retries.
        """
        queue: asyncio.Queue[tuple[int, Answer] | BaseException | None] = asyncio.Queue(concurrency)
        with _event_loop() as loop:
            loop.create_task(self._send_all(requests, concurrency, queue))
            # The loop only runs here, while an answer is awaited: Ctrl-C interrupts it in this thread.
            while (item := loop.run_until_complete(queue.get())) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    async def _send_all(self, requests: Iterable[EndpointRequest], concurrency: int, queue: asyncio.Queue[Any]) -> None:
        """Queue (index, answer) as they arrive; at the end None, or the first error."""
        waiting = iter(enumerate(requests))
        max_bytes = FURTHER_BYTES + BYTES_PER_TOKEN * self.generation.max_new_tokens

        async def work(connection: EndpointConnection) -> None:
            for index, request in waiting:
                await queue.put((index, await self._answer(connection, request)))

        try:
            connection = EndpointConnection(self.address, self.seconds, max_bytes, on_retry=self._show_once)
        except Exception as error:
            await queue.put(error)
            return
        workers = [asyncio.ensure_future(work(connection)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)
        finally:
            for worker in workers:
                worker.cancel()
            await connection.aclose()

    async def _answer(self, connection: EndpointConnection, request: EndpointRequest) -> Answer:
        """One answer, in a dialect that the server takes."""
        dialect, first_refusal = self.dialect, None
        raw = isinstance(request.prompt, str)
        path, parse = ("completions", read_text_reply) if raw else ("chat/completions", read_chat_reply)
        while True:
            body, neutral = self._body(request, dialect)
            try:
                answer = await connection.fetch(path, body, parse)
                break
            except EndpointError as refusal:
                following = dialect.after(refusal, body, neutral)
                if following is None:
                    raise _user_error(first_refusal or refusal, request) from refusal
                if following.token_field != dialect.token_field:
                    first_refusal = refusal  # of the field that all servers know, in case the other one is refused too
                dialect = following
        if "chat_template_kwargs" in dialect.left_out:
            self._show_once("does not take chat_template_kwargs: its template decides whether the model thinks")
        self.dialect = replace(dialect, left_out=dialect.left_out | self.dialect.left_out)
        return answer

    def _body(self, request: EndpointRequest, dialect: Dialect) -> tuple[dict[str, Any], set[str]]:
        """The body of a request, and which of its fields only state what servers without them do anyway."""
        generation = self.generation
        body: dict[str, Any] = {"model": self.model}
        optional: dict[str, Any] = {"repetition_penalty": generation.repetition_penalty}
        neutral = {"chat_template_kwargs"}
        if generation.repetition_penalty == 1.0:
            neutral.add("repetition_penalty")
        if isinstance(request.prompt, str):
            body |= {"prompt": request.prompt, "max_tokens": generation.max_new_tokens}
        else:
            body |= {"messages": request.prompt, dialect.token_field: generation.max_new_tokens}
            if request.thinking is not None:
                optional["chat_template_kwargs"] = {"enable_thinking": request.thinking}
        body["temperature"] = generation.temperature if generation.do_sample else 0.0
        if generation.do_sample:
            body |= {"top_p": generation.top_p, "seed": generation.seed + request.seed}
            # vLLM falls back to the model's own top_k and min_p; -1 is all tokens.
            optional |= {"top_k": generation.top_k or -1, "min_p": 0.0}
            neutral |= {"min_p"} | ({"top_k"} if not generation.top_k else set())
        return body | {name: value for name, value in optional.items() if name not in dialect.left_out}, neutral

    async def _first_model(self) -> str:
        connection = EndpointConnection(self.address, LIST_SECONDS, FURTHER_BYTES, max_retries=1)
        try:
            names = await connection.fetch("models", None, read_model_names)
        except EndpointError as error:
            raise UserError(
                f"no list of models from {self.address.shown}: it {error}",
                "check --endpoint and OPENAI_API_KEY, or name --endpoint_model",
            ) from error
        finally:
            await connection.aclose()
        if not names:
            raise UserError(f"{self.address.shown} lists no model", "name it with --endpoint_model")
        return names[0]

    def _show_once(self, cause: str) -> None:
        """Print a line above the progress bar, once for each cause."""
        if cause not in self.shown_causes and len(self.shown_causes) < MAX_CAUSES:
            self.shown_causes.add(cause)
            say_above_bars(f"the server {cause}")


def check_endpoint_settings(generation: GenerationArguments) -> None:
    """Raise a UserError for settings that these servers do not take."""
    for name, neutral in (("num_beams", 1), ("no_repeat_ngram_size", 0)):
        if vars(generation)[name] != neutral:
            raise UserError(
                f"an endpoint does not take --{name} {vars(generation)[name]}",
                "leave it out, or predict without --endpoint",
            )


class _EventLoop(asyncio.SelectorEventLoop):
    """Resolves hosts in daemon threads, for which the process does not wait at its end: resolvers may hang."""

    async def getaddrinfo(self, *args: Any, **options: Any) -> Any:
        """As `socket.getaddrinfo`."""
        found = concurrent.futures.Future[Any]()

        def resolve() -> None:
            try:
                found.set_result(socket.getaddrinfo(*args, **options))
            except Exception as error:
                found.set_exception(error)

        found.set_running_or_notify_cancel()
        threading.Thread(target=resolve, daemon=True).start()
        return await asyncio.wrap_future(found, loop=self)


@contextlib.contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop; its tasks end with it."""
    loop = _EventLoop()
    try:
        yield loop
    finally:
        loop.set_exception_handler(lambda *_: None)  # errors of tasks that nobody waits for any more are not shown
        while left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            # Ctrl-C within a task is raised here once more for each task that waits for it.
            with contextlib.suppress(KeyboardInterrupt):
                loop.run_until_complete(asyncio.wait(left))
        loop.close()


def _user_error(error: EndpointError, request: EndpointRequest) -> UserError:
    reason = str(error).removeprefix("answers ")
    cause = f"the server refuses {request.name} {reason}" if error.status else f"{request.name}: the server {error}"
    if error.status in (401, 403):
        remedy = "see that OPENAI_API_KEY, or user and password in --endpoint, are those of this server"
    elif error.status in (402, 429):
        remedy = "the server wants fewer requests or more credit: lower --endpoint_concurrency, or wait"
    elif error.status in (404, 405) or 200 <= error.status < 400:
        remedy = "see that --endpoint is the server's API up to the version (…/v1), and that it lists --endpoint_model"
    elif error.status >= 500:
        remedy = "see the server's log"
    elif error.status:
        remedy = "change what it names (it may not know --top_k or --repetition_penalty)"
    else:
        remedy = (
            "see that it runs, that --endpoint is its API up to the version (…/v1), and that --endpoint_timeout is "
            "long enough"
        )
    return UserError(cause, f"{remedy}; run this again to continue")
