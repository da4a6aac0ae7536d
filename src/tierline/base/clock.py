"""Time, as an argument.

Code that needs the time takes a `Clock`; only this file may import `time`.  Instants and
durations that decisions compare are integers of picoseconds: fine enough that the cost of
one cached token is a whole number, so k equal steps add up exactly to k single ones, and
a day still fits a machine word.
"""

import time
from typing import Protocol

PS_PER_S = 10**12
PS_PER_MS = 10**9
PS_PER_NS = 1000
FOREVER_PS = 1 << 62  # later than anything; no instant reaches it


class Clock(Protocol):
    """Who is asked for the time."""

    def now_ps(self) -> int:
        """The present instant in picoseconds since an arbitrary start."""
        ...


class SystemClock:
    """Monotonic wall time, for the engine and the server."""

    def now_ps(self) -> int:
        """Picoseconds of the machine's monotonic clock."""
        return time.monotonic_ns() * PS_PER_NS


class VirtualClock:
    """Time that moves only when told to, for simulations and tests."""

    def __init__(self, start_ps: int = 0) -> None:
        self._now_ps = start_ps

    def now_ps(self) -> int:
        """The instant it was last moved to."""
        return self._now_ps

    def advance_to(self, instant_ps: int) -> None:
        """Move forward; time does not run backwards."""
        assert instant_ps >= self._now_ps, "time does not run backwards"
        self._now_ps = instant_ps
