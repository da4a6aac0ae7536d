"""What outlives a process: records are counted once, trouble is said and ends by itself, and a
data folder that cannot be used is refused by name."""

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from states import fill, key, make_room, until, usage, with_state
from tierline.base.clock import PS_PER_S
from tierline.base.errors import DependencyError, InputError, TierlineError
from tierline.server import state as state_module
from tierline.server.database import FILE_NAME, LOG_NAME, SCHEMA
from tierline.server.life import OUTCOMES, Life
from tierline.server.state import NOT_CHARGED, State, Usage, usage_of

DAY_S = 86_400.0


@pytest.fixture(params=["memory", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "data" if request.param == "folder" else None


# Records


def test_a_record_is_what_its_life_was() -> None:
    life = Life(
        id="chatcmpl-7",
        endpoint="completions",
        model="demo",
        tenant="acme",
        key_id="k",
        level="batch",
        priority=0,
        stream=True,
        arrived_s=123.5,
        arrival_ps=1 * PS_PER_S,
        prompt_tokens=12,
        output_tokens_max=9,
        cached_tokens=8,
        admitted_ps=2 * PS_PER_S,
        first_ps=3 * PS_PER_S,
        finished_ps=5 * PS_PER_S,
        output_tokens=7,
        outcome="length",
    )

    assert usage_of(life) == Usage(
        request_id="chatcmpl-7",
        key_id="k",
        tenant="acme",
        model="demo",
        endpoint="completions",
        level="batch",
        outcome="length",
        prompt_tokens=12,
        cached_tokens=8,
        output_tokens=7,
        arrived_s=123.5,
        queue_s=1.0,
        ttft_s=2.0,
        e2e_s=4.0,
    )


def test_records_come_back_newest_first_page_by_page(place: Path | None) -> None:
    records = [usage(i, tenant="odd" if i % 2 else "even") for i in range(7)]

    async def work(state: State) -> Any:
        assert all(await asyncio.gather(*map(state.record, records)))
        pages, before = [], None
        while True:
            page, before = await state.page(before=before, limit=3)
            pages.append(page)
            if before is None:
                return pages, await state.page(tenant="odd"), await state.page(key_id="none")

    pages, odd, nothing = with_state(work, place)

    assert [len(page) for page in pages] == [3, 3, 1]
    assert [record for page in pages for record in page] == records[::-1]
    assert odd == (records[1::2][::-1], None)
    assert nothing == ([], None)


def test_sums_by_what_is_asked(place: Path | None) -> None:
    records = [
        usage(1, key_id="a", tenant="x", arrived_s=0.5 * DAY_S),
        usage(2, key_id="a", tenant="x", arrived_s=1.5 * DAY_S, model="other"),
        usage(3, key_id="b", tenant="y", arrived_s=1.6 * DAY_S, prompt_tokens=100),
    ]

    async def work(state: State) -> Any:
        for record in records:
            state.record(record)
        return (
            await state.totals(by=["day"]),
            await state.totals(by=["tenant", "model"]),
            await state.totals(by=[], since="1970-01-02"),
            await state.totals(by=["key_id"], until="1970-01-01", tenant="x"),
            await state.totals(by=[], key_id="nobody"),
        )

    by_day, by_two, late, early, nothing = with_state(work, place)

    assert [(t.by, t.requests, t.prompt_tokens) for t in by_day] == [
        ({"day": "1970-01-01"}, 1, 10),
        ({"day": "1970-01-02"}, 2, 110),
    ]
    assert [(t.by, t.requests) for t in by_two] == [
        ({"tenant": "x", "model": "demo"}, 1),
        ({"tenant": "x", "model": "other"}, 1),
        ({"tenant": "y", "model": "demo"}, 1),
    ]
    assert [(t.requests, t.cached_tokens, t.output_tokens) for t in late] == [(2, 8, 10)]
    assert [(t.by, t.requests) for t in early] == [({"key_id": "a"}, 1)]
    assert [(t.requests, t.prompt_tokens) for t in nothing] == [(0, 0)]


def test_an_unknown_sum_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown key 'tenent'") as refused:
        with_state(lambda state: state.totals(by=["tenent"]))

    assert "did you mean 'tenant'?" in refused.value.hint


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 50)), max_size=40))
@settings(max_examples=40)
def test_what_is_recorded_twice_counts_once(given_records: list[tuple[int, int, int]]) -> None:
    """INV-SRV-11 and INV-SRV-12, beside a dictionary that keeps the first of each id."""
    first: dict[int, tuple[int, int]] = {}
    for number, owner, tokens in given_records:
        first.setdefault(number, (owner, tokens))

    async def work(state: State) -> Any:
        for owner in range(3):
            await state.add_key(key(f"k{owner}"))
        done = [
            state.record(usage(number, key_id=f"k{owner}", prompt_tokens=tokens))
            for number, owner, tokens in given_records
        ]
        assert all(await asyncio.gather(*done))
        return await state.keys(), (await state.totals(by=[]))[0]

    keys, total = with_state(work)

    assert total.requests == len(first)
    for owner in range(3):
        spent = sum(tokens + 5 for own, tokens in first.values() if own == owner)
        assert keys[owner].spent_tokens == spent


