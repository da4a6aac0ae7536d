"""`tierline serve` as a process of its own: started on a free port, asked, told to end.

Linux: memory is read from /proc.  The soak benchmark uses this too.
"""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tierline.server.database import FILE_NAME

SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
END_S = 60


@dataclass
class ServerProcess:
    """A server that takes requests now."""

    process: "subprocess.Popen[str]"
    told: dict[str, Any]  # its start line
    log: Path  # what it wrote to standard error

    @property
    def url(self) -> str:
        return str(self.told["url"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def rss_bytes(self) -> int:
        """Memory that it has now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def samples(self) -> list[tuple[str, dict[str, str], float]]:
        """What /metrics says: names, labels, values."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = [match for line in text.splitlines() if (match := SAMPLE.match(line))]
        assert found, text
        return [
            (m["name"], dict(LABEL.findall(m["labels"] or "")), float(m["value"])) for m in found
        ]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        values = [
            value
            for found, own, value in self.samples()
            if found == name and labels.items() <= own.items()
        ]
        assert values, f"no metric {name} {labels}"
        return sum(values)

    def events(self) -> list[dict[str, Any]]:
        """Its log so far; every line has to be one event."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal: negative when the signal itself ended it."""
        self.process.send_signal(number)
        return self.process.wait(END_S)


def command(target: str | Path, *options: str | Path, first: str = "") -> list[str]:
    """The command line of a server on a free port, unless told otherwise.

    `first` is Python that the process runs before, such as a fault to serve with.
    """
    program = (
        ["-c", f"{first}\nfrom tierline.cli import run\nrun()"] if first else ["-m", "tierline"]
    )
    return [sys.executable, *program, "serve", str(target), "--port=0", *map(str, options)]


@contextmanager
def serving(
    target: str | Path, *options: str | Path, log: Path, first: str = ""
) -> Iterator[ServerProcess]:
    """`target` served until the block is left, whatever happens in it."""
    with (
        log.open("ab") as words,
        subprocess.Popen(
            [*command(target, *options, first=first), "--json"],
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            start_new_session=True,  # a signal that a terminal sends to us is not for it
        ) as process,
    ):
        try:
            yield ServerProcess(process, _start_line(process, log), log)
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def _start_line(process: "subprocess.Popen[str]", log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if line.rstrip() == "}":
            told: dict[str, Any] = json.loads(text)
            return told
    raise AssertionError(f"it ended with {process.wait()}: {log.read_text()[-2000:]}")


def refused(target: str | Path, *options: str | Path, first: str = "") -> tuple[int, str]:
    """The exit status and the words of a server that must not come up."""
    ended = subprocess.run(
        command(target, *options, first=first),
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert not ended.stdout, ended.stdout
    return ended.returncode, ended.stderr


def rows(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    """What the state in a data folder holds; nobody is disturbed by looking."""
    with closing(sqlite3.connect(f"file:{folder / FILE_NAME}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()
