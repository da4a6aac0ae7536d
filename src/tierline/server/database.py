"""The file behind the server's state: one SQLite database in a data folder, for one process.

Called once, by `State.open`.  Without a folder the same schema lives in memory and is gone with
the process.  Whatever is wrong with the folder is said here, before anything is served: it cannot
be written, another server has it, the file is damaged, foreign, or of a newer version.

What follows from a usage record (what its key has spent, the sums of its day, the counts of its
run) is done by one trigger, so it happens in the record's own transaction and exactly when a row
was really inserted.  A record that comes a second time changes nothing.

Invariants
    INV-SRV-11  a request id is counted once, whoever records it again
    INV-SRV-13  a data folder has one server
"""

import fcntl
import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import IO

from tierline.base.errors import DependencyError, InputError, TierlineError

FILE_NAME = "tierline.sqlite3"
LOG_NAME = f"{FILE_NAME}-wal"  # what SQLite has committed since its last checkpoint
LOCK_NAME = "tierline.lock"
SCHEMA = 1  # of the tables below, in `user_version`
APPLICATION = 0x71E51113  # in `application_id`: this file is ours

TABLES = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    models TEXT,              -- JSON array; NULL: every model
    budget_tokens INTEGER,    -- NULL: no end
    created_s REAL NOT NULL,
    expires_s REAL,
    revoked_s REAL,
    digest BLOB NOT NULL,     -- keyed hash of the key's text
    pepper TEXT NOT NULL,     -- which pepper it was keyed with
    spent_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    started_s REAL NOT NULL,
    seen_s REAL NOT NULL,     -- the last sign of life
    ended_s REAL,
    ended TEXT NOT NULL DEFAULT '',
    model TEXT NOT NULL,
    options TEXT NOT NULL,    -- JSON object
    requests INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE usage (
    number INTEGER PRIMARY KEY,  -- in the order of recording, whatever the clock said
    request_id TEXT NOT NULL UNIQUE,
    key_id TEXT NOT NULL,
    tenant TEXT NOT NULL,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    level TEXT NOT NULL,
    outcome TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    arrived_s REAL NOT NULL,
    queue_s REAL,
    ttft_s REAL,
    e2e_s REAL,
    run INTEGER
);
CREATE INDEX usage_of_key ON usage (key_id);
CREATE INDEX usage_of_tenant ON usage (tenant);
CREATE TABLE days (
    day TEXT NOT NULL,        -- UTC, of the arrival
    tenant TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    PRIMARY KEY (day, tenant, key_id, model)
) WITHOUT ROWID;
CREATE TRIGGER usage_counts AFTER INSERT ON usage BEGIN
    UPDATE keys SET spent_tokens = spent_tokens + NEW.prompt_tokens + NEW.output_tokens
        WHERE id = NEW.key_id AND NEW.outcome NOT IN ('error', 'late');
    UPDATE runs SET requests = requests + 1,
        prompt_tokens = prompt_tokens + NEW.prompt_tokens,
        cached_tokens = cached_tokens + NEW.cached_tokens,
        output_tokens = output_tokens + NEW.output_tokens,
        seen_s = max(seen_s, NEW.arrived_s + ifnull(NEW.e2e_s, 0))
        WHERE number = NEW.run;
    INSERT INTO days VALUES (date(NEW.arrived_s, 'unixepoch'), NEW.tenant, NEW.key_id, NEW.model,
        1, NEW.prompt_tokens, NEW.cached_tokens, NEW.output_tokens)
        ON CONFLICT DO UPDATE SET requests = requests + 1,
        prompt_tokens = prompt_tokens + NEW.prompt_tokens,
        cached_tokens = cached_tokens + NEW.cached_tokens,
        output_tokens = output_tokens + NEW.output_tokens;
END;
"""


def lock_folder(folder: Path) -> IO[str]:
    """Make the data folder ours, until the file that this returns is closed, or we are killed.

    Raises `InputError` when another server has it, or it cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        by = f"by process {holder}" if holder else "by another server"
        raise InputError(
            f"the data folder {str(folder)!r} is in use {by}",
            hint="stop that server first, or give this one a data folder of its own",
        ) from None
    except OSError as error:  # a full disk, for one
        with suppress(OSError):  # what could not be written still cannot
            lock.close()
        raise _unusable(folder, error.strerror or str(error)) from None
    return lock


def connect(folder: Path | None) -> sqlite3.Connection:
    """The database of a locked folder, ready to be written by one thread; None: in memory.

    A statement is a transaction of its own, and has outlived the process when it returns.  The
    machine it outlives once `LOG_NAME` was synced.  Raises `InputError` (the file is not ours, or
    newer) or `DependencyError` (it cannot be read or written).
    """
    path = Path(":memory:") if folder is None else folder / FILE_NAME
    try:
        if folder is not None:
            path.touch(mode=0o600)  # SQLite gives its other files the mode of this one
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise _explained(path, error) from None
    try:
        _prepare(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise _explained(path, error) from None
    except InputError:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    application, schema, tables = (
        connection.execute(question).fetchone()[0]
        for question in (
            "PRAGMA application_id",
            "PRAGMA user_version",
            "SELECT count(*) FROM sqlite_schema",
        )
    )
    if tables and application != APPLICATION:
        raise InputError(
            f"{str(path)!r} is a database of something else",
            hint="choose another data folder",
        )
    if schema > SCHEMA:
        raise InputError(
            f"{str(path)!r} was written by a newer tierline (schema {schema}, this one knows "
            f"{SCHEMA})",
            hint="use that version, or another data folder",
        )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    if not tables:
        connection.executescript(
            f"BEGIN; {TABLES} PRAGMA application_id = {APPLICATION};"
            f"PRAGMA user_version = {SCHEMA}; COMMIT;"
        )


def _explained(path: Path, error: OSError | sqlite3.Error) -> TierlineError:
    if type(error) is sqlite3.DatabaseError:  # not a database, or malformed
        return DependencyError(
            f"{str(path)!r} is damaged: {error}",
            hint="restore it from a copy, or move it away to begin with an empty one",
        )
    why = error.strerror if isinstance(error, OSError) else None
    return _unusable(path.parent, why or str(error))


def _unusable(folder: Path, why: str) -> InputError:
    return InputError(
        f"cannot keep data in {str(folder)!r}: {why}",
        hint="choose a data folder that you may write to, on a disk with room",
    )
