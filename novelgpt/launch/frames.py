"""A connection between two launchers on which nothing is believed that is not signed with the run's secret.

Each side begins with a greeting: what it is, its protocol's version, and 32 random bytes. Then come frames: the length
of the body, a signature, the body. The signature is HMAC-SHA256 over the number of the frame in its direction, the
length and the body; its key is the HMAC, under the secret, of who sends ("first" or "member"), the first host's
greeting and the member's. So nothing can be replayed in another place, on another connection or in another run, and
nothing sent back to where it came from. It is checked before the body is looked into. What travels is signed and not
encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
from enum import Enum

from pydantic import ValidationError

from novelgpt.launch.messages import FROM_FIRST, FROM_MEMBER, VERSION, Message

MAGIC = b"novelgpt"
GREETING = struct.Struct("!8sH32s")  # magic, version, random bytes
HEAD = struct.Struct("!I32s")  # bytes of the body, signature
MOST_BYTES = 1 << 16  # of a body
ROUNDS = 16  # of reading, before others have their turn
SEND_SECONDS = 5.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes
# What a side sends that cannot verify the other's signature: no body has no bytes.
UNVERIFIED = HEAD.pack(0, bytes(32))


class Fault(Enum):
    """Why a connection is of no more use, as the end of "host 1 is gone: "."""

    GONE = "its launcher was killed, or the connection is cut"
    UNKNOWN = "it is no launcher of this toolkit"
    VERSION = "it runs another version of this toolkit"
    FORGED = "what came from there was not signed with the secret of this run"
    INVALID = "it sent what this version of the toolkit does not know"


class Link:
    """One connection. Nothing waits but a member's `send`; nothing is raised: what fails is noted as `fault`.

    What the first host says is little. Where the other side's system takes no more of it, nobody reads there.

    Attributes:
        connection: the socket.
        fault: why nothing more comes; None as long as all is well.
    """

    def __init__(self, connection: socket.socket, secret: bytes, first: bool) -> None:
        """Greet.

        Args:
            connection: to the other launcher; the link closes it.
            secret: of the run.
            first: whether this is the first host's end.
        """
        self.connection = connection
        self.fault: Fault | None = None
        self._secret = secret
        self._first = first
        self._greeting = GREETING.pack(MAGIC, VERSION, secrets.token_bytes(32))
        self._keys: tuple[bytes, bytes] | None = None  # for what goes out, for what comes in
        self._sent = self._received = 0
        self._rest = bytearray()
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # of one that has hung up
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if name in vars(socket):
                    connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
        self._write(self._greeting)

    @property
    def greeted(self) -> bool:
        """Whether the other side has greeted, without which nothing can be signed."""
        return self._keys is not None

    def send(self, message: Message) -> None:
        """Send it, signed."""
        if self._keys is None or self.fault is not None:
            return
        body = message.model_dump_json().encode()
        self._write(HEAD.pack(len(body), _signature(self._keys[0], self._sent, body)) + body)
        self._sent += 1

    def refuse(self) -> None:
        """Say that the other side's signature is none of this run's."""
        self._write(UNVERIFIED)

    def receive(self) -> list[Message]:
        """What has come meanwhile, in order; nothing behind a fault is looked at."""
        messages: list[Message] = []
        for _ in range(ROUNDS):
            if self.fault is not None:
                break
            try:
                data = self.connection.recv(MOST_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.fail(Fault.GONE)
                break
            self._rest += data
            self._read_greeting()
            while self._read_frame(messages):
                pass
        return messages

    def fail(self, fault: Fault) -> None:
        """Note a fault; the first one counts."""
        self.fault = self.fault or fault

    def close(self) -> None:
        """End the connection."""
        self.fail(Fault.GONE)
        self.connection.close()

    def _read_greeting(self) -> None:
        if self._keys is not None:
            return None
        if not MAGIC.startswith(self._rest[: len(MAGIC)]):
            return self.fail(Fault.UNKNOWN)
        if len(self._rest) >= GREETING.size:
            other = bytes(self._rest[: GREETING.size])
            del self._rest[: GREETING.size]
            if GREETING.unpack(other)[1] != VERSION:
                return self.fail(Fault.VERSION)
            both = self._greeting + other if self._first else other + self._greeting
            first, member = (hmac.digest(self._secret, end + both, "sha256") for end in (b"first", b"member"))
            self._keys = (first, member) if self._first else (member, first)
        return None

    def _read_frame(self, messages: list[Message]) -> bool:
        """Take one frame off what has come; whether there was a whole one."""
        if self._keys is None or self.fault is not None or len(self._rest) < HEAD.size:
            return False
        size, signature = HEAD.unpack_from(self._rest)
        if not 0 < size <= MOST_BYTES:
            self.fail(Fault.FORGED)
            return False
        if len(self._rest) < HEAD.size + size:
            return False
        body = bytes(self._rest[HEAD.size : HEAD.size + size])
        del self._rest[: HEAD.size + size]
        if not hmac.compare_digest(signature, _signature(self._keys[1], self._received, body)):
            self.fail(Fault.FORGED)
            return False
        self._received += 1
        try:
            messages.append((FROM_MEMBER if self._first else FROM_FIRST).validate_json(body))
        except ValidationError:
            self.fail(Fault.INVALID)
            return False
        return True

    def _write(self, data: bytes) -> None:
        try:
            if self._first:
                if self.connection.send(data) < len(data):
                    self.fail(Fault.GONE)
                return
            self.connection.settimeout(SEND_SECONDS)
            self.connection.sendall(data)
            self.connection.setblocking(False)
        except OSError:
            self.fail(Fault.GONE)


def _signature(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, struct.pack("!QI", number, len(body)) + body, "sha256")
