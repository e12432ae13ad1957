"""HTTP requests to an endpoint, bounded in time, size and retries. Replies are shown as plain text, without secrets."""

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

from novelgpt.inference.endpoint_replies import InvalidReplyError, error_message
from novelgpt.settings.errors import UserError, reason_of
from novelgpt.settings.remedies import pip_install
from novelgpt.settings.terminal import one_line

Parsed = TypeVar("Parsed")

CONNECT_SECONDS = 30.0
MAX_REDIRECTS = 5
MAX_ERROR_BYTES = 65536
MAX_MESSAGE_CHARACTERS = 300
# Seconds between attempts: exponential backoff from the first to the max; a server's Retry-After is followed up to its
# own max.
FIRST_BACKOFF, MAX_BACKOFF, MAX_RETRY_AFTER = 0.5, 8.0, 60.0
RETRIES = 8  # while a server restarts or is busy
FEW_RETRIES = 2  # of what is likely to fail again: a reply that times out or is invalid
BUSY_STATUSES = (408, 409, 429)
MIN_SECRET = 4  # characters: a shorter one would be found in any text


class EndpointError(Exception):
    """A request that failed.

    Args:
        cause: what the server did; follows the words "the server".
        retries: how often the request may be repeated.
        pause: seconds that the server asks to wait; None if it does not ask.
        status: of the reply; 0 if there was none.
        message: of the server, unchanged; it may contain secrets.
    """

    def __init__(
        self, cause: str, retries: int, pause: float | None = None, status: int = 0, message: str = ""
    ) -> None:
        super().__init__(cause)
        self.retries = retries
        self.pause = pause
        self.status = status
        self.message = message


