"""One request on its way through one scheduler.

The first group of fields is what the request asks for; the rest belongs to the scheduler
and nobody else writes it.  While a sequence decodes, `cached_tokens` is its length when it
joined: what has been added since is the number of ticks since (`scheduler`).
"""

from typing import Any

from tierline.base.clock import FOREVER_PS

WAITING, LOADING, PREFILL, DECODE, DONE = range(5)

# Bands: an earlier band goes first, whatever the keys. OWED: its class is below its floor;
# BACKGROUND: nobody waits for it; LATE: its deadline cannot be met any more.
OWED, ON_TIME, BACKGROUND, LATE = -1, 0, 1, 2


class Sequence:
    """A prompt, the tokens generated so far, and the memory they hold."""

    __slots__ = (
        "adapter",
        "admitted_ps",
        "arrival_ps",
        "band",
        "cached_tokens",
        "chain",
        "debt_ps",
        "due_ps",
        "duplicate_pages",
        "finish_ps",
        "first_ps",
        "generated_tokens",
        "hit_tokens",
        "id",
        "itl_ps",
        "joined_tick",
        "key",
        "loaded_tokens",
        "output_max_tokens",
        "owned_run",
        "pages",
        "parked_tier",
        "parked_tokens",
        "pending",
        "preemptions",
        "promised_pages",
        "prompt_tokens",
        "published_blocks",
        "rank",
        "run",
        "state",
        "target_tokens",
        "tenant",
        "tpot_ps",
    )

    def __init__(
        self,
        id: int,  # noqa: A002
        *,
        arrival_ps: int,
        prompt_tokens: int,
        output_max_tokens: int,
        rank: int = 0,
        due_ps: int = FOREVER_PS,
        itl_ps: int = FOREVER_PS,
        tpot_ps: int = FOREVER_PS,
        tenant: str = "",
        adapter: str = "",
        chain: Any = None,
    ) -> None:
        self.id = id
        self.arrival_ps = arrival_ps
        self.prompt_tokens = prompt_tokens
        self.output_max_tokens = output_max_tokens
        self.rank = rank  # of its class; 0 is the most urgent
        self.due_ps = due_ps  # deadline of the first token
        self.itl_ps = itl_ps  # target for every later gap
        self.tpot_ps = tpot_ps  # target for their mean
        self.tenant = tenant
        self.adapter = adapter  # name@digest, or "" for the bare model
        self.chain = chain  # chain[i] names block i, all before it, and the salt; None: not shared

        self.state = WAITING
        self.band = ON_TIME
        self.key: Any = 0  # its place in the order, fixed when it enters the queue
        self.debt_ps = 0  # of that place, what its tenant fell back by
        self.target_tokens = prompt_tokens  # to be cached before the next token is sampled
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.pages = 0  # held by it alone
        self.duplicate_pages = 0  # of those, blocks that a run has too
        self.run: Any = None  # deepest prefix run it holds
        self.owned_run: Any = None  # the run it is extending
        self.published_blocks = 0
        self.promised_pages = 0  # that it will hold in all, as admission foresaw
        self.joined_tick = 0
        self.pending = 0  # transfers it waits for
        self.parked_tokens = 0  # cached tokens that were moved to a lower tier
        self.parked_tier = 0
        self.hit_tokens = 0  # of the prompt, found cached when it was first admitted
        self.loaded_tokens = 0  # of those, brought up from a lower tier
        self.preemptions = 0
        self.admitted_ps = self.first_ps = self.finish_ps = -1

    def anew(self) -> "Sequence":
        """The same request for another scheduler, with nothing done."""
        return Sequence(
            self.id,
            arrival_ps=self.arrival_ps,
            prompt_tokens=self.prompt_tokens,
            output_max_tokens=self.output_max_tokens,
            rank=self.rank,
            due_ps=self.due_ps,
            itl_ps=self.itl_ps,
            tpot_ps=self.tpot_ps,
            tenant=self.tenant,
            adapter=self.adapter,
            chain=self.chain,
        )

    def __repr__(self) -> str:
        names = ("waiting", "loading", "prefill", "decode", "done")
        return (
            f"Sequence({self.id}, {names[self.state]}, {self.cached_tokens}/{self.target_tokens})"
        )
