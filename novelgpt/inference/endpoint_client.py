"""Requests to a server, bounded in time, size and number. What it says is read as plain text, and no key is shown."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit, urlunsplit

import httpx2

from novelgpt.inference.endpoint_replies import InvalidReplyError, message_of
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import one_line

Read = TypeVar("Read")

CONNECT_SECONDS = 30.0
MOST_REDIRECTS = 5
MOST_ERROR_BYTES = 65536
MOST_MESSAGE_CHARACTERS = 300
# Pauses between tries, in seconds: they double from the first to the last. A server that asks for longer ones gets them
# up to the longest.
FIRST_PAUSE, LAST_PAUSE, LONGEST_PAUSE = 0.5, 8.0, 60.0
RETRIES = 8  # a server that restarts or is busy is waited for
FEW_RETRIES = 2  # of what is likely to fail again: a reply that never ends, or is none
BUSY_STATUSES = (408, 409, 429)
LEAST_SECRET = 4  # characters: a shorter one would be found in any text


class ServerError(Exception):
    """A request that failed.

    Args:
        cause: what the server did, to be read behind "the server".
        retries: how often this may be tried again.
        pause: seconds that the server asks to wait; None where it says nothing.
        status: of the reply; 0 where there was none.
        said: the server's message as it came, not to be shown.
    """

    def __init__(self, cause: str, retries: int, pause: float | None = None, status: int = 0, said: str = "") -> None:
        super().__init__(cause)
        self.retries = retries
        self.pause = pause
        self.status = status
        self.said = said


@dataclass(frozen=True)
class ServerAddress:
    """Where a server's API is.

    Attributes:
        shown: the URL without anything secret.
        url: for requests, up to the version; without user and password, which are in `authorization`.
        authorization: value of that header; "" for none.
        secrets: texts that are never shown.
    """

    shown: str
    url: httpx2.URL
    authorization: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str, key: str) -> ServerAddress:
        """From the URL that the user gave, and the key; user and password in the URL come before the key.

        Raises:
            UserError: it is no URL of http, or the key cannot be sent. Neither is shown.
        """
        remedy = "write it as http://localhost:8000/v1"
        try:
            parts = urlsplit(text)
            parts.port  # noqa: B018  # raises where it is none
            host = parts.netloc.rpartition("@")[2]
            url = httpx2.URL(urlunsplit((parts.scheme, host, parts.path, parts.query, "")))
        except (ValueError, httpx2.InvalidURL) as error:
            raise UserError("--endpoint is no URL", remedy) from error
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError("--endpoint is no URL of http or https", remedy)
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that no key has", "set it again: export OPENAI_API_KEY=…")
        authorization = f"Bearer {key}" if key else ""
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if parts.username is not None:
            pair = base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
            authorization = f"Basic {pair}"
        plain = parts.username is None and not parts.query and not parts.fragment
        shown = text if plain else urlunsplit((parts.scheme, host, parts.path, "", ""))
        found = [key, user, password, parts.username, parts.password, authorization.partition(" ")[2]]
        for field_of_query in parts.query.split("&"):  # of one without "=", the name is all there is
            found.append(field_of_query.rpartition("=")[2] if "=" in field_of_query else field_of_query)
        found += [value for _, value in parse_qsl(parts.query)]
        secrets = {form for secret in found if secret and len(secret) >= LEAST_SECRET for form in _forms(secret)}
        return cls(shown, url, authorization, tuple(sorted(secrets, key=len, reverse=True)))

    def of(self, path: str) -> httpx2.URL:
        """The URL of a path below the API's."""
        return self.url.copy_with(path=f"{self.url.path.rstrip('/')}/{path}")

    def plain(self, text: str) -> str:
        """What a server says, as a line to be shown: short, without control characters, without secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "…")
        text = one_line(" ".join(text.split()))
        return text if len(text) <= MOST_MESSAGE_CHARACTERS else text[:MOST_MESSAGE_CHARACTERS] + "…"


def _forms(secret: str) -> set[str]:
    """A text as servers write it back: as it is, in JSON, in Python's words, in a URL, in a page."""
    written = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), html.escape(secret)}
    written |= {json.dumps(form)[1:-1] for form in written} | {json.dumps(secret, ensure_ascii=False)[1:-1]}
    # Python chooses its quotation marks by what stands beside the text.
    return written | {repr(form)[1:-1] for form in written} | {repr(form + "'\"")[1:-4] for form in written}


