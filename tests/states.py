"""States for tests: records and keys with everything equal except what a test is about."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tierline.server.state import Key, State, Usage


def usage(number: int = 1, **fields: Any) -> Usage:
    """A record with everything equal except what the test is about."""
    values: dict[str, Any] = {
        "request_id": f"chatcmpl-{number}",
        "key_id": "",
        "tenant": "default",
        "model": "demo",
        "endpoint": "chat",
        "level": "interactive",
        "outcome": "stop",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "output_tokens": 5,
        "arrived_s": 1000.0 + number,
        "queue_s": 0.25,
        "ttft_s": 0.5,
        "e2e_s": None,
    }
    return Usage(**(values | fields))


def key(key_id: str = "k1", **fields: Any) -> Key:
    values: dict[str, Any] = {
        "id": key_id,
        "tenant": "default",
        "name": "a key",
        "models": None,
        "budget_tokens": None,
        "created_s": 1.0,
        "expires_s": None,
        "revoked_s": None,
        "digest": b"\x00\xff digest",
        "pepper": "p",
    }
    return Key(**(values | fields))


def with_state(
    work: Callable[[State], Awaitable[Any]], path: Path | None = None, *, ended: str = "stopped"
) -> Any:
    """Open, do, close."""

    async def run() -> Any:
        state = State.open(path)
        try:
            return await work(state)
        finally:
            await state.close(ended=ended, now_s=2000.0)

    return asyncio.run(run())


def fill(connection: sqlite3.Connection) -> None:
    """Nothing more fits: as SQLite says it when a disk is full."""
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")


def make_room(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA max_page_count = 1000000")


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")