def test_counting_without_looking_would_be_seen(tmp_path: Path) -> None:
    """Negative control of the test above: a sum that does not hang on the insert counts twice."""

    async def work(state: State) -> Any:
        state._connection.execute("DROP TRIGGER usage_counts")
        state._connection.execute(
            "CREATE TRIGGER hasty BEFORE INSERT ON usage BEGIN UPDATE keys SET "
            "spent_tokens = spent_tokens + NEW.prompt_tokens + NEW.output_tokens; END"
        )
        await state.add_key(key())
        await state.record(usage(key_id="k1"))
        await state.record(usage(key_id="k1"))
        return await state.keys()

    (kept,) = with_state(work, tmp_path)

    assert kept.spent_tokens == 30


def test_what_a_key_spent_is_known_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async def first(state: State) -> int:
        await state.add_key(key())
        state.record(usage(key_id="k1"))
        return state.spent_tokens("k1")

    async def second(state: State) -> int:
        return state.spent_tokens("k1")

    assert with_state(first, tmp_path) == 15
    assert with_state(second, tmp_path) == 15


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_the_server_failed_is_recorded_and_not_charged(outcome: str, tmp_path: Path) -> None:
    async def work(state: State) -> Any:
        await state.add_key(key())
        await state.record(usage(key_id="k1", outcome=outcome))
        (kept,) = await state.keys()
        (total,) = await state.totals(by=["key_id"])
        return state.spent_tokens("k1"), kept.spent_tokens, total.prompt_tokens

    charged = 0 if outcome in NOT_CHARGED else 15

    assert with_state(work, tmp_path) == (charged, charged, 10)


def test_keys_come_back_as_they_were(place: Path | None) -> None:
    keys = [key("a", models=("m", "n"), budget_tokens=9, expires_s=5.0), key("b", models=())]

    async def work(state: State) -> Any:
        for one in keys:
            await state.add_key(one)
        await state.revoke_key("b", now_s=77.0)
        return await state.keys()

    first, second = with_state(work, place)

    assert first == keys[0]
    assert (second.models, second.revoked_s) == ((), 77.0)
    assert "digest" not in repr(first)


def test_many_records_share_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(state: State) -> Any:
        groups: list[int] = []
        write = state._write
        monkeypatch.setattr(
            state, "_write", lambda group: groups.append(len(group)) or write(group)
        )
        await asyncio.gather(*(state.record(usage(i)) for i in range(500)))
        return groups

    groups = with_state(work, tmp_path)

    assert sum(groups) == 500
    assert len(groups) < 50


def test_a_caller_that_gave_up_harms_nobody() -> None:
    async def work(state: State) -> Any:
        gone, stays = state.record(usage(1)), state.record(usage(2))
        gone.cancel()
        return await stays, state.waiting

    assert with_state(work) == (True, 0)


# Runs


