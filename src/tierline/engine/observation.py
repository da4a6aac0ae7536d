"""What one step did, for whoever watches an engine: plain values, made between two steps.

`Engine.watch` is called with one a step on the engine's thread, so making it is cheap: numbers
that are there anyway, the chunks of the step, and what the scheduler noted since the last.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Note(NamedTuple):
    """What the scheduler decided about a request, and why, in its own words."""

    at_ps: int
    request_id: int
    what: str  # blocked, stepped back, loading, admitted, preempted, first token, finished
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSample:
    """What one step of the engine did, and what it left."""

    number: int
    start_ps: int
    end_ps: int
    decodes: int  # sequences that advanced by a token
    context_tokens: int  # cached tokens of those, before the step
    prefill_tokens: int
    chunks: tuple[tuple[int, int, int], ...]  # (request, prompt tokens, cached before) of each
    preempted: tuple[int, ...]  # requests
    notes: tuple[Note, ...]
    running: int  # sequences that hold memory, after the step; and so on
    waiting: int
    kv_pages: int  # of the device
    kv_pages_free: int
    kv_pages_cached: int  # held by nobody, kept for reuse
    kv_evicted_blocks: int  # of the device's tier, since the start
