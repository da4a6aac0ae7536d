"""The client that servers are measured with: raw HTTP/1.1 over as many connections as asked.

`bench_server` starts it as a process of its own, so that it takes the other core.  It imports
nothing but the standard library and uvloop, builds its requests once and looks at answers no
more than it must: for their end, and for the tokens they say they have.
"""

import asyncio
import json
import statistics
import sys
import time
from typing import Any

import uvloop


class Connection(asyncio.Protocol):
    """One request at a time, again and again."""

    def __init__(self, request: bytes, end: bytes) -> None:
        self.request, self.end = request, end
        self.transport: asyncio.Transport | None = None
        self.data = bytearray()
        self.answer: asyncio.Future[bytes] | None = None
        self.first_s = self.began_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.data:
            self.first_s = time.perf_counter()
        self.data += data
        if self.complete and self.answer is not None and not self.answer.done():
            self.answer.set_result(bytes(self.data))

    @property
    def complete(self) -> bool:
        """An answer with a length is there when it is; a stream, at its last chunk."""
        if self.end:
            return self.data.endswith(self.end)
        head, mark, body = self.data.partition(b"\r\n\r\n")
        if not mark:
            return False
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return len(body) >= int(length)

    def connection_lost(self, error: Exception | None) -> None:
        del error
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError(f"closed: {bytes(self.data[:300])!r}"))

    async def ask(self) -> bytes:
        assert self.transport is not None
        self.data.clear()
        self.answer = asyncio.get_running_loop().create_future()
        self.began_s = time.perf_counter()
        self.transport.write(self.request)
        return await self.answer


def request_of(path: str, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text


def tokens_in(answer: bytes) -> int:
    """As its usage says; asserts that it is an answer."""
    assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
    at = answer.rindex(b'"completion_tokens":') + len(b'"completion_tokens":')
    return int(answer[at : at + 8].split(b",")[0].split(b"}")[0])


async def measure(port: int, path: str, body: dict[str, Any], *, clients: int, each: int) -> Any:
    """`clients` connections ask `each` times one after another; what came in which time."""
    loop = asyncio.get_running_loop()
    request = request_of(path, body)
    end = b"0\r\n\r\n" if body.get("stream") else b""
    connections = []
    for _ in range(clients):
        made = await loop.create_connection(lambda: Connection(request, end), "127.0.0.1", port)
        connections.append(made[1])
    tokens, firsts, totals = 0, [], []

    async def run(connection: Connection) -> None:
        nonlocal tokens
        for _ in range(each):
            told = tokens_in(await connection.ask())
            tokens += told
            now_s = time.perf_counter()
            firsts.append(connection.first_s - connection.began_s)
            totals.append(now_s - connection.began_s)

    await asyncio.gather(*[connection.ask() for connection in connections[:1]])  # warm
    start_s = time.perf_counter()
    await asyncio.gather(*map(run, connections))
    elapsed_s = time.perf_counter() - start_s
    for connection in connections:
        assert connection.transport is not None
        connection.transport.close()
    assert tokens == clients * each * body["max_tokens"], (tokens, clients * each)
    return {
        "requests_per_s": clients * each / elapsed_s,
        "tokens_per_s": tokens / elapsed_s,
        "first_ms_p50": statistics.median(firsts) * 1e3,
        "total_ms_p50": statistics.median(totals) * 1e3,
        "total_ms_p99": sorted(totals)[int(len(totals) * 0.99)] * 1e3,
        "client_cpu_share": time.process_time() / elapsed_s,
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(uvloop.run(measure(**asked))))