def test_runs_say_how_they_ended(tmp_path: Path) -> None:
    begin = {"model": "demo", "options": {"port": 8000}}

    async def serve(state: State) -> Any:
        await state.begin_run(**begin, now_s=1000.0)
        await state.record(usage(5, e2e_s=2.0))

    async def look(state: State) -> Any:
        await state.begin_run(**begin, now_s=3000.0)
        return await state.runs()

    with_state(serve, tmp_path, ended="drained")
    # A copy made while it ran is what a kill leaves.
    copied = tmp_path / "copy"

    async def serve_and_copy(state: State) -> Any:
        await serve_again(state)
        copied.mkdir()
        for file in tmp_path.glob(FILE_NAME + "*"):
            shutil.copy(file, copied)

    async def serve_again(state: State) -> Any:
        await state.begin_run(**begin, now_s=1500.0)
        await state.record(usage(600))

    with_state(serve_and_copy, tmp_path)
    newest, killed, drained = with_state(look, copied)

    assert (drained.ended, drained.started_s, drained.ended_s) == ("drained", 1000.0, 2000.0)
    assert (drained.requests, drained.prompt_tokens, drained.seen_s) == (1, 10, 1007.0)
    assert (killed.ended, killed.requests, killed.ended_s) == ("killed", 1, 1600.0)
    assert (newest.ended, newest.ended_s, newest.options) == ("", None, {"port": 8000})


def test_a_clock_that_jumps_back_changes_no_order_and_no_sum(tmp_path: Path) -> None:
    async def work(state: State) -> Any:
        await state.begin_run(model="demo", options={}, now_s=5000.0)
        await state.record(usage(1, arrived_s=9 * DAY_S))
        await state.record(usage(2, arrived_s=1 * DAY_S))  # eight days back
        return await state.page(), await state.totals(by=[])

    (records, _), (total,) = with_state(work, tmp_path)

    async def runs(state: State) -> Any:
        return await state.runs()

    (run,) = with_state(runs, tmp_path)

    assert [r.request_id for r in records] == ["chatcmpl-2", "chatcmpl-1"]
    assert total.requests == 2
    assert run.started_s <= run.ended_s  # closed at 2000, before it began


# While serving: a disk that refuses


def test_a_full_disk_is_said_and_passes_by_itself(place: Path | None) -> None:
    big = 300  # more than the pages in hand take

    async def work(state: State) -> Any:
        await state.add_key(key())
        await state._ask(fill)
        done = [state.record(usage(i, key_id="k1")) for i in range(big)]
        await until(lambda: bool(state.trouble))
        during = state.trouble, state.spent_tokens("k1"), await done[-1]
        questions = await state.runs()  # are answered meanwhile
        await state._ask(make_room)
        await until(lambda: not state.waiting)
        late = await state.record(usage(big))
        total = (await state.totals(by=[]))[0].requests
        return during, questions, late, state.trouble, total

    (trouble, spent, told), questions, late, after, total = with_state(work, place)

    assert "full" in trouble
    assert trouble.startswith("usage cannot be recorded: ")
    assert spent == 15 * big
    assert questions == []
    assert (told, late) == (False, True)  # nobody is held up by a disk that refuses
    assert (after, total) == ("", big + 1)


def test_a_disk_with_room_is_no_trouble() -> None:
    """Negative control of the test above."""

    async def work(state: State) -> Any:
        await asyncio.gather(*(state.record(usage(i)) for i in range(300)))
        return state.trouble

    assert with_state(work) == ""


def test_what_waits_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "KEPT_MAX", 50)
    monkeypatch.setattr(state_module, "DOORS_CLOSE", 40)

    async def work(state: State) -> Any:
        await state._ask(lambda c: c.execute("PRAGMA query_only = 1"))
        done, full = [], []
        for i in range(60):
            done.append(state.record(usage(i)))
            full.append(state.full)
        await until(lambda: bool(state.trouble))
        dropped = state.dropped
        await state._ask(lambda c: c.execute("PRAGMA query_only = 0"))
        await until(lambda: not state.waiting)
        total = (await state.totals(by=[]))[0].requests
        return full, await asyncio.gather(*done), dropped, state.full, total

    full, written, dropped, after, total = with_state(work)

    assert full == [False] * 39 + [True] * 21
    assert written == [False] * 60
    assert (dropped, after, total) == (10, False, 50)


