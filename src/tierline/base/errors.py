"""Every error tierline raises on purpose.

    TierlineError
    +-- InputError           the caller can fix it
    |   +-- SpecError        a catalogue entry or deployment file is wrong
    |   +-- TraceError       a workload file is wrong
    |   `-- RequestError     one request is wrong; the server answers 400
    +-- CapacityError        the machine says no, and says by how much
    |   +-- DoesNotFitError      never, at this size; the server answers 422
    |   +-- InfeasibleError      no configuration meets the service level
    |   `-- OverloadedError      not now; the server answers 429 and retry-after
    `-- DependencyError      something outside failed: disk, network, backend

A broken invariant is not in this tree. It is our bug, so it is an `assert`.

Every error keeps the way out in `hint`, apart from the message, so that an edge
(command line, server, gateway) can show both in its own manner.
"""


class TierlineError(Exception):
    """Root of the tree. Catch it only at the edges: CLI, server, gateway."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(TierlineError):
    """The caller can fix this."""


class SpecError(InputError):
    """A catalogue entry or deployment file is wrong."""


class TraceError(InputError):
    """A workload file is wrong."""


class RequestError(InputError):
    """One request is wrong."""


class CapacityError(TierlineError):
    """The machine says no."""


class DoesNotFitError(CapacityError):
    """Needs more memory than there will ever be. Carries both numbers."""

    def __init__(
        self, what: str, *, needed_bytes: float, available_bytes: float, hint: str = ""
    ) -> None:
        assert needed_bytes > available_bytes
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        super().__init__(
            f"{what} needs {_size(needed_bytes)}, {_size(available_bytes)} available",
            hint=hint or "lower the precision, raise tensor parallelism, or pick a larger GPU",
        )


def _size(count: float) -> str:
    """Gigabytes, unless that would show nothing."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size / 10:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


class InfeasibleError(CapacityError):
    """No configuration meets the service level; the message names the bound that forbids it."""


class OverloadedError(CapacityError):
    """Not now. Carries when to come back."""

    def __init__(self, what: str, *, retry_after_ns: int) -> None:
        assert retry_after_ns > 0
        self.retry_after_ns = retry_after_ns
        super().__init__(f"{what} is full, retry in {retry_after_ns / 1e9:.2f} s")


class DependencyError(TierlineError):
    """Something outside failed."""
