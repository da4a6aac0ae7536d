"""What happened to one request, and what one step did: values that everybody here reads.

`recorder` writes them, on the event loop and nowhere else; the dashboard, metrics, spans, logs
and usage records are made from them.  Instants are picoseconds of the engine's clock
(`*_ps`), except `arrived_s`, which is wall-clock time for people.

No text of a prompt or an answer is ever in here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tierline.base.clock import PS_PER_S
from tierline.engine.observation import Note, StepSample

__all__ = ["EVENT_KINDS", "OUTCOMES", "Event", "Life", "Note", "StepSample"]

# How a request can end; exactly one of them (INV-SRV-1).
OUTCOMES = (
    "stop",  # the model, a stop string or a grammar ended it
    "length",  # max_tokens or the model's positions
    "tool_calls",  # it called tools
    "cancelled",  # somebody asked for that, or its client went away
    "stalled",  # its client stopped reading for too long
    "late",  # its deadline passed before its first token
    "error",  # the engine failed it
    "refused",  # it was turned away at the door: overload, draining, budget
)

EVENT_KINDS = (
    "queued",
    "blocked",  # at the head of the queue, and there is no room
    "stepped back",  # cannot be on time any more
    "loading",  # its prefix comes up from a lower tier
    "admitted",
    "prefill",  # a chunk of its prompt was computed: has `tokens` and a duration
    "preempted",
    "first token",
    "finished",
)


class Event(NamedTuple):  # made some times for each request: a frozen class takes thrice as long
    """One thing that happened to a request."""

    kind: str  # of EVENT_KINDS
    at_ps: int
    until_ps: int  # equal to at_ps for an instant
    tokens: int = 0
    why: str = ""  # the scheduler's reason, in words


@dataclass(slots=True, kw_only=True)
class Life:
    """One request, from its arrival to its one outcome."""

    id: str  # what the response carries, such as chatcmpl-...
    endpoint: str  # chat, completions, responses, embeddings
    model: str
    tenant: str
    key_id: str  # "" where nobody needs a key
    level: str  # its service class
    priority: int  # larger is more urgent
    stream: bool
    arrived_s: float  # Unix time
    arrival_ps: int
    prompt_tokens: int
    output_tokens_max: int
    answers: int = 1  # n
    temperature: float = 1.0
    structured: str = ""  # json_schema, regex, tools...: what bounded its grammar
    tools: int = 0  # tools offered
    ttft_limit_s: float | None = None  # promised
    itl_limit_s: float | None = None
    traceparent: str = ""  # W3C, as the caller sent it
    trace_id: str = ""  # of its span, once it has ended
    engine_ids: tuple[int, ...] = ()  # the engine's requests that serve it
    chain: Sequence[int] = ()  # names of the blocks of its prompt, for replays

    cached_tokens: int = 0
    tier: str = ""  # the lowest tier a cached prefix came from; "": nothing was cached
    admitted_ps: int | None = None
    first_ps: int | None = None
    last_ps: int | None = None
    finished_ps: int | None = None
    output_tokens: int = 0  # of all answers
    gaps: int = 0  # between tokens of one answer
    gaps_ps: int = 0  # their sum
    gap_longest_ps: int = 0
    preemptions: int = 0
    events: list[Event] = field(default_factory=list)
    outcome: str = ""  # "" while it lives
    error: str = ""

    @property
    def queue_s(self) -> float | None:
        """Seconds from its arrival until its prompt was begun."""
        return _seconds(self.arrival_ps, self.admitted_ps)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to its first token."""
        return _seconds(self.arrival_ps, self.first_ps)

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between its tokens."""
        return self.gaps_ps / self.gaps / PS_PER_S if self.gaps else None

    @property
    def e2e_s(self) -> float | None:
        """Seconds from its arrival to its end."""
        return _seconds(self.arrival_ps, self.finished_ps)

    @property
    def state(self) -> str:
        """One word for where it is: waiting, prefill, decode, or its outcome."""
        if self.outcome:
            return self.outcome
        if self.admitted_ps is None:
            return "waiting"
        return "prefill" if self.first_ps is None else "decode"


def _seconds(start_ps: int, end_ps: int | None) -> float | None:
    return None if end_ps is None else (end_ps - start_ps) / PS_PER_S
