"""What the pages are made from: one look at a running server, as plain values.

`dashboard.look` takes it on the event loop; the views are functions of it and of nothing else,
so a test hands them lives that it made, and no page can change what it shows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tierline.base.clock import PS_PER_S
from tierline.server.life import Life, StepSample
from tierline.server.recorder import WINDOW_S
from tierline.workload.slo import ServiceLevel

MARKS = "●▲■◆▼"  # beside the colour of a class, which is never alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A server at one instant. Sequences are live ones: read them at once, on the loop."""

    now_ps: int
    now_s: float  # Unix time
    started_s: float  # likewise
    model: str
    state: str  # ready, draining, ...: one word
    live: Sequence[Life]
    past: Sequence[Life]  # newest last
    steps: Sequence[StepSample]  # newest last
    levels: Sequence[ServiceLevel]  # the most urgent first
    gaps_s: Mapping[str, Sequence[float | None]]  # recent ITL p50, p95, p99 by class

    def recent(self) -> list[Life]:
        """Lives of the window, by when they ended or are: the newest past ones, then the live."""
        since_ps = self.now_ps - round(WINDOW_S * PS_PER_S)
        kept: list[Life] = []
        for life in reversed(self.past):
            if life.finished_ps is not None and life.finished_ps < since_ps:
                break
            kept.append(life)
        return [*reversed(kept), *self.live]

    @property
    def request_rate(self) -> float:
        """Requests/s that came within the window, or since the start where that is shorter."""
        since_ps = self.now_ps - round(WINDOW_S * PS_PER_S)
        came = sum(life.arrival_ps >= since_ps for life in (*self.past, *self.live))
        return came / min(WINDOW_S, max(self.now_s - self.started_s, 1.0))

    def place(self, level: str) -> int:
        """Which colour and mark the class has, on every page; -1: nobody configured it."""
        names = [known.name for known in self.levels]
        return names.index(level) if level in names else -1

    def level(self, name: str) -> ServiceLevel | None:
        """The class of that name."""
        return next((level for level in self.levels if level.name == name), None)


def mark(place: int) -> str:
    """The sign of a class."""
    return "○" if place < 0 else MARKS[place % len(MARKS)]