def test_closing_gives_up_what_the_disk_still_refuses(tmp_path: Path) -> None:
    async def run() -> Any:
        state = State.open(tmp_path)
        await state.begin_run(model="demo", options={}, now_s=1.0)
        await state._ask(lambda c: c.execute("PRAGMA query_only = 1"))
        done = state.record(usage())
        await until(lambda: bool(state.trouble))
        await state.close(ended="stopped", now_s=2.0)
        return await done, state.dropped

    async def look(state: State) -> Any:
        await state.begin_run(model="demo", options={}, now_s=3.0)
        return (await state.runs())[1].ended

    assert asyncio.run(run()) == (False, 1)
    assert with_state(look, tmp_path) == "killed"  # it could not say how it ended


def test_a_bug_in_the_writer_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> bool:
        raise ZeroDivisionError("a bug")

    async def work(state: State) -> Any:
        monkeypatch.setattr(state, "_write", broken)
        first = await state.record(usage(1))
        second = await state.record(usage(2))
        return first, second, state.trouble

    assert with_state(work) == (False, False, "the writer has failed: ZeroDivisionError: a bug")


def test_a_key_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    async def work(state: State) -> Any:
        await state._ask(lambda c: c.execute("PRAGMA query_only = 1"))
        try:
            await state.add_key(key())
        finally:
            await state._ask(lambda c: c.execute("PRAGMA query_only = 0"))

    with pytest.raises(DependencyError, match="data cannot be reached"):
        with_state(work, tmp_path)


# At the start: folders that cannot be used


def test_a_second_server_is_refused_by_name(tmp_path: Path) -> None:
    async def work(state: State) -> Any:
        with pytest.raises(InputError) as refused:
            State.open(tmp_path)
        return refused.value

    error = with_state(work, tmp_path)

    assert str(error) == f"the data folder {str(tmp_path)!r} is in use by process {os.getpid()}"
    assert "data folder of its own" in error.hint
    assert with_state(lambda state: state.runs(), tmp_path) == []  # given back at the end


def prepare_newer(folder: Path) -> None:
    with_state(lambda state: state.runs(), folder)
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()


def prepare_foreign(folder: Path) -> None:
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()


def prepare_text(folder: Path) -> None:
    (folder / FILE_NAME).write_text("this is not a database, and long enough to be seen so\n" * 99)


def prepare_cut(folder: Path) -> None:
    """The file stops in the middle of its tables."""
    with_state(lambda state: state.runs(), folder)
    path = folder / FILE_NAME
    path.write_bytes(path.read_bytes()[: 3 * 4096])


def prepare_directory(folder: Path) -> None:
    (folder / FILE_NAME).mkdir()


@pytest.mark.parametrize(
    ("prepare", "message", "hint"),
    [
        (prepare_newer, "was written by a newer tierline", "use that version"),
        (prepare_foreign, "is a database of something else", "another data folder"),
        (prepare_text, "is damaged: file is not a database", "restore it from a copy"),
        (prepare_cut, "is damaged: database disk image is malformed", "restore it from a copy"),
        (prepare_directory, "cannot keep data in .*unable to open", "may write to"),
    ],
)
def test_a_file_that_cannot_be_used_is_said(
    tmp_path: Path, prepare: Callable[[Path], None], message: str, hint: str
) -> None:
    prepare(tmp_path)
    before = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    threads = threading.active_count()
    with pytest.raises(TierlineError, match=message) as refused:
        State.open(tmp_path)

    assert hint in refused.value.hint
    assert before[FILE_NAME] == (tmp_path / FILE_NAME).stat().st_size
    assert threads == threading.active_count()
    with pytest.raises(TierlineError, match=message):  # the lock was given back
        State.open(tmp_path)


def test_only_its_owner_reads_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "new"

    async def work(state: State) -> Any:
        await state.record(usage())
        return {p.name: stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.iterdir())}

    modes = with_state(work, folder)

    assert modes.pop("new") == 0o700
    assert {modes[name] for name in modes if name.startswith(FILE_NAME)} == {0o600}


CHILD = """
import asyncio, os, sys
from pathlib import Path
from tierline.base.errors import TierlineError
from tierline.server.state import State
sys.path.insert(0, {tests!r})
from states import usage, until

async def main(folder, work):
    try:
        state = State.open(folder)
    except TierlineError as error:
        print(type(error).__name__, error, "|", error.hint)
        return
    await work(state)
    await state.close(ended="stopped", now_s=1.0)
"""


