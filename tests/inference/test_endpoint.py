"""Servers that misbehave: every reply is validated, bounded and asked again, and nothing of it poisons a later run."""

import asyncio
import base64
import functools
import gc
import gzip
import html
import importlib.util
import itertools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from novelgpt.inference import endpoint_client, endpoint_http
from novelgpt.inference.endpoint_client import EndpointClient, EndpointRequest
from novelgpt.inference.endpoint_http import EndpointAddress
from novelgpt.inference.endpoint_replies import InvalidReplyError, read_chat_reply, read_model_names
from novelgpt.settings.arguments import GenerationArguments
from novelgpt.settings.errors import UserError
from tests.inference.endpoint_servers import (
    Asked,
    Served,
    always,
    completion,
    predict,
    refused,
    send,
    serving,
    write_rows,
)
from tests.warm_python import start_warm


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between tries but those that servers ask for."""
    monkeypatch.setattr(endpoint_http, "FIRST_BACKOFF", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def without(reply: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in reply.items() if name != key}


def test_requests_are_made_as_they_are_sent() -> None:
    """Of a long iterator, as many are in memory as are on their way, and as many answers as nobody has taken."""
    made = taken = 0

    def requests() -> Iterator[EndpointRequest]:
        nonlocal made
        for made in range(1, 101):
            yield EndpointRequest(f"row {made}", [{"role": "user", "content": "问"}], made)

    with serving(always(completion())) as served:
        client = EndpointClient(served.url, None, GenerationArguments())
        indices = []
        for taken, (index, answer) in enumerate(client.answers(requests(), 4), start=1):
            indices.append(index)
            assert answer.text == "雨停了。" and made - taken <= 3 * 4
    assert sorted(indices) == list(range(100)) == list(range(taken)) and made == 100


DEEP = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
INVALID = {
    "a number": completion(7),
    "a list": completion([{"type": "text", "text": "雨"}]),
    "null": completion(None),
    "truth": completion(True),
    "a page": "<html><body>Welcome</body></html>",
    "broken JSON": '{"choices": [{"message": {"content": "雨',
    "nothing": "",
    "no choices": {"choices": []},
    "choices of null": {"choices": None},
    "a list alone": [],
    "null alone": "null",
    "no message": {"choices": [{"message": None, "finish_reason": "stop"}]},
    "a message of text": {"choices": [{"message": "雨", "finish_reason": "stop"}]},
    "a reason of numbers": completion("雨", 3),
    "reasoning of numbers": completion(None, reasoning_content=[1]),
    "an error": {"error": {"message": "out of memory"}},
    "given up": completion("雨", "abort"),
    "null without a word": completion(None, reasoning_content=" \n"),
    "no UTF-8": b'{"choices": [{"message": {"content": "\xff"}}]}',
    "too deep": DEEP,
}


@pytest.mark.parametrize("name", INVALID)
def test_replies_are_validated(name: str) -> None:
    reply = INVALID[name]
    data = reply if isinstance(reply, bytes) else (reply if isinstance(reply, str) else json.dumps(reply)).encode()
    with pytest.raises(InvalidReplyError):
        read_chat_reply(data)


@pytest.mark.parametrize("name", ["a number", "null", "a page", "too deep", "an error"])
def test_a_reply_that_is_none_is_said_and_kept_out_of_the_journal(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(always(INVALID[name])) as served:
        said = refused(served, write_rows(tmp_path, "雨停了。"), capsys)
        assert "row r0" in said and "sends no answer" in said
        assert ("out of memory" in said) == (name == "an error")
        assert len(served.asked) == 1 + 3
    journal = tmp_path / "out" / "predictions.partial" / "0.jsonl"
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 1  # what it belongs to


def test_one_bad_reply_is_asked_again(tmp_path: Path) -> None:
    replies = [completion(7), "<html>", completion("天亮了。")]
    with serving(lambda handler, asked, served: send(handler, replies.pop(0))) as served:
        (line,) = predict(served, write_rows(tmp_path, "雨停了。"))
    assert (line["prediction"], line["prompt_tokens"], line["completion_tokens"]) == ("天亮了。", 7, 5)


def by_row(replies: list[Any]) -> Any:
    """The recipe of a reply for each row of `write_rows`."""

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        send(handler, replies[int(asked.body["messages"][-1]["content"].removeprefix("问题"))])

    return recipe


def test_a_server_that_does_not_count_has_no_speed(tmp_path: Path) -> None:
    usages: list[Any] = [None, [], {}, {"completion_tokens": -1}, {"completion_tokens": "many"}]
    replies = [completion() | {"usage": usage} for usage in usages]
    with serving(by_row(replies)) as served:
        predictions = predict(served, write_rows(tmp_path, *(["雨停了。"] * 5)))
    assert {(line["prediction"], line["completion_tokens"]) for line in predictions} == {("雨停了。", 0)}
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert "tokens_per_second" not in scores


ENDINGS = [
    (completion(None, "tool_calls", tool_calls=[{"id": "1"}]), "", None, "tool_calls"),
    (completion(None, "content_filter"), "", None, "content_filter"),
    (completion("雨", "length"), "雨", None, "length"),
    (completion("雨", "eos_token"), "雨", None, "stop"),
    (completion("雨", "end_turn"), "雨", None, "stop"),
    (completion("雨", "STOP"), "雨", None, "stop"),
    (completion("雨", "MAX_TOKENS"), "雨", None, "length"),
    (completion("雨", "model_length"), "雨", None, "length"),
    (completion(None, "function_call"), "", None, "function_call"),
    (completion("雨", tool_calls=""), "雨", None, "stop"),
    (completion("<think>\n想\n</think>\n\n答", reasoning_content="想"), "答", "想", "stop"),
    (completion("答", reasoning_content=" \n"), "答", None, "stop"),
    (completion("雨", None), "雨", None, "unknown"),
    (completion("雨", "\x1b[31m"), "雨", None, "unknown"),
    (completion("", "stop"), "", None, "stop"),
    (completion(None, refusal="不行。"), "不行。", None, "stop"),
    (completion(None, "length", reasoning_content="想"), "", "想", "length"),
    (completion("答", reasoning_content="想"), "答", "想", "stop"),
    (completion("答", reasoning="想"), "答", "想", "stop"),
    (completion("<think>\n想\n</think>\n\n答"), "答", "想", "stop"),
    (completion("想\n</think>\n\n　　答"), "　　答", "想", "stop"),
    (completion("<think>想", "length"), "", "想", "length"),
    (completion("<think>\n\n</think>\n\n答"), "答", None, "stop"),
    (completion("标签 <think> 和 </think> 里是想。"), "标签 <think> 和 </think> 里是想。", None, "stop"),
]


def test_endings_and_thoughts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(by_row([ending[0] for ending in ENDINGS])) as served:
        predictions = predict(served, write_rows(tmp_path, *(["答"] * len(ENDINGS))))
    for line, (_, prediction, reasoning, reason) in zip(predictions, ENDINGS, strict=True):
        assert (line["prediction"], line.get("reasoning"), line["finish_reason"]) == (prediction, reasoning, reason)
    lines = (tmp_path / "out" / "row_scores.jsonl").read_bytes().splitlines()
    for line, (_, prediction, _, reason) in zip(map(json.loads, lines), ENDINGS, strict=True):
        assert line["stopped"] == float(reason == "stop")
        assert line["rouge-1"] == pytest.approx(float(prediction.strip("　") == "答"))
    printed = capsys.readouterr().out
    assert "2 of 24 answers are only a thought" in printed and "1 of 24 answers ended with 'tool_calls'" in printed


def test_thoughts_of_references_are_not_scored(tmp_path: Path) -> None:
    with serving(always(completion("<think>甲</think>答"))) as served:
        (line,) = predict(served, write_rows(tmp_path, "<think>\n乙\n</think>\n\n答"))
    assert (line["reference"], line["reference_reasoning"], line["reasoning"]) == ("答", "乙", "甲")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    assert scores["rouge-l"] == pytest.approx(1)
    assert served.asked[-1].body["chat_template_kwargs"] == {"enable_thinking": True}


def test_a_journal_that_an_earlier_version_poisoned_is_asked_again(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, *(["雨停了。"] * 7))
    refusing = [True]

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        if not refusing:
            send(handler, completion("天亮了。"))
        elif "问题6" in asked.body["messages"][-1]["content"]:
            send(handler, "no", 403)
        else:
            send(handler, completion())

    with serving(recipe) as served:
        with pytest.raises(SystemExit):
            predict(served, rows, "--endpoint_concurrency", "1")
        journal = tmp_path / "out" / "predictions.partial" / "0.jsonl"
        lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
        assert [line["row"] for line in lines[1:]] == [0, 1, 2, 3, 4, 5]
        for line in lines[1:]:
            line.pop("reasoning", None)  # earlier versions had none
        lines[1]["text"] = 7
        lines[2]["text"] = [{"type": "text", "text": "雨"}]
        lines[3]["text"] = None
        del lines[4]["finish_reason"]
        lines[5]["text"] = ""  # null, with a thought beside it
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        refusing.clear()
        predictions = predict(served, rows)
    assert [line["prediction"] for line in predictions] == ["天亮了。"] * 5 + ["雨停了。", "天亮了。"]


def endless(start: bytes, piece: bytes) -> Any:
    """A body that never ends."""

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(start)
        while not served.closing.is_set():
            handler.wfile.write(piece)
            if len(piece) < 9:
                served.closing.wait(0.01)

    return recipe


def silent(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
    served.closing.wait()


def endless_headers(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not served.closing.wait(0.01):
        handler.wfile.write(b"X: 1\r\n")


@pytest.mark.parametrize(
    ("recipe", "said", "tries"),
    [
        (endless(b"", b" " * 65536), "longer than", 1),
        (endless(b'{"choices": [', b" "), "no complete reply within 0.5 seconds", 3),
        (endless_headers, "no complete reply within 0.5 seconds", 3),
        (silent, "no complete reply within 0.5 seconds", 3),
    ],
)
def test_replies_are_bounded_in_time_and_size(
    recipe: Any, said: str, tries: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path, "雨停了。")
    # Much may arrive in a second; the body that is too long is told by its size.
    seconds = "60" if tries == 1 else "0.5"
    with serving(recipe) as served:
        assert said in refused(served, rows, capsys, "--endpoint_timeout", seconds)
        assert len(served.asked) <= 1 + tries


def test_a_compressed_body_is_not_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    with serving(always(bomb, Content_Encoding="gzip")) as served:
        assert "compressed" in refused(served, write_rows(tmp_path, "雨停了。"), capsys)
        assert served.asked[-1].headers["accept-encoding"] == "identity"


def test_a_server_that_breaks_off_or_is_busy_is_asked_again(tmp_path: Path) -> None:
    def broken(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"{")

    past = format_datetime(datetime.now(timezone.utc) - timedelta(hours=1), usegmt=True)
    steps: list[Any] = [
        broken, lambda handler: handler.connection.close(),
        *(lambda handler, text=text: send(handler, "busy", 503, Retry_After=text)
          for text in ("0", past, "-3", "nan", "soon", "Wed, 99 Foo 2026")),
    ]  # fmt: skip

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        if steps:
            steps.pop(0)(handler)
        else:
            send(handler, completion("天亮了。"))

    with serving(recipe) as served:
        (line,) = predict(served, write_rows(tmp_path, "雨停了。"))
    assert line["prediction"] == "天亮了。"
    assert not steps


def test_no_server_makes_us_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_http, "MAX_RETRY_AFTER", 0.01)
    pauses = ["99999999", "inf", "1e999", "Fri, 31 Dec 9999 23:59:59 GMT"]

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        if pauses:
            send(handler, "busy", 429, Retry_After=pauses.pop())
        else:
            send(handler, completion())

    with serving(recipe) as served:
        predict(served, write_rows(tmp_path, "雨停了。"))
    assert not pauses


def test_causes_of_further_tries_are_told_once_and_not_without_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_http, "MAX_BACKOFF", 0.0)
    rows = write_rows(tmp_path, *(["雨停了。"] * 12))
    counted = itertools.count()

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        number = next(counted)
        send(handler, completion()) if number % 4 == 3 else send(handler, f"busy, request {number}", 503)

    with serving(recipe) as served:
        predict(served, rows, "--endpoint_concurrency", "1")
    assert capsys.readouterr().out.count("busy, request") == endpoint_client.MAX_CAUSES


def test_tries_are_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(always({"error": {"message": "no\x1b[31m\u202e memory\n" * 99}}, 503, Retry_After="0")) as served:
        said = refused(served, write_rows(tmp_path, "雨停了。"), capsys)
        assert len(served.asked) == 1 + 9
    assert "status 503" in said and "no<U+001B>[31m<U+202E> memory" in said
    assert said.isprintable() and len(said) < 500


def test_the_key_goes_to_no_other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    with serving(always(completion())) as other:
        elsewhere = always("", 307, Location=f"{other.url}/chat/completions")
        with serving(elsewhere) as served:
            predict(served, write_rows(tmp_path, "雨停了。"))
            assert served.asked[-1].headers["authorization"] == "Bearer sk-secret-1"
        (asked,) = other.asked
        assert "authorization" not in asked.headers and asked.body["messages"]


@pytest.mark.parametrize("status", [302, 307])
def test_redirects_that_lose_the_question_or_go_round_are_refused(
    status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(always("", status, Location="/v1/chat/completions")) as served:
        said = refused(served, write_rows(tmp_path, "雨停了。"), capsys)
        assert f"status {status}: redirects the request to {served.url}/chat/completions," in said
        assert len(served.asked) <= 1 + 1 + endpoint_http.MAX_REDIRECTS


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_secrets_are_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """User and password in the URL, a key in its query, and the key; also where the server says them back."""
    secrets = ["sk-secret-1", "hanako", "pass%2Fword", "pass/word", "query-key"]
    monkeypatch.setenv("OPENAI_API_KEY", secrets[0])
    rows = write_rows(tmp_path, "雨停了。")

    def echo(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        said = f"no such key: {' '.join(secrets)} {asked.headers['authorization']} {asked.path}"
        send(handler, {"error": {"message": said}}, 401 if asked.path.endswith("x=query-key") else 404)

    with serving(echo) as served:
        private = served.url.replace("http://", "http://hanako:pass%2Fword@") + "?x=query-key"
        for url in (private, private.replace("/v1", "/v1/models/none")):
            with pytest.raises(SystemExit):
                predict(served, rows, url=url)
        basic = base64.b64encode(b"hanako:pass/word").decode()
        assert served.asked[-1].headers["authorization"] == f"Basic {basic}"
    with serving(always(completion())) as served:
        predict(served, rows, url=served.url.replace("http://", "http://hanako:pass%2Fword@") + "?x=query-key")
        assert served.asked[-1].path == "/v1/chat/completions?x=query-key"
    printed = capfd.readouterr()
    shown = printed.out + printed.err + everything_in(tmp_path / "out").decode()
    assert "status 401" in shown and served.url in shown
    assert not [secret for secret in [*secrets, basic] if secret in shown]
    with pytest.raises(SystemExit):
        predict(served, rows, url="http://hanako:password@[::1/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\n秘密")
    with pytest.raises(SystemExit):
        predict(served, rows)
    assert not {"hanako", "秘密"} & set(re.findall(r"\w+", capfd.readouterr().err))


def say_back(
    echo: Callable[[Asked], Any], handler: BaseHTTPRequestHandler, asked: Asked, served: Served, status: int = 400
) -> None:
    send(handler, echo(asked), status)


def test_secrets_are_masked_in_whatever_writing_a_server_says_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    key = "sk-a'b\"c\\d&e"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    rows = write_rows(tmp_path, "雨停了。")
    echoes: list[Any] = [
        lambda asked: {"error": {"headers": asked.headers}},
        lambda asked: repr(asked.headers),
        lambda asked: html.escape(asked.headers["authorization"]),
        lambda asked: asked.path,
    ]
    for echo in echoes:
        recipe = functools.partial(say_back, echo)
        with serving(recipe) as served, pytest.raises(SystemExit):
            predict(served, rows, url=served.url + "?key=ab%2Fcdef&nameless")
    page = functools.partial(say_back, lambda asked: f"<p>{asked.headers['authorization']}", status=200)
    with serving(page) as served, pytest.raises(SystemExit):
        predict(served, rows)

    def list_the_key(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        listed = {"data": [{"id": f"model of {asked.headers['authorization']}"}]}
        send(handler, listed if asked.path.endswith("/models") else completion())

    with serving(list_the_key, lists_models=False) as served:
        predict(served, rows)
        assert key in served.asked[-1].body["model"]
    printed = capfd.readouterr()
    shown = printed.out + printed.err + everything_in(tmp_path / "out").decode()
    assert shown.count("status 400") >= 4
    assert not [part for part in ("sk-a", "b&quot;c", "d&e", "cdef", "nameless") if part in shown]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:1"}, "socks"),
        ({"HTTPS_PROXY": "ftp://hanako:password@127.0.0.1"}, "a proxy that is not"),
        ({"SSL_CERT_FILE": "/nowhere"}, "certificates"),
        ({"SSL_CERT_FILE": __file__}, "certificates"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--endpoint_model", "small"]])
def test_what_the_environment_says_of_proxies_and_certificates_is_checked(
    variables: dict[str, str],
    said: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if said == "socks" and importlib.util.find_spec("socksio") is not None:
        pytest.skip("SOCKS proxies can be used here")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with serving(always(completion())) as served:
        told = refused(served, write_rows(tmp_path, "雨停了。"), capsys, *words)
    assert said in told.lower() and "hanako" not in told and "password" not in told


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "OPENAI_API_KEY"), (404, "--endpoint_model"), (204, "--endpoint"), (503, "log"), (422, "--top_k")],
)
def test_the_remedy_follows_from_the_status(
    status: int, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(always("", status)) as served, pytest.raises(SystemExit):
        predict(served, write_rows(tmp_path, "雨停了。"))
    cause, fix = capsys.readouterr().err.splitlines()[-2:]
    assert cause == f"error: the server refuses row r0 with status {status} and no message" and remedy in fix


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://h:99999/v1", "http://h:x/", ""]
)
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(UserError, match="--endpoint is not a URL"):
        EndpointAddress.parse(url, "")


@pytest.mark.parametrize(
    "listed", ["<html>", {"data": None}, {"data": [{"id": 3}]}, {}, "[" * 9999, {"data": [{"id": "x" * 9999}]}]
)
def test_lists_of_models_are_validated(listed: Any) -> None:
    with pytest.raises(InvalidReplyError):
        read_model_names((listed if isinstance(listed, str) else json.dumps(listed)).encode())


@pytest.mark.parametrize(("listed", "said"), [("<html>", "no list of models"), ({"data": []}, "lists no model")])
def test_a_server_that_lists_no_model_is_said(
    listed: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(always(listed), lists_models=False) as served:
        assert said in refused(served, write_rows(tmp_path, "雨停了。"), capsys)


def knows(*fields: str, saying: str) -> Any:
    """A server that takes no field but these, and says so in its own words."""

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        unknown = sorted(asked.body.keys() - {"model", "messages", "temperature", "top_p", "seed", *fields})
        if unknown:
            send(handler, {"error": {"message": saying.format(unknown[0])}}, 400)
        else:
            send(handler, completion())

    return recipe


@pytest.mark.parametrize(
    ("fields", "saying", "words"),
    [
        (["max_completion_tokens"], "Unsupported parameter: '{}'. Use 'max_completion_tokens' instead.", []),
        (["max_completion_tokens"], "Unrecognized request argument supplied: {}", []),
        (["max_tokens"], "Unrecognized request argument supplied: {}", ["--do_sample", "--top_k", "0"]),
        (["max_tokens"], "body.{}: Extra inputs are not permitted", []),
        (["max_tokens"], "unknown field", []),
        (["max_tokens", "top_k"], "no field {}", ["--do_sample", "--top_k", "7"]),
    ],
)
def test_what_a_server_lacks_is_left_out_where_it_says_nothing(
    fields: list[str], saying: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path, "雨停了。", "雨停了。")
    with serving(knows(*fields, saying=saying)) as served:
        predict(served, rows, *words, "--endpoint_concurrency", "1")
        taken = [asked.body for asked in served.asked[-2:]]
    assert all(body.keys() >= set(fields) for body in taken)
    assert taken[0][next(name for name in fields if "tokens" in name)] == 512
    assert "does not take chat_template_kwargs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--repetition_penalty", "1.2"], ["--do_sample", "--top_k", "7"], ["--max_new_tokens", "9999"]]
)
def test_what_the_user_chose_is_never_left_out(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = knows("min_p", "chat_template_kwargs", saying="Unknown field {}")
    with serving(recipe) as served:
        assert "status 400: Unknown field" in refused(served, write_rows(tmp_path, "雨停了。"), capsys, *words)


def test_every_setting_is_named_and_thinking_is_asked_for_as_in_training(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, "雨停了。", "<think>\n想\n</think>\n\n答", "")
    sampling = ["--do_sample", "--temperature", "1.1", "--top_p", "0.9", "--top_k", "0", "--seed", "5"]
    with serving(always(completion())) as served:
        predict(served, rows, *sampling, "--endpoint_concurrency", "1")
        first, second, third = sorted((asked.body for asked in served.asked[1:]), key=lambda body: body["seed"])
        predict(served, rows)
        greedy = served.asked[-1].body
    assert (first["temperature"], first["top_p"], first["top_k"], first["seed"]) == (1.1, 0.9, -1, 5)
    assert (first["repetition_penalty"], first["min_p"]) == (1.0, 0.0)
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert second["chat_template_kwargs"] == {"enable_thinking": True}
    assert "chat_template_kwargs" not in third
    assert (greedy["temperature"], greedy["repetition_penalty"]) == (0.0, 1.0)


def test_an_interrupt_within_a_request_ends_all_that_wait_for_it(caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it strikes: here in a task for which another one waits, as for a reply, that has something to close."""
    closed = []

    async def exchange() -> None:
        raise KeyboardInterrupt

    async def ask() -> None:
        await asyncio.wait_for(asyncio.ensure_future(exchange()), 60)

    async def ask_all() -> None:
        try:
            await asyncio.gather(asyncio.ensure_future(ask()))
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    with pytest.raises(KeyboardInterrupt), endpoint_client._event_loop() as loop:
        loop.create_task(ask_all())
        loop.run_until_complete(asyncio.sleep(60))
    gc.collect()
    assert closed == [True] and loop.is_closed() and not caplog.records


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_keeps_what_was_answered(end: signal.Signals, tmp_path: Path) -> None:
    """A server that answers one row and then hangs, with a body half sent."""
    rows = write_rows(tmp_path, *(["雨停了。"] * 3))
    hanging = threading.Event()
    journal = tmp_path / "out" / "predictions.partial" / "0.jsonl"

    def recipe(handler: BaseHTTPRequestHandler, asked: Asked, served: Served) -> None:
        if "问题0" in asked.body["messages"][-1]["content"]:
            send(handler, completion())
            return
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"{")
        while journal.read_bytes().count(b"\n") < 2 and not served.closing.wait(0.02):
            pass  # the answer before is on its way to the disk
        hanging.set()
        served.closing.wait()

    with serving(recipe) as served:
        words = ["--endpoint", served.url, "--data_files", str(rows), "--output_dir", str(tmp_path / "out")]
        process = start_warm(["-m", "predict", *words, "--endpoint_concurrency", "1"], {}, tmp_path / "log")
        assert hanging.wait(300), (tmp_path / "log").read_text()
        process.signal(end)
        status = process.wait()
    assert status == (130 if end == signal.SIGINT else -signal.SIGTERM), (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    lines = journal.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1])["text"] == "雨停了。" and len(lines) == 2
