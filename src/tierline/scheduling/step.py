"""The seam between deciding and doing.

A scheduler decides a `Step`; an executor does it and reports what came of it.  There are
two executors, torch in `engine` and the cost model in `sim`, and one scheduler.

    step = scheduler.next_step(now_ps, repeats_max)     # decide
    ...                                                 # do, `repeats` times
    scheduler.complete(step, repeats, finished, now_ps) # account

There is no prefill phase and no decode phase: a prompt chunk is many tokens, a decode is
one, a verified draft is a few.  `repeats` says how often the same step may be done before a
decision could change.  The scheduler bounds what it decides (memory, chunk, order); the
executor bounds what the world does (the next last token, which is why it
passes `repeats_max`, arrivals, landings).  Doing fewer repeats than allowed is always legal.
"""

from collections.abc import Mapping
from typing import Any

from tierline.kv.transfer import Transfer
from tierline.scheduling.sequence import Sequence


class Step:
    """One forward pass, to be done up to `repeats` times.

    Each repeat advances every decoding sequence by a token and every chunk by its tokens.
    """

    __slots__ = (
        "chunks",
        "context_tokens",
        "decodes",
        "decoding",
        "draft_tokens",
        "hastened",
        "number",
        "padding",
        "preempted",
        "repeats",
        "tick",
        "transfers",
    )

    number: int
    tick: int  # decode steps that this scheduler has completed before
    decodes: int  # sequences that advance by one token (plus drafts)
    context_tokens: int  # cached tokens of those, at the first repeat
    decoding: Mapping[int, Sequence]  # a live view, valid until `complete`
    chunks: list[tuple[Sequence, int]]  # prompt tokens by sequence, in the order served
    draft_tokens: int  # to verify beside each decode
    padding: int  # slots that compute although nobody needs them (static batching)
    repeats: int
    preempted: list[Sequence]
    transfers: list[Transfer]  # to be started before the step; "swap-out" must end before it
    hastened: list[tuple[Transfer, tuple[int, int]]]  # under way, and wanted sooner now

    @property
    def tokens(self) -> dict[int, int]:
        """{sequence id: tokens to compute}; built on demand, valid until `complete`."""
        tokens: dict[int, int] = {}
        if self.decodes:
            tokens = dict.fromkeys(self.decoding, 1 + self.draft_tokens)
        for sequence, count in self.chunks:
            tokens[sequence.id] = count
        return tokens

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens of one repeat."""
        return sum(count for _, count in self.chunks)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decodes and not self.chunks

    def __repr__(self) -> str:
        parts: list[Any] = [f"#{self.number}", f"{self.decodes} decodes"]
        parts += [f"{s.id}:{n}" for s, n in self.chunks]
        return f"Step({', '.join(map(str, parts))} x{self.repeats})"