class ServerClient:
    """Asks one server.

    Args:
        address: of its API.
        seconds: for one try, from the connection to the last byte.
        most_bytes: of a reply.
        most_retries: of any request.
        on_retry: told the cause when a request is tried again.

    Raises:
        UserError: what the environment says of proxies or certificates cannot be used.
    """

    def __init__(
        self,
        address: ServerAddress,
        seconds: float,
        most_bytes: int,
        most_retries: int = RETRIES,
        on_retry: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self.address = address
        self.seconds = seconds
        self.most_bytes = most_bytes
        self.most_retries = most_retries
        self.on_retry = on_retry
        # The time of a whole try is bounded below. As long as the answer is made, no byte comes.
        timeout = httpx2.Timeout(None, connect=min(CONNECT_SECONDS, seconds))
        limits = httpx2.Limits(max_connections=None)
        try:
            self.client = httpx2.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)
        except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
            raise _unusable_environment(error) from error

    async def fetch(self, path: str, body: Mapping[str, Any] | None, read: Callable[[bytes], Read]) -> Read:
        """What `read` makes of the reply; failed connections, busy servers and invalid replies are tried again.

        Args:
            path: below the API's.
            body: what to post as JSON; None to get.
            read: a reply to what is wanted of it; InvalidReplyError where it is none.

        Raises:
            ServerError: the last try failed, or one of which another would fail as well.
        """
        tries = 0
        while True:
            try:
                return read(await asyncio.wait_for(self._exchange(path, body), self.seconds))
            except (asyncio.TimeoutError, TimeoutError):
                error = ServerError(f"gives no whole reply within {self.seconds:g} seconds", FEW_RETRIES)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as failure:
                said = self.address.plain(str(failure)) or type(failure).__name__
                error = ServerError(f"does not answer: {said}", RETRIES)
            except InvalidReplyError as failure:
                error = ServerError(f"sends no answer: {self.address.plain(str(failure))}", FEW_RETRIES)
            except ServerError as failure:
                error = failure
            tries += 1
            if tries > min(error.retries, self.most_retries):
                raise error
            self.on_retry(str(error))
            pause = min(LAST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1)) * random.uniform(0.75, 1)
            await asyncio.sleep(pause if error.pause is None else min(LONGEST_PAUSE, error.pause))

    async def aclose(self) -> None:
        """Close all connections."""
        await self.client.aclose()

    async def _exchange(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        """The body of a reply of status 200; redirects that keep the method are followed, without the key elsewhere."""
        headers = {"Accept-Encoding": "identity", "Accept": "application/json", "Content-Type": "application/json"}
        if self.address.authorization:
            # On the first request alone: the client takes it off where a redirect leads to another host.
            headers["Authorization"] = self.address.authorization
        content = None if body is None else json.dumps(body).encode("ascii")
        method = "GET" if body is None else "POST"
        request = self.client.build_request(method, self.address.of(path), headers=headers, content=content)
        for _ in range(MOST_REDIRECTS + 1):
            response = await self.client.send(request, stream=True)
            try:
                if response.next_request is None:
                    return await self._read(response)
            finally:
                await response.aclose()
            request = response.next_request
            if request.method != method:
                break
        place = f"{request.url.scheme}://{request.url.netloc.decode('ascii')}{request.url.path}"
        status = response.status_code
        cause = f"redirects the request to {self.address.plain(place)}, where it does not arrive"
        raise ServerError(f"answers with status {status}: {cause}", 0, status=status)

    async def _read(self, response: httpx2.Response) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise InvalidReplyError("it is compressed, which was not asked for")  # a few bytes can become many
        status = response.status_code
        most = self.most_bytes if status == 200 else MOST_ERROR_BYTES
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > most:
                break
        if status != 200:
            retries = RETRIES if status in BUSY_STATUSES or status >= 500 else 0
            said = message_of(bytes(data[:most]))
            cause = f": {self.address.plain(said)}" if said.strip() else " and no word"
            pause = _pause_asked_for(response.headers)
            raise ServerError(f"answers with status {status}{cause}", retries, pause, status, said)
        if len(data) > most:
            raise ServerError(f"sends no answer: it is longer than {most:,} bytes", 0)
        return bytes(data)


def _unusable_environment(error: Exception) -> UserError:
    """What of HTTP_PROXY, ALL_PROXY, SSL_CERT_FILE and their like the HTTP client cannot take; no proxy is shown."""
    if isinstance(error, ImportError):
        return UserError("the environment names a SOCKS proxy, which needs the package socksio", pip_install("socksio"))
    if isinstance(error, OSError):
        return UserError(
            f"the certificates that the environment names cannot be read: {reason_of(error)}",
            "correct SSL_CERT_FILE and SSL_CERT_DIR, or unset them",
        )
    return UserError(
        "the environment names a proxy that is none of http, https or socks5",
        "correct HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (and their names in small letters), or unset them",
    )


def _pause_asked_for(headers: httpx2.Headers) -> float | None:
    """Seconds of a Retry-After, which are a number or a date; None where there is none that makes sense."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
            date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
            seconds = (date - datetime.now(timezone.utc)).total_seconds()
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
