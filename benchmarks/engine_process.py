"""Processes that compute one at a time, and what they and the machine did meanwhile.

`bench_engine` and `bench_engine_load` call this.  Linux only: everything is read from /proc.
"""

import ctypes
import json
import mmap
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
WORKER = Path(__file__).with_name("engine_peers.py")


class WorkerDiedError(Exception):
    """The engine is gone: it failed, or was too slow and was ended."""


class Worker:
    """An engine in its own process, behind JSON lines; its words go to a log file."""

    def __init__(self, engine: str, python: str, *, env: Mapping[str, str], log: Path) -> None:
        self.engine, self.log = engine, log
        with log.open("wb") as words:
            self.process = subprocess.Popen(
                [python, str(WORKER), engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                env={**os.environ, **env},
                start_new_session=True,
            )
        self._unread = b""

    def ask(self, timeout_s: float, **command: Any) -> dict[str, Any]:
        """The reply to one command. Raises `WorkerDiedError`, and then the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
            reply: dict[str, Any] = json.loads(self._line(timeout_s))
        except (BrokenPipeError, EOFError, TimeoutError, ValueError) as error:
            self.end()
            lines = self.log.read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no words")
            why = str(error) if isinstance(error, TimeoutError) else last
            raise WorkerDiedError(f"{command['do']}: {why}") from None
        return reply

    def _line(self, timeout_s: float) -> bytes:
        stdout = self.process.stdout
        assert stdout is not None
        until_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(until_s - time.monotonic(), 0)):
                    raise TimeoutError(f"no answer in {timeout_s:g} s")
                part = os.read(stdout.fileno(), 1 << 16)
                if not part:
                    raise EOFError
                self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def end(self) -> None:
        """End the process and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


# -- memory and processor time ----------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all that came from it."""
    found = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in tasks.read_text().split():
            found += family(int(child))
    return found


def status_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status, over the family: VmHWM (peak RSS), VmRSS, RssAnon."""
    total = 0
    for member in family(pid):
        for line in Path(f"/proc/{member}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                total += int(line.split()[1]) * 1024
    return total


def cpu_s(pid: int) -> float:
    """Processor seconds of a process and all that came from it, so far."""
    ticks = 0
    for member in family(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_PER_S


def _machine_busy_s() -> float:
    """Seconds that cores were not idle, time taken by the hypervisor with it."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(None, 9)[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


@dataclass(slots=True)
class Watched:
    """Filled in when the watched piece is over."""

    others_share: float = 0.0  # of all cores: used by anybody but the watched family


@contextmanager
def watching(pid: int) -> Iterator[Watched]:
    """Who else computed meanwhile? Idle engines that spin would show here, too."""
    watched = Watched()
    start_s, busy_s, own_s = time.monotonic(), _machine_busy_s(), cpu_s(pid)
    yield watched
    others_s = (_machine_busy_s() - busy_s) - (cpu_s(pid) - own_s)
    elapsed_s = time.monotonic() - start_s
    watched.others_share = max(others_s / (elapsed_s * (os.cpu_count() or 1)), 0.0)


# -- memory bandwidth -------------------------------------------------------------------------

_READ = r"""
#include <stddef.h>
#include <stdint.h>
uint64_t read_all(const uint64_t* data, size_t count) {
    uint64_t sums[32] = {0};
    for (size_t i = 0; i + 32 <= count; i += 32) {
        for (int j = 0; j < 32; j += 8) __builtin_prefetch(data + i + j + 512, 0, 0);
        for (int j = 0; j < 32; j++) sums[j] += data[i + j];
    }
    uint64_t sum = 0;
    for (int j = 0; j < 32; j++) sum += sums[j];
    return sum;
}
"""


class BandwidthProbe:
    """How fast all cores together read memory right now, by a loop in C.

    512 MiB, many times any last-level cache here, in huge pages where the system gives them;
    the best of three passes.  Without a C compiler there is no probe and no share.
    """

    BYTES = 512 << 20
    PASSES = 3

    def __init__(self, folder: Path) -> None:
        self._read = _compiled(folder)
        if self._read is None:
            return
        # Shared memory, the default, gets no huge pages on most systems, which halves the rate.
        self._memory = mmap.mmap(-1, self.BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        page = b"\1" * mmap.PAGESIZE
        for at in range(0, self.BYTES, mmap.PAGESIZE):
            self._memory[at : at + mmap.PAGESIZE] = page
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._pool = ThreadPoolExecutor(CORES)

    def bytes_per_s(self) -> float | None:
        """Takes about 40 ms."""
        if self._read is None:
            return None
        part = self.BYTES // CORES
        starts = [self._address + i * part for i in range(CORES)]
        best = 0.0
        for _ in range(self.PASSES):
            start_s = time.perf_counter()
            list(self._pool.map(self._read, starts, [part // 8] * CORES))
            best = max(best, part * CORES / (time.perf_counter() - start_s))
        return best


def _compiled(folder: Path) -> Any:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source, library = folder / "read.c", folder / "read.so"
    source.write_text(_READ)
    flags = ["-O3", "-march=native", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).read_all
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_uint64
    return function