def in_a_process(code: str, *, shell: str = "", **options: Any) -> str:
    """Run `code` after `CHILD` in a process; after `shell` in a mount namespace of its own."""
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", CHILD.format(tests=tests) + code]
    if shell:
        command = ["unshare", "-rm", "sh", "-c", shell + ' && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_mounts = pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True
    ).returncode
    != 0,
    reason="no mount namespaces here",
)

IN_FOLDER = """
async def work(state): print("opened")
asyncio.run(main(Path({folder!r}), work))
"""


@needs_mounts
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o ro none {tmp_path}"
    said = in_a_process(IN_FOLDER.format(folder=str(tmp_path)), shell=mount)

    assert said.startswith(f"InputError cannot keep data in {str(tmp_path)!r}: Read-only file")
    assert "may write to" in said


@needs_mounts
def test_a_disk_without_room_at_the_start_is_refused(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=16k none {tmp_path}"
    said = in_a_process(IN_FOLDER.format(folder=str(tmp_path)), shell=mount)

    assert said.startswith(f"InputError cannot keep data in {str(tmp_path)!r}: ")
    assert "on a disk with room" in said


@needs_mounts
def test_a_disk_that_fills_up_is_said_and_room_heals_it(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"
    code = """
async def work(state):
    done = []
    while not state.trouble:
        done += [state.record(usage(len(done) + i)) for i in range(100)]
        await asyncio.sleep(0.005)
    print(state.trouble)
    os.unlink(folder / "ballast")
    await until(lambda: not state.waiting)
    (total,) = await state.totals(by=[])
    print((await asyncio.gather(*done))[0], total.requests == len(done), repr(state.trouble))
folder = Path({folder!r})
(folder / "ballast").write_bytes(bytes(1_000_000))
asyncio.run(main(folder, work))
"""
    said = in_a_process(code.replace("{folder!r}", repr(str(tmp_path))), shell=mount)

    trouble, healed = said.splitlines()
    assert trouble.startswith("usage cannot be recorded: ")
    assert healed == "True True ''"


@needs_mounts
def test_with_room_the_folder_opens(tmp_path: Path) -> None:
    """Negative control of the three tests above."""
    mount = f"mount -t tmpfs -o size=2m none {tmp_path}"

    assert in_a_process(IN_FOLDER.format(folder=str(tmp_path)), shell=mount) == "opened\n"


def test_what_is_acknowledged_is_synced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut costs `SYNC_S` at most: the log is synced after a write, and not without one."""
    synced: list[str] = []
    fsync = os.fsync

    def counted(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(state_module, "SYNC_S", 0.01)
    monkeypatch.setattr(os, "fsync", counted)

    async def work(state: State) -> Any:
        await asyncio.sleep(0.1)
        before = len(synced)
        await state.record(usage())
        await until(lambda: bool(synced))
        return before

    assert with_state(work, tmp_path) == 0
    assert synced == [str(tmp_path / LOG_NAME)]


def test_a_sync_that_fails_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(state_module, "SYNC_S", 0.01)
    monkeypatch.setattr(os, "fsync", broken)

    async def work(state: State) -> Any:
        await state.record(usage())
        await until(lambda: bool(state.trouble))
        return state.trouble

    assert with_state(work, tmp_path) == "usage cannot be recorded: Input/output error"


def test_recording_does_not_wait_for_the_disk() -> None:
    """The loop hands a record over in much less than the disk takes for one."""

    async def work(state: State) -> Any:
        await state._ask(lambda c: c.create_function("slow", 0, lambda: time.sleep(0.2)))
        await state._ask(
            lambda c: c.execute(
                "CREATE TEMP TRIGGER t AFTER INSERT ON usage BEGIN SELECT slow(); END"
            )
        )
        start_s = time.perf_counter()
        done = state.record(usage())
        handed_s = time.perf_counter() - start_s
        await done
        return handed_s, time.perf_counter() - start_s

    handed_s, written_s = with_state(work)

    assert written_s > 0.2
    assert handed_s < written_s / 2
