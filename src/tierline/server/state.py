"""What outlives a process: usage records, API keys, and the history of runs.

`State` owns one SQLite database (`database`) and the only thread that touches it.  The event loop
hands it records and never waits: the thread takes whatever has come meanwhile, writes it as one
statement, which is one transaction, and only then acknowledges.  A group is one statement for the
loop's sake too: a thread asks for the interpreter after each.  What is acknowledged outlives the
process at once, and the machine a second later: a sync at every commit would hold up answers for
as long as the disk takes, so a second thread syncs what was written meanwhile.

While the disk refuses, records are kept and tried again, nobody waits for them, `trouble` says why,
and it clears by itself.  What is kept has an end: from `DOORS_CLOSE` records on `full` asks the
doors to close, and past `KEPT_MAX` a record is dropped, and counted.

Invariants
    INV-SRV-10  an acknowledged record is committed: `kill -9` loses none
    INV-SRV-11  a request id is counted once, whoever records it again
    INV-SRV-12  what a key has spent is the sum of its records, without what the server failed
"""

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import orjson

from tierline.base.errors import DependencyError
from tierline.base.names import reject_unknown_keys
from tierline.server.database import LOG_NAME, connect, lock_folder
from tierline.server.life import Life

T = TypeVar("T")

GROUP_MAX = 1000  # records in a transaction
NOT_CHARGED = ("error", "late")  # the server's fault; as in the trigger `usage_counts`
KEPT_MAX = 100_000  # records that wait for the disk, at most; some 50 MB
DOORS_CLOSE = 90_000
PAUSE_S, PAUSE_S_MAX = 0.05, 1.0  # between attempts while the disk refuses
SYNC_S = 1.0  # what a power cut may cost

log = logging.getLogger("tierline.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one request used, and how it went; the record that accounts are made of."""

    request_id: str
    key_id: str  # "" where nobody needs a key
    tenant: str
    model: str
    endpoint: str
    level: str  # its service class
    outcome: str
    prompt_tokens: int  # cached ones included
    cached_tokens: int
    output_tokens: int
    arrived_s: float  # Unix time
    queue_s: float | None
    ttft_s: float | None
    e2e_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key as it is kept: enough to recognise it, not enough to use it."""

    id: str
    tenant: str
    name: str
    models: tuple[str, ...] | None  # None: every model
    budget_tokens: int | None  # prompts and answers together; None: no end
    created_s: float  # Unix time, as the next two
    expires_s: float | None
    revoked_s: float | None
    digest: bytes = field(repr=False)
    pepper: str = field(repr=False)
    spent_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the server."""

    number: int
    started_s: float  # Unix time
    seen_s: float  # its last sign of life: the end of the last request that it recorded
    ended_s: float | None
    ended: str  # "": it runs; "killed": found without an end at the next start
    model: str
    options: Mapping[str, Any]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """Sums of usage records that share what `by` says."""

    by: Mapping[str, str]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


USAGE_FIELDS = tuple(f.name for f in fields(Usage))
KEY_FIELDS = tuple(f.name for f in fields(Key))
RUN_FIELDS = tuple(f.name for f in fields(Run))
TOTALS_BY = ("day", "tenant", "key_id", "model")
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")

_usage_row = attrgetter(*USAGE_FIELDS)
_RECORD = (
    f"INSERT INTO usage ({', '.join(USAGE_FIELDS)}, run) SELECT "
    + ", ".join(f"json_extract(value, '$[{i}]')" for i in range(len(USAGE_FIELDS)))
    + ", ?2 FROM json_each(?1) WHERE true ON CONFLICT (request_id) DO NOTHING"
)

_OUR_BUGS = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError)

Ask = Callable[[sqlite3.Connection], Any]
Given = tuple[Usage, "asyncio.Future[Any] | None"]  # None: its caller was told to go on


def usage_of(life: Life) -> Usage:
    """The record of a request that has its outcome."""
    assert life.outcome, "it still lives"
    return Usage(
        request_id=life.id,
        key_id=life.key_id,
        tenant=life.tenant,
        model=life.model,
        endpoint=life.endpoint,
        level=life.level,
        outcome=life.outcome,
        prompt_tokens=life.prompt_tokens,
        cached_tokens=life.cached_tokens,
        output_tokens=life.output_tokens,
        arrived_s=life.arrived_s,
        queue_s=life.queue_s,
        ttft_s=life.ttft_s,
        e2e_s=life.e2e_s,
    )


