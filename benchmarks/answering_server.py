"""A server that answers every chat completion with a short text at once: python answering_server.py PORT_FILE.

It speaks as much of the OpenAI API as prediction asks for, over connections that stay open.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

ANSWER = "雨下了一夜，天亮时停了。"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection, request by request."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            names = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
            await reader.readexactly(int(names.get(b"content-length", b"0")))
            body: dict[str, object] = {"data": [{"id": "stub"}]}
            if head.startswith(b"POST"):
                choice = {"message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
                body = {"choices": [choice], "usage": {"prompt_tokens": 50, "completion_tokens": len(ANSWER)}}
            data = json.dumps(body).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(data) + data)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    """Serve until the process is ended; the port is in PORT_FILE once it is open."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    Path(sys.argv[1]).write_text(str(server.sockets[0].getsockname()[1]), encoding="utf-8")
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