@dataclass(frozen=True)
class EndpointAddress:
    """Where an API is.

    Attributes:
        shown: the URL without secrets.
        url: for requests, up to the version; user and password are moved to `authorization`.
        authorization: value of that header; "" for none.
        secrets: texts that are never shown, the longest first.
    """

    shown: str
    url: httpx2.URL
    authorization: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def parse(cls, text: str, key: str) -> EndpointAddress:
        """Parse the URL that the user gave; user and password in it take precedence over the key.

        Raises:
            UserError: it is not an HTTP URL, or the key cannot be sent. The error shows neither.
        """
        remedy = "write it as http://localhost:8000/v1"
        try:
            parts = urlsplit(text)
            parts.port  # noqa: B018  # raises if it is invalid
            host = parts.netloc.rpartition("@")[2]
            url = httpx2.URL(urlunsplit((parts.scheme, host, parts.path, parts.query, "")))
        except (ValueError, httpx2.InvalidURL) as error:
            raise UserError("--endpoint is not a URL", remedy) from error
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError("--endpoint is not a URL of http or https", remedy)
        key = key.strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that no key has", "set it again: export OPENAI_API_KEY=…")
        authorization = f"Bearer {key}" if key else ""
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        if parts.username is not None:
            authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")
        plain = parts.username is None and not parts.query and not parts.fragment
        shown = text if plain else urlunsplit((parts.scheme, host, parts.path, "", ""))
        found = [key, user, password, parts.username, parts.password, authorization.partition(" ")[2]]
        found += [parameter.rpartition("=")[2] for parameter in parts.query.split("&")]  # all of it without "="
        found += [value for _, value in parse_qsl(parts.query)]
        secrets = {form for secret in found if secret and len(secret) >= MIN_SECRET for form in _encodings(secret)}
        return cls(shown, url, authorization, tuple(sorted(secrets, key=len, reverse=True)))

    def join(self, path: str) -> httpx2.URL:
        """The URL of a path below that of the API."""
        return self.url.copy_with(path=f"{self.url.path.rstrip('/')}/{path}")

    def redact(self, text: str) -> str:
        """Make a server's text safe to show: one short line without control characters and secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "…")
        text = one_line(" ".join(text.split()))
        return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[:MAX_MESSAGE_CHARACTERS] + "…"


def _encodings(secret: str) -> set[str]:
    """A text as servers echo it: unchanged, in JSON, in a Python repr, in a URL, in HTML."""
    forms = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), html.escape(secret)}
    forms |= {json.dumps(form)[1:-1] for form in forms} | {json.dumps(secret, ensure_ascii=False)[1:-1]}
    # The quotes of a repr depend on the text around.
    return forms | {repr(form)[1:-1] for form in forms} | {repr(form + "'\"")[1:-4] for form in forms}


class EndpointConnection:
    """Sends requests to one endpoint.

    Args:
        address: of the API.
        seconds: timeout of one attempt, from connecting to the last byte.
        max_bytes: of a reply.
        max_retries: of a request.
        on_retry: called with the cause before a request is repeated.

    Raises:
        UserError: the environment's proxies or certificates cannot be used.
    """

    def __init__(
        self,
        address: EndpointAddress,
        seconds: float,
        max_bytes: int,
        max_retries: int = RETRIES,
        on_retry: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self.address = address
        self.seconds = seconds
        self.max_bytes = max_bytes
        self.max_retries = max_retries
        self.on_retry = on_retry
        # `fetch` bounds the whole attempt. While an answer is generated, no byte arrives.
        timeout = httpx2.Timeout(None, connect=min(CONNECT_SECONDS, seconds))
        limits = httpx2.Limits(max_connections=None)
        try:
            self.client = httpx2.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False)
        except ImportError as error:
            raise UserError(
                "the environment names a SOCKS proxy, which needs the package socksio", pip_install("socksio")
            ) from error
        except OSError as error:
            raise UserError(
                f"the certificates that the environment names cannot be read: {reason_of(error)}",
                "correct SSL_CERT_FILE and SSL_CERT_DIR, or unset them",
            ) from error
        except (ValueError, httpx2.InvalidURL) as error:  # whose message holds the proxy's password
            raise UserError(
                "the environment names a proxy that is not one of http, https or socks5",
                "correct HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (and their names in lower case), or unset them",
            ) from error

    async def fetch(self, path: str, body: Mapping[str, Any] | None, parse: Callable[[bytes], Parsed]) -> Parsed:
        """Send a request and parse the reply. Failed connections, busy servers and invalid replies are retried.

        Args:
            path: below that of the API.
            body: to be posted as JSON; None for GET.
            parse: raises InvalidReplyError.

        Raises:
            EndpointError: of the last attempt.
        """
        attempts = 0
        while True:
            try:
                return parse(await asyncio.wait_for(self._exchange(path, body), self.seconds))
            except (asyncio.TimeoutError, TimeoutError):
                error = EndpointError(f"gives no complete reply within {self.seconds:g} seconds", FEW_RETRIES)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as failure:
                reason = self.address.redact(str(failure)) or type(failure).__name__
                error = EndpointError(f"does not answer: {reason}", RETRIES)
            except InvalidReplyError as failure:
                error = EndpointError(f"sends no answer: {self.address.redact(str(failure))}", FEW_RETRIES)
            except EndpointError as failure:
                error = failure
            attempts += 1
            if attempts > min(error.retries, self.max_retries):
                raise error
            self.on_retry(str(error))
            backoff = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** (attempts - 1)) * random.uniform(0.75, 1)
            await asyncio.sleep(backoff if error.pause is None else min(MAX_RETRY_AFTER, error.pause))

    async def aclose(self) -> None:
        """Close all connections."""
        await self.client.aclose()

    async def _exchange(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        """The body of a reply of status 200. Redirects that keep the method are followed, without the key elsewhere."""
        headers = {"Accept-Encoding": "identity", "Accept": "application/json", "Content-Type": "application/json"}
        if self.address.authorization:
            # Only set on the first request: the client drops it where a redirect leads to another host.
            headers["Authorization"] = self.address.authorization
        content = None if body is None else json.dumps(body).encode("ascii")
        method = "GET" if body is None else "POST"
        request = self.client.build_request(method, self.address.join(path), headers=headers, content=content)
        for _ in range(MAX_REDIRECTS + 1):
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
        cause = f"redirects the request to {self.address.redact(place)}, where it does not arrive"
        raise EndpointError(f"answers with status {status}: {cause}", 0, status=status)

    async def _read(self, response: httpx2.Response) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise InvalidReplyError("it is compressed, which was not requested")  # a few bytes can expand to many
        status = response.status_code
        max_bytes = self.max_bytes if status == 200 else MAX_ERROR_BYTES
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > max_bytes:
                break
        if status != 200:
            retries = RETRIES if status in BUSY_STATUSES or status >= 500 else 0
            message = error_message(bytes(data[:max_bytes]))
            cause = f": {self.address.redact(message)}" if message.strip() else " and no message"
            pause = _retry_after(response.headers)
            raise EndpointError(f"answers with status {status}{cause}", retries, pause, status, message)
        if len(data) > max_bytes:
            raise EndpointError(f"sends no answer: it is longer than {max_bytes:,} bytes", 0)
        return bytes(data)


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None if it is missing or invalid."""
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
