"""One request, as the scheduler, the simulator and the importers know it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What arrives: when, how long, for whom, and what prefix it shares.

    `prefix_blocks` are ids of consecutive blocks of the prompt, `Trace.block_tokens` tokens
    each; equal ids mean equal tokens *and* an equal prefix before them. Empty: unknown.
    """

    arrival_ns: int
    input_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()
    session: str = ""
    tenant: str = ""
    priority: int = 0  # larger is more urgent
    adapter: str = ""  # that it is computed with, name@digest
    model: str = ""  # that it is for, where a fleet serves several
    deadline_ns: int | None = None  # for the first token, absolute
