"""`kill -9` at any instant loses no acknowledged usage record and counts none twice, whatever the
client sends again."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tierline.server.database import FILE_NAME

SENDER = """
import asyncio, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from states import key, usage
from tierline.server.state import State

class Hasty(State):
    def _write(self, group):
        self._tell(group, written=True)  # before the commit
        time.sleep(0.005)  # what a disk may take
        return super()._write(group)

    def _flush(self, kept):
        while kept:
            group = kept[:1000]
            self._write(group)
            del kept[:len(group)]
        return True

async def main(folder, first, kind):
    state = kind.open(Path(folder))
    await state.begin_run(model="demo", options={}, now_s=1000.0)
    if not await state.keys():
        await state.add_key(key())
    room = asyncio.Semaphore(200)

    async def send(number):
        if await state.record(usage(number, key_id="k1")):
            os.write(1, b"%d\\n" % number)
        room.release()

    senders = set()
    for number in range(first, first + 10**6):
        await room.acquire()
        sender = asyncio.ensure_future(send(number))
        senders.add(sender)
        sender.add_done_callback(senders.discard)

asyncio.run(main(sys.argv[2], int(sys.argv[3]), {"State": State, "Hasty": Hasty}[sys.argv[4]]))
"""
SENT_AGAIN = 300  # records before the last acknowledged one that the next sender repeats


def acknowledged_until_killed(folder: Path, first: int, kind: str, wait_s: float) -> set[int]:
    """Numbers that a sender said were acknowledged, killed `wait_s` after it said the first."""
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", SENDER, tests, str(folder), str(first), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sender:
        assert sender.stdout is not None
        said = os.read(sender.stdout.fileno(), 1 << 16)
        assert said, "it ended by itself"
        killer = threading.Timer(wait_s, sender.kill)
        killer.start()
        said += sender.stdout.read()  # until it is dead: a full pipe must not hold it up
        killer.join()
        assert sender.wait() == -signal.SIGKILL
    return {int(line) for line in said.split(b"\n")[:-1]}


def look(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / FILE_NAME)) as connection:
        return connection.execute(sql).fetchall()


def lost_and_excess(folder: Path, *, kills: int, kind: str, seed: int) -> tuple[int, int, int]:
    """Acknowledged records, those that a kill lost, and tokens counted that no record has."""
    draw = random.Random(seed)
    acknowledged: set[int] = set()
    lost: set[int] = set()
    for _ in range(kills):
        first = max(0, max(acknowledged, default=0) - SENT_AGAIN)
        acknowledged |= acknowledged_until_killed(folder, first, kind, draw.uniform(0, 0.05))
        there = {int(i.split("-")[1]) for (i,) in look(folder, "SELECT request_id FROM usage")}
        lost |= acknowledged - there  # now: the next sender will send some of them again
    tokens = 15 * len(there)
    spent = look(folder, "SELECT spent_tokens FROM keys")
    days = look(folder, "SELECT sum(prompt_tokens + output_tokens) FROM days")
    runs = look(folder, "SELECT sum(prompt_tokens + output_tokens) FROM runs")
    assert look(folder, "PRAGMA integrity_check") == [("ok",)]
    assert look(folder, "SELECT count(*) FROM runs WHERE ended = 'killed'") == [(kills - 1,)]
    return len(acknowledged), len(lost), max(abs(s[0][0] - tokens) for s in (spent, days, runs))


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_no_acknowledged_record_is_lost_and_none_counts_twice(tmp_path: Path, kills: int) -> None:
    """INV-SRV-10 and INV-SRV-11, on real processes."""
    acknowledged, lost, excess = lost_and_excess(tmp_path, kills=kills, kind="State", seed=kills)

    assert acknowledged > 10 * kills
    assert (lost, excess) == (0, 0)


def test_acknowledging_before_the_commit_would_be_seen(tmp_path: Path) -> None:
    """Negative control: the same kills find what a hasty writer loses."""
    acknowledged, lost, _ = lost_and_excess(tmp_path, kills=8, kind="Hasty", seed=3)

    assert acknowledged > 80
    assert lost > 0
