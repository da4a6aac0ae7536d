"""What time it is, for an engine: the machine's clock, or one that a test moves.

The scheduler takes every instant as an argument; this is where they come from.
"""

import time

from tierline.base.clock import PS_PER_NS


class SystemClock:
    """Monotonic time since the clock was made."""

    __slots__ = ("_start_ns",)

    def __init__(self) -> None:
        self._start_ns = time.monotonic_ns()

    def now_ps(self) -> int:
        """Picoseconds since the start."""
        return (time.monotonic_ns() - self._start_ns) * PS_PER_NS


class VirtualClock:
    """Time that stands still until it is moved."""

    __slots__ = ("_now_ps",)

    def __init__(self) -> None:
        self._now_ps = 0

    def now_ps(self) -> int:
        """Picoseconds since the start."""
        return self._now_ps

    def advance_to(self, instant_ps: int) -> None:
        """Move to an instant that is not before now."""
        assert instant_ps >= self._now_ps, "time goes forward"
        self._now_ps = instant_ps