class State:
    """Owns the database and its thread. Everything public is called on the event loop."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.trouble = ""  # why usage cannot be recorded at the moment; "": it can
        self.dropped = 0  # records that found no room to wait
        self._lock = None if folder is None else lock_folder(folder)
        try:
            self._connection = connect(folder)
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise
        spent = self._connection.execute("SELECT id, spent_tokens FROM keys")
        self._spent_tokens: dict[str, int] = dict(spent.fetchall())
        self._run: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0
        self._given: list[tuple[Usage, asyncio.Future[Any]]] = []  # in this turn of the loop
        self._inbox: SimpleQueue[tuple[Usage | Ask, asyncio.Future[Any]] | None] = SimpleQueue()
        self._closing = threading.Event()
        self._unsynced = False
        work = [self._serve] if folder is None else [self._serve, self._sync]
        self._threads = [threading.Thread(target=w, name="state", daemon=True) for w in work]
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(cls, path: Path | None) -> "State":
        """The state in the data folder `path`; None: in memory, and nothing is kept.

        Raises `InputError` or `DependencyError` that says what is wrong with the folder: it
        cannot be written, has another server, or holds a file that is damaged or too new.
        """
        return cls(path)

    # --- usage ------------------------------------------------------------------------------

    def record(self, usage: Usage) -> "asyncio.Future[bool]":
        """Keep a record: True once it is committed.

        False, at once, while the disk refuses: it waits and is tried again, unless there is no
        room to wait.  So whoever awaits this is held up by a commit and never by a full disk.
        Need not be awaited.  Its tokens count as spent at once, unless the server failed it.
        """
        self._loop = asyncio.get_running_loop()
        done: asyncio.Future[bool] = self._loop.create_future()
        if usage.key_id in self._spent_tokens and usage.outcome not in NOT_CHARGED:
            self._spent_tokens[usage.key_id] += usage.prompt_tokens + usage.output_tokens
        if self._waiting >= KEPT_MAX:
            self.dropped += 1
            done.set_result(False)
            return done
        self._waiting += 1
        self._given.append((usage, done))
        if len(self._given) == 1:  # its thread is woken once for all of a turn
            self._loop.call_soon(self._hand_over)
        return done

    @property
    def waiting(self) -> int:
        """Records that are not yet committed."""
        return self._waiting

    @property
    def full(self) -> bool:
        """So many records wait for the disk that whoever is counted should not be served."""
        return self._waiting >= DOORS_CLOSE

    async def page(
        self,
        *,
        before: int | None = None,
        limit: int = 100,
        key_id: str | None = None,
        tenant: str | None = None,
    ) -> tuple[list[Usage], int | None]:
        """Records newest first, and what to give as `before` for the next page (None: no more)."""
        assert limit > 0
        wanted = {"number <": before, "key_id =": key_id, "tenant =": tenant}
        where, values = _where(wanted)
        select = f"SELECT number, {', '.join(USAGE_FIELDS)} FROM usage{where}"
        rows = await self._rows(f"{select} ORDER BY number DESC LIMIT ?", *values, limit + 1)
        records = [Usage(**dict(zip(USAGE_FIELDS, r[1:], strict=True))) for r in rows[:limit]]
        return records, rows[limit - 1][0] if len(rows) > limit else None

    async def totals(
        self,
        *,
        by: Sequence[str] = TOTALS_BY,
        since: str | None = None,
        until: str | None = None,
        key_id: str | None = None,
        tenant: str | None = None,
    ) -> list[Total]:
        """Sums by any of day (UTC), tenant, key_id and model; `since` and `until` are such days.

        Raises `InputError` for an unknown name in `by`.
        """
        reject_unknown_keys("by", by, TOTALS_BY)
        wanted = {"day >=": since, "day <=": until, "key_id =": key_id, "tenant =": tenant}
        where, values = _where(wanted)
        columns = ", ".join((*by, *(f"sum({count})" for count in COUNTS)))
        order = f" GROUP BY {', '.join(by)} ORDER BY {', '.join(by)}" if by else ""
        rows = await self._rows(f"SELECT {columns} FROM days{where}{order}", *values)
        return [
            Total(
                by=dict(zip(by, row, strict=False)),
                **dict(zip(COUNTS, (n or 0 for n in row[len(by) :]), strict=True)),
            )
            for row in rows
        ]

    # --- runs -------------------------------------------------------------------------------

    async def begin_run(self, *, model: str, options: Mapping[str, Any], now_s: float) -> None:
        """A server begins to serve; a run without an end was killed, and is marked so."""
        assert self._run is None

        def begin(connection: sqlite3.Connection) -> int | None:
            connection.execute(
                "UPDATE runs SET ended = 'killed', ended_s = seen_s WHERE ended = ''"
            )
            values = (now_s, now_s, model, json.dumps(options, sort_keys=True))
            insert = "INSERT INTO runs (started_s, seen_s, model, options) VALUES (?, ?, ?, ?)"
            return connection.execute(insert, values).lastrowid

        self._run = await self._ask(begin)

    async def runs(self, *, limit: int = 100) -> list[Run]:
        """Runs, newest first."""
        select = f"SELECT {', '.join(RUN_FIELDS)} FROM runs ORDER BY number DESC LIMIT ?"
        found = [dict(zip(RUN_FIELDS, row, strict=True)) for row in await self._rows(select, limit)]
        return [Run(**(row | {"options": json.loads(row["options"])})) for row in found]

    async def close(self, *, ended: str, now_s: float) -> None:
        """Write what waits, say how the run ended, and give the folder back.

        Records that the disk still refuses are given up: whoever awaits them is told.
        """
        self._closing.set()
        if self._run is not None:
            end = "UPDATE runs SET ended = ?, ended_s = max(started_s, ?) WHERE number = ?"
            with contextlib.suppress(DependencyError):  # it will be found to have been killed
                await self._rows(end, ended, now_s, self._run)
        self._hand_over()
        self._inbox.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._connection.close()
        if self._lock is not None:
            self._lock.close()

    # --- keys, for `keys` -------------------------------------------------------------------

    def spent_tokens(self, key_id: str) -> int:
        """Tokens of all its records, those included that wait for the disk."""
        return self._spent_tokens.get(key_id, 0)

    async def keys(self) -> list[Key]:
        """Every key that was ever made, in the order of making."""
        rows = await self._rows(f"SELECT {', '.join(KEY_FIELDS)} FROM keys ORDER BY rowid")
        found = (dict(zip(KEY_FIELDS, row, strict=True)) for row in rows)
        return [
            Key(
                **(
                    row
                    | {"models": None if row["models"] is None else (*json.loads(row["models"]),)}
                )
            )
            for row in found
        ]

    async def add_key(self, key: Key) -> None:
        """Keep a new key; raises `DependencyError` when it cannot be written."""
        names, marks = ", ".join(KEY_FIELDS), ", ".join("?" * len(KEY_FIELDS))
        values = {name: getattr(key, name) for name in KEY_FIELDS}
        values["models"] = None if key.models is None else json.dumps(key.models)
        await self._rows(f"INSERT INTO keys ({names}) VALUES ({marks})", *values.values())
        self._spent_tokens[key.id] = key.spent_tokens

    async def revoke_key(self, key_id: str, *, now_s: float) -> None:
        """Mark a key as revoked; raises `DependencyError` when that cannot be written."""
        await self._rows("UPDATE keys SET revoked_s = ? WHERE id = ?", now_s, key_id)

    # --- how the loop asks ------------------------------------------------------------------

    async def _rows(self, sql: str, *values: Any) -> list[Any]:
        return await self._ask(lambda connection: connection.execute(sql, values).fetchall())

    async def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on the thread, after all records that were given before."""
        self._loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = self._loop.create_future()
        self._hand_over()
        self._inbox.put((work, done))
        return await done

    def _hand_over(self) -> None:
        for given in self._given:
            self._inbox.put(given)
        self._given.clear()

    def _end(self, records: int, futures: Sequence["asyncio.Future[Any]"], written: bool) -> None:
        """They wait no more: committed, or given up."""
        self._waiting -= records
        if not written:
            self.dropped += records
        _resolve(futures, written)

    # --- on the thread ----------------------------------------------------------------------

    def _serve(self) -> None:
        kept: list[Given] = []  # taken in, not yet written
        try:
            self._write_until_closed(kept)
        except Exception as error:  # our bug: nobody may wait for ever because of it
            self.trouble = f"the writer has failed: {type(error).__name__}: {error}"
            self._tell(kept, written=False)
            while self._take_in(kept := [], wait=True):
                self._tell(kept, written=False)
        self._tell(kept, written=False)

    def _write_until_closed(self, kept: list[Given]) -> None:
        pause_s = PAUSE_S
        while self._take_in(kept, wait=not kept):
            if self._flush(kept):
                pause_s = PAUSE_S
            else:
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
        self._flush(kept)

    def _take_in(self, kept: list[Given], *, wait: bool) -> bool:
        """Records join `kept`, questions are answered; False: nothing more will come."""
        with contextlib.suppress(Empty):
            for _ in range(max(1, self._inbox.qsize())):
                item = self._inbox.get(block=wait)
                wait = False
                if item is None:
                    return False
                work, future = item
                if isinstance(work, Usage):
                    kept.append((work, future))
                else:
                    self._answer(work, future, after=kept)
        return True

    def _answer(self, work: Ask, future: "asyncio.Future[Any]", *, after: list[Given]) -> None:
        self._flush(after)
        try:
            answer = work(self._connection)
        except sqlite3.Error as error:
            told = DependencyError(f"the server's data cannot be reached: {error}")
            self._call(_resolve, [future], told)
        else:
            self._call(_resolve, [future], answer)

    def _flush(self, kept: list[Given]) -> bool:
        """Write and acknowledge them all; False: the disk refuses, and the rest is still here."""
        while kept:
            group = kept[:GROUP_MAX]
            if not self._write(group):
                self._put_off(kept)
                return False
            del kept[: len(group)]
            self._tell(group, written=True)
        return True

    def _write(self, group: Sequence[Given]) -> bool:
        """One transaction; a record that is there already, from an attempt before, stays one."""
        rows = orjson.dumps([_usage_row(usage) for usage, _ in group]).decode()
        try:
            self._connection.execute(_RECORD, (rows, self._run))
        except sqlite3.DatabaseError as error:
            if isinstance(error, _OUR_BUGS):
                raise
            self._troubled(f"usage cannot be recorded: {error}")
            return False
        if self.trouble:
            log.info("usage is recorded again")
        self.trouble = ""
        self._unsynced = True
        return True

    def _troubled(self, why: str) -> None:
        """Said in the log when it begins, not at each attempt."""
        if why != self.trouble:
            log.warning(why)
        self.trouble = why

    def _sync(self) -> None:
        """On the second thread: what was written outlives a power cut, too."""
        assert self.folder is not None
        written = os.open(self.folder / LOG_NAME, os.O_RDONLY)
        while not self._closing.wait(SYNC_S):
            if self._unsynced:
                self._unsynced = False
                try:
                    os.fsync(written)
                except OSError as error:
                    self._unsynced = True
                    self._troubled(f"usage cannot be recorded: {error.strerror}")
        os.close(written)

    def _put_off(self, kept: list[Given]) -> None:
        """They wait on, and nobody waits for them."""
        futures = [future for _, future in kept if future is not None]
        if futures:
            kept[:] = [(usage, None) for usage, _ in kept]
            self._call(_resolve, futures, False)

    def _tell(self, group: Sequence[Given], *, written: bool) -> None:
        if group:
            futures = [future for _, future in group if future is not None]
            self._call(self._end, len(group), futures, written)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)


def _resolve(futures: Sequence["asyncio.Future[Any]"], answer: object) -> None:
    for future in futures:
        if not future.done():  # its caller may have given up
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def _where(wanted: Mapping[str, object]) -> tuple[str, list[object]]:
    """The clause for every condition that has a value."""
    asked = {condition: value for condition, value in wanted.items() if value is not None}
    clause = " AND ".join(f"{condition} ?" for condition in asked)
    return (f" WHERE {clause}" if clause else ""), list(asked.values())
