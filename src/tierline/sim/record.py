"""What a run leaves behind: a column per fact, an entry per request, in order of arrival.

Columns, not objects: a million requests take some hundred megabytes otherwise.  The fleet
writes, `measure` and the pages read.  Step columns and moments are kept only when asked for;
because a run is a function of its inputs, they can be had later by running it again.
"""

import hashlib
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from tierline.base.clock import PS_PER_S
from tierline.workload.slo import ServiceLevel

FINISHED, REFUSED, FAILED, UNFINISHED = range(4)
OUTCOMES = ("finished", "refused", "failed", "unfinished")


def _column(code: str, entries: int, start: int) -> array:  # type: ignore[type-arg]
    return array(code, [start]) * entries


class Requests:
    """One entry per request. Times are picoseconds; -1 where it never came to that."""

    __slots__ = (
        "admitted_ps",
        "arrival_ps",
        "cached_tokens",
        "due_ps",
        "finish_ps",
        "first_ps",
        "input_tokens",
        "itl_max_ps",
        "itl_target_ps",
        "level",
        "loaded_tokens",
        "model",
        "outcome",
        "output_tokens",
        "preemptions",
        "replica",
        "tenant",
    )

    def __init__(self, entries: int) -> None:
        self.arrival_ps = _column("q", entries, 0)
        self.admitted_ps = _column("q", entries, -1)  # first computed or loaded
        self.first_ps = _column("q", entries, -1)  # first token
        self.finish_ps = _column("q", entries, -1)  # last token
        self.itl_max_ps = _column("q", entries, 0)  # longest gap between two of its tokens
        self.due_ps = _column("q", entries, -1)  # TTFT deadline it was scheduled by; -1: none
        self.itl_target_ps = _column("q", entries, -1)
        self.input_tokens = _column("q", entries, 0)
        self.output_tokens = _column("q", entries, 0)
        self.cached_tokens = _column("q", entries, 0)  # of the prompt, found cached
        self.loaded_tokens = _column("q", entries, 0)  # of those, brought from a lower tier
        self.preemptions = _column("l", entries, 0)
        self.replica = _column("l", entries, -1)  # that finished it
        self.level = _column("b", entries, 0)  # index into Run.levels
        self.tenant = _column("l", entries, 0)  # index into Run.tenants
        self.model = _column("b", entries, 0)  # index into Run.models
        self.outcome = _column("b", entries, UNFINISHED)

    def __len__(self) -> int:
        return len(self.arrival_ps)


class Steps:
    """One entry per step event (`repeats` equal steps), when the run was asked to keep them."""

    __slots__ = (
        "context_tokens",
        "decodes",
        "end_ps",
        "pages_used",
        "preempted",
        "prefill_tokens",
        "repeats",
        "replica",
        "start_ps",
        "stored_blocks",
        "waiting",
    )

    def __init__(self) -> None:
        self.start_ps = array("q")
        self.end_ps = array("q")
        self.replica = array("l")
        self.repeats = array("l")
        self.decodes = array("l")
        self.prefill_tokens = array("l")  # of one repeat
        self.context_tokens = array("q")
        self.waiting = array("l")
        self.preempted = array("l")
        self.pages_used = array("l")  # device pages held or cached, at the end
        self.stored_blocks: tuple[array[int], ...] = (array("l"), array("l"), array("l"))

    def __len__(self) -> int:
        return len(self.end_ps)


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened to a watched request."""

    at_ps: int
    what: str  # arrived, routed, blocked, behind, admitted, loading, chunk, first-token, ...
    why: str  # a sentence with numbers: what the scheduler saw and chose


@dataclass(slots=True, kw_only=True)
class ReplicaTotals:
    """What one replica did."""

    number: int
    name: str = ""  # pool and kind, for people
    gpus: int = 1
    usd_per_hour: float = 0.0
    up_ps: int = 0  # time it was paid for
    busy_ps: int = 0  # time in steps
    steps: int = 0
    events: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    pages_total: int = 0
    evicted_blocks: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # by tier
    moved_bytes: dict[str, int] = field(default_factory=dict)  # by kind of transfer
    loaded_tokens: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # by tier they were in


@dataclass(slots=True, kw_only=True)
class Run:
    """One simulation, finished."""

    requests: Requests
    levels: tuple[ServiceLevel, ...]
    tenants: Seq[str] = ("",)
    models: Seq[str] = ("",)
    replicas: list[ReplicaTotals] = field(default_factory=list)
    steps: Steps | None = None
    moments: dict[int, list[Moment]] = field(default_factory=dict)
    faults: list[Moment] = field(default_factory=list)
    end_ps: int = 0
    policy: str = ""
    seed: int = 0

    @property
    def duration_s(self) -> float:
        """From the first instant to the last event, in seconds."""
        return self.end_ps / PS_PER_S

    def hash(self) -> str:
        """Sixteen hex digits that two runs share exactly when every request fared the same."""
        digest = hashlib.sha256()
        columns = self.requests
        for name in ("first_ps", "finish_ps", "itl_max_ps", "output_tokens", "preemptions"):
            digest.update(repr(getattr(columns, name).tolist()).encode())
        for name in ("cached_tokens", "replica", "outcome"):
            digest.update(repr(getattr(columns, name).tolist()).encode())
        return digest.hexdigest()[:16]
